"""Cut one result out of a traced graph and run it on small random tensors.

Everything runs in double precision on the CPU, without dropout: the question is what a graph
computes, not how it rounds. Sizes that are large are replaced by small ones; a slice whose shapes
do not follow is not run.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_aggregate

from flasheva_compile import _torch_compat as compat

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_DROPOUTS = {"dropout": 2, "dropout_": 2, "native_dropout": 2}  # where `train` stands
_COMPARISONS = frozenset(["eq", "ne", "lt", "le", "gt", "ge"])
_RANDOM = frozenset(["rand", "randn", "rand_like", "randn_like", "bernoulli", "randint"])
_LONGEST = 400  # operations; attention and mask of any model we know have less than 100
_SMALL = 32  # sizes up to here stay as they are
_VISIBLE_SHARE = 0.7  # of the elements of a random boolean mask


class NotRunError(Exception):
    """Why a slice cannot be run."""


@dataclass(frozen=True, slots=True)
class Slice:
    """The computation of ``result`` from ``inputs``.

    Attributes:
        result: The node that is computed.
        inputs: Nodes that are given: where the slice was cut, and what the graph itself is given.
        nodes: What is computed, in graph order; ends with ``result``.
    """

    result: fx.Node
    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Small sizes that stand for the real ones.

    Attributes:
        symbols: Value of every symbolic size.
        literals: Number in the graph -> the number that replaces it.
    """

    symbols: Mapping[sympy.Symbol, int]
    literals: Mapping[int, int]

    def of(self, size: int | torch.SymInt) -> int:
        """Return what stands for a size."""
        if isinstance(size, torch.SymInt):
            return int(self.formula(size.node.expr))
        return self.literals.get(size, size)

    def formula(self, formula: sympy.Basic) -> Any:  # noqa: ANN401 - whatever the formula is
        """Return a formula over sizes with the small ones."""
        numbers = {sympy.Integer(old): sympy.Integer(new) for old, new in self.literals.items()}
        return formula.xreplace({**numbers, **self.symbols})


def cut(result: fx.Node, inputs: Iterable[fx.Node]) -> Slice:
    """Return what computes ``result`` from ``inputs`` and from what the graph is given."""
    given, seen, stack = set(inputs), set(), [result]
    while stack:
        node = stack.pop()
        if node in seen or not _holds_tensors(node):
            continue
        seen.add(node)
        if node in given or node.op in {"placeholder", "get_attr"}:
            given.add(node)
            continue
        stack.extend(node.all_input_nodes)
    ordered = [node for node in result.graph.nodes if node in seen]
    return Slice(
        result=result,
        inputs=tuple(node for node in ordered if node in given),
        nodes=tuple(node for node in ordered if node not in given),
    )


def _holds_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float)


def small_sizes(part: Slice, score_shape: Sequence[int | torch.SymInt], budget: int) -> Sizes:
    """Choose sizes with at most about ``budget`` scores.

    Equal sizes stay equal, and those that are small already stay as they are. A static length is
    replaced wherever its number occurs, so it must differ from every other size.
    """
    hints: dict[sympy.Symbol, int] = {}
    for node in (*part.inputs, *part.nodes):
        for size in getattr(node.meta.get("val"), "shape", ()):
            if isinstance(size, torch.SymInt):
                hints |= compat.symbol_hints(size)
    large = sorted({hint for hint in hints.values() if hint > _SMALL})
    symbols = {s: h if h <= _SMALL else _SMALL + 1 + large.index(h) for s, h in hints.items()}
    plain = Sizes(symbols, {})
    batch, heads, queries, keys = (plain.of(size) for size in score_shape)
    if batch * heads * queries * keys <= budget or queries != keys or queries <= _SMALL:
        return plain
    others = {plain.of(n) for node in part.inputs for n in node.meta["val"].shape}
    small = next(n for n in range(_SMALL - 8, 2 * _SMALL) if n not in others)
    return Sizes(symbols, {queries: small})


def run(
    part: Slice, values: Mapping[fx.Node, torch.Tensor], sizes: Sizes, *, gradients: bool = False
) -> Mapping[fx.Node, torch.Tensor]:
    """Compute the result, with or without a graph for gradients; return the value of every node.

    Raises:
        NotRunError: An operation fails at these sizes, or its result has an unexpected shape.
    """
    if len(part.nodes) > _LONGEST:
        raise NotRunError(f"{len(part.nodes)} operations lie between operands and result")
    env: dict[fx.Node, Any] = dict(values)
    with compat.plain_execution(), torch.set_grad_enabled(gradients):
        for node in part.nodes:
            try:
                env[node] = _double(_call(node, env, sizes))
            except Exception as error:
                message = f"{node.name} fails at small sizes: {error}"
                raise NotRunError(message) from error
            _expect_shape(node, env[node], sizes)
    return env


def _call(node: fx.Node, env: Mapping[fx.Node, Any], sizes: Sizes) -> Any:  # noqa: ANN401
    def concrete(argument: Any) -> Any:  # noqa: ANN401
        if isinstance(argument, fx.Node):
            return env[argument] if argument in env else _number(argument, sizes)
        return _scalar(argument, sizes)

    target: Any = node.target
    name = _name(node)
    if not (isinstance(target, torch._ops.OpOverload) or target is operator.getitem):
        raise NotRunError(f"{name} is no ATen op")
    if name in _RANDOM:
        raise NotRunError(f"{name} draws random numbers")
    # Not fx.map_arg: sizes and dtypes in lists and keywords count too.
    args = list(map_aggregate(node.args, concrete))  # type: ignore[arg-type]
    kwargs = dict(map_aggregate(node.kwargs, concrete))  # type: ignore[arg-type]
    if name in _DROPOUTS and len(args) > _DROPOUTS[name]:
        args[_DROPOUTS[name]] = False
    if name == "scaled_dot_product_attention":
        args[4:5] = [0.0] if len(args) > 4 else []
        kwargs.pop("dropout_p", None)
    return target(*args, **kwargs)


def _number(node: fx.Node, sizes: Sizes) -> float:
    value = node.meta["val"]
    if isinstance(value, torch.SymFloat):
        return float(sizes.formula(value.node.expr))
    return sizes.of(value)


def _scalar(argument: Any, sizes: Sizes) -> Any:  # noqa: ANN401
    if isinstance(argument, bool):
        return argument
    if isinstance(argument, int | torch.SymInt):
        return sizes.of(argument)
    if isinstance(argument, torch.dtype) and argument.is_floating_point:
        return torch.float64
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def _double(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, tuple | list):
        return type(value)(map(_double, value))
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if floating else value


def _expect_shape(node: fx.Node, value: object, sizes: Sizes) -> None:
    expected = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return
    wanted = tuple(map(sizes.of, expected.shape))
    if tuple(value.shape) != wanted:
        raise NotRunError(f"{node.name} has shape {tuple(value.shape)} instead of {wanted}")


def random_input(
    node: fx.Node, part: Slice, sizes: Sizes, generator: torch.Generator
) -> torch.Tensor:
    """Return random values for an input: truth values, small integers or normal numbers.

    Integers are 0 and 1, as in a padding mask, and the neighbours of what they are compared with.
    """
    meta = node.meta["val"]
    shape = tuple(map(sizes.of, meta.shape))
    if node.op == "get_attr":
        held = compat.real_attribute(node)
        if held is None:
            raise NotRunError(f"the value of {node.name} is not known")
        return _double(held.cpu())
    if meta.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < _VISIBLE_SHARE
    if meta.dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    choices = torch.tensor(sorted({0, 1, *_compared_with(node, part)}))
    drawn = torch.randint(len(choices), shape, generator=generator)
    return choices[drawn].to(meta.dtype)


def _compared_with(node: fx.Node, part: Slice) -> set[int]:
    literals = (
        user.args[1]
        for user in node.users
        if user in part.nodes and _name(user) in _COMPARISONS and len(user.args) > 1
    )
    return {near for n in literals if type(n) is int for near in (n - 1, n, n + 1)}


def _name(node: fx.Node) -> str:
    target: Any = node.target
    packet = getattr(target, "_overloadpacket", target)
    return getattr(packet, "__name__", str(target))
