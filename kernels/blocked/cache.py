"""Generation in plain PyTorch: append new tokens to a layer's state, attend to state and tokens.

The order within a call is pool, attend, write: the chunks that the new tokens complete are pooled
first, the ring keeps what the first of them still sees until all have attended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from flasheva_compile.kernels.blocked import fp8
from flasheva_compile.kernels.blocked.cache_state import (
    CacheState,
    advance,
    first_exact,
    held_positions,
    ring_size,
    slot_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from flasheva_compile.kernels.blocked.geometry import AttentionSettings
    from torch import Tensor

    Pool = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

_SCORES = 2**22  # scores of one block of queries: bounds the memory of long calls


def cache_append(
    new: tuple[Tensor, Tensor, Tensor],
    key_mask: Tensor | None,
    state: CacheState,
    pool: Pool,
    s: AttentionSettings,
) -> None:
    """Append ``L`` tokens to ``state``.

    Args:
        new: Queries ``[B, Hkv, L, D]`` averaged over each kv group (read by the ``eva`` rule
            alone), keys ``[B, Hkv, L, D]``, values ``[B, Hkv, L, Dv]``.
        key_mask: ``[B, L]`` bool; None = all valid.
        state: Written in place.
        pool: Maps ``q, k, v [B, Hkv, n c, ...]`` and a mask ``[B, n c]`` to ``n`` chunk tokens.
        s: The layer's settings.
    """
    start, before, after = advance(state.start, state.length, key_mask, new[1].shape[2])
    _pool_complete(new, key_mask, state, (before, after), pool, s)
    _write(new, key_mask, state, (before, after), s)
    state.start.copy_(start)
    state.length.add_(new[1].shape[2])


def decode(
    q: Tensor,
    new: tuple[Tensor, Tensor, Tensor],
    key_mask: Tensor | None,
    state: CacheState,
    pool: Pool,
    s: AttentionSettings,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Append ``L`` tokens and attend from their queries ``[B, Hq, L, D]``; ``(out, lse)``.

    ``alibi_slopes [Hq]`` add ``slope * (key position - query position)``.
    """
    tokens, least = new[1].shape[2], s.chunk_size if state.rfa_k.shape[2] else 1
    step = max(least, min(s.window_size, _SCORES // max(1, _columns(q, state))))
    parts: list[tuple[Tensor, Tensor]] = []
    for lo in range(0, tokens, step):
        block = slice(lo, lo + step)
        part = tuple(x[:, :, block] for x in new)
        mask = None if key_mask is None else key_mask[:, block]
        start, before, after = advance(state.start, state.length, mask, part[1].shape[2])
        _pool_complete(part, mask, state, (before, after), pool, s)  # pyright: ignore[reportArgumentType]
        queries = q[:, :, block]
        parts.append(_attend(queries, part[1:], mask, state, before, s, alibi_slopes))  # pyright: ignore[reportArgumentType]
        _write(part, mask, state, (before, after), s)  # pyright: ignore[reportArgumentType]
        state.start.copy_(start)
        state.length.add_(part[1].shape[2])
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _columns(q: Tensor, state: CacheState) -> int:
    slots = _slots_in_use(state, state.length - state.start) + q.shape[2]
    return q.shape[0] * q.shape[1] * (state.rfa_k.shape[2] + slots)


# --- the chunks that new tokens complete ----------------------------------------------------------


def _pool_complete(
    new: tuple[Tensor, Tensor, Tensor],
    key_mask: Tensor | None,
    state: CacheState,
    counts: tuple[Tensor, Tensor],
    pool: Pool,
    s: AttentionSettings,
) -> None:
    """Write the chunk tokens of chunks that end in ``[before, after)``."""
    before, after = counts
    c, tokens = s.chunk_size, new[1].shape[2]
    if state.rfa_k.shape[2] == 0:
        return
    chunks = (tokens + c - 1) // c  # from the open chunk on; one more could not be complete
    if before.device.type == "cpu" and not bool(((after // c) > (before.clamp(min=0) // c)).any()):
        return
    first = before.clamp(min=0) // c
    position = first[:, None] * c + torch.arange(chunks * c, device=before.device)
    old = position < before[:, None]
    index = (position - before[:, None]).clamp(0, tokens - 1)
    slot = slot_of(position, s).clamp(max=state.exact_mask.shape[1] - 1)
    valid = torch.ones_like(old) if key_mask is None else key_mask.gather(1, index)
    valid = torch.where(old, state.exact_mask.gather(1, slot), valid)
    open_slot = position % c
    held = ((state.open_q, open_slot), (state.exact_k, slot), (state.exact_v, slot))
    qkv = (
        x if kept.shape[2] == 0 else torch.where(_wide(old), _rows(kept, at), _rows(x, index))
        for x, (kept, at) in zip(new, held, strict=True)
    )
    q, k, v = qkv
    pooled = _stored(pool(q, k, v, valid), state)
    if state.alibi:
        pooled.append((state.chunk_mean, _mean_positions(position, valid, c)))
    slots = torch.arange(state.rfa_k.shape[2], device=before.device)
    index = slots - first[:, None]
    complete = (index >= 0) & (index < chunks) & ((slots + 1) * c <= after[:, None])
    index = index.clamp(0, chunks - 1)
    for kept, x in pooled:
        _put(kept, x, index, complete)


def _stored(
    pooled: tuple[Tensor, Tensor, Tensor], state: CacheState
) -> list[tuple[Tensor, Tensor]]:
    """Return tensors of the state, each with what it is to hold of new chunk tokens."""
    k, v, bias = pooled
    if not state.fp8_chunks:
        return list(zip((state.rfa_k, state.rfa_v, state.rfa_bias), pooled, strict=True))
    (k, of_k), (v, of_v) = fp8.encode(k), fp8.encode(v)
    exponents = torch.cat([of_k, of_v], -1)
    kept = (state.rfa_k, state.rfa_v, state.rfa_bias, state.rfa_exponents)
    return list(zip(kept, (k, v, bias, exponents), strict=True))


def _mean_positions(position: Tensor, valid: Tensor, chunk_size: int) -> Tensor:
    """Return the mean of each chunk's valid positions, ``[B, 1, n]``; 0 where none is valid."""
    valid = valid.unflatten(1, (-1, chunk_size))
    total = (position.unflatten(1, (-1, chunk_size)) * valid).sum(-1)
    return (total.double() / valid.sum(-1).clamp(min=1))[:, None]


def _wide(flag: Tensor) -> Tensor:
    return flag[:, None, :, None]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather ``x [B, H, n, ...]`` at ``index [B, m]`` of its third axis."""
    at = index[:, None].expand(-1, x.shape[1], -1)
    return x.gather(2, at if x.dim() == 3 else at[..., None].expand(-1, -1, -1, x.shape[3]))


def _put(kept: Tensor, x: Tensor, index: Tensor, where: Tensor) -> None:
    """Overwrite the slots of ``kept`` where ``where [B, n]`` by ``x`` at ``index [B, n]``."""
    flag = where[:, None] if kept.dim() == 3 else _wide(where)
    kept.copy_(torch.where(flag, _rows(x, index).to(kept.dtype), kept))


# --- writing --------------------------------------------------------------------------------------


def _write(
    new: tuple[Tensor, Tensor, Tensor],
    key_mask: Tensor | None,
    state: CacheState,
    counts: tuple[Tensor, Tensor],
    s: AttentionSettings,
) -> None:
    """Write tokens into sinks and ring, and mean queries into the open chunk."""
    before, after = counts
    tokens = new[1].shape[2]
    _write_open_queries(new[0], state, counts, s)
    if tokens <= ring_size(s):
        _write_few(new, key_mask, state, before, s)
        return
    held = held_positions(after, s)
    index = held - before[:, None]
    take = (index >= 0) & (held >= 0) & (index < tokens)
    index = index.clamp(0, tokens - 1)
    _put(state.exact_k, new[1], index, take)
    _put(state.exact_v, new[2], index, take)
    mask = torch.ones_like(take) if key_mask is None else key_mask.gather(1, index)
    state.exact_mask.copy_(torch.where(take, mask, state.exact_mask))


def _write_few(
    new: tuple[Tensor, Tensor, Tensor],
    key_mask: Tensor | None,
    state: CacheState,
    before: Tensor,
    s: AttentionSettings,
) -> None:
    """Write no more tokens than the ring holds, each to a slot of its own."""
    position = before[:, None] + torch.arange(new[1].shape[2], device=before.device)
    exists = position >= 0
    ring = s.sink_tokens + (position - s.sink_tokens) % ring_size(s)
    slot = torch.where(exists & (position < s.sink_tokens), position, ring)
    # What is before the row's first valid token writes back what is there.
    for kept, x in ((state.exact_k, new[1]), (state.exact_v, new[2])):
        at = slot[:, None, :, None].expand(-1, kept.shape[1], -1, kept.shape[3])
        kept.scatter_(2, at, torch.where(_wide(exists), x, kept.gather(2, at)))
    valid = torch.ones_like(exists) if key_mask is None else key_mask
    flags = torch.where(exists, valid, state.exact_mask.gather(1, slot))
    state.exact_mask.scatter_(1, slot, flags)


def _write_open_queries(
    q: Tensor, state: CacheState, counts: tuple[Tensor, Tensor], s: AttentionSettings
) -> None:
    """Write mean queries into the open chunk, where the rule asks for them."""
    if state.open_q.shape[2] == 0:
        return
    before, after = counts
    last = after[:, None] - 1
    position = last - (last - torch.arange(s.chunk_size, device=before.device)) % s.chunk_size
    index = position - before[:, None]
    take = (index >= 0) & (position >= 0)
    _put(state.open_q, q, index.clamp(0, q.shape[2] - 1), take)


# --- attention ------------------------------------------------------------------------------------


def _attend(
    q: Tensor,
    kv: tuple[Tensor, ...],
    key_mask: Tensor | None,
    state: CacheState,
    before: Tensor,
    s: AttentionSettings,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attend to chunk tokens, to what sinks and ring held before the call, and to the tokens."""
    batch, kv_heads, tokens = kv[0].shape[:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(dtype).unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [B, Hkv, G L, D]
    chunks, slots = _chunks_in_reach(state, before, tokens, s), _slots_in_use(state, before)
    rfa_k, rfa_v = _chunk_tokens(state, chunks, dtype)
    keys = (rfa_k, state.exact_k[:, :, :slots], kv[0])
    values = (rfa_v, state.exact_v[:, :, :slots], kv[1])
    position = before[:, None] + torch.arange(tokens, device=q.device)
    visible = _visible(position, key_mask, state, (chunks, slots), before, s)
    scores = torch.cat([grouped @ x.to(dtype).mT for x in keys], -1) * s.scale
    if s.softcap:
        scores = s.softcap * torch.tanh(scores / s.softcap)
    scores[..., :chunks] += state.rfa_bias[:, :, None, :chunks]
    scores = scores.unflatten(2, (-1, tokens))
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(dtype).view(kv_heads, -1, 1, 1)
        distance = _distances(position, state, (chunks, slots), before, s)
        scores = scores + slopes * distance[:, None, None].to(dtype)
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp().flatten(2, 3)
    sizes = [x.shape[2] for x in values]
    out = sum(w @ x.to(dtype) for w, x in zip(weights.split(sizes, -1), values, strict=True))
    assert isinstance(out, torch.Tensor)
    out = out.view(batch, q.shape[1], tokens, -1)
    lost = (first_exact(position, s) > state.rfa_k.shape[2] * s.chunk_size)[:, None, :, None]
    return out.masked_fill(lost, torch.nan).to(q.dtype), lse.flatten(1, 2)


def _distances(
    position: Tensor,
    state: CacheState,
    counts: tuple[int, int],
    before: Tensor,
    s: AttentionSettings,
) -> Tensor:
    """Return how far each key is from each query, ``[B, L, C + E + L]``; see :func:`_visible`."""
    chunks, slots = counts
    held = held_positions(before, s)[:, :slots].double()
    keys = (state.chunk_mean[:, :1, :chunks].sum(1), held, position)
    return torch.cat(keys, -1)[:, None] - position[:, :, None]


def _chunk_tokens(state: CacheState, chunks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the first chunk tokens' keys and values as numbers."""
    k, v = state.rfa_k[:, :, :chunks], state.rfa_v[:, :, :chunks]
    if not state.fp8_chunks:
        return k, v
    of_k, of_v = state.rfa_exponents[:, :, :chunks].split(1, -1)
    most = torch.finfo(state.exact_v.dtype).max  # which may have been rounded up
    return fp8.decode(k, of_k, dtype), fp8.decode(v, of_v, dtype).clamp(-most, most)


def _chunks_in_reach(state: CacheState, before: Tensor, tokens: int, s: AttentionSettings) -> int:
    """Return how many chunk slots may be visible: on the CPU, where asking is free, just those."""
    capacity = state.rfa_k.shape[2]
    if before.device.type != "cpu":
        return capacity
    last = first_exact(before + tokens - 1, s)
    return min(capacity, int(last.amax()) // s.chunk_size)


def _slots_in_use(state: CacheState, held: Tensor) -> int:
    """Return how many exact slots hold something: on the CPU, where asking is free, just those."""
    slots = state.exact_k.shape[2]
    return slots if held.device.type != "cpu" else max(0, min(slots, int(held.amax())))


def _visible(
    position: Tensor,
    key_mask: Tensor | None,
    state: CacheState,
    counts: tuple[int, int],
    before: Tensor,
    s: AttentionSettings,
) -> Tensor:
    """Return which of chunk tokens, slots and tokens each query sees, ``[B, L, C + E + L]``.

    ``counts`` are the chunk tokens ``C`` and the slots ``E`` in question.
    """
    (chunks, slots), c = counts, s.chunk_size
    low = first_exact(position, s)[:, :, None]
    chunk = torch.arange(chunks, device=position.device)
    compressed = (chunk * c >= s.sink_tokens) & ((chunk + 1) * c <= low)
    held = held_positions(before, s)[:, None, :slots]
    exists = (held >= 0) & (held < before[:, None, None])
    exact = exists & state.exact_mask[:, None, :slots] & ((held >= low) | (held < s.sink_tokens))
    key, query = position[:, None], position[:, :, None]
    among = (key >= 0) & (key <= query) & ((key >= low) | (key < s.sink_tokens))
    if key_mask is not None:
        among = among & key_mask[:, None]
    return torch.cat([compressed, exact, among], -1) & (query >= 0)
