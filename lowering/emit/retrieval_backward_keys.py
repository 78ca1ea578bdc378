"""Gradient of retrieved keys: a chunk's part from the queries that selected it, and their sum.

A program of ``retrieved_dkv`` holds keys and values of one chunk and walks over one piece of the
chunk's list: rows of queries, all query heads of a key head, read by index. Pieces of one chunk are
added by ``dkv``, in their order, so no run differs from another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import scores
from flasheva_compile.lowering.emit.queries import row_pointers
from flasheva_compile.lowering.emit.retrieval_backward_queries import load_gradients
from flasheva_compile.lowering.emit.retrieval_forward_attend import group_queries, load_queries
from flasheva_compile.lowering.emit.retrieval_forward_select import kv_program
from flasheva_compile.lowering.emit.selection_bits import group_count
from flasheva_compile.lowering.emit.source import Dim, Source

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec, Schedule


def chunk_parts(spec: KernelSpec, schedule: Schedule) -> int:
    """Return how many programs share the keys of one chunk."""
    return -(-spec.chunk_size // schedule.block_n)


def emit_retrieved_dkv(spec: KernelSpec, schedule: Schedule) -> str:
    """Return the body of ``retrieved_dkv``."""
    out, d, e = Source(), Dim("d", spec.head_dim), Dim("e", spec.value_dim)
    out.lines(*_program(spec, schedule), *d.offsets(), *e.offsets())
    out.lines(*_piece(spec), *_keys(spec, d, e), "")
    out.lines("offs_m = tl.arange(0, BLOCK_M)", *d.zeros("dk", "BLOCK_N"))
    out.lines(*e.zeros("dv", "BLOCK_N"))
    with out.block("for offset in range(0, stop, BLOCK_M):"):
        out.lines(*_members(spec), *load_queries(spec, d, keys_first=True), *load_gradients(e))
        out.lines(*_tile(spec, d, e))
    out.lines(
        "",
        *d.scale("dk", "scale"),
        f"rows = (bh64 * pieces + piece) * {spec.chunk_size} + offs_c",
        *d.store("dk", "dk_parts_ptr", "rows", str(d.size), "is_key"),
        *e.store("dv", "dv_parts_ptr", "rows", str(e.size), "is_key"),
    )
    return out.text()


def _program(spec: KernelSpec, schedule: Schedule) -> list[str]:
    parts = chunk_parts(spec, schedule)
    return [
        group_count(spec),
        "pid = tl.program_id(0)",
        *([f"part = pid % {parts}", f"pid = pid // {parts}"] if parts > 1 else []),
        "bh = pid // pieces",
        "piece = pid % pieces",
        *kv_program(spec),
        *row_pointers(spec, chunks=False),
        "offs_c = part * BLOCK_N + tl.arange(0, BLOCK_N)"
        if parts > 1
        else "offs_c = tl.arange(0, BLOCK_N)",
    ]


def _piece(spec: KernelSpec) -> list[str]:
    """Find the chunk of a piece and its part of the chunk's list; none where there is no piece."""
    return [
        "slot = tl.load(piece_chunk_ptr + bh64 * pieces + piece)",
        "is_piece = slot < chunks",
        "lists = bh64 * (chunks + 1) + slot",
        "number = piece - tl.load(first_piece_ptr + lists)",
        "begin = tl.load(first_member_ptr + lists) + number * piece_size",
        "end = tl.load(first_member_ptr + lists + 1, mask=is_piece, other=0)",
        "members = tl.minimum(tl.maximum(end - begin, 0), piece_size)",
        f"stop = tl.where(is_piece, members, 0) * {group_queries(spec)}",
        "members_ptr += begin.to(tl.int64)",
    ]


def _keys(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    c = spec.chunk_size
    slot = "(slot - first_slot)" if spec.documents == "padded" else "slot"
    return [
        f"column = {slot} * {c} + offs_c",
        f"is_key = is_piece & (offs_c < {c})",
        "exists = is_key & (column < keys)",
        "key_rows = column.to(tl.int64)",
        *d.load("k", "k_ptr", "key_rows", "stride_kn", "exists"),
        *e.load("v", "v_ptr", "key_rows", "stride_vn", "exists"),
        *(["key_position = column.to(tl.float32)"] if spec.alibi else []),
    ]


def _members(spec: KernelSpec) -> list[str]:
    """Define which query of which head each row of a tile is."""
    rows, size = group_queries(spec), spec.selection_group
    index = "tl.load(members_ptr + row // {}, mask=is_row, other=0) - bh * groups"
    inside = f"row % {rows}"
    return [
        "row = offset + offs_m",
        "is_row = row < stop",
        f"index = {index.format(rows)}",
        f"head = {inside} // {size}" if size > 1 else f"head = {inside}",
        f"query = index * {size} + row % {size}" if size > 1 else "query = index",
        *(["is_row = is_row & (query < queries)"] if size > 1 else []),
        f"h = hk * {spec.group} + head",
    ]


def _tile(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    dot = scores.precision(spec)
    factor = " * (1.0 - tanh * tanh)" if spec.softcap else ""
    return [
        *d.contract("s", "k", "q", dot),
        *scores.scores(spec, "key", keys_first=True),
        "p = tl.exp2(s - lse[None, :])",
        "weights = p.to(q_ptr.dtype.element_ty)",
        *e.accumulate("dv", "weights", "do", dot),
        *e.contract("dp", "v", "do", dot),
        f"ds = (p * (dp - delta[None, :]){factor}).to(q_ptr.dtype.element_ty)",
        *d.accumulate("dk", "ds", "q", dot),
    ]


def retrieved_parts(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    """Add, in ``dkv``, the pieces of each key's chunk."""
    c = spec.chunk_size
    slot = f"offs_n // {c}{' + first_slot' if spec.documents == 'padded' else ''}"
    lines = [
        "# What queries add that retrieved the keys, piece by piece.",
        f"lists = bhk64 * (chunks + 1) + {slot}",
        "first_piece = tl.load(first_piece_ptr + lists, mask=exists, other=0)",
        "members = tl.load(first_piece_ptr + lists + 1, mask=exists, other=0) - first_piece",
        "for piece in range(0, tl.max(members)):",
        f"    part = (bhk64 * pieces + first_piece + piece) * {c} + offs_n % {c}",
        "    is_part = piece < members",
    ]
    for tile, dim in (("dk", d), ("dv", e)):
        load = dim.load("more", f"{tile}_parts_ptr", "part", str(dim.size), "is_part")
        lines += [
            f"    {line}" for line in (*load, *(f"{tile}{n} += more{n}" for n in dim.indices))
        ]
    return lines
