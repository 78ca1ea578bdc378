"""Dropout decided by a stateless hash, so that the backward pass regenerates the forward's mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def _mix(x: Tensor) -> Tensor:
    """Scramble 32-bit words held in int64 (int64 products wrap; their low 32 bits are right).

    Source:
        ``lowbias32`` of Chris Wellons, "Prospecting for hash functions" (2018). 32 bits, so that a
        GPU kernel can compute the same mask in uint32.
    """
    x = (x ^ (x >> 16)) * 0x7FEB352D & _WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & _WORD
    return x ^ (x >> 16)


def keep_mask(
    seed: Tensor, row: Tensor, head: Tensor, query_column: Tensor, key_id: Tensor, dropout_p: float
) -> Tensor:
    """Decide for every weight whether it is kept.

    Args:
        seed: int64, one element.
        row: ``[B]``, index in the batch.
        head: ``[Hq]``, query head.
        query_column: ``[L]``.
        key_id: ``[B or 1, n]``: ``2 * column`` of a key, ``2 * slot + 1`` of a chunk token; or
            ``[B, Hq or 1, L, n]`` where they differ by query.
        dropout_p: Probability of dropping.

    Returns:
        Boolean ``[B, Hq, L, n]``.
    """
    seed = seed.reshape(()).to(row.device)
    state = _mix((seed & _WORD) ^ _mix(seed >> 32 & _WORD))
    state = _mix(state ^ row.long()[:, None, None])
    state = _mix((state + _GOLDEN & _WORD) ^ head.long()[:, None])
    state = _mix((state + _GOLDEN & _WORD) ^ (query_column.long() & _WORD))
    by_query = key_id if key_id.dim() == 4 else key_id[:, None, None, :]
    word = _mix(state[..., None] + by_query.long() * _GOLDEN & _WORD)
    return word >= int(dropout_p * 2**32)
