"""What one FlashEVA layer keeps between calls of generation, and where each token stands in it.

A row's positions count from its first valid token. Sinks have their own slots, later tokens a ring;
both start at multiples of the chunk size, so that the tokens of a chunk are neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from flasheva_compile.kernels.blocked.geometry import exact_interval

if TYPE_CHECKING:
    from flasheva_compile.kernels.blocked.geometry import AttentionSettings
    from torch import Tensor


class CacheState(NamedTuple):
    """The tensors of one layer; calls write into them. ``T`` sink slots, ring of ``E``.

    Attributes:
        exact_k: ``[B, Hkv, T + E, D]``, keys of the sinks, then of the ring.
        exact_v: ``[B, Hkv, T + E, Dv]``.
        exact_mask: ``[B, T + E]`` bool, whether the slot's token may be attended.
        rfa_k: ``[B, Hkv, C, D]``, one chunk token per complete chunk, in order of position; uint8
            if they are stored in fp8.
        rfa_v: ``[B, Hkv, C, Dv]``, as ``rfa_k``.
        rfa_bias: ``[B, Hkv, C]``, fp32 (fp64 for fp64).
        rfa_exponents: ``[B, Hkv, C, 2]`` int8, of fp8: powers of two of key and value;
            ``[B, Hkv, C, 0]`` otherwise.
        chunk_mean: ``[B, 1, C]``, of ALiBi: mean position of each chunk's valid tokens, in the
            dtype of ``rfa_bias``; ``[B, 0, C]`` otherwise.
        open_q: ``[B, Hkv, c, D]``, mean queries of each kv group over the chunk that is not
            complete, at position modulo ``c``; ``[B, Hkv, 0, D]`` unless the rule is ``eva``.
        start: ``[B]`` int64, column of the row's first valid token; ``length`` while it has none.
        length: ``[1]`` int64, columns seen by every row, padding included.
    """

    exact_k: Tensor
    exact_v: Tensor
    exact_mask: Tensor
    rfa_k: Tensor
    rfa_v: Tensor
    rfa_bias: Tensor
    rfa_exponents: Tensor
    chunk_mean: Tensor
    open_q: Tensor
    start: Tensor
    length: Tensor

    @property
    def fp8_chunks(self) -> bool:
        """Whether chunk tokens are stored in fp8."""
        return self.rfa_k.dtype == torch.uint8

    @property
    def alibi(self) -> bool:
        """Whether positions of chunk tokens are kept."""
        return self.chunk_mean.shape[1] > 0


def ring_size(s: AttentionSettings) -> int:
    """Return ``E`` [tokens]: the longest window, and the open chunk that it may contain."""
    return s.window_size + s.chunk_size if s.window == "sliding" else s.window_size


def visible_chunks(tokens: int, s: AttentionSettings) -> int:
    """Return how many chunk tokens the last of ``tokens`` queries may see: the room they need."""
    lo, _ = exact_interval(max(0, tokens - 1), tokens, s)
    return lo // s.chunk_size


def slot_of(position: Tensor, s: AttentionSettings) -> Tensor:
    """Return the slot of each position ``>= 0``."""
    later = s.sink_tokens + (position - s.sink_tokens) % ring_size(s)
    return torch.where(position < s.sink_tokens, position, later)


def held_positions(end: Tensor, s: AttentionSettings) -> Tensor:
    """Return which position each slot holds once positions ``< end`` are written.

    Args:
        end: ``[B]``, number of positions of each row.
        s: The layer's settings.

    Returns:
        ``[B, T + E]``; negative or ``>= end`` where the slot holds nothing yet.
    """
    sinks, ring = s.sink_tokens, ring_size(s)
    slot = torch.arange(sinks + ring, device=end.device)
    last = end[:, None] - 1
    position = last - (last - slot) % ring
    # Fewer than T + 1 positions leave the ring empty; the formula then yields positions of sinks.
    position = torch.where(position < sinks, -1, position)
    return torch.where(slot < sinks, slot, position)


def first_exact(position: Tensor, s: AttentionSettings) -> Tensor:
    """Return ``a(i)``, the first position of the window of each causal query."""
    lo, _ = exact_interval(position.clamp(min=0), position, s)
    return lo


def advance(
    start: Tensor, length: Tensor, key_mask: Tensor | None, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Place ``tokens`` new columns.

    Args:
        start: ``[B]``, of the layer's state before the call.
        length: ``[1]``, of that state.
        key_mask: ``[B, L]`` bool of the new columns; None = all valid.
        tokens: ``L``.

    Returns:
        ``start [B]`` after the call, and each row's number of positions before (negative if the row
        starts within the call) and after it, ``[B]``.
    """
    started = start < length
    if key_mask is None:
        first = torch.zeros_like(start)
    else:
        column = torch.arange(tokens, device=key_mask.device)
        first = torch.where(key_mask, column, tokens).amin(-1)
    start = torch.where(started, start, length + first)
    before = length - start
    return start, before, before + tokens
