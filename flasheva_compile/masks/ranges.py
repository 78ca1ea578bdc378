"""Decisions about formulas over tensor indices: what always holds, what never does."""

# sympy's annotations say Basic where they mean Expr or Boolean
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import sympy as sp
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

if TYPE_CHECKING:
    from sympy.logic.boolalg import Boolean

Domain: TypeAlias = Mapping[sp.Symbol, sp.Expr]
"""Index symbol -> size: the symbol ranges over the integers ``[0, size)``."""


@lru_cache(maxsize=4096)
def provably_nonnegative(expr: sp.Expr) -> bool:
    """Prove ``expr >= 0`` for every value of its symbols (False means "not proved")."""
    expr = sp.expand(expr)
    if expr.is_number:
        return bool(expr.is_nonnegative)
    # s >= 1 becomes 1 + s' with s' >= 0, so that s - 1 is visibly nonnegative
    sizes = [s for s in expr.free_symbols if s.is_positive and s.is_integer]
    shifted = {s: 1 + sp.Dummy(s.name, integer=True, nonnegative=True) for s in sizes}
    return bool(sp.expand(expr.subs(shifted)).is_nonnegative)


def bounds(expr: sp.Expr, domain: Domain) -> tuple[sp.Expr, sp.Expr] | None:
    """Smallest and largest value of an expression linear in the indices, else None."""
    rest = lower = upper = sp.expand(expr)
    for index, size in domain.items():
        factor = rest.coeff(index)
        rest = sp.expand(rest - factor * index)
        lower, upper = sp.expand(lower - factor * index), sp.expand(upper - factor * index)
        if index in rest.free_symbols or factor.free_symbols & set(domain):
            return None
        if factor.is_nonnegative:
            upper += factor * (size - 1)
        elif factor.is_nonpositive:
            lower += factor * (size - 1)
        else:
            return None
    return sp.expand(lower), sp.expand(upper)


def index_at_least_zero(expr: sp.Expr, domain: Domain) -> bool:
    """Prove that an index expression is never negative."""
    if provably_nonnegative(expr):
        return True
    limits = bounds(expr, domain)
    return limits is not None and provably_nonnegative(limits[0])


def at_most_zero(relation: Boolean) -> sp.Expr | None:
    """The integer expression ``d`` with ``relation <=> d <= 0``, for an inequality of integers."""
    if not isinstance(relation, Relational) or isinstance(relation, (sp.Eq, sp.Ne)):
        return None
    left, right = relation.lhs, relation.rhs
    if isinstance(relation, (sp.Ge, sp.Gt)):
        left, right = right, left
    difference = sp.expand(left - right)
    if not difference.is_integer:
        return None
    return difference + 1 if isinstance(relation, (sp.Lt, sp.Gt)) else difference


def decide(relation: Relational, domain: Domain) -> Boolean:
    """Replace a relation by true or false where the index ranges decide it."""
    difference = sp.expand(relation.lhs - relation.rhs)
    if difference.is_number:
        return relation.func(difference, 0)
    if not difference.is_integer:
        return relation
    limits = bounds(difference, domain)
    if limits is None:
        return relation
    return _decide_sign(relation, *limits)


def _decide_sign(relation: Relational, lower: sp.Expr, upper: sp.Expr) -> Boolean:
    positive, negative = provably_nonnegative(lower - 1), provably_nonnegative(-upper - 1)
    if isinstance(relation, (sp.Eq, sp.Ne)):
        if positive or negative:
            return sp.false if isinstance(relation, sp.Eq) else sp.true
        return relation
    if isinstance(relation, (sp.Ge, sp.Gt)):
        return sp.Not(_decide_sign(relation.negated, lower, upper))
    strict = isinstance(relation, sp.Lt)
    if negative if strict else provably_nonnegative(-upper):
        return sp.true
    if provably_nonnegative(lower) if strict else positive:
        return sp.false
    return relation


def reduce_division(formula: sp.Basic, domain: Domain) -> sp.Basic:
    """Remove floors and remainders that the ranges make trivial: ``floor(h / 4)`` for h < 4."""
    found = formula.atoms(sp.floor, sp.Mod)
    return (
        formula.xreplace({term: _reduce_term(term, domain) for term in found}) if found else formula
    )


def _reduce_term(term: sp.Expr, domain: Domain) -> sp.Expr:
    if isinstance(term, sp.Mod):
        value, size = term.args
    else:
        numerator, size = sp.fraction(sp.together(term.args[0]))
        value = sp.expand(numerator)
    limits = bounds(value, domain)
    if limits is None or not size.is_positive:
        return term
    if provably_nonnegative(limits[0]) and provably_nonnegative(size - 1 - limits[1]):
        return value if isinstance(term, sp.Mod) else sp.Integer(0)
    return term


def simplify(formula: Boolean, domain: Domain) -> Boolean:
    """An equivalent formula on the domain: decided atoms gone, common conjuncts pulled out."""
    return _simplify(sp.to_nnf(reduce_division(formula, domain), simplify=False), domain)


def _simplify(formula: Boolean, domain: Domain) -> Boolean:
    if isinstance(formula, Relational):
        return _normalised(decide(formula, domain))
    if not isinstance(formula, (sp.And, sp.Or)):
        return formula
    result = formula.func(*(_simplify(part, domain) for part in formula.args))
    if isinstance(result, sp.Or):
        result = _factored(result)
    return _decide_one_index(result, domain)


def _normalised(relation: Boolean) -> Boolean:
    """An inequality of integers as ``x <= n`` or ``x > n``: equal and opposite ones look so."""
    difference = at_most_zero(relation)
    if difference is None:
        return relation
    number, terms = difference.as_coeff_Add()
    if terms.could_extract_minus_sign():
        return sp.Gt(-terms, number - 1)
    return sp.Le(terms, -number)


def conjuncts(formula: Boolean) -> tuple[Boolean, ...]:
    """The parts that must all hold."""
    if formula == sp.true:
        return ()
    return formula.args if isinstance(formula, sp.And) else (formula,)


def _factored(formula: sp.Or) -> Boolean:
    """``(a & x) | (a & y)`` as ``a & (x | y)``."""
    parts = [set(conjuncts(part)) for part in formula.args]
    common = set.intersection(*parts)
    if not common:
        return formula
    rest = sp.Or(*(sp.And(*(part - common)) for part in parts))
    return sp.And(*common, rest)


def _decide_one_index(formula: Boolean, domain: Domain) -> Boolean:
    """Decide a formula over one index by trying every point where an atom can change."""
    symbols = formula.free_symbols
    if len(symbols) != 1 or formula.atoms(AppliedUndef, sp.floor, sp.Mod):
        return formula
    index = next(iter(symbols))
    points = _breakpoints(formula, index) if index in domain else None
    if points is None:
        return formula
    size = domain[index]
    tried = {p for p in points if p >= 0 and not (size.is_number and p >= size)}
    outcomes = {formula.subs(index, point) for point in tried}
    return outcomes.pop() if len(outcomes) == 1 else formula


def _breakpoints(formula: Boolean, index: sp.Symbol) -> set[int] | None:
    points = {0}
    for atom in formula.atoms(Relational):
        difference = sp.expand(atom.lhs - atom.rhs)
        if not difference.is_polynomial(index) or sp.degree(difference, index) > 1:
            return None
        factor = difference.coeff(index)
        if factor == 0:
            continue
        root = int(sp.floor(-difference.subs(index, 0) / factor))
        points.update(range(root - 1, root + 3))
    return points
