"""FlashEVA attention forward in plain PyTorch: blocks of queries, linear time and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from flasheva_compile.kernels.blocked.block import BLOCK_SIZE, QueryBlock, Workspace, row_groups

if TYPE_CHECKING:
    from flasheva_compile.kernels.blocked.block import Operands
    from flasheva_compile.kernels.blocked.geometry import AttentionSettings, Geometry
    from torch import Tensor


def attention_forward(
    t: Operands,
    geometry: Geometry,
    settings: AttentionSettings,
    *,
    block_size: int = BLOCK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Attend block by block.

    Args:
        t: The tensors of the call.
        geometry: Who may attend what.
        settings: Window, chunks, scale and so on.
        block_size: Queries per block; changes rounding only.

    Returns:
        ``out [B, Hq, L, Dv]`` in the dtype of ``q`` and ``lse [B, Hq, L]`` in the compute dtype;
        a query that attends nothing has ``(0, -inf)``.

    Source:
        Ours; the formula is ``kernels/reference/attention.py``.
    """
    batch, heads, length, _ = t.q.shape
    # Not zeroed: at long lengths the first touch of these pages is a seventh of the time.
    out = t.q.new_empty(batch, heads, length, t.v.shape[-1])
    lse = t.q.new_empty((batch, heads, length, 1), dtype=t.compute_dtype)
    work = Workspace(t.q, t.compute_dtype)
    widest = settings.window_size + geometry.chunk_first.shape[1] + settings.sink_tokens
    for lo, hi in row_groups(t, widest, block_size):
        rows, where = t.rows(lo, hi), geometry.rows(lo, hi)
        for first in range(0, length, block_size):
            queries = (first, min(length, first + block_size))
            block = QueryBlock(rows, where, settings, work, queries)
            block_out, block_lse = attend_block(block)
            block.unfold_into(out[lo:hi], block_out)
            block.unfold_into(lse[lo:hi], block_lse)
    return out, lse.squeeze(-1)


def attend_block(block: QueryBlock) -> tuple[Tensor, Tensor]:
    """Softmax over the block's columns, times values, and the log-sum-exp."""
    rows = block.q.shape[:2]
    if block.columns.size == 0:  # amax of nothing is an error
        zeros = block.q.new_zeros(*rows, block.v.shape[-1])
        return zeros, block.q.new_full((*rows, 1), -torch.inf)
    weights = block.scores()
    # The clamp turns the -inf of an all-masked row into weights 0 instead of NaN.
    peak = weights.amax(-1, keepdim=True).clamp_(min=torch.finfo(weights.dtype).min)
    weights.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    kept = block.kept()
    if kept is not None:
        weights.mul_(kept)
    out = block.work.take("out", *rows, block.v.shape[-1])
    torch.bmm(weights, block.v, out=out)
    # A row with any weight has total >= 1, since its peak counts 1.
    return out.div_(total.clamp(min=1)), peak + total.log()
