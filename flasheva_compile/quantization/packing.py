"""Codes as bytes: up to 8 bits in one byte each, up to 12 bits two in three bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes.

    Args:
        codes: ``[..., M]`` int64, each below ``2 ** bits``.
        bits: At most 12.

    Returns:
        ``[..., M]`` uint8 for at most 8 bits, else ``[..., 3 * ceil(M / 2)]`` uint8; an odd M has
        zeros at its end.
    """
    if bits <= 8:
        return codes.to(torch.uint8)
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    a, b = codes.unflatten(-1, (-1, 2)).unbind(-1)
    three = torch.stack([a & 255, a >> 8 | (b & 15) << 4, b >> 4], -1)
    return three.flatten(-2).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the ``count`` codes ``[..., count]`` int64 that :func:`pack` packed."""
    if bits <= 8:
        return packed.long()
    x, y, z = packed.long().unflatten(-1, (-1, 3)).unbind(-1)
    pair = torch.stack([x | (y & 15) << 8, y >> 4 | z << 4], -1)
    return pair.flatten(-2)[..., :count]
