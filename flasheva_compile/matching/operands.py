"""From the operands of the two products back to un-expanded queries, keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from flasheva_compile.matching.aten import (
    CASTS,
    VIEWS,
    argument,
    op_name,
    same_size,
    shape_of,
    value_of,
)
from flasheva_compile.site import Operand

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flasheva_compile.site import CapturedGraph, Layout

_PROJECTIONS = frozenset(["linear", "addmm", "mm"])
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


def to_operand(node: fx.Node, captured: CapturedGraph, graph: str, layout: Layout) -> Operand | str:
    """Turn a shadow node into an operand of Dynamo's graph, or say why that fails."""
    shape = shape_of(node)
    if len(shape) != 4:
        return f"operand {node.name} has {len(shape)} axes; [batch, heads, length, dim] expected"
    origin = captured.origin(node, graph)
    if origin is None:
        return f"operand {node.name} exists only inside a composite op"
    _, heads, length, dim = shape[:2] + (shape[2:][::-1] if layout else shape[2:])
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


def _is_weight_product(node: fx.Node) -> bool:
    return op_name(node) in {"matmul", "bmm", "einsum", "convolution", "conv2d"}


def _activation(node: fx.Node) -> fx.Node:
    source = node.args[1] if op_name(node) == "addmm" else node.args[0]
    if isinstance(source, list | tuple):
        source = source[0]
    while op_name(source) in CASTS | VIEWS:
        source = source.args[0]
    return source


def _tensor_inputs(node: fx.Node) -> Iterator[fx.Node]:
    return (
        operand
        for operand in node.all_input_nodes
        if isinstance(operand.meta.get("val"), torch.Tensor | list | tuple)
    )
