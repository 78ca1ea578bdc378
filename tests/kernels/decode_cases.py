"""Sequences of generation as values: a filled cache, then one token after the other."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import pytest
import torch
from flasheva_compile.kernels.blocked import cache as blocked
from flasheva_compile.kernels.blocked.cache_state import CacheState
from flasheva_compile.kernels.reference.attention import eva_attention
from flasheva_compile.lowering import launch_decode, offline
from flasheva_compile.lowering.pooled_chunks import kernel_rule
from flasheva_compile.lowering.spec import Schedule
from hypothesis import strategies as st
from torch import Tensor

from flasheva_compile import cache_ops
from tests.kernels.cases import DTYPES, HEAD_DIMS, HEADS, POINTER_TYPES, strided

if TYPE_CHECKING:
    from flasheva_compile.kernels.blocked.geometry import AttentionSettings

RULES = (
    ("mean", 0),
    ("tangent", 0),
    ("tangent", 1),
    ("evabyte", 0),
    ("evabyte", 2),
    ("evabyte", 3),
    ("eva", 0),
    ("eva", 8),
)
MASKS = ("none", "left_padding", "holes", "padded_prefix")
LAYOUTS = ("contiguous", "slice", "columns_last")


@dataclass(frozen=True, kw_only=True)
class DecodeCase:
    """``prefix`` tokens that plain PyTorch appends, then ``steps`` tokens one by one.

    ``padded_prefix``: masked tokens in the prefix alone; the steps get no mask.
    """

    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 16
    value_dim: int = 16
    window_size: int = 8
    chunk_size: int = 4
    sink_tokens: int = 4
    window: str = "sliding"
    rule: str = "mean"
    parameter_count: int = 0
    softcap: float = 0.0
    scale: float = 0.3
    mask: str = "none"
    prefix: int = 0
    steps: int = 9
    spare_chunks: int = 0
    dtype: torch.dtype = torch.float32
    fp8_chunks: bool = False
    alibi: bool = False
    e4m3: bool = False
    layout: str = "contiguous"
    block_n: int = 16
    splits: int = 1
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.prefix + self.steps

    @property
    def chunks(self) -> int:
        return self.tokens // self.chunk_size + self.spare_chunks

    @property
    def options(self) -> dict[str, object]:
        names = ("rule", "window_size", "chunk_size", "sink_tokens", "window", "scale", "softcap")
        return {name: getattr(self, name) for name in names}

    @property
    def settings(self) -> AttentionSettings:
        return cache_ops.cache_settings(self.options)

    def _normal(self, stream: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 100 + stream)
        # Rounded to bf16 so that every precision starts from the same numbers.
        return torch.randn(shape, generator=generator).bfloat16().double()

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        q_heads, kv = self.kv_heads * self.group, (self.batch, self.kv_heads, self.tokens)
        q = self._normal(1, self.batch, q_heads, self.tokens, self.head_dim)
        return q, self._normal(2, *kv, self.head_dim), self._normal(3, *kv, self.value_dim)

    @cached_property
    def parameters(self) -> list[Tensor]:
        size = self.head_dim
        shapes = ((self.kv_heads, size),) * 2 + ((self.kv_heads,),)
        if self.rule == "eva":
            shapes = 2 * ((size, size), (size,), (size,), (size,))
        return [self._normal(10 + i, *shapes[i]) for i in range(self.parameter_count)]

    @cached_property
    def slopes(self) -> Tensor | None:
        slopes = self._normal(7, self.kv_heads * self.group) / 8
        return slopes.float() if self.alibi else None

    @property
    def strided_slopes(self) -> Tensor | None:
        """The same with NaN between them, as kernels get them."""
        return None if self.slopes is None else strided(self.slopes)

    def parameters_in(self, dtype: torch.dtype) -> list[Tensor]:
        """Return a layer's parameters in this dtype; feature maps stay in fp32, as modules do."""
        dtype = torch.promote_types(dtype, torch.float32) if self.rule == "eva" else dtype
        return [p.to(dtype) for p in self.parameters]

    @cached_property
    def key_mask(self) -> Tensor | None:
        """``[B, N]``; all tokens of the steps are valid after a padded prefix."""
        if self.mask == "none":
            return None
        if self.mask == "holes":
            return self._normal(4, self.batch, self.tokens) > -0.3
        padding = (self._normal(5, self.batch, 1).abs() * self.tokens / 2).long()
        padding[0] = 0 if self.batch > 1 else padding[0]
        if self.mask == "padded_prefix":
            padding = padding.clamp(max=self.prefix)
        return torch.arange(self.tokens) >= padding

    def mask_of(self, part: slice) -> Tensor | None:
        given = self.key_mask is not None
        by_step = given and not (self.mask == "padded_prefix" and part.start >= self.prefix)
        return self.key_mask[:, part] if by_step else None

    def new_state(self, dtype: torch.dtype) -> CacheState:
        _, k, v = self.qkv
        kv, kinds = (k.to(dtype), v.to(dtype)), {"fp8_chunks": self.fp8_chunks, "alibi": self.alibi}
        return cache_ops.new_state(*kv, self.chunks, self.options, **kinds)

    def pool(self, dtype: torch.dtype):
        return partial(cache_ops.pool_chunks, self.parameters_in(dtype), self.options)

    def filled_state(self, dtype: torch.dtype) -> CacheState:
        """Return the state after the prefix."""
        state = self.new_state(dtype)
        if self.prefix:
            part = slice(0, self.prefix)
            q, k, v = (x[:, :, part].to(dtype) for x in self.qkv)
            new = (cache_ops._group_mean(q, k), k, v)
            blocked.cache_append(new, self.mask_of(part), state, self.pool(dtype), self.settings)
        return state

    def lay_out(self, x: Tensor) -> Tensor:
        """Return equal numbers with the case's strides, in NaN where the tensor has gaps."""
        if self.layout == "columns_last":
            return x.mT.contiguous().mT
        if self.layout == "slice":
            b, h, n, d = x.shape
            whole = torch.full((b, h + 2, n + 3, d + 8), torch.nan, dtype=x.dtype)
            return whole[:, 1 : h + 1, 2 : n + 2, 8:].copy_(x)
        return x


def steps_of(case: DecodeCase, dtype: torch.dtype):
    """Yield ``q, k, v, key_mask`` of each step, as views of the whole sequence."""
    q, k, v = (case.lay_out(x.to(dtype)) for x in case.qkv)
    for at in range(case.prefix, case.tokens):
        part = slice(at, at + 1)
        yield q[:, :, part], k[:, :, part], v[:, :, part], case.mask_of(part)


def run_blocked(case: DecodeCase, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[CacheState]]:
    """Return ``out`` and ``lse`` of all steps and the state after each, in plain PyTorch."""
    state, found, states = case.filled_state(dtype), [], []
    for q, k, v, mask in steps_of(case, dtype):
        new = (cache_ops._group_mean(q, k), k, v)
        given = (mask, state, case.pool(dtype), case.settings, case.slopes)
        found.append(blocked.decode(q, new, *given))
        states.append(CacheState(*(x.clone() for x in state)))
    return *(torch.cat(x, 2) for x in zip(*found, strict=True)), states


def run_kernels(
    case: DecodeCase, state: CacheState | None = None
) -> tuple[Tensor, Tensor, list[CacheState]]:
    """Do the same on the generated kernels."""
    state = state or case.filled_state(case.dtype)
    parameters = tuple(case.parameters_in(case.dtype))
    rule, found, states = kernel_rule(case.rule, parameters), [], []
    with as_scheduled(case):
        for q, k, v, mask in steps_of(case, case.dtype):
            given = (mask, parameters, state, case.settings, rule, case.strided_slopes)
            found.append(launch_decode.decode(q, k, v, *given))
            states.append(CacheState(*(x.clone() for x in state)))
    return *(torch.cat(x, 2) for x in zip(*found, strict=True)), states


def run_reference(case: DecodeCase, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``out`` and ``lse`` of the steps from the whole sequence at once."""
    options = {n: x for n, x in case.options.items() if n != "rule"}
    out, lse = eva_attention(
        *(x.to(dtype) for x in case.qkv),
        chunk_rule=case.rule,
        parameters=[p.to(dtype) for p in case.parameters],
        key_mask=case.key_mask,
        alibi_slopes=case.slopes,
        **options,
    )
    return out[:, :, case.prefix :], lse[:, :, case.prefix :]


@contextmanager
def as_scheduled(case: DecodeCase):
    """Launch with the case's tiles and parts; check argument types against offline compiles."""
    tiles = {"block_m": 16, "block_n": case.block_n, "num_warps": 4, "num_stages": 1}
    schedule = Schedule(**tiles, e4m3=case.e4m3, dependent=True)
    types = {**POINTER_TYPES, torch.bool: "*i1"}

    def checking(kernel):
        def launch(programs, *arguments):
            for name, value in zip(kernel.generated.arguments, arguments, strict=True):
                if isinstance(value, Tensor):
                    declared = offline.argument_type(name, kernel.generated.spec, schedule)
                    assert declared == types[value.dtype], f"{name}: {declared}"
            kernel.launch(programs, *arguments)

        return launch

    def load(spec, chosen):
        kernel = loaded(spec, chosen)
        return type(kernel)(
            generated=kernel.generated,
            path=kernel.path,
            launch=checking(kernel),
            function=kernel.function,
        )

    loaded = launch_decode.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_decode, "choose", lambda *_: schedule)
        patch.setattr(launch_decode, "load", load)
        patch.setattr(launch_decode, "parts_of", lambda *_: case.splits)
        launch_decode._plan.cache_clear()
        try:
            yield
        finally:
            launch_decode._plan.cache_clear()


@st.composite
def decode_cases(draw, **fixed):
    """Draw cases that the op accepts; keyword arguments fix fields."""
    chunk_size = draw(st.sampled_from([4, 1, 2, 3, 8, 20]))
    batch, kv_heads, group = draw(st.sampled_from([*HEADS, (1, 1, 17)]))
    head_dim, value_dim = draw(st.sampled_from(HEAD_DIMS))
    rule, count = draw(st.sampled_from(RULES))
    prefix = draw(st.integers(0, 70))
    drawn = {
        "batch": batch,
        "kv_heads": kv_heads,
        "group": group,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "chunk_size": chunk_size,
        "window_size": chunk_size * draw(st.integers(1, 5)),
        "sink_tokens": chunk_size * draw(st.integers(0, 3)),
        "window": draw(st.sampled_from(["sliding", "block"])),
        "rule": rule,
        "parameter_count": count,
        "softcap": draw(st.sampled_from([0.0, 3.0])),
        "scale": draw(st.sampled_from([0.3, 0.3, -0.3, 0.0])),
        "mask": draw(st.sampled_from(MASKS)),
        "prefix": prefix,
        "steps": draw(st.integers(1, 5)),
        "spare_chunks": draw(st.sampled_from([0, 0, 5])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "alibi": draw(st.booleans()),
        "e4m3": draw(st.booleans()) if fixed.get("fp8_chunks") else False,
        "layout": draw(st.sampled_from(LAYOUTS)),
        "block_n": draw(st.sampled_from([16, 32])),
        "splits": draw(st.sampled_from([1, 2, 3])),
        "seed": draw(st.integers(0, 1000)),
    }
    return DecodeCase(**{**drawn, **fixed})
