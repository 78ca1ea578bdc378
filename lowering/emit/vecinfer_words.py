"""Tiles of words of transform coding: digits are multiplied where they stand in their words.

A digit within the fraction of an fp16 number is that number, times a power of two: one AND makes
two operands of a 32-bit register, and nothing is looked up or converted. The upper fields of a word
come within the fraction by one shift for all. Powers of two, steps and offsets belong to queries
and to sums. As in ``vecinfer_fp8_tiles``, where a product wants an element says which thread loads
it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.quantization.transform_coding import low_fields

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flasheva_compile.lowering.spec_vecinfer import CodeLayout

HIGH_SHIFT = 6
"""What upper fields are shifted by, from bits 6 to 15 to the fraction of an fp16 number."""

TINY_BITS = 24
"""A digit at bit 0 is the fp16 number ``digit * 2^-24``."""


def _words(layout: CodeLayout) -> int:
    """Return the 32-bit words of a padded token: two words of transform coding each."""
    return layout.padded // layout.vector // 2


def _axis(layout: CodeLayout, field: str, code: str) -> str:
    """Return the axis of a field of a word; of none that there is, one behind the last."""
    axis = f"{field} * {layout.codes} + {code}"
    return axis if layout.is_whole else f"tl.where({code} < {layout.codes}, {axis}, {layout.size})"


def key_axis(layout: CodeLayout, column: str) -> str:
    """Return the axis that stands at a place of the sum in products with :func:`key_tile`."""
    run = _words(layout) // 4
    lane, pair, half = f"{column} // 4 % 4", f"{column} // 2 % 2", f"{column} % 2"
    if run == 1:
        return _axis(layout, f"({column} // 16 * 2 + {pair})", f"({lane} * 2 + {half})")
    block, pairs = f"{column} // 16", run // 2
    word = f"({lane} * {run} + {block} % {pairs} * 2 + {pair})"
    return _axis(layout, f"({block} // {pairs})", f"({word} * 2 + {half})")


def value_axis(layout: CodeLayout, column: str, warps: int) -> str:
    """Return the axis of a column of a tile of values."""
    lanes, steps, halves = _lanes(layout, warps)
    field = f"({column} // {lanes} % {layout.vector})"
    step = f"{column} // {lanes * layout.vector * halves}"
    code = f"(({column} % {lanes} * {steps} + {step}) * {halves}"
    code += f" + {column} // {lanes * layout.vector} % {halves})"
    return _axis(layout, field, code)


def _lanes(layout: CodeLayout, warps: int) -> tuple[int, int, int]:
    """Return how many threads share a value, the loads of each, and the words of a load."""
    codes = layout.padded // layout.vector
    halves = 2 if codes // 2 >= 8 * warps else 1
    lanes = min(8 * warps, codes // halves)
    return lanes, codes // halves // lanes, halves


def setup(keys: CodeLayout, values: CodeLayout, warps: int) -> list[str]:
    """Define where the words of tiles lie, and what fields to take of them.

    Of keys ``[BLOCK_N * 4, words]``, of values ``[4, lanes, words, BLOCK_N // 4]``. Four threads
    that follow each other have the words of one token, as a product wants them: in dimensions of
    their own, versions of Triton would not agree on which of them come first.
    """
    run, (lanes, steps, halves) = _words(keys) // 4, _lanes(values, warps)
    step = f"tl.arange(0, {steps})[None, None, :, None]"
    unit, kind = values.codes // halves, "int32" if halves == 2 else "int16"
    return [
        "key_token = tl.arange(0, BLOCK_N * 4)[:, None] // 4",
        "key_word = tl.arange(0, BLOCK_N * 4)[:, None] % 4",
        f"key_word = key_word * {run} + tl.arange(0, {run})[None, :]",
        f"key_at = key_token * {keys.codes // 2} + key_word",
        # Or one thread loads all words of a token, to hand them out through shared memory.
        *(["key_at = tl.max_contiguous(key_at, (1, 1))"] if run == 1 else []),
        "quad = tl.arange(0, 4)",
        f"value_word = tl.arange(0, {lanes})[None, :, None, None] * {steps} + {step}",
        "offs_f = tl.arange(0, BLOCK_N // 4)",
        "value_token = offs_f // 4 * 16 + offs_f // 2 % 2 * 8 + offs_f % 2",
        "value_token = quad[:, None, None, None] * 2 + value_token[None, None, None, :]",
        f"value_at = value_token * {unit} + value_word",
        "key_words = key_codes_ptr.to(tl.pointer_type(tl.int32))",
        f"value_words = value_codes_ptr.to(tl.pointer_type(tl.{kind}))",
        *_masks("key", keys),
        *_masks("value", values),
    ]


def _masks(name: str, layout: CodeLayout) -> list[str]:
    count = layout.vector
    return [
        f"{name}_mask{j} = tl.load({name}_fields_ptr + hk * {3 * count} + {j})"
        for j in range(count)
    ]


def load_keys(layout: CodeLayout, first: str, stop: str | None) -> list[str]:
    """Load the words of the keys from token ``first`` on, if that is before ``end``.

    Args:
        layout: Of keys.
        first: A multiple of ``BLOCK_N``.
        stop: Where tokens end within a tile; None = where tiles do.
    """
    bound = stop and f"({first} + key_token < {stop})"
    return _load("key", layout, layout.codes // 2, first, bound)


def load_values(layout: CodeLayout, warps: int, first: str, stop: str | None) -> list[str]:
    """Load the words of values, as :func:`load_keys` does."""
    bound = stop and f"({first} + value_token < {stop})"
    return _load("value", layout, layout.codes // _lanes(layout, warps)[2], first, bound)


def _load(name: str, layout: CodeLayout, unit: int, first: str, bound: str | None) -> list[str]:
    bounds = [f"({first} < end)", *([bound] if bound else [])]
    if not layout.is_whole:
        bounds.append(f"({name}_word < {unit})")
    tile = f"{name}_words + {first} * tl.cast({unit}, tl.int64)"
    return [f"{name}_tile = tl.load({tile} + {name}_at, mask={' & '.join(bounds)}, other=0)"]


def key_tile(layout: CodeLayout, dtype: str) -> list[str]:
    """Make ``k [D, BLOCK_N]`` of words, axes in the order of :func:`key_axis`."""
    run, fields = _words(layout) // 4, layout.vector
    if run == 1:
        shape, order = f"BLOCK_N, 4, {fields // 2}, 2, 2", "2, 1, 3, 4, 0"
    else:
        shape, order = f"BLOCK_N, 4, {run // 2}, 2, {fields}, 2", "4, 2, 1, 3, 5, 0"
    return [
        *_digits("k", "key_tile", "key_mask", layout, dtype),
        f"k = k.reshape({shape}).permute({order}).reshape({layout.padded}, BLOCK_N)",
    ]


def value_tile(layout: CodeLayout, warps: int, dtype: str) -> list[str]:
    """Make ``v [BLOCK_N, Dv]`` of words, columns as of :func:`value_axis`; order ``p`` alike."""
    lanes, steps, halves = _lanes(layout, warps)
    return [
        f"both = value_tile.reshape(4, {lanes}, {steps}, BLOCK_N // 8, 2)",
        # One register of the same word of two tokens.
        "one, two = tl.split(both)",
        *_token_pairs(halves),
        *_digits("v", "pairs", "value_mask", layout, dtype),
        f"v = v.reshape(4, {lanes}, {steps}, BLOCK_N // 16, 2, {halves}, {layout.vector}, 2)",
        f"v = v.permute(3, 0, 4, 7, 2, 5, 6, 1).reshape(BLOCK_N, {layout.padded})",
        "p = p.reshape(BLOCK_M, BLOCK_N // 16, 2, 4, 2).permute(0, 1, 3, 2, 4)",
        "p = p.reshape(BLOCK_M, BLOCK_N)",
    ]


def _token_pairs(halves: int) -> list[str]:
    if halves == 1:
        return ["pairs = (one.to(tl.int32) & 0xFFFF) | (two.to(tl.int32) << 16)"]
    return [
        "lower = (one & 0xFFFF) | (two << 16)",
        "upper = ((one >> 16) & 0xFFFF) | (two & -0x10000)",
        "pairs = tl.join(lower, upper)",
    ]


def _digits(name: str, words: str, mask: str, layout: CodeLayout, dtype: str) -> list[str]:
    """Make two dimensions of digits of each 32-bit word: its fields, and its two halves."""
    low = low_fields(layout.vector).tolist()
    fields = [f"({words if low[j] else 'high'} & {mask}{j})" for j in range(layout.vector)]
    return [
        f"high = {words} >> {HIGH_SHIFT}",
        f"digits = {_joined(fields)}",
        f"{name} = tl.join(digits.to(tl.int16), (digits >> 16).to(tl.int16))",
        f"{name} = {name}.to(tl.float16, bitcast=True)" + ".to(tl.float32)" * (dtype == "fp32"),
    ]


def _joined(fields: Sequence[str]) -> str:
    """Return an expression whose last dimensions, taken together, count the fields."""
    if len(fields) == 1:
        return fields[0]
    return f"tl.join({_joined(fields[0::2])}, {_joined(fields[1::2])})"


def sums(layout: CodeLayout) -> list[str]:
    """Make sums of values of sums of digits, and of axes the channels that they are."""
    exists = "" if layout.is_whole else f", mask=axis < {layout.size}, other=0"
    at = f"hk * {layout.size} + axis"
    return [
        f"digit = tl.load(value_digit_ptr + {at}{exists})",
        f"offset_v = tl.load(value_offset_ptr + {at}{exists})",
        "sums = sums * digit[None, :] + offset_v[None, :] * l_i[:, None]",
        f"channel = tl.load(value_order_ptr + {at}{exists})",
    ]
