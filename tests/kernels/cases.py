"""Calls of the generated kernels as values: attention cases with dtypes, strides, schedules."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from flasheva_compile.kernels.blocked.block import Operands
from flasheva_compile.kernels.blocked.dropout import keep_mask
from flasheva_compile.kernels.blocked.geometry import AttentionSettings
from flasheva_compile.kernels.reference import attention as reference
from flasheva_compile.kernels.reference.chunk_rules import chunk_tokens
from flasheva_compile.kernels.reference.positions import chunks_of, key_positions
from flasheva_compile.lowering import kernel_arguments, launch, launch_pooling, offline
from flasheva_compile.lowering.pooled_chunks import kernel_rule
from flasheva_compile.lowering.rows import rows_of
from flasheva_compile.lowering.spec import Schedule, adds_bias_by_product
from hypothesis import strategies as st
from torch import Tensor

from tests.attention_cases import MASKS, RULES, AttentionCase

DTYPES = tuple(kernel_arguments.DTYPES)
LAYOUTS = ("contiguous", "heads_last", "slice", "columns_last", "same_rows")
HEAD_DIMS = ((16, 16), (8, 8), (24, 24), (40, 40), (80, 80), (16, 40), (48, 16), (24, 112))
HEADS = ((1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 1, 3), (2, 2, 1), (1, 2, 2), (3, 1, 1), (1, 1, 4))
SMALLEST = Schedule(block_m=16, block_n=16, num_warps=4, num_stages=1)
OF_SPECIALISTS = ("overlap", "persistent")  # which no interpreter of Triton runs
SWITCHES = [
    f.name
    for f in dataclasses.fields(Schedule)
    if isinstance(f.default, bool) and f.name not in OF_SPECIALISTS
]
SPLITS = {"_PROGRAMS_IN_FLIGHT": (1, 4), "_QUERIES_PER_SINK_PROGRAM": (16, 1024)}
"""Constants of the launches that share a kernel's work out, and what to try for them."""


@dataclass(frozen=True, kw_only=True)
class KernelCase(AttentionCase):
    """One call; ``fused``: the gradient of pooling runs in the kernel of the keys."""

    dtype: torch.dtype = torch.float32
    scale: float | None = None
    dropout_p: float = 0.0
    layout: str = "contiguous"
    fused: bool = True
    splits: tuple[int, int] = (1, 1024)
    schedule: Schedule = SMALLEST

    @property
    def factor(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def slots(self) -> int:
        return -(-self.keys // self.chunk_size)

    @cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        if self.rule == "eva":  # the kernels take the features, not the maps
            shape = (self.batch, self.kv_heads, self.slots, self.head_dim)
            return tuple(self._normal(20 + i, *shape) for i in range(2))
        return super().parameters

    @cached_property
    def slopes(self) -> Tensor | None:
        return self._normal(7, self.kv_heads * self.group) / 8 if self.alibi else None

    @cached_property
    def dout(self) -> Tensor:
        return self._normal(8, *self.qkv[0].shape[:3], self.value_dim)

    @property
    def settings(self) -> AttentionSettings:
        names = ("window_size", "chunk_size", "window", "causal", "q_offset", "softcap")
        return AttentionSettings(
            sink_tokens=-(-self.sink_tokens // self.chunk_size) * self.chunk_size,
            scale=self.factor,
            dropout_p=self.dropout_p,
            **{name: getattr(self, name) for name in names},
        )

    @property
    def pooling(self) -> dict[str, object]:
        return {"rule": self.rule, "chunk_size": self.chunk_size, "scale": self.factor}

    def lay_out(self, x: Tensor) -> Tensor:
        """Return equal numbers with the case's strides, in NaN where the tensor has gaps."""
        x = x.to(self.dtype)
        if self.layout == "heads_last":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "columns_last":
            return x.mT.contiguous().mT
        if self.layout == "slice":
            b, h, n, d = x.shape
            whole = torch.full((b, h + 2, n + 3, d + 8), torch.nan, dtype=x.dtype)
            part = whole[:, 1 : h + 1, 2 : n + 2, 8:]
            return part.copy_(x)
        return x.clone()

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.layout != "same_rows":
            return super().qkv
        return tuple(x[:1].expand(self.batch, -1, -1, -1) for x in super().qkv)

    def inputs(self) -> list[Tensor]:
        """Return ``q, k, v, dout`` as the kernels get them."""
        if self.layout == "same_rows":
            return [x[:1].to(self.dtype).expand_as(x) for x in self.qkv] + [self.lay_out(self.dout)]
        return [self.lay_out(x) for x in (*self.qkv, self.dout)]


def one_row(case: KernelCase, b: int) -> KernelCase:
    """Return the call on row ``b`` alone."""
    alone = dataclasses.replace(case, batch=1)
    # The cached tensors of a frozen case: nothing computes them again.
    vars(alone).update(
        qkv=tuple(x[b : b + 1] for x in case.qkv),
        dout=case.dout[b : b + 1],
        masks={name: x if x is None else x[b : b + 1] for name, x in case.masks.items()},
        slopes=case.slopes,
    )
    per_chunk = case.rule == "eva"
    vars(alone)["parameters"] = tuple(p[b : b + 1] if per_chunk else p for p in case.parameters)
    return alone


@contextmanager
def as_scheduled(case: KernelCase):
    """Launch with the case's schedule; check that arguments have the types of offline compiles."""

    def choose(spec, *_):
        pointwise = spec.kind in ("chunk_tokens", "bias_columns", "dpool", "domega")
        plain = {"tma": False} if pointwise else {}
        if not adds_bias_by_product(spec):
            plain["product_bias"] = False
        return dataclasses.replace(case.schedule, **plain)

    def load(spec, schedule):
        kernel = launch_load(spec, schedule)

        def checked(programs, *arguments):
            for name, value in zip(kernel.generated.arguments, arguments, strict=True):
                if isinstance(value, Tensor) and name != "slopes_ptr":
                    declared = offline.argument_type(name, spec, schedule)
                    assert declared == POINTER_TYPES[value.dtype], f"{name}: {declared}"
            kernel.launch(programs, *arguments)

        return dataclasses.replace(kernel, launch=checked)

    launch_load = launch.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "choose", choose)
        patch.setattr(launch, "load", load)
        for name, value in zip(SPLITS, case.splits, strict=True):
            patch.setattr(launch, name, value)
        yield


POINTER_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}


def strided(x: Tensor) -> Tensor:
    """Return the same numbers with NaN between them: what a compiler may hand to a backward."""
    return torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]


def run_kernels(case: KernelCase) -> dict[str, Tensor]:
    """Pool, attend and differentiate on the generated kernels; results by name."""
    q, k, v, dout = case.inputs()
    parameters = tuple(p.to(case.dtype) for p in case.parameters)
    rows = rows_of(k, *case.masks.values(), chunk_size=case.chunk_size, alibi=case.alibi)
    with as_scheduled(case):
        rule = kernel_rule(case.rule, parameters)
        asked = ((q, k, v), case.settings, rows, rule)
        pooling = {"bias_columns": launch.reads_bias_columns(*asked, sloped=case.alibi)}
        pooling |= case.pooling
        tokens, pooled = launch_pooling.chunk_tokens_forward(k, v, parameters, rows, **pooling)
        pooled = pooled if case.fused else None
        seed = torch.tensor([case.seed * 0x123456789]) if case.dropout_p else None
        slopes = None if case.slopes is None else strided(case.slopes.float())
        named = dict(zip(("q", "k", "v", *TOKENS), (q, k, v, *tokens), strict=True))
        t = Operands(**named, alibi_slopes=slopes, dropout_seed=seed)
        out, lse = launch.attention_forward(t, rows, case.settings, pooled)
        result = (strided(out), strided(lse))
        grads = launch.attention_backward(dout, *result, t, rows, case.settings, pooled)
    names = [f"d{n}" for n in ("q", "k", "v", *TOKENS)] + [f"dp{n}" for n in range(2)]
    found = dict(zip(TOKENS, tokens, strict=True)) | {"out": out, "lse": lse}
    return found | dict(zip(names, grads, strict=False))


TOKENS = ("rfa_k", "rfa_v", "rfa_bias")


def run_formula(case: KernelCase, dtype: torch.dtype) -> dict[str, Tensor]:
    """Do the same with the reference and autograd, in any dtype."""
    leaves = [x.to(dtype).requires_grad_() for x in (*case.qkv, *case.parameters)]
    (q, k, v), parameters = leaves[:3], leaves[3:]
    tokens = reference_tokens(case, k, v, parameters)
    # What is added here gets the gradient of the tokens, constant or not.
    probes = [torch.zeros_like(x).requires_grad_() for x in tokens]
    used = [(x if case.fused else x.detach()) + y for x, y in zip(tokens, probes, strict=True)]
    names = ("window_size", "chunk_size", "sink_tokens", "window", "causal", "q_offset", "softcap")
    options = {name: getattr(case, name) for name in names}
    slopes = None if case.slopes is None else case.slopes.to(dtype)
    with dropping(case):
        out, lse = reference.eva_attention_from_chunk_tokens(
            *(q, k, v, *used), scale=case.factor, alibi_slopes=slopes, **options, **case.masks
        )
    inputs = [q, k, v, *probes, *parameters]
    grads = torch.autograd.grad(out, inputs, case.dout.to(dtype), allow_unused=True)
    names = [f"d{n}" for n in ("q", "k", "v", *TOKENS)] + [f"dp{n}" for n in range(len(parameters))]
    found = dict(zip(TOKENS, tokens, strict=True)) | {"out": out, "lse": lse}
    found |= {
        name: torch.zeros_like(x) if g is None else g
        for name, x, g in zip(names, inputs, grads, strict=True)
    }
    return {name: x.detach() for name, x in found.items()}


def reference_tokens(case: KernelCase, k: Tensor, v: Tensor, parameters) -> tuple[Tensor, ...]:
    members = chunks_of(key_positions(k, **case.masks), case.chunk_size).members
    options = {"rule": case.rule, "scale": case.factor}
    return chunk_tokens(k, v, members, parameters=parameters, **options)


@contextmanager
def dropping(case: KernelCase):
    """Give the reference the case's dropout."""
    if not case.dropout_p:
        yield
        return
    ids = [torch.arange(case.slots) * 2 + 1, torch.arange(case.keys) * 2]
    keep = keep_mask(
        torch.tensor([case.seed * 0x123456789]),
        torch.arange(case.batch),
        torch.arange(case.kv_heads * case.group),
        case.q_offset + torch.arange(case.queries),
        torch.cat(ids)[None],
        case.dropout_p,
    )
    factor = keep / (1 - case.dropout_p)

    def attend(scores, seen, values):
        # Softmax times values is linear in the values, so the weights are its value at the unit.
        unit = torch.eye(scores.shape[-1], dtype=values.dtype)
        weights, lse = plain(scores, seen, unit)
        return (weights * factor.to(values.dtype)) @ values, lse

    plain = reference.masked_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "masked_attention", attend)
        yield


def compared(case: KernelCase) -> list[str]:
    """Return the names of the results that a case defines."""
    names = [*TOKENS, "out", "lse", "dq", "dk", "dv", "drfa_k", "drfa_v"]
    learned = kernel_rule(case.rule, case.parameters) in ("evabyte", "tangent")
    if learned or not case.fused:
        names.append("drfa_bias")  # elsewhere a constant, whose gradient nobody uses
    if case.rule == "eva" and case.fused:
        names += ["dp0", "dp1"]
    if learned and case.fused:  # evabyte's third parameter gets drfa_bias, summed
        names += [f"dp{n}" for n in range(min(2, len(case.parameters)))]
    return names


@st.composite
def schedules(draw):
    """Draw a schedule; a new switch of ``Schedule`` is drawn too."""
    return Schedule(
        block_m=draw(st.sampled_from([16, 32])),
        block_n=draw(st.sampled_from([16, 32])),
        num_warps=4,
        num_stages=1,
        max_registers=draw(st.sampled_from([0, 128])),
        **{name: draw(st.booleans()) for name in SWITCHES},
    )


@st.composite
def kernel_cases(draw, *, masks=MASKS, rules=RULES, max_keys: int = 90, **fixed):
    """Draw cases that the ops accept; keyword arguments fix fields."""
    chunk_size = draw(st.sampled_from([4, 1, 2, 3, 8, 12, 16]))
    causal = fixed.get("causal", draw(st.booleans()))
    mask = draw(st.sampled_from([m for m in masks if causal or "segments" not in m]))
    keys = draw(st.integers(1, max_keys))
    rule = draw(st.sampled_from(rules))
    queries, q_offset = keys, 0
    if causal and rule != "eva" and draw(st.booleans()):
        queries = draw(st.integers(0, keys if "segments" in mask else keys + 5))
        q_offset = keys - queries
        if "segments" not in mask:
            q_offset += draw(st.sampled_from([0, 0, 3, 40, -3]))
    batch, kv_heads, group = draw(st.sampled_from(HEADS))
    head_dim, value_dim = draw(st.sampled_from(HEAD_DIMS))
    drawn = {
        "batch": batch,
        "kv_heads": kv_heads,
        "group": group,
        "queries": queries,
        "keys": keys,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "chunk_size": chunk_size,
        "window_size": chunk_size * draw(st.integers(1, 5)),
        "sink_tokens": draw(st.sampled_from([0, 1, 5, 20])),
        "window": draw(st.sampled_from(["sliding", "block"])),
        "causal": causal,
        "q_offset": q_offset,
        "softcap": draw(st.sampled_from([0.0, 3.0])),
        "alibi": draw(st.booleans()),
        "mask": mask,
        "rule": rule,
        "with_parameters": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "scale": draw(st.sampled_from([None, None, -0.3, 0.0])),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.3, 0.75])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "fused": draw(st.booleans()),
        "splits": tuple(draw(st.sampled_from(values)) for values in SPLITS.values()),
        "schedule": draw(schedules()),
    }
    return KernelCase(**{**drawn, **fixed})
