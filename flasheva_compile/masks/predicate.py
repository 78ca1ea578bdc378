"""`MaskPredicate`: what a mask was proved to mean, in sympy over the score index (b, h, q, k)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import sympy as sp
from sympy.core.function import AppliedUndef

from flasheva_compile.masks.slopes import alibi_slope
from flasheva_compile.masks.symbolic import HEAD

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sympy.logic.boolalg import Boolean
    from torch import fx


@dataclass(frozen=True, kw_only=True)
class MaskPredicate:
    """Which keys a query may attend to: the conjunction of all fields that are set.

    Query ``q`` of row ``b`` may attend to key ``k`` exactly if

    - ``causal``: ``k <= q + q_offset``;
    - ``window``: ``q - k <= window``;
    - ``kv_length``: ``k < n`` for each ``n``;
    - ``key_mask``, ``query_mask``: the formula over (b, k), over (b, q), holds;
    - ``segments``: ``segments(b, q + q_offset) == segments(b, k)``;
    - ``always_masked`` is False and everything in ``unknown`` holds.

    The causal and window parts are reported even if the sizes make them vacuous (a decoding step:
    ``q_offset == K - 1``). Nothing says that ``q_offset`` is the usual one (0 with ``Q == K``,
    ``K - Q`` with a cache). A caller with another geometry must refuse it. Opaque tensors occur as
    functions of their own index, ``attention_mask(b, k)``; a boolean one as
    ``Ne(attention_mask(b, k), 0)``.

    Args:
        causal: No key after ``q + q_offset``.
        q_offset: Position of query 0 among the keys; None unless ``causal``.
        window: Largest distance ``q - k`` of a visible key; None for no limit.
        key_mask: Condition on (b, k) only: key padding. None for none.
        segments: Segment number of key ``k`` of row ``b``, proved nondecreasing in ``k``.
        kv_length: Upper limits (exclusive) of the valid keys, the same for every row.
        query_mask: Condition on (b, q) only: queries that see nothing where it fails.
        bias: What is added to visible scores; None for nothing (or for the same number everywhere).
        unknown: Conditions that fit none of these. Not empty means: not proved.
        always_masked: No query may see any key.
        rescaled: Scores are multiplied by something that was not proved to be 1 where they are
            visible.
        nodes: The FX node of every opaque function that occurs in a field.
        overwritten: Names of opaque functions whose storage is written after their node:
            reading the node later gives another value.
    """

    causal: bool = False
    q_offset: sp.Expr | None = None
    window: sp.Expr | None = None
    key_mask: Boolean | None = None
    segments: sp.Expr | None = None
    kv_length: tuple[sp.Expr, ...] = ()
    query_mask: Boolean | None = None
    bias: sp.Expr | None = None
    unknown: tuple[Boolean, ...] = ()
    always_masked: bool = False
    rescaled: bool = False
    nodes: Mapping[str, fx.Node] = field(default_factory=dict, compare=False)
    overwritten: frozenset[str] = frozenset()

    @property
    def proved(self) -> bool:
        """Whether the fields say everything about the mask (a bias included)."""
        return not (self.unknown or self.rescaled)

    @property
    def kind(self) -> str:
        """A short name such as "causal+key padding"; "unknown" whenever a part is not proved."""
        if not self.proved:
            return "unknown"
        if self.always_masked:
            return "always masked"
        parts = {
            "window": self.window is not None,
            "kv length": bool(self.kv_length),
            "key padding": self.key_mask is not None,
            "segments": self.segments is not None,
            "query mask": self.query_mask is not None,
            "bias": self.bias is not None,
        }
        base = "causal" if self.causal else "bidirectional"
        return "+".join([base, *(name for name, present in parts.items() if present)])

    @property
    def has_head_bias(self) -> bool:
        """Whether what is added differs from head to head, as position biases do."""
        return self.bias is not None and HEAD in self.bias.free_symbols

    def alibi_slope(self, heads: int) -> sp.Expr | None:
        """The slope over ``h``, if the bias is ALiBi; ``heads`` is the number of query heads."""
        return None if self.bias is None else alibi_slope(self.bias, heads)

    def describe(self) -> str:
        """The predicate as text for a report."""
        conditions = [
            f"k <= {sp.Symbol('q') + self.q_offset}" if self.q_offset is not None else "",
            f"q - k <= {self.window}" if self.window is not None else "",
            *(f"k < {length}" for length in self.kv_length),
            f"{self.key_mask}" if self.key_mask is not None else "",
            f"same segment {self.segments}" if self.segments is not None else "",
            f"{self.query_mask}" if self.query_mask is not None else "",
            *(f"not understood: {_shortened(c)}" for c in self.unknown),
            "multiplied by a tensor" if self.rescaled else "",
            "never" if self.always_masked else "",
        ]
        text = " and ".join(c for c in conditions if c) or "every key"
        bias = f"; bias {_shortened(self.bias)}" if self.bias is not None else ""
        return f"{self.kind}: {text}{bias}"


def opaque_names(*formulas: sp.Basic | None) -> set[str]:
    """Names of the opaque tensors that occur in the formulas."""
    found = (f.atoms(AppliedUndef) for f in formulas if f is not None)
    return {element.func.__name__ for elements in found for element in elements}


def _shortened(formula: sp.Basic, limit: int = 200) -> str:
    text = str(formula)
    return text if len(text) <= limit else text[: limit - 3] + "..."
