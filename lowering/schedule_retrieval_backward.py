"""Schedules of the retrieval tier's backward kernels: the largest tiles that fit a target."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

from flasheva_compile.lowering.spec import Schedule, padded, parts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flasheva_compile.lowering.schedule_cost import Target
    from flasheva_compile.lowering.spec import KernelSpec

RETRIEVAL_BACKWARD_KINDS = ("selection_bits", "retrieved_dq", "retrieved_dkv")
LEAVING_OUT = ("dq", "dchunk", "dkv")
"""Kernels of one attention that do more where chunks are retrieved."""

_RESERVED_SHARED = 4096  # reductions and changes of layout
_REGISTERS = 150  # of a thread, for tiles
_FMA_REGISTERS = 16  # products of fp32 keep both operands, too


def retrieval_backward_schedule(spec: KernelSpec, target: Target) -> Schedule:
    """Return the first schedule that fits, of a list that begins with the fastest.

    Args:
        spec: One of :data:`RETRIEVAL_BACKWARD_KINDS`.
        target: The device.
    """
    if spec.kind == "selection_bits":
        return Schedule(block_m=128, block_n=16, num_warps=4, num_stages=1)
    fragments = 0 < target.capability < 90  # operands come through registers
    columns = (32, 16) if fragments else (64, 32, 16)
    tried = _of_queries(spec, columns) if spec.kind == "retrieved_dq" else _of_keys(spec)
    # Three: the indices of a tile are asked for before the tile that they name.
    split = len(parts(spec.head_dim)) > 1 or len(parts(spec.value_dim)) > 1
    depths = (1,) if target.is_amd else (2, 1) if split else (3, 2, 1)
    for depth, (m, n, warps) in itertools.product(depths, tried):
        schedule = Schedule(block_m=m, block_n=n, num_warps=warps, num_stages=depth)
        if _fits(spec, schedule, target):
            return schedule
    return Schedule(block_m=16, block_n=16, num_warps=4, num_stages=1)


def leaving_out_schedule(spec: KernelSpec, plain: Schedule, target: Target) -> Schedule:
    """Return the schedule of a kernel of :data:`LEAVING_OUT`.

    Bits and parts of gradients take registers that the largest tiles do not have.

    Args:
        spec: Its spec.
        plain: What it has where nothing is retrieved.
        target: The device.
    """
    if spec.dtype == "fp32" and not spec.tf32:
        return dataclasses.replace(plain, block_m=16) if spec.kind == "dchunk" else plain
    if target.is_amd:
        return plain
    wide, hopper = max(spec.head_dim, spec.value_dim) > 64, 90 <= target.capability < 100
    if spec.kind == "dq":
        columns = 32 if wide or not hopper else plain.block_n
        return dataclasses.replace(plain, block_n=columns)
    warps = 8 if wide else plain.num_warps
    if spec.kind == "dkv":
        return dataclasses.replace(plain, num_warps=warps)
    if wide and target.capability < 90:
        return dataclasses.replace(plain, block_m=32, block_n=32, num_warps=warps)
    rows, depth = (32, 3) if hopper else (16, 2)
    rows, depth = min(plain.block_m, rows), min(plain.num_stages, depth)
    return dataclasses.replace(plain, block_m=rows, num_warps=warps, num_stages=depth)


def _of_queries(spec: KernelSpec, columns: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    rows = min(64, padded(spec.group * spec.selection_group))
    for m, n in itertools.product((rows, 32, 16), columns):
        if m <= rows:
            yield from ((m, n, 4), (m, n, 8))


def _of_keys(spec: KernelSpec) -> Iterator[tuple[int, int, int]]:
    keys = min(64, padded(spec.chunk_size))
    split = len(parts(spec.head_dim)) > 1 or len(parts(spec.value_dim)) > 1
    rows = (32, 16) if split else (64, 32, 16)  # every part holds its own fragments
    for n, m in itertools.product((keys, 32, 16), rows):
        if n <= keys:
            yield from ((m, n, 4), (m, n, 8))


def _fits(spec: KernelSpec, s: Schedule, target: Target) -> bool:
    itemsize = 4 if spec.dtype == "fp32" else 2
    d, e = (sum(size for _, size in parts(dim)) for dim in (spec.head_dim, spec.value_dim))
    threads = s.num_warps * (64 if target.is_amd else 32)
    resident, walked = s.block_m, s.block_n
    sums = s.block_m * d
    if spec.kind == "retrieved_dkv":
        resident, walked, sums = s.block_n, s.block_m, s.block_n * (d + e)
    shared = (resident + s.num_stages * walked) * (d + e) * itemsize
    words = 2 * s.block_m * s.block_n + sums
    plain = spec.dtype == "fp32" and not spec.tf32
    limit = _FMA_REGISTERS if plain else _REGISTERS
    return shared + _RESERVED_SHARED <= target.shared_limit and words <= limit * threads
