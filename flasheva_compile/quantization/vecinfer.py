"""VecInfer's codes of one layer: keys smoothed, rotated and vector-quantised, values quantised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flasheva_compile.quantization.codebook import nearest
from flasheva_compile.quantization.packing import pack, unpack
from flasheva_compile.quantization.transform import compute_dtype, rotated

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
    """

    scale: Tensor
    keys: Tensor
    values: Tensor
    rotate_keys: bool = True
    rotate_values: bool = False

    def nbytes(self) -> int:
        """Return the bytes of scales and codebooks."""
        return sum(x.numel() * x.element_size() for x in (self.scale, self.keys, self.values))

    def to(self, device: torch.device | str) -> LayerCodebooks:
        """Return a copy on a device."""
        return LayerCodebooks(
            scale=self.scale.to(device),
            keys=self.keys.to(device),
            values=self.values.to(device),
            rotate_keys=self.rotate_keys,
            rotate_values=self.rotate_values,
        )


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
        self.key_bytes = form.key.nbytes(head_dim)
        self.value_bytes = form.value.nbytes(value_dim)

    # --- encoding ---------------------------------------------------------------------------------

    def transform_keys(self, k: Tensor) -> Tensor:
        """Return ``(k / scale) H``."""
        k = k.to(compute_dtype(k.dtype))
        return _rotated(k / self.codebooks.scale.to(k)[:, None], self.codebooks.rotate_keys)

    def transform_values(self, v: Tensor) -> Tensor:
        """Return the values as they are quantised."""
        return _rotated(v.to(compute_dtype(v.dtype)), self.codebooks.rotate_values)

    def encode_keys(self, k: Tensor) -> Tensor:
        """Return the packed codes of keys ``[B, Hkv, N, D]``, ``[B, Hkv, N, bytes]`` uint8."""
        return pack(_codes(self.transform_keys(k), self.codebooks.keys), self.form.key.bits)

    def encode_values(self, v: Tensor) -> Tensor:
        """Return the packed codes of values ``[B, Hkv, N, Dv]``, ``[B, Hkv, N, bytes]`` uint8."""
        return pack(_codes(self.transform_values(v), self.codebooks.values), self.form.value.bits)

    # --- attending --------------------------------------------------------------------------------

    def transform_queries(self, q: Tensor) -> Tensor:
        """Return ``(q * scale) H``, of which products with transformed keys are the scores.

        Args:
            q: ``[B, Hkv, G, L, D]``: query heads by the kv head that they read.
        """
        scaled = q * self.codebooks.scale.to(q)[:, None, None]
        return _rotated(scaled, self.codebooks.rotate_keys)

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
        """Sum one entry per code of the tables ``q_m . codeword``."""
        form, books = self.form.key, self.codebooks.keys.to(q.dtype)
        codes = unpack(packed, form.bits, form.codes(self.head_dim))
        parts = q.unflatten(-1, (-1, form.vector))  # [B, Hkv, G, L, M, d]
        table = torch.einsum("bhglmd,hkd->bhglmk", parts, books.expand(q.shape[1], -1, -1))
        total = q.new_zeros(*q.shape[:-1], packed.shape[2])
        for m in range(codes.shape[-1]):
            index = codes[:, :, None, None, :, m].expand_as(total)
            total += table[..., m, :].gather(-1, index)
        return total

    def decode_keys(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Return coded keys, still smoothed and rotated, ``[B, Hkv, N, D]``."""
        return _decoded(packed, self.codebooks.keys, self.form.key, self.head_dim, dtype)

    def decode_values(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Return coded values, still rotated, ``[B, Hkv, N, Dv]``."""
        return _decoded(packed, self.codebooks.values, self.form.value, self.value_dim, dtype)

    def restore_keys(self, k: Tensor) -> Tensor:
        """Undo :meth:`transform_keys`."""
        return _rotated(k, self.codebooks.rotate_keys) * self.codebooks.scale.to(k)[:, None]

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
