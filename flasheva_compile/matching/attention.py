"""Find every softmax attention of a captured graph: sites that are understood, and misses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flasheva_compile.matching.aten import (
    argument,
    must_agree,
    op_name,
    place_in_source,
    same_size,
    scalar_of,
    shape_of,
    value_of,
)
from flasheva_compile.matching.operands import (
    is_appended,
    projection_sources,
    to_operand,
    untransposed,
    without_repeated_heads,
)
from flasheva_compile.matching.scores import comes_from_product, walk_scores
from flasheva_compile.matching.weights import feeds_product, walk_weights
from flasheva_compile.mutation import Mutations
from flasheva_compile.site import AttentionSite, MaskTerm, MissedSite, Operand, Place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

    from flasheva_compile.site import CapturedGraph, MaskKind

_SOFTMAXES = frozenset({"softmax", "_softmax", "_safe_softmax"})
_SDPA = "scaled_dot_product_attention"
_FUSED_LAYERS = frozenset({"_transformer_encoder_layer_fwd", "_native_multi_head_attention"})


def match(captured: CapturedGraph) -> tuple[AttentionSite | MissedSite, ...]:
    """Recognise attention by dataflow, anchored on SDPA calls and on softmax.

    A softmax that does not stand between two products (router, vocabulary) is not attention and
    is not reported.

    Returns:
        Sites and misses in graph order.
    """
    found, written = [], Mutations(captured.shadow.graph)
    for node in captured.shadow.graph.nodes:
        if node.op != "call_function":
            continue
        if op_name(node) in _FUSED_LAYERS:
            reason = "inside PyTorch's fused layer; torch.backends.mha.set_fastpath_enabled(False)"
            found.append(MissedSite(place=place_of(node), reason=reason + " takes it apart"))
        elif op_name(node) == _SDPA:
            found.append(_match_sdpa(node, captured, written))
        elif op_name(node) in _SOFTMAXES and _is_attention(node):
            found.append(_match_softmax(node, captured, written))
    return tuple(found)


def place_of(node: fx.Node) -> Place:
    """Return where a node stands: module path, module identity, source line."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return Place(path="", module_id=None, source=place_in_source(node))
    key, (path, _) = list(stack.items())[-1]
    # Keys are str(id(module)), with "@n" behind repeated calls of a shared module.
    identity = key.split("@")[0]
    return Place(
        path=path,
        module_id=int(identity) if identity.isdigit() else None,
        source=place_in_source(node),
    )


def _is_attention(softmax: fx.Node) -> bool:
    """Return whether a softmax stands between two products, whatever else is in between."""
    rank = value_of(softmax).dim()
    last = argument(softmax, 1, "dim") in {-1, rank - 1}
    return last and rank >= 3 and comes_from_product(softmax.args[0]) and feeds_product(softmax)


def _match_sdpa(
    node: fx.Node, captured: CapturedGraph, written: Mutations
) -> AttentionSite | MissedSite:
    query, key, value = node.args[:3]
    mask = argument(node, 3, "attn_mask")
    terms: tuple[MaskTerm, ...] = ()
    if mask is not None:
        kind: MaskKind = "additive" if value_of(mask).dtype.is_floating_point else "bool"
        terms = (MaskTerm(node=mask, kind=kind),)
    scale = argument(node, 7, "scale")
    number = shape_of(query)[-1] ** -0.5 if scale is None else scalar_of(scale, captured.shadow)
    if number is None:
        return MissedSite(place=place_of(node), reason="the scale is a tensor")
    return _site(
        captured,
        written,
        node,
        node,
        (query, key, value),
        transposed_key=False,
        scale=number,
        softcap=0.0,
        dropout_p=float(argument(node, 4, "dropout_p", 0.0) or 0.0),
        masks=terms,
        is_causal=bool(argument(node, 5, "is_causal", default=False)),
    )


def _match_softmax(
    node: fx.Node, captured: CapturedGraph, written: Mutations
) -> AttentionSite | MissedSite:
    scores = walk_scores(node, captured.shadow, written)
    if isinstance(scores, str):
        return MissedSite(place=place_of(node), reason=scores)
    weights = walk_weights(node)
    if isinstance(weights, str):
        return MissedSite(place=place_of(node), reason=weights)
    if len({_grad_mode(n) for n in (scores.product, node, weights.product)}) > 1:
        return MissedSite(place=place_of(node), reason="grad mode changes inside the attention")
    query, key_transposed = scores.product.args[:2]
    key, pending = untransposed(key_transposed)
    return _site(
        captured,
        written,
        node,
        weights.product,
        (query, key, weights.value),
        transposed_key=pending,
        scale=scores.scale,
        softcap=scores.softcap,
        dropout_p=weights.dropout_p,
        masks=scores.masks,
        is_causal=False,
    )


def _grad_mode(node: fx.Node) -> bool | None:
    """Return the grad mode that a graph sets before a node; None where it sets none."""
    mode = None
    for other in node.graph.nodes:
        if other is node:
            return mode
        if getattr(other.target, "__name__", "") == "_set_grad_enabled":
            mode = other.args[0]
    return mode


def _site(
    captured: CapturedGraph,
    written: Mutations,
    anchor: fx.Node,
    output: fx.Node,
    nodes: tuple[fx.Node, fx.Node, fx.Node],
    *,
    transposed_key: bool,
    masks: tuple[MaskTerm, ...],
    **facts: object,
) -> AttentionSite | MissedSite:
    """Resolve operands and output in Dynamo's graph and check that the shapes are attention's."""
    place = place_of(anchor)
    query, key, value = nodes
    bare = [without_repeated_heads(node) for node in (key, value)]
    # The op stands where the result stood: it must find there what the product found.
    if any(written.stale(node, output) for node in (*nodes, *bare)):
        return MissedSite(place=place, reason="an operand is overwritten before the result")
    origins = captured.origins.get(output)
    if not origins:
        return MissedSite(place=place, reason=f"{output.name} exists only inside a composite op")
    origin = origins[-1]
    operands = _operands(captured, origin.graph, nodes, transposed_key=transposed_key)
    if isinstance(operands, str):
        return MissedSite(place=place, reason=operands)
    problem = _shape_problem(nodes, output, operands, transposed_key=transposed_key)
    if problem:
        return MissedSite(place=place, reason=problem)
    key_length = _key_length(shape_of(key)[3 if transposed_key else 2], masks)
    sources = [projection_sources(node) for node in nodes]
    return AttentionSite(
        place=place,
        output=origin,
        result=output,
        result_layout=(),
        query=operands[0],
        key=operands[1],
        value=operands[2],
        score_shape=(*shape_of(query)[:3], key_length),
        lengths_equal=same_size(shape_of(query)[2], key_length),
        appended=not transposed_key and is_appended(without_repeated_heads(key), query),
        same_source=bool(sources[0]) and sources[0] == sources[1] == sources[2],
        dtype=value_of(output).dtype,
        masks=masks,
        **facts,  # type: ignore[arg-type]
    )


def _key_length(length: int | torch.SymInt, masks: Sequence[MaskTerm]) -> int | torch.SymInt:
    """Spell the key length as the mask does: a mask must fit the scores, so the two agree.

    With a growing cache each layer's length is a symbol of its own, and the mask was made for one.
    """
    spelled = [shape_of(term.node)[-1] for term in masks if value_of(term.node).dim() > 0]
    return next((size for size in spelled if isinstance(size, torch.SymInt)), length)


def _operands(
    captured: CapturedGraph,
    graph: str,
    nodes: tuple[fx.Node, fx.Node, fx.Node],
    *,
    transposed_key: bool,
) -> tuple[Operand, Operand, Operand] | str:
    """Return the operands, keys and values without repeated heads where both allow it."""
    query, key, value = nodes
    if any(len(shape_of(node)) != 4 for node in nodes):
        return "operands are not [batch, heads, length, dim]"
    bare_key = key if transposed_key else without_repeated_heads(key)
    bare_value = without_repeated_heads(value)
    peeled = shape_of(bare_key)[1] == shape_of(bare_value)[1]
    peeled = peeled and all(captured.origin(n, graph) for n in (bare_key, bare_value))
    if peeled:
        key, value = bare_key, bare_value
    resolved = (
        to_operand(query, captured, graph, ()),
        to_operand(key, captured, graph, (("transpose", (-2, -1)),) if transposed_key else ()),
        to_operand(value, captured, graph, ()),
    )
    for operand in resolved:
        if isinstance(operand, str):
            return operand
    return resolved  # type: ignore[return-value]


def _shape_problem(
    nodes: tuple[fx.Node, fx.Node, fx.Node],
    output: fx.Node,
    operands: tuple[Operand, Operand, Operand],
    *,
    transposed_key: bool,
) -> str:
    """Say what keeps these tensors from being one attention, or nothing."""
    (query, key, value), (q, k, v) = nodes, operands
    if k.heads != v.heads:
        return f"keys have {k.heads} heads, values {v.heads}"
    if q.heads % k.heads:
        return f"{q.heads} query heads are no multiple of {k.heads} key heads"
    if q.dim != k.dim:
        return f"queries have dimension {q.dim}, keys {k.dim}"
    if not must_agree(shape_of(key)[3 if transposed_key else 2], shape_of(value)[2]):
        return "keys and values differ in length"
    batches = [shape_of(node)[0] for node in nodes]
    if not all(must_agree(batches[0], size) for size in batches):
        return "operands differ in batch size"
    result = (*shape_of(query)[:3], shape_of(value)[-1])
    if not all(must_agree(a, b) for a, b in zip(shape_of(output), result, strict=True)):
        return "queries are broadcast over batch or heads"
    return ""
