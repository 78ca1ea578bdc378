"""How calls of generation append to what a retrieving layer keeps, and attend.

Every key stays in the store, at its column; chunk tokens lie beside them by position. Nothing there
is ever overwritten, so a call writes all its tokens first and attends then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from flasheva_compile.kernels.blocked.cache_state import advance, first_exact
from flasheva_compile.kernels.blocked.chunk_bounds import (
    bounds_of_each,
    empty_chunks,
    with_magnitudes,
)
from flasheva_compile.kernels.blocked.retrieval_select import largest_scores
from flasheva_compile.kernels.blocked.retrieval_state import (
    columns_of,
    exact_tokens,
    gather_rows,
    selected_tokens,
    write_near,
    write_store,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from flasheva_compile.kernels.blocked.geometry import AttentionSettings
    from flasheva_compile.kernels.blocked.retrieval_select import Retrieval
    from flasheva_compile.kernels.blocked.retrieval_state import Exact, RetrievalState
    from torch import Tensor

    Pool = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

_CPU_BUDGET, _GPU_BUDGET = 1 << 22, 1 << 26  # scores and gathered keys held at once [elements]


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
    position, _ = write(kv, key_mask, state, pool, s, retrieval.weight)
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
    position, exact = write(kv, key_mask, state, pool, s, retrieval.weight)
    step = _block_size(q, state, s, retrieval)
    blocks = [slice(lo, lo + step) for lo in range(0, q.shape[2], step)]
    selected = None
    if state.selected.shape[-1]:
        fresh = [select(q[:, :, x], position[:, x], state, s, retrieval) for x in blocks]
        selected = _of_first_in_block(torch.cat(fresh, 2), position, state, retrieval)
        state.selected.copy_(selected[:, :, -1])
    parts = [
        attend(
            q[:, :, x],
            position[:, x],
            exact,
            state,
            s,
            retrieval,
            None if selected is None else selected[:, :, x],
        )
        for x in blocks
    ]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


# --- writing --------------------------------------------------------------------------------------


def write(
    kv: tuple[Tensor, Tensor],
    key_mask: Tensor | None,
    state: RetrievalState,
    pool: Pool,
    s: AttentionSettings,
    weight: Tensor | None,
) -> tuple[Tensor, Exact]:
    """Append tokens and the chunk tokens that they complete.

    Returns:
        Positions ``[B, L]``, and what :func:`attend` reads for them.
    """
    tokens, room = kv[0].shape[2], state.mask.shape[1]
    start, before, after = advance(state.start, state.length, key_mask, tokens)
    new = torch.arange(tokens, device=start.device)
    column = (state.length + new).clamp(max=room - 1)  # beyond it, results are NaN
    write_store(kv, column, state)
    valid = torch.ones_like(state.mask[:, :1]).expand(-1, tokens) if key_mask is None else key_mask
    state.mask.index_copy_(1, column, valid)
    exact = exact_tokens(kv, state, start, before, s)
    _pool_complete(state, exact, start, (before, after), tokens, pool, s, weight)
    if state.is_near:
        write_near(kv, state, before, s)
    state.start.copy_(start)
    state.length.add_(tokens)
    return before[:, None] + new, exact


def _pool_complete(
    state: RetrievalState,
    exact: Exact,
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
    valid = state.mask.gather(1, columns_of(position, start, state))
    k, v = exact.rows(position)
    pooled = pool(k, k, v, valid)
    slot = first[:, None] + torch.arange(chunks, device=before.device)
    complete = (slot + 1) * c <= after[:, None]
    slot = slot.clamp(max=state.rfa_k.shape[2] - 1)
    kept_chunks = [state.rfa_k, state.rfa_v, state.rfa_bias]
    if state.bounds.shape[2]:
        kept_chunks.append(state.bounds)
        pooled = (*pooled, bounds_of_each(k, valid, c, weight))
    for kept, x in zip(kept_chunks, pooled, strict=True):
        old, flag = gather_rows(kept, slot), complete[:, None]
        at = slot[:, None].expand(-1, kept.shape[1], -1)
        if kept.dim() == 4:
            flag, at = flag[..., None], at[..., None].expand_as(old)
        kept.scatter_(2, at, torch.where(flag, x.to(kept.dtype), old))


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


def attend(
    q: Tensor,
    position: Tensor,
    exact: Exact,
    state: RetrievalState,
    s: AttentionSettings,
    retrieval: Retrieval,
    selected: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attend to chunk tokens, sinks and window, and selected chunks, in one softmax.

    Args:
        q: Queries, ``[B, Hq, L, D]``.
        position: Theirs, ``[B, L]``.
        exact: What :func:`write` returned for them.
        state: After their tokens were written.
        s: The layer's settings.
        retrieval: How many chunks.
        selected: ``[B, Hkv, L, n]`` as in the state; None = the best of each query.
    """
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

    near, seen = _local(position, state, s)
    near_keys, near_values = exact.rows(near)
    local = _products(grouped, near_keys, s)
    local = local.masked_fill(~seen[:, None, None], -torch.inf)
    keys, values, valid = _retrieved(selected, state, s, grouped.dtype)
    retrieved = _capped(grouped.transpose(2, 3) @ keys.to(grouped.dtype).mT, s)
    retrieved = retrieved.masked_fill(~valid[:, :, :, None], -torch.inf).transpose(2, 3)

    scores = torch.cat([compressed, local, retrieved], -1)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    sizes = [x.shape[-1] for x in (compressed, local, retrieved)]
    to_tokens, to_local, to_retrieved = weights.split(sizes, -1)
    out = to_tokens.flatten(2, 3) @ state.rfa_v[:, :, :chunks].to(weights.dtype)
    out = out + to_local.flatten(2, 3) @ near_values.to(weights.dtype)
    more = to_retrieved.transpose(2, 3) @ values.to(weights.dtype)
    out = out.unflatten(2, grouped.shape[2:4]) + more.transpose(2, 3)
    lost = (position + state.start[:, None] >= state.mask.shape[1])[:, None, :, None]
    return out.flatten(1, 2).masked_fill(lost, torch.nan).to(q.dtype), lse.flatten(1, 2)


def _local(position: Tensor, state: RetrievalState, s: AttentionSettings) -> tuple[Tensor, Tensor]:
    """Return the positions of sinks and windows, ``[B, m]``, and who sees them, ``[B, L, m]``."""
    low = first_exact(position, s)[..., None]
    sinks = torch.arange(s.sink_tokens, device=position.device).expand(position.shape[0], -1)
    width = s.window_size + s.chunk_size + position.shape[1]
    window = low[:, 0] + torch.arange(width, device=position.device)
    query = position[..., None]
    seen_sinks = (sinks[:, None] < low) & (sinks[:, None] <= query)
    seen_window = (window[:, None] >= low) & (window[:, None] <= query)
    near = torch.cat([sinks, window], 1)
    valid = state.mask.gather(1, columns_of(near, state.start, state))[:, None]
    return near, torch.cat([seen_sinks, seen_window], 2) & valid & (query >= 0)


def _retrieved(
    selected: Tensor, state: RetrievalState, s: AttentionSettings, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gather the selected chunks' keys and values, ``[B, Hkv, L, n c, ...]``, and their mask."""
    offsets = torch.arange(s.chunk_size, device=selected.device)
    position = (selected.long()[..., None] * s.chunk_size + offsets).flatten(3)
    # A slot that was not found reads the first chunk, not padding, which may hold NaN.
    columns = columns_of(position.clamp(min=0), state.start, state)
    row = torch.arange(selected.shape[0], device=selected.device)[:, None, None, None]
    valid = state.mask[row, columns] & (position >= 0)
    first = columns[..., :: s.chunk_size]
    keys, values = (x.flatten(3, 4) for x in selected_tokens(first, state, s.chunk_size, dtype))
    return keys, values, valid
