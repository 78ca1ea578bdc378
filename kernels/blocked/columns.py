"""Which columns one block of queries needs, as a few pieces, and the mask over the doubtful ones.

The pieces are laid side by side in a fixed order: chunks that all queries see, chunks under the
mask, keys under the mask, keys that all queries see. So the chunks are a prefix (their bias is one
addition) and the mask is one contiguous range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from flasheva_compile.kernels.blocked.geometry import exact_interval

if TYPE_CHECKING:
    from flasheva_compile.kernels.blocked.geometry import AttentionSettings, Geometry
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive chunk slots or key columns ``[lo, hi)``, or ``hi - lo`` gathered columns.

    Attributes:
        is_chunk: Chunk slots if True, else key columns.
        lo: First slot or column.
        hi: Slot or column after the last.
        columns: ``[B, hi - lo]``, where the columns differ by row; may leave ``[0, S)``, masked.
        covered: For gathered sinks, the columns ``[first, end)`` that another piece holds.
    """

    is_chunk: bool
    lo: int
    hi: int
    columns: Tensor | None = None
    covered: tuple[Tensor | int, Tensor | int] | None = None

    @property
    def size(self) -> int:
        """Number of columns."""
        return self.hi - self.lo


@dataclass(frozen=True, kw_only=True)
class BlockColumns:
    """The pieces of one block of queries and the mask.

    Attributes:
        pieces: Chunk pieces first, then key pieces.
        chunks: Number of leading columns that are chunk tokens.
        size: Number of columns.
        mask_lo: First masked column.
        mask: ``[B or 1, queries, n]`` over columns ``[mask_lo, mask_lo + n)``, True = may attend.
    """

    pieces: tuple[Piece, ...]
    chunks: int
    size: int
    mask_lo: int
    mask: Tensor


def block_columns(geometry: Geometry, s: AttentionSettings, first: int, last: int) -> BlockColumns:
    """Choose the columns for queries ``[first, last)`` and mask those that not all of them see."""
    choose = _uniform_pieces if geometry.uniform else _masked_pieces
    full_chunks, masked_chunks, masked_keys, full_keys = (
        tuple(piece for piece in group if piece.size > 0)
        for group in choose(geometry, s, first, last)
    )
    g = geometry
    bounds = [t[:, first:last, None] for t in (g.begin, g.sink_end, g.lo, g.hi)]
    masks = [chunk_mask(piece, geometry, s, bounds) for piece in masked_chunks]
    masks += [_key_mask(piece, geometry, bounds) for piece in masked_keys]
    shape = (geometry.lo.shape[0], last - first)
    masks = [mask.expand(*shape, -1) for mask in masks]
    pieces = full_chunks + masked_chunks + masked_keys + full_keys
    return BlockColumns(
        pieces=pieces,
        chunks=sum(piece.size for piece in full_chunks + masked_chunks),
        size=sum(piece.size for piece in pieces),
        mask_lo=sum(piece.size for piece in full_chunks),
        mask=torch.cat(masks, -1) if masks else geometry.lo.new_ones(*shape, 0, dtype=torch.bool),
    )


def _keys(lo: int, hi: int) -> Piece:
    return Piece(is_chunk=False, lo=lo, hi=max(lo, hi))


def _chunks(lo: int, hi: int) -> Piece:
    return Piece(is_chunk=True, lo=lo, hi=max(lo, hi))


_Groups = tuple[tuple[Piece, ...], tuple[Piece, ...], tuple[Piece, ...], tuple[Piece, ...]]


def _uniform_pieces(geometry: Geometry, s: AttentionSettings, first: int, last: int) -> _Groups:
    """Split exactly by arithmetic: without masks, position = column in every row."""
    slots, keys, c = geometry.chunk_first.shape[1], geometry.keys, s.chunk_size
    i_first, i_last = s.q_offset + first, s.q_offset + last - 1
    lo_first, hi_first = exact_interval(max(0, i_first), keys, s)
    lo_last, hi_last = exact_interval(max(0, i_last), keys, s)
    window_end = min(hi_last, keys)
    core_lo, core_hi = min(lo_last, window_end), min(hi_first, window_end)
    if core_lo >= core_hi:
        core_lo = core_hi = lo_first
    core, window = _keys(core_lo, core_hi), (_keys(lo_first, core_lo), _keys(core_hi, window_end))
    sinks, sink_slots = min(s.sink_tokens, keys), s.sink_tokens // c
    left_sinks = _keys(0, min(sinks, lo_first))
    right_sinks = _keys(window_end, 0 if s.causal else sinks)
    left = _chunks(sink_slots, min(slots, lo_first // c))
    middle_lo = max(sink_slots, lo_first // c)
    middle_hi = min(slots, lo_last // c if s.causal else -(-hi_last // c))
    middle = _chunks(middle_lo, middle_hi)
    right = _chunks(max(sink_slots, middle_hi), 0 if s.causal else slots)
    if i_first < 0:  # queries before column 0 attend nothing: leave everything to the mask
        return (), (left, middle, right), (left_sinks, *window, core, right_sinks), ()
    return (left, right), (middle,), window, (left_sinks, core, right_sinks)


def _masked_pieces(geometry: Geometry, s: AttentionSettings, first: int, last: int) -> _Groups:
    """Take supersets that hold for any mask, and leave the rest to the mask."""
    slots, keys, c, w = geometry.chunk_first.shape[1], geometry.keys, s.chunk_size, s.window_size
    column_end = s.q_offset + last
    if s.causal:
        # A window starts less than w + c columns before its query; visible chunks end before it.
        window_lo = min(keys, max(0, s.q_offset + first - w - c + 2))
        window = _keys(window_lo, min(keys, max(0, column_end)))
        covered = (window.lo, window.hi)
        reach = column_end - (w if s.window == "sliding" else 0)
        chunks = _chunks(0, min(slots, max(0, reach // c)))
    else:
        # Windows slide inward at the end of a document, so their columns depend on the data.
        width = min(keys, last - first + (w + 2 * c if s.window == "sliding" else 2 * w))
        start = geometry.lo[:, first:last].amin(-1, keepdim=True)
        columns = start + torch.arange(width, device=start.device, dtype=start.dtype)
        window = Piece(is_chunk=False, lo=0, hi=width, columns=columns)
        covered = (start[..., None], start[..., None] + width)
        chunks = _chunks(0, slots)
    no_sinks_elsewhere = s.causal and window.lo == 0
    sinks = () if no_sinks_elsewhere else (_gathered_sinks(geometry, s, first, last, covered),)
    return (), (chunks,), (*sinks, window), ()


def _gathered_sinks(
    geometry: Geometry,
    s: AttentionSettings,
    first: int,
    last: int,
    covered: tuple[Tensor | int, Tensor | int],
) -> Piece:
    """Gather the sinks of the block's first document; later ones start inside the window piece."""
    begin = geometry.begin[:, first:last].amin(-1, keepdim=True)
    count = min(s.sink_tokens, geometry.keys)
    columns = begin + torch.arange(count, device=begin.device, dtype=begin.dtype)
    return Piece(is_chunk=False, lo=0, hi=count, columns=columns, covered=covered)


def key_columns(piece: Piece, geometry: Geometry) -> Tensor:
    """Return the columns of a piece of keys, ``[B or 1, n]``."""
    if piece.columns is not None:
        return piece.columns
    device = geometry.lo.device
    return torch.arange(piece.lo, piece.hi, device=device, dtype=torch.int32)[None]


def _key_mask(piece: Piece, geometry: Geometry, bounds: list[Tensor]) -> Tensor:
    begin, sink_end, lo, hi = bounds
    columns = key_columns(piece, geometry)
    column = columns[:, None, :]
    mask = (column >= lo) & (column < hi) | (column < sink_end)
    mask &= column >= begin
    if geometry.valid is not None and piece.columns is None:
        mask &= geometry.valid[:, None, piece.lo : piece.hi]
    elif geometry.valid is not None:
        inside = columns < geometry.keys
        at = columns.clamp(max=geometry.keys - 1).long()
        mask &= (geometry.valid.gather(1, at) & inside)[:, None, :]
    if piece.covered is not None:
        mask &= (column < piece.covered[0]) | (column >= piece.covered[1])
    return mask


def chunk_mask(
    piece: Piece, geometry: Geometry, s: AttentionSettings, bounds: list[Tensor]
) -> Tensor:
    """Return which of a piece's chunks queries see, ``[B or 1, queries, n]``.

    ``bounds`` are begin, sink end, first and last window column, ``[B or 1, queries, 1]``.
    """
    _, sink_end, lo, hi = bounds
    first = geometry.chunk_first[:, None, piece.lo : piece.hi]
    outside = first + s.chunk_size <= lo
    if not s.causal:
        outside |= first >= hi
    # Starting behind the sinks of the query's document implies being in that document.
    return outside & (first >= sink_end)
