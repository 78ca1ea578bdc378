"""fp8 in kernels that attend to a cache of codes: softmax and sums with powers of two apart.

Tiles hold numbers without the powers of two of their tokens: those multiply scores and weights. A
weight with its power may have any size, and therefore has a maximum of its own: what is rounded to
fp16 is relative to the largest share in the sum of values. That maximum is rounded up to an
integer, so that differences from powers are exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit.decode import LOWEST
from flasheva_compile.lowering.emit.fp8_tokens import LOST
from flasheva_compile.lowering.emit.vecinfer_fp8_tiles import TINY_BITS, key_channel

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec_vecinfer import VecInferSpec


def coded_queries(spec: VecInferSpec) -> list[str]:
    """Load ``q`` for products with coded keys, in [-1, 1], and define what it was divided by."""
    channel = key_channel(spec.keys, "offs_q")
    bound = "" if spec.keys.padded == spec.head_dim else f" & (channel < {spec.head_dim})[None, :]"
    return [
        f"channel = {channel}",
        "at = q_rows + q_row[:, None] + channel[None, :]",
        f"q = tl.load(at, mask=is_query[:, None]{bound}, other=0.0).to(tl.float32)",
        "q_scale = tl.exp2(tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(q), 1), 1e-30))))",
        f"q = (q * (1.0 / q_scale)[:, None]).to(tl.{_FLOATS[spec.coded_dtype]})",
        f"q_scale *= score_scale * {1 << TINY_BITS}.0",
        f"top = tl.full([BLOCK_M], {LOWEST}, tl.float32)",
    ]


def exponents(inside: str | None) -> list[str]:
    """Load the exponents of a tile of tokens."""
    guard = f", mask={inside}, other=0" if inside else ""
    lost = f'tl.where({{0}}_power > {LOST}.0, {{0}}_power, float("nan"))'
    return [
        "pairs_ptr = exponents_ptr.to(tl.pointer_type(tl.int16))",
        f"powers = tl.load(pairs_ptr + offset + offs_t{guard})",
        "key_power = (powers << 8 >> 8).to(tl.float32)",
        "value_power = (powers >> 8).to(tl.float32)",
        *(f"{which}_power = {lost.format(which)}" for which in ("key", "value")),
    ]


def softmax(spec: VecInferSpec, bounds: list[str]) -> list[str]:
    """Go on with the softmax by products ``s``; ``top`` is the maximum of weights with powers."""
    lines = ["s = s * tl.exp2(key_power)[None, :] * q_scale[:, None]"]
    if spec.softcap:
        lines.append("s = (1.0 - 2.0 / (tl.exp2(s) + 1.0)) * softcap")
    return [
        *lines,
        *(f's = tl.where({bound}, s, float("-inf"))' for bound in bounds),
        "m_new = tl.maximum(m_i, tl.max(s, 1))",
        "l_i = l_i * tl.exp2(m_i - m_new) + tl.sum(tl.exp2(s - m_new[:, None]), 1)",
        "m_i = m_new",
        "top_new = tl.maximum(top, tl.ceil(tl.max(s + value_power[None, :], 1)))",
        "sums *= tl.exp2(top - top_new)[:, None]",
        "p = tl.exp2(s - (top_new[:, None] - value_power[None, :]))",
        f"p = p.to(tl.{_FLOATS[spec.coded_dtype]})",
        "top = top_new",
    ]


def scaled_sums() -> list[str]:
    """Multiply sums by what makes them fit the maximum of the weights alone."""
    return [
        "whole = tl.floor(m_i)",
        f"sums *= (tl.exp2(top - whole + {TINY_BITS}.0) * tl.exp2(whole - m_i))[:, None]",
    ]


_FLOATS = {"fp16": "float16", "fp32": "float32"}
