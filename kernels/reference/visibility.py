"""Reference visibility: which exact keys and which chunk tokens each query attends. True = may."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from flasheva_compile.kernels.reference.positions import Chunks, Positions
    from torch import Tensor


def query_positions(keys: Positions, length: int, q_offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return document, position and document length ``n_doc`` of the queries, each ``[B, L, 1]``.

    Query ``i`` sits at column ``q_offset + i``. Without segments a column outside ``[0, S)``
    belongs to the row's only document.
    """
    column = q_offset + torch.arange(length, device=keys.document.device)
    if keys.document.shape[-1] == 0:
        nothing = torch.zeros_like(column).expand(keys.document.shape[0], -1)[..., None]
        return nothing, nothing, nothing
    at = column.clamp(0, keys.document.shape[-1] - 1)
    start = keys.start[:, at]
    n_doc = keys.stop[:, at] - start
    return keys.document[:, at, None], (column - start)[..., None], n_doc[..., None]


def exact_interval(
    i: Tensor, n_doc: Tensor, *, window_size: int, chunk_size: int, window: str, causal: bool
) -> tuple[Tensor, Tensor]:
    """Return the local window ``[lo, hi)`` of positions that the query at position ``i`` sees.

    Source:
        ``block`` is EVA's and EvaByte's; ``sliding`` and its chunk alignment are ours.
    """
    w, c = window_size, chunk_size
    if causal:
        first = (i - w + 1).clamp(min=0)
        return (first // c * c if window == "sliding" else i // w * w), i + 1
    if window == "block":
        lo = i // w * w
        return lo, torch.minimum(n_doc, lo + w)
    first = torch.minimum((i - w // 2).clamp(min=0), (n_doc - w).clamp(min=0))
    return first // c * c, torch.minimum(n_doc, (first + w + c - 1) // c * c)


def visibility(
    keys: Positions,
    chunks: Chunks,
    *,
    length: int,
    q_offset: int,
    window_size: int,
    chunk_size: int,
    sink_tokens: int,
    window: str,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Split what full attention would see into exact keys and chunk tokens.

    Args:
        keys: Geometry of the key columns.
        chunks: Geometry of the chunk slots.
        length: Number of queries ``L``.
        q_offset: Column of the first query.
        window_size: Window ``w``, a multiple of ``chunk_size`` [tokens].
        chunk_size: Keys per chunk ``c`` [tokens].
        sink_tokens: First tokens of each document that stay exact; rounded up to chunks [tokens].
        window: ``"sliding"`` or ``"block"``.
        causal: Whether a query sees only its past.

    Returns:
        ``exact [B, L, S]`` and ``chunk [B, L, C]``, boolean: for each query a partition of the keys
        that full attention would see.
    """
    sinks = -(-sink_tokens // chunk_size) * chunk_size
    document, i, n_doc = query_positions(keys, length, q_offset)
    if not causal:
        # A query in the padding sees what full attention would: as from the edge of its document.
        i = torch.minimum(i.clamp(min=0), (n_doc - 1).clamp(min=0))
    lo, hi = exact_interval(
        i, n_doc, window_size=window_size, chunk_size=chunk_size, window=window, causal=causal
    )
    is_query = i >= 0  # a query in the left padding attends nothing

    pos = keys.position[:, None, :]
    allowed = (keys.document[:, None, :] == document) & (keys.valid & (keys.position >= 0))[:, None]
    if causal:
        allowed = allowed & (pos <= i)
    exact = allowed & is_query & (((lo <= pos) & (pos < hi)) | (pos < sinks))

    first = chunks.position[:, None, :]
    past = first + chunk_size <= lo
    outside = past if causal else past | (first >= hi)
    same = chunks.document[:, None, :] == document
    chunk = same & (chunks.count > 0)[:, None] & is_query & (first >= sinks) & outside
    return exact, chunk
