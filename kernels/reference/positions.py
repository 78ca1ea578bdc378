"""Reference geometry: which document, position and chunk each key column has. Dense and literal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Where every key column stands; all tensors ``[B, S]``.

    Attributes:
        document: Index of the column's document within its row.
        valid: True where the key may be attended.
        start: First valid column of the document; ``S`` if it has none.
        stop: Last valid column of the document plus one; 0 if it has none.
        end: Last column of the document plus one, valid or not.
        packed: Whether the rows hold several documents (segment ids were given).
    """

    document: Tensor
    valid: Tensor
    start: Tensor
    stop: Tensor
    end: Tensor
    packed: bool

    @property
    def position(self) -> Tensor:
        """Columns since the document's first valid key; negative in front of it."""
        return _columns(self.document) - self.start


def _columns(like: Tensor) -> Tensor:
    return torch.arange(like.shape[-1], device=like.device).expand_as(like)


def key_positions(k: Tensor, key_mask: Tensor | None, segment_ids: Tensor | None) -> Positions:
    """Find document, start and end of every key column.

    Args:
        k: Keys, ``[B, Hkv, S, D]``; only the shape and device are used.
        key_mask: ``[B, S]``, True = may attend; None = all.
        segment_ids: ``[B, S]``, contiguous runs of equal ids are documents; None = one document.

    Source:
        Ours: positions count from the first valid key, so left padding changes nothing.
    """
    batch, length = k.shape[0], k.shape[2]
    document = torch.zeros(batch, length, dtype=torch.long, device=k.device)
    if segment_ids is not None:
        document[:, 1:] = (segment_ids[:, 1:] != segment_ids[:, :-1]).cumsum(-1)
    valid = torch.ones_like(document, dtype=torch.bool) if key_mask is None else key_mask.bool()
    column = _columns(document)[:, None, :]
    same = document[:, :, None] == document[:, None, :]
    attended = same & valid[:, None, :]
    # The extra column keeps the reductions defined for S = 0 and for documents without valid key.
    return Positions(
        document=document,
        valid=valid,
        start=_reduce(torch.where(attended, column, length), length).amin(-1),
        stop=_reduce(torch.where(attended, column + 1, 0), 0).amax(-1),
        end=_reduce(torch.where(same, column + 1, 0), 0).amax(-1),
        packed=segment_ids is not None,
    )


def _reduce(values: Tensor, neutral: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, 1), value=neutral)


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """Which keys each slot of the chunk axis summarises.

    Attributes:
        members: ``[B, C, S]``, True where the (valid) key belongs to the chunk in that slot.
        position: ``[B, C]``, position of the chunk's first column in its document.
        document: ``[B, C]``, the chunk's document.
    """

    members: Tensor
    position: Tensor
    document: Tensor

    @property
    def count(self) -> Tensor:
        """Valid keys per chunk, ``[B, C]``."""
        return self.members.sum(-1)


def chunks_of(keys: Positions, chunk_size: int) -> Chunks:
    """Assign keys to chunks aligned at their document's start; slot = first column // chunk_size.

    In packed rows a chunk that its document does not fill has no slot: it could collide with the
    next document's first chunk, and no causal query ever sees it.

    Source:
        Ours; unpadded it is EVA's plain chunking (arXiv:2302.04542, section 4).
    """
    length = keys.document.shape[-1]
    position, column = keys.position, _columns(keys.document)
    first = column - position % chunk_size
    exists = keys.valid & (position >= 0)
    if keys.packed:
        exists = exists & (first + chunk_size <= keys.end)
    slot = torch.arange(-(-length // chunk_size), device=first.device)[None, :, None]
    members = exists[:, None, :] & (first[:, None, :] // chunk_size == slot)
    return Chunks(
        members=members,
        position=_shared(members, position - position % chunk_size),
        document=_shared(members, keys.document),
    )


def _shared(members: Tensor, per_key: Tensor) -> Tensor:
    """Return the value that all members of a chunk agree on (0 for an empty chunk)."""
    return _reduce(torch.where(members, per_key[:, None, :], 0), 0).amax(-1)
