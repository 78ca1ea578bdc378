"""The ops ``flasheva::chunk_tokens``, ``attention``, ``eva_attention``: schemas, fakes, autograd.

``eva_attention`` is the first two in one; :func:`flasheva_attention` calls it. Results are defined
by ``kernels/reference``, whatever implementation runs.
"""

# ruff: noqa: ANN401 - the ops' functions are typed by their schemas
from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Required, TypedDict, Unpack

import torch
from torch.nn import functional

import flasheva_compile.retrieval_ops  # noqa: F401 - registers flasheva::retrieval_attention
from flasheva_compile.implementations import (
    Masks,
    Pooled,
    attend,
    attend_backward,
    mass_sizes,
    pool,
    pool_and_attend,
    pool_and_attend_backward,
    pool_backward,
)
from flasheva_compile.op_checks import (
    OP_VERSION,
    check_attention,
    check_chunk_tokens,
    check_eva_attention,
    require,
)
from flasheva_compile.op_registration import differentiates, fakes, implements

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

_CHUNK_OPTIONS = "str rule, int chunk_size, float scale, str version"
_CHUNK_INPUTS = "Tensor k, Tensor v, Tensor[] parameters, Tensor? key_mask, Tensor? segment_ids"
_OPTIONS = (
    "int window_size, int chunk_size, int sink_tokens, str window, bool causal, SymInt q_offset, "
    "float scale, float softcap, float dropout_p, str version"
)
_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor rfa_k, Tensor rfa_v, Tensor rfa_bias"
_OPTIONAL = "Tensor? key_mask, Tensor? segment_ids, Tensor? alibi_slopes, Tensor? dropout_seed"


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- flasheva::chunk_tokens -----------------------------------------------------------------------


@implements("chunk_tokens", f"({_CHUNK_INPUTS}, *, {_CHUNK_OPTIONS}) -> (Tensor, Tensor, Tensor)")
def _chunk_tokens(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_chunk_tokens(*args, options)  # pyright: ignore[reportCallIssue]
    k, v, parameters, *masks = args
    return pool(k, v, parameters, Masks(*masks), options)[:3]


@fakes("chunk_tokens")
def _(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_chunk_tokens(*args, options)  # pyright: ignore[reportCallIssue]
    k, v = args[:2]
    slots = (k.shape[2] + options["chunk_size"] - 1) // options["chunk_size"]
    head = (k.shape[0], k.shape[1], slots)
    rfa_bias = k.new_empty(head, dtype=_accumulator(k))
    return k.new_empty(*head, k.shape[3]), v.new_empty(*head, v.shape[3]), rfa_bias


@implements(
    "chunk_tokens_backward",
    f"(Tensor drfa_k, Tensor drfa_v, Tensor drfa_bias, {_CHUNK_INPUTS}, *, {_CHUNK_OPTIONS})"
    " -> Tensor[]",
)
def _chunk_tokens_backward(*args: Any, **options: Any) -> list[Tensor]:
    k, v, parameters, *masks = args[3:]
    return pool_backward(args[:3], k, v, parameters, Masks(*masks), options)


@fakes("chunk_tokens_backward")
def _(*args: Any, **options: Any) -> list[Tensor]:
    k, v, parameters = args[3:6]
    return [x.new_empty(x.shape) for x in (k, v, *parameters)]


def _chunk_tokens_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    k, v, parameters, key_mask, segment_ids = inputs
    ctx.options = keyword_only_inputs
    ctx.save_for_backward(k, v, key_mask, segment_ids, *parameters)


def _chunk_tokens_gradient(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    k, v, key_mask, segment_ids, *parameters = ctx.saved_tensors
    inputs = (k, v, parameters, key_mask, segment_ids)
    dk, dv, *dp = torch.ops.flasheva.chunk_tokens_backward(*grads, *inputs, **ctx.options)
    return dk, dv, dp, None, None


differentiates("chunk_tokens", _chunk_tokens_gradient, _chunk_tokens_context)


# --- flasheva::attention --------------------------------------------------------------------------


@implements("attention", f"({_TENSORS}, {_OPTIONAL}, *, {_OPTIONS}) -> (Tensor, Tensor)")
def _attention(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    check_attention(args[:6], args[6:], options)
    return attend(args[:3], args[3:6], Masks(*args[6:]), options)


@fakes("attention")
def _(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    q, _, v = args[:3]
    check_attention(args[:6], args[6:], options)
    lse = q.new_empty(q.shape[:3], dtype=_accumulator(q))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@implements(
    "attention_backward",
    f"(Tensor dout, Tensor out, Tensor lse, {_TENSORS}, {_OPTIONAL}, *, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward(
    dout: Tensor, out: Tensor, lse: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, ...]:
    return attend_backward(dout, (out, lse), args[:3], args[3:6], Masks(*args[6:]), options)


@fakes("attention_backward")
def _(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in args[3:9])


def _attention_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    message = "alibi_slopes has no gradient"
    require(not ctx.needs_input_grad[8], message, "flasheva::attention", "detach them")
    out, lse = output
    ctx.options = keyword_only_inputs
    ctx.set_materialize_grads(False)  # nobody reads a gradient of lse
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(out, lse, *inputs)


def _attention_gradient(ctx: Any, dout: Tensor | None, _dlse: None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 10
    grads = torch.ops.flasheva.attention_backward(dout, *ctx.saved_tensors, **ctx.options)
    return *grads, None, None, None, None


differentiates("attention", _attention_gradient, _attention_context)


# --- flasheva::eva_attention ----------------------------------------------------------------------


_POOLED = "Tensor rfa_k, Tensor rfa_v, Tensor rfa_bias, Tensor mass_k, Tensor mass_v"
_EVA_INPUTS = f"Tensor q, Tensor k, Tensor v, Tensor[] parameters, {_OPTIONAL}"


@implements(
    "eva_attention",
    f"({_EVA_INPUTS}, *, str rule, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _eva_attention(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    """Pool and attend in one op: the backward pass adds both ways into ``dk``, ``dv`` once."""
    check_eva_attention(args[:3], args[3], args[4:], options)
    out, lse, pooled = pool_and_attend(args[:3], args[3], Masks(*args[4:]), options)
    return out, lse, *pooled


@fakes("eva_attention")
def _(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    check_eva_attention(args[:3], args[3], args[4:], options)
    q, k, v = args[:3]
    slots = (k.shape[2] + options["chunk_size"] - 1) // options["chunk_size"]
    head = (k.shape[0], k.shape[1], slots)
    lse = q.new_empty(q.shape[:3], dtype=_accumulator(q))
    tokens = (k.new_empty(*head, k.shape[3]), v.new_empty(*head, v.shape[3]))
    sizes = mass_sizes(k, v, args[3], options)
    masses = (lse.new_empty(head if kept else (0,)) for kept in sizes)
    return q.new_empty(*q.shape[:3], v.shape[3]), lse, *tokens, lse.new_empty(head), *masses


@implements(
    "eva_attention_backward",
    f"(Tensor dout, Tensor out, Tensor lse, {_POOLED}, {_EVA_INPUTS}, *, str rule, "
    f"{_OPTIONS}) -> Tensor[]",
)
def _eva_attention_backward(
    dout: Tensor, out: Tensor, lse: Tensor, *args: Any, **options: Any
) -> list[Tensor]:
    pooled, qkv, parameters, masks = Pooled(*args[:5]), args[5:8], args[8], Masks(*args[9:])
    result = (out, lse)
    return pool_and_attend_backward(dout, result, pooled, qkv, parameters, masks, options)


@fakes("eva_attention_backward")
def _(dout: Tensor, out: Tensor, lse: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (*args[5:8], *args[8])]


def _eva_attention_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    q, k, v, parameters, *masks = inputs
    slopes, message = masks[2], "alibi_slopes has no gradient"
    constant = slopes is None or not slopes.requires_grad
    require(constant, message, "flasheva::eva_attention", "detach them")
    ctx.options = keyword_only_inputs
    ctx.set_materialize_grads(False)  # six tensors of zeros that nobody reads
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output, q, k, v, *masks, *parameters)


def _eva_attention_gradient(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    output, qkv, masks, parameters = saved[:7], saved[7:10], saved[10:14], list(saved[14:])
    if dout is None:
        return None, None, None, [None] * len(parameters), None, None, None, None
    inputs = (*qkv, parameters, *masks)
    dq, dk, dv, *dp = torch.ops.flasheva.eva_attention_backward(
        dout, *output, *inputs, **ctx.options
    )
    return dq, dk, dv, dp, None, None, None, None


differentiates("eva_attention", _eva_attention_gradient, _eva_attention_context)


# --- the public function --------------------------------------------------------------------------


class AttentionOptions(TypedDict, total=False):
    """The numbers and names of :func:`flasheva_attention`; all but the first two have defaults.

    Keys:
        window_size: Exact window, a multiple of ``chunk_size`` [tokens].
        chunk_size: Keys per chunk token [tokens].
        sink_tokens: First tokens of each document that stay exact, rounded up to chunks [tokens].
        window: ``"sliding"``, or ``"block"`` as in the EVA papers.
        chunk_rule: ``"mean"``, ``"tangent"``, ``"evabyte"`` or ``"eva"``.
        causal: Whether a query sees only its past; True.
        q_offset: Column of the first query [tokens].
        scale: Score scale; None = ``D ** -0.5``.
        softcap: ``softcap * tanh(score / softcap)``; 0 = none.
        dropout_p: Probability of dropping a weight.
        retrieve_chunks: Best-scoring chunks that a query attends exactly; causal only; 0.
        retrieve_block: Consecutive queries that share the selection of the first of them; 1.
        retrieve_by: What scores chunks, their ``"token"`` or their keys' ``"bounds"``; "token".
    """

    window_size: Required[int]
    chunk_size: Required[int]
    sink_tokens: int
    window: str
    chunk_rule: str
    causal: bool
    q_offset: int
    scale: float | None
    softcap: float
    dropout_p: float
    retrieve_chunks: int
    retrieve_block: int
    retrieve_by: str


def _with_defaults(options: AttentionOptions, head_dim: int) -> dict[str, Any]:
    missing = {"window_size", "chunk_size"} - set(options)
    unknown = set(options) - set(AttentionOptions.__annotations__)
    op, names = "flasheva_attention", ", ".join(AttentionOptions.__annotations__)
    require(not missing, f"without {', '.join(sorted(missing))}", op)
    require(not unknown, f"unknown option {', '.join(sorted(unknown))}", op, f"there are {names}")
    defaults = {"sink_tokens": 0, "window": "sliding", "chunk_rule": "tangent", "causal": True}
    defaults |= {"q_offset": 0, "scale": None, "softcap": 0.0, "dropout_p": 0.0}
    defaults |= {"retrieve_chunks": 0, "retrieve_block": 1, "retrieve_by": "token"}
    merged = {**defaults, **options, "version": OP_VERSION}
    return merged if merged["scale"] is not None else {**merged, "scale": head_dim**-0.5}


def flasheva_attention(  # noqa: PLR0913 - the formula has these inputs
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    parameters: Sequence[Tensor] = (),
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    noise: Tensor | None = None,
    selector_weight: Tensor | None = None,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]:
    """Attend exactly to sinks and window, through chunk tokens to the rest, in one softmax.

    O(L (window + S / chunk)) time, linear memory; softmax attention where ``window_size >= S``.

    Args:
        q: Queries, ``[B, Hq, L, D]``, fp64/fp32/bf16/fp16, any strides.
        k: Keys, ``[B, Hkv, S, D]``; ``Hkv`` divides ``Hq``. Dtype and device of ``q``.
        v: Values, ``[B, Hkv, S, Dv]``.
        parameters: ``tangent``: none or ``phi [Hkv, D]``. ``evabyte``: none, ``(a, p)`` or
            ``(a, p, b)``, ``a, p [Hkv, D]``, ``b [Hkv]``. ``eva``: none, or Linear weight
            ``[D, D]``, bias, LayerNorm weight, bias ``[D]`` of ``f_q``, then those of ``f_k``.
        key_mask: ``[B, S]`` bool, True = may attend.
        segment_ids: ``[B, S]`` integers, packed documents as runs of equal ids; causal only.
        alibi_slopes: ``[Hq]``; adds ``slope * (key column - query column)``; no gradient.
        dropout_seed: One int64; None draws it from PyTorch's generator.
        noise: For ``eva`` in training, ``[B, Hkv, C, D]``, added to ``omega`` as it is.
        selector_weight: Of ``"bounds"``: see ``chunk_bounds``, ``[Hkv, 3, D]``; no gradient.
        **options: See :class:`AttentionOptions`; ``window_size`` and ``chunk_size`` are required.

    Returns:
        ``out [B, Hq, L, Dv]`` in the dtype of ``q``, and the log-sum-exp ``lse [B, Hq, L]`` in
        fp32 (fp64 for fp64), not differentiable. A query that attends nothing: ``(0, -inf)``.

    Raises:
        LoweringError: Shapes, dtypes or options that do not fit together.

    Source:
        EVA (arXiv:2302.04542) and ours; the formula is ``kernels/reference/attention.py``.
    """
    o = _with_defaults(options, q.shape[-1])
    rule = o.pop("chunk_rule")
    shared = {name: o[name] for name in ("chunk_size", "scale", "version")}
    tokens = partial(_tokens, k, key_mask, segment_ids, shared)
    if rule == "eva":
        parameters = eva_features(q, k, tokens, parameters, noise)
    if o["dropout_p"] > 0 and dropout_seed is None:
        dropout_seed = torch.randint(2**62, (1,), device=q.device)
    masks = (key_mask, segment_ids, alibi_slopes, dropout_seed)
    if o["retrieve_chunks"] != 0:
        pooled = tokens(rule, v, parameters)
        o |= {} if selector_weight is None else {"selector_weight": selector_weight}
        return torch.ops.flasheva.retrieval_attention(q, k, v, *pooled, *masks, **o)[:2]
    o = _without_retrieval(o, selector_weight)
    return torch.ops.flasheva.eva_attention(q, k, v, list(parameters), *masks, rule=rule, **o)[:2]


def _without_retrieval(o: dict[str, Any], selector_weight: Tensor | None) -> dict[str, Any]:
    require(selector_weight is None, "selector_weight without retrieval", "flasheva_attention")
    return {name: value for name, value in o.items() if not name.startswith("retrieve_")}


def _tokens(
    k: Tensor,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    options: dict[str, Any],
    rule: str,
    values: Tensor,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (k, values, list(parameters), key_mask, segment_ids)
    return torch.ops.flasheva.chunk_tokens(*inputs, rule=rule, **options)


def eva_features(
    q: Tensor,
    k: Tensor,
    tokens: Callable[[str, Tensor, Sequence[Tensor]], tuple[Tensor, ...]],
    parameters: Sequence[Tensor],
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute ``rfa_k`` and ``omega`` of the ``eva`` rule; the mean rule averages q like values.

    Args:
        q: Queries, ``[B, Hq, S, D]``, or their group means ``[B, Hkv, S, D]``.
        k: Keys, ``[B, Hkv, S, D]``.
        tokens: Pools ``k`` and the given values by a rule with parameters.
        parameters: None, or the eight tensors of both feature maps.
        noise: ``[B, Hkv, C, D]``, added to ``omega``; training only.
    """
    op = "flasheva_attention"
    paired = q.shape[2] == k.shape[2]
    require(paired, "chunk_rule='eva' needs a query for every key (L == S)", op, "cache omega")
    message = f"chunk_rule='eva' got {len(parameters)} feature parameters"
    require(len(parameters) in (0, 8), message, op, "none, or 4 of f_q and 4 of f_k")
    group_mean = q.unflatten(1, (k.shape[1], -1)).mean(2)
    mean_k, mean_q, _ = tokens("mean", group_mean, ())
    if parameters:
        mean_q = _feature_map(mean_q, *parameters[:4])
        mean_k = _feature_map(mean_k, *parameters[4:])
    omega = mean_q + mean_k
    omega = omega if noise is None else omega + noise
    return mean_k.to(k.dtype), omega.to(k.dtype)  # feature maps compute in their weights' dtype


def _feature_map(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> Tensor:
    projected = functional.linear(x.to(weight.dtype), weight, bias)
    return functional.layer_norm(projected, norm_weight.shape, norm_weight, norm_bias)
