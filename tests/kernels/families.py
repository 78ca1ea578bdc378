"""Families of kernel specs that stand for what models ask for."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, get_args

from flasheva_compile.lowering.launch import fuses_pooling
from flasheva_compile.lowering.schedule import known_target
from flasheva_compile.lowering.spec import KernelKind, KernelSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

KINDS: tuple[str, ...] = get_args(KernelKind)
_SHAPE = {"chunk_size": 16, "window_size": 256, "sink_size": 16}


def base(dtype: str, head_dim: int, value_dim: int | None = None, **fields) -> KernelSpec:
    return KernelSpec(
        kind="forward",
        dtype=dtype,
        head_dim=head_dim,
        value_dim=value_dim or head_dim,
        **{**_SHAPE, **fields},
    )


_TANGENT = {"chunk_rule": "tangent", "parameters": 1}
_EVABYTE = {"chunk_rule": "evabyte", "parameters": 3}
_EVA = {"chunk_rule": "eva"}
_POOLING = ("chunk_tokens", "dpool", "domega")
_PADDED = {"documents": "padded", "key_mask": True}

FAMILIES: dict[str, tuple[KernelSpec, tuple[str, ...]]] = {
    "causal-bf16-d64": (base("bf16", 64, **_TANGENT), KINDS),
    "gqa-bf16-d128": (base("bf16", 128, group=4, **_TANGENT), KINDS),
    "added-bf16-d128": (base("bf16", 128, accumulate=True, **_TANGENT), ("dpool",)),
    "columns-bf16-d64": (base("bf16", 64, bias_columns=True, **_TANGENT), ("chunk_tokens",)),
    "columns-bf16-d128": (base("bf16", 128, bias_columns=True, **_TANGENT), ("chunk_tokens",)),
    "whole-bf16-d64": (base("bf16", 64, whole_chunks=True, chunk_rule="mean"), ("forward", "dkv")),
    "padded-fp16-d128": (
        base("fp16", 128, chunk_rule="mean", **_PADDED),
        ("forward", "dq", "dkv", "dpool"),
    ),
    "padded-bf16-d64": (base("bf16", 64, sink_size=0, chunk_rule="mean", **_PADDED), ("forward",)),
    "bidirectional-bf16-d128": (base("bf16", 128, causal=False, chunk_rule="mean"), ("forward",)),
    "bidirectional-fp16-d64": (
        base("fp16", 64, causal=False, chunk_rule="mean", **_PADDED),
        ("forward",),
    ),
    "bidirectional-bf16-d80": (
        base("bf16", 80, causal=False, window="block", chunk_rule="mean", **_PADDED),
        ("forward", "dchunk"),
    ),
    "packed-bf16-d64": (
        base("bf16", 64, documents="packed", **_EVABYTE),
        ("chunk_tokens", "forward", "dchunk", "dkv"),
    ),
    "everything-fp16-d64": (
        base("fp16", 64, alibi=True, softcap=True, dropout=True, group=2, chunk_rule="mean"),
        ("forward", "dkv"),
    ),
    "fp32-d64": (base("fp32", 64, chunk_rule="mean"), ("forward", "dkv")),
    "causal-bf16-d80": (base("bf16", 80, **_TANGENT), ("dsink",)),
    "fp32-d256": (base("fp32", 256, chunk_rule="mean"), ("dq",)),
    "bf16-d256": (base("bf16", 256, chunk_rule="mean"), ("forward", "dq", "dkv")),
    "eva-bf16-d64": (base("bf16", 64, **_EVA), ("dkv", *_POOLING)),
    "eva-padded-fp16-d80": (base("fp16", 80, accumulate=True, **_EVA, **_PADDED), _POOLING),
    "eva-packed-bf16-d128": (base("bf16", 128, documents="packed", **_EVA), _POOLING),
    "eva-bf16-d256": (base("bf16", 256, accumulate=True, **_EVA), _POOLING),
    "eva-fp32-d256": (base("fp32", 256, accumulate=True, **_EVA), _POOLING),
}
"""Name to spec and kernels; a few of each difficulty, for every run of CI on sm_90."""

EVERYWHERE = ("causal-bf16-d64", "whole-bf16-d64", "eva-bf16-d64", "eva-packed-bf16-d128")
"""Families that every run of CI compiles for all targets."""


def launched(spec: KernelSpec, kind: str, target: str) -> KernelSpec:
    """Return the spec of a kernel as launches ask for it: ``dkv`` pools only where that is fast."""
    if kind == "dkv" and not fuses_pooling(spec.of_kind("dkv"), known_target(target)):
        spec = dataclasses.replace(spec, chunk_rule=None, parameters=0)
    return spec.of_kind(kind)  # pyright: ignore[reportArgumentType]


def specs(families: Iterable[str] = FAMILIES, target: str = "sm_90") -> dict[str, KernelSpec]:
    """Return the specs of some families, by a name for each kernel."""
    return {
        f"{name}-{kind}": launched(FAMILIES[name][0], kind, target)
        for name in families
        for kind in FAMILIES[name][1]
    }


def all_specs(target: str = "sm_90") -> dict[str, KernelSpec]:
    """Return many more: every head dimension, dtype, layout of rows, score change and rule."""
    sizes = [(d, d) for d in (16, 32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256)] + [(192, 128)]
    found = {}
    for (d, e), dtype in itertools.product(sizes, ("bf16", "fp16", "fp32")):
        found[f"{dtype}-d{d}-e{e}"] = base(dtype, d, e, **_TANGENT)
    pooled = {
        f"eva-{dtype}-d{d}-e{e}-{kind}": launched(base(dtype, d, e, **_EVA), kind, target)
        for (d, e), dtype in itertools.product(sizes, ("bf16", "fp16", "fp32"))
        for kind in ("chunk_tokens", "dkv", "dpool")
    }
    layouts = {"dense": {}, "padded": _PADDED, "packed": {"documents": "packed"}}
    layouts["holes"] = {"documents": "packed", "key_mask": True}
    sides = {"causal": {}, "bidirectional": {"causal": False}}
    for (a, layout), (b, side), window, sinks in itertools.product(
        layouts.items(), sides.items(), ("sliding", "block"), (0, 16)
    ):
        if side and layout.get("documents") == "packed":
            continue
        fields = {**layout, **side, "window": window, "sink_size": sinks}
        found[f"{a}-{b}-{window}-sinks{sinks}"] = base("bf16", 64, chunk_rule="mean", **fields)
    for score in ("alibi", "softcap", "dropout", "negative_scale"):
        found[score] = base("bf16", 64, chunk_rule="mean", **{score: True})
    for rule, count in (("mean", 0), ("tangent", 1), ("evabyte", 2), ("evabyte", 3), ("eva", 0)):
        found[f"{rule}{count}"] = base("bf16", 128, chunk_rule=rule, parameters=count)
    return pooled | {
        f"{name}-{kind}": launched(spec, kind, target)
        for name, spec in found.items()
        for kind in KINDS
        if not (kind == "dsink" and (not spec.sink_size or spec.documents == "packed"))
    }
