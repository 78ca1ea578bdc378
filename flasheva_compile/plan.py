"""Decide, for every attention, whether and how it is rewritten; pure, reads no graph."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import sympy
import torch

from flasheva_compile.errors import PlanError
from flasheva_compile.layer_config import is_full
from flasheva_compile.lowering.op import EvaOp
from flasheva_compile.site import Keep, MissedSite, Replace, RewritePlan

if TYPE_CHECKING:
    from collections.abc import Sequence, Set

    from torch import fx

    from flasheva_compile.config import EvaConfig, LayerName, Options
    from flasheva_compile.masks.predicate import MaskPredicate
    from flasheva_compile.site import AttentionSite, Decision

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True, slots=True)
class _Geometry:
    """What a mask allows, in the terms of the formula."""

    causal: bool
    has_key_mask: bool = False
    has_segments: bool = False


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why an attention stays full."""

    reason: str
    expected: bool = False


def plan(
    sites: Sequence[AttentionSite | MissedSite],
    layers: Sequence[LayerName],
    masks: Sequence[MaskPredicate | None],
    options: Options,
    biases: Set[fx.Node] = frozenset(),
) -> RewritePlan:
    """Decide on every site.

    Args:
        sites: What matching found, in graph order.
        layers: Their names.
        masks: What their masks were proved to be; None where there is none.
        options: What the user asked for.
        biases: Inputs of the graph that are known to hold other numbers than masks do.
    """
    decisions = tuple(
        _decide(site, layer, mask, options, biases)
        for site, layer, mask in zip(sites, layers, masks, strict=True)
    )
    return RewritePlan(decisions=decisions)


def keep_all(plan: RewritePlan, reason: str) -> RewritePlan:
    """Leave every attention full, as expected."""
    decisions = (
        Keep(site=d.site, layer=d.layer, reason=reason, mask_text=d.mask_text, expected=True)
        for d in plan.decisions
    )
    return RewritePlan(decisions=tuple(decisions))


def expect_rewritten(plan: RewritePlan) -> None:
    """Refuse a plan that leaves an attention full without being told to: ``strict``.

    Raises:
        PlanError: There is one.
    """
    failures = [d for d in plan.decisions if isinstance(d, Keep) and not d.expected]
    if failures:
        rest = f" (and {len(failures) - 1} more)" if failures[1:] else ""
        raise PlanError(
            f"stays full: {failures[0].reason}{rest}",
            subject=failures[0].layer.path or failures[0].site.place.source,
            hint='give the layer "full", or leave strict out',
        )


def _decide(
    site: AttentionSite | MissedSite,
    layer: LayerName,
    mask: MaskPredicate | None,
    options: Options,
    biases: Set[fx.Node],
) -> Decision:
    config = options.hybrid.resolve(layer)
    text = _mask_text(site, mask)
    if is_full(config):
        return Keep(
            site=site, layer=layer, reason="full by configuration", mask_text=text, expected=True
        )
    if isinstance(site, MissedSite):
        return Keep(site=site, layer=layer, reason=site.reason)
    geometry = _geometry(site, mask, options, biases)
    if isinstance(geometry, _Geometry):
        geometry = _refuse_combination(site, geometry, config) or geometry
    if isinstance(geometry, _Refusal):
        return Keep(
            site=site,
            layer=layer,
            reason=geometry.reason,
            mask_text=text,
            expected=geometry.expected,
        )
    assumed = mask is not None and bool(mask.unknown or _is_input(mask))
    if assumed:
        text = f"assumed {options.assume_mask}"
    op, slope = _op(site, geometry, config), _slope(mask, site.query.heads)
    if slope is not None:
        text = text.replace("bias", "ALiBi")
    return Replace(
        site=site,
        layer=layer,
        config=config,
        op=op,
        mask=mask,
        mask_text=text,
        slope=slope,
        assumed=assumed,
    )


def _mask_text(site: AttentionSite | MissedSite, mask: MaskPredicate | None) -> str:
    if isinstance(site, MissedSite):
        return ""
    if mask is not None:
        return mask.kind
    if site.is_causal:
        return "causal (is_causal)"
    return "causal (last of a cache)" if site.appended and site.query.length == 1 else "none"


def _geometry(
    site: AttentionSite,
    mask: MaskPredicate | None,
    options: Options,
    biases: Set[fx.Node],
) -> _Geometry | _Refusal:
    """Turn mask and lengths into a geometry that the formula covers."""
    if mask is None:
        return _unmasked(site, options)
    refusal = _refuse_mask(mask, site)
    opaque = bool(mask.unknown) or _is_input(mask)
    if opaque and options.assume_mask and not (refusal and refusal.expected):
        if _is_input(mask) and not biases.isdisjoint(mask.nodes.values()):
            return _Refusal("additive position bias: a buffer whose numbers are no mask's")
        return _assumed(site, mask, causal=options.assume_mask == "causal")
    if refusal:
        return refusal
    has_key_mask, has_segments = mask.key_mask is not None, mask.segments is not None
    if site.is_causal:
        return _Refusal("is_causal together with a mask")
    if not mask.causal:
        return _bidirectional(site, options, has_key_mask=has_key_mask, segments=has_segments)
    if not _ends_at_last_key(site, mask):
        return _Refusal(f"causal, but not aligned with the last key: {mask.describe()}")
    return _Geometry(causal=True, has_key_mask=has_key_mask, has_segments=has_segments)


def _assumed(site: AttentionSite, mask: MaskPredicate, *, causal: bool) -> _Geometry | _Refusal:
    """Take the unknown part of a mask for what the user declares; what is proved stays in force."""
    if not site.lengths_equal:
        return _Refusal("assume_mask needs as many queries as keys")
    if _is_input(mask) and (mask.has_head_bias or site.parameter_mask):
        # A mask hides the same from all heads, and nobody trains it.
        return _Refusal("additive position bias: assume_mask declares masks")
    proved = replace(mask, unknown=(), bias=None if _is_input(mask) else mask.bias)
    if (refusal := _refuse_mask(proved, site)) is not None:
        return refusal
    if proved.causal and not causal:
        return _Refusal("assume_mask contradicts the part of the mask that is causal")
    return _Geometry(
        causal=causal,
        has_key_mask=mask.key_mask is not None,
        has_segments=mask.segments is not None,
    )


def _unmasked(site: AttentionSite, options: Options) -> _Geometry | _Refusal:
    if site.is_causal:
        if site.lengths_equal:
            return _Geometry(causal=True)
        return _Refusal("is_causal with fewer queries than keys does not end at the last key")
    if site.appended and site.query.length == 1:
        # A decoding step: what comes last sees everything, which is what causal means for it.
        return _Geometry(causal=True)
    return _bidirectional(site, options, has_key_mask=False)


def _ends_at_last_key(site: AttentionSite, mask: MaskPredicate) -> bool:
    """Return whether the last query provably sees the last key: ``offset == S - L``."""
    queries, keys = (
        size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
        for size in site.score_shape[2:]
    )
    return sympy.expand(mask.q_offset - (keys - queries)) == 0


def _is_input(mask: MaskPredicate) -> bool:
    """Return whether what is added to the scores is an input of the graph as it stands."""
    name = getattr(getattr(mask.bias, "func", None), "__name__", "")
    return name in mask.nodes and mask.nodes[name].op == "placeholder"


def _slope(mask: MaskPredicate | None, heads: int) -> sympy.Expr | None:
    """Return the slopes of ALiBi, if that is what a mask adds."""
    return None if mask is None else mask.alibi_slope(heads)


def _refuse_mask(mask: MaskPredicate, site: AttentionSite) -> _Refusal | None:
    """Name the first part of a proved mask that the formula does not cover."""
    if mask.window is not None:
        return _Refusal(f"the model's own sliding window: {mask.describe()}", expected=True)
    if mask.rescaled:
        return _Refusal("scores are multiplied by a tensor")
    if mask.unknown:
        what = "mask" if mask.bias is None else "additive position bias under a mask"
        return _Refusal(f"{what} not understood: {mask.describe()}")
    sloped = mask.causal and _slope(mask, site.query.heads) is not None
    parts = (
        (mask.always_masked, "everything is masked"),
        (mask.overwritten, "mask is overwritten after it is made"),
        (
            _is_input(mask) and not mask.has_head_bias,
            "mask not understood: an additive one that this graph is given",
        ),
        (_is_input(mask), "additive position bias: one that this graph is given, for each head"),
        (mask.bias is not None and not sloped, "additive position bias"),
        (sloped and site.learned_mask, "additive position bias: ALiBi whose slopes are learned"),
        (bool(mask.kv_length), "keys bounded by a length on the device (static cache)"),
        (mask.query_mask is not None, "some queries are masked as a whole"),
    )
    reason = next((text for present, text in parts if present), "")
    return _Refusal(reason) if reason else None


def _bidirectional(
    site: AttentionSite, options: Options, *, has_key_mask: bool, segments: bool = False
) -> _Geometry | _Refusal:
    if segments:
        return _Refusal("packed documents without causality")
    if not site.lengths_equal:
        return _Refusal("queries and keys differ in length and no mask says how they are aligned")
    if not site.same_source and options.assume_mask != "bidirectional":
        return _Refusal("cross-attention: queries and keys are not projected from one sequence")
    return _Geometry(causal=False, has_key_mask=has_key_mask)


def _refuse_combination(
    site: AttentionSite, geometry: _Geometry, config: EvaConfig
) -> _Refusal | None:
    """Refuse what the ops do not compute."""
    if site.dtype not in _DTYPES:
        return _Refusal(f"dtype {site.dtype} is not a floating type that the ops support")
    if config.chunk_rule == "eva" and not site.lengths_equal:
        return _Refusal("chunk rule eva needs as many queries as keys")
    if config.retrieve_chunks and not geometry.causal:
        return _Refusal("retrieve_chunks needs causal attention")
    if config.retrieve_block > 1 and not site.lengths_equal:
        return _Refusal("retrieve_block > 1 needs as many queries as keys")
    return None


def _op(site: AttentionSite, geometry: _Geometry, config: EvaConfig) -> EvaOp:
    return EvaOp(
        window_size=config.window_size,
        chunk_size=config.chunk_size,
        sink_size=config.sink_size,
        window=config.window,
        chunk_rule=config.chunk_rule,
        causal=geometry.causal,
        scale=site.scale,
        softcap=site.softcap,
        dropout_p=site.dropout_p,
        has_key_mask=geometry.has_key_mask,
        has_segments=geometry.has_segments,
        heads=site.query.heads,
        kv_heads=site.key.heads,
        head_dim=site.query.dim,
        value_dim=site.value.dim,
        retrieve_chunks=config.retrieve_chunks,
        retrieve_block=config.retrieve_block,
        retrieve_by=config.retrieve_by,
    )
