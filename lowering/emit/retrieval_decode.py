"""One step of generation with retrieval: ``retrieval_decode`` attends to a part of what is seen.

That is, in tiles one after the other: chunk tokens behind the window, whose scores
``retrieval_scores`` has left (``-inf`` for selected ones, from ``retrieval_select``), then exact
keys: those of the selected chunks, sinks and window, all gathered from one store by column. The new
token is there already. Parts are joined by ``decode_combine``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import positions, scores
from flasheva_compile.lowering.emit.decode import (
    LOWEST,
    group_bound,
    program,
    ring_slots,
    softmax_step,
    store_part,
)
from flasheva_compile.lowering.emit.decode_append import near_slot
from flasheva_compile.lowering.emit.fp8_tokens import load_fp8_tile, load_powers
from flasheva_compile.lowering.emit.source import Dim, Source

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec


def emit_retrieval_decode(spec: KernelSpec) -> str:
    """Return the body of ``retrieval_decode``."""
    out = Source()
    d, e = Dim("d", spec.head_dim, split=False), Dim("e", spec.value_dim, split=False)
    out.lines(*program(), *_ranges(spec), *_rows(spec))
    out.lines(*d.offsets(), *e.offsets(), "offs_t = tl.arange(0, BLOCK_N)", "")
    out.lines(*queries(spec, d))
    out.lines(
        f"m_i = tl.full([BLOCK_G], {LOWEST}, tl.float32)",
        "l_i = tl.zeros([BLOCK_G], tl.float32)",
        *e.zeros("acc", "BLOCK_G"),
    )
    out.lines("", "# Chunk tokens behind the window", *_chunk_bounds(spec))
    with out.block("for offset in range(begin, stop, BLOCK_N):"):
        out.lines(*_chunk_tile(spec, e))
    out.lines("", "# Selected chunks, sinks, window", *_exact_bounds())
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
        f"near = retrieved + {seen}" if sinks else "near = retrieved",
        "exact_stop = near + position + 1 - low",
        "tiles = chunk_tiles + tl.cdiv(exact_stop, BLOCK_N)",
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
    origin = f"{first} + " if first else ""
    return [
        f"begin = {origin}tl.minimum(tile_begin, chunk_tiles) * BLOCK_N",
        f"stop = tl.minimum({origin}tl.minimum(tile_end, chunk_tiles) * BLOCK_N, chunk_stop)",
    ]


def _exact_bounds() -> list[str]:
    """Define this program's range of exact keys, counted in the order in which they are walked."""
    return [
        "begin = tl.maximum(tile_begin - chunk_tiles, 0) * BLOCK_N",
        "stop = tl.minimum(tl.maximum(tile_end - chunk_tiles, 0) * BLOCK_N, exact_stop)",
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
        *softmax_step(e, "rfa_v_ptr"),
        f"v_tile = rfa_v_ptr + offset * tl.cast({e.size}, tl.int64)",
        *e.load("v", "v_tile", "offs_t", str(e.size), "inside"),
        *e.accumulate("acc", "p", "v", scores.precision(spec)),
    ]


def _exact_tile(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    c = spec.chunk_size
    near = "offs_n - near + low"
    if spec.sink_size:
        near = f"tl.where(offs_n < near, offs_n - retrieved, {near})"
    return [
        "offs_n = offset + offs_t",
        "inside = offs_n < stop",
        "is_retrieved = offs_n < retrieved",
        f"slot = tl.load(selected_ptr + offs_n // {c}, mask=inside & is_retrieved, other=0)",
        f"held = tl.where(is_retrieved, slot * {c} + offs_n % {c}, {near})",
        "column = start + held",
        "inside &= column < columns",
        *([f"near_slot = {near_slot(spec, 'held', ring_slots(spec))}"] * spec.near_store),
        *(_coded_rows() if spec.fp8_store else []),
        *_load_exact(spec, d, "k"),
        "is_key = tl.load(exact_mask_ptr + column, mask=inside, other=0) != 0",
        *d.contract("s", "q", "k", scores.precision(spec)),
        *scores.scores(spec, "key", keys_first=False),
        's = tl.where(is_key[None, :], s, float("-inf"))',
        *softmax_step(e, "rfa_v_ptr"),
        *_load_exact(spec, e, "v"),
        *e.accumulate("acc", "p", "v", scores.precision(spec)),
    ]


def _coded_rows() -> list[str]:
    """Define which rows of the tile are read from fp8, where, and their powers of two."""
    return [
        "is_coded = inside & is_retrieved",
        "coded = bh64 * columns + column",
        *load_powers("coded", "is_coded"),
    ]


def _load_exact(spec: KernelSpec, dim: Dim, name: str) -> list[str]:
    """Load a tile of exact keys or values: selected ones from the store, others where they are."""
    pointer, stride = f"exact_{name}_ptr", str(dim.size)
    if not spec.near_store:
        return dim.load(name, pointer, "column", stride, "inside")
    stored = dim.load(name, pointer, "column", stride, "inside & is_retrieved")
    if spec.fp8_store:
        stored = load_fp8_tile(spec, dim, name, "coded", "is_coded")
    return [
        *stored,
        *dim.load(
            f"near_{name}", f"near_{name}_ptr", "near_slot", stride, "inside & ~is_retrieved"
        ),
        *(
            f"{name}{n} = tl.where(is_retrieved[:, None], {name}{n}, near_{name}{n})"
            for n in dim.indices
        ),
    ]
