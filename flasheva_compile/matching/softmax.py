"""Where a softmax stands, however it is spelled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flasheva_compile.matching.aten import argument, is_cast, op_name, value_of

if TYPE_CHECKING:
    from torch import fx

_SOFTMAXES = frozenset({"softmax", "_softmax", "_safe_softmax"})
_LOG_SOFTMAXES = frozenset({"log_softmax", "_log_softmax"})


@dataclass(frozen=True, slots=True)
class Softmax:
    """``weights = softmax(scores)`` along ``axis``.

    Attributes:
        scores: The input.
        weights: The node that holds the result.
        axis: Counted from the end: -1 is the last.
        inner: Nodes between the two that belong to the softmax itself.
    """

    scores: fx.Node
    weights: fx.Node
    axis: int
    inner: frozenset[fx.Node] = frozenset()


def softmax_at(node: fx.Node) -> Softmax | None:
    """Return the softmax whose weights a node holds.

    Known: ``softmax``; ``exp`` of ``log_softmax`` or of what is left after ``logsumexp``; and
    ``exp(x)`` divided by its sum, with or without the maximum taken off before.
    """
    name = op_name(node)
    if name in _SOFTMAXES:
        return _along(node, node.args[0], node, argument(node, 1, "dim"))
    if name == "exp" and _is_node(node.args[0]):
        return _exponential(node)
    if name == "div" and len(node.args) == 2 and "rounding_mode" not in node.kwargs:
        return _normalised(node)
    return None


def row_maximum(node: object) -> tuple[fx.Node, int] | None:
    """Return of what, and along which axis, a node is the maximum, one axis of size 1 kept."""
    current: Any = node
    while _is_node(current) and (op_name(current) in {"detach", "alias"} or is_cast_like(current)):
        current = current.args[0]
    if not _is_node(current):
        return None
    if op_name(current) == "getitem" and current.args[1] == 0:
        current = current.args[0]
        if op_name(current) != "max" or len(current.args) < 2:
            return None
    elif op_name(current) not in {"amax", "logsumexp"}:
        return None
    axis = _one_axis(argument(current, 1, "dim"))
    if axis is None or not argument(current, 2, "keepdim", default=False):
        return None
    source = current.args[0]
    return source, axis - value_of(source).dim() if axis >= 0 else axis


def is_cast_like(node: fx.Node) -> bool:
    """Return whether a node with a tensor value is a cast."""
    return hasattr(node.meta.get("val"), "dtype") and is_cast(node)


def _exponential(node: fx.Node) -> Softmax | None:
    source: Any = node.args[0]
    if op_name(source) in _LOG_SOFTMAXES:
        scores, axis = source.args[0], argument(source, 1, "dim")
        return _along(node, scores, node, axis, frozenset({source}))
    if op_name(source) == "sub" and op_name(source.args[1]) == "logsumexp":
        total = row_maximum(source.args[1])
        if total is not None and total[0] is source.args[0]:
            inner = frozenset({source, source.args[1]})
            return _along(node, source.args[0], node, total[1], inner)
    return None


def _normalised(node: fx.Node) -> Softmax | None:
    exponential: Any = node.args[0]
    total: Any = node.args[1]
    if not _is_node(total) or op_name(exponential) != "exp" or op_name(total) != "sum":
        return None
    axis = _one_axis(argument(total, 1, "dim"))
    keeps = argument(total, 2, "keepdim", default=False)
    if total.args[0] is not exponential or axis is None or not keeps:
        return None
    if not set(exponential.users) <= {total, node} or "dtype" in total.kwargs:
        return None
    return _along(node, exponential.args[0], node, axis, frozenset({exponential, total}))


def _along(
    node: fx.Node,
    scores: fx.Node,
    weights: fx.Node,
    axis: object,
    inner: frozenset[fx.Node] = frozenset(),
) -> Softmax | None:
    rank = value_of(node).dim()
    if not isinstance(axis, int) or rank == 0:
        return None
    return Softmax(scores, weights, axis - rank if axis >= 0 else axis, inner)


def _one_axis(axes: object) -> int | None:
    if isinstance(axes, list | tuple):
        return axes[0] if len(axes) == 1 else None
    return axes if isinstance(axes, int) else None


def _is_node(value: object) -> bool:
    return hasattr(value, "op")
