"""The ops of generation, ``flasheva::cache_append`` and ``flasheva::decode``: they write a state.

A call sees ``L`` new tokens and the state of :class:`CacheState`. Decoding token by token, in
blocks, or everything at once computes one function: ``kernels/reference/attention.py``.
"""

# ruff: noqa: ANN401 - the ops' functions are typed by their schemas
from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.implementations import Masks, pool, runs_kernels
from flasheva_compile.kernels.blocked import cache as blocked
from flasheva_compile.kernels.blocked.cache_state import CacheState, ring_size
from flasheva_compile.kernels.blocked.geometry import AttentionSettings
from flasheva_compile.lowering import launch_decode, launch_extend
from flasheva_compile.lowering.pooled_chunks import kernel_rule
from flasheva_compile.op_checks import OP_VERSION, check_cache, check_slopes
from flasheva_compile.op_registration import fakes, implements
from flasheva_compile.ops import eva_features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from flasheva_compile.config import EvaConfig

_STATE = tuple(CacheState._fields)
_STATE_SCHEMA = ", ".join(f"Tensor(s{i}!) {name}" for i, name in enumerate(_STATE))
_INPUTS = f"Tensor q, Tensor k, Tensor v, Tensor[] parameters, Tensor? key_mask, {_STATE_SCHEMA}"
_OPTIONS = (
    "str rule, int window_size, int chunk_size, int sink_tokens, str window, float scale, "
    "float softcap, str version"
)
_SLOPES = "Tensor? alibi_slopes=None"
"""Of ``decode``: ``[Hq]``; adds ``slope * (key position - query position)``."""


def cache_options(config: EvaConfig, scale: float, softcap: float = 0.0) -> dict[str, Any]:
    """Return the keyword arguments of both ops for a layer of ``config``."""
    c = config.chunk_size
    return {
        "rule": config.chunk_rule,
        "window_size": config.window_size,
        "chunk_size": c,
        "sink_tokens": -(-config.sink_tokens // c) * c,
        "window": config.window,
        "scale": scale,
        "softcap": softcap,
        "version": OP_VERSION,
    }


def cache_settings(o: dict[str, Any]) -> AttentionSettings:
    """Return the settings of a causal layer from the ops' keyword arguments."""
    names = ("window_size", "chunk_size", "sink_tokens", "window", "scale", "softcap")
    return AttentionSettings(causal=True, q_offset=0, **{name: o[name] for name in names})


def new_state(
    k: Tensor,
    v: Tensor,
    chunks: int,
    o: dict[str, Any],
    *,
    fp8_chunks: bool = False,
    alibi: bool = False,
) -> CacheState:
    """Allocate an empty state.

    Args:
        k: Any keys of the layer, ``[B, Hkv, *, D]``: gives sizes, dtype and device.
        v: Any values, ``[B, Hkv, *, Dv]``.
        chunks: Chunk tokens to make room for.
        o: The ops' keyword arguments.
        fp8_chunks: Store chunk tokens in fp8.
        alibi: Keep where chunk tokens stand.
    """
    s = cache_settings(o)
    batch, heads = k.shape[:2]
    slots = s.sink_tokens + ring_size(s)
    accumulator = torch.float64 if k.dtype == torch.float64 else torch.float32
    stored = torch.uint8 if fp8_chunks else k.dtype
    exponents = 2 if fp8_chunks else 0
    return CacheState(
        exact_k=k.new_zeros(batch, heads, slots, k.shape[3]),
        exact_v=v.new_zeros(batch, heads, slots, v.shape[3]),
        exact_mask=k.new_zeros(batch, slots, dtype=torch.bool),
        rfa_k=k.new_zeros(batch, heads, chunks, k.shape[3], dtype=stored),
        rfa_v=v.new_zeros(batch, heads, chunks, v.shape[3], dtype=stored),
        rfa_bias=k.new_zeros(batch, heads, chunks, dtype=accumulator),
        rfa_exponents=k.new_zeros(batch, heads, chunks, exponents, dtype=torch.int8),
        chunk_mean=k.new_zeros(batch, int(alibi), chunks, dtype=accumulator),
        open_q=k.new_zeros(batch, heads, s.chunk_size if o["rule"] == "eva" else 0, k.shape[3]),
        start=k.new_zeros(batch, dtype=torch.int64),
        length=k.new_zeros(1, dtype=torch.int64),
    )


def _checked(
    qkv: tuple[Tensor, ...],
    key_mask: Tensor | None,
    state: CacheState,
    o: dict[str, Any],
) -> AttentionSettings:
    """Check the arguments, once for calls that are alike: every layer does it for every token."""
    described = tuple((x.shape, x.dtype, x.device) for x in (*qkv, *state[:2]))
    mask = None if key_mask is None else (key_mask.shape, key_mask.dtype)
    key = (described, mask, *o.items())
    settings = _known.get(key)
    if settings is None:
        check_cache(qkv, key_mask, state, o)
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        settings = _known[key] = cache_settings(o)
    return settings


_known: dict[tuple[Any, ...], AttentionSettings] = {}
_MOST_KNOWN = 4096


# --- flasheva::cache_append -----------------------------------------------------------------------


@implements("cache_append", f"({_INPUTS}, *, {_OPTIONS}) -> ()")
def _cache_append(*args: Any, **options: Any) -> None:
    q, k, v, parameters, key_mask, *state = args
    kept = CacheState(*state)
    settings = _checked((q, k, v), key_mask, kept, options)
    if runs_kernels(k, v):
        pooling = _pooling(parameters, options)
        launch_extend.cache_append(q, (k, v), key_mask, kept, settings, pooling)
        return
    new = (_group_mean(q, k), k, v)
    pool_new = partial(pool_chunks, parameters, options)
    blocked.cache_append(new, key_mask, kept, pool_new, settings)


@fakes("cache_append")
def _(*args: Any, **options: Any) -> None:
    check_cache(args[:3], args[4], args[5:], options)


_MOST_FP8_GROUP = 32  # query heads of a key head


def multiplies_fp8(q: Tensor, k: Tensor, *, fp8: bool) -> bool:
    """Whether kernels may multiply what a cache holds.

    Tiles of 64 query heads added values of fp8 wrongly in one form (H200, Triton 3.6), whose cause
    is not known: such groups run the PyTorch code.
    """
    return not fp8 or q.shape[1] <= _MOST_FP8_GROUP * k.shape[1]


# --- flasheva::decode -----------------------------------------------------------------------------


@implements("decode", f"({_INPUTS}, *, {_OPTIONS}, {_SLOPES}) -> (Tensor, Tensor)")
def _decode(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Append and attend: ``out [B, Hq, L, Dv]`` and ``lse [B, Hq, L]``."""
    q, k, v, parameters, key_mask, *state = args
    slopes, kept = options.pop("alibi_slopes", None), CacheState(*state)
    settings = _checked((q, k, v), key_mask, kept, options)
    check_slopes(q, slopes, kept)
    if runs_kernels(k, v) and multiplies_fp8(q, k, fp8=kept.fp8_chunks):
        pooling = _pooling(parameters, options)
        if q.shape[2] == 1:
            rule, given = pooling
            return launch_decode.decode(q, k, v, key_mask, given, kept, settings, rule, slopes)
        return launch_extend.decode(q, (k, v), key_mask, kept, settings, pooling, slopes)
    new = (_group_mean(q, k), k, v)
    pool_new = partial(pool_chunks, parameters, options)
    return blocked.decode(q, new, key_mask, kept, pool_new, settings, slopes)


@fakes("decode")
def _(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    q, _, v = args[:3]
    slopes = options.pop("alibi_slopes", None)
    check_cache(args[:3], args[4], args[5:], options)
    check_slopes(q, slopes, CacheState(*args[5:]))
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:3], dtype=accumulator)
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


# --- pooling --------------------------------------------------------------------------------------


def _pooling(parameters: Sequence[Tensor], o: dict[str, Any]) -> launch_extend.Pooling:
    """Return how kernels pool."""
    return launch_extend.Pooling(kernel_rule(o["rule"], list(parameters)), tuple(parameters))


def _group_mean(q: Tensor, k: Tensor) -> Tensor:
    return q.unflatten(1, (k.shape[1], -1)).mean(2)


def pool_chunks(
    parameters: Sequence[Tensor], o: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool ``n c`` keys into ``n`` chunk tokens, every chunk as a row of its own.

    Rows count positions from their first valid key: as one row, a gap at the front would move the
    borders between chunks.
    """
    c = o["chunk_size"]
    chunks = k.shape[2] // c

    def rows(x: Tensor) -> Tensor:
        return x.unflatten(2, (chunks, c)).transpose(1, 2).flatten(0, 1)

    k, v, masks = rows(k), rows(v), Masks(valid.reshape(-1, c))

    def tokens(rule: str, values: Tensor, p: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return pool(k, values, p, masks, {**o, "rule": rule})[:3]

    if o["rule"] == "eva":
        parameters = eva_features(rows(q), k, tokens, parameters, None)
    pooled = tokens(o["rule"], v, parameters)
    rfa_k, rfa_v, rfa_bias = (x.unflatten(0, (-1, chunks)).transpose(1, 2) for x in pooled)
    return rfa_k.flatten(2, 3), rfa_v.flatten(2, 3), rfa_bias.flatten(2, 3)
