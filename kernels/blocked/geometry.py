"""Where queries, keys and chunks stand, as columns of the key axis; no host synchronisation.

Everything that the formula says in positions is said here in columns: a query attends the valid
columns of ``[lo, hi)`` and ``[begin, sink_end)``, and the chunks between or beside them. Documents
are contiguous, so comparing columns also tells documents apart.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

_IntOrTensor = TypeVar("_IntOrTensor", int, "Tensor")


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """The integers and floats of one attention call.

    Attributes:
        window_size: Window ``w``, a multiple of ``chunk_size`` [tokens].
        chunk_size: Keys per chunk ``c`` [tokens].
        sink_tokens: Exact first tokens, already a multiple of ``chunk_size`` [tokens].
        window: ``"sliding"`` or ``"block"``.
        causal: Whether a query sees only its past.
        q_offset: Column of the first query.
        scale: Score scale.
        softcap: ``softcap * tanh(x / softcap)`` on scores; 0 = none.
        dropout_p: Probability of dropping a weight; 0 = none.
    """

    window_size: int
    chunk_size: int
    sink_tokens: int
    window: str
    causal: bool
    q_offset: int
    scale: float
    softcap: float = 0.0
    dropout_p: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What each query may attend, in columns; ``[B, ...]``, or ``[1, ...]`` when uniform.

    Attributes:
        keys: Number of key columns ``S``.
        uniform: No key mask, no segments: all rows alike, ranges known without looking at data.
        valid: ``[B, S]``, True = may be attended; None = all.
        begin: ``[B, L]``, first column of the query's document; ``S`` for a query in the padding.
        sink_end: ``[B, L]``, column after the last sink that the query may see.
        lo: ``[B, L]``, first column of its window.
        hi: ``[B, L]``, column after its window.
        chunk_first: ``[B, C]``, first column of the chunk in each slot; -1 if it has no valid key.
        chunk_mean: ``[B, C]``, mean column of the chunk's valid keys.
    """

    keys: int
    uniform: bool
    valid: Tensor | None
    begin: Tensor
    sink_end: Tensor
    lo: Tensor
    hi: Tensor
    chunk_first: Tensor
    chunk_mean: Tensor

    def rows(self, first: int, last: int) -> Geometry:
        """Return the geometry of rows ``[first, last)``."""
        if self.uniform:
            return self
        names = ("valid", "begin", "sink_end", "lo", "hi", "chunk_first", "chunk_mean")
        tensors = {name: getattr(self, name) for name in names}
        sliced = {name: t if t is None else t[first:last] for name, t in tensors.items()}
        return dataclasses.replace(self, **sliced)


def exact_interval(
    i: _IntOrTensor, n_doc: _IntOrTensor, s: AttentionSettings
) -> tuple[_IntOrTensor, _IntOrTensor]:
    """Return the window ``[lo, hi)`` of positions of the query at position ``i >= 0``."""
    w, c = s.window_size, s.chunk_size
    if s.causal:
        return (_relu(i - w + 1) // c * c if s.window == "sliding" else i // w * w), i + 1
    if s.window == "block":
        lo = i // w * w
        return lo, _minimum(n_doc, lo + w)
    first = _minimum(_relu(i - w // 2), _relu(n_doc - w))
    return first // c * c, _minimum(n_doc, (first + w + c - 1) // c * c)


def _relu(x: _IntOrTensor) -> _IntOrTensor:
    # Comparison times value is max(0, x) for Python ints and for tensors alike.
    return x * (x > 0)


def _minimum(a: _IntOrTensor, b: _IntOrTensor) -> _IntOrTensor:
    return b - _relu(b - a)


@dataclass(frozen=True, kw_only=True)
class ChunkLayout:
    """Which columns each chunk slot covers.

    Attributes:
        start: ``[B, S]``, first valid column of each column's document (``S`` if none).
        first: ``[B, C]``, first column of the slot's chunk; -1 = no chunk.
        columns: ``[B, C, c]``, the chunk's columns, clamped into ``[0, S)``.
        valid: ``[B, C, c]``, whether that column is a valid key of the chunk.
    """

    start: Tensor
    first: Tensor
    columns: Tensor
    valid: Tensor


def valid_keys(key_mask: Tensor | None, segment_ids: Tensor | None) -> Tensor | None:
    """Return which keys may be attended, ``[B, S]``; None = all, in one document per row."""
    if key_mask is not None:
        return key_mask.bool()
    return None if segment_ids is None else torch.ones_like(segment_ids, dtype=torch.bool)


def chunk_layout(valid: Tensor, segment_ids: Tensor | None, chunk_size: int) -> ChunkLayout:
    """Lay chunks out from each document's first valid key; ``valid`` is ``[B, S]``, ``S > 0``."""
    batch, length = valid.shape
    column = torch.arange(length, device=valid.device)
    candidate = torch.where(valid, column, length)
    if segment_ids is None:
        start = candidate.amin(-1, keepdim=True).expand(batch, length)
        complete = torch.ones_like(valid)
    else:
        change = functional.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0))
        run = change.cumsum(-1)
        per_run = torch.full_like(candidate, length).scatter_reduce(1, run, candidate, "amin")
        start = per_run.gather(1, run)
        # Incomplete chunks could collide with the next document's first one; no query sees them.
        complete = functional.pad(run, (0, chunk_size - 1), value=-1)[:, chunk_size - 1 :] == run
    position = column - start
    is_first = (position >= 0) & (position % chunk_size == 0) & complete
    slots = -(-length // chunk_size)
    padding = (0, slots * chunk_size - length)
    first = functional.pad(torch.where(is_first, column, -1), padding, value=-1)
    first = first.view(batch, slots, chunk_size).amax(-1)
    columns = first[..., None] + torch.arange(chunk_size, device=valid.device)
    inside = (first[..., None] >= 0) & (columns < length)
    columns = columns.clamp(0, length - 1)
    members = valid.gather(1, columns.flatten(1)).view_as(columns) & inside
    return ChunkLayout(start=start, first=first, columns=columns, valid=members)


def attention_geometry(
    queries: int,
    keys: int,
    s: AttentionSettings,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    device: torch.device,
) -> Geometry:
    """Compute what each of ``queries`` may attend among ``keys > 0`` columns."""
    column = s.q_offset + torch.arange(queries, device=device)
    valid = valid_keys(key_mask, segment_ids)
    if valid is None:
        chunk_first = torch.arange(0, keys, s.chunk_size, device=device)[None]
        last = (chunk_first + s.chunk_size).clamp(max=keys) - 1
        chunk_mean = (chunk_first + last).double() / 2
        start, n_doc = torch.zeros_like(column)[None], torch.full_like(column, keys)[None]
    else:
        layout = chunk_layout(valid, segment_ids, s.chunk_size)
        count = layout.valid.sum(-1)
        chunk_first = torch.where(count > 0, layout.first, -1)
        chunk_mean = (layout.columns * layout.valid).sum(-1).double() / count.clamp(min=1)
        stop = torch.where(valid, torch.arange(1, keys + 1, device=device), 0).amax(-1)
        start = layout.start[:, column.clamp(0, keys - 1)]
        n_doc = _relu(stop[:, None] - start)
    position, nothing = column - start, column < start
    if not s.causal:
        # A query in the padding sees what full attention would: as from the edge of its document.
        position, nothing = torch.minimum(position, _relu(n_doc - 1)), n_doc == 0
    lo, hi = exact_interval(_relu(position), n_doc, s)
    sink_end = start + s.sink_tokens
    if s.causal:
        sink_end = torch.minimum(sink_end, column + 1)
    return Geometry(
        keys=keys,
        uniform=valid is None,
        valid=valid,
        begin=start.masked_fill(nothing, keys).int(),
        sink_end=sink_end.masked_fill(nothing, keys).int(),
        lo=(start + lo).int(),
        hi=(start + hi).int(),
        chunk_first=chunk_first.int(),
        chunk_mean=chunk_mean,
    )
