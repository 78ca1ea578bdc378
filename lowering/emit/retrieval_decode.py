"""One step of generation with retrieval: ``retrieval_decode`` attends to a part of what is seen.

That is, in tiles one after the other: chunk tokens behind the window, whose scores
``retrieval_scores`` has left (``-inf`` for selected ones, from ``retrieval_select``), then exact
keys: those of the selected chunks, sinks and window, all gathered from one store by column. Where
sinks and window have copies of their own, selected chunks come first and by themselves. The new
token is there already. Parts are joined by ``decode_combine``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import fp8_products, positions, scores
from flasheva_compile.lowering.emit.decode import (
    LOWEST,
    group_bound,
    program,
    ring_slots,
    store_part,
)
from flasheva_compile.lowering.emit.decode_append import near_slot
from flasheva_compile.lowering.emit.source import Dim, Source

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec, Schedule


def emit_retrieval_decode(spec: KernelSpec, schedule: Schedule) -> str:
    """Return the body of ``retrieval_decode``."""
    out = Source()
    d, e = Dim("d", spec.head_dim, split=False), Dim("e", spec.value_dim, split=False)
    out.lines(*program(), *_ranges(spec), *_rows(spec))
    out.lines(*d.offsets(), *e.offsets(), "offs_t = tl.arange(0, BLOCK_N)", "")
    out.lines(*queries(spec, d))
    out.lines(
        f"m_i = tl.full([BLOCK_G], {LOWEST}, tl.float32)",
        "l_i = tl.zeros([BLOCK_G], tl.float32)",
    )
    if spec.near_store:
        _selected_loop(out, spec, schedule, d, e)
    else:
        out.lines(*e.zeros("acc", "BLOCK_G"))
    out.lines("", "# Chunk tokens behind the window", *_chunk_bounds(spec))
    with out.block("for offset in range(begin, stop, BLOCK_N):"):
        out.lines(*_chunk_tile(spec, e))
    exact = "# Sinks, window" if spec.near_store else "# Selected chunks, sinks, window"
    out.lines("", exact, *_bounds("selected_tiles + chunk_tiles", "exact_stop"))
    with out.block("for offset in range(begin, stop, BLOCK_N):"):
        out.lines(*_exact_tile(spec, d, e))
    out.lines("", *store_part(spec, e, "length >= columns"))
    return out.text()


def queries(spec: KernelSpec, d: Dim) -> list[str]:
    """Load the query heads of the key head."""
    stride = "tl.cast(stride_qh, tl.int64)"
    return [
        "offs_g = tl.arange(0, BLOCK_G)",
        f"q_rows = q_ptr + b64 * stride_qb + hk * {stride} * {spec.group}",
        *d.load("q", "q_rows", "offs_g", stride, group_bound(spec)),
    ]


def chunk_range(spec: KernelSpec) -> list[str]:
    """Define the window from ``low`` and the end of the chunk tokens that the token sees."""
    return [
        *positions.window(spec, "position", "low", "high"),
        f"chunk_stop = tl.minimum(low // {spec.chunk_size}, chunks)",
    ]


def _ranges(spec: KernelSpec) -> list[str]:
    """Define what the token sees, in tiles, and this program's part of them."""
    c, sinks = spec.chunk_size, spec.sink_size
    minus = f" - {sinks // c}" if sinks else ""
    seen = "tl.minimum(low, sinks)".replace("sinks", str(sinks)) if sinks else "0"
    return [
        "length = tl.load(length_ptr)",
        "start = tl.load(row_start_ptr + b)",
        "position = (length - start).to(tl.int32)",
        *chunk_range(spec),
        f"chunk_count = tl.maximum(chunk_stop{minus}, 0)",
        "chunk_tiles = tl.cdiv(chunk_count, BLOCK_N)",
        f"retrieved = tl.minimum(chunk_count, {spec.retrieve_chunks}) * {c}",
        *(
            ["selected_tiles = tl.cdiv(retrieved, BLOCK_N)", f"near = {seen}"]
            if spec.near_store
            else ["selected_tiles = 0", "near = retrieved" + f" + {seen}" * (sinks > 0)]
        ),
        "exact_stop = near + position + 1 - low",
        "tiles = selected_tiles + chunk_tiles + tl.cdiv(exact_stop, BLOCK_N)",
        "tile_begin = split * tiles // splits",
        "tile_end = (split + 1) * tiles // splits",
    ]


def _rows(spec: KernelSpec) -> list[str]:
    """Move pointers to row ``b`` and head ``hk``."""
    return [
        *store_rows(spec),
        f"rfa_v_ptr += bh64 * chunks * {spec.value_dim}",
        f"scores_ptr += bh64 * chunks * {spec.group}",
        f"selected_ptr += bh64 * {spec.retrieve_chunks}",
    ]


def store_rows(spec: KernelSpec) -> list[str]:
    """Move pointers of the store, if it is no fp8, and of copies to row ``b`` and head ``hk``."""
    lines = ["exact_mask_ptr += b64 * columns"]
    if not spec.fp8_store:
        lines += [
            f"exact_k_ptr += bh64 * columns * {spec.head_dim}",
            f"exact_v_ptr += bh64 * columns * {spec.value_dim}",
        ]
    if not spec.near_store:
        return lines
    slots = spec.sink_size + ring_slots(spec)
    return [
        *lines,
        f"near_k_ptr += bh64 * {slots * spec.head_dim}",
        f"near_v_ptr += bh64 * {slots * spec.value_dim}",
    ]


def _chunk_bounds(spec: KernelSpec) -> list[str]:
    """Define this program's range of chunk tokens."""
    first = spec.sink_size // spec.chunk_size
    begin, stop = _bounds("selected_tiles", "chunk_count")
    if not first:
        return [begin, stop]
    return [begin, stop, f"begin += {first}", f"stop += {first}"]


def _bounds(before: str, count: str) -> list[str]:
    """Define this program's range of ``count`` places, which ``before`` other tiles precede."""
    return [
        f"begin = tl.maximum(tile_begin - ({before}), 0) * BLOCK_N",
        f"stop = tl.minimum(tl.maximum(tile_end - ({before}), 0) * BLOCK_N, {count})",
    ]


def _chunk_tile(spec: KernelSpec, e: Dim) -> list[str]:
    bound = group_bound(spec)
    is_score = f"({bound})[:, None] & inside[None, :]" if bound else "inside[None, :]"
    address = "scores_ptr + offs_g[:, None] * tl.cast(chunks, tl.int64) + offs_n[None, :]"
    return [
        "offs_n = offset + offs_t",
        "inside = offs_n < stop",
        f"is_score = {is_score}",
        f's = tl.load({address}, mask=is_score, other=float("-inf"))',
        *scores.softmax_step(e, "rfa_v_ptr"),
        f"v_tile = rfa_v_ptr + offset * tl.cast({e.size}, tl.int64)",
        *e.load("v", "v_tile", "offs_t", str(e.size), "inside"),
        *e.accumulate("acc", "p", "v", scores.precision(spec)),
    ]


def _exact_tile(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    near = "offs_n - near + low"
    if spec.sink_size:
        sink = "offs_n" if spec.near_store else "offs_n - retrieved"
        near = f"tl.where(offs_n < near, {sink}, {near})"
    if spec.near_store:
        slot = near_slot(spec, "held", ring_slots(spec))
        where = [f"held = {near}", "column = start + held", "inside &= column < columns"]
        return [*_tile(), *where, f"near_slot = {slot}", *_attend(spec, d, e, "near", "near_slot")]
    c = spec.chunk_size
    return [
        *_tile(),
        "is_retrieved = offs_n < retrieved",
        f"slot = tl.load(selected_ptr + offs_n // {c}, mask=inside & is_retrieved, other=0)",
        f"held = tl.where(is_retrieved, slot * {c} + offs_n % {c}, {near})",
        "column = start + held",
        "inside &= column < columns",
        *_attend(spec, d, e, "exact", "column"),
    ]


def _tile() -> list[str]:
    return ["offs_n = offset + offs_t", "inside = offs_n < stop"]


def _attend(spec: KernelSpec, d: Dim, e: Dim, store: str, rows: str) -> list[str]:
    """Go on with softmax and sums by the keys of a tile, in ``rows`` of a store."""
    return [
        *d.load("k", f"{store}_k_ptr", rows, str(d.size), "inside"),
        *_load_validity(),
        *d.contract("s", "q", "k", scores.precision(spec)),
        *scores.scores(spec, "key", keys_first=False),
        *_mask_invalid(),
        *scores.softmax_step(e, "rfa_v_ptr"),
        *e.load("v", f"{store}_v_ptr", rows, str(e.size), "inside"),
        *e.accumulate("acc", "p", "v", scores.precision(spec)),
    ]


def _load_validity() -> list[str]:
    return ["is_key = tl.load(exact_mask_ptr + column, mask=inside, other=0) != 0"]


def _mask_invalid() -> list[str]:
    return ['s = tl.where(is_key[None, :], s, float("-inf"))']


# --- selected chunks by themselves ----------------------------------------------------------------


def _selected_loop(out: Source, spec: KernelSpec, schedule: Schedule, d: Dim, e: Dim) -> None:
    """Attend to the keys of the selected chunks."""
    out.lines("", "# Selected chunks", *_bounds("0", "retrieved"))
    if not spec.fp8_store:
        out.lines(*e.zeros("acc", "BLOCK_G"))
        with out.block("for offset in range(begin, stop, BLOCK_N):"):
            out.lines(*_selected_columns(spec), *_attend(spec, d, e, "exact", "column"))
        return
    pairs = fp8_products.pairs_of(e)
    out.lines(
        *fp8_products.start(spec, d, e, "BLOCK_G"),
        "powers_ptr = exponents_ptr.to(tl.pointer_type(tl.int16))",
        *(["value_pairs_ptr = value_codes_ptr.to(tl.pointer_type(tl.int16))"] if pairs else []),
    )
    with out.block("for offset in range(begin, stop, BLOCK_N):"):
        out.lines(*_selected_columns(spec), *_coded_tile(spec, schedule, d, e))
    out.lines(*fp8_products.finish(e))


def _selected_columns(spec: KernelSpec) -> list[str]:
    c = spec.chunk_size
    return [
        *_tile(),
        f"slot = tl.load(selected_ptr + offs_n // {c}, mask=inside, other=0)",
        f"column = start + slot * {c} + offs_n % {c}",
        "inside &= column < columns",
    ]


def _coded_tile(spec: KernelSpec, schedule: Schedule, d: Dim, e: Dim) -> list[str]:
    """Go on with softmax and sums by keys and values in fp8."""
    pairs = fp8_products.pairs_of(e)
    values = "value_pairs_ptr" if pairs else "value_codes_ptr"
    columns = pairs or e
    return [
        "coded = bh64 * columns + column",
        *d.load("k", "key_codes_ptr", "coded", str(d.size), "inside"),
        "pairs = tl.load(powers_ptr + coded, mask=inside, other=0)",
        *_load_validity(),
        *fp8_products.keys(spec, schedule),
        *fp8_products.powers(schedule, "pairs"),
        *scores.scores(spec, "key", keys_first=False, scale=fp8_products.SCALE),
        *_mask_invalid(),
        *fp8_products.softmax(spec),
        *columns.load("v", values, "coded", str(columns.size), "inside"),
        *fp8_products.values(spec, schedule, e),
    ]
