"""Tiles of fp8 keys and values: bytes are loaded in words and become fp16 where they are needed.

A byte becomes fp16 by moving bits, four bytes of a word in seven instructions: exactly, and in the
same way on all devices, whether they know e4m3 or not. As in ``vecinfer_codes``, where a product
wants an element says which thread loads it, sixteen bytes at a time where there are so many, and
the orders of channels follow. Bytes 0 and 2 of a word stay neighbours, as 1 and 3 do: of keys, such
a pair is an operand as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec_vecinfer import CodeLayout

TINY_BITS = 8
"""Tiles hold numbers times 2^-8: origins of exponents are 7 in e4m3 and 15 in fp16."""

WORD = 4
"""Bytes that are loaded as one number: head dimensions must be multiples of it."""

_WIDEST = 4  # words of one load of a thread


def key_channel(layout: CodeLayout, column: str) -> str:
    """Return the channel that stands at a place of the sum in products with a tile of keys."""
    run, _ = _runs(layout)
    block, byte = f"{column} // 16", f"{column} % 2 * 2 + {column} // 2 % 2"
    word = f"({block} // {run} * {4 * run} + {column} // 4 % 4 * {run} + {block} % {run})"
    return f"{word} * {WORD} + {byte}"


def value_channel(layout: CodeLayout, column: str, warps: int) -> str:
    """Return the channel of a column of a tile of values."""
    lanes, steps = _lanes(layout, warps)
    word = f"({column} % {lanes} * {steps} + {column} // {4 * lanes})"
    return f"{word} * {WORD} + {column} // {lanes} % 2 * 2 + {column} // {2 * lanes} % 2"


def _runs(layout: CodeLayout) -> tuple[int, int]:
    """Return the neighbouring words of a key that a thread loads, and how many times it does."""
    quarter = layout.padded // WORD // 4
    return min(quarter, _WIDEST), max(1, quarter // _WIDEST)


def _lanes(layout: CodeLayout, warps: int) -> tuple[int, int]:
    """Return how many threads share a value, and the neighbouring words that each of them loads."""
    words = layout.padded // WORD
    lanes = min(8 * warps, words)
    return lanes, words // lanes


def setup(keys: CodeLayout, values: CodeLayout, warps: int) -> list[str]:
    """Define where the words of tiles lie.

    Of keys ``[4, BLOCK_N, words, times]``, of values ``[4, lanes, words, BLOCK_N // 4]``.
    """
    (run, runs), (lanes, steps) = _runs(keys), _lanes(values, warps)
    words = f"quad[:, None, None, None] * {run} + tl.arange(0, {run})[None, None, :, None]"
    step = f"tl.arange(0, {steps})[None, None, :, None]"
    return [
        "quad = tl.arange(0, 4)",
        f"key_word = {words} + tl.arange(0, {runs})[None, None, None, :] * {4 * run}",
        f"key_at = offs_t[None, :, None, None] * {keys.size // WORD} + key_word",
        f"value_word = tl.arange(0, {lanes})[None, :, None, None] * {steps} + {step}",
        "offs_f = tl.arange(0, BLOCK_N // 4)",
        "value_token = offs_f // 4 * 16 + offs_f // 2 % 2 * 8 + offs_f % 2",
        "value_token = quad[:, None, None, None] * 2 + value_token[None, None, None, :]",
        f"value_at = value_token * {values.size // WORD} + value_word",
        "key_fours = key_codes_ptr.to(tl.pointer_type(tl.int32))",
        "value_fours = value_codes_ptr.to(tl.pointer_type(tl.int32))",
    ]


def load_words(keys: CodeLayout, values: CodeLayout, stop: str | None) -> list[str]:
    """Load the words of a tile of keys and of values: nothing waits before all are on their way."""
    lines = []
    tokens = {"key": "offs_t[None, :, None, None]", "value": "value_token"}
    for name, layout in (("key", keys), ("value", values)):
        bounds = [f"(offset + {tokens[name]} < {stop})"] if stop else []
        words = layout.size // WORD
        if layout.size != layout.padded:
            bounds.append(f"({name}_word < {words})")
        guard = f", mask={' & '.join(bounds)}, other=0" if bounds else ""
        tile = f"{name}_fours + offset * tl.cast({words}, tl.int64)"
        lines.append(f"{name}_words = tl.load({tile} + {name}_at{guard})")
    return lines


def key_tile(layout: CodeLayout, dtype: str) -> list[str]:
    """Make ``k [D, BLOCK_N]`` of words, channels in the order of :func:`key_channel`."""
    return [
        *_numbers("k", "key_words", dtype),
        f"k = k.permute(3, 2, 0, 4, 5, 1).reshape({layout.padded}, BLOCK_N)",
    ]


def value_tile(layout: CodeLayout, warps: int, dtype: str) -> list[str]:
    """Make ``v [BLOCK_N, Dv]`` of words, columns as of :func:`value_channel`."""
    lanes, steps = _lanes(layout, warps)
    return [
        *_numbers("v", "value_words", dtype),
        f"v = v.reshape(4, {lanes}, {steps}, BLOCK_N // 16, 4, 2, 2)",
        f"v = v.permute(3, 0, 4, 2, 5, 6, 1).reshape(BLOCK_N, {layout.padded})",
        "p = p.reshape(BLOCK_M, BLOCK_N // 16, 2, 4, 2).permute(0, 1, 3, 2, 4)",
        "p = p.reshape(BLOCK_M, BLOCK_N)",
    ]


def _numbers(name: str, words: str, dtype: str) -> list[str]:
    """Make two dimensions of numbers of each word: bytes 0 and 2, bytes 1 and 3, in fp16."""
    return [
        # Exponents and mantissas go to the middle of a half, signs to its highest bit.
        f"even = (({words} << 7) & 0x3F803F80) | (({words} << 8) & -0x7FFF8000)",
        f"odd = (({words} >> 1) & 0x3F803F80) | ({words} & -0x7FFF8000)",
        "both = tl.join(even, odd)",
        f"{name} = tl.join(both.to(tl.int16), (both >> 16).to(tl.int16))",
        f"{name} = {name}.to(tl.float16, bitcast=True)" + ".to(tl.float32)" * (dtype == "fp32"),
    ]
