"""Attention to exact and coded keys in one softmax, a block of codes in memory at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from flasheva_compile.quantization.state import append, coded_until, last_places, packed_tokens
from flasheva_compile.quantization.transform import compute_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from flasheva_compile.quantization.formats import KvStorage
    from flasheva_compile.quantization.state import Codec, QuantizedState

_BLOCK = 1024  # tokens whose codes are decoded at once


class _Softmax(NamedTuple):
    """A softmax so far: ``[B, Hkv, G, L, ...]``."""

    largest: Tensor
    total: Tensor
    exact: Tensor  # weighted sum of exact values
    coded: Tensor  # weighted sum of decoded values, which may be rotated


def append_and_attend(
    qkv: tuple[Tensor, Tensor, Tensor],
    valid: Tensor,
    state: QuantizedState,
    codec: Codec,
    storage: KvStorage,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Store new tokens and attend from them, each to what came before it and to itself.

    A query that sees ``n`` tokens reads those from ``coded_until(n)`` on exactly, whether it comes
    alone or among others.

    Args:
        qkv: ``[B, Hq, L, D]``, ``[B, Hkv, L, D]``, ``[B, Hkv, L, Dv]``.
        valid: ``[B, L]`` bool: which new tokens are no padding.
        state: With room for them; changed in place.
        codec: Of the state.
        storage: Of the state.
        scale: Score scale.
        softcap: ``softcap * tanh(score / softcap)``; 0 = none.

    Returns:
        ``out [B, Hq, L, Dv]`` and ``lse [B, Hq, L]``; a query that sees no key has zeros, -inf. On
        a device NaN where the state has no room: on the host that is an error.
    """
    query, k, v = qkv
    keys, values, place = _exact_tokens(state, storage, k, v, valid)
    seen = state.length[:, None] + valid.cumsum(1)
    append(state, codec, storage, (k, v), valid)
    dtype = compute_dtype(query.dtype)
    q = query.to(dtype).unflatten(1, (k.shape[1], -1))
    coded = coded_until(seen, storage)

    def capped(scores: Tensor) -> Tensor:
        scores = scores * scale
        return softcap * torch.tanh(scores / softcap) if softcap else scores

    place, limit = place[:, None], seen[..., None]
    visible = (place >= 0) & (place < limit)
    visible &= (place < storage.sink_tokens) | (place >= coded[..., None])
    scores = capped(q @ keys.to(dtype)[:, :, None].transpose(-1, -2))
    softmax = _start(scores.masked_fill(~visible[:, None, None], -torch.inf), values.to(dtype))
    softmax = _add_codes(softmax, codec.transform_queries(q), state, codec, coded, capped, storage)
    out = softmax.exact + codec.restore_values(softmax.coded)
    out = out / softmax.total.clamp_min(torch.finfo(dtype).tiny)[..., None]
    lse = softmax.largest + softmax.total.log()
    lost = (seen > storage.sink_tokens + state.key_codes.shape[2])[:, None, None]
    out, lse = out.masked_fill(lost[..., None], torch.nan), lse.masked_fill(lost, torch.nan)
    return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)


def _exact_tokens(
    state: QuantizedState, storage: KvStorage, k: Tensor, v: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is known exactly before and with new tokens, and its places; -1 = nothing.

    Returns:
        Keys ``[B, Hkv, T, D]``, values ``[B, Hkv, T, Dv]``, places ``[B, T]``.
    """
    sinks, ring = storage.sink_tokens, state.tail_k.shape[2]
    length, last = state.length[:, None], last_places(state.length, ring)
    first = torch.arange(sinks, device=k.device)
    new = length + valid.cumsum(1) - 1
    places = (
        first.where(first < length, -1),
        last.where(last >= sinks, -1),
        new.where(valid, -1),
    )
    keys = torch.cat([state.sink_k, state.tail_k, k], 2)
    values = torch.cat([state.sink_v, state.tail_v, v], 2)
    return keys, values, torch.cat(places, 1)


def _start(scores: Tensor, values: Tensor) -> _Softmax:
    largest = scores.amax(-1)
    weights = (scores - _finite(largest)[..., None]).exp()
    exact = weights @ values[:, :, None]
    return _Softmax(largest, weights.sum(-1), exact, torch.zeros_like(exact))


def _add_codes(
    softmax: _Softmax,
    q: Tensor,
    state: QuantizedState,
    codec: Codec,
    coded: Tensor,
    capped: Callable[[Tensor], Tensor],
    storage: KvStorage,
) -> _Softmax:
    """Go on with the tokens before ``coded [B, L]``, block by block."""
    # Only the host can be asked how many there are; elsewhere all that there is room for are read.
    on_host = q.device.type == "cpu"
    end = int(coded.max()) - storage.sink_tokens if on_host else state.key_codes.shape[2]
    for start in range(0, end, _BLOCK):
        block = slice(start, min(start + _BLOCK, end))
        place = torch.arange(block.start, block.stop, device=q.device) + storage.sink_tokens
        packed_keys, packed_values = packed_tokens(state, block)
        scores = capped(codec.scores(q, packed_keys))
        hidden = place >= coded[..., None]
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
        largest = torch.maximum(softmax.largest, scores.amax(-1))
        shrink = (softmax.largest - _finite(largest)).exp()
        weights = (scores - _finite(largest)[..., None]).exp()
        values = codec.decode_values(packed_values, q.dtype)
        softmax = _Softmax(
            largest,
            softmax.total * shrink + weights.sum(-1),
            softmax.exact * shrink[..., None],
            softmax.coded * shrink[..., None] + weights @ values[:, :, None],
        )
    return softmax


def _finite(largest: Tensor) -> Tensor:
    """Return what is subtracted from scores: 0 where no key is visible."""
    return largest.masked_fill(largest == -torch.inf, 0)
