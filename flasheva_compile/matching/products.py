"""Products of two tensors, however they are spelled, with a label on every axis."""

from __future__ import annotations

import string
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from flasheva_compile.matching.aten import (
    argument,
    op_name,
    same_size,
    scalar_of,
    shape_of,
    value_of,
)

if TYPE_CHECKING:
    from torch import fx

PRODUCTS = frozenset(
    ["matmul", "linalg_matmul", "bmm", "baddbmm", "mm", "einsum", "inner", "tensordot"]
)


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
        inside: What stands between the operands and the node, of several operations.
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
    inside: tuple[fx.Node, ...] = ()

    @property
    def summed(self) -> str:
        """The label that both operands have and the result has not."""
        return next(iter(set(self.left_axes) & set(self.right_axes) - set(self.out_axes)))

    def operand(self, node: fx.Node) -> tuple[str, fx.Node, str]:
        """Return the axes of one operand, then the other operand and its axes."""
        if node is self.left:
            return self.left_axes, self.right, self.right_axes
        return self.right_axes, self.left, self.left_axes


def is_product(node: fx.Node) -> bool:
    """Return whether a node multiplies tensors and sums over an axis that they share.

    So does a sum of what is multiplied element by element, and ``vecdot``, if axes of the one are
    broadcast over the other.
    """
    return op_name(node) in PRODUCTS or _summed_elements(node) is not None


_PRODUCTS_OF_ELEMENTS = {"mul", "multiply"}


def product_of_elements(factor: fx.Node) -> fx.Node | None:
    """Return the sum of a product of elements that a tensor is a factor of, and of nothing else.

    Axes of size 1 may be put into the tensor before.
    """
    user = _only_user(factor)
    while user is not None and (op_name(user) == "unsqueeze" or _is_whole_slice(user)):
        user = _only_user(user)
    if user is not None and op_name(user) in _PRODUCTS_OF_ELEMENTS:
        user = _only_user(user)
    return user if user is not None and _summed_elements(user) is not None else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def operands_of(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the factors of a product, without what baddbmm adds."""
    if (summed := _summed_elements(node)) is not None:
        return summed[0]
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
    if op_name(node) not in PRODUCTS:
        return _product_of_elements(node)
    if op_name(node) == "einsum":
        axes = _einsum_axes(str(node.args[0]), [len(shape_of(f)) for f in factors])
    elif op_name(node) in {"inner", "tensordot"}:
        axes = f"{op_name(node)}, which has no axes of a batch"
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
    if (summed := _summed_elements(node)) is not None:
        return _axes_of_elements(*summed)
    if op_name(node) in {"inner", "tensordot"}:
        return _contracted_axes(node, *ranks)
    if op_name(node) == "einsum":
        axes = _einsum_axes(str(node.args[0]), ranks)
        return None if isinstance(axes, str) else axes
    leading = string.ascii_uppercase[: max(ranks) - 2]
    left, right = (leading[len(leading) - (rank - 2) :] for rank in ranks)
    return f"{left}ic", f"{right}cj", f"{leading}ij"


def _summed_elements(node: fx.Node) -> tuple[tuple[fx.Node, fx.Node], int] | None:
    """Return what is multiplied element by element and the axis, from the end, that is summed."""
    given: Any = node
    dim: Any = None
    if op_name(node) == "linalg_vecdot":
        dim = argument(node, 2, "dim", -1)
    elif (
        op_name(node) == "sum"
        and op_name(summand := node.all_input_nodes[0]) in _PRODUCTS_OF_ELEMENTS
    ):
        given, dims = summand, argument(node, 1, "dim")
        plain = not argument(node, 2, "keepdim", default=False) and not node.kwargs.get("dtype")
        dim = dims[0] if plain and isinstance(dims, list | tuple) and len(dims) == 1 else None
    factors = tuple(x for x in given.args[:2] if hasattr(x, "op") and _is_floating(x))
    if not isinstance(dim, int) or len(factors) != 2:
        return None
    left, right = factors
    shapes = shape_of(left), shape_of(right)
    axis = dim - max(map(len, shapes)) if dim >= 0 else dim
    if min(map(len, shapes)) < -axis:
        return None
    one = [same_size(shape[axis], 1) for shape in shapes]
    return ((left, right), axis) if not any(one) and _is_broadcast(*shapes) else None


def _is_floating(node: fx.Node) -> bool:
    dtype = getattr(node.meta.get("val"), "dtype", None)
    return dtype is not None and dtype.is_floating_point


def _is_broadcast(left: tuple, right: tuple) -> bool:
    """Return whether one of two shapes has an axis that the other one has not, or of size 1."""
    pairs = zip_longest(reversed(left), reversed(right), fillvalue=1)
    return any(same_size(a, 1) != same_size(b, 1) for a, b in pairs)


def _axes_of_elements(factors: tuple[fx.Node, fx.Node], axis: int) -> tuple[str, str, str]:
    long = _long_axes(factors)
    letters, alone = string.ascii_lowercase[: len(long)], iter(string.ascii_uppercase)
    sides = [
        "".join(
            next(alone) if long[n] and same_size(size, 1) else letters[n]
            for n, size in enumerate(shape, len(long) - len(shape))
        )
        for shape in map(shape_of, factors)
    ]
    return sides[0], sides[1], letters.replace(letters[axis], "")


def _long_axes(factors: tuple[fx.Node, fx.Node]) -> list[bool]:
    """Return of each axis of what two tensors are broadcast to whether it is not of size 1."""
    pairs = zip_longest(*(reversed(shape_of(factor)) for factor in factors), fillvalue=1)
    return [not (same_size(a, 1) and same_size(b, 1)) for a, b in pairs][::-1]


def _contracted_axes(node: fx.Node, left: int, right: int) -> tuple[str, str, str]:
    """Return the letters of ``inner`` and ``tensordot``: their other axes stand side by side."""
    pairs: Any = ([-1], [-1]) if op_name(node) == "inner" else node.args[2:4]
    axes = [list(string.ascii_lowercase[:left]), list(string.ascii_uppercase[:right])]
    for ours, theirs in zip(*pairs, strict=True):
        axes[1][theirs] = axes[0][ours]
    shared = set(axes[0]) & set(axes[1])
    out = "".join(letter for letter in (*axes[0], *axes[1]) if letter not in shared)
    return "".join(axes[0]), "".join(axes[1]), out


def _product_of_elements(node: fx.Node) -> Product | str:
    """Read the sum of a product of elements; axes that were put in are no axes of its operands."""
    found: Any = _summed_elements(node)
    (left, right), axis = found
    if value_of(left).dtype != value_of(right).dtype:
        return f"a product of {value_of(left).dtype} and {value_of(right).dtype}"
    long = _long_axes((left, right))
    letters = string.ascii_lowercase[: len(long)]
    bare = [_without_put_in(factor, letters, long) for factor in (left, right)]
    inside = [x for _, _, taken_off in bare for x in taken_off]
    inside += [node.args[0]] if op_name(node) == "sum" else []
    return Product(
        node=node,
        left=bare[0][0],
        right=bare[1][0],
        left_axes=bare[0][1],
        right_axes=bare[1][1],
        out_axes=letters.replace(letters[axis], ""),
        inside=tuple(inside),
    )


def _without_put_in(
    factor: fx.Node, letters: str, long: list[bool]
) -> tuple[fx.Node, str, list[fx.Node]]:
    """Take off the axes of size 1 that were put in where the other factor is longer."""
    axes, taken_off = letters[len(letters) - len(shape_of(factor)) :], []
    while True:
        if op_name(factor) == "unsqueeze":
            at: Any = factor.args[1]
            letter = axes[at % len(axes)]
            if not long[letters.index(letter)]:
                break
            axes = axes.replace(letter, "")
        elif not _is_whole_slice(factor):
            break
        taken_off.append(factor)
        factor = factor.all_input_nodes[0]
    return factor, axes, taken_off


def _is_whole_slice(node: fx.Node) -> bool:
    """Return whether a node is ``x[:]``, which graphs of dynamic shapes keep."""
    return op_name(node) == "slice" and all(
        same_size(a, b) for a, b in zip(shape_of(node), shape_of(node.args[0]), strict=True)
    )


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
