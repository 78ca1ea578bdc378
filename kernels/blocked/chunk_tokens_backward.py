"""Backward of the chunk tokens: weights recomputed tile by tile, then each rule's chain rule."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from flasheva_compile.kernels.blocked.chunk_tokens import ChunkedSource, chunk_weights, dot, pool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flasheva_compile.kernels.blocked.chunk_tokens import ChunkSettings, ChunkWeights, Tile
    from torch import Tensor


class TokenGradients(NamedTuple):
    """Gradients of the chunk tokens: ``[B, Hkv, C, D]``, ``[B, Hkv, C, Dv]``, ``[B, Hkv, C]``."""

    rfa_k: Tensor
    rfa_v: Tensor
    rfa_bias: Tensor


def chunk_tokens_backward(
    grads: TokenGradients,
    k: Tensor,
    v: Tensor,
    parameters: Sequence[Tensor],
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    settings: ChunkSettings,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Differentiate :func:`chunk_tokens_forward`; deterministic.

    Args:
        grads: Gradients of ``rfa_k``, ``rfa_v`` and ``rfa_bias``.
        k: Keys, ``[B, Hkv, S, D]``.
        v: Values, ``[B, Hkv, S, Dv]``.
        parameters: The rule's parameters; for ``eva``, ``(rfa_k, omega)``.
        key_mask: ``[B, S]``, True = may attend.
        segment_ids: ``[B, S]``, packed documents.
        settings: Rule, chunk size, scale.

    Returns:
        Gradients of ``k``, of ``v`` and of each parameter, in their dtypes.

    Source:
        Ours: the chain rule through ``kernels/reference/chunk_rules.py``.
    """
    source = ChunkedSource(k, v, parameters, (key_mask, segment_ids), settings)
    totals = [torch.zeros_like(p, dtype=source.dtype) for p in parameters]
    dk, dv = [], []
    for tile in source.tiles():
        g = TokenGradients(*(x[:, :, tile.lo : tile.hi].to(source.dtype) for x in grads))
        weights = chunk_weights(tile, settings)
        tile_dk, tile_dp = _key_gradients(g, tile, weights, settings)
        dk.append(tile_dk.to(k.dtype))
        dv.append(_spread(weights.v, g.rfa_v).to(v.dtype))
        for total, part in zip(totals, tile_dp, strict=True):
            if settings.rule == "eva":
                total[:, :, tile.lo : tile.hi] = part
            else:
                total += part.sum((0, 2))
    if not dk:
        return torch.zeros_like(k), torch.zeros_like(v), [torch.zeros_like(p) for p in parameters]
    dp = [total.to(p.dtype) for total, p in zip(totals, parameters, strict=True)]
    return source.unchunk(torch.cat(dk, 2)), source.unchunk(torch.cat(dv, 2)), dp


def _key_gradients(
    g: TokenGradients, tile: Tile, weights: ChunkWeights, s: ChunkSettings
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradient of the tile's keys and, per chunk, of each parameter."""
    # The bias of an empty chunk is a constant, whatever gradient arrives there.
    g = g._replace(rfa_bias=g.rfa_bias * weights.exists)
    if s.rule == "mean" or (s.rule == "tangent" and not tile.parameters):
        return _spread(weights.k, g.rfa_k), []
    if s.rule == "tangent":
        return _tangent(g, tile, weights, s.scale)
    dvalue = s.scale * _softmax_backward(weights.v, dot(tile.v, g.rfa_v))
    dcentre = pool(dvalue, tile.k)  # of p or omega, the centre of the proposal
    centre = tile.parameters[1][..., None, :] if tile.parameters else 0.0
    dk = dvalue[..., None] * (centre - tile.k)
    if s.rule == "eva":
        return dk, [g.rfa_k * weights.exists[..., None], dcentre]
    dk = dk + _spread(weights.k, g.rfa_k)
    if not tile.parameters:
        return dk, []
    dkey = _softmax_backward(weights.k, dot(tile.k, g.rfa_k))
    dk = dk + _spread(dkey, tile.parameters[0])
    return dk, [pool(dkey, tile.k), dcentre, g.rfa_bias][: len(tile.parameters)]


def _tangent(
    g: TokenGradients, tile: Tile, weights: ChunkWeights, scale: float
) -> tuple[Tensor, list[Tensor]]:
    phi, dbias = tile.parameters[0], g.rfa_bias[..., None]
    # bias = log-mass - s phi.rfa_k: the second term adds to the gradient of rfa_k.
    drfa_k = g.rfa_k - scale * phi * dbias
    dweights = dot(tile.k, drfa_k) + dot(tile.v, g.rfa_v)
    dlogits = scale * (_softmax_backward(weights.k, dweights) + weights.k * dbias)
    dphi = pool(dlogits, tile.k) - scale * dbias * pool(weights.k, tile.k)
    return _spread(weights.k, drfa_k) + _spread(dlogits, phi), [dphi]


def _spread(weights: Tensor, per_chunk: Tensor) -> Tensor:
    """Outer product of ``[..., c]`` and ``[..., X]``: the transpose of :func:`pool`."""
    return weights[..., None] * per_chunk[..., None, :]


def _softmax_backward(weights: Tensor, dweights: Tensor) -> Tensor:
    return weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
