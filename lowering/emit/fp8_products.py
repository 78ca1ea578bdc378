"""Attention to tokens in fp8: bytes become fp16, powers of two multiply scores and weights.

A product takes codes as they are, for all are fp16 numbers: nothing is done for each element but to
convert it. Beside them stand queries and weights in fp16: a power of two for each row keeps the
largest of them in ``[2^14, 2^15)``, which leaves 29 binades below it with all of fp16's digits.
A weight times the power of its value may have any size, and therefore has a largest of its own,
``top``; sums of values are ``unit / 2^14`` times what they hold.

Where devices know e4m3 (``Schedule.e4m3``), one instruction converts two elements; elsewhere bits
are moved, to the same numbers. Values lie in rows but are multiplied by columns, and no instruction
turns bytes: they are loaded two by two, and even and odd columns have sums of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import scores
from flasheva_compile.lowering.emit.source import Dim
from flasheva_compile.lowering.spec import padded

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec, Schedule

SPLIT_FUNCTION = '''\
@triton.jit
def split_pairs(pairs):
    """Return the low and the high bytes of int16, e4m3, as fp16: two of each at a time."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; .reg .b16 a, b; prmt.b32 t, $2, 0, 0x3120; mov.b32 {a, b}, t; "
        "cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }",
        "=r,=r,r",
        [pairs],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )
'''
"""Three instructions for four elements, where compilers take ten to take bytes out and together."""

_TOP = 14  # exponent of the largest query or weight of a row
_LEAST = _TOP + 1  # of an fp32 number whose quotient by 2^_TOP is normal


def pairs_of(e: Dim) -> Dim | None:
    """Return pairs of columns as a dimension; None where bytes are loaded one by one."""
    return Dim("p", e.size // 2, split=False) if e.size % 2 == 0 and padded(e.size) > 16 else None


def start(spec: KernelSpec, d: Dim, e: Dim, rows: str) -> list[str]:
    """Define queries ``coded_q0`` for codes, the scale of their scores, and sums of values.

    Args:
        spec: What the kernel computes.
        d: Columns of keys, in one part.
        e: Columns of values, in one part.
        rows: How many rows the tile of queries has.
    """
    assert len(d.indices) == len(e.indices) == 1
    pairs = pairs_of(e)
    columns = (
        [*pairs.offsets(), *pairs.zeros("even", rows), *pairs.zeros("odd", rows)]
        if pairs
        else e.zeros("even", rows)
    )
    return [
        "wide_q = q0.to(tl.float32)",
        f"field = {_field('tl.max(tl.abs(wide_q), 1)')}",
        f"coded_q0 = (wide_q * {_power(f'{254 + _TOP} - field')}[:, None]).to(tl.{_float(spec)})",
        f"code_scale = {_power(f'field - {_TOP}')} * score_scale",
        f"top = tl.zeros([{rows}], tl.float32)",
        f"unit = tl.full([{rows}], 1.0, tl.float32)",
        *columns,
    ]


def powers(schedule: Schedule, pairs: str) -> list[str]:
    """Make ``key_power`` and ``value_power`` of the exponents of tokens, two bytes as int16."""
    lines = [f"both = {pairs}.to(tl.int32)"]
    for name, shift in (("key", 23), ("value", 15)):
        bits = f"((both << {shift}) + 0x3F800000) & 0x7F800000"
        lines.append(f"{name}_power = ({bits}).to(tl.float32, bitcast=True)")
        if not schedule.e4m3:  # which knows that the codes of a token without numbers are NaN
            power = f"{name}_power"
            lines.append(f'{power} = tl.where({power} < float("inf"), {power}, float("nan"))')
    return lines


def keys(spec: KernelSpec, schedule: Schedule) -> list[str]:
    """Turn bytes ``k0`` into numbers, and multiply them with queries: ``s``, without scale."""
    return [
        *_numbers(spec, schedule, "k0"),
        f"s = tl.dot(coded_q0, tl.trans(k0){scores.precision(spec)})",
    ]


SCALE = "(key_power[None, :] * code_scale[:, None])"
"""What makes scores of the products of :func:`keys`. A factor alone could leave fp32's range."""


def softmax(spec: KernelSpec) -> list[str]:
    """Go on with the softmax by the scores ``s``; leave weights ``p`` of codes."""
    return [
        *scores.softmax_weights(),
        "p = p * value_power[None, :]",
        "top = tl.maximum(top * alpha, tl.max(p, 1))",
        f"field = {_field('top')}",
        f"alpha = alpha * unit * {_power('254 - field')}",
        f"unit = {_power('field')}",
        f"p = (p * {_power(f'{254 + _TOP} - field')}[:, None]).to(tl.{_float(spec)})",
    ]


def values(spec: KernelSpec, schedule: Schedule, e: Dim) -> list[str]:
    """Turn bytes ``v0``, two by two where there are ``pairs_of``, into numbers and add them up."""
    precision = scores.precision(spec)
    if pairs_of(e) is None:
        numbers, tiles = _numbers(spec, schedule, "v0"), {"even": "v0"}
    else:
        numbers, tiles = _split_pairs(spec, schedule), {"even": "even_v", "odd": "odd_v"}
    sums = (
        f"{name}0 = tl.dot(p, {tile}, {name}0 * alpha[:, None]{precision})"
        for name, tile in tiles.items()
    )
    return [*numbers, *sums]


def finish(e: Dim) -> list[str]:
    """Define ``acc0``, the sum of values for the maximum ``m_i``."""
    both = "tl.interleave(even0, odd0)" if pairs_of(e) else "even0"
    return [f"acc0 = {both} * (unit * {2.0**-_TOP!r})[:, None]"]


def _split_pairs(spec: KernelSpec, schedule: Schedule) -> list[str]:
    names = ("even_v", "odd_v")
    wide = [f"{name} = {name}.to(tl.float32)" for name in names if spec.dtype == "fp32"]
    if schedule.e4m3:
        return [f"{', '.join(names)} = split_pairs(v0)", *wide]
    halves = (
        "((v0 & 0x7F) << 7) | ((v0 & 0x80) << 8)",
        "((v0 & 0x7F00) >> 1) | (v0 & -0x8000)",
    )
    moved = (f"{name} = {_moved(half)}" for name, half in zip(names, halves, strict=True))
    return [*moved, *wide]


def _numbers(spec: KernelSpec, schedule: Schedule, tile: str) -> list[str]:
    """Make numbers of bytes."""
    wide = ".to(tl.float32)" if spec.dtype == "fp32" else ""
    if schedule.e4m3:
        return [f"{tile} = {tile}.to(tl.float8e4nv, bitcast=True).to(tl.float16){wide}"]
    half = f"(({tile} & 0x7F) << 7) | (({tile} & 0x80) << 8)"
    return [f"{tile} = {tile}.to(tl.int16)", f"{tile} = {_moved(half)}{wide}"]


def _moved(half: str) -> str:
    """Make numbers of what has signs, exponents and mantissas in the places of fp16's."""
    return f"(({half}).to(tl.float16, bitcast=True) * {1 << _ORIGINS}.0)"


_ORIGINS = 8  # of exponents: so far apart in e4m3 and fp16


def _field(number: str) -> str:
    """Return the bits of the exponent of a number that is not negative."""
    return f"tl.maximum({number}.to(tl.int32, bitcast=True) >> 23, {_LEAST})"


def _power(field: str) -> str:
    return f"(({field}) << 23).to(tl.float32, bitcast=True)"


def _float(spec: KernelSpec) -> str:
    return "float32" if spec.dtype == "fp32" else "float16"
