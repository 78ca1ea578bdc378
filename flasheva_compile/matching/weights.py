"""The weight path: from a softmax forward to the product with the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flasheva_compile.matching.aten import (
    ANY_PRODUCTS,
    CASTS,
    PRODUCTS,
    VIEWS,
    argument,
    is_cast,
    op_name,
    shape_of,
)

if TYPE_CHECKING:
    from torch import fx

_SEARCH_LIMIT = 24
_DROPOUTS = frozenset({"dropout", "dropout_", "native_dropout"})


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPath:
    """What stands between the softmax and the product with the values.

    Attributes:
        product: ``weights @ values``.
        value: Its right operand.
        dropout_p: Drop probability in effect (0.0 in evaluation).
    """

    product: fx.Node
    value: fx.Node
    dropout_p: float


def walk_weights(softmax: fx.Node) -> WeightPath | str:
    """Follow the weights forward; they must go to one product, as its left operand.

    Returns:
        The path, or the reason why it is not one.
    """
    current, dropout_p = softmax, 0.0
    while True:
        users = list(current.users)
        if len(users) != 1:
            return _escape(current, users)
        user = users[0]
        name = op_name(user)
        if name in PRODUCTS:
            break
        if name in _DROPOUTS:
            if dropout_p:
                return "softmax weights pass two dropouts"
            dropout_p = _drop_probability(user)
        elif not (is_cast(user) or (name in VIEWS and shape_of(user) == shape_of(current))):
            return f"softmax weights go to {name}"
        current = user
    if user.args[0] is not current:
        return "softmax weights are the right operand of the product"
    return WeightPath(product=user, value=user.args[1], dropout_p=dropout_p)


def feeds_product(softmax: fx.Node) -> bool:
    """Return whether the weights, whatever is done to them, end as left operand of a product."""
    stack, seen = [softmax], {softmax}
    while stack and len(seen) < _SEARCH_LIMIT:
        current = stack.pop()
        for user in current.users:
            left = user.args[0] if user.args else None
            first = left[0] if isinstance(left, list | tuple) and left else left
            if op_name(user) in ANY_PRODUCTS and (op_name(user) == "einsum" or first is current):
                return True
            if op_name(user) == "baddbmm" and user.args[1] is current:
                return True
            if user not in seen and isinstance(user.meta.get("val"), torch.Tensor):
                seen.add(user)
                stack.append(user)
    return False


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
