"""Sums over queries that several programs share: all in one tensor, added up by one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def partial_sums(
    like: Tensor, splits: int, rows: int, columns: tuple[int, ...]
) -> tuple[Tensor, list[Tensor]]:
    """Allocate sums of ``rows`` rows for each split, and say where each kind of them begins.

    All lie in one tensor, ``[splits, rows * sum(columns)]``: one launch adds up the splits.
    """
    parts = like.new_empty(splits, rows * sum(columns))
    begins = (rows * sum(columns[:n]) for n in range(len(columns)))
    return parts, [parts.view(-1)[begin:] for begin in begins]


def reduced(parts: Tensor, rows: int, columns: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Add up the splits, in their order: the same bits each time."""
    total = parts[0] if parts.shape[0] == 1 else parts.sum(0)
    return total.split([rows * count for count in columns])
