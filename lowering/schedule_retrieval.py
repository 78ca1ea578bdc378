"""Schedules of the retrieval tier's own kernels: the largest tiles that fit a target."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from flasheva_compile.lowering.spec import Schedule, padded, parts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flasheva_compile.lowering.schedule_cost import Target
    from flasheva_compile.lowering.spec import KernelSpec

RETRIEVAL_KINDS = ("chunk_bounds", "select", "retrieve")
MOST_HEADS = 8
"""Query heads per key head that ``select`` can hold."""

_RESERVED_SHARED = 4096  # reductions and changes of layout
_REGISTERS = 176  # of a thread, for tiles
_FRAGMENT_REGISTERS = 120  # where operands come through registers
_FMA_REGISTERS = {"select": 32, "retrieve": 16}  # products of fp32 keep both operands, too


def retrieval_schedule(spec: KernelSpec, target: Target) -> Schedule:
    """Return the first schedule that fits, of a list that begins with the fastest.

    Args:
        spec: One of :data:`RETRIEVAL_KINDS`.
        target: The device.
    """
    if spec.kind == "chunk_bounds":
        return Schedule(block_m=16, block_n=16, num_warps=4, num_stages=1)
    tried = _select(spec, target) if spec.kind == "select" else _retrieve(spec)
    depths = (1,) if target.is_amd else (2, 1)
    for depth, (m, n, warps) in itertools.product(depths, tried):
        schedule = Schedule(block_m=m, block_n=n, num_warps=warps, num_stages=depth)
        if _fits(spec, schedule, target):
            return schedule
    return Schedule(block_m=16, block_n=16, num_warps=4, num_stages=1)


def select_columns(spec: KernelSpec) -> int:
    """Return the width of what ``select`` holds of a query: its heads, with bounds twice."""
    d = sum(size for _, size in parts(spec.head_dim))
    return spec.group * d * (1 + spec.by_bounds)


def _select(spec: KernelSpec, target: Target) -> Iterator[tuple[int, int, int]]:
    """List tiles; bounds take two products each, which leaves fewer registers."""
    if spec.by_bounds and spec.dtype == "fp32" and not spec.tf32:
        if spec.head_dim <= 64:
            yield from itertools.product((64, 32, 16), (32, 16), (4, 8))
        yield 16, 16, 4
    elif spec.by_bounds and 90 <= target.capability < 100 and select_columns(spec) > 256:
        yield from itertools.product((64,), (32, 16), (4, 8))
        yield from itertools.product((32, 16), (64, 32, 16), (8,))
    else:
        yield from itertools.product((64, 32, 16), (64, 32, 16), (4, 8))


def smallest_fits(heads: int, row_bytes: int, target: Target) -> bool:
    """Whether ``select`` can run at all: 16 queries of so many heads, and 16 chunks, in memory."""
    if target.is_amd:  # they stay in registers
        return True
    return 16 * (heads + 1) * row_bytes + _RESERVED_SHARED <= target.shared_limit


def _retrieve(spec: KernelSpec) -> Iterator[tuple[int, int, int]]:
    rows = min(64, padded(spec.group * spec.selection_group))
    for m, n in itertools.product((rows, 32, 16), (64, 32, 16)):
        if m <= rows:
            yield from ((m, n, 4), (m, n, 8))


def _fits(spec: KernelSpec, s: Schedule, target: Target) -> bool:
    itemsize = 4 if spec.dtype == "fp32" else 2
    d, e = (sum(size for _, size in parts(dim)) for dim in (spec.head_dim, spec.value_dim))
    threads = s.num_warps * (64 if target.is_amd else 32)
    scores = s.block_m * s.block_n
    if spec.kind == "select":
        held = select_columns(spec)
        if s.block_m > _most_rows(spec, held, target):
            return False
        shared = s.block_m * held + s.num_stages * s.block_n * held // spec.group
        words = 2 * scores + 4 * s.block_m * padded(spec.retrieve_chunks)
    else:
        shared = s.block_m * d + s.num_stages * s.block_n * (d + e)
        words = 2 * scores + s.block_m * e
    plain = spec.dtype == "fp32" and not spec.tf32
    fragments = 0 < target.capability < 90 and spec.kind == "retrieve"
    limit = _FMA_REGISTERS[spec.kind] if plain else _FRAGMENT_REGISTERS if fragments else _REGISTERS
    enough = shared * itemsize + _RESERVED_SHARED <= target.shared_limit
    return enough and words <= limit * threads


def _most_rows(spec: KernelSpec, columns: int, target: Target) -> int:
    """Return the rows of ``select``'s query tiles, of so many columns together, without spills."""
    if 90 <= target.capability < 100 and spec.dtype != "fp32":
        most = (1024 if spec.group <= 4 else 512) if spec.by_bounds else 768
        return 64 if columns <= most else 32  # wgmma reads memory, but takes two words a tile
    if target.capability >= 100 and columns <= 512:
        return 32  # 64 rows take tcgen05, after which Triton 3.6 compiles no reduction to a scalar
    if columns <= 256:
        return 64
    return 16 if target.is_amd or columns > 512 else 32
