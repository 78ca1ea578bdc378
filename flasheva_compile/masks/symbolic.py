"""Tensors as functions of their index: a shape, a rule ``index -> value``, and shape algebra.

Every operation returns a new tensor whose rule rewrites the index; nothing is evaluated until an
element is asked for with ``tensor.at(index)``.
"""

# sympy's annotations say Basic where they mean Expr or Boolean
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import sympy as sp
import torch

from flasheva_compile.masks.values import (
    NotInterpretedError,
    Value,
    as_number,
    branches,
    choose,
    is_boolean,
    lift,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sympy.logic.boolalg import Boolean

Index: TypeAlias = tuple[sp.Expr, ...]
Shape: TypeAlias = tuple[sp.Expr, ...]
ZERO, ONE = sp.Integer(0), sp.Integer(1)

BATCH, HEAD, QUERY, KEY = sp.symbols("b h q k", integer=True, nonnegative=True)
"""The index of one attention score ``[B, H, Q, K]``."""


@dataclass(frozen=True, slots=True)
class SymbolicTensor:
    """A tensor known element by element.

    ``dtype`` is None for a Python scalar, which follows the dtype of what it meets.
    """

    shape: Shape
    dtype: torch.dtype | None
    at: Callable[[Index], Value]

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


def constant(value: Value, shape: Shape = (), dtype: torch.dtype | None = None) -> SymbolicTensor:
    """A tensor with the same value everywhere."""
    return SymbolicTensor(shape, dtype, lambda _: value)


def broadcast_index(tensor: SymbolicTensor, index: Index, shape: Shape) -> Index:
    """The index into ``tensor`` for an index into the ``shape`` that it broadcasts to.

    A dimension of size 1 in both keeps its index (it can only be 0): a decoding step then still
    shows its query index, and ``k <= q + offset`` stays recognisable.
    """
    offset = len(shape) - tensor.ndim
    if offset < 0:
        raise NotInterpretedError("broadcast to fewer dimensions")
    return tuple(
        ZERO if size == 1 and shape[offset + d] != 1 else index[offset + d]
        for d, size in enumerate(tensor.shape)
    )


def broadcast(tensor: SymbolicTensor, shape: Shape) -> SymbolicTensor:
    """`torch.broadcast_to`."""
    return SymbolicTensor(
        shape, tensor.dtype, lambda index: tensor.at(broadcast_index(tensor, index, shape))
    )


def elementwise(
    function: Callable[..., Value], tensors: Sequence[SymbolicTensor], shape: Shape
) -> SymbolicTensor:
    """Apply a function of values to tensors that broadcast to ``shape``."""
    return SymbolicTensor(
        shape,
        None,
        lambda index: function(*(t.at(broadcast_index(t, index, shape)) for t in tensors)),
    )


def permute(tensor: SymbolicTensor, order: Sequence[int]) -> SymbolicTensor:
    """`torch.permute`."""
    order = [d % tensor.ndim for d in order]

    def at(index: Index) -> Value:
        source = dict(zip(order, index, strict=True))
        return tensor.at(tuple(source[d] for d in range(tensor.ndim)))

    return SymbolicTensor(tuple(tensor.shape[d] for d in order), tensor.dtype, at)


def transpose(tensor: SymbolicTensor, first: int, second: int) -> SymbolicTensor:
    """`torch.transpose`."""
    order = list(range(tensor.ndim))
    if order:
        order[first], order[second] = order[second], order[first]
    return permute(tensor, order)


def unsqueeze(tensor: SymbolicTensor, dim: int) -> SymbolicTensor:
    """`torch.unsqueeze`."""
    dim %= tensor.ndim + 1
    shape = (*tensor.shape[:dim], ONE, *tensor.shape[dim:])
    return SymbolicTensor(shape, tensor.dtype, lambda i: tensor.at(i[:dim] + i[dim + 1 :]))


def select(tensor: SymbolicTensor, dim: int, position: sp.Expr) -> SymbolicTensor:
    """`torch.select`; a negative position counts from the end."""
    dim %= tensor.ndim
    if position.is_negative:
        position += tensor.shape[dim]
    elif not position.is_nonnegative:
        raise NotInterpretedError("select at a position of unknown sign")
    shape = tensor.shape[:dim] + tensor.shape[dim + 1 :]
    return SymbolicTensor(shape, tensor.dtype, lambda i: tensor.at((*i[:dim], position, *i[dim:])))


def slice_from(
    tensor: SymbolicTensor, dim: int, start: sp.Expr, step: sp.Expr, shape: Shape
) -> SymbolicTensor:
    """A slice that begins at ``start >= 0``; its end is given by the result's ``shape``."""
    dim %= tensor.ndim
    return SymbolicTensor(
        shape,
        tensor.dtype,
        lambda i: tensor.at((*i[:dim], start + step * i[dim], *i[dim + 1 :])),
    )


def repeat(tensor: SymbolicTensor, shape: Shape) -> SymbolicTensor:
    """`torch.Tensor.repeat` to the given result shape."""
    offset = len(shape) - tensor.ndim

    def at(index: Index) -> Value:
        return tensor.at(
            tuple(
                ZERO if size == 1 else i if size == whole else sp.Mod(i, size)
                for i, size, whole in zip(index[offset:], tensor.shape, shape[offset:], strict=True)
            )
        )

    return SymbolicTensor(shape, tensor.dtype, at)


def flip(tensor: SymbolicTensor, dims: Sequence[int]) -> SymbolicTensor:
    """`torch.flip`."""
    dims = [d % tensor.ndim for d in dims]

    def at(index: Index) -> Value:
        return tensor.at(
            tuple(tensor.shape[d] - 1 - i if d in dims else i for d, i in enumerate(index))
        )

    return SymbolicTensor(tensor.shape, tensor.dtype, at)


def concatenate(tensors: Sequence[SymbolicTensor], dim: int) -> SymbolicTensor:
    """`torch.cat`; legacy empty 1-D tensors are skipped as torch does."""
    parts = [t for t in tensors if not (t.ndim == 1 and t.shape[0] == 0)]
    if not parts:
        raise NotInterpretedError("cat of nothing")
    dim %= parts[0].ndim
    ends = [sum((t.shape[dim] for t in parts[: n + 1]), ZERO) for n in range(len(parts))]

    def part_at(n: int, index: Index) -> Value:
        start = ends[n - 1] if n else ZERO
        return parts[n].at((*index[:dim], index[dim] - start, *index[dim + 1 :]))

    def at(index: Index) -> Value:
        value = part_at(len(parts) - 1, index)
        for n in reversed(range(len(parts) - 1)):
            value = choose(index[dim] < ends[n], part_at(n, index), value)
        return value

    shape = (*parts[0].shape[:dim], ends[-1], *parts[0].shape[dim + 1 :])
    return SymbolicTensor(shape, parts[0].dtype, at)


def pad_last(tensor: SymbolicTensor, left: sp.Expr, value: Value, shape: Shape) -> SymbolicTensor:
    """`torch.nn.functional.pad` of the last dimension with a constant."""
    length = tensor.shape[-1]

    def at(index: Index) -> Value:
        source = index[-1] - left
        inside = sp.And(source >= 0, source < length)
        return choose(inside, tensor.at((*index[:-1], source)), _like(value, tensor.dtype))

    return SymbolicTensor(shape, tensor.dtype, at)


def _like(value: Value, dtype: torch.dtype | None) -> Value:
    if dtype == torch.bool and not is_boolean(value):
        return sp.true if value != 0 else sp.false
    return value


def triangle(tensor: SymbolicTensor, keeps: Callable[[sp.Expr], Boolean]) -> SymbolicTensor:
    """`torch.tril` or `torch.triu`: zero where ``keeps(column - row)`` is false."""
    zero = sp.false if tensor.dtype == torch.bool else ZERO
    return SymbolicTensor(
        tensor.shape,
        tensor.dtype,
        lambda i: choose(keeps(i[-1] - i[-2]), tensor.at(i), zero),
    )


def gather_at(
    tensor: SymbolicTensor,
    indices: Sequence[SymbolicTensor],
    shape: Shape,
    allowed: Callable[[sp.Expr], bool],
) -> SymbolicTensor:
    """Advanced indexing of every dimension; each index must be ``allowed`` (never negative)."""
    if len(indices) != tensor.ndim:
        raise NotInterpretedError("indexing of some dimensions only")

    def at(index: Index) -> Value:
        positions = [t.at(broadcast_index(t, index, shape)) for t in indices]
        return _at_cases(tensor, [branches(as_number(p)) for p in positions], allowed)

    return SymbolicTensor(shape, tensor.dtype, at)


def _at_cases(
    tensor: SymbolicTensor,
    positions: Sequence[tuple[tuple[sp.Expr, Boolean], ...]],
    allowed: Callable[[sp.Expr], bool],
) -> Value:
    if any(len(p) != 1 for p in positions):
        raise NotInterpretedError("an index that depends on conditions")
    index = tuple(p[0][0] for p in positions)
    if not all(allowed(i) for i in index):
        raise NotInterpretedError("an index that could be negative")
    return tensor.at(index)


def reshape(tensor: SymbolicTensor, shape: Shape) -> SymbolicTensor:
    """`torch.reshape`: split or merge the indices of groups of dimensions of equal size."""
    groups = _reshape_groups(tensor.shape, shape)

    def at(index: Index) -> Value:
        source = [ZERO] * tensor.ndim
        for olds, news in groups:
            flat = ZERO
            for d in news:
                flat = flat * shape[d] + index[d]
            for d in reversed(olds[1:]):
                source[d], flat = sp.Mod(flat, tensor.shape[d]), sp.floor(flat / tensor.shape[d])
            if olds:
                source[olds[0]] = flat
        return tensor.at(tuple(source))

    return SymbolicTensor(shape, tensor.dtype, at)


def _reshape_groups(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Consecutive dimensions of both shapes with equally many elements, as few as possible."""
    groups, olds, news = [], list(range(len(old))), list(range(len(new)))
    while olds or news:
        only_old = olds and old[olds[0]] == 1 and not (news and new[news[0]] == 1)
        only_new = news and new[news[0]] == 1 and not (olds and old[olds[0]] == 1)
        if only_old or only_new:
            groups.append(([olds.pop(0)], []) if only_old else ([], [news.pop(0)]))
            continue
        if not olds or not news:
            raise NotInterpretedError("reshape")
        groups.append(_next_group(old, new, olds, news))
    return groups


def _next_group(
    old: Shape, new: Shape, olds: list[int], news: list[int]
) -> tuple[list[int], list[int]]:
    left, right = [olds.pop(0)], [news.pop(0)]
    while (ratio := _ratio(old, new, left, right)) != 1:
        if not ratio.is_number and not ratio.is_integer and not (1 / ratio).is_integer:
            raise NotInterpretedError("reshape of unrelated symbolic sizes")
        grow_old = ratio < 1 if ratio.is_number else (1 / ratio).is_integer
        if not (olds if grow_old else news):
            raise NotInterpretedError("reshape")
        if grow_old:
            left.append(olds.pop(0))
        else:
            right.append(news.pop(0))
    return left, right


def _ratio(old: Shape, new: Shape, left: Sequence[int], right: Sequence[int]) -> sp.Expr:
    return sp.cancel(sp.prod([old[d] for d in left]) / sp.prod([new[d] for d in right]))


def minimum(left: Value, right: Value) -> Value:
    """The smaller value (only numbers, or equal values, are ordered)."""
    return lift(lambda a, b: _ordered(sp.Min, a, b), left, right)


def maximum(left: Value, right: Value) -> Value:
    """The larger value (only numbers, or equal values, are ordered)."""
    return lift(lambda a, b: _ordered(sp.Max, a, b), left, right)


def _ordered(function: Callable[..., sp.Expr], left: sp.Expr, right: sp.Expr) -> sp.Expr:
    if left == right:
        return left
    exact = all(v.is_integer or v.is_number for v in (left, right))
    if not exact:
        raise NotInterpretedError("minimum of data")
    return function(left, right)
