"""First phase of the retrieval tier: which chunks each group of queries attends exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from flasheva_compile.kernels.blocked.block import BLOCK_SIZE
from flasheva_compile.kernels.blocked.columns import Piece, chunk_mask

if TYPE_CHECKING:
    from flasheva_compile.kernels.blocked.block import Operands
    from flasheva_compile.kernels.blocked.geometry import AttentionSettings, Geometry
    from torch import Tensor

_CPU_BUDGET, _GPU_BUDGET = 1 << 21, 1 << 26  # chunk logits held at once [elements]
_INVISIBLE = -(2**63)
_LOW_WORD = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """How much is retrieved.

    Attributes:
        chunks: Chunks that a query attends exactly.
        block: Consecutive positions that share the selection of the first of them.
        by: ``"token"``: chunk tokens' logits select; ``"bounds"``: see ``chunk_bounds``.
        weight: Of the bounds, ``[Hkv, 3, D]``; None = 1/2 each.
    """

    chunks: int
    block: int = 1
    by: str = "token"
    weight: Tensor | None = field(default=None, compare=False)


def group_size(block: int, *, uniform: bool) -> int:
    """Return how many consecutive queries surely share a selection.

    Blocks count from each document's start. Where all rows start at column 0, a group that divides
    a block and :data:`BLOCK_SIZE` lies within one block, and blocks of queries are whole groups.
    """
    return math.gcd(block, BLOCK_SIZE) if uniform else 1


def select_chunks(
    t: Operands, geometry: Geometry, s: AttentionSettings, retrieval: Retrieval
) -> Tensor:
    """Select the visible chunks with the largest logits, by the first query of each block.

    Args:
        t: The tensors of the call.
        geometry: Who may attend what.
        s: Window, chunks, scale and so on.
        retrieval: How many chunks, and for how many queries at once.

    Returns:
        ``[B, Hkv, groups, min(chunks, C)]`` int32 chunk slots in ascending order, then -1 where
        fewer are visible; see :func:`group_size`.

    Source:
        Ours; the formula is ``kernels/reference/retrieval.py``.
    """
    group = group_size(retrieval.block, uniform=geometry.uniform)
    batch, kv_heads, slots = t.rfa_bias.shape
    groups = -(-t.q.shape[2] // group)
    count = min(retrieval.chunks, slots)
    selected = t.q.new_full((batch, kv_heads, groups, count), -1, dtype=torch.int32)
    rfa_k = t.rfa_k.to(t.compute_dtype)
    budget = _CPU_BUDGET if t.q.device.type == "cpu" else _GPU_BUDGET
    step = max(1, min(groups, budget // max(1, t.q.shape[1] * batch * slots)))
    for first in range(0, groups, step):
        last = min(groups, first + step)
        query = torch.arange(first * group, last * group, group, device=t.q.device)
        leaders = _first_in_block(query, geometry, s, retrieval.block)
        limit = min(slots, max(0, (s.q_offset + (last - 1) * group) // s.chunk_size))
        if limit == 0 or count == 0:
            continue
        scores = _selector_scores(t, rfa_k[:, :, :limit], geometry, s, leaders)
        bounds = [
            x.take_along_dim(leaders, 1)[..., None]
            for x in (geometry.begin, geometry.sink_end, geometry.lo, geometry.hi)
        ]
        visible = chunk_mask(Piece(is_chunk=True, lo=0, hi=limit), geometry, s, bounds)
        best = largest_scores(scores, visible[:, None], min(count, limit))
        selected[:, :, first:last, : best.shape[-1]] = best
    return selected


def _first_in_block(query: Tensor, geometry: Geometry, s: AttentionSettings, block: int) -> Tensor:
    """Return the first query of each query's block, ``[B or 1, n]``; blocks count positions."""
    if block == 1:
        return query.expand(geometry.lo.shape[0], -1)
    position = query + s.q_offset - geometry.begin[:, query]
    return torch.where(position >= 0, query - position % block, query)


def _selector_scores(
    t: Operands, rfa_k: Tensor, geometry: Geometry, s: AttentionSettings, leaders: Tensor
) -> Tensor:
    """Return the maximum of the chunk logits over each group of heads, ``[B, Hkv, n, slots]``."""
    batch, kv_heads, slots, size = rfa_k.shape
    q = t.q.take_along_dim(leaders[:, None, :, None], 2).to(rfa_k.dtype)
    q = q.mul_(s.scale) if q is not t.q else q * s.scale
    logits = q.reshape(batch, kv_heads, -1, size) @ rfa_k.mT
    logits = logits.view(batch, kv_heads, -1, leaders.shape[1], slots)
    if s.softcap > 0:
        logits.div_(s.softcap).tanh_().mul_(s.softcap)
    if t.alibi_slopes is not None:
        slopes = t.alibi_slopes.to(logits.dtype).view(kv_heads, -1, 1, 1)
        distance = geometry.chunk_mean[:, None, :slots] - (leaders + s.q_offset)[..., None]
        logits.addcmul_(slopes, distance[:, None, None].to(logits.dtype))
    return logits.amax(2).add_(t.rfa_bias[:, :, None, :slots])


def largest_scores(scores: Tensor, visible: Tensor, count: int) -> Tensor:
    """Return the ``count`` largest in ascending order of index, -1 for missing ones; exact ties.

    A score in fp32 and its index become one integer that orders as both do, the lower index first:
    all are distinct, so that the result does not depend on how the device selects.
    """
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = scores.shape[-1] - 1
    index = torch.arange(last, -1, -1, device=scores.device)
    key = (ordered.long() << 32).add_(index).masked_fill_(~visible, _INVISIBLE)
    best = key.topk(count, dim=-1, sorted=False).values
    found = torch.where(best == _INVISIBLE, last + 1, last - (best & _LOW_WORD))
    found = found.sort(-1).values
    return torch.where(found > last, -1, found).int()
