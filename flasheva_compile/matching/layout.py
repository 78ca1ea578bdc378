"""One attention with a letter on every axis, and how it becomes ``[B, H, N, D]``.

Letters: digits are leading axes (batch and heads, outermost first), ``q`` and ``k`` run over
queries and keys, ``c`` is summed in the scores, ``d`` runs over the values' features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from flasheva_compile.matching.aten import VIEWS, op_name, same_size, shape_of
from flasheva_compile.matching.axes import axis_origin, merged_heads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

    from flasheva_compile.matching.products import Product
    from flasheva_compile.site import Layout

Size: TypeAlias = int | torch.SymInt


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """Operands and result of an attention.

    Attributes:
        query, key, value: Nodes.
        query_axes, key_axes, value_axes, out_axes: Their letters.
        mask_axes: Letters of the scores as far as masks see them, for scores of as many axes.
        heads: Number of query heads, the innermost part of the leading axes.
        grouped: Keys and values have no innermost leading axis: it is one of size 1.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    query_axes: str
    key_axes: str
    value_axes: str
    out_axes: str
    mask_axes: str
    heads: int
    grouped: bool = False


def spell_sdpa(query: fx.Node, key: fx.Node, value: fx.Node) -> Spelling | str:
    """Label a call of ``scaled_dot_product_attention``."""
    ranks = {len(shape_of(node)) for node in (query, key, value)}
    if len(ranks) > 1 or min(ranks) < 3:
        return "operands differ in their number of axes"
    leads = "".join(map(str, range(ranks.pop() - 2)))
    heads = _heads(query, leads + "qc", [])
    if isinstance(heads, str):
        return heads
    return Spelling(
        query=query,
        key=key,
        value=value,
        query_axes=leads + "qc",
        key_axes=leads + "kc",
        value_axes=leads + "kd",
        out_axes=leads + "qd",
        mask_axes=leads + "qk",
        heads=heads,
    )


def spell_products(
    scores: Product, weights: Product, between: Sequence[fx.Node], softmax_axis: int, used: fx.Node
) -> Spelling | str:
    """Label two products around a softmax.

    Args:
        scores: The product of queries and keys.
        weights: The product of weights and values.
        between: Scores and weights in all shapes that they take in between.
        softmax_axis: The axis of the softmax, counted from the end.
        used: The node that enters the second product.
    """
    first = _label_scores(scores, softmax_axis)
    if isinstance(first, str):
        return first
    renamed, query, key = first
    out = _renamed(scores.out_axes, renamed)
    reshaped = any(op_name(node) in VIEWS and not _keeps_shape(node) for node in between)
    if reshaped and (not out.endswith("qk") or softmax_axis != -1):
        return "scores are reshaped with queries and keys not last"
    second = _label_weights(weights, used, None if reshaped else out)
    if isinstance(second, str):
        return second
    value, value_axes, result_axes = second
    query_axes, key_axes = (_renamed(axes, renamed) for _, axes in (query, key))
    if not reshaped and _heads_come_first(query[0], query_axes):
        swap = str.maketrans("01", "10")
        query_axes, key_axes, value_axes, result_axes, out = (
            axes.translate(swap) for axes in (query_axes, key_axes, value_axes, result_axes, out)
        )
    heads = _heads(query[0], query_axes, [*between, weights.node])
    if isinstance(heads, str):
        return heads
    grouped = _is_grouped(query[0], query_axes, ((key[0], key_axes), (value, value_axes)))
    if grouped:
        heads *= _size(query[0], query_axes, "1")
    return Spelling(
        query=query[0],
        key=key[0],
        value=value,
        query_axes=query_axes,
        key_axes=key_axes,
        value_axes=value_axes,
        out_axes=result_axes,
        mask_axes=out,
        heads=heads,
        grouped=grouped,
    )


def _keeps_shape(view: fx.Node) -> bool:
    before, after = shape_of(view.args[0]), shape_of(view)
    return len(before) == len(after) and all(map(same_size, before, after))


def _label_scores(
    product: Product, softmax_axis: int
) -> tuple[dict[str, str], tuple[fx.Node, str], tuple[fx.Node, str]] | str:
    """Return the letters of the score product, and which operand holds queries, which keys."""
    summed_over = product.out_axes[softmax_axis]
    sides = [(product.left, product.left_axes), (product.right, product.right_axes)]
    keys = [side for side in sides if summed_over in side[1]]
    if len(keys) != 1:
        return "the softmax runs over an axis that both operands of the product have"
    (key,) = keys
    query = sides[1] if key is sides[0] else sides[0]
    only_query = [a for a in query[1] if a in product.out_axes and a not in key[1]]
    if len(only_query) != 1:
        return f"queries have {len(only_query)} axes that the keys have not, instead of one"
    leads = [a for a in product.out_axes if a in query[1] and a in key[1]]
    renamed = {a: str(n) for n, a in enumerate(leads)}
    renamed |= {only_query[0]: "q", summed_over: "k", product.summed: "c"}
    if not set(product.out_axes) <= renamed.keys() or not leads:
        return "the product has axes that only the keys have, or no batch"
    return renamed, query, key


def _label_weights(
    product: Product, used: fx.Node, out: str | None
) -> tuple[fx.Node, str, str] | str:
    """Return the values with their letters, and the letters of the result."""
    axes, value, value_axes = product.operand(used)
    leads = "".join(map(str, range(len(axes) - 2)))
    letters = out if out is not None else leads + "qk"
    renamed = dict(zip(axes, letters, strict=True))
    if renamed[product.summed] != "k":
        return "softmax and the product with the values run over different axes"
    rest = [a for a in value_axes if a not in renamed]
    if len(rest) != 1 or {renamed[a] for a in value_axes if a in renamed} != {*leads, "k"}:
        return "values have not the axes of the weights"
    renamed[rest[0]] = "d"
    return value, _renamed(value_axes, renamed), _renamed(product.out_axes, renamed)


def _renamed(axes: str, names: dict[str, str]) -> str:
    return "".join(names[a] for a in axes)


def _heads_come_first(query: fx.Node, axes: str) -> bool:
    """Return whether of two leading axes the first is made of features, the second of tokens."""
    if set(axes) & {"2"} or "1" not in axes:
        return False
    kinds = [axis_origin(query, axes.index(letter)).kinds for letter in "01"]
    return kinds[0] == {"features"} and kinds[1] == {"tokens"}


def _is_grouped(query: fx.Node, query_axes: str, others: Sequence[tuple[fx.Node, str]]) -> bool:
    """Return whether queries are ``[B, Hkv, G, L, D]``, the others ``[B, Hkv, 1, S, D]``."""
    if "2" not in query_axes or "3" in query_axes or same_size(_size(query, query_axes, "2"), 1):
        return False
    return all("2" in axes and same_size(_size(x, axes, "2"), 1) for x, axes in others)


def _size(node: fx.Node, axes: str, letter: str) -> Size:
    return shape_of(node)[axes.index(letter)]


def _heads(query: fx.Node, axes: str, between: Sequence[fx.Node]) -> int | str:
    leads = max(int(a) for a in axes if a.isdigit()) + 1
    if leads >= 2:
        heads = _size(query, axes, str(leads - 1))
    else:
        split = (shape_of(node)[1] for node in between if len(shape_of(node)) == 4)
        heads = next(split, None) or merged_heads(query, axes.index("0")) or 1
    return heads if isinstance(heads, int) else "number of heads or head dimension is dynamic"


def to_heads(
    axes: str, shape: Sequence[Size], heads: int, *, grouped: bool = False
) -> Layout | str:
    """Return what turns a tensor with these axes into ``[B, H, N, D]``."""
    ordered = _ordered(axes)
    order = tuple(axes.index(a) for a in ordered)
    leads = tuple(shape[axes.index(a)] for a in ordered if a.isdigit())
    steps: Layout = () if axes == ordered else (_permutation(order),)
    merged = _merge(leads, heads, grouped=grouped)
    return merged if isinstance(merged, str) else steps + merged


def from_heads(
    axes: str, leads: Sequence[Size], heads: int, *, grouped: bool = False
) -> Layout | str:
    """Return what turns ``[B, H, N, D]`` into a tensor with these axes.

    Args:
        axes: Letters of the result.
        leads: Sizes of its leading axes, outermost first.
        heads: ``H``.
        grouped: See `Spelling`.
    """
    steps: Layout
    if len(leads) == 1:
        steps = (("flatten", (0, 1)),)
    elif len(leads) == 2:
        steps = ()
    else:
        inner = leads[1:] if grouped else leads[1:-1]
        if not all(isinstance(size, int) for size in inner):
            return "leading axes of the result are dynamic"
        steps = (("unflatten", (1, tuple(inner)) if grouped else (0, (-1, *inner))),)
    ordered = _ordered(axes)
    if axes == ordered:
        return steps
    return (*steps, _permutation(tuple(ordered.index(a) for a in axes)))


def shape_after(shape: Sequence[Size], layout: Layout) -> tuple[Size, ...]:
    """Return the shape of a tensor in another layout."""
    result = list(shape)
    for name, arguments in layout:
        match name:
            case "permute":
                result = [result[n] for n in arguments[0]]
            case "transpose":
                result[-2:] = result[:-3:-1]
            case "unsqueeze":
                result.insert(arguments[0], 1)
            case "squeeze":
                result.pop(arguments[0])
            case "flatten":
                first = arguments[0]
                result[first : first + 2] = [result[first] * result[first + 1]]
            case _:
                at, sizes = arguments
                known = [n for n in sizes if n != -1]
                outer = result[at]
                for n in known:
                    outer = outer // n
                result[at : at + 1] = [outer if n == -1 else n for n in sizes]
    return tuple(result)


def _ordered(axes: str) -> str:
    return "".join(sorted(a for a in axes if a.isdigit())) + "".join(a for a in "qkcd" if a in axes)


def _permutation(order: tuple[int, ...]) -> tuple[str, tuple]:
    last = len(order) - 1
    if order == (*range(last - 1), last, last - 1):
        return ("transpose", (-2, -1))
    return ("permute", (order,))


def _merge(leads: tuple[Size, ...], heads: int, *, grouped: bool) -> Layout | str:
    if grouped:
        return (("squeeze", (2,)),) if same_size(leads[2], 1) else (("flatten", (1, 2)),)
    match len(leads):
        case 1:
            return (("unflatten", (0, (-1, heads))),) if heads > 1 else (("unsqueeze", (1,)),)
        case 2:
            return ()
        case 3:
            return (("flatten", (0, 1)),)
    return "more than three leading axes"
