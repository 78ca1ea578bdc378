"""What kernels of specialised warps need: which specs, how many registers and how much memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.spec import BIAS_COLUMNS

if TYPE_CHECKING:
    from flasheva_compile.lowering.schedule_cost import Target
    from flasheva_compile.lowering.spec import KernelSpec, Schedule

HEAD_DIMS = (64, 128)
"""Sizes that products of a warpgroup take whole, and that were measured."""

OWN = 64
"""Queries of a consumer: the rows of one product of a warpgroup."""

_REGISTERS = 65536  # of a multiprocessor
_MOST = 240  # that a thread can ask for, in steps of 8
_PRODUCER = 24 * 128  # one warp, but four are reserved
_RESERVED = 20  # registers of addresses, bounds and row states
_LANES = 64  # columns of results that change their layout at a time


def specialists_rejection(spec: KernelSpec, target: Target) -> str | None:
    """Return why no warps can specialise in a kernel; None = they can.

    What a product does not add or a comparison of positions and a key's flag do not hide is left to
    the kernel whose warps all do the same.
    """
    if target.capability != 90:
        return f"{target.arch} has no products of warpgroups on shared memory"
    if spec.kind != "forward" or spec.dtype == "fp32":
        return "only forward in 16 bits is written for them"
    if spec.head_dim not in HEAD_DIMS or spec.value_dim != spec.head_dim:
        return f"heads of {spec.head_dim} and {spec.value_dim} columns"
    padded = spec.documents == "padded"
    if spec.documents == "packed" or spec.key_mask != padded:
        return "rows hold one document each"
    if spec.selection_group and not spec.causal:
        return "bits of what was selected are those of chunk tokens in front of the window"
    if spec.softcap or spec.alibi or spec.dropout or spec.negative_scale:
        return "scores are scaled products"
    return None


def rejection(spec: KernelSpec, schedule: Schedule, target: Target) -> str | None:
    """Return why a schedule of specialised warps cannot be; None = it can."""
    reason = specialists_rejection(spec, target)
    if reason:
        return f"consumers: {reason}"
    if schedule.block_m != OWN * schedule.consumers or schedule.num_warps != 4:
        return "consumers: each has four warps and 64 queries"
    if not schedule.tma:
        return "consumers: tiles are streamed through tensor descriptors"
    if not (schedule.product_bias or spec.whole_chunks):
        return "consumers: biases go through the products"
    return None


def query_stages(schedule: Schedule) -> int:
    """Return how many blocks of queries are held: with the next one, if there is one."""
    return 2 if schedule.persistent else 1


def warps(schedule: Schedule) -> int:
    """Return the warps of a program; the producer's group of four is reserved whole."""
    return 4 * (schedule.consumers + 1)


def _granted(schedule: Schedule) -> int:
    """Return the registers of each thread when a program starts."""
    return schedule.max_registers or min(255, _REGISTERS // (32 * warps(schedule))) // 8 * 8


def consumer_registers(schedule: Schedule) -> int:
    """Return the registers of a consumer's thread, after the producer gave most of its own."""
    left = _granted(schedule) * 32 * warps(schedule) - _PRODUCER
    return min(_MOST, left // (128 * schedule.consumers) // 8 * 8)


def programs_per_multiprocessor(schedule: Schedule) -> int:
    """Return how many programs run side by side, by their registers."""
    return max(1, _REGISTERS // (_granted(schedule) * 32 * warps(schedule)))


def shared_bytes(spec: KernelSpec, schedule: Schedule) -> int:
    """Return the shared memory of a program [bytes]: rings, and results on their way out."""
    tile = spec.head_dim + spec.value_dim + BIAS_COLUMNS * schedule.product_bias
    queries = query_stages(schedule) * schedule.block_m * spec.head_dim
    results = schedule.block_m * min(spec.value_dim, _LANES)
    return 2 * (queries + schedule.num_stages * schedule.block_n * tile + results) + 2048


def too_many_registers(spec: KernelSpec, schedule: Schedule) -> str | None:
    """Return how many registers sums, scores and weights of a consumer's thread lack; None = 0."""
    words = OWN * (spec.value_dim + schedule.block_n * (2 if schedule.overlap else 1.5))
    used, most = int(words) // 128, consumer_registers(schedule) - _RESERVED
    return f"{used} registers of accumulators per thread, at most {most}" if used > most else None
