"""ALiBi among the biases: a number for each head times the key's position."""

# sympy's annotations say Basic where they mean Expr or Boolean
# pyright: reportArgumentType=false, reportReturnType=false, reportOperatorIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy as sp
from sympy.core.function import AppliedUndef

from flasheva_compile.masks.symbolic import HEAD, KEY

if TYPE_CHECKING:
    from collections.abc import Mapping


def alibi_slope(bias: sp.Expr, heads: int) -> sp.Expr | None:
    """Return ``slope(h)`` of a bias ``slope(h) * k``, up to what is the same for every key.

    None for every other bias. What is the same for every key of a query is nothing to a softmax.

    Args:
        bias: What is added to the visible scores, over (b, h, q, k).
        heads: Number of query heads.
    """
    if bias.has(sp.Piecewise):
        return None
    in_range: Mapping[sp.Basic, sp.Basic] = {
        part: HEAD for part in bias.atoms(sp.Mod) if part.args == (HEAD, sp.Integer(heads))
    }
    bias = sp.expand(bias.xreplace(in_range))
    slope = bias.coeff(KEY)
    rest = sp.expand(bias - slope * KEY)
    elements = slope.atoms(AppliedUndef)
    of_head = slope.free_symbols <= {HEAD} and all(e.free_symbols <= {HEAD} for e in elements)
    if slope == 0 or not of_head or KEY in rest.free_symbols or not slope.has(AppliedUndef):
        return None
    return slope
