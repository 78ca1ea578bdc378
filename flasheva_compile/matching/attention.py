"""Find every softmax attention of a captured graph: sites that are understood, and misses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flasheva_compile import _torch_compat as compat
from flasheva_compile.matching.aten import (
    argument,
    is_cast,
    op_name,
    place_in_source,
    same_size,
    scalar_of,
    shape_of,
    value_of,
)
from flasheva_compile.matching.axes import axis_origin
from flasheva_compile.matching.candidates import (
    exponential_problem,
    is_attention,
    is_cut_off,
    score_problem,
    weight_problem,
)
from flasheva_compile.matching.layout import spell_products, spell_sdpa
from flasheva_compile.matching.operands import (
    is_appended,
    is_learned,
    is_of_parameters,
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
from flasheva_compile.matching.softmax import Softmax, softmax_at
from flasheva_compile.matching.weights import walk_weights
from flasheva_compile.mutation import Mutations
from flasheva_compile.site import AttentionSite, MaskTerm, MissedSite, Place

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from torch import fx

    from flasheva_compile.matching.axes import AxisOrigin
    from flasheva_compile.matching.layout import Spelling
    from flasheva_compile.site import CapturedGraph, MaskKind

_SDPA = "scaled_dot_product_attention"
_GRAD_MODE = "grad mode changes inside the attention"
_STATISTICS = frozenset({"logsumexp", "amax"})
_FUSED_LAYERS = frozenset({"_transformer_encoder_layer_fwd", "_native_multi_head_attention"})
_KERNELS = ("_scaled_dot_product_", "_flash_attention_forward", "_efficient_attention_forward")


def match(captured: CapturedGraph) -> tuple[AttentionSite | MissedSite, ...]:
    """Recognise attention by dataflow, anchored on SDPA calls and on softmax.

    A softmax that gives no weights to tokens (router, vocabulary) is not attention and is not
    reported.

    Returns:
        Sites and misses in graph order, then the attentions that the shadow does not show.
    """
    found, written = [], Mutations(captured.shadow.graph)
    calls = [node for node in captured.shadow.graph.nodes if node.op == "call_function"]
    softmaxes = {node: softmax for node in calls if (softmax := softmax_at(node)) is not None}
    inside = {node for x in softmaxes.values() for node in (*x.inner, x.weights)}
    broken = compat.graph_break(captured.dynamo) is not None
    for node in calls:
        if node in captured.opaque:
            found.append(MissedSite(place=place_of(node), reason=captured.opaque[node]))
        elif op_name(node) == _SDPA:
            found.append(_match_sdpa(node, captured, written))
        elif softmax := softmaxes.get(node):
            if is_attention(softmax) or (broken and is_cut_off(softmax)):
                found.append(_match_softmax(softmax, captured, written))
        elif node not in inside and (reason := _other_attention(node)):
            found.append(MissedSite(place=place_of(node), reason=reason))
    return (*found, *captured.hidden)


def _other_attention(node: fx.Node) -> str:
    """Say of a node that attends in a way that is never rewritten which way that is."""
    name = op_name(node)
    if name in _FUSED_LAYERS:
        reason = "inside PyTorch's fused layer; torch.backends.mha.set_fastpath_enabled(False)"
        return reason + " takes it apart"
    if name.startswith(_KERNELS):
        return f"a call of {name}; functional.scaled_dot_product_attention can be rewritten"
    if name == "_masked_softmax":
        axis = argument(node, 2, "dim")
        softmax = Softmax(node.args[0], node, -1 if axis is None else axis)  # type: ignore[arg-type]
        reason = "masked by _masked_softmax; masked_fill and softmax can be rewritten"
        return reason if is_attention(softmax) else ""
    return exponential_problem(node) if name == "exp" else ""


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
        (node, node, node),
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
    between = (*scores.scores, *weights.weights)
    inside = (*scores.product.inside, *weights.product.inside)
    if _changes_grad_mode(captured, (*between, *inside, output)):
        return MissedSite(place=place_of(node), reason=_GRAD_MODE)
    spelling = spell_products(scores.product, weights.product, between, softmax.axis, weights.used)
    if isinstance(spelling, str):
        return MissedSite(place=place_of(node), reason=score_problem(softmax) or spelling)
    return _site(
        captured,
        written,
        (node, scores.product.node, output),
        spelling,
        scores.masks,
        scale=scores.scale,
        softcap=scores.softcap,
        dropout_p=weights.dropout_p,
        is_causal=False,
    )


def _changes_grad_mode(captured: CapturedGraph, nodes: Collection[fx.Node]) -> bool:
    """Return whether a graph computes some of these nodes with gradients, others without."""
    found, modes, mode = set(nodes), set(), None
    for node in captured.shadow.graph.nodes:
        if node in found:
            modes.add(mode)
        if getattr(node.target, "__name__", "") == "_set_grad_enabled":
            mode = node.args[0]
    return len(modes) > 1


def _peeled(operand: fx.Node, bare: fx.Node) -> Iterator[fx.Node]:
    """Yield what was taken off an operand: copies, swapped axes, repeated heads."""
    while operand is not bare:
        yield operand
        operand = operand.all_input_nodes[0]


def _site(
    captured: CapturedGraph,
    written: Mutations,
    ends: tuple[fx.Node, fx.Node, fx.Node],
    spelling: Spelling,
    masks: tuple[tuple[MaskTerm, fx.Node], ...],
    **facts: object,
) -> AttentionSite | MissedSite:
    """Resolve operands and output in Dynamo's graph and check that the shapes are attention's."""
    anchor, product, output = ends
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
    sources = [axis_origin(n, axes.index(letter)) for n, axes, letter in tokens_of(spelling)]
    problem = shape_problem(operands, output, result_layout) or _token_problem(key.node, sources)
    if written.stale_within(output, {*(x.node for x in operands), *(x.node for x in terms)}):
        problem = "something inside is overwritten through a view"
    pairs = zip(nodes, operands, strict=True)
    taken_off = {x for node, operand in pairs for x in _peeled(node, operand.node)}
    if problem or _changes_grad_mode(captured, {*taken_off, output}):
        return MissedSite(place=place, reason=problem or _GRAD_MODE)
    added = [term.node for term in terms if term.kind == "additive"]
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
        learned_mask=torch.is_grad_enabled() and any(is_learned(captured, x) for x in added),
        parameter_mask=any(is_of_parameters(captured, x) for x in added),
        dtype=_dtype_of((query.node, key.node), product, output),
        result_dtype=value_of(output).dtype,
        masks=terms,
        **facts,  # type: ignore[arg-type]
    )


def _token_problem(key: fx.Node, sources: Sequence[AxisOrigin]) -> str:
    """Say what the axes of queries and keys are instead of a sequence, or nothing."""
    if is_preallocated(key):
        return "reads a preallocated cache; prepare(model, config) brings one of its own"
    if {"features"} in [source.kinds for source in sources[:2]]:
        return "attends over features (channels or heads), not over tokens"
    return ""


def _dtype_of(operands: Sequence[fx.Node], product: fx.Node, output: fx.Node) -> torch.dtype:
    """Return the dtype in which scores lose nothing that they have: the result's, or a wider one.

    Queries and keys that were only cast to a wider one are what they were before.
    """
    dtype = value_of(output).dtype
    if torch.promote_types(dtype, value_of(product).dtype) == dtype:
        return dtype
    for node in operands:
        while is_cast(node) and value_of(node.args[0]).itemsize <= value_of(node).itemsize:
            node = node.args[0]
        dtype = torch.promote_types(dtype, value_of(node).dtype)
    return dtype


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
