"""Where an axis of an operand comes from: back to the projection that made it.

Attention over a sequence has the axis of its keys from the tokens of a projection. Attention over
channels or over heads has it from the features, and is something else, whatever its formula.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import sympy
import torch

from flasheva_compile.matching.aten import CASTS, argument, op_name, same_size, shape_of
from flasheva_compile.matching.softmax import is_cast_like

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import fx

Kind: TypeAlias = Literal["tokens", "features"]
_Step: TypeAlias = "tuple[fx.Node, int]"  # a node and one of its axes
# What was selected, of which node, along which of its axes
_Chosen: TypeAlias = "tuple[tuple[object, fx.Node, int | None], ...]"

_PROJECTIONS = frozenset(["linear", "addmm", "mm"])
_CONVOLUTIONS = frozenset(["convolution", "conv1d", "conv2d", "conv3d"])
_VIEWS = frozenset(["view", "reshape", "_unsafe_view", "flatten", "unflatten"])
_SAME_AXES = CASTS | {
    "neg",
    "dropout",
    "layer_norm",
    "native_layer_norm",
    "rms_norm",
    "detach",
    "relu",
    "elu",
    "tanh",
    "softmax",
    "contiguous",
    "expand",
    "repeat",
    "repeat_interleave",
    "mul",
    "add",
    "sub",
    "div",
    "where",
    "pow",
    "cat",
    "slice",
    "narrow",
    "flip",
    "roll",
}
# What puts elsewhere what stands along one axis -> the place of that axis among its arguments.
_REORDERINGS = {
    "index_select": 1,
    "gather": 1,
    "take_along_dim": 2,
    "index_copy": 1,
    "index_add": 1,
    "scatter": 1,
    "sort": 1,
    "topk": 2,
}
_SEARCH_LIMIT = 200


@dataclass(frozen=True, slots=True)
class AxisOrigin:
    """What is known about the origin of one axis.

    Attributes:
        kinds: What the axis is made of, at the nearest projection; empty if none was found.
        moves: What was selected or reordered along it since.
    """

    kinds: frozenset[Kind] = frozenset()
    moves: tuple[object, ...] = ()


def axis_origin(node: fx.Node, axis: int) -> AxisOrigin:
    """Follow an axis back to the nearest projection."""
    return _Search().follow(node, axis % len(shape_of(node)), ())


def merged_heads(node: fx.Node, axis: int) -> int | None:
    """Return the inner size of an axis that batch and heads were merged into, if it is found."""
    axis %= len(shape_of(node))
    for _ in range(_SEARCH_LIMIT):
        if op_name(node) in _VIEWS:
            inner, outer = _group(node, axis)
            if len(inner) > 1 and axis == outer[0] and (heads := _ratio(node, axis, inner[0])):
                return heads
        steps = list(axis_sources(node, axis))
        if not steps:
            return None
        node, axis = steps[0]
    return None


class _Search:
    """A walk with a limit: a graph may join in many places."""

    def __init__(self) -> None:
        self.left = _SEARCH_LIMIT

    def follow(self, node: fx.Node, axis: int, chosen: _Chosen) -> AxisOrigin:
        """Follow one axis; ``chosen`` is what was selected on other axes on the way."""
        self.left -= 1
        name = op_name(node)
        if self.left < 0 or not isinstance(node.meta.get("val"), torch.Tensor):
            return AxisOrigin()
        if name in _PROJECTIONS or _multiplies_weight(node):
            last = axis == len(shape_of(node)) - 1
            return AxisOrigin(frozenset({"features" if last else "tokens"}))
        if name in _CONVOLUTIONS:
            return AxisOrigin(frozenset({"features" if axis == 1 else "tokens"}))
        if name == "cat" and axis == argument(node, 1, "dim", 0) % len(shape_of(node)):
            given: Any = node.args[0]
            # A cache that holds nothing yet is joined too.
            pieces = [p for p in given if 0 not in shape_of(p)]
            return _joined([self.follow(piece, axis, chosen) for piece in pieces], node, axis)
        move, chosen = _moved(node, axis, chosen)
        found = AxisOrigin()
        for source, of_source in axis_sources(node, axis):
            origin = self.follow(source, of_source, chosen)
            if name in _VIEWS and len(_group(node, axis)[0]) > 1:
                kinds = found.kinds | origin.kinds
                found = AxisOrigin(kinds, found.moves or origin.moves)
            elif origin.kinds:
                found = origin
                break
            else:
                found = found if found.moves else origin
        return replace(found, moves=(*move, *found.moves))


def _joined(pieces: Sequence[AxisOrigin], node: fx.Node, axis: int) -> AxisOrigin:
    """Join pieces of an axis; all pieces of one tensor in their order are that tensor again.

    Rotary positions for some tokens only are applied like that.
    """
    if len(pieces) == 1:
        return pieces[0]
    kinds = frozenset[Kind]().union(*(piece.kinds for piece in pieces))
    first = [piece.moves[0] if piece.moves else None for piece in pieces]
    rest = {piece.moves[1:] for piece in pieces}
    if len(rest) == 1 and _are_consecutive(first, shape_of(node)[axis]):
        return AxisOrigin(kinds, rest.pop())
    return AxisOrigin(kinds, (("cat", tuple(piece.moves for piece in pieces)),))


def _are_consecutive(moves: Sequence[Any], size: int | torch.SymInt) -> bool:
    """Return whether slices, or results of one split, follow each other and leave nothing out."""
    if any(move is None for move in moves):
        return False
    if all(move[0] == "slice" for move in moves):
        bounds = [(move[2], move[3]) for move in moves]
        reach = bounds[-1][1] in {str(sys.maxsize), str(size)}
        follow = all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
        return bounds[0][0] == "0" and follow and reach and all(move[4] == "1" for move in moves)
    same = {(move[0], move[1], *move[3:]) for move in moves}
    split = len(same) == 1 and moves[0][0] in {"split", "split_with_sizes", "chunk"}
    return split and [move[2] for move in moves] == list(range(moves[0][4]))


def _multiplies_weight(node: fx.Node) -> bool:
    if op_name(node) not in {"matmul", "linalg_matmul", "einsum"}:
        return False
    right = node.args[1]
    return hasattr(right, "op") and right.op in {"placeholder", "get_attr"}


def _moved(node: fx.Node, axis: int, chosen: _Chosen) -> tuple[tuple[object, ...], _Chosen]:
    """What this op selects or reorders along the axis; else what it selects beside it."""
    name = op_name(node)
    if name in _VIEWS:
        inner, outer = _group(node, axis)
        parts = [n for n in outer if not same_size(shape_of(node)[n], 1)]
        if len(inner) == 1 and len(parts) > 1:  # the axis is one part of a larger one
            shape = str(shape_of(node)[outer[0] :])
            return (("part", outer.index(axis), shape, _among_tokens(chosen)),), ()
        return (), chosen
    if _reorders(node, axis):
        # What is sorted has an order of its own: the values and indices of that node.
        given = node.args if name == "getitem" else node.args[1:]
        return ((name, str(given)),), chosen
    if name not in {
        "slice",
        "narrow",
        "select",
        "flip",
        "roll",
        "getitem",
        "repeat",
        "index",
    }:
        return (), chosen
    source = node.args[0]
    rank = len(shape_of(node))
    if name == "getitem":
        rank_in = len(shape_of(node))
        dim = _split_axis(source, rank_in)
        inserted = op_name(source) == "unbind"
        touched = dim == axis and not inserted
        pieces = len(source.meta["val"])
        entry = (op_name(source), dim, node.args[1], str(source.args[1:]), pieces)
        return ((entry,), chosen) if touched else ((), (*chosen, (entry, source.args[0], dim)))
    if name == "select":
        entry = ("select", *node.args[1:])
        return (), (*chosen, (entry, source, node.args[1] % len(shape_of(source))))
    if name in {"slice", "narrow"}:
        dim = argument(node, 1, "dim", 0) % rank
        whole = same_size(shape_of(node)[dim], shape_of(source)[dim])
        bounds = (str(argument(node, n, "", default)) for n, default in ((2, 0), (3, 0), (4, 1)))
        entry = (name, dim, *bounds)
        if whole:
            return (), chosen
        return ((entry,), chosen) if dim == axis else ((), (*chosen, (entry, source, dim)))
    if name in {"flip", "roll"}:
        dims = [
            d % rank for d in argument(node, 1 if name == "flip" else 2, "dims", []) or range(rank)
        ]
        return (((name, str(node.args[1:])),), chosen) if axis in dims else ((), chosen)
    same = name != "index" and same_size(shape_of(node)[axis], shape_of(source)[axis - rank])
    return ((), chosen) if same else (((name, str(node.args[1:])),), chosen)


def _reorders(node: fx.Node, axis: int) -> bool:
    """Return whether an op gives an axis other tokens, or the same in another order."""
    source: Any = node.args[0] if op_name(node) == "getitem" else node
    name, rank = op_name(source), len(shape_of(node))
    if name in _REORDERINGS:
        last = -1 if name in {"sort", "topk"} else None
        dim = argument(source, _REORDERINGS[name], "dim", last)
        return dim is None or dim % rank == axis
    if name in {"pad", "constant_pad_nd"}:  # sizes from the last axis on, two for each
        sizes: Any = node.args[1]
        return any(not same_size(size, 0) for size in sizes[2 * (rank - 1 - axis) :][:2])
    return False


def _among_tokens(chosen: _Chosen) -> tuple[object, ...]:
    """Leave out what was selected among features: queries, keys and values of one projection."""
    return tuple(
        entry
        for entry, node, axis in chosen
        if axis is None or axis_origin(node, axis).kinds != {"features"}
    )


def axis_sources(node: fx.Node, axis: int) -> Iterator[_Step]:
    """Tensors, with their axes, that an axis of ``node`` comes from."""
    name = op_name(node)
    if name in _VIEWS:
        inner, _ = _group(node, axis)
        source = node.args[0]
        yield from ((source, n) for n in _parts(node, axis, inner))
    elif name in _RENUMBER:
        renumbered = _RENUMBER[name](node, axis)
        if renumbered is not None:
            yield node.args[0], renumbered
    elif name == "getitem":
        split = node.args[0]
        dim = _split_axis(split, len(shape_of(node)))
        if dim is not None and op_name(split) in {"split", "split_with_sizes", "chunk", "unbind"}:
            yield split.args[0], axis + (op_name(split) == "unbind" and axis >= dim)
        elif op_name(split) == "native_layer_norm":
            yield split.args[0], axis
    elif name in _SAME_AXES or is_cast_like(node):
        yield from aligned_sources(node, axis)


def aligned_sources(node: fx.Node, axis: int) -> Iterator[_Step]:
    """Operands of an elementwise op that are not broadcast along the axis."""
    operands: Any = node.args[0] if op_name(node) == "cat" else node.args
    from_end = axis - len(shape_of(node))
    for operand in operands:
        if not hasattr(operand, "op") or not isinstance(operand.meta.get("val"), torch.Tensor):
            continue
        shape = shape_of(operand)
        if -from_end <= len(shape) and not (
            same_size(shape[from_end], 1) and not same_size(shape_of(node)[axis], 1)
        ):
            yield operand, from_end % len(shape)


def _transposed(node: fx.Node, axis: int) -> int:
    rank = len(shape_of(node))
    first, second = (a % rank for a in node.args[1:3])
    return {first: second, second: first}.get(axis, axis)


def _permuted(node: fx.Node, axis: int) -> int:
    order: Any = node.args[1]
    return order[axis] % len(order)


def _swapped(node: fx.Node, axis: int) -> int:
    last = len(shape_of(node)) - 1
    return {last: last - 1, last - 1: last}.get(axis, axis)


def _unsqueezed(node: fx.Node, axis: int) -> int | None:
    at = node.args[1] % len(shape_of(node))
    return None if axis == at else axis - (axis > at)


def _squeezed(node: fx.Node, axis: int) -> int | None:
    rank = len(shape_of(node.args[0]))
    dims = argument(node, 1, "dim")
    gone = {dims % rank} if isinstance(dims, int) else {d % rank for d in dims or ()}
    gone = {d for d in gone if same_size(shape_of(node.args[0])[d], 1)}
    if dims is None:
        return None
    return [d for d in range(rank) if d not in gone][axis]


def _selected(node: fx.Node, axis: int) -> int:
    at = node.args[1] % len(shape_of(node.args[0]))
    return axis + (axis >= at)


_RENUMBER: dict[str, Callable[[fx.Node, int], int | None]] = {
    "transpose": _transposed,
    "permute": _permuted,
    "t": lambda _, axis: 1 - axis,
    "mT": _swapped,
    "unsqueeze": _unsqueezed,
    "squeeze": _squeezed,
    "select": _selected,
}


def _split_axis(split: Any, rank: int) -> int | None:  # noqa: ANN401
    name = op_name(split)
    if name in {"split", "split_with_sizes", "chunk"}:
        return argument(split, 2, "dim", 0) % rank
    return argument(split, 1, "dim", 0) % (rank + 1) if name == "unbind" else None


def _group(node: fx.Node, axis: int) -> tuple[list[int], list[int]]:
    """Axes of a view's input and output that are made of each other, around an output axis."""
    inner, outer = shape_of(node.args[0]), shape_of(node)
    i = o = 0
    while o < len(outer):
        first = (i, o)
        left, right = _size(inner[i]) if i < len(inner) else sympy.Integer(1), _size(outer[o])
        i, o = i + 1, o + 1
        while left != right and (i < len(inner) or o < len(outer)):
            if o >= len(outer) or (i < len(inner) and _less(left, right)):
                left, i = left * _size(inner[i]), i + 1
            else:
                right, o = right * _size(outer[o]), o + 1
        if first[1] <= axis < o:
            return list(range(first[0], min(i, len(inner)))), list(range(first[1], o))
    return [], []


def _less(left: sympy.Expr, right: sympy.Expr) -> bool:
    """Whether ``right`` is a multiple of ``left``, or larger."""
    ratio = sympy.cancel(right / left)
    return bool(ratio.is_integer) if ratio.free_symbols else bool(ratio > 1)


def _parts(node: fx.Node, axis: int, inner: Sequence[int]) -> list[int]:
    """Input axes of a group that an output axis is made of."""
    _, outer = _group(node, axis)
    if len(inner) <= 1 or len(outer) == 1:
        return list(inner)
    if axis == outer[-1]:
        return [inner[-1]]
    return list(inner) if axis == outer[0] else []


def _ratio(node: fx.Node, axis: int, inner: int) -> int | None:
    ratio = sympy.cancel(_size(shape_of(node)[axis]) / _size(shape_of(node.args[0])[inner]))
    return int(ratio) if ratio.is_Integer and ratio > 1 else None


def _size(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
