"""Brute force for mask proofs: run the program, evaluate the predicate, compare every score."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy as sp
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from flasheva_compile.masks.prove import MASK_VALUE, MaskProver
from flasheva_compile.masks.symbolic import BATCH, HEAD, KEY, QUERY

if TYPE_CHECKING:
    from flasheva_compile.masks.predicate import MaskPredicate


class Recorder(fx.Interpreter):
    """Runs a graph and keeps a copy of every node's value, taken when the node ran."""

    def __init__(self, gm):
        super().__init__(gm)
        self.values = {}

    def run_node(self, n):
        value = super().run_node(n)
        self.values[n] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


def trace(program, inputs):
    """The pre-dispatch ATen graph of a mask program and the node of its result."""
    gm = make_fx(program, pre_dispatch=True, tracing_mode="fake")(*inputs)
    return gm, output_node(gm)


def output_node(gm):
    return next(n for n in gm.graph.nodes if n.op == "output").args[0]


def kind_of(node):
    return "bool" if node.meta["val"].dtype == torch.bool else "additive"


def prove_program(program, inputs, score_shape, kind=None):
    gm, node = trace(program, inputs)
    predicate = MaskProver().prove(node, kind=kind or kind_of(node), score_shape=score_shape)
    return gm, node, predicate


class Oracle:
    """Values of sympy formulas over every (b, h, q, k) of the scores."""

    def __init__(self, predicate: MaskPredicate, values, score_shape):
        self.nodes, self.values, self.shape = predicate.nodes, values, tuple(score_shape)
        ranges = [torch.arange(n) for n in score_shape]
        grids = torch.meshgrid(*ranges, indexing="ij")
        self.index = dict(zip((BATCH, HEAD, QUERY, KEY), grids, strict=True))

    def __call__(self, formula) -> torch.Tensor:
        value = self._value(sp.sympify(formula))
        return torch.as_tensor(value).expand(self.shape)

    def _value(self, f):
        if f in (sp.true, sp.false):
            return torch.tensor(f == sp.true)
        if f in self.index:
            return self.index[f]
        if isinstance(f, sp.Integer):
            return torch.tensor(int(f) if abs(f) < 2**62 else float(f))
        if f.is_number and not f.free_symbols and not f.atoms(AppliedUndef):
            return torch.tensor(float(f), dtype=torch.float64)
        return self._compound(f)

    def _compound(self, f):
        if isinstance(f, AppliedUndef):
            return self._opaque(f)
        if isinstance(f, sp.Piecewise):
            result = torch.tensor(0.0, dtype=torch.float64)
            for value, condition in reversed(f.args):
                result = torch.where(self._value(condition), self._value(value).double(), result)
            return result
        parts = [self._value(a) for a in f.args]
        if isinstance(f, Relational):
            return {
                sp.Eq: torch.eq, sp.Ne: torch.ne, sp.Le: torch.le,
                sp.Lt: torch.lt, sp.Ge: torch.ge, sp.Gt: torch.gt,
            }[type(f)](*parts)  # fmt: skip
        fold = {
            sp.And: torch.logical_and, sp.Or: torch.logical_or, sp.Add: torch.add,
            sp.Mul: torch.mul, sp.Mod: torch.remainder, sp.Max: torch.maximum,
            sp.Min: torch.minimum,
        }.get(type(f))  # fmt: skip
        if fold is not None:
            result = parts[0]
            for part in parts[1:]:
                result = fold(result, part)
            return result
        single = {sp.floor: lambda x: torch.floor(x + 1e-9).long(), sp.Not: torch.logical_not,
                  sp.Abs: torch.abs}  # fmt: skip
        return single[type(f)](*parts)

    def _opaque(self, f):
        tensor = self.values[self.nodes[f.func.__name__]]
        assert tensor.dim() == len(f.args)
        if tensor.dim() == 0:
            return _exact(tensor)
        index = [self._value(a).long() for a in f.args]
        index = [i.clamp(0, n - 1) for i, n in zip(index, tensor.shape, strict=True)]
        return _exact(tensor[tuple(index)])


def _exact(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor.long()


def visible(predicate: MaskPredicate, oracle: Oracle) -> torch.Tensor:
    """Which scores the predicate lets through, read off its documented fields."""
    q, k = oracle.index[QUERY], oracle.index[KEY]
    keep = torch.full(oracle.shape, not predicate.always_masked)
    offset = predicate.q_offset if predicate.q_offset is not None else sp.Integer(0)
    if predicate.causal:
        keep &= k <= q + oracle(offset)
    if predicate.window is not None:
        keep &= q - k <= oracle(predicate.window)
    for length in predicate.kv_length:
        keep &= k < oracle(length)
    for formula in (predicate.key_mask, predicate.query_mask):
        if formula is not None:
            keep &= oracle(formula)
    if predicate.segments is not None:
        of_query = predicate.segments.subs(KEY, QUERY + offset)
        keep &= oracle(of_query) == oracle(predicate.segments)
        steps = oracle(predicate.segments).diff(dim=-1)
        assert (steps >= 0).all(), "segments must be nondecreasing along the keys"
    return keep


def assert_exact(gm, node, predicate, inputs, score_shape, kind=None):
    """The predicate reproduces the real mask on every (b, h, q, k)."""
    recorder = Recorder(gm)
    with torch.no_grad():
        recorder.run(*[x.clone() if isinstance(x, torch.Tensor) else x for x in inputs])
    real = recorder.values[node].expand(score_shape)
    oracle = Oracle(predicate, recorder.values, score_shape)
    claimed = visible(predicate, oracle)
    kind = kind or kind_of(node)
    if kind != "additive":
        real = real.bool() if kind == "bool" else ~real.bool()
        assert torch.equal(claimed, real), f"{predicate.describe()}\n{claimed}\n{real}"
        assert predicate.bias is None
        return
    if predicate.bias is None:
        assert torch.equal(claimed, real > MASK_VALUE), predicate.describe()
    assert (real[~claimed] <= MASK_VALUE).all(), predicate.describe()
    bias = oracle(predicate.bias if predicate.bias is not None else 0).double()
    same = (real == bias) | (real.isnan() & bias.isnan())  # an opaque bias may be infinite
    rest = torch.where(same, 0.0, real.double() - bias)
    median = torch.where(claimed, rest, torch.nan).nanmedian(-1, keepdim=True).values
    spread = torch.where(claimed & ~same | (median != 0), (rest - median).abs(), 0.0)
    spread = torch.where(claimed, spread, 0.0)
    largest = torch.where(same, 0.0, bias).abs().amax(-1, keepdim=True)  # float32 rounds by it
    assert (spread <= 1e-5 * (1 + largest)).all(), predicate.describe()
