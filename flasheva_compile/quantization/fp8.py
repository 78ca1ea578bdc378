"""fp8 codes: e4m3 numbers with one power of two per token and kv head."""

from __future__ import annotations

import torch
from torch import Tensor

from flasheva_compile.kernels.blocked import fp8


class Fp8Codec:
    """Stores keys and values as 8-bit floats; the last byte of a token is its exponent.

    The scale is each token's own, so that no calibration is needed and nothing saturates; a power
    of two costs no precision. A token with an infinity or NaN is NaN. The interface is that of
    ``VqCodec``.

    Args:
        head_dim: ``D``.
        value_dim: ``Dv``.
    """

    def __init__(self, head_dim: int, value_dim: int) -> None:
        self.head_dim, self.value_dim = head_dim, value_dim
        self.key_bytes, self.value_bytes = head_dim, value_dim  # without the exponents

    def encode_keys(self, k: Tensor) -> Tensor:
        """Return ``[B, Hkv, N, D + 1]`` uint8."""
        return _encoded(k)

    def encode_values(self, v: Tensor) -> Tensor:
        """Return ``[B, Hkv, N, Dv + 1]`` uint8."""
        return _encoded(v)

    def transform_queries(self, q: Tensor) -> Tensor:
        """Return the queries: keys are not transformed."""
        return q

    def scores(self, q: Tensor, packed: Tensor) -> Tensor:
        """Return the products of queries with coded keys, ``[B, Hkv, G, L, N]``."""
        return q @ self.decode_keys(packed, q.dtype)[:, :, None].transpose(-1, -2)

    def decode_keys(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Return coded keys, ``[B, Hkv, N, D]``."""
        return _decoded(packed, dtype)

    def decode_values(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Return coded values, ``[B, Hkv, N, Dv]``."""
        return _decoded(packed, dtype)

    def restore_keys(self, k: Tensor) -> Tensor:
        """Return the keys as they are."""
        return k

    def restore_values(self, v: Tensor) -> Tensor:
        """Return the values as they are."""
        return v


def _encoded(x: Tensor) -> Tensor:
    return torch.cat([part.view(torch.uint8) for part in fp8.encode(x)], -1)


def _decoded(packed: Tensor, dtype: torch.dtype) -> Tensor:
    exponent = packed[..., -1:].contiguous().view(torch.int8)
    return fp8.decode(packed[..., :-1], exponent, dtype)
