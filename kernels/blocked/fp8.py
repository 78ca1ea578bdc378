"""fp8 in plain PyTorch: e4m3 numbers with one power of two for each vector of them."""

from __future__ import annotations

import torch
from torch import Tensor

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max
_EXPONENTS = 126  # the largest, negative or positive, whose power of two is an fp32 number
_LOST = -128  # the exponent of a vector that is not finite: no number of it is known


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round vectors to fp8.

    The scale is each vector's own, so that nothing saturates; a power of two costs no precision. A
    vector with an infinity or NaN is NaN.

    Args:
        x: ``[..., D]``, any floating dtype.

    Returns:
        The numbers' bytes, ``[..., D]`` uint8, and their exponent, ``[..., 1]`` int8.
    """
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    amax = x.abs().amax(-1, keepdim=True)
    known = amax.isfinite()
    if x.dtype == torch.float64:  # which holds more than any power has numbers for
        known &= amax <= _LARGEST * 2.0**_EXPONENTS
    # The smallest exponent with amax / largest <= 2^e.
    mantissa, exponent = torch.frexp(amax / _LARGEST)
    exponent = (exponent - (mantissa == 0.5).int()).clamp(-_EXPONENTS, _EXPONENTS)
    exponent = exponent.masked_fill(amax == 0, -_EXPONENTS)
    scaled = (x * _power(-exponent)).clamp(-_LARGEST, _LARGEST).where(known, torch.nan)
    return scaled.to(_FP8).view(torch.uint8), exponent.where(known, _LOST).to(torch.int8)


def decode(codes: Tensor, exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the vectors that :func:`encode` rounded, ``[..., D]`` in ``dtype``."""
    numbers = codes.contiguous().view(_FP8).to(dtype)
    return (numbers * _power(exponent)).to(dtype)


def _power(exponent: Tensor) -> Tensor:
    """Return powers of two in fp32: exactly, which no device promises of ``pow``."""
    return ((exponent.int() + 127) << 23).view(torch.float32)
