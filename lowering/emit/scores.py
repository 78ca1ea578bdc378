"""From products to scores in base 2: scale, softcap, bias, ALiBi, mask, dropout; to weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from flasheva_compile.lowering.emit.loops import Mask
    from flasheva_compile.lowering.emit.source import Dim
    from flasheva_compile.lowering.spec import KernelSpec

KeySource = Literal["chunk", "key"]

LOG2E = "1.4426950408889634"

DROPOUT_FUNCTIONS = '''\
@triton.jit
def mix(x):
    """Scramble 32-bit words (lowbias32 of Chris Wellons)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout_state(seed_ptr, b, h, query_column):
    """Hash everything that decides about dropout but the key."""
    seed = tl.load(seed_ptr)
    state = mix(seed.to(tl.uint32) ^ mix((seed >> 32).to(tl.uint32)))
    state = mix(state ^ b.to(tl.uint32))
    state = mix((state + 0x9E3779B9) ^ h.to(tl.uint32))
    return mix((state + 0x9E3779B9) ^ query_column.to(tl.uint32))
'''


def precision(spec: KernelSpec) -> str:
    """Return the precision argument of a product; fp32 is exact unless TF32 was asked for."""
    if spec.dtype != "fp32":
        return ""
    return f', input_precision="{"tf32" if spec.tf32 else "ieee"}"'


def is_plain(spec: KernelSpec, source: KeySource, *, product_bias: bool = False) -> bool:
    """Whether a score is a positive multiple of the product, so that maxima commute with it."""
    unbiased = source == "key" or spec.whole_chunks or product_bias
    return unbiased and not (spec.softcap or spec.alibi or spec.negative_scale)


def constant_bias(spec: KernelSpec, source: KeySource) -> str:
    """Return the bias that all chunk tokens share, times ``log2(e)``, as text to subtract."""
    shared = source == "chunk" and spec.whole_chunks
    return f" - {math.log2(spec.chunk_size)!r}" if shared else ""


def mask_text(mask: Mask, flags: str | None, *, keys_first: bool) -> str | None:
    """Return the conjunction of a tile's conditions; ``flags`` is a vector of valid keys."""
    terms = [term.text(keys_first=keys_first) for term in mask]
    if flags is not None:
        terms.append(f"{flags}{'[:, None]' if keys_first else '[None, :]'}")
    return " & ".join(terms) or None


def scores(
    spec: KernelSpec,
    source: KeySource,
    *,
    keys_first: bool,
    product_bias: bool = False,
    scale: str = "score_scale",
) -> list[str]:
    """Turn ``s`` into scores times ``log2(e)``; with a softcap, ``tanh`` stays for the backward."""
    key, query = ("[:, None]", "[None, :]") if keys_first else ("[None, :]", "[:, None]")
    lines = []
    if spec.softcap:
        lines.append(f"tanh = 1.0 - 2.0 / (tl.exp2(s * {scale}) + 1.0)")
        value = "tanh * softcap"
    else:
        value = f"s * {scale}"
    if source == "chunk" and not spec.whole_chunks and not product_bias:
        value += f" + bias{key}"
    if spec.alibi:
        value += f" + slope * (key_position{key} - query_position{query})"
    return [*lines, f"s = {value}"]


def masked(text: str | None) -> list[str]:
    """Put ``-inf`` where nothing may be attended."""
    return [f"visible = {text}", 's = tl.where(visible, s, float("-inf"))'] if text else []


def masked_weights(text: str | None) -> list[str]:
    """Zero the weights of what may not be attended; cheaper than masking scores before."""
    return [f"visible = {text}", "p = tl.where(visible, p, 0.0)"] if text else []


def keep(spec: KernelSpec, source: KeySource, *, keys_first: bool) -> list[str]:
    """Define ``keep``, the weights that dropout leaves."""
    if not spec.dropout:
        return []
    padded = spec.documents == "padded"
    if source == "chunk":
        number = "((offs_n + first_slot) * 2 + 1)" if padded else "(offs_n * 2 + 1)"
    else:
        number = "((offs_n + start) * 2)" if padded else "(offs_n * 2)"
    key, query = ("[:, None]", "[None, :]") if keys_first else ("[None, :]", "[:, None]")
    return [
        f"word = {number}.to(tl.uint32) * 0x9E3779B9",
        f"keep = mix(state{query} + word{key}) >= drop_below.to(tl.uint32)",
    ]


def key_position(
    spec: KernelSpec, source: KeySource, load: str = "", position: str = "offs_n"
) -> list[str]:
    """Define the position of each key or chunk token that ALiBi measures from.

    ``load`` reads those of chunk tokens, ``position`` are those of keys.
    """
    if not spec.alibi:
        return []
    if source == "key":
        return [f"key_position = {position}.to(tl.float32)"]
    shift = " - start" if spec.documents == "padded" else ""
    return [f"key_position = {load}{shift}"]


def cached_position(spec: KernelSpec, source: KeySource, position: str = "offs_n") -> list[str]:
    """Do the same in a kernel over a cache, which keeps the positions of chunk tokens."""
    load = "tl.load(chunk_mean_ptr + offs_n, mask=inside, other=0.0)"
    return key_position(spec, source, load, position)


def cached_slopes(spec: KernelSpec, heads: str, bound: str | None, position: str) -> list[str]:
    """Define slopes and positions of the rows of a tile, for a kernel over a cache.

    Args:
        spec: What the kernel computes.
        heads: Their query heads.
        bound: Which of them exist; None = all.
        position: Their positions.
    """
    if not spec.alibi:
        return []
    guard = f", mask={bound}, other=0.0" if bound else ""
    return [
        f"slope = tl.load(slopes_ptr + {heads}{guard})",
        f"slope = (slope * {LOG2E})[:, None]",
        f"query_position = {position}",
    ]


def exact_position(spec: KernelSpec) -> str:
    """Return the positions of a tile of exact slots, of which ``held`` are those in the ring."""
    if spec.window == "whole":
        return "offs_n"
    return f"tl.where(offs_n < {spec.sink_size}, offs_n, held)" if spec.sink_size else "held"


# --- weights --------------------------------------------------------------------------------------


def softmax_weights() -> list[str]:
    """Go on with the softmax by the scores ``s``: weights ``p``, factor ``alpha`` of older sums."""
    return [
        "m_new = tl.maximum(m_i, tl.max(s, 1))",
        "p = tl.exp2(s - m_new[:, None])",
        "alpha = tl.exp2(m_i - m_new)",
        "l_i = l_i * alpha + tl.sum(p, 1)",
        "m_i = m_new",
    ]


def softmax_step(e: Dim, values: str = "v_ptr") -> list[str]:
    """Go on with the softmax and scale sums; leave weights ``p`` in the dtype of values."""
    return [
        *softmax_weights(),
        *e.scale("acc", "alpha[:, None]"),
        f"p = p.to({values}.dtype.element_ty)",
    ]
