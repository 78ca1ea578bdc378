"""Attentions that the shadow does not show, so that the report can name them.

Bodies of ``torch.cond``, ``scan``, ``while_loop`` and the like are graphs of their own; what runs
inside ``torch.vmap`` or ``torch.func.grad`` leaves nothing in a pre-dispatch trace.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from flasheva_compile import _torch_compat as compat
from flasheva_compile.elementwise import name_of, nodes_inside
from flasheva_compile.matching.aten import place_in_source
from flasheva_compile.matching.attention import place_of
from flasheva_compile.site import MissedSite, Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_WHOLE = frozenset(
    ["scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention"]
)
_PRODUCTS = frozenset(
    ["matmul", "bmm", "baddbmm", "einsum", "mm", "inner", "tensordot", "vecdot", "linalg_vecdot"]
)
_SOFTMAXES = frozenset(["softmax", "_softmax", "_safe_softmax", "_masked_softmax"])
_ENDS = frozenset(["linear", "embedding", "layer_norm", "rms_norm"])
_SEARCH_LIMIT = 60


def hidden_attentions(graph: fx.GraphModule) -> tuple[MissedSite, ...]:
    """Return the attentions of Dynamo's graph that are inside of what the shadow leaves out."""
    found: list[MissedSite] = []
    for region in nodes_inside(graph.graph):
        name = name_of(region[0]).removeprefix("_").removesuffix("_increment_nesting")
        found += _missed(region, f"inside torch.func.{name}, which is not looked into", None)
    for node, bodies in _bodies(graph):
        if compat.body_and_operands(node.target, node.args) is not None:
            found += [miss for body in bodies for miss in hidden_attentions(body)]
        elif not compat.is_flex_call(node.target):
            reason = f"inside {name_of(node)}, whose bodies are not looked into"
            for body in bodies:
                found += _missed(_all_nodes(body), reason, place_of(node))
    return tuple(found)


def _bodies(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, list[fx.GraphModule]]]:
    """Yield the calls of higher-order ops with the graphs that they are given."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and compat.is_higher_order_call(node):
            held = [
                getattr(graph, str(n.target), None)
                for n in node.all_input_nodes
                if n.op == "get_attr"
            ]
            yield node, [body for body in held if isinstance(body, fx.GraphModule)]


def _all_nodes(graph: fx.GraphModule) -> Iterator[fx.Node]:
    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes


def _missed(nodes: Iterable[fx.Node], reason: str, outer: Place | None) -> Iterator[MissedSite]:
    for node in nodes:
        if node.op in {"call_function", "call_method"} and _is_attention(node):
            place = place_of(node)
            if not place.path and outer is not None:
                source = place_in_source(node)
                place = Place(path=outer.path, module_id=outer.module_id, source=source)
            yield MissedSite(place=place, reason=reason)


def _is_attention(node: fx.Node) -> bool:
    """Return whether a node calls an attention, or is a softmax between two products."""
    name = name_of(node)
    if name in _WHOLE:
        return True
    if name not in _SOFTMAXES:
        return False
    return all(_reaches(node, side) for side in (lambda n: n.all_input_nodes, lambda n: n.users))


def _reaches(node: fx.Node, neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> bool:
    """Return whether a product comes along a direction before a projection does."""
    stack, seen = list(neighbours(node)), {node}
    while stack and len(seen) < _SEARCH_LIMIT:
        current = stack.pop()
        if current in seen or current.op not in {"call_function", "call_method"}:
            continue
        seen.add(current)
        name = name_of(current)
        if name in _PRODUCTS or _sums_elements(current):
            return True
        if name not in _ENDS:
            stack.extend(neighbours(current))
    return False


def _sums_elements(node: fx.Node) -> bool:
    """Return whether a node sums what was multiplied element by element."""
    return name_of(node) == "sum" and any(name_of(n) == "mul" for n in node.all_input_nodes)
