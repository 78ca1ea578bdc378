"""Choice of a schedule for a spec."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.spec import Schedule

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec


def choose(spec: KernelSpec) -> Schedule:
    """Return the schedule of a spec."""
    size = max(spec.head_dim, spec.value_dim)
    if spec.kind in ("chunk_tokens", "dpool"):
        return Schedule(block_m=16, block_n=32 if size <= 128 else 16, num_warps=4, num_stages=1)
    if spec.dtype == "fp32":
        return Schedule(block_m=32, block_n=32, num_warps=4, num_stages=1)
    if spec.kind == "forward":
        if size <= 64:
            return Schedule(block_m=128, block_n=64, num_warps=4, num_stages=3)
        return Schedule(block_m=128, block_n=64, num_warps=8, num_stages=3 if size <= 128 else 2)
    if spec.kind == "dq":
        if size <= 128:
            return Schedule(block_m=64, block_n=64, num_warps=4, num_stages=2)
        return Schedule(block_m=64, block_n=32, num_warps=8, num_stages=1)
    if size <= 128:
        return Schedule(block_m=64, block_n=64, num_warps=4, num_stages=2)
    return Schedule(block_m=32, block_n=64, num_warps=8, num_stages=1)
