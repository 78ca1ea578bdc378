"""The ops of generation with retrieval, ``flasheva::retrieval_append`` and ``retrieval_decode``.

As of :mod:`cache_ops`, over the state of :class:`RetrievalState`; decoding token by token, in
blocks, or everything at once computes ``kernels/reference/retrieval.py``.
"""

# ruff: noqa: ANN401 - the ops' functions are typed by their schemas
from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from flasheva_compile.cache_ops import (
    cache_options,
    cache_settings,
    multiplies_fp8,
    pool_chunks,
)
from flasheva_compile.implementations import runs_kernels
from flasheva_compile.kernels.blocked import retrieval_cache as blocked
from flasheva_compile.kernels.blocked.cache_state import ring_size
from flasheva_compile.kernels.blocked.retrieval_select import Retrieval
from flasheva_compile.kernels.blocked.retrieval_state import RetrievalState
from flasheva_compile.lowering import launch_retrieval_decode
from flasheva_compile.lowering.pooled_chunks import kernel_rule
from flasheva_compile.op_checks import check_cache, check_selector, require

if TYPE_CHECKING:
    from torch import Tensor

    from flasheva_compile.config import EvaConfig

Store: TypeAlias = Literal["device", "offloaded", "fp8"]

_STATE_SCHEMA = ", ".join(f"Tensor(s{i}!) {name}" for i, name in enumerate(RetrievalState._fields))
_INPUTS = f"Tensor q, Tensor k, Tensor v, Tensor[] parameters, Tensor? key_mask, {_STATE_SCHEMA}"
_OPTIONS = (
    "int retrieve_chunks, int retrieve_block, str retrieve_by, str rule, int window_size, "
    "int chunk_size, int sink_tokens, str window, float scale, float softcap, str version, "
    "Tensor? selector_weight=None"
)
_ops = torch.library.Library("flasheva", "FRAGMENT")  # registered directly: see cache_ops
_ops.define(f"retrieval_append({_INPUTS}, *, {_OPTIONS}) -> ()")
_ops.define(f"retrieval_decode({_INPUTS}, *, {_OPTIONS}) -> (Tensor, Tensor)")


def retrieval_options(config: EvaConfig, scale: float, softcap: float = 0.0) -> dict[str, Any]:
    """Return the keyword arguments of both ops for a layer of ``config``."""
    names = ("retrieve_chunks", "retrieve_block", "retrieve_by")
    retrieve = {name: getattr(config, name) for name in names}
    return retrieve | cache_options(config, scale, softcap)


def new_retrieval_state(
    k: Tensor, v: Tensor, tokens: int, o: dict[str, Any], *, store: Store = "device"
) -> RetrievalState:
    """Allocate an empty state.

    Args:
        k: Any keys of the layer, ``[B, Hkv, *, D]``: gives sizes, dtype and device.
        v: Any values, ``[B, Hkv, *, Dv]``.
        tokens: Tokens to make room for; a chunk at least.
        o: The ops' keyword arguments.
        store: Of all keys and values: as they are on the "device"; the same beside copies of sinks
            and window, for a store that is moved ("offloaded"); or in "fp8" beside such copies.
    """
    batch, heads = k.shape[:2]
    tokens = max(tokens, o["chunk_size"])
    chunks = -(-tokens // o["chunk_size"])
    kept = o["retrieve_chunks"] if o["retrieve_block"] > 1 else 0
    bounded = chunks if o["retrieve_by"] == "bounds" else 0
    settings = cache_settings({**o, "scale": 1.0, "softcap": 0.0})
    near = 0 if store == "device" else settings.sink_tokens + ring_size(settings)
    stored = torch.uint8 if store == "fp8" else k.dtype
    accumulator = torch.float64 if k.dtype == torch.float64 else torch.float32
    return RetrievalState(
        keys=k.new_zeros(batch, heads, tokens, k.shape[3], dtype=stored),
        values=v.new_zeros(batch, heads, tokens, v.shape[3], dtype=stored),
        mask=k.new_zeros(batch, tokens, dtype=torch.bool),
        rfa_k=k.new_zeros(batch, heads, chunks, k.shape[3]),
        rfa_v=v.new_zeros(batch, heads, chunks, v.shape[3]),
        rfa_bias=k.new_zeros(batch, heads, chunks, dtype=accumulator),
        selected=k.new_zeros(batch, heads, kept, dtype=torch.int32),
        bounds=k.new_zeros(batch, heads, bounded, 2 * k.shape[3]),
        near_k=k.new_zeros(batch, heads, near, k.shape[3]),
        near_v=v.new_zeros(batch, heads, near, v.shape[3]),
        exponents=k.new_zeros(batch, heads, tokens if store == "fp8" else 0, 2, dtype=torch.uint8),
        start=k.new_zeros(batch, dtype=torch.int64),
        length=k.new_zeros(1, dtype=torch.int64),
    )


def _check(args: tuple[Any, ...], options: dict[str, Any]) -> None:
    state = RetrievalState(*args[5:])
    like_tokens = (state.near_k, state.near_v) if state.is_fp8 else state[:2]
    check_cache(args[:3], args[4], like_tokens, options)
    hint = "pass use_cache=False"
    rule = options["rule"]
    require(rule != "eva", "rule 'eva' with retrieve_chunks in a cache", "flasheva::decode", hint)
    check_selector("flasheva::retrieval_decode", args[1], options)


def _arguments(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    q, k, v, parameters, key_mask, *state = args
    _check(args, options)
    names = ("chunks", "block", "by")
    given: dict[str, Any] = {name: options[f"retrieve_{name}"] for name in names}
    retrieval = Retrieval(**given, weight=_weight(options))
    pool = partial(pool_chunks, parameters, options)
    settings = cache_settings(options)
    return q, (k, v), key_mask, RetrievalState(*state), pool, settings, retrieval


def _weight(options: dict[str, Any]) -> Tensor | None:
    weight = options.get("selector_weight")
    return None if weight is None else weight.contiguous()


@torch.library.impl(_ops, "retrieval_append", "CompositeExplicitAutograd")
def _append(*args: Any, **options: Any) -> None:
    blocked.retrieval_append(*_arguments(args, options))


@torch.library.register_fake("flasheva::retrieval_append", lib=_ops)
def _(*args: Any, **options: Any) -> None:
    _check(args, options)


@torch.library.impl(_ops, "retrieval_decode", "CompositeExplicitAutograd")
def _decode(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Append and attend: ``out [B, Hq, L, Dv]`` and ``lse [B, Hq, L]``."""
    q, k, v, parameters, key_mask, *tensors = args
    state, chunks = RetrievalState(*tensors), options["retrieve_chunks"]
    single = q.shape[2] == 1 and options["retrieve_block"] == 1
    single = single and multiplies_fp8(q, k, fp8=state.is_fp8)
    if single and runs_kernels(k, v) and launch_retrieval_decode.covers(state, chunks):
        _check(args, options)
        rule, given = kernel_rule(options["rule"], list(parameters)), tuple(parameters)
        settings = cache_settings(options)
        out, lse, _ = launch_retrieval_decode.retrieval_decode(
            q, k, v, key_mask, given, state, settings, rule, chunks, _weight(options)
        )
        return out, lse
    return blocked.retrieval_decode(*_arguments(args, options))


@torch.library.register_fake("flasheva::retrieval_decode", lib=_ops)
def _(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    _check(args, options)
    q, _, v = args[:3]
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulator)
