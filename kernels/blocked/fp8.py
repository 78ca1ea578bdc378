"""fp8 numbers of tokens: e4m3 with one power of two per token and kv head."""

from __future__ import annotations

import torch
from torch import Tensor

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max
_EXPONENTS = 126  # the largest, negative or positive, whose power of two is an fp32 number
_LOST = -128  # the exponent of a token that is not finite: no number of it is known


def encode_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round tokens to e4m3 times a power of two of their own.

    Nothing saturates, and the power costs no precision. A token with an infinity or NaN is NaN.

    Args:
        x: ``[..., D]``, any floating dtype.

    Returns:
        Numbers ``[..., D]`` and exponents ``[..., 1]``, the bytes of both as uint8.
    """
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    amax = x.abs().amax(-1, keepdim=True)
    known = amax.isfinite()
    # The smallest exponent with amax / largest <= 2^e.
    mantissa, exponent = torch.frexp(amax / _LARGEST)
    exponent = (exponent - (mantissa == 0.5).int()).clamp(-_EXPONENTS, _EXPONENTS)
    exponent = exponent.masked_fill(amax == 0, -_EXPONENTS)
    scaled = (x * _power(-exponent)).clamp(-_LARGEST, _LARGEST).where(known, torch.nan)
    exponent = exponent.where(known, _LOST).to(torch.int8)
    return scaled.to(_FP8).view(torch.uint8), exponent.view(torch.uint8)


def decode_fp8(codes: Tensor, exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers ``[..., D]`` that :func:`encode_fp8` made bytes of."""
    numbers = codes.contiguous().view(_FP8).to(dtype)
    return (numbers * _power(exponent.contiguous().view(torch.int8))).to(dtype)


def _power(exponent: Tensor) -> Tensor:
    """Return powers of two in fp32: exactly, which no device promises of ``pow``."""
    return ((exponent.int() + 127) << 23).view(torch.float32)
