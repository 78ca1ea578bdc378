"""The score path: from the input of a softmax back to the product of queries and keys."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flasheva_compile.matching.aten import (
    CASTS,
    VIEWS,
    is_cast,
    op_name,
    same_size,
    scalar_of,
    shape_of,
)
from flasheva_compile.matching.products import Product, is_product, read_product
from flasheva_compile.matching.softmax import Softmax, row_maximum
from flasheva_compile.site import MaskTerm

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

    from flasheva_compile.mutation import Mutations
    from flasheva_compile.site import MaskKind

MULTIPLIED = "scores are multiplied by a tensor"
_SEARCH_LIMIT = 400
_SHAPE_ONLY = frozenset(["expand_as", "type_as", "view_as", "zeros_like", "ones_like", "full_like"])
# A mask of -1e4 that is scaled by less might leave weight: exp(-1e4 / 8) is 0 in every dtype.
_LEAST_FACTOR = 0.125
_SEARCH_ENDS = frozenset(
    ["linear", "addmm", "embedding", "layer_norm", "native_layer_norm", "rms_norm", "softmax"]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorePath:
    """What stands between the product and the softmax.

    Attributes:
        product: The node that multiplies queries and keys.
        scale: Factor on the product before softcap and masks.
        softcap: ``softcap * tanh(scale * qk / softcap)``; 0.0 without.
        masks: In order from the softmax back, each with the scores that it acts on.
        scores: The scores in all shapes that they take.
    """

    product: Product
    scale: float = 1.0
    softcap: float = 0.0
    masks: tuple[tuple[MaskTerm, fx.Node], ...] = ()
    scores: tuple[fx.Node, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Walk:
    """State of the walk: ``factor`` multiplies everything not yet visited.

    ``axis`` is that of the softmax, counted from the end.
    """

    node: fx.Node
    axis: int
    owner: fx.GraphModule
    factor: float = 1.0
    cap: float = 0.0
    masks: tuple[tuple[MaskTerm, fx.Node], ...] = ()


def reaches_product(node: object) -> bool:
    """Return whether a product of two tensors lies behind elementwise ops and views."""
    return _finds(node, lambda name: name in CASTS | VIEWS or name in _STEPS)


def comes_from_product(node: object) -> bool:
    """Return whether two activations were multiplied to make ``node``, whatever came after.

    Says what to report, not what to rewrite; a linear layer ends the search, since behind it lies
    another attention.
    """
    return _finds(node, lambda name: name not in _SEARCH_ENDS)


def _finds(node: object, goes_on: Callable[[str], bool]) -> bool:
    """Search backwards for a product, nearest first, through ops that ``goes_on`` accepts."""
    queue, seen = deque([node] if hasattr(node, "op") else []), {node}
    while queue and len(seen) < _SEARCH_LIMIT:
        current = queue.popleft()
        name = op_name(current)
        if is_product(current):
            return True
        new = [n for n in current.all_input_nodes if n not in seen] if goes_on(name) else []
        seen.update(new)
        queue.extend(new)
    return False


def walk_scores(softmax: Softmax, owner: fx.GraphModule, written: Mutations) -> ScorePath | str:
    """Walk from the softmax input to the product of queries and keys.

    Returns:
        The path, or the reason why it is not one.
    """
    walk = _Walk(node=softmax.scores, axis=softmax.axis, owner=owner)
    reader, shapes = softmax.weights, []
    while True:
        if written.stale(walk.node, reader):
            return "scores are overwritten through a view"
        reader, name = walk.node, op_name(walk.node)
        shapes.append(walk.node)
        if is_product(walk.node):
            break
        if is_cast(walk.node) or (name in VIEWS and keeps_tokens(walk.node)):
            walk = replace(walk, node=walk.node.args[0])
            continue
        step = _STEPS.get(name)
        if step is None and name.endswith("_"):
            return f"in-place {name} on the scores"
        if step is None:
            return f"{name} between the product and the softmax"
        if name.endswith("_") and _is_read_elsewhere(walk.node.args[0], walk.node):
            return f"in-place {name} on scores that are also read elsewhere"
        after = step(walk)
        if isinstance(after, str):
            return after
        walk = after
    return _ended(walk, tuple(shapes))


def _is_read_elsewhere(scores: fx.Node, write: fx.Node) -> bool:
    """Return whether more than the shape of what an in-place op overwrites is used elsewhere."""
    return any(
        user is not write
        and not (
            op_name(user) in _SHAPE_ONLY and scores not in user.args[: "like" not in op_name(user)]
        )
        for user in scores.users
    )


def _ended(walk: _Walk, shapes: tuple[fx.Node, ...]) -> ScorePath | str:
    """Read the product at the end of the walk."""
    product = read_product(walk.node)
    if isinstance(product, str):
        return product
    if product.addend is not None:
        after = _added(walk, product.addend, product.beta)
        if isinstance(after, str):
            return after
        walk = after
    scale = walk.factor * product.alpha
    return ScorePath(
        product=product,
        scale=scale * walk.cap if walk.cap else scale,
        softcap=walk.cap,
        masks=walk.masks,
        scores=shapes,
    )


def _added(walk: _Walk, addend: fx.Node, beta: float) -> _Walk | str:
    """Take what baddbmm adds for a mask."""
    if beta * walk.factor < _LEAST_FACTOR:
        return "scores are scaled down after the mask"
    return _masked(walk, walk.node, addend, "additive", beta)


def keeps_tokens(node: fx.Node) -> bool:
    """Return whether a view leaves the last two axes as they are, or the whole shape."""
    before, after = shape_of(node.args[0]), shape_of(node)
    if before == after:
        return True
    long = min(len(before), len(after)) >= 3
    return long and all(same_size(a, b) for a, b in zip(before[-2:], after[-2:], strict=True))


def _multiply(walk: _Walk) -> _Walk | str:
    first, second = walk.node.args[:2]
    factor = scalar_of(second, walk.owner)
    if factor is not None:
        return replace(walk, node=first, factor=walk.factor * factor)
    factor = scalar_of(first, walk.owner)
    if factor is not None:
        return replace(walk, node=second, factor=walk.factor * factor)
    sides = [(first, second), (second, first)]
    scores = [(a, b) for a, b in sides if reaches_product(a) and not reaches_product(b)]
    # What differs from key to key may be 1 wherever a mask that comes after it shows something.
    if len(scores) != 1 or not walk.masks or not _spans_keys(scores[0][1], walk.node):
        return MULTIPLIED
    return _masked(walk, *scores[0], "factor")


def _spans_keys(factor: fx.Node, scores: fx.Node) -> bool:
    """Return whether a tensor is as long as the scores along their last two axes."""
    sizes, wanted = shape_of(factor)[-2:], shape_of(scores)[-2:]
    return len(sizes) == 2 and all(map(same_size, sizes, wanted))


def _divide(walk: _Walk) -> _Walk | str:
    if "rounding_mode" in walk.node.kwargs:
        return "scores are divided with rounding"
    divisor = scalar_of(walk.node.args[1], walk.owner)
    if divisor is None:
        return "scores are divided by a tensor"
    return replace(walk, node=walk.node.args[0], factor=walk.factor / divisor)


def _add(walk: _Walk) -> _Walk | str:
    first, second = walk.node.args[:2]
    if walk.node.kwargs.get("alpha", 1) != 1:
        return "scores are added with a factor"
    sides = [(first, second), (second, first)]
    scores = [(a, b) for a, b in sides if reaches_product(a) and not reaches_product(b)]
    if len(scores) != 1:
        both = reaches_product(first)
        return "scores are a sum of two products" if both else "scores are a sum of unknown parts"
    score, mask = scores[0]
    if not hasattr(mask, "op"):
        if walk.cap:
            return "a number is added inside the softcap"
        return replace(walk, node=score)  # softmax(x + c) == softmax(x)
    if walk.factor < _LEAST_FACTOR:
        return "scores are scaled down after the mask"
    if _is_made_of(mask, score):
        return "scores are added to what is made of them"
    return _masked(walk, score, mask, "additive")


def _is_made_of(mask: fx.Node, scores: fx.Node) -> bool:
    """Return whether a mask depends on the values of the scores, and not on their shape alone."""
    stack, seen = [mask], {mask}
    while stack:
        current = stack.pop()
        if current is scores:
            return True
        name, sources = op_name(current), current.all_input_nodes
        if name in _SHAPE_ONLY or name.startswith("new_") or name.endswith("_like"):
            made = () if name.startswith("new_") or name.endswith("_like") else current.args[:1]
            sources = [node for node in made if node in sources]
        new = {n for n in sources if not n < scores and hasattr(n.meta.get("val"), "dtype")} - seen
        seen |= new
        stack.extend(new)
    return False


def _subtract(walk: _Walk) -> _Walk | str:
    scores, other = walk.node.args[:2]
    if not hasattr(other, "op") or walk.node.kwargs.get("alpha", 1) != 1:
        return "sub between the product and the softmax"
    maximum = row_maximum(other)
    if maximum != (scores, walk.axis) or walk.cap:
        return "scores less a tensor that is not their maximum"
    return replace(walk, node=scores)  # softmax(x - c) == softmax(x)


def _where(walk: _Walk) -> _Walk | str:
    condition, chosen, other = walk.node.args[:3]
    if _is_masking(other, walk) and comes_from_product(chosen):
        return _masked(walk, chosen, condition, "bool")
    if _is_masking(chosen, walk) and comes_from_product(other):
        return _masked(walk, other, condition, "masked_out")
    return "scores are chosen by where() against something that is not minus infinity"


def _masked_fill(walk: _Walk) -> _Walk | str:
    scores, condition, fill = walk.node.args[:3]
    if not _is_masking(fill, walk):
        return "scores are filled with something that is not minus infinity"
    return _masked(walk, scores, condition, "masked_out")


def _is_masking(fill: object, walk: _Walk) -> bool:
    value = scalar_of(fill, walk.owner)
    # -1e4 underflows to zero weight in every float type unless a whole row is masked.
    return value is not None and value * walk.factor <= -1e4


def _masked(
    walk: _Walk, scores: fx.Node, mask: fx.Node, kind: MaskKind, beta: float = 1.0
) -> _Walk | str:
    if walk.cap:
        return "mask inside the softcap"
    if any(term.kind == "factor" for term, _ in walk.masks):
        return "scores are multiplied by a tensor after they are masked"
    found = (MaskTerm(node=mask, kind=kind, factor=walk.factor * beta), walk.node)
    return replace(walk, node=scores, masks=(*walk.masks, found))


def _tanh(walk: _Walk) -> _Walk | str:
    if walk.cap:
        return "two tanh on the score path"
    if walk.factor <= 0:
        return "softcap that is not positive"
    return replace(walk, node=walk.node.args[0], cap=walk.factor, factor=1.0)


_STEPS: dict[str, Callable[[_Walk], _Walk | str]] = {
    "mul": _multiply,
    "mul_": _multiply,
    "div": _divide,
    "div_": _divide,
    "add": _add,
    "add_": _add,
    "sub": _subtract,
    "where": _where,
    "masked_fill": _masked_fill,
    "masked_fill_": _masked_fill,
    "tanh": _tanh,
}
