"""Backward of FlashEVA attention: weights recomputed from the log-sum-exp, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from flasheva_compile.kernels.blocked.block import BLOCK_SIZE, QueryBlock, Workspace, row_groups

if TYPE_CHECKING:
    from flasheva_compile.kernels.blocked.block import Operands
    from flasheva_compile.kernels.blocked.geometry import AttentionSettings, Geometry
    from torch import Tensor


class AttentionGradients(NamedTuple):
    """Gradients of the six differentiable inputs, shaped like them."""

    q: Tensor
    k: Tensor
    v: Tensor
    rfa_k: Tensor
    rfa_v: Tensor
    rfa_bias: Tensor

    def rows(self, first: int, last: int) -> AttentionGradients:
        """Return views of rows ``[first, last)``."""
        return AttentionGradients(*(t[first:last] for t in self))


def attention_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    t: Operands,
    geometry: Geometry,
    settings: AttentionSettings,
    *,
    block_size: int = BLOCK_SIZE,
) -> AttentionGradients:
    """Differentiate :func:`attention_forward`; deterministic, one pass over the query blocks.

    Args:
        dout: Gradient of ``out``, ``[B, Hq, L, Dv]``.
        out: Forward result.
        lse: Forward log-sum-exp, ``[B, Hq, L]``.
        t: The tensors of the call.
        geometry: Who may attend what.
        settings: Window, chunks, scale and so on.
        block_size: Queries per block; changes rounding only.

    Returns:
        Gradients in the dtypes of the inputs; keys and values are summed in the compute dtype.

    Source:
        FlashAttention-2 (arXiv:2307.08691), algorithm 2, over the joint columns.
    """
    inputs = (t.q, t.k, t.v, t.rfa_k, t.rfa_v, t.rfa_bias)
    sums = AttentionGradients(
        t.q.new_zeros(t.q.shape), *(x.new_zeros(x.shape, dtype=t.compute_dtype) for x in inputs[1:])
    )
    # -inf marks rows that attend nothing; +inf makes their weights exp(score - inf) = 0.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]
    work = Workspace(t.q, t.compute_dtype)
    widest = settings.window_size + geometry.chunk_first.shape[1] + settings.sink_tokens
    for lo, hi in row_groups(t, widest, block_size):
        rows, where = t.rows(lo, hi), geometry.rows(lo, hi)
        for first in range(0, t.q.shape[2], block_size):
            queries = (first, min(t.q.shape[2], first + block_size))
            block = QueryBlock(rows, where, settings, work, queries)
            if block.columns.size:
                part = sums.rows(lo, hi)
                dq = add_block(part, block, dout[lo:hi], out[lo:hi], lse[lo:hi])
                block.unfold_into(part.q, dq)
    return AttentionGradients(*(s.to(x.dtype) for s, x in zip(sums, inputs, strict=True)))


def add_block(
    sums: AttentionGradients, block: QueryBlock, dout: Tensor, out: Tensor, lse: Tensor
) -> Tensor:
    """Add what one block of queries gives to keys, values and chunk tokens; return its ``dq``."""
    do = block.fold(dout, "do")
    delta = torch.linalg.vecdot(do, block.fold(out, "out"))[..., None]
    weights = block.scores(tanh_name="tanh").sub_(block.fold(lse, "lse")).exp_()
    dweights = block.work.take("dweights", *weights.shape)
    torch.bmm(do, block.v.mT, out=dweights)
    kept = block.kept()
    if kept is not None:
        dweights.mul_(kept)
    dscores = dweights.sub_(delta).mul_(weights)
    if kept is not None:
        weights.mul_(kept)
    dv = torch.bmm(weights.mT, do, out=block.work.take("dv", *block.v.shape))
    dbias = dscores[:, :, : block.columns.chunks].sum(1)
    if block.settings.softcap > 0:
        tanh = block.work.take("tanh", *weights.shape)
        dscores.mul_(tanh.square_().neg_().add_(1))
    dq = torch.bmm(dscores, block.k, out=block.work.take("dq", *block.q.shape))
    # block.q already carries the scale.
    dk = torch.bmm(dscores.mT, block.q, out=block.work.take("dk", *block.k.shape))
    _scatter(sums, block, dk, dv, dbias)
    return dq.mul_(block.settings.scale)


def _scatter(
    sums: AttentionGradients, block: QueryBlock, dk: Tensor, dv: Tensor, dbias: Tensor
) -> None:
    """Add the columns' gradients to where the columns came from."""
    split = block.split[:2]
    dk, dv, dbias = dk.unflatten(0, split), dv.unflatten(0, split), dbias.unflatten(0, split)
    for piece, lo, hi in block.pieces():
        if piece.is_chunk:
            sums.rfa_k[:, :, piece.lo : piece.hi].add_(dk[:, :, lo:hi])
            sums.rfa_v[:, :, piece.lo : piece.hi].add_(dv[:, :, lo:hi])
            sums.rfa_bias[:, :, piece.lo : piece.hi].add_(dbias[:, :, lo:hi])
        elif piece.columns is None:
            sums.k[:, :, piece.lo : piece.hi].add_(dk[:, :, lo:hi])
            sums.v[:, :, piece.lo : piece.hi].add_(dv[:, :, lo:hi])
        else:
            # Columns of a row are distinct, but for clamped ones, whose gradient is exactly 0.
            for total, part in ((sums.k, dk[:, :, lo:hi]), (sums.v, dv[:, :, lo:hi])):
                total.scatter_add_(2, block.gather_index(piece, part.shape[-1]), part)
