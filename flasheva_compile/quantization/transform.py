"""Smoothing and rotation of keys: they spread outliers over channels and leave scores as they are.

``q.k = (q * scale) H . (k / scale) H`` for an orthonormal ``H``. Source: VecInfer, Eqs. 4, 5 and 7.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_SMALLEST_SCALE = 1e-4


@cache
def _sylvester(size: int) -> Tensor:
    """Return the orthonormal Hadamard matrix of a power of two, in fp64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


@cache
def hadamard(size: int) -> Tensor:
    """Return an orthonormal and symmetric matrix that mixes channels, ``[size, size]`` fp64.

    It is Hadamard's where ``size`` is a power of two, and otherwise block-diagonal: one Hadamard
    matrix per power of two in ``size``, the largest first (80 = 64 + 16).
    """
    parts = [1 << bit for bit in reversed(range(size.bit_length())) if size >> bit & 1]
    return torch.block_diag(*(_sylvester(part) for part in parts))


@cache
def _hadamard_on(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return hadamard(size).to(device, dtype)


def rotated(x: Tensor) -> Tensor:
    """Return ``x H`` over the last axis; twice is ``x`` again."""
    return x @ _hadamard_on(x.shape[-1], x.dtype, x.device)


def smoothing_scale(largest: Tensor) -> Tensor:
    """Return what keys are divided by: ``sqrt(max |k|)`` of each channel.

    Args:
        largest: ``max |k|`` over calibration tokens, ``[Hkv, D]``.
    """
    return largest.sqrt().clamp_min(_SMALLEST_SCALE)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what is computed in: fp32, or fp64 for fp64 tensors."""
    return torch.float64 if dtype == torch.float64 else torch.float32
