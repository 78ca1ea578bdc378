"""Find every softmax attention of a captured graph: sites that are understood, and misses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flasheva_compile.matching.aten import (
    argument,
    op_name,
    place_in_source,
    same_size,
    scalar_of,
    shape_of,
    value_of,
)
from flasheva_compile.matching.axes import axis_origin
from flasheva_compile.matching.candidates import is_attention, score_problem, weight_problem
from flasheva_compile.matching.layout import spell_products, spell_sdpa
from flasheva_compile.matching.operands import (
    is_appended,
    is_learned,
    is_preallocated,
    layout_of_result,
    projection_sources,
    resolve_operands,
    shape_of_heads,
    shape_problem,
    tokens_of,
    with_axes,
    without_repeated_heads,
)
from flasheva_compile.matching.scores import walk_scores
from flasheva_compile.matching.softmax import softmax_at
from flasheva_compile.matching.weights import walk_weights
from flasheva_compile.mutation import Mutations
from flasheva_compile.site import AttentionSite, MaskTerm, MissedSite, Place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

    from flasheva_compile.matching.layout import Spelling
    from flasheva_compile.matching.softmax import Softmax
    from flasheva_compile.site import CapturedGraph, MaskKind

_SDPA = "scaled_dot_product_attention"
_STATISTICS = frozenset({"logsumexp", "amax"})
_FUSED_LAYERS = frozenset({"_transformer_encoder_layer_fwd", "_native_multi_head_attention"})


def match(captured: CapturedGraph) -> tuple[AttentionSite | MissedSite, ...]:
    """Recognise attention by dataflow, anchored on SDPA calls and on softmax.

    A softmax that gives no weights to tokens (router, vocabulary) is not attention and is not
    reported.

    Returns:
        Sites and misses in graph order, then the attentions that the shadow does not show.
    """
    found, written = [], Mutations(captured.shadow.graph)
    for node in captured.shadow.graph.nodes:
        if node.op != "call_function":
            continue
        if node in captured.opaque:
            found.append(MissedSite(place=place_of(node), reason=captured.opaque[node]))
        elif op_name(node) in _FUSED_LAYERS:
            reason = "inside PyTorch's fused layer; torch.backends.mha.set_fastpath_enabled(False)"
            found.append(MissedSite(place=place_of(node), reason=reason + " takes it apart"))
        elif op_name(node) == _SDPA:
            found.append(_match_sdpa(node, captured, written))
        elif (softmax := softmax_at(node)) is not None and is_attention(softmax):
            found.append(_match_softmax(softmax, captured, written))
    return (*found, *captured.hidden)


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


def _match_sdpa(
    node: fx.Node, captured: CapturedGraph, written: Mutations
) -> AttentionSite | MissedSite:
    query, key, value = node.args[:3]
    mask = argument(node, 3, "attn_mask")
    masks: tuple[tuple[MaskTerm, fx.Node], ...] = ()
    if mask is not None:
        kind: MaskKind = "additive" if value_of(mask).dtype.is_floating_point else "bool"
        masks = ((MaskTerm(node=mask, kind=kind), node),)
    scale = argument(node, 7, "scale")
    number = shape_of(query)[-1] ** -0.5 if scale is None else scalar_of(scale, captured.shadow)
    if number is None:
        return MissedSite(place=place_of(node), reason="the scale is a tensor")
    spelling = spell_sdpa(query, key, value)
    if isinstance(spelling, str):
        return MissedSite(place=place_of(node), reason=spelling)
    return _site(
        captured,
        written,
        (node, node),
        spelling,
        masks,
        scale=number,
        softcap=0.0,
        dropout_p=float(argument(node, 4, "dropout_p", 0.0) or 0.0),
        is_causal=bool(argument(node, 5, "is_causal", default=False)),
    )


def _match_softmax(
    softmax: Softmax, captured: CapturedGraph, written: Mutations
) -> AttentionSite | MissedSite:
    node = softmax.weights
    scores = walk_scores(softmax, captured.shadow, written)
    if isinstance(scores, str):
        return MissedSite(place=place_of(node), reason=score_problem(softmax) or scores)
    weights = walk_weights(node)
    if isinstance(weights, str):
        return MissedSite(place=place_of(node), reason=weight_problem(softmax) or weights)
    output = weights.product.node
    aside = {op_name(n) for n in softmax.scores.users if n not in softmax.inner} & _STATISTICS
    if aside:
        return MissedSite(place=place_of(node), reason=f"{aside.pop()} of the scores is also used")
    if len({_grad_mode(n) for n in (scores.product.node, node, output)}) > 1:
        return MissedSite(place=place_of(node), reason="grad mode changes inside the attention")
    between = (*scores.scores, *weights.weights)
    spelling = spell_products(scores.product, weights.product, between, softmax.axis, weights.used)
    if isinstance(spelling, str):
        return MissedSite(place=place_of(node), reason=score_problem(softmax) or spelling)
    return _site(
        captured,
        written,
        (node, output),
        spelling,
        scores.masks,
        scale=scores.scale,
        softcap=scores.softcap,
        dropout_p=weights.dropout_p,
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
    ends: tuple[fx.Node, fx.Node],
    spelling: Spelling,
    masks: tuple[tuple[MaskTerm, fx.Node], ...],
    **facts: object,
) -> AttentionSite | MissedSite:
    """Resolve operands and output in Dynamo's graph and check that the shapes are attention's."""
    anchor, output = ends
    place = place_of(anchor)
    nodes = (spelling.query, spelling.key, spelling.value)
    bare = [without_repeated_heads(node) for node in nodes[1:]]
    # The op stands where the result stood: it must find there what the product found.
    if any(written.stale(node, output) for node in (*nodes, *bare)):
        return MissedSite(place=place, reason="an operand is overwritten before the result")
    origins = captured.origins.get(output)
    if not origins:
        return MissedSite(place=place, reason=f"{output.name} exists only inside a composite op")
    origin = origins[-1]
    operands = resolve_operands(captured, origin.graph, spelling)
    result_layout = layout_of_result(spelling, output)
    terms = with_axes(masks, spelling)
    for found in (operands, result_layout, terms):
        if isinstance(found, str):
            return MissedSite(place=place, reason=found)
    query, key, value = operands
    problem = shape_problem(operands, output, result_layout)
    sources = [axis_origin(n, axes.index(letter)) for n, axes, letter in tokens_of(spelling)]
    if {"features"} in [source.kinds for source in sources[:2]]:
        problem = "attends over features (channels or heads), not over tokens"
    if is_preallocated(key.node):
        problem = "reads a preallocated cache; prepare(model, config) brings one of its own"
    if problem:
        return MissedSite(place=place, reason=problem)
    key_length = _key_length(shape_of_heads(key)[2], terms)
    projected = [projection_sources(node) for node in nodes]
    return AttentionSite(
        place=place,
        output=origin,
        result=output,
        result_layout=result_layout,
        query=query,
        key=key,
        value=value,
        score_shape=(*shape_of_heads(query)[:3], key_length),
        lengths_equal=same_size(shape_of_heads(query)[2], key_length),
        appended=not key.layout and is_appended(key.node, query.node),
        same_source=bool(projected[0])
        and projected[0] == projected[1]
        and sources[0].moves == sources[1].moves == sources[2].moves,
        learned_mask=torch.is_grad_enabled()
        and any(term.kind == "additive" and is_learned(captured, term.node) for term in terms),
        dtype=value_of(output).dtype,
        masks=terms,
        **facts,  # type: ignore[arg-type]
    )


def _key_length(length: int | torch.SymInt, masks: Sequence[MaskTerm]) -> int | torch.SymInt:
    """Spell the key length as the mask does: a mask must fit the scores, so the two agree.

    With a growing cache each layer's length is a symbol of its own, and the mask was made for one.
    """
    spelled = [
        shape_of(term.node)[-1]
        for term in masks
        if value_of(term.node).dim() > 0 and term.axes[-1] == "k"
    ]
    return next((size for size in spelled if isinstance(size, torch.SymInt)), length)
