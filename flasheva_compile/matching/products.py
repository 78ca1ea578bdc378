"""Products of two tensors, however they are spelled, with a label on every axis."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flasheva_compile.matching.aten import argument, op_name, scalar_of, shape_of

if TYPE_CHECKING:
    from torch import fx

PRODUCTS = frozenset(["matmul", "linalg_matmul", "bmm", "baddbmm", "mm", "einsum"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """``out = left @ right`` summed over one label.

    Attributes:
        node: The product.
        left, right: Its operands.
        left_axes, right_axes, out_axes: A letter for each axis.
        addend: What baddbmm adds; None for nothing.
        alpha: Factor on the product.
        beta: Factor on the addend.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_axes: str
    right_axes: str
    out_axes: str
    addend: fx.Node | None = None
    alpha: float = 1.0
    beta: float = 1.0

    @property
    def summed(self) -> str:
        """The label that both operands have and the result has not."""
        return next(iter(set(self.left_axes) & set(self.right_axes) - set(self.out_axes)))

    def operand(self, node: fx.Node) -> tuple[str, fx.Node, str]:
        """Return the axes of one operand, then the other operand and its axes."""
        if node is self.left:
            return self.left_axes, self.right, self.right_axes
        return self.right_axes, self.left, self.left_axes


def operands_of(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the factors of a product, without what baddbmm adds."""
    name = op_name(node)
    if name == "einsum":
        return tuple(node.args[1])
    return tuple(node.args[1:3]) if name == "baddbmm" else tuple(node.args[:2])


def read_product(node: fx.Node) -> Product | str:
    """Label the axes of a product, or say why it is none of two tensors over one axis."""
    factors = operands_of(node)
    if len(factors) != 2 or factors[0] is factors[1] is None:
        return f"{op_name(node)} of {len(factors)} tensors"
    left, right = factors
    if op_name(node) == "einsum":
        axes = _einsum_axes(str(node.args[0]), [len(shape_of(f)) for f in factors])
    else:
        axes = _matmul_axes(len(shape_of(left)), len(shape_of(right)))
    if isinstance(axes, str):
        return axes
    product = Product(
        node=node,
        left=left,
        right=right,
        left_axes=axes[0],
        right_axes=axes[1],
        out_axes=axes[2],
    )
    return _with_addend(product) if op_name(node) == "baddbmm" else product


def axes_of_product(node: fx.Node) -> tuple[str, str, str] | None:
    """Return a letter for each axis of both factors and of the result, broadcast ones too."""
    factors = operands_of(node)
    ranks = [len(shape_of(factor)) for factor in factors]
    if len(ranks) != 2 or min(ranks) < 2:
        return None
    if op_name(node) == "einsum":
        axes = _einsum_axes(str(node.args[0]), ranks)
        return None if isinstance(axes, str) else axes
    leading = string.ascii_uppercase[: max(ranks) - 2]
    left, right = (leading[len(leading) - (rank - 2) :] for rank in ranks)
    return f"{left}ic", f"{right}cj", f"{leading}ij"


def _matmul_axes(left: int, right: int) -> tuple[str, str, str] | str:
    if left != right or left < 3:
        return f"a product of {left} and {right} axes"
    leading = string.ascii_uppercase[: left - 2]
    return f"{leading}ic", f"{leading}cj", f"{leading}ij"


def _einsum_axes(equation: str, ranks: list[int]) -> tuple[str, str, str] | str:
    equation = equation.replace(" ", "")
    inputs, arrow, result = equation.partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != len(ranks):
        return f"einsum {equation}"
    extra = {
        rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=True) if "..." in t
    }
    if len(extra) > 1:
        return f"einsum {equation} broadcasts"
    free = [letter for letter in string.ascii_letters if letter not in equation]
    dots = "".join(free[: extra.pop()]) if extra else ""
    left, right, out = (term.replace("...", dots) for term in (*terms, result))
    summed = set(left) & set(right) - set(out)
    alone = (set(left) ^ set(right)) - set(out)
    repeated = any(len(set(term)) < len(term) for term in (left, right, out))
    if len(summed) != 1 or alone or repeated or not out:
        return f"einsum {equation} is no product over one axis"
    return left, right, out


def _with_addend(product: Product) -> Product | str:
    node = product.node
    owner = node.graph.owning_module
    beta = scalar_of(argument(node, 3, "beta", 1), owner)
    alpha = scalar_of(argument(node, 4, "alpha", 1), owner)
    if beta is None or alpha is None:
        return "baddbmm with a factor that is a tensor"
    return Product(
        node=node,
        left=product.left,
        right=product.right,
        left_axes=product.left_axes,
        right_axes=product.right_axes,
        out_axes=product.out_axes,
        addend=node.args[0] if beta else None,
        alpha=alpha,
        beta=beta,
    )
