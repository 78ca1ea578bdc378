"""Text of fp8 tokens, the formulas of ``kernels/blocked/fp8.py``: one to bytes, a tile to numbers.

All of it moves bits: exactly, and in the same way on all devices, whether they know e4m3 or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flasheva_compile.lowering.emit.source import Dim
    from flasheva_compile.lowering.spec import KernelSpec

LOST = -128
"""The exponent of a token that has no numbers; see ``kernels/blocked/fp8.py``."""

_ORIGINS = 1 << 8  # apart in e4m3 and fp16


def codes_of(row: str) -> list[str]:
    """Make ``code [1, D]`` and ``exponent [1]``, integers, of a row as ``blocked/fp8.py`` does.

    All of it in integers: rounding to even of what has three bits of mantissa, and of multiples of
    2^-9 by adding a number whose last place that is.
    """
    return [
        f"word = {row}.to(tl.float32).to(tl.int32, bitcast=True)",
        "largest = tl.max(word & 0x7FFFFFFF, 1)",
        "is_number = largest < 0x7F800000",
        "# The least with largest <= 448 * 2^exponent.",
        "exponent = tl.maximum(((largest + 0x1FFFFF) >> 23) - 135, -126)",
        "inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)",
        "y = (word & 0x7FFFFFFF).to(tl.float32, bitcast=True) * inverse[:, None]",
        "y_bits = y.to(tl.int32, bitcast=True)",
        "normal = ((y_bits + 0x7FFFF + ((y_bits >> 20) & 1)) >> 20) - 960",
        "tiny = (y + 16384.0).to(tl.int32, bitcast=True) - 0x46800000",
        "code = tl.where(y < 0.015625, tiny, normal) | ((word >> 24) & 128)",
        "code = tl.where(is_number[:, None], code, 127)",
        f"exponent = tl.where(is_number, exponent, {LOST})",
    ]


def store_fp8_token(name: str, size: int, place: str) -> list[str]:
    """Store the bytes and the exponent of a token ``new_k0`` or ``new_v0`` at a place, int64."""
    which, offs, shift = ("key", "offs_d0", "") if name == "k" else ("value", "offs_e0", " + 1")
    bound = "" if size & (size - 1) == 0 and size >= 16 else f", mask={offs}[None, :] < {size}"
    return [
        *codes_of(f"new_{name}0"),
        f"coded = {place}",
        f"tl.store({which}_codes_ptr + coded * {size} + {offs}[None, :], code.to(tl.uint8){bound})",
        f"exponents = exponents_ptr + coded * 2{shift} + tl.arange(0, 1)",
        "tl.store(exponents, (exponent & 255).to(tl.uint8))",
    ]


def load_powers(rows: str, bound: str) -> list[str]:
    """Load the powers of two of rows of the store, ``k_power`` and ``v_power``, as fp32."""
    lines = [
        "pairs_ptr = exponents_ptr.to(tl.pointer_type(tl.int16))",
        f"pairs = tl.load(pairs_ptr + {rows}, mask={bound}, other=0).to(tl.int32)",
    ]
    for name, shift in (("k", 24), ("v", 16)):
        power = f"(({name}_exponent + 127) << 23).to(tl.float32, bitcast=True)"
        lines += [
            f"{name}_exponent = (pairs << {shift}) >> 24",
            f'{name}_power = tl.where({name}_exponent > {LOST}, {power}, float("nan"))',
        ]
    return lines


def load_fp8_tile(spec: KernelSpec, dim: Dim, name: str, rows: str, bound: str) -> list[str]:
    """Load rows of the store as tiles ``k0`` or ``v0``, in the dtype of the model.

    A power multiplies numbers, not scores and weights: those could leave the range of fp16.
    """
    codes = "key_codes_ptr" if name == "k" else "value_codes_ptr"
    lines = dim.load(f"{name}_code", codes, rows, str(dim.size), bound, cast=".to(tl.int32)")
    for n in dim.indices:
        half = f"(({name}_code{n} & 127) << 7) | (({name}_code{n} & 128) << 8)"
        wide = f"{name}_wide{n}"
        lines += [
            f"{name}_half{n} = ({half}).to(tl.int16).to(tl.float16, bitcast=True)",
            f"{wide} = {name}_half{n}.to(tl.float32) * {_ORIGINS}.0 * {name}_power[:, None]",
        ]
        lines += within_fp16(wide) if spec.dtype == "fp16" else []
        lines.append(f"{name}{n} = {name}_wide{n}.to(rfa_{name}_ptr.dtype.element_ty)")
    return lines


def within_fp16(tile: str) -> list[str]:
    """Keep the largest number, which may have been rounded up to 2^16, a number."""
    return [f"{tile} = tl.where(tl.abs({tile}) > 65504.0, {tile} * {_LAST}, {tile})"]


_LAST = 1 - 2**-11  # 65504 / 65536
