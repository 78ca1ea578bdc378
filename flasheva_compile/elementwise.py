"""Functions of single elements on whole tensors: what ``vmap`` would compute, by broadcasting.

A mask_mod and a score_mod are written for one score, and masks are made of them by ``vmap``, which
leaves nothing of itself in a pre-dispatch trace. Where every value of such a function is a scalar,
and every operation goes element by element or picks one element, the same code on tensors with one
axis for each ``vmap`` computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_COMPARISONS = frozenset(
    [
        "ge",
        "gt",
        "le",
        "lt",
        "eq",
        "ne",
        "greater",
        "greater_equal",
        "less",
        "less_equal",
        "not_equal",
    ]
)
_LOGIC = frozenset(
    [
        "and",
        "and_",
        "or",
        "or_",
        "xor",
        "not",
        "not_",
        "invert",
        "logical_and",
        "logical_or",
        "logical_not",
        "logical_xor",
        "bitwise_and",
        "bitwise_or",
        "bitwise_xor",
        "bitwise_not",
        "where",
    ]
)
_ARITHMETIC = frozenset(
    [
        "add",
        "radd",
        "sub",
        "rsub",
        "mul",
        "rmul",
        "div",
        "divide",
        "truediv",
        "true_divide",
        "floordiv",
        "floor_divide",
        "mod",
        "fmod",
        "remainder",
        "neg",
        "abs",
        "pow",
        "minimum",
        "maximum",
        "clamp",
    ]
)
_FUNCTIONS = frozenset(["exp", "exp2", "log", "log2", "tanh", "sigmoid", "sqrt", "rsqrt", "square"])
_CASTS = frozenset(["to", "float", "int", "long", "bool"])
_POINTWISE = _COMPARISONS | _LOGIC | _ARITHMETIC | _FUNCTIONS | _CASTS
_CONSTANTS = frozenset(["new_ones", "new_zeros", "new_full"])
_LOOKUPS = frozenset(["getitem", "index"])
_NESTING = {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1}
_BOOKKEEPING = frozenset(["lazy_load_decompositions", *_NESTING])
_TRANSFORMS = ("_vmap", "_grad", "_jvp")  # whose levels torch.func counts up and down


class NotElementwiseError(Exception):
    """Why a function cannot be computed by broadcasting."""


@dataclass(frozen=True, slots=True)
class Lifted:
    """A scalar for each element of some axes, numbered from 0; a missing axis has size 1.

    Attributes:
        tensor: Its axes are the numbered ones.
        left: How many of them are still inside a ``vmap``; the others stand to their right.
    """

    tensor: torch.Tensor
    left: int


def name_of(node: fx.Node) -> str:
    """Return the name of the operation that a node of Dynamo's graph calls."""
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    if isinstance(target, torch._ops.OpOverload):
        name = target._overloadpacket.__name__
    return name.strip("_") if name.startswith("__") else name


def compute(body: fx.GraphModule, indices: Sequence[Lifted], others: Sequence[Any]) -> Any:  # noqa: ANN401
    """Call a function of scalars for many scalars at once.

    Args:
        body: Its graph, as Dynamo leaves it.
        indices: The scalars that it takes; the last ones are the innermost.
        others: What else it takes: tensors that it looks elements up in, numbers.

    Returns:
        A tensor with an axis for each index; one along which the result is constant has size 1.

    Raises:
        NotElementwiseError: It does more than reading and computing scalars.
    """
    depth = max(index.left for index in indices)
    values: dict[fx.Node, Any] = {}
    placeholders = body.graph.find_nodes(op="placeholder")
    values.update(zip(placeholders, [*indices, *others], strict=True))
    for node in body.graph.nodes:
        if node.op == "output":
            (result,) = node.args if not isinstance(node.args[0], tuple) else node.args[0]
            found = values[result] if isinstance(result, fx.Node) else result
            found = _at_depth(found, depth)
            if not isinstance(found, torch.Tensor):
                raise NotElementwiseError("it returns no tensor")
            return found if found.dim() else found.reshape([1] * depth)
        if node.op in {"call_function", "call_method"}:
            values[node] = call(node, *_filled(node, values), depth)
        elif node.op != "placeholder":
            raise NotElementwiseError(f"{node.op} {node.target}")
    raise NotElementwiseError("it returns nothing")


def _filled(node: fx.Node, values: dict[fx.Node, Any]) -> tuple[tuple, dict]:
    def value(argument: Any) -> Any:  # noqa: ANN401
        return values[argument] if isinstance(argument, fx.Node) else argument

    return map_aggregate(node.args, value), map_aggregate(node.kwargs, value)  # type: ignore[return-value]


def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], depth: int) -> Any:  # noqa: ANN401
    """Carry out one operation on lifted values inside ``depth`` nested ``vmap``.

    Raises:
        NotElementwiseError: It does not go element by element, or fails.
    """
    name = name_of(node)
    if name in _LOOKUPS:
        return _looked_up(name, args[0], args[1], depth)
    like = args[0] if args else None
    if name in _CONSTANTS and isinstance(like, Lifted):
        size: Any = kwargs.get("size", args[1] if len(args) > 1 else None)
        if len(size or ()):
            raise NotElementwiseError(f"{name} of size {size}")
        return getattr(like.tensor, name)(*args[1:], **kwargs)
    if name not in _POINTWISE:
        raise NotElementwiseError(name)
    args, kwargs = (map_aggregate(part, lambda x: _at_depth(x, depth)) for part in (args, kwargs))  # type: ignore[assignment]
    target: Any = node.target
    if node.op == "call_method":
        target, args = getattr(args[0], target), args[1:]
    try:
        result = target(*args, **kwargs)
    except (TypeError, RuntimeError) as error:
        raise NotElementwiseError(f"{name}: {error}") from error
    full = isinstance(result, torch.Tensor) and result.dim() == depth
    return Lifted(result, depth) if full else result


def _looked_up(name: str, base: Any, index: Any, depth: int) -> Any:  # noqa: ANN401
    """Pick an element of a tensor for every scalar."""
    indices = index if isinstance(index, list | tuple) else (index,)
    if not isinstance(base, torch.Tensor) or base.dim() != len(indices):
        raise NotElementwiseError(f"{name} of {len(indices)} axes")
    positions = tuple(_at_depth(i, depth) for i in indices)
    tensors = [isinstance(i, torch.Tensor) for i in positions]
    if any(tensors) != all(tensors):
        raise NotElementwiseError(f"{name} of tensors and numbers")
    return Lifted(base[positions], depth) if all(tensors) else base[positions]


def _at_depth(value: Any, depth: int) -> Any:  # noqa: ANN401
    """Return a value for use inside ``depth`` nested ``vmap``: a tensor of so many axes."""
    if not isinstance(value, Lifted):
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            raise NotElementwiseError("a tensor that is no scalar")
        return value
    if value.left != value.tensor.dim() or value.left > depth:
        raise NotElementwiseError("a value that is no scalar any more")
    shape = (*value.tensor.shape, *[1] * (depth - value.left))
    return value.tensor if value.left == depth else value.tensor.reshape(shape)


def along(x: torch.Tensor, axis: int) -> Lifted:
    """Make the elements of a tensor of one axis scalars inside ``vmap`` number ``axis``."""
    if x.dim() != 1:
        raise NotElementwiseError("vmap over a tensor of several axes")
    return Lifted(x.reshape(*[1] * axis, -1), axis + 1)


def taken_out(value: Any, depth: int, size: int | torch.SymInt) -> Lifted | torch.Tensor:  # noqa: ANN401
    """Leave the innermost of ``depth`` nested ``vmap``: its axis becomes one of the value's own."""
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        value = Lifted(value.reshape([1] * depth), depth)
    if isinstance(value, Lifted) and value.left == value.tensor.dim():
        value = Lifted(_at_depth(value, depth), depth)
    if not isinstance(value, Lifted) or value.left != depth:
        raise NotElementwiseError("a result that is no scalar")
    sizes: list[Any] = [-1] * value.tensor.dim()
    sizes[depth - 1] = size
    tensor = value.tensor.expand(sizes)
    return Lifted(tensor, depth - 1) if depth > 1 else tensor


def nodes_inside(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Yield the nodes of each outermost ``torch.func`` transform of Dynamo's graph."""
    depth, inside = 0, []
    for node in graph.nodes:
        name = name_of(node) if node.op == "call_function" else ""
        if name.endswith("increment_nesting") and name.startswith(_TRANSFORMS):
            depth += 1
        if depth:
            inside.append(node)
        if name.endswith("decrement_nesting") and name.startswith(_TRANSFORMS):
            depth -= 1
            if depth == 0:
                yield inside
                inside = []


def elementwise_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes of all ``vmap`` of Dynamo's graph that can be computed by broadcasting."""
    found: set[fx.Node] = set()
    for region in nodes_inside(graph):
        names = {name_of(node) for node in region if node.op != "get_attr"}
        known = _POINTWISE | _CONSTANTS | _LOOKUPS | _BOOKKEEPING
        if names <= known | {"_add_batch_dim", "_remove_batch_dim"}:
            found.update(region)
    return found
