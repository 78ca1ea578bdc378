"""Tiles of coded keys and values: their codes are loaded, and for each of them its codeword.

A codeword goes straight to the registers from which it is multiplied: where a product of sixteen
rows wants an element, in which thread and in which order, says which thread loads which code. (For
operands that come from bytes, a thread of NVIDIA's products has four neighbours of every sixteen
along the sum, and threads 0 to 3 are neighbours along it.) The order of what is summed is free, and
so is that of the columns of a result; queries and weights follow. On other devices, or if a
compiler lays tiles out in another way, the numbers are the same, and go through shared memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec_vecinfer import CodeLayout

_BYTE = 8


def key_channel(layout: CodeLayout, column: str) -> str:
    """Return the channel that stands at a place of the sum in products with :func:`key_tile`."""
    quarter = layout.padded // 4
    return f"{column} // 4 % 4 * {quarter} + {column} // 16 * 4 + {column} % 4"


def key_setup(layout: CodeLayout) -> list[str]:
    """Define where the codes of a tile of keys lie, ``[4, BLOCK_N, codes]``."""
    count = layout.padded // layout.vector // 4
    return [
        "quad = tl.arange(0, 4)",
        f"key_code = quad[:, None, None] * {count} + tl.arange(0, {count})[None, None, :]",
        f"key_row = offs_t[None, :, None] * {layout.nbytes}",
        *_places("key", layout),
        f"key_channels = tl.arange(0, {layout.vector})[None, None, None, :]",
    ]


def key_tile(layout: CodeLayout, bound: str | None) -> list[str]:
    """Load ``k [D, BLOCK_N]``, channels in the order of :func:`key_channel`."""
    d = layout.padded
    return [
        *_codes("key", layout, bound and f"({bound})[None, :, None]"),
        f"entry = key_book_ptr + (code * {layout.vector})[:, :, :, None]",
        "k = tl.load(entry + key_channels)",
        f"k = k.reshape(4, BLOCK_N, {d // 16}, 4).permute(2, 0, 3, 1).reshape({d}, BLOCK_N)",
    ]


def value_setup(layout: CodeLayout, warps: int) -> list[str]:
    """Define where the codes of a tile of values lie, ``[4, lanes, steps, BLOCK_N // 4]``."""
    lanes = layout.lanes(warps)
    steps = layout.padded // layout.vector // lanes
    step = f"tl.arange(0, {steps})[None, None, :, None]"
    return [
        f"value_code = tl.arange(0, {lanes})[None, :, None, None] * {steps} + {step}",
        "offs_f = tl.arange(0, BLOCK_N // 4)",
        "value_token = offs_f // 4 * 16 + offs_f // 2 % 2 * 8 + offs_f % 2",
        "value_token = quad[:, None, None, None] * 2 + value_token[None, None, None, :]",
        f"value_row = value_token * {layout.nbytes}",
        *_places("value", layout),
        f"value_channels = tl.arange(0, {layout.vector})[None, None, None, None, :]",
    ]


def value_tile(layout: CodeLayout, warps: int, stop: str | None) -> list[str]:
    """Load ``v [BLOCK_N, Dv]``, columns as of ``CodeLayout.channel``; order weights ``p`` alike."""
    lanes, d = layout.lanes(warps), layout.vector
    steps = layout.padded // d // lanes
    fours = "BLOCK_N // 16"
    return [
        *_codes("value", layout, stop and f"(offset + value_token < {stop})"),
        f"entry = value_book_ptr + (code * {d})[:, :, :, :, None]",
        "v = tl.load(entry + value_channels)",
        f"v = v.reshape(4, {lanes}, {steps}, {fours}, 4, {d}).permute(3, 0, 4, 2, 5, 1)",
        f"v = v.reshape(BLOCK_N, {layout.padded})",
        f"p = p.reshape(BLOCK_M, {fours}, 2, 4, 2).permute(0, 1, 3, 2, 4)",
        "p = p.reshape(BLOCK_M, BLOCK_N)",
    ]


def _places(name: str, layout: CodeLayout) -> list[str]:
    """Define the byte at which a code begins; of 12 bits, the second of two begins in a byte."""
    if layout.bits <= _BYTE:
        return [f"{name}_at = {name}_row + {name}_code"]
    return [
        f"{name}_at = {name}_row + {name}_code // 2 * 3 + {name}_code % 2",
        f"{name}_shift = {name}_code % 2 * 4",
    ]


def _codes(name: str, layout: CodeLayout, bound: str | None) -> list[str]:
    """Load the codes of a tile."""
    bounds = [bound] if bound else []
    if not layout.is_whole:
        bounds.append(f"({name}_code < {layout.codes})")
    guard = f", mask={' & '.join(bounds)}, other=0" if bounds else ""
    lines = [
        f"tile = {name}_codes_ptr + offset * tl.cast({layout.nbytes}, tl.int64)",
        f"code = tl.load(tile + {name}_at{guard}).to(tl.int32)",
    ]
    if layout.bits > _BYTE:
        lines += [
            f"code |= tl.load(tile + {name}_at + 1{guard}).to(tl.int32) << 8",
            f"code = (code >> {name}_shift) & 4095",
        ]
    return lines
