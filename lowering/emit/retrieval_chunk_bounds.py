"""Kernel before selection by bounds: ``chunk_bounds`` makes centre and spread of chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit.keys import program
from flasheva_compile.lowering.emit.pooling import UNROLLED, chunk_columns, member_keys, members
from flasheva_compile.lowering.emit.retrieval_bounds import bounds_start, centre_and_spread
from flasheva_compile.lowering.emit.source import Dim, Source

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec


def emit_chunk_bounds(spec: KernelSpec) -> str:
    """Return the body of ``chunk_bounds``: a block of chunks, a walk over their members."""
    out, d = Source(), Dim("d", spec.head_dim)
    program(out, spec)
    out.lines(*d.offsets(), *chunk_columns(spec), "count = tl.zeros([BLOCK_N], tl.float32)")
    out.lines(*bounds_start(d, "BLOCK_N"))
    with members(out, spec.chunk_size, UNROLLED):
        out.lines(*member_keys(spec, d), "count += seen.to(tl.float32)")
        for n in d.indices:
            out.lines(
                f"total{n} += k{n}",
                f'low{n} = tl.minimum(low{n}, tl.where(seen[:, None], k{n}, float("inf")))',
                f'high{n} = tl.maximum(high{n}, tl.where(seen[:, None], k{n}, float("-inf")))',
            )
    out.lines(*centre_and_spread(spec, d))
    rows = f"bounds_ptr + chunk_row * {2 * d.size}"
    out.lines(*d.store("centre", rows, "offs_t", str(2 * d.size), "exists"))
    out.lines(*d.store("spread", f"{rows} + {d.size}", "offs_t", str(2 * d.size), "exists"))
    return out.text()
