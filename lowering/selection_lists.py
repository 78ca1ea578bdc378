"""A selection turned round: for every chunk, the groups of queries that selected it.

A stable sort, so a list ascends and no run differs from another; shapes depend on lengths alone, so
that a CUDA graph can hold it. Lists are cut into pieces, of which each gets a program: a chunk that
every query selects takes no longer than others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionLists:
    """Who selected each chunk; int32 tensors, rows are ``B * Hkv``.

    Attributes:
        members: ``[B * Hkv * groups * picks]``, groups counted over all rows, by row and chunk.
        first_member: ``[rows, C + 1]``, where each chunk's list begins; the last: where they end.
        first_piece: ``[rows, C + 1]``, number of each chunk's first piece within its row.
        piece_chunk: ``[rows, pieces]``, chunk of each piece; ``C`` = the piece does not exist.
    """

    members: Tensor
    first_member: Tensor
    first_piece: Tensor
    piece_chunk: Tensor


def selection_lists(selected: Tensor, chunks: int, piece_size: int) -> SelectionLists:
    """Turn a selection round.

    Args:
        selected: ``[B, Hkv, groups, picks]`` int32 chunk slots, -1 = none.
        chunks: Number of slots ``C``.
        piece_size: Most members of a piece.

    Returns:
        The lists, on the device of ``selected``, without synchronisation.
    """
    batch, kv_heads, groups, picks = selected.shape
    rows, entries, lists = batch * kv_heads, groups * picks, chunks + 1
    slot = selected.reshape(rows, entries)
    row = torch.arange(rows, dtype=torch.int32, device=selected.device)[:, None]
    number = torch.where(slot < 0, chunks, slot) + row * lists  # one list for those without chunk
    ordered, order = number.flatten().sort(stable=True)
    every = torch.arange(rows * lists, dtype=torch.int32, device=selected.device)
    first_member = torch.searchsorted(ordered, every, out_int32=True).view(rows, lists)
    pieces = (first_member.diff(dim=1) + (piece_size - 1)) // piece_size
    first_piece = torch.nn.functional.pad(pieces.cumsum(1, dtype=torch.int32), (1, 0))
    most = min(entries, chunks + entries // piece_size)
    piece = torch.arange(most, dtype=torch.int32, device=selected.device)
    piece = piece.expand(rows, most).contiguous()
    behind = torch.searchsorted(first_piece, piece, right=True, out_int32=True)
    return SelectionLists(
        members=(order // picks).int(),
        first_member=first_member,
        first_piece=first_piece,
        piece_chunk=behind - 1,
    )
