"""Chunk tokens of a cache in kernels: as they are, or in fp8 with a power of two per vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import fp8_products, scores
from flasheva_compile.lowering.emit.fp8_tokens import codes_of

if TYPE_CHECKING:
    from flasheva_compile.lowering.emit.source import Dim
    from flasheva_compile.lowering.spec import KernelSpec, Schedule


def chunk_pointers(spec: KernelSpec) -> list[str]:
    """Move the pointers of the chunk tokens to row ``b`` and head ``hk``."""
    return [
        "chunk_row = bh64 * chunks",
        f"rfa_k_ptr += chunk_row * {spec.head_dim}",
        f"rfa_v_ptr += chunk_row * {spec.value_dim}",
        "rfa_bias_ptr += chunk_row",
        *(["rfa_exponents_ptr += chunk_row * 2"] if spec.fp8_chunks else []),
        *(["chunk_mean_ptr += b64 * chunks"] if spec.alibi else []),
    ]


# --- reading --------------------------------------------------------------------------------------


def before_chunks(spec: KernelSpec, d: Dim, e: Dim, rows: str) -> list[str]:
    """Start sums over the chunk tokens from ``begin`` to ``stop``, for a tile of ``rows`` rows."""
    if not spec.fp8_chunks:
        return e.zeros("acc", rows)
    cast = "value_pairs_ptr = rfa_v_ptr.to(tl.pointer_type(tl.int16))"
    return [
        *fp8_products.start(spec, d, e, rows),
        *([cast] if fp8_products.pairs_of(e) else []),
        "pairs_ptr = rfa_exponents_ptr.to(tl.pointer_type(tl.int16))",
        *_load_exponents("begin + offs_t"),
    ]


def chunk_tile(
    spec: KernelSpec, schedule: Schedule, d: Dim, e: Dim, visible: str | None = None
) -> list[str]:
    """Go on with softmax and sums by a tile of chunk tokens.

    Args:
        spec: What the kernel computes.
        schedule: How fp8 becomes numbers.
        d: Columns of keys.
        e: Columns of values.
        visible: Which of them rows see, ``[rows, BLOCK_N]``; None = all before ``stop``.
    """
    bias = 'tl.load(rfa_bias_ptr + offs_n, mask=inside, other=float("-inf"))'
    lines = ["offs_n = offset + offs_t", "inside = offs_n < stop"]
    lines += d.load_tile("k", "rfa_k_ptr", "inside")
    lines.append(f"bias = {bias} * {scores.LOG2E}")
    if spec.fp8_chunks:
        lines += fp8_products.powers(schedule, "pairs")
        lines.append("# Two bytes a token are too few to be copied ahead: asked for a tile before")
        lines += _load_exponents("offs_n + BLOCK_N")
        lines += fp8_products.keys(spec, schedule)
        scale = fp8_products.SCALE
    else:
        lines += d.contract("s", "q", "k", scores.precision(spec))
        scale = "score_scale"
    lines += scores.cached_position(spec, "chunk")
    lines += scores.scores(spec, "chunk", keys_first=False, scale=scale)
    lines += scores.masked(visible)
    if not spec.fp8_chunks:
        values = e.load_tile("v", "rfa_v_ptr", "inside")
        sums = e.accumulate("acc", "p", "v", scores.precision(spec))
        return [*lines, *scores.softmax_step(e), *values, *sums]
    pairs = fp8_products.pairs_of(e)
    values = (pairs or e).load_tile("v", "value_pairs_ptr" if pairs else "rfa_v_ptr", "inside")
    sums = fp8_products.values(spec, schedule, e)
    return [*lines, *fp8_products.softmax(spec), *values, *sums]


def after_chunks(spec: KernelSpec, e: Dim) -> list[str]:
    """Define the sums of values ``acc0``, ... for the maximum ``m_i``."""
    return fp8_products.finish(e) if spec.fp8_chunks else []


def _load_exponents(at: str) -> list[str]:
    return [f"pairs = tl.load(pairs_ptr + {at}, mask={at} < stop, other=0)"]


# --- writing --------------------------------------------------------------------------------------


def store_chunk_token(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    """Store the chunk token ``chunk64`` from its fp32 key ``sk0``, ... and value ``sv0``, ..."""
    key, value = f"rfa_k_ptr + chunk64 * {d.size}", f"rfa_v_ptr + chunk64 * {e.size}"
    if not spec.fp8_chunks:
        return [*d.store_row("sk", key), *e.store_row("sv", value)]
    return [*_store_codes(d, "k", key, 0), *_store_codes(e, "v", value, 1)]


def _store_codes(dim: Dim, name: str, pointer: str, place: int) -> list[str]:
    assert len(dim.indices) == 1  # the largest number is that of the whole vector
    return [
        "# As it would be stored, then to fp8",
        f"pooled = s{name}0.to({name}_ptr.dtype.element_ty)",
        *codes_of("pooled"),
        "code0 = code.to(tl.uint8)",
        *dim.store_row("code", pointer),
        f"exponents = rfa_exponents_ptr + chunk64 * 2{' + 1' * place} + tl.arange(0, 1)",
        "tl.store(exponents, exponent.to(tl.int8))",
    ]
