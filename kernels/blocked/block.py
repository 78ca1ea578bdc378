"""One block of queries against its columns: gathering operands, scores and weights.

Forward and backward share this file, so both see the same scores bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from flasheva_compile.kernels.blocked.columns import block_columns, key_columns
from flasheva_compile.kernels.blocked.dropout import keep_mask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flasheva_compile.kernels.blocked.columns import BlockColumns, Piece
    from flasheva_compile.kernels.blocked.geometry import AttentionSettings, Geometry
    from torch import Tensor

BLOCK_SIZE = 64  # queries; measured fastest or equal of 32, 64, 128 at 0.5k..16k tokens (2 cores)
_ROW_BUDGET = 1 << 21  # scores held at once [elements]; more rows than that go one group at a time


@dataclass(frozen=True, kw_only=True)
class Operands:
    """The tensors of one attention call; shapes as in the op, ``B`` rows of a larger batch.

    Attributes:
        q: ``[B, Hq, L, D]``.
        k: ``[B, Hkv, S, D]``.
        v: ``[B, Hkv, S, Dv]``.
        rfa_k: ``[B, Hkv, C, D]``.
        rfa_v: ``[B, Hkv, C, Dv]``.
        rfa_bias: ``[B, Hkv, C]``.
        alibi_slopes: ``[Hq]`` or None.
        dropout_seed: One int64, or None.
        first_row: Index of the first row in the whole batch.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rfa_k: Tensor
    rfa_v: Tensor
    rfa_bias: Tensor
    alibi_slopes: Tensor | None = None
    dropout_seed: Tensor | None = None
    first_row: int = 0

    @property
    def compute_dtype(self) -> torch.dtype:
        """Accumulate in fp64 for fp64 inputs, else in fp32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def rows(self, first: int, last: int) -> Operands:
        """Return the operands of rows ``[first, last)``."""
        tensors = (self.q, self.k, self.v, self.rfa_k, self.rfa_v, self.rfa_bias)
        q, k, v, rfa_k, rfa_v, rfa_bias = (t[first:last] for t in tensors)
        return Operands(
            q=q,
            k=k,
            v=v,
            rfa_k=rfa_k,
            rfa_v=rfa_v,
            rfa_bias=rfa_bias,
            alibi_slopes=self.alibi_slopes,
            dropout_seed=self.dropout_seed,
            first_row=self.first_row + first,
        )


class Workspace:
    """Named scratch buffers that grow and are reused: fresh pages cost more than the arithmetic."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._new = lambda n: torch.empty(n, dtype=dtype, device=like.device)
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a contiguous, uninitialised tensor that is valid until the name is taken again."""
        size = 1
        for n in shape:
            size *= n
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            # Blocks grow along a causal sequence; doubling keeps the reallocations few.
            buffer = self._buffers[name] = self._new(max(size, 2 * (buffer is not None) * size))
        return buffer[:size].view(shape)


def row_groups(t: Operands, columns: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Split the batch so that one block's scores stay in cache."""
    batch, heads = t.q.shape[:2]
    rows = max(1, _ROW_BUDGET // max(1, heads * block_size * columns))
    for first in range(0, batch, rows):
        yield first, min(batch, first + rows)


class QueryBlock:
    """Queries ``[first, last)`` with everything that they attend, in compute dtype.

    Attributes:
        q: ``[B * Hkv, G * n, D]``, times the score scale.
        k: ``[B * Hkv, columns, D]``.
        v: ``[B * Hkv, columns, Dv]``.
        columns: Which columns those are.
    """

    def __init__(
        self,
        t: Operands,
        geometry: Geometry,
        settings: AttentionSettings,
        work: Workspace,
        queries: tuple[int, int],
    ) -> None:
        self.t, self.geometry, self.settings, self.work = t, geometry, settings, work
        self.first, self.last = queries
        self.columns: BlockColumns = block_columns(geometry, settings, *queries)
        self.batch, self.kv_heads = t.k.shape[:2]
        self.group = t.q.shape[1] // max(1, self.kv_heads)
        self.q = self.fold(t.q, "q").mul_(settings.scale)
        self.k = self._gather(t.rfa_k, t.k, "k")
        self.v = self._gather(t.rfa_v, t.v, "v")

    @property
    def split(self) -> tuple[int, int, int, int]:
        """``(B, Hkv, G, n)``: how the two leading dimensions of the folded tensors divide."""
        return self.batch, self.kv_heads, self.group, self.last - self.first

    def fold(self, per_head: Tensor, name: str) -> Tensor:
        """Take this block of ``[B, Hq, L, X]`` as ``[B * Hkv, G * n, X]``; never expands K."""
        batch, kv_heads, group, n = self.split
        size = per_head.shape[-1]
        out = self.work.take(name, batch, kv_heads * group, n, size)
        out.copy_(per_head[:, :, self.first : self.last])
        return out.view(batch * kv_heads, group * n, size)

    def unfold_into(self, per_head: Tensor, folded: Tensor) -> None:
        """Write ``[B * Hkv, G * n, X]`` back to this block of ``[B, Hq, L, X]``."""
        batch, kv_heads, group, n = self.split
        block = per_head[:, :, self.first : self.last]
        block.copy_(folded.view(batch, kv_heads * group, n, -1))

    def pieces(self) -> Iterator[tuple[Piece, int, int]]:
        """Yield each piece with its range among the block's columns."""
        offset = 0
        for piece in self.columns.pieces:
            yield piece, offset, offset + piece.size
            offset += piece.size

    def _gather(self, chunks: Tensor, keys: Tensor, name: str) -> Tensor:
        shape = (self.batch, self.kv_heads, self.columns.size, keys.shape[-1])
        out = self.work.take(name, *shape)
        for piece, lo, hi in self.pieces():
            source = chunks if piece.is_chunk else keys
            if piece.columns is None:
                part = source[:, :, piece.lo : piece.hi]
            else:
                part = source.gather(2, self.gather_index(piece, keys.shape[-1]))
            out[:, :, lo:hi].copy_(part)
        return out.flatten(0, 1)

    def gather_index(self, piece: Piece, size: int) -> Tensor:
        """Return the index ``[B, Hkv, n, size]`` of gathered columns, clamped (the mask knows)."""
        assert piece.columns is not None  # only gathered pieces come here
        index = piece.columns.clamp(0, self.geometry.keys - 1).long()[:, None, :, None]
        return index.expand(self.batch, self.kv_heads, -1, size)

    def scores(self, name: str = "scores", *, tanh_name: str | None = None) -> Tensor:
        """Compute masked, biased scores ``[B * Hkv, G * n, columns]``.

        With a softcap and ``tanh_name``, the tanh is kept in the workspace under that name.
        """
        out = self.work.take(name, *self.q.shape[:2], self.columns.size)
        torch.bmm(self.q, self.k.mT, out=out)
        if self.settings.softcap > 0:
            out.div_(self.settings.softcap).tanh_()
            if tanh_name is not None:
                self.work.take(tanh_name, *out.shape).copy_(out)
            out.mul_(self.settings.softcap)
        self._add_bias(out)
        mask_lo, mask = self.columns.mask_lo, self.columns.mask
        if mask.shape[-1]:
            masked = out.view(*self.split, -1)[..., mask_lo : mask_lo + mask.shape[-1]]
            masked.masked_fill_(~mask[:, None, None], -torch.inf)
        return out

    def _add_bias(self, scores: Tensor) -> None:
        for piece, lo, hi in self.pieces():
            if piece.is_chunk:
                bias = self.t.rfa_bias[:, :, piece.lo : piece.hi].flatten(0, 1)
                scores[:, :, lo:hi].add_(bias[:, None, :])
        if self.t.alibi_slopes is not None:
            slopes = self.t.alibi_slopes.to(scores.dtype).view(self.kv_heads, self.group, 1, 1)
            distance = self._key_columns() - self._query_columns()[:, None]
            scores.view(*self.split, -1).addcmul_(slopes, distance[:, None, None].to(scores.dtype))

    def _query_columns(self) -> Tensor:
        offset = self.settings.q_offset
        return torch.arange(offset + self.first, offset + self.last, device=self.q.device)

    def _key_columns(self) -> Tensor:
        """Column of every key, mean column of every chunk; ``[B or 1, 1, columns]``, fp64."""
        g = self.geometry
        parts = [
            g.chunk_mean[:, p.lo : p.hi] if p.is_chunk else key_columns(p, g).double()
            for p in self.columns.pieces
        ]
        return torch.cat([part.expand(g.lo.shape[0], -1) for part in parts], -1)[:, None]

    def kept(self) -> Tensor | None:
        """Return dropout's factors ``[B * Hkv, G * n, columns]`` (0 or 1 / (1 - p)), or None."""
        p, g = self.settings.dropout_p, self.geometry
        if p == 0.0:
            return None
        device, heads = self.q.device, self.kv_heads * self.group
        ids = [
            torch.arange(piece.lo, piece.hi, device=device)[None] * 2 + 1
            if piece.is_chunk
            else key_columns(piece, g).long() * 2
            for piece in self.columns.pieces
        ]
        rows = torch.arange(self.t.first_row, self.t.first_row + self.batch, device=device)
        assert self.t.dropout_seed is not None  # checked by the op
        keep = keep_mask(
            self.t.dropout_seed,
            rows,
            torch.arange(heads, device=device),
            self._query_columns(),
            torch.cat([part.expand(g.lo.shape[0], -1) for part in ids], -1),
            p,
        )
        factor = keep.to(self.q.dtype).view(*self.q.shape[:2], -1)
        return factor.mul_(1 / (1 - p)) if p < 1 else factor
