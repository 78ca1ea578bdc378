"""What selects chunks by bounds: each chunk's centre and spread, in plain PyTorch, tile by tile."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from flasheva_compile.kernels.blocked.chunk_tokens import ChunkedSource, ChunkSettings

if TYPE_CHECKING:
    from flasheva_compile.kernels.blocked.block import Operands
    from torch import Tensor


def chunk_bounds(
    k: Tensor,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    chunk_size: int,
    weight: Tensor | None = None,
) -> Tensor:
    """Return ``[centre | spread]`` of every chunk's keys, ``[B, Hkv, C, 2 D]`` in ``k``'s dtype.

    ``s (q.centre + |q|.spread)`` is halfway from the mean score of the chunk's keys to the most
    that a key between their smallest and largest channels can score; weights, which ``calibrate``
    learns, take the place of the halves.

    Args:
        k: Keys, ``[B, Hkv, S, D]``.
        key_mask: ``[B, S]``, True = may attend; None = all.
        segment_ids: ``[B, S]``, packed documents.
        chunk_size: Keys per chunk.
        weight: ``[Hkv, 3, D]``, of mean, middle and half the range; None = 1/2 each.

    Source:
        Ours; the bounds alone are Quest's (arXiv:2406.10774). ``kernels/reference/retrieval.py``.
    """
    settings = ChunkSettings(rule="mean", chunk_size=chunk_size, scale=1.0)
    source = ChunkedSource(k, k[..., :0], (), (key_mask, segment_ids), settings)
    out = k.new_empty(*k.shape[:2], source.slots, 2 * k.shape[3])
    for tile in source.tiles():
        out[:, :, tile.lo : tile.hi] = _bounds(tile.k, tile.valid, weight)
    return out


def _bounds(keys: Tensor, valid: Tensor | None, weight: Tensor | None) -> Tensor:
    """Return centre and spread of ``[B, Hkv, n, c, D]``; 0 for a chunk without valid keys."""
    if valid is None:
        low, high = torch.aminmax(keys, dim=-2)
        mean = keys.mean(-2)
    else:
        flag = valid[..., None]
        low = keys.masked_fill(~flag, torch.inf).amin(-2)
        high = keys.masked_fill(~flag, -torch.inf).amax(-2)
        count = flag.sum(-2)
        mean = keys.masked_fill(~flag, 0).sum(-2) / count.clamp(min=1)
        low, high = (x.masked_fill(count == 0, 0) for x in (low, high))
    if weight is None:
        return torch.cat([mean / 2 + (low + high) / 4, (high - low) / 4], -1)
    of_mean, of_middle, of_range = weight.to(keys.dtype)[:, :, None].unbind(1)
    centre = of_mean * mean + of_middle * (low + high) / 2
    return torch.cat([centre, of_range * (high - low) / 2], -1)


def with_magnitudes(q: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``[q | |q|]``, whose products with :func:`chunk_bounds` are the selector's.

    Queries that are multiplied by ``scale`` already have magnitudes of its sign.
    """
    return torch.cat([q, q.abs() if scale >= 0 else -q.abs()], -1)


def bounds_of_each(
    keys: Tensor, valid: Tensor, chunk_size: int, weight: Tensor | None = None
) -> Tensor:
    """Return :func:`chunk_bounds` of chunks that follow each other, whatever their masks hide.

    Args:
        keys: ``[B, Hkv, n c, D]``.
        valid: ``[B, n c]``; a gap at the front does not move the borders between chunks.
        chunk_size: ``c``.
        weight: As of :func:`chunk_bounds`.
    """
    chunks = keys.unflatten(2, (-1, chunk_size)).to(torch.promote_types(keys.dtype, torch.float32))
    flags = valid.unflatten(1, (-1, chunk_size))[:, None]
    return _bounds(chunks, flags, weight).to(keys.dtype)


def empty_chunks(rfa_bias: Tensor) -> Tensor:
    """Return what to add to scores: ``-inf`` for chunks without valid keys, else 0."""
    return torch.zeros_like(rfa_bias).masked_fill(rfa_bias == -torch.inf, -torch.inf)


def selecting_by_bounds(t: Operands, bounds: Tensor) -> Operands:
    """Return operands whose chunk logits are the scores by bounds, for ``select_chunks``."""
    bias = empty_chunks(t.rfa_bias)
    return dataclasses.replace(t, q=with_magnitudes(t.q), rfa_k=bounds, rfa_bias=bias)
