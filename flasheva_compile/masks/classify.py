"""Sorts the conditions of a mask: causal, window, key padding, segments, or none of these."""

# sympy's annotations say Basic where they mean Expr or Boolean
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import sympy as sp
from sympy.core.function import AppliedUndef

from flasheva_compile.masks.predicate import MaskPredicate
from flasheva_compile.masks.ranges import (
    Domain,
    at_most_zero,
    conjuncts,
    provably_nonnegative,
    reduce_division,
    simplify,
)
from flasheva_compile.masks.symbolic import BATCH, HEAD, KEY, QUERY, ZERO

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sympy.logic.boolalg import Boolean

INDICES = frozenset((BATCH, HEAD, QUERY, KEY))


@dataclass(frozen=True, slots=True)
class Geometry:
    """What is known about the index beside its ranges.

    Args:
        domain: Size of each index.
        monotone: Opaque functions that never decrease along their last index.
        single_query: The scores have one query (not: the mask is broadcast over queries).
    """

    domain: Domain
    monotone: frozenset[str] = frozenset()
    single_query: bool = False


@dataclass
class _Sorted:
    """Conditions by meaning, in the order found."""

    causal: list[sp.Expr] = field(default_factory=list)
    window: list[sp.Expr] = field(default_factory=list)
    length: list[sp.Expr] = field(default_factory=list)
    keys: list[Boolean] = field(default_factory=list)
    queries: list[Boolean] = field(default_factory=list)
    rest: list[Boolean] = field(default_factory=list)


def classify(keep: Boolean, geometry: Geometry) -> MaskPredicate:
    """Express ``keep`` (True = may attend) as a `MaskPredicate` without bias and nodes."""
    keep = sp.to_nnf(reduce_division(keep, geometry.domain), simplify=False)
    found = _Sorted()
    for condition in _flatten(keep, geometry.domain):
        if condition == sp.false:
            return MaskPredicate(always_masked=True)
        _sort(condition, geometry, found)
    if geometry.single_query and not found.causal and found.length:
        # one query: "k < n" is the causal bound, k <= q + (n - 1) with q = 0
        found.causal.append(found.length.pop(0) - 1)
    offset, more = _tightest(found.causal)
    window, wider = _tightest(found.window)
    unknown = [sp.Le(KEY, QUERY + bound) for bound in more]
    unknown += [sp.Le(QUERY - KEY, bound) for bound in wider]
    predicate = MaskPredicate(
        causal=offset is not None,
        q_offset=offset,
        window=window,
        kv_length=tuple(dict.fromkeys(found.length)),
        key_mask=_conjunction(found.keys),
        query_mask=_conjunction(found.queries),
        unknown=tuple(unknown),
    )
    return _with_rest(predicate, found.rest, geometry)


def _flatten(keep: Boolean, domain: Domain) -> Iterable[Boolean]:
    """Conjuncts: those that bound ``k - q`` as they are, all others simplified on the domain."""
    for condition in conjuncts(keep):
        if _distance_bound(condition) is not None:
            yield condition
            continue
        yield from conjuncts(simplify(condition, domain))


def _distance_bound(condition: Boolean) -> tuple[int, int, sp.Expr] | None:
    """The `_linear_bound` of a condition on ``k - q``, causal or window."""
    bound = _linear_bound(condition)
    return bound if bound is not None and bound[0] * bound[1] == -1 else None


def _linear_bound(condition: Boolean) -> tuple[int, int, sp.Expr] | None:
    difference = at_most_zero(condition)
    if difference is None:
        return None
    of_key, of_query = difference.coeff(KEY), difference.coeff(QUERY)
    rest = sp.expand(difference - of_key * KEY - of_query * QUERY)
    if rest.free_symbols & INDICES or not {of_key, of_query} <= {-1, 0, 1}:
        return None
    return int(of_key), int(of_query), -rest


def _sort(condition: Boolean, geometry: Geometry, found: _Sorted) -> None:
    match _linear_bound(condition):
        case (1, -1, limit):
            found.causal.append(limit)
        case (-1, 1, limit):
            found.window.append(limit)
        case (1, 0, limit):
            found.length.append(limit + 1)
        case _:
            _sort_by_index(condition, geometry, found)


def _sort_by_index(condition: Boolean, geometry: Geometry, found: _Sorted) -> None:
    if geometry.single_query and QUERY in condition.free_symbols:
        condition = condition.subs(QUERY, ZERO)
    symbols = condition.free_symbols
    if condition == sp.true:
        return
    if not symbols & {QUERY, HEAD}:
        found.keys.append(condition)
    elif not symbols & {KEY, HEAD}:
        found.queries.append(condition)
    else:
        found.rest.append(condition)


def _tightest(limits: list[sp.Expr]) -> tuple[sp.Expr | None, list[sp.Expr]]:
    """The smallest limit, and those that cannot be compared with it."""
    if not limits:
        return None, []
    best, incomparable = limits[0], []
    for limit in limits[1:]:
        if provably_nonnegative(best - limit):
            best = limit
        elif not provably_nonnegative(limit - best):
            incomparable.append(limit)
    return best, incomparable


def _conjunction(conditions: list[Boolean]) -> Boolean | None:
    return sp.And(*conditions) if conditions else None


def _with_rest(predicate: MaskPredicate, rest: list[Boolean], geometry: Geometry) -> MaskPredicate:
    """Read each remaining condition as "same segment" or report it as unknown."""
    unknown = list(predicate.unknown)
    for condition in rest:
        segments = _segments(condition, predicate.q_offset or ZERO, geometry)
        if segments is None or predicate.segments not in (None, segments):
            unknown.append(condition)
        else:
            predicate = replace(predicate, segments=segments)
    return replace(predicate, unknown=tuple(unknown))


def _segments(condition: Boolean, offset: sp.Expr, geometry: Geometry) -> sp.Expr | None:
    """The function f of a condition ``f(b, q + offset) == f(b, k)``, f nondecreasing in k."""
    if not isinstance(condition, sp.Eq):
        return None
    for of_key, of_query in (condition.args, condition.args[::-1]):
        if of_key.free_symbols & {QUERY, HEAD} or of_query.free_symbols & {KEY, HEAD}:
            continue
        difference = sp.expand(of_key.subs(KEY, QUERY + offset) - of_query)
        if difference == 0 and _nondecreasing(of_key, geometry.monotone):
            return of_key
    return None


def _nondecreasing(expr: sp.Expr, monotone: frozenset[str]) -> bool:
    """Prove that an integer expression never decreases as ``k`` grows."""
    if KEY not in expr.free_symbols or expr == KEY:
        return True
    if isinstance(expr, AppliedUndef):
        *others, last = expr.args
        fixed = not any(KEY in other.free_symbols for other in others)
        return fixed and expr.func.__name__ in monotone and _nondecreasing(last, monotone)
    if isinstance(expr, (sp.Add, sp.floor)):
        return all(_nondecreasing(part, monotone) for part in expr.args)
    if isinstance(expr, sp.Mul):
        factor, rest = expr.as_coeff_Mul()
        return bool(factor.is_nonnegative) and rest != expr and _nondecreasing(rest, monotone)
    return False
