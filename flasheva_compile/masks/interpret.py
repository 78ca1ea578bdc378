"""Interprets a pre-dispatch ATen graph symbolically: FX node -> `SymbolicTensor`, op by op.

An op without a handler, or one whose exact meaning depends on data or rounding, becomes an
uninterpreted function of its own index: what it depends on stays visible, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import sympy as sp
import torch
from torch import fx

from flasheva_compile.masks.symbolic import ZERO, Index, Shape, SymbolicTensor, constant
from flasheva_compile.masks.values import NotInterpretedError, Value, cast, literal, settle
from flasheva_compile.mutation import Mutations

if TYPE_CHECKING:
    from torch._ops import OpOverload

MAX_DEPTH = 64  # the longest real mask chain measured is 27 ops; a residual stream is far longer
Handler: TypeAlias = Callable[["Call"], SymbolicTensor]
HANDLERS: dict[str, Handler] = {}


def interprets(*names: str) -> Callable[[Handler], Handler]:
    """Register the meaning of ATen ops, named without overload and in-place underscore."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


@dataclass(frozen=True, slots=True)
class Call:
    """One op with its arguments by schema name."""

    node: fx.Node
    arguments: Mapping[str, Any]
    interpreter: Interpreter
    shape: Shape
    dtype: torch.dtype

    def tensor(self, name: str) -> SymbolicTensor:
        """A tensor argument; a Python scalar becomes a tensor without dimensions or dtype."""
        return self.interpreter.operand(self.arguments[name], self.node)

    def tensors(self, name: str) -> list[SymbolicTensor]:
        """A list-of-tensors argument."""
        return [self.interpreter.operand(a, self.node) for a in self.arguments[name]]

    def scalar(self, name: str, default: int = 0) -> sp.Expr:
        """A size, position or number argument as an expression (``default`` for None)."""
        value = self.arguments.get(name, default)
        value = default if value is None else value
        result = self.interpreter.scalar(value)
        if not isinstance(result, sp.Expr):
            raise NotInterpretedError(f"{name} is not a number")
        return result

    def integer(self, name: str) -> int:
        """A compile-time integer argument such as ``dim``."""
        value = self.arguments[name]
        if not isinstance(value, int):
            raise NotInterpretedError(f"{name} is not a constant")
        return value

    def get(self, name: str) -> Any:  # noqa: ANN401 - whatever the schema holds
        """An argument as the graph spells it, or None."""
        return self.arguments.get(name)


class Interpreter:
    """Meanings of the nodes of one graph (and of the graphs that its placeholders are bound to).

    Args:
        bindings: Placeholder of a nested graph -> the node of the outer graph that it receives.
    """

    def __init__(self, bindings: Mapping[fx.Node, fx.Node] | None = None) -> None:
        self.domain: dict[sp.Symbol, sp.Expr] = {}
        self.nodes: dict[str, fx.Node] = {}
        self.monotone: set[str] = set()
        self._bindings = dict(bindings or {})
        self._tensors: dict[fx.Node, SymbolicTensor] = {}
        self._mutations: dict[fx.Graph, Mutations] = {}
        self._depth = 0

    def mutations(self, node: fx.Node) -> Mutations:
        """In-place writes of the graph that holds ``node``."""
        if node.graph not in self._mutations:
            self._mutations[node.graph] = Mutations(node.graph)
        return self._mutations[node.graph]

    def tensor(self, node: fx.Node) -> SymbolicTensor:
        """The meaning of a node's value at the moment it is computed."""
        if node not in self._tensors:
            self._depth += 1
            try:
                self._tensors[node] = self._interpret(self._bindings.get(node, node))
            finally:
                self._depth -= 1
        return self._tensors[node]

    def operand(self, argument: Any, reader: fx.Node) -> SymbolicTensor:  # noqa: ANN401
        """An argument of ``reader`` as a tensor."""
        if not isinstance(argument, fx.Node):
            return constant(literal(argument))
        if not isinstance(argument.meta.get("val"), torch.Tensor):
            return constant(self.scalar(argument))
        if self.mutations(reader).stale(argument, reader):
            raise NotInterpretedError("read after an in-place write")
        return self.tensor(argument)

    def scalar(self, argument: Any) -> Value:  # noqa: ANN401
        """A number argument as an expression over size symbols."""
        return literal(argument.meta.get("val") if isinstance(argument, fx.Node) else argument)

    def opaque(self, node: fx.Node) -> SymbolicTensor:
        """The node as an uninterpreted function of its own index."""
        shape, dtype = shape_of(node), node.meta["val"].dtype
        name = self._name(node)
        kind = {"real": True} if dtype.is_floating_point else {"integer": True}
        function = sp.Function(name, **kind)

        def at(index: Index) -> Value:
            element = function(*(ZERO if n == 1 else i for n, i in zip(shape, index, strict=True)))
            return sp.Ne(element, 0) if dtype == torch.bool else element

        return SymbolicTensor(shape, dtype, at)

    def mark_monotone(self, node: fx.Node) -> None:
        """Record that an opaque node never decreases along its last dimension."""
        self.monotone.add(self._name(node))

    def _name(self, node: fx.Node) -> str:
        name = node.name
        while self.nodes.setdefault(name, node) is not node:
            name += "_"  # a nested graph may use the same names
        return name

    def _interpret(self, node: fx.Node) -> SymbolicTensor:
        if not isinstance(node.meta.get("val"), torch.Tensor):
            return constant(self.scalar(node))
        try:
            meaning = self._meaning(node)
        except NotInterpretedError:
            return self.opaque(node)
        return self._checked(node, meaning)

    def _meaning(self, node: fx.Node) -> SymbolicTensor:
        if node.op == "get_attr":
            return _constant_attribute(node)
        name = op_name(node)
        if name not in HANDLERS or self._depth > MAX_DEPTH:
            raise NotInterpretedError(f"{name or node.op} is not modelled")
        dtype = node.meta["val"].dtype
        call = Call(node, bound_arguments(node), self, shape_of(node), dtype)
        return HANDLERS[name](call)

    def _checked(self, node: fx.Node, meaning: SymbolicTensor) -> SymbolicTensor:
        """The meaning with its shape and dtype enforced, each element computed once."""
        shape, dtype = shape_of(node), node.meta["val"].dtype
        opaque = self.opaque
        known: dict[Index, Value] = {}
        if len(meaning.shape) != len(shape):
            return opaque(node)

        def at(index: Index) -> Value:
            if index not in known:
                try:
                    value = meaning.at(index)
                    if meaning.dtype is not None:
                        value = cast(value, meaning.dtype, dtype)
                    known[index] = settle(value, dtype, lambda: opaque(node).at(index))
                except NotInterpretedError:
                    known[index] = opaque(node).at(index)
            return known[index]

        return SymbolicTensor(shape, dtype, at)


def shape_of(node: fx.Node) -> Shape:
    """The shape of a node's value as expressions."""
    return tuple(_size(n) for n in node.meta["val"].shape)


def _size(size: int | torch.SymInt) -> sp.Expr:
    return sp.sympify(size.node.expr) if isinstance(size, torch.SymInt) else sp.Integer(size)


def op_name(node: fx.Node) -> str:
    """The ATen op's name without overload and in-place underscore (``masked_fill``)."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return ""
    if target.namespace not in ("aten", "prims"):
        return ""
    name = target._schema.name.split("::")[-1]
    if name.startswith("__"):
        return "__" + name[3:] if name in ("__iand__", "__ior__", "__ixor__") else name
    return name.rstrip("_")


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an ATen call by schema name, defaults filled in."""
    target: OpOverload = node.target  # type: ignore[assignment]
    bound: dict[str, Any] = {}
    for n, argument in enumerate(target._schema.arguments):
        if n < len(node.args):
            bound[argument.name] = node.args[n]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def _constant_attribute(node: fx.Node) -> SymbolicTensor:
    """A tensor constant with one element, held by the graph's module."""
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.numel() != 1:
        raise NotInterpretedError("a tensor constant with more than one element")
    try:
        number = value.detach().reshape(()).item()
    except (RuntimeError, ValueError, AssertionError) as error:
        raise NotInterpretedError("the constant cannot be read") from error
    return constant(literal(number), shape_of(node), value.dtype)
