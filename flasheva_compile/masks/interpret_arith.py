"""Meanings of ATen ops on elements: arithmetic, comparison, logic and choice."""

# sympy's annotations say Basic where they mean Expr or Boolean
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy as sp
import torch

from flasheva_compile.masks import symbolic, values
from flasheva_compile.masks.interpret import Call, interprets
from flasheva_compile.masks.symbolic import SymbolicTensor, elementwise
from flasheva_compile.masks.values import (
    NotInterpretedError,
    Value,
    as_boolean,
    as_number,
    cast,
    choose,
    compare,
    is_exact,
    lift,
    rounded,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def _as_dtype(tensor: SymbolicTensor, dtype: torch.dtype) -> SymbolicTensor:
    """An operand converted as type promotion does before the op runs."""

    def at(index: symbolic.Index) -> Value:
        value = tensor.at(index)
        if tensor.dtype is not None:
            return cast(value, tensor.dtype, dtype)
        if dtype == torch.bool:
            return as_boolean(value)
        number = as_number(value)
        return lift(lambda n: rounded(n, dtype) if n.is_number else n, number)

    return SymbolicTensor(tensor.shape, dtype, at)


def _arithmetic(call: Call, function: Callable[..., sp.Expr], *names: str) -> SymbolicTensor:
    """Apply a function of numbers to operands promoted to the result's dtype."""
    operands = [_as_dtype(call.tensor(name), call.dtype) for name in names]
    if call.dtype.is_floating_point:
        function = _without_cancellation(function)
    return elementwise(lambda *vs: lift(function, *vs), operands, call.shape)


def _without_cancellation(function: Callable[..., sp.Expr]) -> Callable[..., sp.Expr]:
    """Refuse to undo a rounding symbolically: ``x / 49 * 49`` is not ``x`` in floating point."""

    def guarded(*numbers: sp.Expr) -> sp.Expr:
        result = function(*numbers)
        lost = not all(map(is_exact, numbers)) and is_exact(result)
        if lost and 0 not in numbers and result not in numbers:
            raise NotInterpretedError("rounded numbers that cancel")
        return result

    return guarded


def _second(call: Call) -> str:
    return "other" if "other" in call.arguments else "b"


@interprets("add")
def add(call: Call) -> SymbolicTensor:
    """``self + alpha * other``."""
    alpha, dtype = call.scalar("alpha", 1), call.dtype
    return _arithmetic(
        call, lambda a, b: values.add(a, values.multiply(alpha, b), dtype), "self", "other"
    )


@interprets("sub", "subtract")
def subtract(call: Call) -> SymbolicTensor:
    """``self - alpha * other``."""
    alpha, dtype = -call.scalar("alpha", 1), call.dtype
    return _arithmetic(
        call, lambda a, b: values.add(a, values.multiply(alpha, b), dtype), "self", "other"
    )


@interprets("rsub")
def reversed_subtract(call: Call) -> SymbolicTensor:
    """``other - alpha * self``."""
    alpha, dtype = -call.scalar("alpha", 1), call.dtype
    return _arithmetic(
        call, lambda a, b: values.add(b, values.multiply(alpha, a), dtype), "self", "other"
    )


@interprets("mul", "multiply")
def multiply(call: Call) -> SymbolicTensor:
    """The product; of booleans, their conjunction."""
    return _arithmetic(call, values.multiply, "self", "other")


@interprets("div", "divide", "true_divide")
def divide(call: Call) -> SymbolicTensor:
    """The quotient, true or floored."""
    mode = call.get("rounding_mode")
    if mode == "floor":
        return _arithmetic(call, _floor_quotient, "self", "other")
    if mode is not None:
        raise NotInterpretedError("division that truncates")
    return _arithmetic(call, _quotient, "self", "other")


@interprets("floor_divide")
def floor_divide(call: Call) -> SymbolicTensor:
    """The floored quotient."""
    return _arithmetic(call, _floor_quotient, "self", "other")


@interprets("remainder")
def remainder(call: Call) -> SymbolicTensor:
    """The remainder with the sign of the divisor."""
    return _arithmetic(call, _remainder, "self", "other")


def _quotient(left: sp.Expr, right: sp.Expr) -> sp.Expr:
    if not right.is_number or right == 0:
        raise NotInterpretedError("division by data or by zero")
    return left / right


def _floor_quotient(left: sp.Expr, right: sp.Expr) -> sp.Expr:
    if not (left.is_integer and right.is_integer and right.is_positive):
        raise NotInterpretedError("floored division of floats or by data")
    return sp.floor(left / right)


def _remainder(left: sp.Expr, right: sp.Expr) -> sp.Expr:
    if not (left.is_integer and right.is_integer and right.is_positive):
        raise NotInterpretedError("remainder of floats or by data")
    return sp.Mod(left, right)


@interprets("neg", "negative")
def negate(call: Call) -> SymbolicTensor:
    """``-self``."""
    return _arithmetic(call, lambda a: -a, "self")


@interprets("abs", "absolute")
def absolute(call: Call) -> SymbolicTensor:
    """``|self|``."""
    return _arithmetic(call, sp.Abs, "self")


@interprets("minimum", "fmin")
def minimum(call: Call) -> SymbolicTensor:
    """The smaller operand."""
    operands = [_as_dtype(call.tensor(n), call.dtype) for n in ("self", "other")]
    return elementwise(symbolic.minimum, operands, call.shape)


@interprets("maximum", "fmax")
def maximum(call: Call) -> SymbolicTensor:
    """The larger operand."""
    operands = [_as_dtype(call.tensor(n), call.dtype) for n in ("self", "other")]
    return elementwise(symbolic.maximum, operands, call.shape)


@interprets("clamp", "clip")
def clamp(call: Call) -> SymbolicTensor:
    """Limit to ``[min, max]``."""
    result = _as_dtype(call.tensor("self"), call.dtype)
    for name, function in (("min", symbolic.maximum), ("max", symbolic.minimum)):
        if call.get(name) is not None:
            limit = _as_dtype(call.tensor(name), call.dtype)
            result = elementwise(function, [result, limit], call.shape)
    return result


def _comparison(relation: type[sp.core.relational.Relational]) -> Callable[[Call], SymbolicTensor]:
    def handler(call: Call) -> SymbolicTensor:
        operands = [call.tensor("self"), call.tensor("other")]
        dtype = _common_dtype(operands)
        operands = [_as_dtype(t, dtype) for t in operands]
        compared = values.compare_floats if dtype.is_floating_point else compare
        return elementwise(lambda a, b: compared(relation, a, b), operands, call.shape)

    return handler


interprets("le", "less_equal")(_comparison(sp.Le))
interprets("lt", "less")(_comparison(sp.Lt))
interprets("ge", "greater_equal")(_comparison(sp.Ge))
interprets("gt", "greater")(_comparison(sp.Gt))
interprets("eq")(_comparison(sp.Eq))
interprets("ne", "not_equal")(_comparison(sp.Ne))


def _common_dtype(operands: list[SymbolicTensor]) -> torch.dtype:
    """The dtype in which torch compares (refused where promotion has special rules)."""
    tensors = [t for t in operands if t.dtype is not None]
    dtypes = {t.dtype for t in operands if t.dtype is not None}
    if len(dtypes) == 1:
        dtype = dtypes.pop()
        scalars = [t.at(()) for t in operands if t.dtype is None]
        whole = all(values.is_boolean(s) or s.is_integer for s in scalars)
        if dtype.is_floating_point or (whole and dtype != torch.bool):
            return dtype
        return torch.int64 if whole else torch.float32
    if len({t.ndim > 0 for t in tensors}) == 1:
        return torch.promote_types(*(t.dtype for t in tensors))
    raise NotInterpretedError("comparison of a tensor with a number of another dtype")


def _logic(call: Call, function: Callable[..., Value], *names: str) -> SymbolicTensor:
    operands = [call.tensor(name) for name in names]
    return elementwise(lambda *vs: function(*map(as_boolean, vs)), operands, call.shape)


def _require_bool(call: Call) -> None:
    if call.dtype != torch.bool:
        raise NotInterpretedError("bitwise logic of integers")


@interprets("__and__", "bitwise_and", "logical_and", "and")
def logical_and(call: Call) -> SymbolicTensor:
    """Both."""
    _require_bool(call)
    return _logic(call, sp.And, "self", _second(call))


@interprets("__or__", "bitwise_or", "logical_or", "or")
def logical_or(call: Call) -> SymbolicTensor:
    """Either."""
    _require_bool(call)
    return _logic(call, sp.Or, "self", _second(call))


@interprets("__xor__", "bitwise_xor", "logical_xor")
def logical_xor(call: Call) -> SymbolicTensor:
    """Exactly one."""
    _require_bool(call)
    return _logic(
        call, lambda a, b: sp.Or(sp.And(a, sp.Not(b)), sp.And(sp.Not(a), b)), "self", _second(call)
    )


@interprets("logical_not", "bitwise_not", "__invert__")
def logical_not(call: Call) -> SymbolicTensor:
    """Not."""
    _require_bool(call)
    return _logic(call, sp.Not, "self")


@interprets("where")
def where(call: Call) -> SymbolicTensor:
    """``self`` where ``condition`` holds, else ``other``."""
    if "self" not in call.arguments:
        raise NotInterpretedError("where without values")
    condition = call.tensor("condition")
    yes, no = (_as_dtype(call.tensor(n), call.dtype) for n in ("self", "other"))
    return elementwise(
        lambda c, a, b: choose(as_boolean(c), a, b), (condition, yes, no), call.shape
    )


@interprets("masked_fill")
def masked_fill(call: Call) -> SymbolicTensor:
    """``value`` where ``mask`` holds, converted to the tensor's own dtype (bool(-inf) is True)."""
    mask, tensor = call.tensor("mask"), call.tensor("self")
    value = _as_dtype(call.tensor("value"), call.dtype)
    return elementwise(
        lambda m, x, v: choose(as_boolean(m), v, x), (mask, tensor, value), call.shape
    )
