"""How the rows of a call are laid out, as the small tensors that kernels read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from flasheva_compile.kernels.blocked.geometry import chunk_layout, valid_keys

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import Documents
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Layout of the rows; int32 tensors, None where the layout needs none.

    Attributes:
        documents: ``dense``, ``padded`` or ``packed``.
        valid: ``[B, S]`` bool, contiguous; the key mask.
        start: ``[B]``, first valid column (padded).
        stop: ``[B]``, column after the last valid one (padded).
        begin: ``[B, S]``, first valid column of each column's document, ``S`` if none (packed).
        end: ``[B, S]``, column after each column's document (packed).
        chunk_first: ``[B, C]``, first column of the chunk in each slot, -1 = none (packed).
        chunk_mean: ``[B or 1, C]`` fp32, mean column of each chunk's valid keys (ALiBi).
    """

    documents: Documents
    valid: Tensor | None = None
    start: Tensor | None = None
    stop: Tensor | None = None
    begin: Tensor | None = None
    end: Tensor | None = None
    chunk_first: Tensor | None = None
    chunk_mean: Tensor | None = None


def rows_of(
    k: Tensor,
    key_mask: Tensor | None,
    segment_ids: Tensor | None,
    *,
    chunk_size: int,
    alibi: bool = False,
) -> Rows:
    """Lay out the rows of a call with ``S > 0`` keys; no host synchronisation."""
    length, device = k.shape[2], k.device
    if key_mask is None and segment_ids is None:
        return Rows(documents="dense", chunk_mean=_dense_mean(k, chunk_size) if alibi else None)
    valid = None if key_mask is None else key_mask.contiguous()
    known = valid_keys(valid, segment_ids)
    assert known is not None  # dense rows have returned
    mean = _mean_columns(known, segment_ids, chunk_size) if alibi else None
    if segment_ids is None:
        column = torch.arange(length, device=device, dtype=torch.int32)
        start = torch.where(known, column, length).amin(-1)
        stop = torch.where(known, column + 1, 0).amax(-1)
        return Rows(documents="padded", valid=valid, start=start, stop=stop, chunk_mean=mean)
    layout = chunk_layout(known, segment_ids, chunk_size)
    return Rows(
        documents="packed",
        valid=valid,
        begin=layout.start.int().contiguous(),
        end=_document_end(segment_ids),
        chunk_first=layout.first.int().contiguous(),
        chunk_mean=mean,
    )


def _document_end(segment_ids: Tensor) -> Tensor:
    """Return the column after the last one of each column's document."""
    length = segment_ids.shape[1]
    column = torch.arange(1, length + 1, device=segment_ids.device)
    last = torch.full_like(segment_ids[:, :1], True, dtype=torch.bool)
    is_last = torch.cat([segment_ids[:, 1:] != segment_ids[:, :-1], last], -1)
    ends = torch.where(is_last, column, length)
    return ends.flip(-1).cummin(-1).values.flip(-1).int().contiguous()


def _dense_mean(k: Tensor, chunk_size: int) -> Tensor:
    length = k.shape[2]
    first = torch.arange(0, length, chunk_size, device=k.device)
    last = (first + chunk_size).clamp(max=length) - 1
    return ((first + last).double() / 2).float()[None]


def _mean_columns(valid: Tensor, segment_ids: Tensor | None, chunk_size: int) -> Tensor:
    layout = chunk_layout(valid, segment_ids, chunk_size)
    count = layout.valid.sum(-1).clamp(min=1)
    return ((layout.columns * layout.valid).sum(-1).double() / count).float()
