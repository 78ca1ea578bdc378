"""What one element of a mask can be: a sympy number, a sympy Boolean, or a few guarded cases.

Arithmetic here is exact or refused: a value that floating point would round, or that depends on
data in a way that cannot be compared exactly, raises `NotInterpretedError`, and its node becomes an
opaque function.
"""

# sympy's annotations say Basic where they mean Expr or Boolean
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import sympy as sp
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from typing_extensions import TypeIs

MAX_CASES = 16  # more guarded values than any mask we know (T5: 2); beyond, the node stays opaque
EXACT_INTEGER_LIMIT = 2**24  # float32 holds every integer up to here
ABSORBABLE_LIMIT = 1000  # a bias with larger literal factors may cancel a mask value
LOW_PRECISION = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
WIDE_INTEGERS = (torch.int64, torch.int32)


class NotInterpretedError(Exception):
    """An element has no exact symbolic meaning; its node becomes an opaque function."""


@dataclass(frozen=True, slots=True)
class Cases:
    """A number that depends on conditions: disjoint, exhaustive ``(value, condition)`` pairs."""

    branches: tuple[tuple[sp.Expr, Boolean], ...]


Value: TypeAlias = sp.Expr | Boolean | Cases


def is_boolean(value: object) -> TypeIs[Boolean]:
    """Tell truth values from numbers (a sympy Symbol is both to sympy, a number to us)."""
    return isinstance(value, Boolean) and not isinstance(value, sp.Expr)


def is_opaque(value: object) -> bool:
    """Tell whether ``value`` is exactly one element of an uninterpreted tensor."""
    return isinstance(value, AppliedUndef)


def literal(number: Any) -> Value:  # noqa: ANN401 - asks what it is
    """Turn a Python number, a SymInt or a sympy object into a value.

    Raises:
        NotInterpretedError: A NaN, a complex number or a symbolic float.
    """
    if isinstance(number, bool):
        return sp.true if number else sp.false
    if isinstance(number, torch.SymInt):
        return sp.sympify(number.node.expr)
    if isinstance(number, float):
        return _float_literal(number)
    if isinstance(number, (int, sp.Expr)):
        return sp.sympify(number)
    raise NotInterpretedError(f"{type(number).__name__} is not a literal")


def _float_literal(number: float) -> sp.Expr:
    if math.isnan(number):
        raise NotInterpretedError("NaN")
    if math.isinf(number):
        return sp.oo if number > 0 else -sp.oo
    return sp.Rational(number)  # exact: every double is a dyadic rational


def branches(value: Value) -> tuple[tuple[sp.Expr, Boolean], ...]:
    """View any value as guarded numbers."""
    value = as_number(value)
    return value.branches if isinstance(value, Cases) else ((value, sp.true),)


def cases(pairs: Iterable[tuple[sp.Expr, Boolean]]) -> Value:
    """Join guarded numbers: impossible ones go, equal ones merge, a single one loses its guard."""
    merged: dict[sp.Expr, Boolean] = {}
    for value, condition in pairs:
        if value is sp.nan or value is sp.zoo:
            raise NotInterpretedError("NaN")
        if condition != sp.false:
            merged[value] = sp.Or(merged.get(value, sp.false), condition)
    if len(merged) > MAX_CASES:
        raise NotInterpretedError("too many cases")
    if len(merged) == 1:
        return next(iter(merged))
    if not merged:
        raise NotInterpretedError("no case is possible")
    return Cases(tuple(merged.items()))


def as_number(value: Value) -> sp.Expr | Cases:
    """Read a truth value as 0 or 1."""
    if not is_boolean(value):
        return value
    if value in (sp.true, sp.false):
        return sp.Integer(1 if value == sp.true else 0)
    return Cases(((sp.Integer(1), value), (sp.Integer(0), sp.Not(value))))


def as_boolean(value: Value) -> Boolean:
    """Read a number as "differs from 0"."""
    return value if is_boolean(value) else compare(sp.Ne, value, sp.Integer(0))


def lift(function: Callable[..., sp.Expr], *arguments: Value) -> Value:
    """Apply a function of numbers under every combination of the arguments' conditions."""
    combined: list[tuple[tuple[sp.Expr, ...], Boolean]] = [((), sp.true)]
    for argument in arguments:
        combined = [
            ((*values, value), sp.And(guard, condition))
            for values, guard in combined
            for value, condition in branches(argument)
        ]
        combined = [pair for pair in combined if pair[1] != sp.false]
        if len(combined) > 4 * MAX_CASES:
            raise NotInterpretedError("too many cases")
    return cases((function(*values), guard) for values, guard in combined)


def choose(condition: Boolean, yes: Value, no: Value) -> Value:
    """``yes`` where ``condition`` holds, else ``no``."""
    if condition in (sp.true, sp.false) or yes == no:
        return yes if condition == sp.true or yes == no else no
    negated = sp.Not(condition)
    if is_boolean(yes) and is_boolean(no):
        return sp.Or(sp.And(condition, yes), sp.And(negated, no))
    left = ((value, sp.And(condition, guard)) for value, guard in branches(yes))
    right = ((value, sp.And(negated, guard)) for value, guard in branches(no))
    return cases((*left, *right))


def compare(relation: type[sp.core.relational.Relational], left: Value, right: Value) -> Boolean:
    """Compare two values; the result is a Boolean.

    Raises:
        NotInterpretedError: A side is a float computed from data, where rounding could decide.
    """
    return sp.Or(
        *(
            sp.And(guard, condition, _compare_numbers(relation, value, other))
            for value, guard in branches(left)
            for other, condition in branches(right)
            if sp.And(guard, condition) != sp.false
        )
    )


def _compare_numbers(
    relation: type[sp.core.relational.Relational], left: sp.Expr, right: sp.Expr
) -> Boolean:
    if not (left.is_number and right.is_number):
        if left.is_infinite or right.is_infinite:
            raise NotInterpretedError("data compared with an infinity")
        if not (is_exact(left) and is_exact(right)):
            raise NotInterpretedError("rounding could decide the comparison")
        if right == 0 and isinstance(left, sp.Mul) and relation in (sp.Eq, sp.Ne):
            factors = (relation(factor, 0) for factor in left.args)  # of integers
            return sp.Or(*factors) if relation is sp.Eq else sp.And(*factors)
    return relation(left, right)


def compare_floats(
    relation: type[sp.core.relational.Relational], left: Value, right: Value
) -> Boolean:
    """Compare two floating-point values; see `compare`.

    An integer of the data that was rounded compares with a small number as it did before, and
    with another such integer it may not: document ids beyond 2**24 become equal in float32.

    Raises:
        NotInterpretedError: Rounding could decide.
    """
    for value, _ in branches(left):
        for other, _ in branches(right):
            product = other == 0 and isinstance(value, sp.Mul)
            found = (value - other).atoms(AppliedUndef) if not product else ()
            if sum(bool(element.is_integer) for element in found) > 1:
                raise NotInterpretedError("integers that may have been rounded are compared")
    return compare(relation, left, right)


def is_exact(value: sp.Expr) -> bool:
    """Whether floating point holds the value without rounding, so that it may be compared."""
    if value.is_number or is_opaque(value):
        return True
    small = all(abs(n) <= EXACT_INTEGER_LIMIT for n in value.atoms(sp.Number))
    return bool(value.is_integer) and small


def add(left: sp.Expr, right: sp.Expr, dtype: torch.dtype) -> sp.Expr:
    """Add two numbers; a mask value near the end of ``dtype`` absorbs an ordinary bias."""
    for value, other in ((left, right), (right, left)):
        if value.is_number and not other.is_number and _absorbs(value, other, dtype):
            return value
        if value.is_infinite and not other.is_number:
            raise NotInterpretedError("data added to an infinity")
    return left + right


def _absorbs(value: sp.Expr, other: sp.Expr, dtype: torch.dtype) -> bool:
    if not dtype.is_floating_point:
        return False
    huge = value <= sp.Rational(torch.finfo(dtype).min) / 2
    return bool(huge) and all(abs(n) <= ABSORBABLE_LIMIT for n in other.atoms(sp.Number))


def multiply(left: sp.Expr, right: sp.Expr) -> sp.Expr:
    """Multiply two numbers (infinity times data could be NaN and is refused)."""
    for value, other in ((left, right), (right, left)):
        if value.is_infinite and not other.is_number:
            raise NotInterpretedError("data multiplied by an infinity")
    return left * right


def rounded(number: sp.Expr, dtype: torch.dtype) -> sp.Expr:
    """The value that ``dtype`` holds for an exact number.

    Raises:
        NotInterpretedError: The dtype is unknown, or an integer does not fit.
    """
    if not dtype.is_floating_point:
        return _checked_integer(number, dtype)
    if number.is_infinite or (number.is_integer and abs(number) <= 256):
        return number
    if not number.is_rational:
        number = sp.Float(number, 30)
    return _float_literal(_round_float(float(number), dtype))


def _checked_integer(number: sp.Expr, dtype: torch.dtype) -> sp.Expr:
    if dtype.is_complex or not number.is_integer:
        raise NotInterpretedError("not an integer")
    limits = torch.iinfo(dtype)
    if not limits.min <= number <= limits.max:
        raise NotInterpretedError("integer overflow")
    return number


def _round_float(number: float, dtype: torch.dtype) -> float:
    # struct and not torch: a FakeTensorMode may be active around the proof
    if dtype == torch.float64:
        return number
    try:
        if dtype == torch.float32:
            return struct.unpack("<f", struct.pack("<f", number))[0]
        if dtype == torch.float16:
            return struct.unpack("<e", struct.pack("<e", number))[0]
        if dtype == torch.bfloat16:
            return _round_bfloat16(number)
    except OverflowError:
        return math.copysign(math.inf, number)
    raise NotInterpretedError(f"{dtype} is not modelled")


def _round_bfloat16(number: float) -> float:
    bits = struct.unpack("<I", struct.pack("<f", number))[0]
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000  # round to nearest, ties to even
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def settle(value: Value, dtype: torch.dtype, opaque: Callable[[], Value]) -> Value:
    """Fit a value to the dtype that stores it; what does not fit exactly becomes ``opaque()``."""
    if dtype == torch.bool:
        try:
            return as_boolean(value)
        except NotInterpretedError:
            return opaque()
    return cases(
        (_settle_number(number, dtype, opaque), condition) for number, condition in branches(value)
    )


def _settle_number(number: sp.Expr, dtype: torch.dtype, opaque: Callable[[], Value]) -> sp.Expr:
    try:
        if number.is_number and not is_opaque(number):
            return rounded(number, dtype)
    except NotInterpretedError:
        return opaque()
    wide = dtype in WIDE_INTEGERS or (dtype.is_floating_point and dtype not in LOW_PRECISION)
    return number if wide or is_opaque(number) else opaque()


def cast(value: Value, source: torch.dtype, target: torch.dtype) -> Value:
    """Convert between dtypes.

    Raises:
        NotInterpretedError: The conversion may change data.
    """
    if source == target or torch.bool in (source, target):
        return as_boolean(value) if target == torch.bool else value
    return cases((_cast_number(v, source, target), c) for v, c in branches(value))


def _cast_number(number: sp.Expr, source: torch.dtype, target: torch.dtype) -> sp.Expr:
    if number.is_number and not is_opaque(number):
        if source.is_floating_point and not target.is_floating_point and number.is_finite:
            number = sp.Integer(math.trunc(number))
        return rounded(number, target)
    if _keeps_data(number, source, target):
        return number
    raise NotInterpretedError(f"{source} to {target} may round data")


def _keeps_data(number: sp.Expr, source: torch.dtype, target: torch.dtype) -> bool:
    if target.is_floating_point:
        wide = target in (torch.float32, torch.float64)
        return wide and (not source.is_floating_point or source.itemsize < target.itemsize)
    if source.is_floating_point:
        return (
            bool(number.is_integer) and target in WIDE_INTEGERS and not number.atoms(AppliedUndef)
        )
    widens = source.itemsize < target.itemsize and (source.is_signed or not target.is_signed)
    return widens or (target in WIDE_INTEGERS and not number.atoms(AppliedUndef))
