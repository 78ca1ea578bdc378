"""Translation validation: what stands in the graph is run against what it was taken for.

Each distinct structure is computed once on small random tensors, as it stands in the shadow and as
the reference formula with a window over every key, which is softmax attention over the claimed
queries, keys, values, scale, softcap and mask. The two must agree, and where gradients are enabled
so must the gradients of queries, keys and values; if not, the attention stays
full. This catches mistakes of ours in matching and in the proof of masks. It cannot see what is
the same for every window: which axis of the model is the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx
from torch.fx.node import map_aggregate

from flasheva_compile import _torch_compat as compat
from flasheva_compile.kernels.reference.attention import eva_attention
from flasheva_compile.masks.emit import NotEmitted, emit_head_tensor, emit_key_tensor
from flasheva_compile.masks.predicate import opaque_names
from flasheva_compile.site import Keep, Replace, RewritePlan
from flasheva_compile.slices import NotRunError, cut, random_input, run, small_sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import sympy
    from torch import Tensor

    from flasheva_compile.buffers import MaskBuffer
    from flasheva_compile.site import CapturedGraph, Decision, Layout, Operand
    from flasheva_compile.slices import Sizes, Slice

Key: TypeAlias = tuple[object, ...]

_SCORE_BUDGET = 1 << 19  # scores of one run, B * H * L * S: some 4 MiB a tensor
_CHUNK = 8
# Both sides compute in double precision; scales that a graph keeps in single precision differ by
# 1e-7. A wrong mask, scale or layout moves a result by its own size.
_TOLERANCE = 1e-5
_SEED = 0


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What came of one structure: it agrees, or why it stays full, or why it was not run."""

    mismatch: str = ""
    not_run: str = ""


def validate(
    captured: CapturedGraph, plan: RewritePlan, buffers: Mapping[fx.Node, MaskBuffer]
) -> tuple[RewritePlan, tuple[str, ...]]:
    """Check every replacement of a plan, each distinct structure once.

    Returns:
        The plan, with a ``Keep`` for what does not agree, and warnings about what was not checked.
    """
    verdicts: dict[Key, _Verdict] = {}
    decisions: list[Decision] = []
    unchecked: dict[str, int] = {}
    for decision in plan.decisions:
        if isinstance(decision, Keep):
            decisions.append(decision)
            continue
        check = _Check(captured, decision, buffers)
        key = check.key()
        if key not in verdicts:
            verdicts[key] = check.verdict()
        verdict = verdicts[key]
        if verdict.not_run:
            unchecked[verdict.not_run] = unchecked.get(verdict.not_run, 0) + 1
        decisions.append(_kept(decision, verdict) if verdict.mismatch else decision)
    warnings = (f"{n} rewritten but not validated: {reason}" for reason, n in unchecked.items())
    return RewritePlan(decisions=tuple(decisions)), tuple(warnings)


def _kept(decision: Replace, verdict: _Verdict) -> Keep:
    return Keep(
        site=decision.site,
        layer=decision.layer,
        reason=f"validation failed: {verdict.mismatch}",
        mask_text=decision.mask_text,
    )


class _Check:
    """One attention, as it stands and as it was understood."""

    def __init__(
        self, captured: CapturedGraph, decision: Replace, buffers: Mapping[fx.Node, MaskBuffer]
    ) -> None:
        self.captured, self.decision, self.buffers = captured, decision, buffers
        self.site = decision.site
        mask = decision.mask
        self.declared = decision.assumed
        # A mask that was declared is given as declared; of one that was proved, what it opaquely
        # depends on is random.
        opaque = mask.nodes.values() if mask is not None else ()
        masks = {t.node for t in self.site.masks} if self.declared else set(opaque)
        operands = {operand.node for operand in self._operands()}
        self.part: Slice = cut(self.site.result, operands | masks)
        if missing := masks - set(self.part.inputs):
            # The mask is computed from an operand, and known by what the operand is computed from.
            self.part = cut(
                self.site.result, masks | {o for o in operands if not _is_behind(o, missing)}
            )

    def key(self) -> Key:
        """Return what attentions of one structure have in common."""
        # Inputs that are no operands, such as masks, are the same tensors or another structure.
        names = {node: node.name for node in self.part.inputs}
        names |= {node: str(n) for n, node in enumerate(self.part.nodes)}
        operands = {"q": self.site.query, "k": self.site.key, "v": self.site.value}
        names |= {operand.node: f"operand {name}" for name, operand in operands.items()}
        given = tuple((names[o.node], o.layout, _type_of(o.node)) for o in operands.values())
        nodes = tuple(
            (
                n.target,
                map_aggregate((n.args, tuple(n.kwargs.items())), lambda x: _named(x, names)),
            )
            for n in self.part.nodes
        )
        claim = (
            self.decision.op,
            self.decision.mask,
            self.decision.slope,
            self.site.result_layout,
            self.declared,
        )
        return (given, str(nodes), claim, str(self.site.score_shape))

    def verdict(self) -> _Verdict:
        """Run both sides and compare, gradients too where the graph may be trained."""
        trained = torch.is_grad_enabled()
        try:
            sizes = small_sizes(self.part, self.site.score_shape, _SCORE_BUDGET)
            given = self._values(sizes)
            given, leaves = self._differentiable(given) if trained else (given, ())
            values = run(self.part, given, sizes, gradients=trained)
            got = values[self.site.result]
            with compat.plain_execution(), torch.set_grad_enabled(trained):
                wanted, seen = self._formula(values, sizes)
        except NotRunError as error:
            return _Verdict(not_run=str(error))
        if got.shape != wanted.shape:
            return _Verdict(mismatch=f"shape {tuple(got.shape)}, not {tuple(wanted.shape)}")
        # A query that may attend to nothing is nobody's business: NaN, zero or a mean in practice.
        with compat.plain_execution():
            mismatch = _difference(got, wanted, seen)
        if not mismatch and leaves:
            mismatch = _gradient_difference((got, wanted), leaves, seen)
        return _Verdict(mismatch=mismatch)

    def _differentiable(
        self, values: Mapping[fx.Node, Tensor]
    ) -> tuple[Mapping[fx.Node, Tensor], tuple[Tensor, ...]]:
        """Make the operands that are given depend on leaves, and return these."""
        operands = {operand.node for operand in self._operands()}
        leaves = {n: x.requires_grad_() for n, x in values.items() if n in operands}
        with compat.plain_execution(), torch.enable_grad():
            # A leaf may not be written to; what stands in the graph may write.
            copies = {node: leaf.clone() for node, leaf in leaves.items()}
        return {**values, **copies}, tuple(leaves.values())

    def _operands(self) -> tuple[Operand, Operand, Operand]:
        return self.site.query, self.site.key, self.site.value

    def _values(self, sizes: Sizes) -> dict[fx.Node, Tensor]:
        generator = torch.Generator().manual_seed(_SEED)
        values = {}
        with compat.plain_execution():
            for node in self.part.inputs:
                values[node] = self._value(node, sizes, generator)
        return values

    def _value(self, node: fx.Node, sizes: Sizes, generator: torch.Generator) -> Tensor:
        if node in self.buffers:
            return _as_stored(self.captured.data[node], node, sizes)
        if self.declared and (kinds := [t.kind for t in self.site.masks if t.node is node]):
            return self._declared(node, kinds[0], sizes)
        drawn = random_input(node, self.part, sizes, generator)
        mask = self.decision.mask
        segments = opaque_names(mask.segments) if mask is not None else set()
        if mask is not None and any(mask.nodes.get(name) is node for name in segments):
            return drawn.sort(-1).values  # documents are runs of equal numbers
        return drawn

    def _declared(self, node: fx.Node, kind: str, sizes: Sizes) -> Tensor:
        shape = tuple(map(sizes.of, node.meta["val"].shape))
        keep = torch.ones(shape, dtype=torch.bool)
        if self.decision.op.causal:
            if len(shape) < 2 or shape[-2] != shape[-1]:
                raise NotRunError("the declared mask is not square")
            keep = keep.tril()
        if kind in {"bool", "factor"}:
            return keep if kind == "bool" else keep.double()
        if kind == "masked_out":
            return ~keep
        return torch.zeros(shape, dtype=torch.float64).masked_fill(~keep, -torch.inf)

    def _formula(self, values: Mapping[fx.Node, Tensor], sizes: Sizes) -> tuple[Tensor, Tensor]:
        """Return the result as understood, and 1 where its query has a key (else 0)."""
        op = self.decision.op
        q, k, v = (_laid_out(values[o.node], o.layout, sizes) for o in self._operands())
        length = k.shape[2]
        mask = None if self.declared else self.decision.mask
        sources = {} if mask is None else {n: values[node] for n, node in mask.nodes.items()}
        built = {
            name: _key_tensor(formula, sources, (k.shape[0], length), sizes)
            for name, formula, wanted in (
                ("key_mask", mask and mask.key_mask, op.has_key_mask),
                ("segment_ids", mask and mask.segments, op.has_segments),
            )
            if wanted and formula is not None
        }
        out, lse = eva_attention(
            q,
            k,
            v,
            window_size=-(-max(length, 1) // _CHUNK) * _CHUNK,
            chunk_size=_CHUNK,
            chunk_rule="mean",
            causal=op.causal,
            q_offset=length - q.shape[2],
            scale=op.scale,
            softcap=op.softcap,
            alibi_slopes=self._slopes(sources),
            key_mask=built.get("key_mask"),
            segment_ids=built.get("segment_ids"),
        )
        seen = lse.isfinite()[..., None].expand(out.shape).double()
        return tuple(_laid_out(x, self.site.result_layout, sizes) for x in (out, seen))  # type: ignore[return-value]

    def _slopes(self, sources: Mapping[str, Tensor]) -> Tensor | None:
        """Evaluate the slopes of ALiBi with the code that the rewritten graph uses."""
        formula, heads = self.decision.slope, self.decision.op.heads
        if formula is None:
            return None

        def emit(graph: fx.Graph, nodes: Mapping[str, fx.Node]) -> fx.Node | NotEmitted:
            return emit_head_tensor(graph, formula, nodes, heads, device="cpu")

        return _evaluated(formula, sources, emit)


def _difference(got: Tensor, wanted: Tensor, seen: Tensor | float = 1.0) -> str:
    """Say how far two results are apart, or nothing."""
    error = ((got - wanted).abs().nan_to_num(nan=torch.inf) * seen).nan_to_num(nan=0.0)
    allowed = _TOLERANCE * max(1.0, float(wanted.abs().max()))
    worst = float(error.max()) if error.numel() else 0.0
    if worst <= allowed:
        return ""
    return f"differs from softmax attention as understood by {worst:.2g}"


def _gradient_difference(
    results: tuple[Tensor, Tensor], leaves: Sequence[Tensor], seen: Tensor
) -> str:
    """Say whether the operands get other gradients.

    A query without keys may have made NaN of every gradient: then there is nothing to compare.
    """
    gradients = []
    with compat.plain_execution(), torch.enable_grad():
        generator = torch.Generator().manual_seed(_SEED)
        weight = torch.randn(seen.shape, generator=generator, dtype=seen.dtype) * seen
        for result in results:
            loss = (result.nan_to_num() * weight).sum()
            if not loss.requires_grad:
                return "has no gradient"
            gradients.append(
                torch.autograd.grad(loss, list(leaves), allow_unused=True, retain_graph=True)
            )
        for leaf, got, wanted in zip(leaves, *gradients, strict=True):
            got, wanted = (torch.zeros_like(leaf) if g is None else g for g in (got, wanted))
            if got.isfinite().all() and (found := _difference(got, wanted)):
                return f"its gradient {found}"
    return ""


def _is_behind(node: fx.Node, sources: set[fx.Node]) -> bool:
    """Return whether a node is computed from one of the sources."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current in sources:
            return True
        new = set(current.all_input_nodes) - seen
        seen |= new
        stack.extend(new)
    return False


def _key_tensor(
    formula: sympy.Basic, sources: Mapping[str, Tensor], shape: tuple[int, int], sizes: Sizes
) -> Tensor:
    """Evaluate a condition over (b, k) with the code that the rewritten graph uses."""

    def emit(graph: fx.Graph, nodes: Mapping[str, fx.Node]) -> fx.Node | NotEmitted:
        return emit_key_tensor(graph, sizes.formula(formula), nodes, *shape, device="cpu")

    return _evaluated(formula, sources, emit)


def _evaluated(
    formula: sympy.Basic,
    sources: Mapping[str, Tensor],
    emit: Callable[[fx.Graph, Mapping[str, fx.Node]], fx.Node | NotEmitted],
) -> Tensor:
    """Run what ``emit`` writes for a formula."""
    graph, inputs, needed = fx.Graph(), {}, sorted(opaque_names(formula))
    for name in needed:
        inputs[name] = graph.placeholder(f"source_{len(inputs)}")
        inputs[name].meta["val"] = sources[name]
    built = emit(graph, inputs)
    if isinstance(built, NotEmitted):
        raise NotRunError(f"the mask cannot be rebuilt: {built.reason}")
    graph.output(built)
    return fx.GraphModule({}, graph)(*(sources[name] for name in needed))


def _laid_out(x: Tensor, layout: Layout, sizes: Sizes) -> Tensor:
    for name, arguments in layout:
        small = map_aggregate(arguments, lambda n: sizes.of(n) if type(n) is int else n)  # type: ignore[arg-type]
        x = getattr(torch, name)(x, *small)  # type: ignore[misc]
    return x


def _as_stored(data: Tensor, node: fx.Node, sizes: Sizes) -> Tensor:
    if tuple(map(sizes.of, node.meta["val"].shape)) != tuple(data.shape):
        raise NotRunError("a mask buffer as long as the sequence")
    data = data.detach().cpu()
    return data.double() if data.is_floating_point() else data


def _type_of(node: fx.Node) -> tuple[object, ...]:
    value = node.meta["val"]
    return (str(tuple(value.shape)), value.dtype)


def _named(argument: Any, names: Mapping[fx.Node, str]) -> Any:  # noqa: ANN401
    return f"%{names.get(argument, argument.name)}" if isinstance(argument, fx.Node) else argument
