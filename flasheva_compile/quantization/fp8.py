"""fp8 codes: e4m3 numbers with one power of two per token and kv head."""

from __future__ import annotations

import torch
from torch import Tensor

from flasheva_compile.quantization.transform import compute_dtype

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max
_EXPONENTS = 126  # the largest, negative or positive, whose power of two is an fp32 number
_LOST = -128  # the exponent of a token that is not finite: no number of it is known


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
    x = x.to(compute_dtype(x.dtype))
    amax = x.abs().amax(-1, keepdim=True)
    known = amax.isfinite()
    # The smallest exponent with amax / largest <= 2^e.
    mantissa, exponent = torch.frexp(amax / _LARGEST)
    exponent = (exponent - (mantissa == 0.5).int()).clamp(-_EXPONENTS, _EXPONENTS)
    exponent = exponent.masked_fill(amax == 0, -_EXPONENTS)
    scaled = (x * _power(-exponent)).clamp(-_LARGEST, _LARGEST).where(known, torch.nan)
    bytes_of = (scaled.to(_FP8), exponent.where(known, _LOST).to(torch.int8))
    return torch.cat([x.view(torch.uint8) for x in bytes_of], -1)


def _decoded(packed: Tensor, dtype: torch.dtype) -> Tensor:
    numbers = packed[..., :-1].contiguous().view(_FP8).to(dtype)
    return (numbers * _power(packed[..., -1:].contiguous().view(torch.int8))).to(dtype)


def _power(exponent: Tensor) -> Tensor:
    """Return powers of two in fp32: exactly, which no device promises of ``pow``."""
    return ((exponent.int() + 127) << 23).view(torch.float32)
