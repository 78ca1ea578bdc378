"""One block of queries of the retrieval tier: its remaining columns, and the keys it retrieves.

Forward and backward share this file, so both see the same scores bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from flasheva_compile.kernels.blocked.block import QueryBlock
from flasheva_compile.kernels.blocked.dropout import keep_mask
from torch.nn import functional

if TYPE_CHECKING:
    from flasheva_compile.kernels.blocked.block import Operands, Workspace
    from flasheva_compile.kernels.blocked.geometry import AttentionSettings, Geometry
    from torch import Tensor


class RetrievalBlock(QueryBlock):
    """A block of queries whose selected chunks are not attended as chunk tokens.

    Attributes:
        group: Queries that share a selection; the block starts at a whole group.
        selected: ``[B, Hkv, m, n]``, chunk slots of its ``m`` groups, -1 = none.
    """

    def __init__(
        self,
        t: Operands,
        geometry: Geometry,
        settings: AttentionSettings,
        work: Workspace,
        queries: tuple[int, int],
        selected: Tensor,
        group: int,
    ) -> None:
        super().__init__(t, geometry, settings, work, queries)
        pieces = [piece.hi for piece in self.columns.pieces if piece.is_chunk]
        self.slots = max(pieces, default=0)
        first, last = queries
        # Slots ascend and -1 comes last: more than the block's queries can see need no look. Where
        # there is no whole chunk to gather, they see none.
        complete = t.k.shape[2] >= settings.chunk_size
        count = min(selected.shape[-1], self.slots) if complete else 0
        self.group_size = group
        self.selected = selected[:, :, first // group : -(-last // group), :count]

    def scores(self, name: str = "scores", *, tanh_name: str | None = None) -> Tensor:
        """Compute scores with selected chunks masked; see :meth:`QueryBlock.scores`."""
        out = super().scores(name, tanh_name=tanh_name)
        if self.selected.shape[-1]:
            taken = self._taken()
            for piece, lo, hi in self.pieces():
                if piece.is_chunk:
                    part = out.view(*self.split, -1)[..., lo:hi]
                    part.masked_fill_(taken[:, :, None, :, piece.lo : piece.hi], -torch.inf)
        return out

    def _taken(self) -> Tensor:
        """Return which chunk slots each query attends exactly instead, ``[B, Hkv, n, slots]``."""
        index = torch.where(self.selected < 0, self.slots, self.selected).long()
        shape = (*index.shape[:3], self.slots + 1)
        taken = torch.zeros(shape, dtype=torch.bool, device=index.device)
        taken.scatter_(3, index, True)
        queries = self.last - self.first
        return taken[..., : self.slots].repeat_interleave(self.group_size, 2)[:, :, :queries]

    def fold_groups(self, folded: Tensor, padding: float = 0.0) -> Tensor:
        """Turn ``[B * Hkv, G * n, X]`` into ``[B * Hkv * m, G * group, X]``, padded at the end."""
        batch, kv_heads, heads, n = self.split
        m = self.selected.shape[2]
        x = folded.view(batch, kv_heads, heads, n, -1)
        x = functional.pad(x, (0, 0, 0, m * self.group_size - n), value=padding)
        x = x.unflatten(3, (m, self.group_size)).transpose(2, 3)
        return x.reshape(batch * kv_heads * m, heads * self.group_size, -1)

    def unfold_groups(self, grouped: Tensor) -> Tensor:
        """Undo :meth:`fold_groups`."""
        batch, kv_heads, heads, n = self.split
        x = grouped.view(batch, kv_heads, -1, heads, self.group_size, grouped.shape[-1])
        x = x.transpose(2, 3).flatten(3, 4)[:, :, :, :n]
        return x.reshape(batch * kv_heads, heads * n, -1)


def gather_chunks(
    source: Tensor, first: Tensor, chunk_size: int, out: Tensor | None = None
) -> Tensor:
    """Gather chunks of consecutive rows.

    Args:
        source: ``[B, H, S, X]``, contiguous, ``S >= chunk_size``.
        first: ``[B, H, ...]`` int64, each chunk's first row; clamped to where a whole one begins.
        chunk_size: Rows of a chunk.
        out: Contiguous; used if it has the dtype of ``source``.

    Returns:
        ``[chunks, chunk_size * X]`` in the order of ``first``, or ``out``.
    """
    batch, heads, length, size = source.shape
    # All runs of chunk_size rows, overlapping in memory: one row is one copy.
    runs = source.as_strided(
        (batch * heads * length - chunk_size + 1, chunk_size * size), (size, 1)
    )
    base = torch.arange(batch * heads, device=source.device) * length
    base = base.view(batch, heads, *[1] * (first.dim() - 2))
    index = (base + first.clamp(0, length - chunk_size)).flatten()
    if out is None or out.dtype != source.dtype:
        return runs.index_select(0, index)
    torch.index_select(runs, 0, index, out=out.view(index.shape[0], chunk_size * size))
    return out


class RetrievedKeys:
    """The keys of a block's selected chunks, gathered by index, in compute dtype.

    Attributes:
        columns: ``[B, Hkv, m, n * c]``, key columns, clamped (the mask knows).
        mask: ``[B, Hkv, m, n * c]``, whether that column is a valid key of a selected chunk.
        q: ``[B * Hkv * m, G * group, D]``, times the score scale.
        k: ``[B * Hkv * m, n * c, D]``.
        v: ``[B * Hkv * m, n * c, Dv]``.
    """

    def __init__(self, block: RetrievalBlock) -> None:
        self.block = block
        geometry, c = block.geometry, block.settings.chunk_size
        slot = block.selected.clamp(min=0).long()
        first = geometry.chunk_first.expand(slot.shape[0], -1)[:, None, None]
        first = first.expand(*slot.shape[:3], -1).gather(3, slot)
        columns = first[..., None] + torch.arange(c, device=slot.device)
        inside = (block.selected >= 0)[..., None] & (columns >= 0) & (columns < geometry.keys)
        self.first, self.columns = first, columns.clamp(0, geometry.keys - 1).flatten(3)
        self.mask = inside.flatten(3)
        if geometry.valid is not None:
            row = torch.arange(slot.shape[0], device=slot.device)[:, None, None, None]
            self.mask &= geometry.valid[row, self.columns]
        self.q = block.fold_groups(block.q)
        self.k, self.v = self._gather(block.t.k, "rk"), self._gather(block.t.v, "rv")

    def _gather(self, source: Tensor, name: str) -> Tensor:
        batch, kv_heads, m, n = self.columns.shape
        out = self.block.work.take(name, batch * kv_heads * m, n, source.shape[-1])
        part = gather_chunks(source, self.first, self.block.settings.chunk_size, out)
        return out if part is out else out.copy_(part.view(out.shape))

    def scores(self, *, tanh_name: str | None = None) -> Tensor:
        """Compute masked scores ``[B * Hkv * m, G * group, n * c]``; tanh as in QueryBlock."""
        block, s = self.block, self.block.settings
        shape = (*self.q.shape[:2], self.k.shape[1])
        out = torch.bmm(self.q, self.k.mT, out=block.work.take("rscores", *shape))
        if s.softcap > 0:
            out.div_(s.softcap).tanh_()
            if tanh_name is not None:
                block.work.take(tanh_name, *out.shape).copy_(out)
            out.mul_(s.softcap)
        batch, kv_heads, m, n = self.columns.shape
        view = out.view(batch, kv_heads, m, block.group, block.group_size, n)
        if block.t.alibi_slopes is not None:
            slopes = block.t.alibi_slopes.to(out.dtype).view(kv_heads, 1, block.group, 1, 1)
            distance = self.columns[..., None, None, :] - self._query_columns()[:, None, :, None]
            view.addcmul_(slopes, distance.to(out.dtype))
        view.masked_fill_(~self.mask[:, :, :, None, None], -torch.inf)
        return out

    def _query_columns(self) -> Tensor:
        """Return the column of each query, padding included, ``[m, group]``."""
        block = self.block
        first, m = block.settings.q_offset + block.first, self.columns.shape[2]
        column = torch.arange(first, first + m * block.group_size, device=self.columns.device)
        return column.view(m, block.group_size)

    def kept(self) -> Tensor | None:
        """Return dropout's factors, shaped like the scores, or None; as for exact keys."""
        block, p = self.block, self.block.settings.dropout_p
        if p == 0.0:
            return None
        batch, kv_heads, m, n = self.columns.shape
        device, heads = self.columns.device, block.group
        # [B, Hkv, m, n] -> [B, Hq, m * group, n]: ids differ by kv head and group.
        ids = (self.columns * 2).repeat_interleave(heads, 1).repeat_interleave(block.group_size, 2)
        assert block.t.dropout_seed is not None  # checked by the op
        keep = keep_mask(
            block.t.dropout_seed,
            torch.arange(block.t.first_row, block.t.first_row + batch, device=device),
            torch.arange(kv_heads * heads, device=device),
            self._query_columns().flatten(),
            ids,
            p,
        )
        shape = (batch, kv_heads, heads, m, block.group_size, n)
        factor = keep.to(self.q.dtype).view(shape).transpose(2, 3).reshape(*self.q.shape[:2], n)
        return factor.mul_(1 / (1 - p)) if p < 1 else factor
