"""Text that makes fp8 of a token, the formulas of ``kernels/blocked/fp8.py``.

All of it moves bits: exactly, and in the same way on all devices, whether they know e4m3 or not.
"""

from __future__ import annotations

LOST = -128
"""The exponent of a token that has no numbers; see ``kernels/blocked/fp8.py``."""


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
