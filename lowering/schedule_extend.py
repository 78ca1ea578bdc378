"""Schedules of the kernels of several new tokens over a cache: closed rules, no table yet."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

from flasheva_compile.lowering.spec import Schedule, group_rows, padded

if TYPE_CHECKING:
    from flasheva_compile.lowering.schedule_cost import Target
    from flasheva_compile.lowering.spec import KernelSpec

EXTEND_KINDS = ("extend_pool", "extend", "extend_append")

_ROWS = 64  # of a tile of queries
_RESERVED_SHARED = 4096  # reductions and changes of layout
_REGISTERS = 130  # of a thread, for scores and sums
_WIDE_REGISTERS = 90  # where heads beyond 128 also take registers for their queries
_FMA_REGISTERS = 24  # products of fp32 keep both operands, too
_WIDE_FMA_REGISTERS = 20  # beyond heads of 64
_SLOTS = 64  # of a program of extend_append


def extend_schedule(spec: KernelSpec, target: Target) -> Schedule:
    """Return the largest tiles that fit; ``extend`` is given fewer rows where tokens are few."""
    if spec.kind == "extend_pool":
        # Too few programs for registers to matter: unless told, the assembler would rather spill.
        told = spec.chunk_rule == "eva" or spec.alibi
        most = 255 if told and not target.is_amd else 0
        return Schedule(block_m=16, block_n=16, num_warps=4, num_stages=1, max_registers=most)
    if spec.kind == "extend_append":
        return Schedule(block_m=16, block_n=_SLOTS, num_warps=4, num_stages=1)
    least = group_rows(spec.group)
    depths = (1,) if target.is_amd else (2, 1)
    rows = [m for m in (_ROWS, 32, 16) if m > least] + [least]
    warps_tried = (4,) if spec.dtype == "fp32" else (4, 8)
    if spec.fp8_chunks and spec.dtype != "fp32" and target.capability >= 90:
        # One warpgroup alone gave wrong sums of 64 rows (H200, Triton 3.6); two are right.
        warps_tried = (8,)
    for m, depth, n, warps in itertools.product(rows, depths, (64, 32, 16), warps_tried):
        schedule = Schedule(block_m=m, block_n=n, num_warps=warps, num_stages=depth)
        if _fits(spec, schedule, target):
            return schedule
    return Schedule(block_m=least, block_n=16, num_warps=8, num_stages=1)


def _fits(spec: KernelSpec, s: Schedule, target: Target) -> bool:
    itemsize = 4 if spec.dtype == "fp32" else 2
    d, e = padded(spec.head_dim), padded(spec.value_dim)
    threads = s.num_warps * (64 if target.is_amd else 32)
    shared = (s.block_m * d + s.num_stages * s.block_n * (d + e)) * itemsize + _RESERVED_SHARED
    words = 2 * s.block_m * s.block_n + s.block_m * e
    limit = _WIDE_REGISTERS if max(d, e) > 128 else _REGISTERS
    if spec.dtype == "fp32":
        limit = _WIDE_FMA_REGISTERS if max(d, e) > 64 else _FMA_REGISTERS
    if spec.fp8_chunks:  # numbers are made of bytes in registers
        limit = limit // 2 if spec.dtype == "fp32" else limit * 3 // 4
    if spec.alibi:  # distances, of every score
        limit = limit * 2 // 3
    return shared <= target.shared_limit and words <= limit * threads


def fitted(schedule: Schedule, spec: KernelSpec, tokens: int) -> Schedule:
    """Return ``extend``'s schedule for a call of so many tokens: no more rows than it has."""
    rows = min(schedule.block_m, padded(spec.group * tokens))
    return dataclasses.replace(schedule, block_m=max(rows, group_rows(spec.group)))
