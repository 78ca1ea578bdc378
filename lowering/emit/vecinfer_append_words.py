"""A new token in transform coding: some words of a key or of a value."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec_vecinfer import CodeLayout


def store_words(name: str, layout: CodeLayout, codes: int) -> list[str]:
    """Store words ``piece * codes`` and on of token ``new_k`` or ``new_v``, at ``slot``."""
    which, count = ("key", "value")[name == "v"], layout.vector
    fields = f"tl.load({which}_fields_ptr + hk * {3 * count} + {{}} + offs_j)[:, None]"
    numbers = f"tl.load({which}_{{}}_ptr + hk * {layout.size} + axis, mask=exists, other=1.0)"
    row = f"{which}_codes_ptr + (bh64 * room + slot) * {layout.nbytes}"
    return [
        f"code = piece * {codes} + tl.arange(0, {codes})",
        f"offs_j = tl.arange(0, {count})",
        f"axis = offs_j[:, None] * {layout.codes} + code[None, :]",
        f"exists = (code < {layout.codes})[None, :] & (offs_j >= 0)[:, None]",
        *(_key_axes(layout) if name == "k" else _value_axes(layout)),
        f"offset = {numbers.format('offset')}",
        f"step = {numbers.format('step')}",
        f"most = {fields.format(2 * count)}.to(tl.float32)",
        "digit = tl.minimum(tl.maximum(tl.floor((y - offset) / step + 0.5), 0.0), most)",
        f"word = tl.sum(digit.to(tl.int32) << {fields.format(count)}, 0)",
        f"row = ({row}).to(tl.pointer_type(tl.int16))",
        f"tl.store(row + code, word.to(tl.int16), mask=code < {layout.codes})",
    ]


def _key_axes(layout: CodeLayout) -> list[str]:
    """Define ``y``, a key's parts along some axes."""
    size = layout.size
    scale = f"key_scale_ptr + hk * {size} + offs_d0[None, :]"
    at = f"matrix + axis[:, :, None] * {size} + offs_d0[None, None, :]"
    return [
        f"x = new_k0.to(tl.float32) / tl.load({scale}, mask=offs_d0[None, :] < {size}, other=1.0)",
        "matrix = key_rotation_ptr + hk * tl.cast(rotation_stride, tl.int64)",
        f"inside = exists[:, :, None] & (offs_d0 < {size})[None, None, :]",
        f"y = tl.sum(tl.load({at}, mask=inside, other=0.0) * x[None, :, :], 2)",
    ]


def _value_axes(layout: CodeLayout) -> list[str]:
    """Define ``y``, some channels of a value."""
    at = f"value_order_ptr + hk * {layout.size} + axis"
    return [
        f"channel = tl.load({at}, mask=exists, other=0)",
        "y = tl.load(v_row + channel, mask=exists, other=0.0).to(tl.float32)",
    ]
