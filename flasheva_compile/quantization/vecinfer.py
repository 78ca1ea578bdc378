"""VecInfer's codes of one layer: keys smoothed, rotated and vector-quantised, values quantised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flasheva_compile.quantization.codebook import nearest
from flasheva_compile.quantization.formats import misfit_of_heads
from flasheva_compile.quantization.packing import pack, unpack
from flasheva_compile.quantization.tensor_checks import numbers_misfit, order_misfit
from flasheva_compile.quantization.transform import (
    compute_dtype,
    grouped_rotation,
    hadamard,
    rotated,
)

if TYPE_CHECKING:
    from flasheva_compile.quantization.formats import CodeFormat, KvFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCodebooks:
    """What one layer's codes mean.

    Attributes:
        scale: What keys are divided by before they are rotated, ``[Hkv, D]``; ones = no smoothing.
        keys: Codewords of keys, ``[1 or Hkv, K, d]``: shared by all kv heads, or one for each.
        values: Codewords of values, ``[1 or Hkv, K, d]``.
        rotate_keys: Whether keys are rotated.
        rotate_values: Whether values are rotated, too.
        order: Channels of keys from the largest to the smallest, ``[Hkv, D]`` int64: they are
            rotated in groups (``grouped_rotation``); None = all together, by Hadamard's matrix.
        offset: What is added to coded keys, smoothed and rotated, ``[Hkv, D]``; None = nothing.
    """

    scale: Tensor
    keys: Tensor
    values: Tensor
    rotate_keys: bool = True
    rotate_values: bool = False
    order: Tensor | None = None
    offset: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that there are, by name."""
        found = {name: getattr(self, name) for name in TENSORS}
        return {name: x for name, x in found.items() if x is not None}

    def nbytes(self) -> int:
        """Return the bytes of scales, codebooks and what else there is."""
        return sum(x.numel() * x.element_size() for x in self.tensors().values())

    def to(self, device: torch.device | str) -> LayerCodebooks:
        """Return a copy on a device."""
        return replace(self, **{name: x.to(device) for name, x in self.tensors().items()})

    def misfit(self, form: KvFormat, kv_heads: int, head_dim: int, value_dim: int) -> str:
        """Return why these are no codebooks of such codes of such heads; "" = they are."""
        misfit = misfit_of_heads(form, head_dim, value_dim)
        if misfit:
            return misfit
        sizes = kv_heads, head_dim
        reasons = {"scale": numbers_misfit(self.scale, sizes, positive=True)}
        for name, part in (("keys", form.key), ("values", form.value)):
            shapes = [(heads, part.entries, part.vector) for heads in (1, kv_heads)]
            reasons[name] = numbers_misfit(getattr(self, name), *shapes)
        if self.order is not None:
            reasons["order"] = order_misfit(self.order, *sizes)
        if self.offset is not None:
            reasons["offset"] = numbers_misfit(self.offset, sizes)
        return next((f"{name} {reason}" for name, reason in reasons.items() if reason), "")

    def key_rotation(self) -> Tensor | None:
        """Return what keys are rotated by, ``[1 or Hkv, D, D]`` fp64; None = they are not."""
        if not self.rotate_keys:
            return None
        if self.order is None:
            return hadamard(self.scale.shape[1])[None].to(self.scale.device)
        vector = self.keys.shape[2]
        rotations = [grouped_rotation(order, vector) for order in self.order.cpu()]
        return torch.stack(rotations).to(self.scale.device)


NEEDED_TENSORS = ("scale", "keys", "values")
TENSORS = (*NEEDED_TENSORS, "order", "offset")
"""Names of the tensors of ``LayerCodebooks``; the last two may be None."""


class VqCodec:
    """Turns keys and values into codes and back, and queries into what their scores need.

    All tensors are ``[B, Hkv, ..., D]``; they are computed in fp32, or in fp64 if they are fp64.

    Args:
        codebooks: Of the layer.
        form: Of its codes.
        head_dim: ``D``.
        value_dim: ``Dv``.
        lookup: Compute scores by tables instead of decoding keys.
    """

    def __init__(
        self,
        codebooks: LayerCodebooks,
        form: KvFormat,
        head_dim: int,
        value_dim: int,
        *,
        lookup: bool = False,
    ) -> None:
        self.codebooks, self.form, self.lookup = codebooks, form, lookup
        self.head_dim, self.value_dim = head_dim, value_dim
        self._rotations: dict[torch.dtype, Tensor] = {}
        self.key_bytes = form.key.nbytes(head_dim)
        self.value_bytes = form.value.nbytes(value_dim)

    # --- encoding ---------------------------------------------------------------------------------

    def transform_keys(self, k: Tensor) -> Tensor:
        """Return ``(k / scale) R``."""
        k = k.to(compute_dtype(k.dtype))
        return self._rotated_keys(k / self.codebooks.scale.to(k)[:, None])

    def _rotated_keys(self, x: Tensor, *, back: bool = False) -> Tensor:
        """Return ``x R`` of ``[B, Hkv, ..., D]``, or ``x R^T``."""
        if x.dtype not in self._rotations:
            rotation = self.codebooks.key_rotation()
            if rotation is None:
                return x
            self._rotations[x.dtype] = rotation.to(x)
        rotation = self._rotations[x.dtype]
        rotation = rotation.mT if back else rotation
        return x @ rotation.view(-1, *(1,) * (x.dim() - 4), *rotation.shape[1:])

    def transform_values(self, v: Tensor) -> Tensor:
        """Return the values as they are quantised."""
        return _rotated(v.to(compute_dtype(v.dtype)), self.codebooks.rotate_values)

    def encode_keys(self, k: Tensor) -> Tensor:
        """Return the packed codes of keys ``[B, Hkv, N, D]``, ``[B, Hkv, N, bytes]`` uint8."""
        k = self.transform_keys(k)
        offset = self.codebooks.offset
        k = k if offset is None else k - offset.to(k)[:, None]
        return pack(_codes(k, self.codebooks.keys), self.form.key.bits)

    def encode_values(self, v: Tensor) -> Tensor:
        """Return the packed codes of values ``[B, Hkv, N, Dv]``, ``[B, Hkv, N, bytes]`` uint8."""
        return pack(_codes(self.transform_values(v), self.codebooks.values), self.form.value.bits)

    # --- attending --------------------------------------------------------------------------------

    def transform_queries(self, q: Tensor) -> Tensor:
        """Return ``(q * scale) R``, of which products with transformed keys are the scores.

        Args:
            q: ``[B, Hkv, G, L, D]``: query heads by the kv head that they read.
        """
        return self._rotated_keys(q * self.codebooks.scale.to(q)[:, None, None])

    def scores(self, q: Tensor, packed: Tensor) -> Tensor:
        """Return the products of transformed queries with coded keys, ``[B, Hkv, G, L, N]``.

        Args:
            q: Of :meth:`transform_queries`.
            packed: ``[B, Hkv, N, bytes]``.
        """
        if self.lookup:
            return self._lookup_scores(q, packed)
        keys = self.decode_keys(packed, q.dtype)
        return q @ keys[:, :, None].transpose(-1, -2)

    def _lookup_scores(self, q: Tensor, packed: Tensor) -> Tensor:
        """Sum one entry per code of the tables ``q_m . codeword``, and ``q . offset``."""
        form, books = self.form.key, self.codebooks.keys.to(q.dtype)
        codes = unpack(packed, form.bits, form.codes(self.head_dim))
        parts = q.unflatten(-1, (-1, form.vector))  # [B, Hkv, G, L, M, d]
        table = torch.einsum("bhglmd,hkd->bhglmk", parts, books.expand(q.shape[1], -1, -1))
        total = q.new_zeros(*q.shape[:-1], packed.shape[2])
        for m in range(codes.shape[-1]):
            index = codes[:, :, None, None, :, m].expand_as(total)
            total += table[..., m, :].gather(-1, index)
        offset = self.codebooks.offset
        return total if offset is None else total + q @ offset.to(q)[:, None, :, None]

    def decode_keys(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Return coded keys, still smoothed and rotated, ``[B, Hkv, N, D]``."""
        keys = _decoded(packed, self.codebooks.keys, self.form.key, self.head_dim, dtype)
        offset = self.codebooks.offset
        return keys if offset is None else keys + offset.to(keys)[:, None]

    def decode_values(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Return coded values, still rotated, ``[B, Hkv, N, Dv]``."""
        return _decoded(packed, self.codebooks.values, self.form.value, self.value_dim, dtype)

    def restore_keys(self, k: Tensor) -> Tensor:
        """Undo :meth:`transform_keys`."""
        return self._rotated_keys(k, back=True) * self.codebooks.scale.to(k)[:, None]

    def restore_values(self, v: Tensor) -> Tensor:
        """Undo the rotation of values, or of weighted sums of them."""
        return _rotated(v, self.codebooks.rotate_values)


def _rotated(x: Tensor, rotate: bool) -> Tensor:  # noqa: FBT001
    return rotated(x) if rotate else x


def _codes(x: Tensor, books: Tensor) -> Tensor:
    """Return the codes ``[B, Hkv, N, M]`` of ``[B, Hkv, N, D]``."""
    books = books.to(x)
    parts = x.unflatten(-1, (-1, books.shape[-1]))
    if books.shape[0] == 1:
        return nearest(parts.flatten(0, -2), books[0]).view(parts.shape[:-1])
    heads = [
        nearest(head.flatten(0, -2), book).view(head.shape[:-1])
        for head, book in zip(parts.unbind(1), books, strict=True)
    ]
    return torch.stack(heads, 1)


def _decoded(
    packed: Tensor, books: Tensor, form: CodeFormat, size: int, dtype: torch.dtype
) -> Tensor:
    """Return the codewords of packed codes, side by side."""
    codes = unpack(packed, form.bits, form.codes(size))
    if books.shape[0] == 1:
        return books[0].to(dtype)[codes].flatten(-2)
    head = torch.arange(books.shape[0], device=codes.device)[:, None, None]
    return books.to(dtype)[head, codes].flatten(-2)
