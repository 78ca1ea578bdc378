"""Schedules of the kernels of generation with retrieval: closed rules, no table yet."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from flasheva_compile.lowering.spec import Schedule, group_rows, padded

if TYPE_CHECKING:
    from flasheva_compile.lowering.schedule_cost import Target
    from flasheva_compile.lowering.spec import KernelSpec

SELECTING_KINDS = ("retrieval_scores", "retrieval_select")

_MOST = 256  # chunk tokens of a tile
_TILE_BYTES = 16384  # that they take: several programs of a multiprocessor wait for theirs
_SCORES = 8192  # of all query heads; products of fp32 keep operands in registers, too
_NETWORK = 1024  # numbers that one sorting network takes


def selecting_schedule(spec: KernelSpec) -> Schedule:
    """Return the tiles of ``retrieval_scores``, or the largest ones of ``retrieval_select``."""
    if spec.kind == "retrieval_select":
        return Schedule(block_m=16, block_n=_NETWORK, num_warps=8, num_stages=1)
    itemsize = 4 if spec.dtype == "fp32" else 2
    by_size = _TILE_BYTES // (padded(spec.head_dim) * itemsize) // (itemsize // 2)
    by_scores = _SCORES // group_rows(spec.group)
    n = max(16, min(_MOST, by_size, by_scores))
    return Schedule(block_m=16, block_n=n, num_warps=8 if n == _MOST else 4, num_stages=1)


def gathering_schedule(spec: KernelSpec, decode: Schedule, target: Target) -> Schedule:
    """Return the schedule of ``retrieval_decode``, from that of ``decode`` for the same shapes.

    It reads what ``decode`` reads, in tiles of the same kind; addresses of gathered rows take
    registers where products leave few, and rows of two stores more of them.
    """
    wide = max(spec.head_dim, spec.value_dim) > 64
    crowded = spec.dtype == "fp32" or group_rows(spec.group) > 32
    parts = 4 if spec.dtype == "fp32" and spec.near_store and wide else 2 if crowded else 1
    if target.capability >= 90 and decode.num_warps <= 4 and spec.dtype != "fp32":
        # As it was measured; ``decode`` was measured again without limits.
        decode = dataclasses.replace(decode, num_warps=4, max_registers=128 if wide else 144)
    return dataclasses.replace(decode, block_n=max(16, decode.block_n // parts))


def fitted(schedule: Schedule, runs: int) -> Schedule:
    """Shrink the tile of ``retrieval_select`` to how many runs of chunks there are."""
    n = min(schedule.block_n, max(16, 1 << (runs - 1).bit_length()))
    return dataclasses.replace(schedule, block_n=n, num_warps=max(1, min(8, n // 128)))
