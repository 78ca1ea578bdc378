"""Chunk tokens in plain PyTorch, tile by tile, forward.

Every rule is two softmaxes over the chunk, one weighing keys and one weighing values, and a bias;
the rules differ in the logits. See ``kernels/reference/chunk_rules.py`` for the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from flasheva_compile.kernels.blocked.geometry import chunk_layout, valid_keys
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

_TILE_TOKENS = 2048  # keys per tile: its fp32 copies stay in cache


@dataclass(frozen=True, kw_only=True)
class ChunkSettings:
    """The rule, its scale and the chunk size [tokens]."""

    rule: str
    chunk_size: int
    scale: float


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Chunks ``[lo, hi)`` in compute dtype.

    Attributes:
        lo: First slot.
        hi: Slot after the last.
        k: ``[B, Hkv, n, c, D]``.
        v: ``[B, Hkv, n, c, Dv]``.
        valid: ``[B or 1, 1, n, c]``; None = all.
        parameters: The rule's, in compute dtype, shaped to multiply ``k``'s leading dimensions.
    """

    lo: int
    hi: int
    k: Tensor
    v: Tensor
    valid: Tensor | None
    parameters: tuple[Tensor, ...]


class ChunkedSource:
    """Keys and values seen as chunks; ``at [B, C, c]`` are the columns of masked calls."""

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        parameters: Sequence[Tensor],
        masks: tuple[Tensor | None, Tensor | None],
        settings: ChunkSettings,
    ) -> None:
        self.k, self.v, self.parameters, self.settings = k, v, parameters, settings
        self.dtype = compute_dtype(k)
        self.slots = -(-k.shape[2] // settings.chunk_size)
        valid = valid_keys(*masks)
        if valid is None or self.slots == 0:
            self.layout = None
        else:
            self.layout = chunk_layout(valid, masks[1], settings.chunk_size)

    def tiles(self) -> Iterator[Tile]:
        """Yield the chunk axis in tiles of about the same number of keys."""
        step = max(1, _TILE_TOKENS // self.settings.chunk_size)
        for lo in range(0, self.slots, step):
            hi = min(self.slots, lo + step)
            yield Tile(
                lo=lo,
                hi=hi,
                k=self._chunked(self.k, lo, hi),
                v=self._chunked(self.v, lo, hi),
                valid=self._valid(lo, hi),
                parameters=self._parameters(lo, hi),
            )

    def _chunked(self, x: Tensor, lo: int, hi: int) -> Tensor:
        c = self.settings.chunk_size
        if self.layout is None:
            part = x[:, :, lo * c : hi * c]
            part = functional.pad(part, (0, 0, 0, (hi - lo) * c - part.shape[2]))
        else:
            at = self.layout.columns[:, None, lo:hi].flatten(2)[..., None]
            part = x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3]))
        return part.unflatten(2, (hi - lo, c)).to(self.dtype)

    def _valid(self, lo: int, hi: int) -> Tensor | None:
        if self.layout is not None:
            return self.layout.valid[:, None, lo:hi]
        c, length = self.settings.chunk_size, self.k.shape[2]
        if hi * c <= length:
            return None
        return (torch.arange(lo * c, hi * c, device=self.k.device) < length).view(1, 1, hi - lo, c)

    def _parameters(self, lo: int, hi: int) -> tuple[Tensor, ...]:
        if self.settings.rule == "eva":  # per chunk: [B, Hkv, n, D]
            return tuple(p[:, :, lo:hi].to(self.dtype) for p in self.parameters)
        # per head: [Hkv, 1, D] and [Hkv, 1]
        return tuple(p.unsqueeze(1).to(self.dtype) for p in self.parameters)

    def unchunk(self, per_chunk: Tensor) -> Tensor:
        """Return ``[B, H, C, c, X]`` as ``[B, H, S, X]``: each column from its only chunk, or 0."""
        flat, length = per_chunk.flatten(2, 3), self.k.shape[2]
        if self.layout is None:
            return flat[:, :, :length]
        # Slots without a chunk and columns past the end scatter exact zeros: order does not matter.
        at = self.layout.columns[:, None].flatten(2)[..., None].expand(flat.shape)
        return flat.new_zeros(*flat.shape[:2], length, flat.shape[3]).scatter_add_(2, at, flat)


def compute_dtype(k: Tensor) -> torch.dtype:
    """Accumulate in fp64 for fp64 inputs, else in fp32."""
    return torch.float64 if k.dtype == torch.float64 else torch.float32


def chunk_tokens_forward(
    k: Tensor,
    v: Tensor,
    parameters: Sequence[Tensor],
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    settings: ChunkSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summarise each chunk by one token.

    Args:
        k: Keys, ``[B, Hkv, S, D]``.
        v: Values, ``[B, Hkv, S, Dv]``.
        parameters: The rule's parameters; for ``eva``, ``(rfa_k, omega)``.
        key_mask: ``[B, S]``, True = may attend.
        segment_ids: ``[B, S]``, packed documents.
        settings: Rule, chunk size, scale.

    Returns:
        ``rfa_k [B, Hkv, C, D]``, ``rfa_v [B, Hkv, C, Dv]`` in the inputs' dtypes, ``rfa_bias
        [B, Hkv, C]`` in the compute dtype; ``(0, 0, -inf)`` for a slot without valid key.
    """
    source = ChunkedSource(k, v, parameters, (key_mask, segment_ids), settings)
    head = (*k.shape[:2], source.slots)
    rfa_k = k.new_empty(*head, k.shape[3])
    rfa_v = v.new_empty(*head, v.shape[3])
    rfa_bias = k.new_empty(head, dtype=source.dtype)
    for tile in source.tiles():
        weights = chunk_weights(tile, settings)
        at = (slice(None), slice(None), slice(tile.lo, tile.hi))
        pooled_k = pool(weights.k, tile.k)
        rfa_k[at] = tile.parameters[0] * weights.exists[..., None] if weights.copies else pooled_k
        rfa_v[at] = pool(weights.v, tile.v)
        rfa_bias[at] = _bias(tile, weights, pooled_k, settings)
    return rfa_k, rfa_v, rfa_bias


@dataclass(frozen=True, kw_only=True)
class ChunkWeights:
    """How each chunk of a tile weighs its keys.

    Attributes:
        k: Weights of the keys, ``[B, Hkv, n, c]``.
        v: Weights of the values.
        log_mass: Log-sum-exp of the keys' logits, ``[B, Hkv, n]``.
        exists: Whether the chunk has a valid key, ``[B or 1, Hkv, n]``.
        copies: rfa_k is a parameter, not a weighted sum.
    """

    k: Tensor
    v: Tensor
    log_mass: Tensor
    exists: Tensor
    copies: bool


def chunk_weights(tile: Tile, s: ChunkSettings) -> ChunkWeights:
    """Compute the rule's weights over the keys of each chunk of the tile."""
    key_logits, value_logits = _logits(tile, s)
    weights_k, log_mass = _softmax(key_logits, tile.valid)
    shared = value_logits is key_logits
    weights_v = weights_k if shared else _softmax(value_logits, tile.valid)[0]
    exists = log_mass > -torch.inf
    return ChunkWeights(
        k=weights_k, v=weights_v, log_mass=log_mass, exists=exists, copies=s.rule == "eva"
    )


def _logits(tile: Tile, s: ChunkSettings) -> tuple[Tensor, Tensor]:
    """Return the logits of keys and of values, ``[B, Hkv, n, c]``; one object where they agree."""
    p = tile.parameters
    if not p:
        zeros = torch.zeros_like(tile.k[..., 0])
        value_logits = _proposal(zeros, tile, s) if s.rule == "evabyte" else zeros
        return zeros, value_logits
    if s.rule == "tangent":
        logits = s.scale * dot(tile.k, p[0])
        return logits, logits
    if s.rule == "evabyte":
        return dot(tile.k, p[0]), _proposal(dot(tile.k, p[1]), tile, s)
    return torch.zeros_like(tile.k[..., 0]), _proposal(dot(tile.k, p[1]), tile, s)


def _proposal(dot: Tensor, tile: Tile, s: ChunkSettings) -> Tensor:
    return s.scale * (dot - tile.k.square().sum(-1) / 2)


def dot(k: Tensor, p: Tensor) -> Tensor:
    """Return the product of every key ``[..., c, D]`` with its head's or chunk's ``[..., D]``."""
    return (k @ p[..., None]).squeeze(-1)


def pool(weights: Tensor, x: Tensor) -> Tensor:
    """Return the weighted sum of ``[..., c, X]`` over the chunk with weights ``[..., c]``."""
    return (weights[..., None, :] @ x).squeeze(-2)


def _softmax(logits: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp over the valid keys; ``(0, -inf)`` where there are none."""
    if valid is not None:
        logits = logits.masked_fill(~valid, -torch.inf)
    peak = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    weights = (logits - peak).exp()
    total = weights.sum(-1, keepdim=True)
    # Where a key is valid the peak counts 1, so the clamp only touches empty chunks.
    return weights / total.clamp(min=1), (peak + total.log()).squeeze(-1)


def _bias(tile: Tile, weights: ChunkWeights, pooled_k: Tensor, s: ChunkSettings) -> Tensor:
    if s.rule == "mean" or (s.rule == "tangent" and not tile.parameters):
        return weights.log_mass
    if s.rule == "tangent":
        return weights.log_mass - s.scale * (pooled_k * tile.parameters[0]).sum(-1)
    constant = tile.parameters[2] if s.rule == "evabyte" and len(tile.parameters) > 2 else 0.0
    return torch.where(weights.exists, constant, -torch.inf).to(weights.k.dtype)
