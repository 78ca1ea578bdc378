"""Backward of the retrieval tier: weights recomputed from the joint log-sum-exp, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from flasheva_compile.kernels.blocked.attention_backward import AttentionGradients, add_block
from flasheva_compile.kernels.blocked.retrieval import blocks
from flasheva_compile.kernels.blocked.retrieval_block import RetrievedKeys

if TYPE_CHECKING:
    from flasheva_compile.kernels.blocked.block import Operands
    from flasheva_compile.kernels.blocked.geometry import AttentionSettings, Geometry
    from flasheva_compile.kernels.blocked.retrieval_block import RetrievalBlock
    from flasheva_compile.kernels.blocked.retrieval_select import Retrieval
    from torch import Tensor


def retrieval_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    t: Operands,
    geometry: Geometry,
    settings: AttentionSettings,
    retrieval: Retrieval,
    selected: Tensor,
) -> AttentionGradients:
    """Differentiate :func:`retrieval_forward` for a given selection; deterministic.

    Args:
        dout: Gradient of ``out``, ``[B, Hq, L, Dv]``.
        out: Forward result.
        lse: Forward log-sum-exp, ``[B, Hq, L]``.
        t: The tensors of the call.
        geometry: Who may attend what.
        settings: Window, chunks, scale and so on.
        retrieval: What was selected.
        selected: The selection of the forward pass; it has no gradient.

    Returns:
        Gradients in the dtypes of the inputs; keys and values are summed in the compute dtype.
    """
    inputs = (t.q, t.k, t.v, t.rfa_k, t.rfa_v, t.rfa_bias)
    sums = AttentionGradients(
        t.q.new_zeros(t.q.shape), *(x.new_zeros(x.shape, dtype=t.compute_dtype) for x in inputs[1:])
    )
    by_chunk = [_per_chunk(x, t.rfa_bias.shape, settings.chunk_size) for x in sums[1:3]]
    # -inf marks rows that attend nothing; +inf makes their weights exp(score - inf) = 0.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]
    for (lo, hi), block in blocks(t, geometry, settings, retrieval, selected):
        if not block.columns.size:
            continue
        part = sums.rows(lo, hi)
        given = (dout[lo:hi], out[lo:hi], lse[lo:hi])
        dq = add_block(part, block, *given)
        if block.selected.shape[-1]:
            dq += _add_retrieved([x[lo:hi] for x in by_chunk], block, *given)
        block.unfold_into(part.q, dq)
    for total, chunks in zip(sums[1:3], by_chunk, strict=True):
        _add_to_columns(total, chunks, geometry)
    return AttentionGradients(*(s.to(x.dtype) for s, x in zip(sums, inputs, strict=True)))


def _per_chunk(like: Tensor, head: tuple[int, ...], chunk_size: int) -> Tensor:
    """Return zeros ``[B, Hkv, C, c * X]``: a selected chunk's gradients are added as one row."""
    return like.new_zeros(*head, chunk_size * like.shape[-1])


def _add_retrieved(
    by_chunk: list[Tensor], block: RetrievalBlock, dout: Tensor, out: Tensor, lse: Tensor
) -> Tensor:
    """Add the gradients of the block's retrieved keys and values; return the queries' part."""
    keys = RetrievedKeys(block)
    do = block.fold_groups(block.fold(dout, "do"))
    delta = torch.linalg.vecdot(do, block.fold_groups(block.fold(out, "out")))[..., None]
    weights = keys.scores(tanh_name="rtanh")
    weights.sub_(block.fold_groups(block.fold(lse, "lse"), torch.inf)).exp_()
    dweights = torch.bmm(do, keys.v.mT, out=block.work.take("rdweights", *weights.shape))
    kept = keys.kept()
    if kept is not None:
        dweights.mul_(kept)
    dscores = dweights.sub_(delta).mul_(weights)
    if kept is not None:
        weights.mul_(kept)
    dv = torch.bmm(weights.mT, do)
    if block.settings.softcap > 0:
        tanh = block.work.take("rtanh", *weights.shape)
        dscores.mul_(tanh.square_().neg_().add_(1))
    dq = torch.bmm(dscores, keys.k).mul_(block.settings.scale)
    dk = torch.bmm(dscores.mT, keys.q)  # keys.q already carries the scale
    for total, part in zip(by_chunk, (dk, dv), strict=True):
        _add_rows(total, block.selected, part)
    return block.unfold_groups(dq)


def _add_rows(total: Tensor, selected: Tensor, part: Tensor) -> None:
    """Add ``part [B * Hkv * m, n * c, X]`` to the rows ``selected [B, Hkv, m, n]`` of ``total``.

    Missing chunks have gradient 0 and are added to any. Additions to a row keep their order.
    """
    batch, kv_heads, slots = total.shape[:3]
    row = torch.arange(batch * kv_heads, device=total.device).view(batch, kv_heads, 1, 1)
    index = (row * slots + selected.clamp(min=0)).flatten()
    values = part.view(index.shape[0], -1)
    flat = total.view(-1, total.shape[-1])  # rows of a contiguous tensor: a view
    if total.is_cuda:
        flat.index_put_((index,), values, accumulate=True)  # sorts; index_add_ would use atomics
    else:
        flat.index_add_(0, index, values)


def _add_to_columns(total: Tensor, chunks: Tensor, geometry: Geometry) -> None:
    """Add ``chunks [B, Hkv, C, c * X]`` to their keys' columns in ``total [B, Hkv, S, X]``."""
    size = total.shape[-1]
    chunk_size = chunks.shape[-1] // max(1, size)
    offsets = torch.arange(chunk_size, device=total.device)
    # A column belongs to one chunk; clamped columns have gradient 0.
    columns = (geometry.chunk_first[..., None] + offsets).clamp(0, geometry.keys - 1)
    index = columns.long().flatten(1)[:, None, :, None]
    by_column = chunks.unflatten(3, (chunk_size, size)).flatten(2, 3)
    total.scatter_add_(2, index.expand(*by_column.shape), by_column)
