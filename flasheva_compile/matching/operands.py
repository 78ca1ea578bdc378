"""From the operands of the two products back to un-expanded queries, keys and values."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from flasheva_compile.matching.aten import (
    CASTS,
    VIEWS,
    argument,
    must_agree,
    op_name,
    same_size,
    shape_of,
    value_of,
)
from flasheva_compile.matching.layout import from_heads, shape_after, to_heads
from flasheva_compile.site import Operand

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flasheva_compile.matching.layout import Spelling
    from flasheva_compile.site import CapturedGraph, Layout, MaskTerm

_PROJECTIONS = frozenset(["linear", "addmm", "mm"])
_WEIGHT_PRODUCTS = frozenset(["matmul", "linalg_matmul", "bmm", "einsum", "convolution", "conv2d"])
# What the leading axes of scores are, by their number of axes.
_LEADING = {3: "n", 4: "bh", 5: "bbh"}
# Ops whose result is no function of the tokens' values: sources end there.
_POSITIONAL = frozenset(
    ["arange", "full", "ones", "zeros", "ones_like", "zeros_like", "cos", "sin"]
)


def untransposed(node: fx.Node) -> tuple[fx.Node, bool]:
    """Return ``(x, False)`` if ``node`` is x with its last two axes swapped, else (node, True).

    The flag says that ``node`` itself still has to be transposed to be ``[..., N, D]``.
    """
    current = node
    while op_name(current) in {"contiguous", "clone"}:
        current = current.args[0]
    rank = len(shape_of(current))
    if op_name(current) == "transpose":
        axes = {current.args[1] % rank, current.args[2] % rank}
        if axes == {rank - 1, rank - 2}:
            return current.args[0], False
    return node, True


def without_repeated_heads(node: fx.Node) -> fx.Node:
    """Peel ``repeat_kv``: ``[B, Hkv, S, D] -> [:, :, None] -> expand -> [B, Hkv * G, S, D]``."""
    current = _strip(node)
    if op_name(current) == "repeat_interleave" and argument(current, 2, "dim") == 1:
        # Repeats given as a tensor need not be equal.
        return current.args[0] if isinstance(argument(current, 1, "repeats"), int) else node
    if op_name(current) not in VIEWS or len(shape_of(current)) != 4:
        return node
    expanded = _strip(current.args[0])
    if op_name(expanded) != "expand" or len(shape_of(expanded)) != 5:
        return node
    base = expanded.args[0]
    while op_name(base) in {"slice", "unsqueeze"} and len(shape_of(base)) == 5:
        if op_name(base) == "unsqueeze" and base.args[1] != 2:
            return node
        if op_name(base) == "slice" and not _keeps_everything(base):
            return node
        base = base.args[0]
    while op_name(base) == "slice" and _keeps_everything(base):
        base = base.args[0]
    return base if _is_repetition(base, expanded, current) else node


def _strip(node: fx.Node) -> fx.Node:
    while op_name(node) in {"clone", "contiguous", "alias"}:
        node = node.args[0]
    return node


def _keeps_everything(node: fx.Node) -> bool:
    return all(same_size(a, b) for a, b in zip(shape_of(node), shape_of(node.args[0]), strict=True))


def _is_repetition(base: fx.Node, expanded: fx.Node, merged: fx.Node) -> bool:
    if len(shape_of(base)) != 4:
        return False
    batch, heads, length, dim = shape_of(base)
    outer = shape_of(expanded)
    rest = all(
        same_size(a, b)
        for a, b in zip((batch, heads, length, dim), (*outer[:2], *outer[3:]), strict=True)
    )
    return rest and same_size(shape_of(merged)[1], heads * outer[2])


def resolve_operands(
    captured: CapturedGraph, graph: str, spelling: Spelling
) -> tuple[Operand, Operand, Operand] | str:
    """Return the operands, keys and values without repeated heads where both allow it."""
    heads, grouped = spelling.heads, spelling.grouped
    sides = (
        (spelling.query, spelling.query_axes),
        (spelling.key, spelling.key_axes),
        (spelling.value, spelling.value_axes),
    )
    found: list[tuple[fx.Node, Layout]] = []
    for node, axes in sides:
        layout = to_heads(axes, shape_of(node), heads, grouped=grouped)
        if isinstance(layout, str):
            return layout
        found.append(_without_transposition(node, layout))
    bare = [without_repeated_heads(node) for node, layout in found[1:] if not layout]
    same = len(bare) == 2 and shape_of(bare[0])[1] == shape_of(bare[1])[1]
    if same and all(captured.origin(node, graph) for node in bare):
        found[1:] = [(node, ()) for node in bare]
    operands = [_operand(node, captured, graph, layout) for node, layout in found]
    problem = next((o for o in operands if isinstance(o, str)), None)
    return problem or tuple(operands)  # type: ignore[return-value]


def _without_transposition(node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout]:
    """Take a swap of the last two axes back instead of undoing it."""
    if layout[:1] == (("transpose", (-2, -1)),):
        source, pending = untransposed(node)
        return (node, layout) if pending else (source, layout[1:])
    return node, layout


def _operand(node: fx.Node, captured: CapturedGraph, graph: str, layout: Layout) -> Operand | str:
    """Turn a shadow node into an operand of Dynamo's graph, or say why that fails."""
    origin = captured.origin(node, graph)
    if origin is None:
        return f"operand {node.name} exists only inside a composite op"
    shape = shape_after(shape_of(node), layout)
    if len(shape) != 4:
        return "operands are not [batch, heads, length, dim]"
    _, heads, length, dim = shape
    if isinstance(heads, torch.SymInt) or isinstance(dim, torch.SymInt):
        return "number of heads or head dimension is dynamic"
    return Operand(
        origin=origin,
        node=node,
        layout=layout,
        heads=heads,
        dim=dim,
        length=length if isinstance(length, int) else None,
        dtype=value_of(node).dtype,
    )


def shape_of_heads(operand: Operand) -> tuple[int | torch.SymInt, ...]:
    """Return the shape of an operand as ``[B, H, N, D]``."""
    return shape_after(shape_of(operand.node), operand.layout)


def tokens_of(spelling: Spelling) -> tuple[tuple[fx.Node, str, str], ...]:
    """Return the operands, their axes, and the letter of the axis of tokens."""
    return (
        (spelling.query, spelling.query_axes, "q"),
        (spelling.key, spelling.key_axes, "k"),
        (spelling.value, spelling.value_axes, "k"),
    )


def layout_of_result(spelling: Spelling, output: fx.Node) -> Layout | str:
    """Return what turns ``[B, H, L, Dv]`` into the result as it stands."""
    axes, shape = spelling.out_axes, shape_of(output)
    leads = [shape[axes.index(a)] for a in sorted(axes) if a.isdigit()]
    return from_heads(axes, leads, spelling.heads, grouped=spelling.grouped)


def with_axes(
    masks: Sequence[tuple[MaskTerm, fx.Node]], spelling: Spelling
) -> tuple[MaskTerm, ...] | str:
    """Say of each mask which axes of the scores it acts on."""
    found = []
    for term, scores in masks:
        rank = len(shape_of(scores))
        letters = (
            spelling.mask_axes if rank == len(spelling.mask_axes) else f"{'012'[: rank - 2]}qk"
        )
        names = {"q": "q", "k": "k"} | dict(zip("012", _LEADING.get(rank, ""), strict=False))
        if spelling.grouped:
            names["1"] = "h"
        if not set(letters) <= names.keys():
            return f"a mask on scores of {rank} axes"
        axes = tuple(names[a] for a in letters)
        if _differs_within(term.node, axes):
            return "a mask that differs within a group of leading axes"
        if _splits_heads(scores, axes, spelling.heads) and _differs_on(term.node, axes, "bh"):
            return "a mask on scores whose leading axes are not those of queries"
        found.append(replace(term, axes=axes))
    return tuple(found)


def _splits_heads(scores: fx.Node, axes: tuple[str, ...], heads: int) -> bool:
    """Return whether what stands for the heads in these scores has another size than the heads."""
    sizes = [size for axis, size in zip(axes, shape_of(scores), strict=True) if axis == "h"]
    return bool(sizes) and not same_size(math.prod(sizes), heads)


def _differs_on(mask: fx.Node, axes: tuple[str, ...], wanted: str) -> bool:
    """Return whether a mask has more than one element along one of these axes."""
    pairs = zip(reversed(axes), reversed(shape_of(mask)), strict=False)
    return any(axis in wanted and not same_size(size, 1) for axis, size in pairs)


def _differs_within(mask: fx.Node, axes: tuple[str, ...]) -> bool:
    """Return whether a mask has an axis that is only a part of the batch or of the heads."""
    shape = shape_of(mask)
    return any(
        axes.count(axis) > 1 and not same_size(size, 1)
        for axis, size in zip(reversed(axes), reversed(shape), strict=False)
    )


def shape_problem(
    operands: tuple[Operand, Operand, Operand], output: fx.Node, result_layout: Layout
) -> str:
    """Say what keeps these tensors from being one attention, or nothing."""
    q, k, v = operands
    if k.heads != v.heads:
        return f"keys have {k.heads} heads, values {v.heads}"
    if q.heads % k.heads:
        return f"{q.heads} query heads are no multiple of {k.heads} key heads"
    if q.dim != k.dim:
        return f"queries have dimension {q.dim}, keys {k.dim}"
    query, key, value = (shape_of_heads(operand) for operand in operands)
    if not must_agree(key[2], value[2]):
        return "keys and values differ in length"
    if not all(must_agree(query[0], shape[0]) for shape in (key, value)):
        return "operands differ in batch size"
    result = shape_after((*query[:3], value[-1]), result_layout)
    shape = shape_of(output)
    if len(result) != len(shape) or not all(map(must_agree, shape, result)):
        return "queries are broadcast over batch or heads"
    return ""


def projection_sources(node: fx.Node) -> frozenset[fx.Node]:
    """Return the tensors that are projected into ``node``: inputs of the nearest linear layers.

    Self-attention projects queries, keys and values from one tensor; cross-attention does not.
    Graph inputs that reach ``node`` without a projection are not reported.
    """
    found: set[fx.Node] = set()
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        name = op_name(current)
        if name in _PROJECTIONS or _is_weight_product(current):
            found.add(_activation(current))
        elif name not in _POSITIONAL:
            stack.extend(_tensor_inputs(current))
    return frozenset(found)


def is_learned(captured: CapturedGraph, node: fx.Node) -> bool:
    """Return whether a node is computed from an input of the graph that takes a gradient."""
    return any(getattr(x, "requires_grad", False) for x in _inputs_behind(captured, node))


def is_of_parameters(captured: CapturedGraph, node: fx.Node) -> bool:
    """Return whether a node is computed from a module's parameter, trained or frozen."""
    return any(isinstance(x, torch.nn.Parameter) for x in _inputs_behind(captured, node))


def _inputs_behind(captured: CapturedGraph, node: fx.Node) -> Iterator[object]:
    """Yield what the graph is given of which a node reads the values, with data where it has."""
    shadow = captured.shadow.graph.find_nodes(op="placeholder")
    given = dict(zip(shadow, captured.dynamo.graph.find_nodes(op="placeholder"), strict=True))
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        name = op_name(current)
        if not (name.startswith("new_") or name.endswith("_like")):  # these take a shape only
            stack.extend(current.all_input_nodes)
        if current in given:
            yield captured.data.get(current, given[current].meta.get("example_value"))


def is_appended(key: fx.Node, query: fx.Node) -> bool:
    """Return whether ``key`` is a cache with the keys of the very queries appended.

    ``cat([past, new], dim=-2)``, ``new`` as long as the queries and projected from the same tensor:
    then the last key is the last query's own, whatever the mask says.
    """
    current = _strip(key)
    if op_name(current) != "cat" or argument(current, 1, "dim", 0) not in {2, -2}:
        return False
    pieces = current.args[0]
    if not isinstance(pieces, list | tuple) or not isinstance(new := pieces[-1], fx.Node):
        return False
    sources = projection_sources(query)
    same = bool(sources) and projection_sources(new) == sources
    return same and same_size(shape_of(new)[2], shape_of(query)[2])


def is_preallocated(key: fx.Node) -> bool:
    """Return whether ``key`` is read from a tensor that new keys were written into by index.

    That is how caches of a fixed size work. Prefill reads the part that it has just written and
    looks like any self-attention; the steps after it do not, and both must compute one function.
    """
    current = _strip(key)
    while op_name(current) in {"slice", "narrow"} | CASTS | VIEWS:
        current = current.args[0]
    return op_name(current) in {"index_copy", "index_copy_", "index_put", "index_put_"}


def _is_weight_product(node: fx.Node) -> bool:
    return op_name(node) in _WEIGHT_PRODUCTS


def _activation(node: fx.Node) -> fx.Node:
    source = node.args[1] if op_name(node) in {"addmm", "einsum"} else node.args[0]
    if isinstance(source, list | tuple):
        source = source[0]
    while op_name(source) in CASTS | VIEWS:
        source = source.args[0]
    return _first_of_equals(source)


def _first_of_equals(node: fx.Node) -> fx.Node:
    """Return the first of the transpositions that give what this one gives, else the node.

    ``nn.MultiheadAttention`` transposes its inputs one by one.
    """
    if op_name(node) not in {"transpose", "permute"}:
        return node
    source: Any = node.args[0]
    same = (n for n in source.users if (n.target, n.args) == (node.target, node.args))
    return next(same)


def _tensor_inputs(node: fx.Node) -> Iterator[fx.Node]:
    return (
        operand
        for operand in node.all_input_nodes
        if isinstance(operand.meta.get("val"), torch.Tensor | list | tuple)
    )
