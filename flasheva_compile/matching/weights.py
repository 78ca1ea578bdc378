"""The weight path: from a softmax forward to the product with the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flasheva_compile.matching.aten import (
    CASTS,
    VIEWS,
    argument,
    is_cast,
    op_name,
)
from flasheva_compile.matching.products import (
    PRODUCTS,
    Product,
    operands_of,
    product_of_elements,
    read_product,
)
from flasheva_compile.matching.scores import keeps_tokens

if TYPE_CHECKING:
    from torch import fx

_SEARCH_LIMIT = 24
_DROPOUTS = frozenset({"dropout", "dropout_", "native_dropout"})


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPath:
    """What stands between the softmax and the product with the values.

    Attributes:
        product: ``weights @ values``.
        used: The weights as they enter it.
        weights: The weights in all shapes that they take.
        dropout_p: Drop probability in effect (0.0 in evaluation).
    """

    product: Product
    used: fx.Node
    weights: tuple[fx.Node, ...]
    dropout_p: float


def walk_weights(softmax: fx.Node) -> WeightPath | str:
    """Follow the weights forward; they must go to one product.

    Returns:
        The path, or the reason why it is not one.
    """
    current, dropout_p, shapes = softmax, 0.0, [softmax]
    while True:
        users = list(current.users)
        if len(users) != 1:
            return _escape(current, users)
        user = users[0]
        name = op_name(user)
        if name in PRODUCTS:
            break
        if (summed := product_of_elements(current)) is not None:
            user = summed
            break
        if name in _DROPOUTS:
            if dropout_p:
                return "softmax weights pass two dropouts"
            dropout_p = _drop_probability(user)
        elif not (is_cast(user) or (name in VIEWS and keeps_tokens(user))):
            return f"softmax weights go to {name}"
        current = user
        shapes.append(user)
    return _ended(user, current, tuple(shapes), dropout_p)


def _ended(
    user: fx.Node, used: fx.Node, shapes: tuple[fx.Node, ...], dropout_p: float
) -> WeightPath | str:
    """Read the product at the end of the walk."""
    product = read_product(user)
    if isinstance(product, str):
        return product
    if used not in {product.left, product.right}:
        return "softmax weights are added to a product"
    if product.addend is not None or product.alpha != 1:
        return "baddbmm with the values adds or scales"
    if op_name(user) in PRODUCTS - {"einsum"} and product.left is not used:
        return "softmax weights are the right operand of the product"
    if product.left is product.right:
        return "softmax weights are multiplied with themselves"
    return WeightPath(product=product, used=used, weights=shapes, dropout_p=dropout_p)


def feeds_product(softmax: fx.Node) -> bool:
    """Return whether the weights, whatever is done to them, end in a product with values.

    They stand on the left, ``weights @ values``, or transposed on the right.
    """
    stack, seen = [softmax], {softmax}
    while stack and len(seen) < _SEARCH_LIMIT:
        current = stack.pop()
        for user in current.users:
            if op_name(user) in PRODUCTS and _weighs(current, user):
                return True
            if user not in seen and isinstance(user.meta.get("val"), torch.Tensor):
                seen.add(user)
                stack.append(user)
    return False


def feeds_sum_of_elements(softmax: fx.Node) -> bool:
    """Return whether the weights, whatever is done to them, multiply something that is summed."""
    factors = _reached(softmax, {"mul", "multiply"})
    return any(_reached(factor, {"sum", "nansum", "mean"}) for factor in factors)


def _reached(start: fx.Node, names: set[str]) -> list[fx.Node]:
    """Return the operations of some names that a tensor has a part in."""
    stack, seen, found = [start], {start}, []
    while stack and len(seen) < _SEARCH_LIMIT:
        for user in stack.pop().users:
            if user not in seen and isinstance(user.meta.get("val"), torch.Tensor):
                seen.add(user)
                stack.append(user)
                found += [user] * (op_name(user) in names)
    return found


def _weighs(weights: fx.Node, product: fx.Node) -> bool:
    factors = operands_of(product)
    transposed = op_name(weights) in {"transpose", "permute", "t", "mT"}
    anywhere = op_name(product) == "einsum" or transposed
    return weights in factors if anywhere else factors[0] is weights


def _escape(node: fx.Node, users: list[fx.Node]) -> str:
    if not users:
        return "softmax weights are not used"
    if any(user.op == "output" for user in users):
        return "softmax weights are also returned"
    return "softmax weights are also used by " + ", ".join(
        op_name(user) for user in users if op_name(user) not in PRODUCTS | CASTS
    )


def _drop_probability(node: fx.Node) -> float:
    training = argument(node, 2, "train")
    return float(argument(node, 1, "p") or 0.0) if training else 0.0
