"""Schedules of kernels that attend to fp8: how a device makes numbers of bytes, and its room."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flasheva_compile.lowering.schedule_cost import Target
    from flasheva_compile.lowering.spec import KernelSpec, Schedule

_KNOWS_E4M3 = 89  # the least compute capability
_THREE_PROGRAMS = 168  # registers of a thread where a multiprocessor holds three of four warps


def converting(spec: KernelSpec, schedule: Schedule, target: Target) -> Schedule:
    """Return a schedule with the instructions that the device has for what the kernel reads."""
    reads = spec.fp8_chunks and spec.kind in ("decode", "extend")
    reads |= spec.fp8_store and spec.kind == "retrieval_decode"
    return dataclasses.replace(schedule, e4m3=reads and target.capability >= _KNOWS_E4M3)


def decode_fitted(spec: KernelSpec, schedule: Schedule, target: Target) -> Schedule:
    """Return the schedule of ``decode`` over fp8, from that for the same shapes in 16 bits."""
    if spec.dtype == "fp32":  # whose products keep both operands in registers
        return dataclasses.replace(schedule, block_n=16, num_stages=1)
    if converting(spec, schedule, target).e4m3:
        # Tiles of as many bytes: what each costs beside its elements is shared by more of them.
        # Unless told how many registers there are, the assembler would rather spill.
        return dataclasses.replace(schedule, block_n=2 * schedule.block_n, max_registers=255)
    # Numbers are made in registers, between loads and products.
    most = schedule.max_registers and max(schedule.max_registers, _THREE_PROGRAMS)
    most = 0 if spec.alibi else most
    return dataclasses.replace(schedule, max_registers=most)
