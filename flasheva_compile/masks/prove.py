"""Proves what an attention mask means: a node of a pre-dispatch ATen graph -> `MaskPredicate`.

Every node of the graph must carry ``meta["val"]``. Exact or "unknown": a mask that depends on data
in a way that is not understood, or on an op that is not modelled, ends in ``MaskPredicate.unknown``
or ``bias``.
"""

# sympy's annotations say Basic where they mean Expr or Boolean
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import sympy as sp
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from flasheva_compile.masks import (  # noqa: F401 - the interpret_* modules fill the table
    interpret_arith,
    interpret_create,
    interpret_scan,
    interpret_shape,
)
from flasheva_compile.masks.classify import Geometry, classify
from flasheva_compile.masks.interpret import Interpreter, shape_of
from flasheva_compile.masks.predicate import MaskPredicate, opaque_names
from flasheva_compile.masks.ranges import simplify
from flasheva_compile.masks.symbolic import (
    BATCH,
    HEAD,
    KEY,
    ONE,
    QUERY,
    ZERO,
    Shape,
    SymbolicTensor,
)
from flasheva_compile.masks.values import (
    NotInterpretedError,
    as_boolean,
    branches,
    literal,
)
from flasheva_compile.site import MaskTerm

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from sympy.logic.boolalg import Boolean

    from flasheva_compile.site import MaskKind

Size: TypeAlias = int | torch.SymInt | sp.Expr

MASK_VALUE = -10_000  # exp(-1e4) is 0 in every dtype; smaller literals (-5, -100) are real biases
SCORE_INDEX = (BATCH, HEAD, QUERY, KEY)


class MaskProver:
    """Proofs about the masks of one graph, each distinct mask proved once.

    Args:
        bindings: Placeholder of a nested graph (a checkpointed body) -> node of the outer graph.
        in_order: Placeholders known never to decrease along their last axis.
    """

    def __init__(
        self,
        bindings: Mapping[fx.Node, fx.Node] | None = None,
        in_order: Collection[fx.Node] = (),
    ) -> None:
        self._bindings, self._in_order = bindings, in_order
        # What is known about an element may rest on the index ranges: one interpreter for each
        self._interpreters: dict[tuple[sp.Expr, ...], Interpreter] = {}
        self._proofs: dict[tuple[object, ...], MaskPredicate] = {}

    def prove(
        self,
        node: fx.Node,
        *,
        kind: MaskKind,
        score_dtype: torch.dtype = torch.float32,
        score_shape: Sequence[Size] | None = None,
    ) -> MaskPredicate:
        """Prove one mask; see `prove`."""
        terms = [MaskTerm(node, kind)]
        return self.prove_terms(terms, score_dtype=score_dtype, score_shape=score_shape)

    def prove_terms(
        self,
        terms: Sequence[MaskTerm],
        *,
        score_dtype: torch.dtype = torch.float32,
        score_shape: Sequence[Size] | None = None,
    ) -> MaskPredicate:
        """Prove what several terms mean together (T5: a position bias and a mask)."""
        shape = None if score_shape is None else tuple(literal(n) for n in score_shape)
        key = (*terms, score_dtype, shape)
        if key not in self._proofs:
            self._proofs[key] = self._prove(terms, score_dtype, shape)
        return self._proofs[key]

    def _prove(
        self, terms: Sequence[MaskTerm], dtype: torch.dtype, shape: Shape | None
    ) -> MaskPredicate:
        if any(not _is_mask(term) for term in terms):
            return MaskPredicate(unknown=(sp.Symbol("not_a_mask_of_4_dimensions_or_less"),))
        domain = _score_domain(terms, shape)
        interpreter = self._interpreter(domain)
        keep, bias = sp.true, ZERO
        for term in terms:
            if term.kind != "factor":
                kept, added = _read(interpreter, term, shape, dtype)
                keep, bias = sp.And(keep, kept), bias + sp.Rational(term.factor) * added
        factors = [term for term in terms if term.kind == "factor"]
        rescaled = not all(_is_one_where(keep, interpreter, term, shape) for term in factors)
        geometry = Geometry(
            domain,
            frozenset(interpreter.monotone),
            single_query=shape is not None and shape[2] == 1,
        )
        predicate = classify(keep, geometry)
        bias = None if bias.is_number and abs(bias) < -MASK_VALUE else bias
        return _with_nodes(interpreter, replace(predicate, bias=bias, rescaled=rescaled), terms)

    def _interpreter(self, domain: dict[sp.Symbol, sp.Expr]) -> Interpreter:
        key = tuple(domain.values())
        if key not in self._interpreters:
            self._interpreters[key] = Interpreter(self._bindings)
            self._interpreters[key].domain.update(domain)
            for node in self._in_order:
                self._interpreters[key].mark_monotone(node)
        return self._interpreters[key]


def _is_mask(term: MaskTerm) -> bool:
    value = term.node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.ndim <= len(term.axes)


def _read(
    interpreter: Interpreter, term: MaskTerm, shape: Shape | None, score_dtype: torch.dtype
) -> tuple[Boolean, sp.Expr]:
    """Where the term lets scores through, and what it adds there."""
    tensor = interpreter.tensor(term.node)
    index = _score_index(tensor, shape, term.axes)
    value = tensor.at(index)
    if term.kind == "additive":
        pairs = _with_switches(branches(value), interpreter, score_dtype)
        return _split_additive(pairs, interpreter.domain, score_dtype)
    try:
        truth = as_boolean(value)
    except NotInterpretedError:
        truth = as_boolean(interpreter.opaque(term.node).at(index))
    return (sp.Not(truth) if term.kind == "masked_out" else truth), ZERO


def _is_one_where(
    keep: Boolean, interpreter: Interpreter, term: MaskTerm, shape: Shape | None
) -> bool:
    """Prove that a factor is 1 where scores are visible, and 0 or 1 elsewhere.

    Any other number could lift a score above what a finite mask takes off.
    """
    tensor = interpreter.tensor(term.node)
    pairs = branches(tensor.at(_score_index(tensor, shape, term.axes)))
    if any(value not in (ZERO, ONE) for value, _ in pairs):
        return False
    hidden = (condition for value, condition in pairs if value == ZERO)
    return all(simplify(sp.And(keep, c), interpreter.domain) == sp.false for c in hidden)


def _with_nodes(
    interpreter: Interpreter, predicate: MaskPredicate, terms: Sequence[MaskTerm]
) -> MaskPredicate:
    """Attach opaque nodes; a mask that is written after its node is not proved."""
    formulas = (
        predicate.q_offset,
        predicate.window,
        predicate.key_mask,
        predicate.segments,
        predicate.query_mask,
        predicate.bias,
        *predicate.kv_length,
        *predicate.unknown,
    )
    nodes = {name: interpreter.nodes[name] for name in sorted(opaque_names(*formulas))}
    written = {n for n, node in nodes.items() if _written_after(interpreter, node)}
    unknown = predicate.unknown
    if any(_written_after(interpreter, term.node) for term in terms):
        unknown = (*unknown, sp.Symbol("mask_is_overwritten_later"))
    return replace(predicate, nodes=nodes, overwritten=frozenset(written), unknown=unknown)


def _written_after(interpreter: Interpreter, node: fx.Node) -> bool:
    return interpreter.mutations(node).written_after(node)


def prove(
    node: fx.Node,
    *,
    kind: MaskKind,
    score_dtype: torch.dtype = torch.float32,
    score_shape: Sequence[Size] | None = None,
    prover: MaskProver | None = None,
) -> MaskPredicate:
    """Prove what a mask means.

    Args:
        node: The mask; broadcasts to the scores ``[B, H, Q, K]`` (three dimensions align right).
        kind: How the mask acts on the scores; see `MaskTerm`.
        score_dtype: The dtype in which the mask is added to the scores.
        score_shape: ``(B, H, Q, K)``. Without it a mask dimension of size 1 is taken to be
            broadcast, so a decoding step (``Q = 1``) shows ``kv_length`` instead of ``causal``.
        prover: Shares work between the masks of one graph.

    Returns:
        The predicate; ``kind == "unknown"`` if a part of the mask is not understood.
    """
    prover = prover or MaskProver()
    return prover.prove(node, kind=kind, score_dtype=score_dtype, score_shape=score_shape)


def _score_domain(terms: Sequence[MaskTerm], shape: Shape | None) -> dict[sp.Symbol, sp.Expr]:
    """Size of every score index."""
    if shape is not None:
        return dict(zip(SCORE_INDEX, shape, strict=True))
    sizes = dict.fromkeys(SCORE_INDEX, ONE)
    for term in terms:
        for symbol, size in zip(reversed(SCORE_INDEX), reversed(shape_of(term.node)), strict=False):
            sizes[symbol] = size if size != 1 else sizes[symbol]
    return sizes


def _score_index(
    tensor: SymbolicTensor, shape: Shape | None, axes: Sequence[str]
) -> tuple[sp.Expr, ...]:
    """The mask's index for score (b, h, q, k); a size of 1 that scores share keeps its symbol."""
    symbols: dict[str, sp.Expr] = dict(zip("bhqk", SCORE_INDEX, strict=True))
    scores: dict[str, sp.Expr | None] = dict.fromkeys("bhqkn")
    if shape is not None:
        scores |= dict(zip("bhqk", shape, strict=True))
        symbols["n"], scores["n"] = BATCH * shape[1] + HEAD, shape[0] * shape[1]
    aligned = axes[len(axes) - tensor.ndim :]
    return tuple(
        ZERO if size == 1 and scores[axis] != 1 else symbols[axis]
        for axis, size in zip(aligned, tensor.shape, strict=True)
    )


def _with_switches(
    pairs: Sequence[tuple[sp.Expr, Boolean]], interpreter: Interpreter, score_dtype: torch.dtype
) -> list[tuple[sp.Expr, Boolean]]:
    """Read ``(1 - m) * min`` as two cases, for an integer mask ``m`` of zeros and ones.

    Of no other number is that a mask: for a 2 it would add the largest number there is.
    """
    found: list[tuple[sp.Expr, Boolean]] = []
    limit = _mask_limit(score_dtype)
    for value, condition in pairs:
        elements = value.atoms(AppliedUndef)
        switch = next(iter(elements)) if len(elements) == 1 else None
        if switch is None or not _is_integral(interpreter.nodes.get(switch.func.__name__)):
            found.append((value, condition))
            continue
        off, on = (value.xreplace({switch: sp.Integer(n)}) for n in (0, 1))
        if sp.expand(value - off - (on - off) * switch) != 0 or not _is_mask_of(off, on, limit):
            found.append((value, condition))
            continue
        found += [
            (off, sp.And(condition, sp.Eq(switch, 0))),
            (on, sp.And(condition, sp.Ne(switch, 0))),
        ]
    return found


def _is_mask_of(off: sp.Expr, on: sp.Expr, limit: sp.Expr) -> bool:
    """Whether one of two numbers is 0 and the other one hides a key."""
    if not (off.is_number and on.is_number):
        return False
    return (off == 0 and on <= limit) or (on == 0 and off <= limit)


def _is_integral(node: fx.Node | None) -> bool:
    value = node.meta.get("val") if node is not None else None
    return isinstance(value, torch.Tensor) and not (
        value.dtype.is_floating_point or value.dtype.is_complex
    )


def _mask_limit(score_dtype: torch.dtype) -> sp.Expr:
    return max(sp.Integer(MASK_VALUE), sp.Rational(torch.finfo(score_dtype).min))


def _split_additive(
    pairs: Sequence[tuple[sp.Expr, Boolean]],
    domain: Mapping[sp.Symbol, sp.Expr],
    score_dtype: torch.dtype,
) -> tuple[Boolean, sp.Expr]:
    """Split an additive mask into "may attend" and the bias of what may be attended."""
    limit = _mask_limit(score_dtype)
    kept = [(v, simplify(c, domain)) for v, c in pairs if not (v.is_number and v <= limit)]
    kept = [(value, condition) for value, condition in kept if condition != sp.false]
    keep = sp.Or(*(condition for _, condition in kept))
    if not kept:
        return sp.false, ZERO
    if len(kept) == 1:
        return _unsimplified(pairs, limit), kept[0][0]
    return keep, sp.Piecewise(*kept, evaluate=False)


def _unsimplified(pairs: Sequence[tuple[sp.Expr, Boolean]], limit: sp.Expr) -> Boolean:
    """The condition of the one visible case as written, vacuous causal parts included."""
    return sp.Or(*(c for v, c in pairs if not (v.is_number and v <= limit)))
