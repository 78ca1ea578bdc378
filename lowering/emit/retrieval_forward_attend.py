"""Last kernel of the retrieval tier: attention to the keys of the selected chunks.

A program holds queries of one group, all of which attend the same chunks, for all query heads of a
key head. It goes on with the softmax that ``forward`` has left in ``out`` and ``lse``, reads keys
and values by index, and writes the joint result to the same place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import scores
from flasheva_compile.lowering.emit.queries import row_pointers
from flasheva_compile.lowering.emit.retrieval_forward_select import kv_program
from flasheva_compile.lowering.emit.selection_bits import group_count
from flasheva_compile.lowering.emit.source import Dim, Source

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec, Schedule

_LOWEST = "-3.4028234663852886e38"


def group_queries(spec: KernelSpec) -> int:
    """Return the rows of one group: its queries in all query heads of a key head."""
    return spec.group * spec.selection_group


def emit_retrieve(spec: KernelSpec, schedule: Schedule) -> str:
    """Return the body of ``retrieve``."""
    out, d, e = Source(), Dim("d", spec.head_dim), Dim("e", spec.value_dim)
    out.lines(*group_program(spec, schedule), *d.offsets(), *e.offsets())
    out.lines(*load_queries(spec, d), "", *_state(e), "")
    out.lines(*selected_keys(spec))
    with out.block("for offset in range(0, stop, BLOCK_N):"):
        out.lines(*_tile(spec, d, e))
    out.lines("", *_results(e))
    return out.text()


def group_program(spec: KernelSpec, schedule: Schedule) -> list[str]:
    """Find row, head and group of a program, and which query of which head each row is."""
    parts = -(-group_queries(spec) // schedule.block_m)
    size = spec.selection_group
    return [
        group_count(spec),
        "pid = tl.program_id(0)",
        "bh = pid // groups" if parts == 1 else f"bh = pid // (groups * {parts})",
        f"index = pid // {parts} % groups" if parts > 1 else "index = pid % groups",
        f"part = pid % {parts}",
        *kv_program(spec),
        *row_pointers(spec, chunks=False),
        "offs_m = part * BLOCK_M + tl.arange(0, BLOCK_M)"
        if parts > 1
        else "offs_m = tl.arange(0, BLOCK_M)",
        f"head = offs_m // {size}" if size > 1 else "head = offs_m",
        f"query = index * {size} + offs_m % {size}" if size > 1 else "query = index",
        f"is_row = (head < {spec.group}) & (query < queries)",
        f"h = hk * {spec.group} + head",
        "state = (b64 * heads + h) * queries + query",
    ]


def load_queries(spec: KernelSpec, d: Dim, *, keys_first: bool = False) -> list[str]:
    """Load the rows of a group, and what their scores need."""
    origin = " - start" if spec.documents == "padded" else ""
    lines = [
        "q_rows = h * tl.cast(stride_qh, tl.int64) + query * tl.cast(stride_qm, tl.int64)",
        *d.load("q", "q_ptr + b64 * stride_qb", "q_rows", "1", "is_row"),
    ]
    if spec.alibi:
        slope = "tl.load(slopes_ptr + h, mask=is_row, other=0.0).to(tl.float32)"
        lines += [
            f"slope = ({slope} * {scores.LOG2E}){'[None, :]' if keys_first else '[:, None]'}",
            f"query_position = (query + q_offset{origin}).to(tl.float32)",
        ]
    return lines


def _state(e: Dim) -> list[str]:
    """Go on where ``forward`` has stopped."""
    return [
        "# What was attended before, as if it were one key.",
        'lse = tl.load(lse_ptr + state, mask=is_row, other=float("-inf"))',
        'is_empty = lse == float("-inf")',
        f"m_i = tl.where(is_empty, {_LOWEST}, lse * {scores.LOG2E})",
        "l_i = tl.where(is_empty, 0.0, 1.0)",
        *e.load("acc", "out_ptr", "state", str(e.size), "is_row", cast=".to(tl.float32)"),
    ]


def selected_keys(spec: KernelSpec) -> list[str]:
    """Bound the walk over the keys that a group has selected."""
    return [
        "offs_t = tl.arange(0, BLOCK_N)",
        "selected_ptr += (bh64 * groups + index) * picks",
        f"stop = picks * {spec.chunk_size}",
    ]


def gather(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    """Load a tile of the keys and values at ``offset`` of the selected chunks, -1 missing."""
    c = spec.chunk_size
    slot = "(slot - first_slot)" if spec.documents == "padded" else "slot"
    valid = ["inside &= tl.load(valid_ptr + column, mask=inside, other=0) != 0"]
    return [
        "offs_n = offset + offs_t",
        f"slot = tl.load(selected_ptr + offs_n // {c}, mask=offs_n < stop, other=-1)",
        f"column = {slot} * {c} + offs_n % {c}",
        "inside = (slot >= 0) & (column < keys)",
        "key_rows = column.to(tl.int64)",
        *d.load("k", "k_ptr", "key_rows", "stride_kn", "inside"),
        *e.load("v", "v_ptr", "key_rows", "stride_vn", "inside"),
        *(valid if spec.key_mask else []),
        *(["key_position = column.to(tl.float32)"] if spec.alibi else []),
    ]


def _tile(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    dot = scores.precision(spec)
    return [
        *gather(spec, d, e),
        *d.contract("s", "q", "k", dot),
        *scores.scores(spec, "key", keys_first=False),
        's = tl.where(inside[None, :], s, float("-inf"))',
        "m_new = tl.maximum(m_i, tl.max(s, 1))",
        "p = tl.exp2(s - m_new[:, None])",
        "alpha = tl.exp2(m_i - m_new)",
        "l_i = l_i * alpha + tl.sum(p, 1)",
        "m_i = m_new",
        *e.scale("acc", "alpha[:, None]"),
        "p = p.to(v_ptr.dtype.element_ty)",
        *e.accumulate("acc", "p", "v", dot),
    ]


def _results(e: Dim) -> list[str]:
    return [
        "l_safe = tl.where(l_i == 0.0, 1.0, l_i)",
        *e.scale("acc", "(1.0 / l_safe)[:, None]"),
        *e.store("acc", "out_ptr", "state", str(e.size), "is_row"),
        f'lse = tl.where(l_i == 0.0, float("-inf"), (m_i + tl.log2(l_safe)) / {scores.LOG2E})',
        "tl.store(lse_ptr + state, lse, mask=is_row)",
    ]
