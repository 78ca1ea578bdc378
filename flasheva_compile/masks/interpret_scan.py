"""Meanings of ATen ops that combine neighbouring elements: differences and running sums."""

from __future__ import annotations

import sympy as sp

from flasheva_compile.masks import symbolic, values
from flasheva_compile.masks.interpret import Call, interprets
from flasheva_compile.masks.ranges import simplify
from flasheva_compile.masks.symbolic import Index, SymbolicTensor
from flasheva_compile.masks.values import (
    NotInterpretedError,
    Value,
    as_number,
    branches,
    cases,
    lift,
)


@interprets("diff")
def diff(call: Call) -> SymbolicTensor:
    """``x[i + 1] - x[i]`` of ``[prepend | x | append]``."""
    if call.integer("n") != 1:
        raise NotInterpretedError("higher differences")
    parts = [n for n in ("prepend", "self", "append") if call.get(n) is not None]
    tensors = [call.tensor(n) for n in parts]
    if {t.dtype for t in tensors} != {call.dtype}:
        raise NotInterpretedError("diff of several dtypes")
    whole = symbolic.concatenate(tensors, call.integer("dim"))
    dim = call.integer("dim") % whole.ndim

    def at(index: Index) -> Value:
        following = (*index[:dim], index[dim] + 1, *index[dim + 1 :])
        return lift(
            lambda b, a: values.add(b, -a, call.dtype),
            as_number(whole.at(following)),
            as_number(whole.at(index)),
        )

    return SymbolicTensor(call.shape, call.dtype, at)


@interprets("cumsum")
def cumsum(call: Call) -> SymbolicTensor:
    """The running sum of equal summands; else opaque, monotone if no summand is negative."""
    tensor, interpreter = call.tensor("self"), call.interpreter
    dim = call.integer("dim") % max(tensor.ndim, 1)
    anywhere = [sp.Dummy("j", integer=True, nonnegative=True) for _ in tensor.shape]
    interpreter.domain.update(zip(anywhere, tensor.shape, strict=True))

    def summand_at(index: Index) -> Value:
        pairs = branches(tensor.at(index))
        return cases((value, simplify(c, interpreter.domain)) for value, c in pairs)

    def at(index: Index) -> Value:
        summand = summand_at((*index[:dim], anywhere[dim], *index[dim + 1 :]))
        if isinstance(summand, sp.Expr) and anywhere[dim] not in summand.free_symbols:
            return values.multiply(summand, index[dim] + 1)
        if dim == tensor.ndim - 1 and call.dtype in values.WIDE_INTEGERS:  # others wrap around
            _mark_if_monotone(call, summand_at(tuple(anywhere)))
        raise NotInterpretedError("a running sum of varying summands")

    return SymbolicTensor(call.shape, None, at)


def _mark_if_monotone(call: Call, summand: Value) -> None:
    if all(value.is_nonnegative for value, _ in branches(summand)):
        call.interpreter.mark_monotone(call.node)
