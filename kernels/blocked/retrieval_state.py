"""What a retrieving layer keeps between calls of generation, and where its exact keys are read.

Selected chunks are read from the store, which holds every token at its column: as it came, or in
fp8. Sinks, window and open chunk are never read from fp8, but from copies of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from flasheva_compile.kernels.blocked import fp8
from flasheva_compile.kernels.blocked.cache_state import held_positions, slot_of
from flasheva_compile.kernels.blocked.retrieval_block import gather_chunks

if TYPE_CHECKING:
    from collections.abc import Callable

    from flasheva_compile.kernels.blocked.geometry import AttentionSettings
    from torch import Tensor

_ENCODED_AT_ONCE = 1 << 24  # numbers: encoding takes some times their fp32 size


class RetrievalState(NamedTuple):
    """The tensors of one layer; calls write into them.

    Attributes:
        keys: ``[B, Hkv, N, D]``, by column; ``N`` is at least a chunk. In fp8 the bytes of
            :func:`fp8.encode`, uint8.
        values: ``[B, Hkv, N, Dv]``, alike.
        mask: ``[B, N]`` bool, whether the column's token may be attended.
        rfa_k: ``[B, Hkv, C, D]``, one chunk token per complete chunk, in order of position.
        rfa_v: ``[B, Hkv, C, Dv]``.
        rfa_bias: ``[B, Hkv, C]``, fp32 (fp64 for fp64).
        selected: ``[B, Hkv, n]`` int32, the selection of the open block of queries, -1 = none;
            ``n = 0`` where every query selects for itself.
        bounds: ``[B, Hkv, C, 2 D]``, see :func:`chunk_bounds`; ``C = 0`` where chunk tokens select.
        near_k: ``[B, Hkv, T + E, D]``, copies of the sinks' and the latest keys, in the slots of
            :func:`slot_of`; where ``keys`` is far away, for kernels, or in fp8.
            ``[B, Hkv, 0, D]`` elsewhere.
        near_v: ``[B, Hkv, T + E, Dv]``, of their values.
        exponents: ``[B, Hkv, N, 2]`` uint8, of keys and of values in fp8, apart from the other
            bytes so that those are aligned; ``[B, Hkv, 0, 2]`` elsewhere.
        start: ``[B]`` int64, column of the row's first valid token; ``length`` while it has none.
        length: ``[1]`` int64, columns seen by every row, padding included.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor
    rfa_k: Tensor
    rfa_v: Tensor
    rfa_bias: Tensor
    selected: Tensor
    bounds: Tensor
    near_k: Tensor
    near_v: Tensor
    exponents: Tensor
    start: Tensor
    length: Tensor

    @property
    def is_fp8(self) -> bool:
        """Whether the store holds fp8."""
        return self.exponents.shape[2] > 0

    @property
    def is_near(self) -> bool:
        """Whether sinks and the latest tokens have copies of their own."""
        return self.near_k.shape[2] > 0


class Exact(NamedTuple):
    """Keys and values as they came, of sinks, windows and chunks that a call completes.

    Attributes:
        k: ``[B, Hkv, m, D]``.
        v: ``[B, Hkv, m, Dv]``.
        place: Maps positions ``[B, n]`` to places in both; any place for what is not there: masks
            know.
    """

    k: Tensor
    v: Tensor
    place: Callable[[Tensor], Tensor]

    def rows(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Gather keys and values at positions ``[B, n]``."""
        at = self.place(position)
        return gather_rows(self.k, at), gather_rows(self.v, at)


def columns_of(position: Tensor, start: Tensor, state: RetrievalState) -> Tensor:
    """Return where positions ``[B, ...]`` are stored; clamped, masks know."""
    first = start.view(-1, *[1] * (position.dim() - 1))
    return (first + position).clamp(0, state.mask.shape[1] - 1)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather contiguous ``x [B, H, n, ...]`` at ``index [B, m]`` of its third axis."""
    batch, heads, n = x.shape[:3]
    base = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * n
    at = base + index[:, None]
    return x.flatten(0, 2).index_select(0, at.flatten()).view(*at.shape, *x.shape[3:])


# --- writing --------------------------------------------------------------------------------------


def write_store(kv: tuple[Tensor, Tensor], column: Tensor, state: RetrievalState) -> None:
    """Write new tokens at ``column [L]``."""
    if not state.is_fp8:
        for kept, x in zip((state.keys, state.values), kv, strict=True):
            kept.index_copy_(2, column, x)
        return
    for n, (kept, x) in enumerate(zip((state.keys, state.values), kv, strict=True)):
        own = state.exponents[..., n : n + 1]
        step = max(1, _ENCODED_AT_ONCE // max(1, x[:, :, :1].numel()))
        for part, at in zip(x.split(step, 2), column.split(step), strict=True):
            codes, exponents = fp8.encode(part)
            kept.index_copy_(2, at, codes)
            own.index_copy_(2, at, exponents.view(torch.uint8))


def write_near(
    kv: tuple[Tensor, Tensor], state: RetrievalState, before: Tensor, s: AttentionSettings
) -> None:
    """Copy the new tokens that are sinks or among the latest, from position ``before [B]`` on."""
    tokens = kv[0].shape[2]
    index = held_positions(before + tokens, s) - before[:, None]
    fresh = (index >= 0) & (index < tokens) & (index + before[:, None] >= 0)
    for near, new in zip((state.near_k, state.near_v), kv, strict=True):
        rows = gather_rows(new.contiguous(), index.clamp(0, tokens - 1))
        near.copy_(torch.where(fresh[:, None, :, None], rows, near))


# --- reading --------------------------------------------------------------------------------------


def exact_tokens(
    kv: tuple[Tensor, Tensor],
    state: RetrievalState,
    start: Tensor,
    before: Tensor,
    s: AttentionSettings,
) -> Exact:
    """Return where a call reads what it needs exactly.

    Args:
        kv: Its new tokens; a store that is no fp8 holds them already.
        state: What is near is as it was before the call.
        start: ``[B]``, as of the state after the call.
        before: Positions of each row before it, ``[B]``.
        s: The layer's settings.
    """
    if not state.is_fp8:
        return Exact(state.keys, state.values, lambda at: columns_of(at, start, state))
    # Copies are kept: they are overwritten before the last query of the call has attended.
    k, v = (torch.cat(x, 2) for x in zip((state.near_k, state.near_v), kv, strict=True))
    slots = state.near_k.shape[2]

    def place(position: Tensor) -> Tensor:
        new = position - before[:, None]
        old = slot_of(position.clamp(min=0), s)
        return torch.where(new >= 0, slots + new, old).clamp(max=k.shape[2] - 1)

    return Exact(k, v, place)


def selected_tokens(
    first: Tensor, state: RetrievalState, chunk_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gather chunks from the store.

    Args:
        first: ``[B, Hkv, ...]``, columns where chunks begin.
        state: Of the layer.
        chunk_size: ``c``.
        dtype: What fp8 becomes.

    Returns:
        Keys ``[B, Hkv, ..., c, D]`` and values.
    """

    def chunks(x: Tensor) -> Tensor:
        return gather_chunks(x, first, chunk_size).view(*first.shape, chunk_size, x.shape[3])

    keys, values = chunks(state.keys), chunks(state.values)
    if not state.is_fp8:
        return keys, values
    # The largest number of the model's dtype may have been rounded up.
    most = torch.finfo(state.near_k.dtype).max
    exponents = chunks(state.exponents).view(torch.int8).split(1, -1)
    decoded = (fp8.decode(x, e, dtype) for x, e in zip((keys, values), exponents, strict=True))
    keys, values = (x.clamp(-most, most) for x in decoded)
    return keys, values
