"""What kernels over a cache of codes read of codebooks, or of transforms: made once for a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from flasheva_compile.lowering.emit.vecinfer_words import HIGH_SHIFT, TINY_BITS

from flasheva_compile.quantization.transform import hadamard
from flasheva_compile.quantization.transform_coding import field_positions, low_fields

if TYPE_CHECKING:
    from torch import Tensor

    from flasheva_compile.quantization.transform_coding import LayerTransforms
    from flasheva_compile.quantization.vecinfer import LayerCodebooks

_QUERY_BITS = 14


class KernelCodebooks(NamedTuple):
    """What the kernels read of a layer's codebooks.

    Attributes:
        key_scale: What keys are divided by, ``[Hkv, D]`` fp32.
        key_offset: What is added to coded keys, ``[Hkv, D]`` fp32.
        key_centre: What queries are multiplied by for the share of that in scores, ``[Hkv, D]``
            fp32.
        key_words: Codewords as keys are compared with them, ``[1 or Hkv, K, d]`` fp32.
        value_words: The same of values.
        key_book: Codewords to multiply by, in fp16 (fp32 for fp32 models), divided by a power of
            two so that they fit.
        value_book: The same of values.
        book_scale: Those powers of two, of keys and of values, ``[2]`` fp32.
        key_rotation: Transposed, ``[1 or Hkv, D, D]`` fp32.
        value_rotation: ``[Dv, Dv]`` fp32.
    """

    key_scale: Tensor
    key_offset: Tensor
    key_centre: Tensor
    key_words: Tensor
    value_words: Tensor
    key_book: Tensor
    value_book: Tensor
    book_scale: Tensor
    key_rotation: Tensor
    value_rotation: Tensor


def kernel_codebooks(
    books: LayerCodebooks, sizes: tuple[int, int], dtype: torch.dtype
) -> KernelCodebooks:
    """Prepare codebooks, once for a layer.

    Args:
        books: Of the layer, on its device.
        sizes: ``D`` and ``Dv``.
        dtype: Of the model.
    """
    coded = torch.float32 if dtype == torch.float32 else torch.float16
    words = [x.float().contiguous() for x in (books.keys, books.values)]
    largest = torch.stack([x.abs().amax() for x in words])
    _, exponent = torch.frexp(largest.where(largest > 0, 1.0))
    powers = torch.ldexp(torch.ones_like(largest), exponent)
    small = [(x / power).to(coded) for x, power in zip(words, powers, strict=True)]
    scale, rotation = books.scale.double(), books.key_rotation()
    offset = scale.new_zeros(scale.shape) if books.offset is None else books.offset.double()
    centre = offset if rotation is None else (rotation @ offset[..., None])[..., 0]
    turned = scale.new_zeros(1, 0, 0) if rotation is None else rotation.mT
    made = (
        *(x.float().contiguous() for x in (scale, offset, scale * centre)),
        *words,
        *small,
        powers,
        turned.float().contiguous(),
        hadamard(sizes[1]).to(scale.device, torch.float32),
    )
    return KernelCodebooks._make(made)


class KernelTransforms(NamedTuple):
    """What the kernels read of a layer's transforms; ``key_scale`` and so on as of codebooks.

    Attributes:
        key_scale: ``[Hkv, D]`` fp32.
        key_offset: Of digit 0, ``[Hkv, D]`` fp32.
        key_centre: What queries are multiplied by for the share of that in scores, ``[Hkv, D]``
            fp32.
        key_rotation: Transposed, ``[Hkv, D, D]`` fp32.
        key_step: From digit to digit, ``[Hkv, D]`` fp32.
        key_digit: What transformed queries are multiplied by, so that they meet digits where they
            stand in their words, ``[Hkv, D]`` fp32.
        key_fields: Masks, positions and largest digits of fields, ``[Hkv, 3, F]`` int32.
        value_order: ``[Hkv, Dv]`` int32.
        value_offset: ``[Hkv, Dv]`` fp32.
        value_step: ``[Hkv, Dv]`` fp32.
        value_digit: What sums of digits are multiplied by, ``[Hkv, Dv]`` fp32.
        value_fields: As of keys.
        book_scale: What products of queries and digits are multiplied by, ``[1]`` fp32.
        coded: Empty, of the dtype of those products.
    """

    key_scale: Tensor
    key_offset: Tensor
    key_centre: Tensor
    key_rotation: Tensor
    key_step: Tensor
    key_digit: Tensor
    key_fields: Tensor
    value_order: Tensor
    value_offset: Tensor
    value_step: Tensor
    value_digit: Tensor
    value_fields: Tensor
    book_scale: Tensor
    coded: Tensor


def kernel_transforms(transforms: LayerTransforms, dtype: torch.dtype) -> KernelTransforms:
    """Prepare transforms, once for a layer.

    Args:
        transforms: Of the layer, on its device.
        dtype: Of the model.
    """
    t = transforms
    key_fields, value_fields = _fields(t.key_widths), _fields(t.value_widths)
    rotation, offset = t.key_rotation.double(), t.key_offset.double()
    centre = (rotation @ offset[..., None])[..., 0] * t.key_scale.double()
    _, exponent = torch.frexp(t.key_step.abs().amax())
    # Queries stay within 2^14 times their length, so that fp16 keeps the small parts of theirs.
    key_digit = torch.ldexp(_in_place(t.key_step, key_fields), _QUERY_BITS - exponent)
    value_digit = _in_place(t.value_step, value_fields) * 2.0**TINY_BITS
    power = torch.ldexp(torch.ones_like(t.key_step[0, :1]), exponent + TINY_BITS - _QUERY_BITS)
    made = (
        *(t.key_scale, t.key_offset, centre, rotation.mT, t.key_step, key_digit, key_fields),
        *(t.value_order, t.value_offset, t.value_step, value_digit, value_fields, power),
        power.new_empty(0),
    )
    kept = (x.float() if x.is_floating_point() else x.int() for x in made)
    coded = torch.float32 if dtype == torch.float32 else torch.float16
    kernel = KernelTransforms._make(x.contiguous() for x in kept)
    return kernel._replace(coded=kernel.coded.to(coded))


def _fields(widths: Tensor) -> Tensor:
    """Return masks of fields within the fraction of fp16 numbers, positions, largest digits."""
    positions, largest = field_positions(widths), (1 << widths) - 1
    masks = largest << _place(positions, widths)
    return torch.stack([masks | masks << 16, positions, largest], 1).int()


def _place(positions: Tensor, widths: Tensor) -> Tensor:
    """Return where fields stand when upper ones are shifted."""
    low = low_fields(widths.shape[-1], widths.device)
    return positions - torch.where(low, 0, HIGH_SHIFT) * (widths > 0)


def _in_place(step: Tensor, fields: Tensor) -> Tensor:
    """Return steps for digits multiplied by the power of two of their place."""
    masks = fields[:, 0] & 0xFFFF
    place = torch.where(masks > 0, masks & -masks, 1)
    return step.double() / place.repeat_interleave(step.shape[1] // place.shape[1], 1)
