"""Writes a proved key condition back into an FX graph, as a ``[B, S]`` tensor of torch calls.

Input: a formula over (b, k) from `MaskPredicate.key_mask` or `.segments`. Refused with a reason: a
formula with an operation, a size or a tensor that the target graph does not have.
"""

# sympy's annotations say Basic where they mean Expr or Boolean
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sympy as sp
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from torch import fx

from flasheva_compile.masks.symbolic import BATCH, HEAD, KEY
from flasheva_compile.masks.values import is_boolean

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_RELATIONS: dict[type[Relational], Callable[..., object]] = {
    sp.Eq: operator.eq,
    sp.Ne: operator.ne,
    sp.Le: operator.le,
    sp.Lt: operator.lt,
    sp.Ge: operator.ge,
    sp.Gt: operator.gt,
}
_FOLDS: dict[type[sp.Basic], Callable[..., object]] = {
    sp.And: torch.logical_and,
    sp.Or: torch.logical_or,
    sp.Add: operator.add,
    sp.Mul: operator.mul,
}


@dataclass(frozen=True, slots=True)
class NotEmitted:
    """Why a formula was not written."""

    reason: str


class _CannotEmitError(Exception):
    """Carries the reason from the depth of a formula to `emit_key_tensor`."""


def emit_key_tensor(
    graph: fx.Graph,
    formula: sp.Basic,
    nodes: Mapping[str, fx.Node],
    batch: int | fx.Node,
    key_length: int | fx.Node,
    *,
    device: torch.device | str | None = None,
) -> fx.Node | NotEmitted:
    """Append the nodes that compute a formula over (b, k); the caller sets the insertion point.

    Args:
        graph: The graph to write into.
        formula: A Boolean (key mask) or an integer expression (segments) over ``b`` and ``k``.
        nodes: Opaque tensor or size symbol of the formula -> its node in ``graph``.
        batch: ``B``, a number or a node.
        key_length: ``S``, a number or a node.
        device: Where index tensors live; default: the device of the first tensor of ``nodes``.

    Returns:
        The ``[B, S]`` node, of bool for a Boolean, else of integers; or why there is none.
    """
    emitter = _Emitter(graph, nodes, {BATCH: batch, KEY: key_length}, device)
    try:
        result = emitter.tensor(formula)
    except _CannotEmitError as error:
        return NotEmitted(str(error))
    if {BATCH, KEY} <= formula.free_symbols:
        return result  # broadcast over both already
    return graph.call_function(torch.broadcast_to, (result, (batch, key_length)))


def emit_head_tensor(
    graph: fx.Graph,
    formula: sp.Basic,
    nodes: Mapping[str, fx.Node],
    heads: int,
    *,
    device: torch.device | str | None = None,
) -> fx.Node | NotEmitted:
    """Append the nodes that compute a formula over ``h``; see `emit_key_tensor`.

    Returns:
        The ``[H]`` node of floating-point numbers, or why there is none.
    """
    emitter = _Emitter(graph, nodes, {BATCH: 1, KEY: heads}, device, fractions=True)
    try:
        row = emitter.tensor(formula.xreplace({HEAD: KEY}))
    except _CannotEmitError as error:
        return NotEmitted(str(error))
    return graph.call_function(torch.reshape, (row, (heads,)))


@dataclass
class _Emitter:
    """Writes expressions, each distinct one once; fractions as floating-point numbers, or not."""

    graph: fx.Graph
    nodes: Mapping[str, fx.Node]
    lengths: Mapping[sp.Symbol, int | fx.Node]
    device: torch.device | str | None
    fractions: bool = False
    _done: dict[sp.Basic, object] = field(default_factory=dict)

    def tensor(self, formula: sp.Basic) -> fx.Node:
        """A node for a formula; a constant becomes a one-element tensor."""
        value = self.value(formula)
        if isinstance(value, fx.Node):
            return value
        dtype = torch.bool if is_boolean(formula) else torch.int64
        arguments = {"dtype": dtype, "device": self._device()}
        return self.graph.call_function(torch.full, ((1, 1), value), arguments)

    def value(self, formula: sp.Basic) -> object:
        """A node or a Python number."""
        if formula not in self._done:
            self._done[formula] = self._write(formula)
        return self._done[formula]

    def _write(self, formula: sp.Basic) -> object:
        if formula in (sp.true, sp.false):
            return formula == sp.true
        if isinstance(formula, (sp.Number, sp.Symbol)):
            return self._leaf(formula)
        if isinstance(formula, AppliedUndef):
            return self._element(formula)
        if isinstance(formula, Relational):
            return self._relation(formula)
        if isinstance(formula, (sp.floor, sp.Mod)):
            return self._division(formula)
        if isinstance(formula, sp.Not):
            return self.graph.call_function(torch.logical_not, (self.value(formula.args[0]),))
        if type(formula) in _FOLDS:
            return self._fold(_FOLDS[type(formula)], formula.args)
        raise _CannotEmitError(f"{type(formula).__name__} has no torch equivalent here: {formula}")

    def _fold(self, function: Callable[..., object], parts: tuple[sp.Basic, ...]) -> object:
        # a fixed order, because sympy orders And and Or by hash
        ordered = sorted(parts, key=sp.default_sort_key)
        result = self.value(ordered[0])
        for part in ordered[1:]:
            result = self.graph.call_function(function, (result, self.value(part)))
        return result

    def _leaf(self, leaf: sp.Number | sp.Symbol) -> object:
        if isinstance(leaf, sp.Integer):
            return int(leaf)
        if isinstance(leaf, sp.Rational) and self.fractions:
            return float(leaf)
        if isinstance(leaf, sp.Rational):
            raise _CannotEmitError(f"a fraction: {leaf}")
        if leaf in self.lengths:
            positions = self.graph.call_function(
                torch.arange, (self.lengths[leaf],), {"device": self._device()}
            )
            return self.graph.call_function(torch.unsqueeze, (positions, 1 if leaf == BATCH else 0))
        if leaf.name not in self.nodes if isinstance(leaf, sp.Symbol) else True:
            raise _CannotEmitError(f"no node for {leaf}")
        return self.nodes[leaf.name]

    def _relation(self, relation: Relational) -> object:
        left, right = relation.lhs, relation.rhs
        if isinstance(left, AppliedUndef) and right == 0 and isinstance(relation, sp.Ne):
            value = self.value(left)
            if _dtype(self.nodes[left.func.__name__]) == torch.bool:
                return value
        values = [self._comparable(left), self._comparable(right)]
        return self.graph.call_function(_RELATIONS[type(relation)], tuple(values))

    def _comparable(self, side: sp.Basic) -> object:
        if isinstance(side, sp.Rational) and not isinstance(side, sp.Integer):
            return float(side)  # compared with a floating-point tensor only
        return self.value(side)

    def _division(self, formula: sp.floor | sp.Mod) -> object:
        if isinstance(formula, sp.Mod):
            numerator, denominator = formula.args
        else:
            numerator, denominator = sp.fraction(sp.together(formula.args[0]))
        arguments = (self.value(sp.expand(numerator)), self.value(denominator))
        if isinstance(formula, sp.Mod):
            return self.graph.call_function(torch.remainder, arguments)
        return self.graph.call_function(torch.div, arguments, {"rounding_mode": "floor"})

    def _element(self, element: AppliedUndef) -> fx.Node:
        name = element.func.__name__
        if name not in self.nodes:
            raise _CannotEmitError(f"no node for tensor {name}")
        node = self.nodes[name]
        basic = self._basic_index(node, element.args)
        if basic is None:
            indices = tuple(self._position(node, d, i) for d, i in enumerate(element.args))
            if all(isinstance(i, int) for i in indices):
                basic = indices
            else:
                return self.graph.call_function(operator.getitem, (node, indices))
        whole = all(i == slice(None) for i in basic)
        result = node if whole else self.graph.call_function(operator.getitem, (node, basic))
        return self._aligned(result, element)

    def _aligned(self, result: fx.Node, element: AppliedUndef) -> fx.Node:
        """A value of b alone or k alone as a ``[B, 1]`` or ``[1, S]`` tensor."""
        symbols = element.free_symbols
        if len(symbols) == 1:
            return self.graph.call_function(torch.unsqueeze, (result, 1 if BATCH in symbols else 0))
        return result

    def _basic_index(self, node: fx.Node, index: tuple[sp.Expr, ...]) -> tuple[object, ...] | None:
        """Slices and numbers, if the index is (b, k) in order over dimensions of those sizes."""
        shape = _shape(node)
        symbols = [i for i in index if not i.is_number]
        if shape is None or symbols not in ([BATCH, KEY], [KEY], [BATCH]):
            return None
        if not all(
            _same_size(n, self.lengths[i])
            for n, i in zip(shape, index, strict=True)
            if not i.is_number
        ):
            return None
        return tuple(int(i) if i.is_number else slice(None) for i in index)

    def _position(self, node: fx.Node, dim: int, index: sp.Expr) -> object:
        """One advanced index. Out of range it is clamped: there the formula's own guard decides."""
        if index.is_number:
            return int(index)
        shape = _shape(node)
        size = shape[dim] if shape is not None else None
        if not isinstance(size, int):
            size = self.graph.call_method("size", (node, dim))
        last = (
            size - 1 if isinstance(size, int) else self.graph.call_function(operator.sub, (size, 1))
        )
        position = self.value(index)
        return self.graph.call_function(torch.clamp, (position, 0, last))

    def _device(self) -> object:
        if self.device is None:
            tensors = [n for n in self.nodes.values() if isinstance(_example(n), torch.Tensor)]
            if not tensors:
                raise _CannotEmitError("no device for index tensors")
            self.device = _example(tensors[0]).device
        return self.device


def _example(node: fx.Node) -> Any:  # noqa: ANN401
    return node.meta.get("example_value", node.meta.get("val"))


def _shape(node: fx.Node) -> tuple[int | torch.SymInt, ...] | None:
    example = _example(node)
    return tuple(example.shape) if isinstance(example, torch.Tensor) else None


def _dtype(node: fx.Node) -> torch.dtype | None:
    example = _example(node)
    return example.dtype if isinstance(example, torch.Tensor) else None


def _same_size(size: int | torch.SymInt, length: int | fx.Node) -> bool:
    """Whether two sizes are provably equal (without adding a guard)."""
    value = _example(length) if isinstance(length, fx.Node) else length
    sizes = [n.node.expr if isinstance(n, torch.SymInt) else n for n in (size, value)]
    return None not in sizes and bool(sizes[0] == sizes[1])
