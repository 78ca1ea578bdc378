"""Chunk tokens of a cache in kernels: as they are, or in fp8 with a power of two for each vector.

As in ``vecinfer_fp8``, kernels move bits instead of converting e4m3: one code for all devices. A
key's power multiplies its scores; a value's multiplies the value, for a weight times any power
would not fit fp16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import scores
from flasheva_compile.lowering.emit.fp8_tokens import LOST, codes_of, within_fp16

if TYPE_CHECKING:
    from flasheva_compile.lowering.emit.source import Dim
    from flasheva_compile.lowering.spec import KernelSpec


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


def key_tile(spec: KernelSpec, d: Dim) -> list[str]:
    """Load the keys ``inside`` a tile, ``k0``, ..., and biases; of fp8, both vectors' powers."""
    bias = (
        f'bias = tl.load(rfa_bias_ptr + offs_n, mask=inside, other=float("-inf")) * {scores.LOG2E}'
    )
    loads = d.load_tile("k", "rfa_k_ptr", "inside")
    if not spec.fp8_chunks:
        return [*loads, bias]
    return [
        *loads,
        *(line for n in d.indices for line in _numbers(spec, f"k{n}", "q_ptr")),
        *_powers("key", 0),
        *_powers("value", 1),
        bias,
    ]


def scaled_products(spec: KernelSpec) -> list[str]:
    """Multiply products ``s [rows, BLOCK_N]`` by the powers of their keys."""
    return ["s = s * key_power[None, :]"] if spec.fp8_chunks else []


def value_tile(spec: KernelSpec, e: Dim) -> list[str]:
    """Load the values ``inside`` a tile, ``v0``, ..."""
    lines = e.load_tile("v", "rfa_v_ptr", "inside")
    if spec.fp8_chunks:
        for n in e.indices:
            lines += _numbers(spec, f"v{n}", "v_ptr", "value_power")
    return lines


def _numbers(spec: KernelSpec, tile: str, like: str, power: str = "") -> list[str]:
    """Make numbers of bytes, in the dtype of ``like``: exactly, for their mantissas are short."""
    # Exponents and mantissas go to the middle of a half, whose exponents have another origin.
    half = f"((({tile} & 0x7F) << 7) | (({tile} & 0x80) << 8))"
    lines = [
        f"{tile} = {tile}.to(tl.int16)",
        f"{tile} = {half}.to(tl.float16, bitcast=True) * 256.0",
    ]
    if power:
        lines.append(f"{tile} = {tile}.to(tl.float32) * {power}[:, None]")
        lines += within_fp16(tile) if spec.dtype == "fp16" else []
    return [*lines, f"{tile} = {tile}.to({like}.dtype.element_ty)"]


def _powers(which: str, place: int) -> list[str]:
    at = f"rfa_exponents_ptr + offs_n * 2{' + 1' * place}"
    return [
        f"exponent = tl.load({at}, mask=inside, other=0).to(tl.int32)",
        f"{which}_power = ((exponent + 127) << 23).to(tl.float32, bitcast=True)",
        f'{which}_power = tl.where(exponent > {LOST}, {which}_power, float("nan"))',
    ]


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
