"""FlashEVA's formula for FlexAttention: masks over [chunk tokens | keys] and their block structure.

The chunk tokens are padded to whole blocks and stand in front of the keys. The block mask comes
from interval arithmetic on blocks: nothing of size queries x keys is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

BLOCK_SIZE = 128


@dataclass(frozen=True, kw_only=True)
class JointAxis:
    """Where chunk tokens and keys stand on the joint axis, and which of them a query sees.

    Attributes:
        length: Queries, and keys.
        window_size: Window ``w``, a multiple of ``chunk_size`` [tokens].
        chunk_size: Keys per chunk ``c`` [tokens].
        sink_size: Exact first tokens, whole chunks [tokens].
        window: ``"sliding"`` or ``"block"``.
        causal: Whether a query sees only its past.
    """

    length: int
    window_size: int
    chunk_size: int
    sink_size: int
    window: str
    causal: bool

    @property
    def chunks(self) -> int:
        """Number of chunk tokens."""
        return -(-self.length // self.chunk_size)

    @property
    def padded_chunks(self) -> int:
        """Column of the first key."""
        return -(-self.chunks // BLOCK_SIZE) * BLOCK_SIZE

    @property
    def columns(self) -> int:
        """Size of the joint axis."""
        return self.padded_chunks + self.length

    def window_of(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """Return the exact window ``[lo, hi)`` of keys of the query at ``i``; ``lo`` is aligned."""
        w, c, n = self.window_size, self.chunk_size, self.length
        if self.causal:
            first = i // w * w if self.window == "block" else (i - (w - 1)).clamp(min=0) // c * c
            return first, i + 1
        if self.window == "block":
            lo = i // w * w
            return lo, (lo + w).clamp(max=n)
        first = (i - w // 2).clamp(min=0).clamp(max=max(0, n - w))
        return first // c * c, ((first + w + c - 1) // c * c).clamp(max=n)

    def chunks_of(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(past, future)``: chunks ``[sinks, past)`` and ``[future, chunks)`` are seen."""
        lo, hi = self.window_of(i)
        if self.causal:
            return lo // self.chunk_size, torch.full_like(i, self.chunks)
        first = (hi + self.chunk_size - 1) // self.chunk_size
        return lo // self.chunk_size, first.clamp(min=self.sink_size // self.chunk_size)


def mask_mod(axis: JointAxis) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return FlexAttention's ``mask_mod``: True where the query sees the column.

    What depends on the query alone is computed per row; only comparisons are left per element.
    """
    keys_from, sinks, chunks = axis.padded_chunks, axis.sink_size, axis.chunks
    first_chunk, causal = axis.sink_size // axis.chunk_size, axis.causal

    def visible(b: Tensor, h: Tensor, q: Tensor, column: Tensor) -> Tensor:
        lo, hi = axis.window_of(q)
        seen = (column >= lo + keys_from) & (column < hi + keys_from)
        if sinks:
            sink = (column >= keys_from) & (column < keys_from + sinks)
            seen = seen | ((sink & (column <= q + keys_from)) if causal else sink)
        past, future = axis.chunks_of(q)
        chunk = column < past
        if not causal:
            chunk = chunk | ((column >= future) & (column < chunks))
        if first_chunk:
            chunk = chunk & (column >= first_chunk)
        return seen | chunk

    return visible


def constant_bias(axis: JointAxis, bias: float) -> Callable[..., Tensor]:
    """Return a ``score_mod`` that adds one number to every chunk token: the cheapest there is."""
    keys_from = axis.padded_chunks

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, column: Tensor) -> Tensor:
        return torch.where(column < keys_from, score + bias, score)

    return score_mod


def tensor_bias(axis: JointAxis, rfa_bias: Tensor, group: int) -> Callable[..., Tensor]:
    """Return a ``score_mod`` that reads ``rfa_bias [B, Hkv, C]``, as a trained rule needs."""
    table = functional.pad(rfa_bias, (0, axis.columns - axis.chunks))

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, column: Tensor) -> Tensor:
        return score + table[b, h // group, column]

    return score_mod


def join(axis: JointAxis, chunk_tokens: Tensor, keys: Tensor) -> Tensor:
    """Concatenate ``[B, H, C, D]``, padded to whole blocks, and ``[B, H, N, D]``."""
    padding = (0, 0, 0, axis.padded_chunks - axis.chunks)
    return torch.cat([functional.pad(chunk_tokens, padding), keys], 2)


def split(axis: JointAxis, joint: Tensor) -> tuple[Tensor, Tensor]:
    """Undo :func:`join`."""
    return joint[:, :, : axis.chunks], joint[:, :, axis.padded_chunks :]


def visible_blocks(axis: JointAxis, device: torch.device) -> tuple[Tensor, Tensor]:
    """Find the blocks of which something, and of which everything, is seen.

    Windows move to the right and consecutive ones touch, so over a block of rows the union of the
    windows is ``[lo(first), hi(last))`` and their intersection ``[lo(last), hi(first))``.

    Returns:
        Two boolean tensors, ``[blocks of queries, blocks of columns]``.
    """
    row = torch.arange(0, axis.length, BLOCK_SIZE, device=device)[:, None]
    last_row = (row + BLOCK_SIZE - 1).clamp(max=axis.length - 1)
    column = torch.arange(0, axis.columns, BLOCK_SIZE, device=device)[None]
    is_chunk = column < axis.padded_chunks

    first = column - axis.padded_chunks  # first and last key of the block
    last = first + BLOCK_SIZE - 1
    (lo, hi), (last_lo, last_hi) = axis.window_of(row), axis.window_of(last_row)
    sinks = torch.full_like(row, min(axis.sink_size, axis.length))
    common, reached = sinks, sinks
    if axis.causal:
        common, reached = torch.minimum(sinks, row + 1), torch.minimum(sinks, last_row + 1)
    some_key = ((last >= lo) & (first < last_hi)) | (first < reached)
    start = torch.where(last_lo <= common, 0, last_lo)  # sinks and window may touch
    every_key = ((first >= start) & (last < hi)) | (last < common)

    first, last, sink = column, column + BLOCK_SIZE - 1, axis.sink_size // axis.chunk_size
    (past, future), (last_past, last_future) = axis.chunks_of(row), axis.chunks_of(last_row)
    some_chunk = first.clamp(min=sink) < torch.minimum(last + 1, last_past)
    some_chunk = some_chunk | (torch.maximum(first, future) < (last + 1).clamp(max=axis.chunks))
    every_chunk = (first >= sink) & (last < past)
    every_chunk = every_chunk | ((first >= last_future) & (last < axis.chunks))
    some = torch.where(is_chunk, some_chunk, some_key)
    return some, torch.where(is_chunk, every_chunk, every_key) & some


def block_mask(axis: JointAxis, device: torch.device) -> BlockMask:
    """Build FlexAttention's block mask without evaluating the mask."""
    some, every = visible_blocks(axis, device)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every),
        *_ordered(every),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=mask_mod(axis),
        seq_lengths=(axis.length, axis.columns),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """List the blocks of each row: how many, and which ones, those first, ``[1, 1, ...]``."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int()[None, None], order.int()[None, None].contiguous()
