"""Transform coding: principal axes of keys, each with its own bits, packed into words of 16 bits.

A channel of few bits is a number of equal steps, ``offset + step * digit``. Steps and offsets go to
queries and to sums, so that what attention multiplies are the digits themselves: nothing is looked
up. Source: transform coding by Huang and Schultheiss (1963), for a cache ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from flasheva_compile.quantization.formats import misfit_of_heads
from flasheva_compile.quantization.tensor_checks import numbers_misfit, order_misfit
from flasheva_compile.quantization.transform import compute_dtype

if TYPE_CHECKING:
    from flasheva_compile.quantization.formats import WordFormat, WordKvFormat

WORD_BITS = 16
MOST_BITS = 5
"""Bits of a channel, at most: then each of two groups of a word's fields has ten bits or less."""


def field_positions(widths: Tensor) -> Tensor:
    """Return the lowest bit of each field of a word.

    Fields 0, 3, 4, 7, 8, ... follow each other from bit 0, the others end at bit 15; each group
    takes at most ten bits, as many as the fraction of an fp16 number: there digits are numbers.

    Args:
        widths: Bits of the fields, none wider than the one before it, 16 in all, ``[..., F]``.
    """
    low = low_fields(widths.shape[-1], widths.device)
    of_low = widths.where(low, 0)
    of_high = widths.where(~low, 0)
    start = WORD_BITS - of_high.sum(-1, keepdim=True)
    from_low, from_high = (x.cumsum(-1) - x for x in (of_low, of_high))
    return from_low.where(low, start + from_high)


def low_fields(count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return which fields begin at bit 0, ``[F]`` bool; see :func:`field_positions`."""
    return (torch.arange(count, device=device) + 1) // 2 % 2 == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTransforms:
    """What one layer's words mean: field ``j`` of word ``c`` is axis ``j C + c`` of ``C F``.

    Attributes:
        key_scale: What keys are divided by before they are rotated, ``[Hkv, D]``.
        key_rotation: Orthonormal axes of keys, the largest first, ``[Hkv, D, D]``.
        key_offset: Of digit 0 of each axis, ``[Hkv, D]``.
        key_step: From one digit to the next, ``[Hkv, D]``.
        key_widths: Bits of the fields of a key's words, ``[Hkv, F]`` int64.
        value_order: Channels of values in the order of axes, ``[Hkv, Dv]`` int64.
        value_offset: As ``key_offset``, in that order, ``[Hkv, Dv]``.
        value_step: As ``key_step``.
        value_widths: As ``key_widths``.
    """

    key_scale: Tensor
    key_rotation: Tensor
    key_offset: Tensor
    key_step: Tensor
    key_widths: Tensor
    value_order: Tensor
    value_offset: Tensor
    value_step: Tensor
    value_widths: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {name: getattr(self, name) for name in TRANSFORM_TENSORS}

    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(x.numel() * x.element_size() for x in self.tensors().values())

    def to(self, device: torch.device | str) -> LayerTransforms:
        """Return a copy on a device."""
        return replace(self, **{name: x.to(device) for name, x in self.tensors().items()})

    def misfit(self, form: WordKvFormat, kv_heads: int, head_dim: int, value_dim: int) -> str:
        """Return why these are no transforms of such words of such heads; "" = they are.

        A tensor of another shape might broadcast, and kernels compute addresses by the shapes that
        there should be.
        """
        misfit = misfit_of_heads(form, head_dim, value_dim)
        if misfit:
            return misfit
        keys, values = (kv_heads, head_dim), (kv_heads, value_dim)
        shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(("key_scale", "key_offset", "key_step"), keys),
            **dict.fromkeys(("value_offset", "value_step"), values),
            "key_rotation": (*keys, head_dim),
        }
        reasons = {
            name: numbers_misfit(
                getattr(self, name), shape, positive=name.endswith(("scale", "step"))
            )
            for name, shape in shapes.items()
        }
        reasons["key_widths"] = _widths_misfit(self.key_widths, kv_heads, form.key)
        reasons["value_widths"] = _widths_misfit(self.value_widths, kv_heads, form.value)
        reasons["value_order"] = order_misfit(self.value_order, *values)
        return next((f"{name} {reason}" for name, reason in reasons.items() if reason), "")


def _widths_misfit(widths: Tensor, heads: int, form: WordFormat) -> str:
    """Return why these are no widths of a word's fields for each head; "" = they are."""
    if widths.dtype != torch.long:
        return f"is {widths.dtype}"
    fits = tuple(widths.shape) == (heads, form.vector) and _are_widths(widths)
    return "" if fits else f"are {widths.tolist()}, not {WORD_BITS} bits of {form}"


def _are_widths(widths: Tensor) -> bool:
    """Whether fields are what :func:`field_positions` takes, none wider than ``MOST_BITS``."""
    falling = bool((widths.diff(dim=1) <= 0).all())
    within = bool(((widths >= 0) & (widths <= MOST_BITS)).all())
    return falling and within and bool((widths.sum(1) == WORD_BITS).all())


TRANSFORM_TENSORS = tuple(LayerTransforms.__dataclass_fields__)
"""Names of the tensors of ``LayerTransforms``."""


class TransformCodec:
    """Turns keys and values into words and back; the interface is that of ``VqCodec``.

    All tensors are ``[B, Hkv, ..., D]``; they are computed in fp32, or in fp64 if they are fp64.

    Args:
        transforms: Of the layer.
        form: Of its words.
        head_dim: ``D``.
        value_dim: ``Dv``.
    """

    def __init__(
        self, transforms: LayerTransforms, form: WordKvFormat, head_dim: int, value_dim: int
    ) -> None:
        self.transforms, self.form = transforms, form
        self._key_fields = _Fields.of(transforms.key_widths)
        self._value_fields = _Fields.of(transforms.value_widths)
        self.head_dim, self.value_dim = head_dim, value_dim
        self.key_bytes = form.key.nbytes(head_dim)
        self.value_bytes = form.value.nbytes(value_dim)

    # --- encoding ---------------------------------------------------------------------------------

    def transform_keys(self, k: Tensor) -> Tensor:
        """Return ``(k / scale) R``."""
        k = k.to(compute_dtype(k.dtype))
        return self._rotated(k / self._key_scale(k))

    def transform_values(self, v: Tensor) -> Tensor:
        """Return values with their channels in the order of axes."""
        v = v.to(compute_dtype(v.dtype))
        return v.gather(-1, self._per_head(self.transforms.value_order, v).expand_as(v))

    def encode_keys(self, k: Tensor) -> Tensor:
        """Return the words of keys ``[B, Hkv, N, D]``, ``[B, Hkv, N, bytes]`` uint8."""
        t = self.transforms
        return _packed(self.transform_keys(k), t.key_offset, t.key_step, self._key_fields)

    def encode_values(self, v: Tensor) -> Tensor:
        """Return the words of values ``[B, Hkv, N, Dv]``, ``[B, Hkv, N, bytes]`` uint8."""
        t = self.transforms
        return _packed(self.transform_values(v), t.value_offset, t.value_step, self._value_fields)

    # --- attending --------------------------------------------------------------------------------

    def transform_queries(self, q: Tensor) -> Tensor:
        """Return ``(q * scale) R``, ``[B, Hkv, G, L, D]``: times transformed keys the scores."""
        return self._rotated(q * self._key_scale(q))

    def scores(self, q: Tensor, packed: Tensor) -> Tensor:
        """Return the products of transformed queries with coded keys, ``[B, Hkv, G, L, N]``."""
        return q @ self.decode_keys(packed, q.dtype)[:, :, None].transpose(-1, -2)

    def decode_keys(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Return coded keys, still smoothed and rotated, ``[B, Hkv, N, D]``."""
        t = self.transforms
        return _decoded(packed, t.key_offset, t.key_step, self._key_fields, dtype)

    def decode_values(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Return coded values, still in the order of axes, ``[B, Hkv, N, Dv]``."""
        t = self.transforms
        return _decoded(packed, t.value_offset, t.value_step, self._value_fields, dtype)

    def restore_keys(self, k: Tensor) -> Tensor:
        """Undo :meth:`transform_keys`."""
        return self._rotated(k, back=True) * self._key_scale(k)

    def restore_values(self, v: Tensor) -> Tensor:
        """Undo the order of values, or of weighted sums of them."""
        order = self.transforms.value_order.argsort(-1)
        return v.gather(-1, self._per_head(order, v).expand_as(v))

    def _key_scale(self, x: Tensor) -> Tensor:
        return self._per_head(self.transforms.key_scale.to(x), x)

    def _per_head(self, row: Tensor, x: Tensor) -> Tensor:
        """Return ``[Hkv, D]`` so that it fits ``x [B, Hkv, ..., D]``."""
        return row.view(row.shape[0], *(1,) * (x.dim() - 3), row.shape[1])

    def _rotated(self, x: Tensor, *, back: bool = False) -> Tensor:
        rotation = self.transforms.key_rotation.to(x)
        rotation = rotation.mT if back else rotation
        return x @ rotation.view(-1, *(1,) * (x.dim() - 4), *rotation.shape[1:])


class _Fields(NamedTuple):
    """Lowest bit and largest digit of each field, ``[Hkv, 1, F, 1]``."""

    position: Tensor
    largest: Tensor

    @classmethod
    def of(cls, widths: Tensor) -> _Fields:
        """Return the fields of widths ``[Hkv, F]``."""
        made = (field_positions(widths), (1 << widths) - 1)
        return cls(*(x[:, None, :, None] for x in made))


def _packed(x: Tensor, offset: Tensor, step: Tensor, fields: _Fields) -> Tensor:
    """Return the words of ``[B, Hkv, N, D]`` as bytes, the lower one first."""
    digits = ((x - offset.to(x)[:, None]) / step.to(x)[:, None] + 0.5).floor().nan_to_num(0)
    digits = digits.unflatten(-1, (fields.position.shape[2], -1))
    digits = digits.clamp_min(0).minimum(fields.largest.to(x)).long()
    words = (digits << fields.position).sum(-2)
    return torch.stack([words & 255, words >> 8], -1).flatten(-2).to(torch.uint8)


def _decoded(
    packed: Tensor, offset: Tensor, step: Tensor, fields: _Fields, dtype: torch.dtype
) -> Tensor:
    """Return what words ``[B, Hkv, N, bytes]`` stand for, ``[B, Hkv, N, D]``."""
    low, high = packed.long().unflatten(-1, (-1, 2)).unbind(-1)
    words = (low | high << 8)[..., None, :] >> fields.position
    digits = (words & fields.largest).flatten(-2).to(dtype)
    return offset.to(dtype)[:, None] + step.to(dtype)[:, None] * digits
