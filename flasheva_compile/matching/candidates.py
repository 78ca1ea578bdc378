"""Which softmaxes are attention, understood or not, and what their scores are made of.

An axis is followed through whatever leaves it where it is, layers over other axes too: scores whose
heads are mixed are scores, and what a layer makes of tokens has an axis of tokens.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from flasheva_compile.matching.aten import op_name, shape_of, value_of
from flasheva_compile.matching.axes import aligned_sources, axis_origin, axis_sources
from flasheva_compile.matching.products import PRODUCTS, axes_of_product, is_product, operands_of
from flasheva_compile.matching.scores import comes_from_product
from flasheva_compile.matching.softmax import Softmax
from flasheva_compile.matching.weights import feeds_product, feeds_sum_of_elements

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import fx

_Pair: TypeAlias = "tuple[fx.Node, int, int]"  # a node, its axis of queries, its axis of keys
_Step: TypeAlias = "tuple[fx.Node, int]"

_LINEAR = {"linear": 0, "mm": 0, "addmm": 1}  # layer over the last axis -> place of its input
_CONVOLUTIONS = frozenset(["convolution", "conv1d", "conv2d", "conv3d"])
_SEARCH_LIMIT = 400
_FORWARD_LIMIT = 40


def is_attention(softmax: Softmax) -> bool:
    """Return whether a softmax gives weights to tokens, whatever its scores are made of.

    So does one that stands between two products, and one whose axis meets tokens in a product. A
    router, or a vocabulary, has weights for features.
    """
    if value_of(softmax.weights).dim() < 3:
        return weighs_tokens(softmax) and comes_from_product(softmax.scores)
    last = softmax.axis == -1
    if last and comes_from_product(softmax.scores) and feeds_product(softmax.weights):
        return True
    paired = _pair_of(softmax.scores, softmax.axis) is not None
    if last and paired and feeds_sum_of_elements(softmax.weights):
        return True
    met = [axis_origin(*other).kinds for _, other in _meetings(softmax)]
    if not last:  # of keys over features it makes weights for a linear attention
        return bool(met) and paired
    return any("tokens" in kinds if kinds else not _is_of_features(softmax.scores) for kinds in met)


def weighs_tokens(softmax: Softmax) -> bool:
    """Return whether the axis certainly meets tokens in a product."""
    return any("tokens" in axis_origin(*other).kinds for _, other in _meetings(softmax))


def is_cut_off(softmax: Softmax) -> bool:
    """Return whether a graph ends between an attention's softmax and its product with values."""
    ends = any(user.op == "output" for user in softmax.weights.users)
    return ends and _pair_of(softmax.scores, softmax.axis) is not None


def exponential_problem(node: fx.Node) -> str:
    """Say of an ``exp`` that is no part of a known softmax why its attention stays full, if any.

    Exponentials of scores that weigh tokens are an attention, however they are normalised.
    """
    source: Any = node.args[0]
    if value_of(node).dim() < 2 or not hasattr(source, "op"):
        return ""
    scores = Softmax(source, node, -1)
    if _pair_of(source, -1) is None or not weighs_tokens(scores):
        return ""
    return "exponentials of scores, not normalised in a way that is known"


def score_problem(softmax: Softmax) -> str:
    """Say what the scores are instead of a product of queries and keys, if that is certain."""
    found = _pair_of(softmax.scores, softmax.axis)
    if found is not None:
        layer = found[1]
        return f"the scores mix heads: {op_name(layer)} before the softmax" if layer else ""
    maker = _maker(softmax.scores, softmax.axis)
    if maker is None or (not _is_layer(maker) and _has_product_behind(maker)):
        return ""
    return f"the scores are no product of queries and keys: {op_name(maker)}"


def weight_problem(softmax: Softmax) -> str:
    """Say which layer mixes the heads of the weights, or nothing."""
    layer = next((layer for layer, _ in _meetings(softmax) if layer is not None), None)
    return f"the softmax weights mix heads: {op_name(layer)}" if layer else ""


def _meetings(softmax: Softmax) -> Iterator[tuple[fx.Node | None, _Step]]:
    """Yield the tensors that the weights are multiplied with over the softmax's axis.

    With each comes a layer that the weights pass before, or None.
    """
    weights = softmax.weights
    axis = softmax.axis % len(shape_of(weights))
    for product in _products_after(weights):
        axes = axes_of_product(product)
        if axes is None:
            continue
        for used, other in ((0, 1), (1, 0)):
            node = operands_of(product)[used]
            for letter in set(axes[used]) & set(axes[other]) - set(axes[2]):
                key = axes[used].index(letter)
                found = _followed(node, key, lambda n, _, k: n is weights and k == axis)
                if found is not None:
                    yield found[1], (operands_of(product)[other], axes[other].index(letter))


def _products_after(weights: fx.Node) -> list[fx.Node]:
    """Return the products that come next after the weights, whatever is done to them before."""
    queue, seen, found = deque([weights]), {weights}, []
    while queue and len(seen) < _FORWARD_LIMIT:
        for user in queue.popleft().users:
            if user in seen or not isinstance(user.meta.get("val"), torch.Tensor | tuple | list):
                continue
            seen.add(user)
            if is_product(user):
                found.append(user)
            if not is_product(user) or _weighs_heads(user):
                queue.append(user)
    return found


def _pair_of(scores: fx.Node, axis: int) -> tuple[fx.Node, fx.Node | None] | None:
    """Return the product whose two sides are queries and keys, and a layer passed on the way."""
    return _followed(scores, axis % len(shape_of(scores)), _is_pairing)


def _is_pairing(node: fx.Node, query: int, key: int) -> bool:
    """Return whether a node is a product with one axis from one operand, one from the other."""
    axes = axes_of_product(node) if is_product(node) else None
    if axes is None:
        return False
    sides = [[axis in side for side in axes[:2]] for axis in (axes[2][query], axes[2][key])]
    together = set(axes[0]) & set(axes[1]) & set(axes[2])
    return sides in ([[True, False], [False, True]], [[False, True], [True, False]]) and bool(
        together
    )


def _followed(
    node: fx.Node, key: int, ends: Callable[[fx.Node, int, int], bool]
) -> tuple[fx.Node, fx.Node | None] | None:
    """Follow an axis back, and one other with it, until a node that ends the search.

    Returns:
        That node, and the last layer on the way, or None; nothing if there is no such node.
    """
    starts = [(node, query, key) for query in range(len(shape_of(node))) if query != key]
    queue: deque[tuple[_Pair, fx.Node | None]] = deque((start, None) for start in starts)
    seen = set(starts)
    while queue and len(seen) < _SEARCH_LIMIT:
        pair, layer = queue.popleft()
        if ends(*pair):
            return pair[0], layer
        current, query, key = pair
        layer = current if _is_layer(current) else layer
        queries = list(_sources(current, query))
        for source, of_source in _sources(current, key):
            for other, beside in queries:
                new = (source, beside, of_source)
                if other is source and beside != of_source and new not in seen:
                    seen.add(new)
                    queue.append((new, layer))
    return None


def _sources(node: fx.Node, axis: int) -> Iterator[_Step]:
    """Yield where an axis comes from, through layers over other axes too."""
    name = op_name(node)
    if name in _LINEAR:
        if axis != len(shape_of(node)) - 1:
            yield node.args[_LINEAR[name]], axis
    elif name in _CONVOLUTIONS:
        if axis != 1:
            yield node.args[0], axis
    elif name in PRODUCTS:
        if _weighs_heads(node):
            axes: Any = axes_of_product(node)
            wide = _wide_side(node)
            if (letter := axes[2][axis]) in axes[wide]:
                yield operands_of(node)[wide], axes[wide].index(letter)
    elif known := list(axis_sources(node, axis)):
        yield from known
    elif torch.Tag.pointwise in getattr(node.target, "tags", ()):
        yield from aligned_sources(node, axis)


def _is_layer(node: fx.Node) -> bool:
    name = op_name(node)
    return name in _LINEAR or name in _CONVOLUTIONS or _weighs_heads(node)


def _weighs_heads(node: fx.Node) -> bool:
    """Return whether a node is a product with a weight: one side has no axis of a batch."""
    name = op_name(node)
    if name not in PRODUCTS - {"mm"}:
        return False
    axes = axes_of_product(node)
    if axes is None or len(axes[0]) == len(axes[1]):
        return False
    return not set(axes[0]) & set(axes[1]) & set(axes[2])


def _wide_side(product: fx.Node) -> int:
    left, right = (len(shape_of(factor)) for factor in operands_of(product)[:2])
    return 0 if left > right else 1


def _is_of_features(scores: fx.Node) -> bool:
    return axis_origin(scores, -1).kinds == {"features"}


def _maker(scores: fx.Node, axis: int) -> fx.Node | None:
    """Return the operation that the scores come from: of several, what most is computed for."""
    start = (scores, axis % len(shape_of(scores)))
    queue, seen, ends = deque([start]), {start}, []
    while queue and len(seen) < _SEARCH_LIMIT:
        node, of_node = queue.popleft()
        new = [] if _is_layer(node) else list(_sources(node, of_node))
        if not new and node.op == "call_function":
            ends.append(node)
        queue.extend(step for step in new if step not in seen)
        seen.update(new)
    return max(ends, key=_count_behind, default=None)


def _count_behind(node: fx.Node) -> int:
    stack, seen = [node], {node}
    while stack and len(seen) < _SEARCH_LIMIT:
        new = set(stack.pop().all_input_nodes) - seen
        seen |= new
        stack.extend(new)
    return len(seen)


def _has_product_behind(node: fx.Node) -> bool:
    """Return whether activations are multiplied on the way from the nearest layers."""
    stack, seen = [node], {node}
    while stack and len(seen) < _SEARCH_LIMIT:
        current = stack.pop()
        if is_product(current) and not _is_layer(current):
            return True
        new = set() if _is_layer(current) else set(current.all_input_nodes) - seen
        seen |= new
        stack.extend(new)
    return False
