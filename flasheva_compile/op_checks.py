"""Checks of the ops' arguments: what does not fit together raises LoweringError."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.errors import LoweringError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from flasheva_compile.kernels.blocked.cache_state import CacheState

# Part of every call, so that a compile cache cannot pair an old forward with a new backward.
OP_VERSION = "1"

CHUNK_RULES = {"mean": (0,), "tangent": (0, 1), "evabyte": (0, 2, 3), "eva": (2,)}
"""Chunk rules and how many parameters each may get."""

WINDOWS = ("sliding", "block")


def require(condition: bool, message: str, subject: str, hint: str = "") -> None:  # noqa: FBT001 - reads as an assertion
    """Raise a LoweringError about ``subject`` unless ``condition``."""
    if not condition:
        raise LoweringError(message, subject=subject, hint=hint)


def _check_version(op: str, version: str) -> None:
    hint = "clear the compile cache"
    require(version == OP_VERSION, f"version {version!r} is not {OP_VERSION!r}", op, hint)


def _check_keys(op: str, k: Tensor, v: Tensor) -> None:
    require(k.dim() == 4 and v.dim() == 4, "k and v must be [B, Hkv, S, D]", op)
    same = k.dtype == v.dtype and k.device == v.device and k.shape[1] == v.shape[1]
    require(same, "k and v differ in dtype, device or heads", op)
    require(k.dtype.is_floating_point, f"k has dtype {k.dtype}", op, "use a floating dtype")


def _check_masks(op: str, k: Tensor, key_mask: Tensor | None, segment_ids: Tensor | None) -> None:
    for name, mask in (("key_mask", key_mask), ("segment_ids", segment_ids)):
        if mask is not None:
            require(mask.dim() == 2, f"{name} has {mask.dim()} dimensions, not [B, S]", op)
            shape = (k.shape[0], k.shape[2])
            require(tuple(mask.shape) == shape, f"{name} is {tuple(mask.shape)}, not {shape}", op)
    is_bool = key_mask is None or key_mask.dtype == torch.bool
    require(is_bool, "key_mask must be bool", op, "True = may attend")
    is_int = segment_ids is None or not segment_ids.dtype.is_floating_point
    require(is_int, "segment_ids must be integers", op)


def check_chunk_tokens(
    k: Tensor,
    v: Tensor,
    parameters: Sequence[Tensor],
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    options: dict[str, Any],
) -> None:
    """Check the arguments of ``flasheva::chunk_tokens``."""
    op, rule = "flasheva::chunk_tokens", options["rule"]
    _check_version(op, options["version"])
    _check_keys(op, k, v)
    _check_masks(op, k, key_mask, segment_ids)
    require(rule in CHUNK_RULES, f"unknown rule {rule!r}", op, f"one of {', '.join(CHUNK_RULES)}")
    require(options["chunk_size"] >= 1, f"chunk_size={options['chunk_size']}", op, "at least 1")
    counts = CHUNK_RULES[rule]
    message = f"rule {rule!r} got {len(parameters)} parameters"
    require(len(parameters) in counts, message, op, f"it takes {' or '.join(map(str, counts))}")
    batch, heads, length, size = k.shape
    slots = (length + options["chunk_size"] - 1) // options["chunk_size"]
    for index, p in enumerate(parameters):
        shape = (heads, size)[: 1 if index == 2 else 2]
        shape = (batch, heads, slots, size) if rule == "eva" else shape
        message = f"parameter {index} of rule {rule!r} is {tuple(p.shape)}, not {tuple(shape)}"
        require(tuple(p.shape) == tuple(shape), message, op)


def _check_options(op: str, o: dict[str, Any]) -> None:
    _check_version(op, o["version"])
    w, c = o["window_size"], o["chunk_size"]
    require(c >= 1, f"chunk_size={c}", op, "at least 1")
    hint = "make window_size a positive multiple of chunk_size"
    require(w >= c and w % c == 0, f"window_size={w} with chunk_size={c}", op, hint)
    require(o["sink_tokens"] >= 0, f"sink_tokens={o['sink_tokens']}", op, "at least 0")
    require(o["window"] in WINDOWS, f"unknown window {o['window']!r}", op, " or ".join(WINDOWS))
    require(o["softcap"] >= 0, f"softcap={o['softcap']}", op, "0 means none")
    require(0 <= o["dropout_p"] <= 1, f"dropout_p={o['dropout_p']}", op, "between 0 and 1")


def check_attention(
    tensors: tuple[Tensor, ...],
    optional: tuple[Tensor | None, ...],
    o: dict[str, Any],
    op: str = "flasheva::attention",
) -> None:
    """Check ``(q, k, v, rfa_k, rfa_v, rfa_bias)``, the optional tensors and the options."""
    q, k, v = tensors[:3]
    _check_keys(op, k, v)
    _check_call(op, q, k, optional, o)
    slots = (k.shape[2] + o["chunk_size"] - 1) // o["chunk_size"]
    head = (k.shape[0], k.shape[1], slots)
    shapes = ((*head, k.shape[3]), (*head, v.shape[3]), head)
    for name, x, shape in zip(("rfa_k", "rfa_v", "rfa_bias"), tensors[3:], shapes, strict=True):
        message = f"{name} is {tuple(x.shape)}, not {tuple(shape)}"
        require(tuple(x.shape) == tuple(shape), message, op, "use chunk_tokens of these k and v")
    _check_masks(op, k, *optional[:2])


def check_retrieval(
    tensors: tuple[Tensor, ...], optional: tuple[Tensor | None, ...], o: dict[str, Any]
) -> None:
    """Check the arguments of ``flasheva::retrieval_attention``."""
    op = "flasheva::retrieval_attention"
    for name in ("retrieve_chunks", "retrieve_block"):
        require(o[name] >= 1, f"{name}={o[name]}", op, "at least 1")
    by = o["retrieve_by"]
    require(by in ("token", "bounds"), f"retrieve_by={by!r}", op, 'use "token" or "bounds"')
    hint = "leave retrieve_chunks out"
    require(o["causal"], "retrieve_chunks with bidirectional attention", op, hint)
    check_attention(tensors, optional, o, op)
    check_selector(op, tensors[1], o)
    if o["retrieve_block"] > 1:
        message = "retrieve_block > 1 needs the first query of every block: q_offset == 0"
        require(o["q_offset"] == 0, message, op, "use retrieve_block=1")


def check_selector(op: str, k: Tensor, o: dict[str, Any]) -> None:
    """Check the weights of a selector that goes by bounds, if the options hold any."""
    weight = o.get("selector_weight")
    if weight is None:
        return
    shape, hint = (k.shape[1], 3, k.shape[3]), "pass what calibrate learned for this layer"
    by = o["retrieve_by"]
    require(by == "bounds", f"selector_weight with retrieve_by={by!r}", op, "select by bounds")
    message = f"selector_weight is {tuple(weight.shape)}, not {tuple(shape)}"
    require(tuple(weight.shape) == tuple(shape), message, op, hint)
    require(weight.is_floating_point(), f"selector_weight is {weight.dtype}", op, hint)
    require(weight.device == k.device, f"selector_weight is on {weight.device}", op, hint)
    message = "selector_weight has no gradient: a selection is a constant"
    require(not weight.requires_grad, message, op, "detach it")


def check_eva_attention(
    qkv: tuple[Tensor, ...],
    parameters: Sequence[Tensor],
    optional: tuple[Tensor | None, ...],
    o: dict[str, Any],
) -> None:
    """Check ``(q, k, v)``, the rule's parameters, the optional tensors and the options."""
    op, (q, k, v) = "flasheva::eva_attention", qkv
    check_chunk_tokens(k, v, parameters, optional[0], optional[1], o)
    _check_call(op, q, k, optional, o)


def _check_call(
    op: str, q: Tensor, k: Tensor, optional: tuple[Tensor | None, ...], o: dict[str, Any]
) -> None:
    """Check what attention asks beyond pooling."""
    _, segment_ids, alibi_slopes, dropout_seed = optional
    _check_options(op, o)
    require(q.dim() == 4, f"q has {q.dim()} dimensions, not [B, Hq, L, D]", op)
    grouped = k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    require(grouped, f"{q.shape[1]} query heads over {k.shape[1]} key heads", op)
    same = q.dtype == k.dtype and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    require(same, "q and k differ in dtype, batch or head size", op)
    seeded = o["dropout_p"] == 0 or (dropout_seed is not None and dropout_seed.numel() == 1)
    require(seeded, "dropout_p > 0 needs a dropout_seed", op, "one int64 tensor element")
    sloped = alibi_slopes is None or tuple(alibi_slopes.shape) == (q.shape[1],)
    require(sloped, "alibi_slopes must be [Hq]", op)
    _check_placement(op, q, k, segment_ids, o)


def _check_placement(
    op: str, q: Tensor, k: Tensor, segment_ids: Tensor | None, o: dict[str, Any]
) -> None:
    if not o["causal"]:
        square = q.shape[2] == k.shape[2] and o["q_offset"] == 0
        require(square, "bidirectional attention needs L == S and q_offset == 0", op)
        require(segment_ids is None, "bidirectional attention with segment_ids", op, "use padding")
    if segment_ids is not None:
        inside = o["q_offset"] >= 0 and o["q_offset"] + q.shape[2] <= k.shape[2]
        require(inside, "with segment_ids every query needs a column: q_offset + L <= S", op)


def check_cache(
    qkv: tuple[Tensor, ...],
    key_mask: Tensor | None,
    state: Sequence[Tensor],
    o: dict[str, Any],
) -> None:
    """Check the arguments of the ops that write a cache's state, and attend to it.

    The state's first two tensors are keys and values.
    """
    op, (q, k, v) = "flasheva::decode", qkv
    _check_keys(op, k, v)
    _check_options(op, {**o, "dropout_p": 0.0})
    _check_masks(op, k, key_mask, None)
    same = q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:] and q.dtype == k.dtype
    require(same, f"q is {tuple(q.shape)} {q.dtype} and k is {tuple(k.shape)} {k.dtype}", op)
    require(q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} heads for {k.shape[1]} kv heads", op)
    require(k.shape[2] > 0, "no token to append", op)
    exact_k, exact_v = state[:2]
    for name, x, kept in (("k", k, exact_k), ("v", v, exact_v)):
        fits = x.shape[:2] == kept.shape[:2] and x.shape[3] == kept.shape[3]
        message = f"{name} is {tuple(x.shape)} {x.dtype}, the cache holds {tuple(kept.shape)}"
        hint = "use the batch and the model that the cache was filled with, or reset it"
        require(fits and x.dtype == kept.dtype, f"{message} {kept.dtype}", op, hint)


def check_slopes(q: Tensor, slopes: Tensor | None, state: CacheState) -> None:
    """Check what ``flasheva::decode`` gets of ALiBi, beside what :func:`check_cache` does."""
    op = "flasheva::decode"
    sloped = slopes is None or tuple(slopes.shape) == (q.shape[1],)
    require(sloped, "alibi_slopes must be [Hq]", op)
    fp32 = slopes is None or slopes.dtype in (torch.float32, torch.float64)
    require(fp32, "alibi_slopes must be fp32 or fp64", op)
    here = slopes is None or slopes.device == q.device
    require(here, "alibi_slopes must be on the device of the queries", op)
    kept = state.rfa_k.shape[2] == 0 or state.alibi == (slopes is not None)
    hint = "make the state with alibi=True for slopes, and only for them"
    require(kept, "the state keeps positions of chunk tokens, or else there are slopes", op, hint)
