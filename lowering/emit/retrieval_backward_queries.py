"""Kernel of the retrieval tier's backward pass that keeps queries: through the selected keys.

As ``retrieve``, a program holds queries of one group for all query heads of a key head and reads
the selected keys and values by index. It takes weights from what ``dq`` has stored of the softmax
and adds to the gradient that is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import scores
from flasheva_compile.lowering.emit.retrieval_forward_attend import (
    gather,
    group_program,
    load_queries,
    selected_keys,
)
from flasheva_compile.lowering.emit.source import Dim, Source
from flasheva_compile.lowering.spec import STATE_BLOCK

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec, Schedule


def emit_retrieved_dq(spec: KernelSpec, schedule: Schedule) -> str:
    """Return the body of ``retrieved_dq``."""
    out, d, e = Source(), Dim("d", spec.head_dim), Dim("e", spec.value_dim)
    out.lines(*group_program(spec, schedule), *d.offsets(), *e.offsets())
    out.lines(*load_queries(spec, d), *load_gradients(e), "")
    out.lines(*selected_keys(spec), *d.zeros("dq", "BLOCK_M"))
    with out.block("for offset in range(0, stop, BLOCK_N):"):
        out.lines(*_tile(spec, d, e))
    size = str(d.size)
    out.lines(
        "",
        "# What comes through chunk tokens, window and sinks.",
        *d.load("more", "dq_ptr", "state", size, "is_row", cast=".to(tl.float32)"),
        *(f"dq{n} = dq{n} * scale + more{n}" for n in d.indices),
        *d.store("dq", "dq_ptr", "state", size, "is_row"),
    )
    return out.text()


def load_gradients(e: Dim) -> list[str]:
    """Load what arrives at the queries ``query`` of the heads ``h``, and their softmax's state."""
    return [
        "do_rows = h * tl.cast(stride_gh, tl.int64) + query * tl.cast(stride_gm, tl.int64)",
        *e.load("do", "do_ptr + b64 * stride_gb", "do_rows", "1", "is_row"),
        f"state_rows = (b64 * heads + h) * state_blocks * {STATE_BLOCK} + query",
        "# +inf: a row that is none weighs nothing.",
        'lse = tl.load(lse2_ptr + state_rows, mask=is_row, other=float("inf"))',
        "delta = tl.load(delta_ptr + state_rows, mask=is_row, other=0.0)",
    ]


def _tile(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    dot = scores.precision(spec)
    factor = " * (1.0 - tanh * tanh)" if spec.softcap else ""
    return [
        *gather(spec, d, e),
        *d.contract("s", "q", "k", dot),
        *scores.scores(spec, "key", keys_first=False),
        "p = tl.exp2(s - lse[:, None])",
        "p = tl.where(inside[None, :], p, 0.0)",
        *e.contract("dp", "do", "v", dot),
        f"ds = (p * (dp - delta[:, None]){factor}).to(k_ptr.dtype.element_ty)",
        *d.accumulate("dq", "ds", "k", dot),
    ]
