"""Attention calls as values: shapes, masks, options, their inputs, runs of op and reference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from flasheva_compile.kernels.reference.attention import eva_attention
from hypothesis import strategies as st

from flasheva_compile.ops import flasheva_attention

MASKS = ("none", "left_padding", "holes", "segments", "segments_with_holes")
RULES = ("mean", "tangent", "evabyte", "eva")


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One call; equal cases have equal inputs."""

    batch: int = 2
    kv_heads: int = 2
    group: int = 2
    queries: int = 21
    keys: int = 21
    head_dim: int = 8
    value_dim: int = 6
    window_size: int = 8
    chunk_size: int = 4
    sink_tokens: int = 3
    window: str = "sliding"
    causal: bool = True
    q_offset: int = 0
    softcap: float = 0.0
    alibi: bool = False
    mask: str = "none"
    rule: str = "tangent"
    with_parameters: bool = True
    seed: int = 0

    def _normal(self, stream: int, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 100 + stream)
        # Rounded to bf16 so that every precision starts from the same numbers.
        return torch.randn(shape, generator=generator).bfloat16().double()

    @cached_property
    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = self.kv_heads * self.group
        return (
            self._normal(1, self.batch, heads, self.queries, self.head_dim),
            self._normal(2, self.batch, self.kv_heads, self.keys, self.head_dim),
            self._normal(3, self.batch, self.kv_heads, self.keys, self.value_dim),
        )

    @cached_property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        if not self.with_parameters or self.rule == "mean":
            return ()
        h, d = self.kv_heads, self.head_dim
        feature_map = ((d, d), (d,), (d,), (d,))
        shapes = {
            "tangent": ((h, d),),
            "evabyte": ((h, d), (h, d), (h,)),
            "eva": feature_map + feature_map,
        }[self.rule]
        return tuple(self._normal(10 + i, *shape) for i, shape in enumerate(shapes))

    @cached_property
    def masks(self) -> dict[str, torch.Tensor | None]:
        key_mask = segment_ids = None
        noise = self._normal(4, self.batch, self.keys)
        if self.mask == "left_padding":
            # From no padding up to a row without any valid key.
            padding = self._normal(5, self.batch, 1).abs() * self.keys / 2
            key_mask = torch.arange(self.keys) >= padding
        if "holes" in self.mask:
            key_mask = noise > -0.5
        if "segments" in self.mask:
            segment_ids = (self._normal(6, self.batch, self.keys) > 1).cumsum(-1)
        return {"key_mask": key_mask, "segment_ids": segment_ids}

    @property
    def options(self) -> dict[str, object]:
        names = ("window_size", "chunk_size", "sink_tokens", "window", "causal", "q_offset")
        options = {name: getattr(self, name) for name in (*names, "softcap")}
        return {**options, "chunk_rule": self.rule, **self.masks}

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """Everything that has a gradient."""
        return (*self.qkv, *self.parameters)

    def run(self, function, dtype: torch.dtype, **options) -> list[torch.Tensor]:
        """Return out, lse and all gradients, for a fixed random gradient of ``out``."""
        leaves = [x.to(dtype).requires_grad_() for x in self.leaves]
        slopes = self._normal(7, self.kv_heads * self.group) / 8 if self.alibi else None
        slopes = None if slopes is None else slopes.to(dtype)
        out, lse = function(
            *leaves[:3], parameters=leaves[3:], alibi_slopes=slopes, **{**self.options, **options}
        )
        dout = self._normal(8, *out.shape).to(dtype)
        grads = torch.autograd.grad(out, leaves, dout, allow_unused=True)
        return [out.detach(), lse.detach()] + [
            torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
        ]

    def op(self, dtype: torch.dtype, **options) -> list[torch.Tensor]:
        return self.run(flasheva_attention, dtype, **options)

    def reference(self, dtype: torch.dtype) -> list[torch.Tensor]:
        return self.run(eva_attention, dtype)


@st.composite
def attention_cases(draw, *, masks=MASKS, rules=RULES, max_keys: int = 40, **fixed):
    """Draw cases that the op accepts; keyword arguments fix fields."""
    chunk_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    causal = fixed.get("causal", draw(st.booleans()))
    mask = draw(st.sampled_from([m for m in masks if causal or "segments" not in m]))
    keys = draw(st.integers(0 if mask == "none" else 1, max_keys))
    rule = draw(st.sampled_from(rules))
    queries, q_offset = keys, 0
    if causal and rule != "eva" and "queries" not in fixed and draw(st.booleans()):
        queries = draw(st.integers(0, keys if "segments" in mask else keys + 5))
        q_offset = keys - queries
    drawn = {
        "batch": draw(st.integers(1, 3)),
        "kv_heads": draw(st.integers(1, 2)),
        "group": draw(st.sampled_from([1, 3])),
        "queries": queries,
        "keys": keys,
        "chunk_size": chunk_size,
        "window_size": chunk_size * draw(st.integers(1, 5)),
        "sink_tokens": draw(st.sampled_from([0, 1, 5, 16])),
        "window": draw(st.sampled_from(["sliding", "block"])),
        "causal": causal,
        "q_offset": q_offset,
        "softcap": draw(st.sampled_from([0.0, 3.0])),
        "alibi": draw(st.booleans()),
        "mask": mask,
        "rule": rule,
        "with_parameters": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }
    return AttentionCase(**{**drawn, **fixed})
