"""Smoothing and rotation of keys: they spread outliers over channels and leave scores as they are.

``q.k = (q * scale) R . ((k - mean) / scale) R + q.mean`` for an orthonormal ``R``. Source:
VecInfer, Eqs. 4, 5 and 7, with ``mean = 0`` and Hadamard's matrix for ``R``; the mean, the balanced
scale and the grouped rotation are this project's (``docs/quantization.md``).
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


def grouped_rotation(order: Tensor, vector: int) -> Tensor:
    """Return a rotation that gives every code channels of all sizes, ``[D, D]`` fp64.

    Channels, largest first, make ``vector`` groups of ``M = D / vector``. A Hadamard matrix mixes
    each group, and code ``m`` takes the ``m``-th of each. So all codes have large and small
    channels in the same places, and one shared codebook can give the large ones more of its bits;
    where all channels are mixed with all, there is nothing to tell apart.

    Args:
        order: Channels from the largest to the smallest, ``[D]`` int64.
        vector: Channels per code; divides ``D``.
    """
    size = order.shape[0]
    codes = size // vector
    mixed = torch.block_diag(*[hadamard(codes)] * vector)  # column j M + m: the m-th of group j
    interleaved = torch.arange(size).view(vector, codes).T.flatten()
    rotation = torch.empty_like(mixed)
    rotation[order.cpu()] = mixed[:, interleaved]
    return rotation


def balancing_scale(keys: Tensor, queries: Tensor) -> Tensor:
    """Return what keys are divided by so that no channel's error counts more than its size.

    An error that a rotation spreads over all channels changes scores by
    ``sum (k / scale)^2 * sum (q * scale)^2``, which ``scale^2 = |k| / |q|`` makes smallest.

    Args:
        keys: Mean square of each channel, ``[Hkv, D]``.
        queries: The same of the queries that read it, ``[Hkv, D]``.
    """
    ratio = keys.sqrt() / queries.sqrt().clamp_min(_SMALLEST_SCALE)
    return ratio.sqrt().clamp_min(_SMALLEST_SCALE)


def reading_scale(queries: Tensor) -> Tensor:
    """Return what keys are divided by so that equal errors of all channels change scores alike.

    Where channels are not all mixed with all, codebooks decide how errors are spread; they keep
    the sum of squares small, which after this scale is that of the scores' errors. Source: ours.

    Args:
        queries: Mean square of each channel of the queries that read the keys, ``[Hkv, D]``.
    """
    return 1 / queries.sqrt().clamp_min(_SMALLEST_SCALE)


def smoothing_scale(largest: Tensor) -> Tensor:
    """Return what keys are divided by: ``sqrt(max |k|)`` of each channel.

    Args:
        largest: ``max |k|`` over calibration tokens, ``[Hkv, D]``.
    """
    return largest.sqrt().clamp_min(_SMALLEST_SCALE)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what is computed in: fp32, or fp64 for fp64 tensors."""
    return torch.float64 if dtype == torch.float64 else torch.float32
