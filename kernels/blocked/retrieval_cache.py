"""What a retrieving layer keeps between calls of generation, and how calls append and attend.

Every key stays exact, at its column; chunk tokens lie beside them by position. Nothing is ever
overwritten, so a call writes all its tokens first and attends then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from flasheva_compile.kernels.blocked.cache_state import advance, first_exact, held_positions
from flasheva_compile.kernels.blocked.chunk_bounds import (
    bounds_of_each,
    empty_chunks,
    with_magnitudes,
)
from flasheva_compile.kernels.blocked.retrieval_block import gather_chunks
from flasheva_compile.kernels.blocked.retrieval_select import largest_scores

if TYPE_CHECKING:
    from collections.abc import Callable

    from flasheva_compile.kernels.blocked.geometry import AttentionSettings
    from flasheva_compile.kernels.blocked.retrieval_select import Retrieval
    from torch import Tensor

    Pool = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

_CPU_BUDGET, _GPU_BUDGET = 1 << 22, 1 << 26  # scores and gathered keys held at once [elements]


class RetrievalState(NamedTuple):
    """The tensors of one layer; calls write into them.

    Attributes:
        keys: ``[B, Hkv, N, D]``, by column; ``N`` is at least a chunk.
        values: ``[B, Hkv, N, Dv]``.
        mask: ``[B, N]`` bool, whether the column's token may be attended.
        rfa_k: ``[B, Hkv, C, D]``, one chunk token per complete chunk, in order of position.
        rfa_v: ``[B, Hkv, C, Dv]``.
        rfa_bias: ``[B, Hkv, C]``, fp32 (fp64 for fp64).
        selected: ``[B, Hkv, n]`` int32, the selection of the open block of queries, -1 = none;
            ``n = 0`` where every query selects for itself.
        bounds: ``[B, Hkv, C, 2 D]``, see :func:`chunk_bounds`; ``C = 0`` where chunk tokens select.
        near_k: ``[B, Hkv, T + E, D]``, copies of the sinks' and the latest keys, in the slots of
            :func:`slot_of`; for kernels, where ``keys`` is far away. ``[B, Hkv, 0, D]`` elsewhere.
        near_v: ``[B, Hkv, T + E, Dv]``, of their values.
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
    start: Tensor
    length: Tensor


def retrieval_append(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    key_mask: Tensor | None,
    state: RetrievalState,
    pool: Pool,
    s: AttentionSettings,
    retrieval: Retrieval,
) -> None:
    """Append ``L`` tokens to ``state``.

    Args:
        q: Queries, ``[B, Hq, L, D]``; read where queries share selections.
        kv: Keys ``[B, Hkv, L, D]`` and values ``[B, Hkv, L, Dv]``.
        key_mask: ``[B, L]`` bool; None = all valid.
        state: Written in place.
        pool: Maps ``q, k, v [B, Hkv, n c, ...]`` and a mask ``[B, n c]`` to ``n`` chunk tokens.
        s: The layer's settings.
        retrieval: How many chunks, and for how many queries at once.
    """
    position = _write(kv, key_mask, state, pool, s, retrieval.weight)
    if state.selected.shape[-1]:
        # Where the last query's block began: at a negative index, in a call before this one.
        index = position.shape[1] - 1 - position[:, -1:].clamp(min=0) % retrieval.block
        at = index.clamp(min=0)
        leader = q.gather(2, at[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        fresh = select(leader, position.gather(1, at), state, s, retrieval)[:, :, 0]
        state.selected.copy_(torch.where((index >= 0)[..., None], fresh, state.selected))


def retrieval_decode(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    key_mask: Tensor | None,
    state: RetrievalState,
    pool: Pool,
    s: AttentionSettings,
    retrieval: Retrieval,
) -> tuple[Tensor, Tensor]:
    """Append ``L`` tokens and attend from their queries; ``out [B, Hq, L, Dv]`` and ``lse``."""
    position = _write(kv, key_mask, state, pool, s, retrieval.weight)
    step = _block_size(q, state, s, retrieval)
    blocks = [slice(lo, lo + step) for lo in range(0, q.shape[2], step)]
    selected = None
    if state.selected.shape[-1]:
        fresh = [select(q[:, :, x], position[:, x], state, s, retrieval) for x in blocks]
        selected = _of_first_in_block(torch.cat(fresh, 2), position, state, retrieval)
        state.selected.copy_(selected[:, :, -1])
    parts = [
        _attend(
            q[:, :, x],
            position[:, x],
            state,
            s,
            retrieval,
            None if selected is None else selected[:, :, x],
        )
        for x in blocks
    ]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


# --- writing --------------------------------------------------------------------------------------


def _write(
    kv: tuple[Tensor, Tensor],
    key_mask: Tensor | None,
    state: RetrievalState,
    pool: Pool,
    s: AttentionSettings,
    weight: Tensor | None,
) -> Tensor:
    """Append tokens and the chunk tokens that they complete; return positions ``[B, L]``."""
    tokens, room = kv[0].shape[2], state.mask.shape[1]
    start, before, after = advance(state.start, state.length, key_mask, tokens)
    new = torch.arange(tokens, device=start.device)
    column = (state.length + new).clamp(max=room - 1)  # beyond it, results are NaN
    state.keys.index_copy_(2, column, kv[0])
    state.values.index_copy_(2, column, kv[1])
    valid = torch.ones_like(state.mask[:, :1]).expand(-1, tokens) if key_mask is None else key_mask
    state.mask.index_copy_(1, column, valid)
    _pool_complete(state, start, (before, after), tokens, pool, s, weight)
    if state.near_k.shape[2]:
        _write_near(kv, state, before, s)
    state.start.copy_(start)
    state.length.add_(tokens)
    return before[:, None] + new


def _write_near(
    kv: tuple[Tensor, Tensor], state: RetrievalState, before: Tensor, s: AttentionSettings
) -> None:
    """Copy the new tokens that are sinks or among the latest, from position ``before [B]`` on."""
    tokens = kv[0].shape[2]
    index = held_positions(before + tokens, s) - before[:, None]
    fresh = (index >= 0) & (index < tokens) & (index + before[:, None] >= 0)
    for near, new in zip((state.near_k, state.near_v), kv, strict=True):
        rows = _rows(new.contiguous(), index.clamp(0, tokens - 1))
        near.copy_(torch.where(fresh[:, None, :, None], rows, near))


def _pool_complete(
    state: RetrievalState,
    start: Tensor,
    counts: tuple[Tensor, Tensor],
    tokens: int,
    pool: Pool,
    s: AttentionSettings,
    weight: Tensor | None,
) -> None:
    """Write the chunk tokens of chunks that end in ``[before, after)``."""
    before, after = counts
    c = s.chunk_size
    first = before.clamp(min=0) // c
    if before.device.type == "cpu" and not bool((after // c > first).any()):
        return
    chunks = (tokens + c - 1) // c  # from the open chunk on; one more could not be complete
    position = first[:, None] * c + torch.arange(chunks * c, device=before.device)
    columns = _columns(position, start, state)
    k, v = _rows(state.keys, columns), _rows(state.values, columns)
    pooled = pool(k, k, v, state.mask.gather(1, columns))
    slot = first[:, None] + torch.arange(chunks, device=before.device)
    complete = (slot + 1) * c <= after[:, None]
    slot = slot.clamp(max=state.rfa_k.shape[2] - 1)
    kept_chunks = [state.rfa_k, state.rfa_v, state.rfa_bias]
    if state.bounds.shape[2]:
        kept_chunks.append(state.bounds)
        pooled = (*pooled, bounds_of_each(k, state.mask.gather(1, columns), c, weight))
    for kept, x in zip(kept_chunks, pooled, strict=True):
        old, flag = _rows(kept, slot), complete[:, None]
        at = slot[:, None].expand(-1, kept.shape[1], -1)
        if kept.dim() == 4:
            flag, at = flag[..., None], at[..., None].expand_as(old)
        kept.scatter_(2, at, torch.where(flag, x.to(kept.dtype), old))


def _columns(position: Tensor, start: Tensor, state: RetrievalState) -> Tensor:
    """Return where positions ``[B, ...]`` are stored; clamped, masks know."""
    first = start.view(-1, *[1] * (position.dim() - 1))
    return (first + position).clamp(0, state.mask.shape[1] - 1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather contiguous ``x [B, H, n, ...]`` at ``index [B, m]`` of its third axis."""
    batch, heads, n = x.shape[:3]
    base = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * n
    at = base + index[:, None]
    return x.flatten(0, 2).index_select(0, at.flatten()).view(*at.shape, *x.shape[3:])


# --- selecting ------------------------------------------------------------------------------------


def select(
    q: Tensor, position: Tensor, state: RetrievalState, s: AttentionSettings, retrieval: Retrieval
) -> Tensor:
    """Select for each query by itself, ``[B, Hkv, L, n]`` as in the state."""
    chunks = _chunks_in_reach(position, state, s)
    scores = _selector_scores(_grouped(q, state, s), state, chunks, s)
    visible = _visible_chunks(position, chunks, s)
    found = largest_scores(scores.amax(2), visible[:, None], min(retrieval.chunks, chunks))
    width = state.selected.shape[-1] - found.shape[-1]
    return torch.nn.functional.pad(found, (0, width), value=-1)


def _of_first_in_block(
    fresh: Tensor, position: Tensor, state: RetrievalState, retrieval: Retrieval
) -> Tensor:
    """Give every query the selection of its block's first query, of this call or stored."""
    query = torch.arange(position.shape[1], device=position.device)
    index = query - position.clamp(min=0) % retrieval.block
    at = index.clamp(min=0)[:, None, :, None].expand_as(fresh)
    here = (index >= 0)[:, None, :, None]
    return torch.where(here, fresh.gather(2, at), state.selected[:, :, None])


def _chunks_in_reach(position: Tensor, state: RetrievalState, s: AttentionSettings) -> int:
    """Return how many chunk slots may be visible: on the CPU, where asking is free, just those."""
    capacity = state.rfa_k.shape[2]
    if position.device.type != "cpu":
        return capacity
    return min(capacity, int(first_exact(position[:, -1], s).amax()) // s.chunk_size)


def _visible_chunks(position: Tensor, chunks: int, s: AttentionSettings) -> Tensor:
    """Return which chunks each query sees, ``[B, L, C]``."""
    slot, c = torch.arange(chunks, device=position.device), s.chunk_size
    return (slot * c >= s.sink_tokens) & ((slot + 1) * c <= first_exact(position, s)[..., None])


# --- attention ------------------------------------------------------------------------------------


def _block_size(
    q: Tensor, state: RetrievalState, s: AttentionSettings, retrieval: Retrieval
) -> int:
    """Return how many queries attend at once."""
    chunks, kv_heads = state.rfa_k.shape[2], state.keys.shape[1]
    retrieved = min(retrieval.chunks, chunks) * s.chunk_size
    dims = state.keys.shape[3] + state.values.shape[3]
    wide = chunks + s.sink_tokens + 2 * (s.window_size + s.chunk_size) + retrieved
    budget = _CPU_BUDGET if q.device.type == "cpu" else _GPU_BUDGET
    one = q.shape[0] * (q.shape[1] * wide + kv_heads * retrieved * dims)
    return max(1, min(s.window_size, budget // max(1, one)))


def _grouped(q: Tensor, state: RetrievalState, s: AttentionSettings) -> Tensor:
    """Return the scaled queries in compute dtype, ``[B, Hkv, G, L, D]``."""
    return q.to(state.rfa_bias.dtype).mul(s.scale).unflatten(1, (state.keys.shape[1], -1))


def _capped(scores: Tensor, s: AttentionSettings) -> Tensor:
    return s.softcap * torch.tanh(scores / s.softcap) if s.softcap else scores


def _products(q: Tensor, keys: Tensor, s: AttentionSettings) -> Tensor:
    """Return scores ``[B, Hkv, G, L, m]`` of keys ``[B, Hkv, m, D]`` that all queries share."""
    scores = q.flatten(2, 3) @ keys.to(q.dtype).mT
    return _capped(scores, s).unflatten(2, q.shape[2:4])


def _chunk_scores(q: Tensor, state: RetrievalState, chunks: int, s: AttentionSettings) -> Tensor:
    scores = _products(q, state.rfa_k[:, :, :chunks], s)
    return scores + state.rfa_bias[:, :, None, None, :chunks]


def _selector_scores(q: Tensor, state: RetrievalState, chunks: int, s: AttentionSettings) -> Tensor:
    if not state.bounds.shape[2]:
        return _chunk_scores(q, state, chunks, s)
    scores = _products(with_magnitudes(q, s.scale), state.bounds[:, :, :chunks], s)
    return scores + empty_chunks(state.rfa_bias)[:, :, None, None, :chunks]


def _attend(
    q: Tensor,
    position: Tensor,
    state: RetrievalState,
    s: AttentionSettings,
    retrieval: Retrieval,
    selected: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attend to chunk tokens, sinks and window, and selected chunks, in one softmax."""
    grouped = _grouped(q, state, s)
    chunks = _chunks_in_reach(position, state, s)
    compressed = _chunk_scores(grouped, state, chunks, s)
    visible = _visible_chunks(position, chunks, s)[:, None]
    if selected is None:
        count = min(retrieval.chunks, chunks)
        by = _selector_scores(grouped, state, chunks, s) if state.bounds.shape[2] else compressed
        selected = largest_scores(by.amax(2), visible, count)
    index = torch.where(selected < 0, chunks, selected).long()
    taken = torch.zeros(*selected.shape[:3], chunks + 1, dtype=torch.bool, device=q.device)
    left = visible & ~taken.scatter_(3, index, value=True)[..., :chunks]
    compressed = compressed.masked_fill(~left[:, :, None], -torch.inf)

    columns, seen = _local(position, state, s)
    local = _products(grouped, _rows(state.keys, columns), s)
    local = local.masked_fill(~seen[:, None, None], -torch.inf)
    keys, values, valid = _retrieved(selected, state, s)
    retrieved = _capped(grouped.transpose(2, 3) @ keys.to(grouped.dtype).mT, s)
    retrieved = retrieved.masked_fill(~valid[:, :, :, None], -torch.inf).transpose(2, 3)

    scores = torch.cat([compressed, local, retrieved], -1)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    sizes = [x.shape[-1] for x in (compressed, local, retrieved)]
    to_tokens, to_local, to_retrieved = weights.split(sizes, -1)
    out = to_tokens.flatten(2, 3) @ state.rfa_v[:, :, :chunks].to(weights.dtype)
    out = out + to_local.flatten(2, 3) @ _rows(state.values, columns).to(weights.dtype)
    more = to_retrieved.transpose(2, 3) @ values.to(weights.dtype)
    out = out.unflatten(2, grouped.shape[2:4]) + more.transpose(2, 3)
    lost = (position + state.start[:, None] >= state.mask.shape[1])[:, None, :, None]
    return out.flatten(1, 2).masked_fill(lost, torch.nan).to(q.dtype), lse.flatten(1, 2)


def _local(position: Tensor, state: RetrievalState, s: AttentionSettings) -> tuple[Tensor, Tensor]:
    """Return the columns of sinks and windows, ``[B, m]``, and who sees them, ``[B, L, m]``."""
    low = first_exact(position, s)[..., None]
    sinks = torch.arange(s.sink_tokens, device=position.device).expand(position.shape[0], -1)
    width = s.window_size + s.chunk_size + position.shape[1]
    window = low[:, 0] + torch.arange(width, device=position.device)
    query = position[..., None]
    seen_sinks = (sinks[:, None] < low) & (sinks[:, None] <= query)
    seen_window = (window[:, None] >= low) & (window[:, None] <= query)
    columns = _columns(torch.cat([sinks, window], 1), state.start, state)
    valid = state.mask.gather(1, columns)[:, None]
    return columns, torch.cat([seen_sinks, seen_window], 2) & valid & (query >= 0)


def _retrieved(
    selected: Tensor, state: RetrievalState, s: AttentionSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Gather the selected chunks' keys and values, ``[B, Hkv, L, n c, ...]``, and their mask."""
    offsets = torch.arange(s.chunk_size, device=selected.device)
    position = (selected.long()[..., None] * s.chunk_size + offsets).flatten(3)
    columns = _columns(position, state.start, state)
    row = torch.arange(selected.shape[0], device=selected.device)[:, None, None, None]
    valid = state.mask[row, columns] & (position >= 0)
    first = columns[..., :: s.chunk_size]
    keys, values = (
        gather_chunks(x, first, s.chunk_size).view(*columns.shape, x.shape[3])
        for x in (state.keys, state.values)
    )
    return keys, values, valid
