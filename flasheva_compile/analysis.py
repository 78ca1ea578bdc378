"""Everything that is decided about a graph before it is edited: capture, match, prove, plan."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile import _torch_compat as compat
from flasheva_compile.buffers import mask_buffers
from flasheva_compile.capture import capture
from flasheva_compile.composites import take_apart
from flasheva_compile.config import HybridConfig
from flasheva_compile.elementwise import nodes_inside
from flasheva_compile.errors import ConfigError
from flasheva_compile.masks.prove import MaskProver
from flasheva_compile.matching.attention import match
from flasheva_compile.plan import expect_rewritten, keep_all, plan
from flasheva_compile.premises import position_biases, premises_of, sorted_inputs
from flasheva_compile.report import CompileReport, LayerReport
from flasheva_compile.scope import (
    choose_scope,
    is_prepared,
    name_places,
    refuse_shared_bodies,
)
from flasheva_compile.site import AttentionSite, MissedSite, Replace, RewritePlan
from flasheva_compile.translation import validate

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from torch import fx

    from flasheva_compile.buffers import MaskBuffer
    from flasheva_compile.config import Options
    from flasheva_compile.masks.predicate import MaskPredicate
    from flasheva_compile.scope import Scope
    from flasheva_compile.site import CapturedGraph, Decision, Place, Premise


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """What was found in a graph and what is to be done.

    Attributes:
        captured: The graph and its shadow.
        premises: Facts about the inputs' data on which the plan rests.
        scope: What names are relative to.
        places: Where each attention stands, in graph order.
        plan: The decisions, in graph order.
        seconds: Time of each stage.
        warnings: What could not be looked into or checked.
    """

    captured: CapturedGraph
    premises: tuple[Premise, ...]
    scope: Scope
    places: tuple[Place, ...]
    plan: RewritePlan
    seconds: Mapping[str, float]
    warnings: tuple[str, ...]


def analyse(graph: fx.GraphModule, inputs: Sequence[Any], settings: Options) -> Analysis:
    """Run every stage that only reads.

    Args:
        graph: Dynamo's graph; composites in it are taken apart.
        inputs: Its example inputs.
        settings: Validated options.

    Raises:
        CaptureError: The graph cannot be traced.
        ConfigError: A rule names no attention.
        PlanError: ``strict``, and an attention cannot be rewritten.
    """
    seconds: dict[str, float] = {}
    with _timed(seconds, "capture"):
        take_apart(graph)
        captured = capture(graph, inputs)
    with _timed(seconds, "match"):
        sites = _outside_transforms(captured, match(captured))
        if settings.hybrid.rules:
            sites = refuse_shared_bodies(sites)
        places = tuple(site.place for site in sites)
        scope = choose_scope(places, settings.hybrid)
        layers = name_places(places, scope)
    with _timed(seconds, "prove"):
        buffers = mask_buffers(captured)
        masks = _prove(sites, buffers, sorted_inputs(captured))
        biases = position_biases(captured, masks) if settings.assume_mask else frozenset()
    with _timed(seconds, "plan"):
        decided = plan(sites, layers, masks, settings, biases)
        if is_prepared(scope):
            _expect_no_rules(settings)
            decided = keep_all(decided, "prepare left it full")
    broken = compat.graph_break(graph)
    warnings = (*captured.warnings, *([f"graph break: {broken}"] if broken else []))
    if settings.validate:
        with _timed(seconds, "validate"):
            decided, unchecked = validate(captured, decided, buffers)
        warnings += unchecked
    if settings.strict:
        expect_rewritten(decided)
    return Analysis(
        captured=captured,
        premises=premises_of(captured, decided, buffers),
        scope=scope,
        places=places,
        plan=decided,
        seconds=seconds,
        warnings=warnings,
    )


def describe(
    decided: RewritePlan, seconds: Mapping[str, float], warnings: Sequence[str]
) -> CompileReport:
    """Turn decisions into a report."""
    lengths = (
        site.key.length
        for d in decided.decisions
        if isinstance(site := d.site, AttentionSite) and site.key.length
    )
    return CompileReport(
        layers=tuple(_row(decision) for decision in decided.decisions),
        length=max(lengths, default=None),
        seconds=seconds,
        warnings=tuple(warnings),
    )


def _outside_transforms(
    captured: CapturedGraph, sites: Sequence[AttentionSite | MissedSite]
) -> tuple[AttentionSite | MissedSite, ...]:
    """Leave out what runs inside ``torch.func``: it is among what is hidden.

    The shadow of some versions of PyTorch (2.11) shows it, without the axis that is mapped over.
    """
    inside = {node.name for region in nodes_inside(captured.dynamo.graph) for node in region}
    return tuple(
        site
        for site in sites
        if isinstance(site, MissedSite) or site.output.graph or site.output.node not in inside
    )


def _prove(
    sites: Sequence[AttentionSite | MissedSite],
    buffers: Mapping[fx.Node, MaskBuffer],
    in_order: Collection[fx.Node],
) -> tuple[MaskPredicate | None, ...]:
    """Prove the masks of every site; layers that share a mask share the proof."""
    bindings = {node: buffer.meaning for node, buffer in buffers.items()}
    prover = MaskProver(bindings, in_order)
    return tuple(
        None
        if isinstance(site, MissedSite) or not site.masks
        else prover.prove_terms(
            site.masks,
            score_dtype=site.dtype,
            score_shape=site.score_shape,
        )
        for site in sites
    )


def _expect_no_rules(settings: Options) -> None:
    """Refuse a second configuration: a prepared model runs what it was prepared with."""
    if settings.hybrid != HybridConfig():
        raise ConfigError(
            "the model is prepared, its attentions have a configuration",
            subject="options",
            hint="give it to prepare(model, config), or revert(model) first",
        )


def _row(decision: Decision) -> LayerReport:
    """Turn a decision into its row of the report."""
    site = decision.site
    facts: dict[str, Any] = {"source": site.place.source, "mask": decision.mask_text}
    if isinstance(site, AttentionSite):
        facts |= {"training": torch.is_grad_enabled(), "itemsize": site.dtype.itemsize}
    path = decision.layer.path
    if isinstance(decision, Replace):
        return LayerReport.rewritten(path, decision.op, **facts)
    facts |= {"reason": decision.reason, "expected": decision.expected}
    if isinstance(site, AttentionSite):
        facts |= {
            "causal": decision.mask_text.startswith("causal"),
            "heads": site.query.heads,
            "kv_heads": site.key.heads,
            "head_dim": site.query.dim,
            "value_dim": site.value.dim,
            "scale": site.scale,
        }
    return LayerReport(path=path, decision="full", **facts)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = time.perf_counter() - start
