"""Reading single nodes of a pre-dispatch ATen graph: op names, scalars, shapes, sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import fx

# Ops that pass their first operand's values through unchanged (rounding and memory aside). Not
# detach: what stops a gradient is no part of attention.
CASTS = frozenset(
    [
        "to",
        "_to_copy",
        "type_as",
        "float",
        "half",
        "bfloat16",
        "contiguous",
        "clone",
        "alias",
        "lift_fresh_copy",
        "lift_fresh",
    ]
)
_FLOATS = frozenset([torch.float16, torch.bfloat16, torch.float32, torch.float64])
VIEWS = frozenset(["view", "reshape", "_unsafe_view"])


def op_name(node: fx.Node) -> str:
    """Return the op's name without namespace and overload, or the node kind if it is no call."""
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target._overloadname == "out" or target._overloadname.endswith("_out"):
            return f"{target._overloadpacket.__name__}(out=)"
        return target._overloadpacket.__name__
    return getattr(target, "__name__", str(target))


def is_cast(node: fx.Node) -> bool:
    """Return whether a node only rounds, copies or moves its first operand."""
    return op_name(node) in CASTS and value_of(node).dtype in _FLOATS


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:  # noqa: ANN401
    """Return an argument of a call, by position or keyword."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def value_of(node: fx.Node) -> torch.Tensor:
    """Return the fake tensor that a node holds."""
    return node.meta["val"]


def shape_of(node: fx.Node) -> tuple:
    """Return the shape of a tensor node; entries are ints or SymInts."""
    return tuple(value_of(node).shape)


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Return whether two sizes are provably equal, without adding a guard."""
    left = a.node.expr if isinstance(a, torch.SymInt) else a
    right = b.node.expr if isinstance(b, torch.SymInt) else b
    return left == right


def must_agree(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Return whether two sizes that a product pairs are equal in every call that is valid.

    Symbolic sizes are never 0 or 1, so they do not broadcast: two of them are equal or an error.
    """
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return True
    return same_size(a, b)


def scalar_of(operand: object, owner: torch.fx.GraphModule) -> float | None:
    """Return the Python number that an operand holds, following 0-d constants; else None.

    A symbolic float is specialised: its value becomes a guard of the compiled graph.
    """
    if isinstance(operand, bool):
        return None
    if isinstance(operand, int | float):
        return float(operand)
    if not isinstance(operand, torch.fx.Node):
        return None
    value = operand.meta.get("val")
    if isinstance(value, torch.SymFloat):
        return float(value)
    if not isinstance(value, torch.Tensor) or value.dim() != 0:
        return None
    return _constant_tensor(operand, owner)


def _constant_tensor(node: torch.fx.Node, owner: torch.fx.GraphModule) -> float | None:
    name = op_name(node)
    if name in CASTS or name in {"detach", "detach_"}:  # a constant has no gradient to stop
        source = node.args[0]
        return scalar_of(source, owner)
    if name == "full":
        return scalar_of(argument(node, 1, "fill_value"), owner)
    if name == "scalar_tensor":
        return scalar_of(argument(node, 0, "s"), owner)
    if node.op == "get_attr":
        held = getattr(owner, str(node.target), None)
        if type(held) is torch.Tensor and held.numel() == 1:
            return float(held)
    return None


def place_in_source(node: fx.Node) -> str:
    """Return ``file:line`` of the innermost user code of a node."""
    frames = [
        line.strip()
        for line in (node.meta.get("stack_trace") or "").splitlines()
        if line.strip().startswith("File ")
    ]
    if not frames:
        return ""
    file, line = frames[-1].split(",")[:2]
    return f"{file.split('/')[-1].strip(chr(34))}:{line.strip().removeprefix('line ')}"
