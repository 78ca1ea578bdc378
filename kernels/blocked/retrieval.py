"""Retrieval tier forward in plain PyTorch: select, attend to the rest, attend to what was selected.

The two attentions join by their log-sum-exps. Linear memory, O(N (w + N / c + k c)) time.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from flasheva_compile.kernels.blocked.attention import attend_block
from flasheva_compile.kernels.blocked.block import BLOCK_SIZE, Workspace
from flasheva_compile.kernels.blocked.retrieval_block import RetrievalBlock, RetrievedKeys
from flasheva_compile.kernels.blocked.retrieval_select import group_size
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flasheva_compile.kernels.blocked.block import Operands
    from flasheva_compile.kernels.blocked.geometry import AttentionSettings, Geometry
    from flasheva_compile.kernels.blocked.retrieval_select import Retrieval
    from torch import Tensor

# Elements of scores and gathered keys held at once. A CPU wants them in its cache, a GPU few and
# large launches; there blocks are at most 8 times as long, for a longer one looks at more window.
_CPU_BUDGET, _GPU_BUDGET = 1 << 21, 1 << 27
_CPU_LONGEST, _GPU_LONGEST = BLOCK_SIZE, 8 * BLOCK_SIZE  # queries of a block


def retrieval_forward(
    t: Operands,
    geometry: Geometry,
    settings: AttentionSettings,
    retrieval: Retrieval,
    selected: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attend block by block.

    Args:
        t: The tensors of the call.
        geometry: Who may attend what.
        settings: Window, chunks, scale and so on.
        retrieval: What was selected by :func:`select_chunks`.
        selected: Its result, ``[B, Hkv, groups, n]``.

    Returns:
        ``out [B, Hq, L, Dv]`` in the dtype of ``q`` and ``lse [B, Hq, L]`` in the compute dtype;
        a query that attends nothing has ``(0, -inf)``.

    Source:
        Ours; the formula is ``kernels/reference/retrieval.py``.
    """
    batch, heads, length, _ = t.q.shape
    out = t.q.new_empty(batch, heads, length, t.v.shape[-1])
    lse = t.q.new_empty((batch, heads, length, 1), dtype=t.compute_dtype)
    for (lo, hi), block in blocks(t, geometry, settings, retrieval, selected):
        block_out, block_lse = attend_block(block)
        if block.selected.shape[-1]:
            block_out, block_lse = join(block_out, block_lse, *_attend_retrieved(block))
        block.unfold_into(out[lo:hi], block_out)
        block.unfold_into(lse[lo:hi], block_lse)
    return out, lse.squeeze(-1)


def blocks(
    t: Operands, geometry: Geometry, s: AttentionSettings, retrieval: Retrieval, selected: Tensor
) -> Iterator[tuple[tuple[int, int], RetrievalBlock]]:
    """Yield ``((first row, row after the last), block)`` for all rows and queries."""
    group = group_size(retrieval.block, uniform=geometry.uniform)
    rows, queries = _schedule(t, geometry, s, selected.shape[-1] * s.chunk_size // group)
    batch, length = t.q.shape[0], t.q.shape[2]
    work = Workspace(t.q, t.compute_dtype)
    # Gathered in whole chunks; queries behind all keys see the last chunk, too, whole or not.
    missing = s.chunk_size if s.q_offset + length > geometry.keys else 0
    k, v = (functional.pad(x, (0, 0, 0, missing)).contiguous() for x in (t.k, t.v))
    t = dataclasses.replace(t, k=k, v=v)
    for lo in range(0, batch, rows):
        hi = min(batch, lo + rows)
        part, where, chosen = t.rows(lo, hi), geometry.rows(lo, hi), selected[lo:hi]
        for first in range(0, length, queries):
            span = (first, min(length, first + queries))
            yield (lo, hi), RetrievalBlock(part, where, s, work, span, chosen, group)


def _schedule(
    t: Operands, geometry: Geometry, s: AttentionSettings, retrieved: int
) -> tuple[int, int]:
    """Return how many rows and queries a block has; ``retrieved`` keys are gathered per query."""
    if t.q.device.type == "cpu":
        budget, queries = _CPU_BUDGET, _CPU_LONGEST
    else:  # dropout's hash works on int64, several at a time
        budget, queries = _GPU_BUDGET // (8 if s.dropout_p else 1), _GPU_LONGEST
    heads, kv_heads = t.q.shape[1], t.k.shape[1]
    wide = s.window_size + s.chunk_size + geometry.chunk_first.shape[1] + s.sink_tokens
    gathered = kv_heads * retrieved * (t.k.shape[-1] + t.v.shape[-1])

    def size(n: int) -> int:
        return n * (heads * (wide + n + retrieved) + gathered)

    while queries > BLOCK_SIZE and size(queries) * t.q.shape[0] > budget:
        queries //= 2
    return max(1, budget // max(1, size(queries))), queries


def _attend_retrieved(block: RetrievalBlock) -> tuple[Tensor, Tensor]:
    """Softmax over the retrieved keys alone, times values, and its log-sum-exp."""
    keys = RetrievedKeys(block)
    weights = keys.scores()
    # As in attend_block: an all-masked row gives weights 0 and log-sum-exp -inf.
    peak = weights.amax(-1, keepdim=True).clamp_(min=torch.finfo(weights.dtype).min)
    weights.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    kept = keys.kept()
    if kept is not None:
        weights.mul_(kept)
    out = torch.bmm(weights, keys.v).div_(total.clamp(min=1))
    return block.unfold_groups(out), block.unfold_groups(peak + total.log())


def join(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join two softmaxes over disjoint keys into one."""
    joint = torch.logaddexp(lse, more_lse)
    safe = joint.masked_fill(joint == -torch.inf, torch.inf)
    return out * (lse - safe).exp() + more * (more_lse - safe).exp(), joint
