"""Several new tokens at once: ``extend`` attends from them to a cache and to each other.

A program holds some of the new tokens, with all query heads of one key head, and walks over one of
``splits`` equal parts of the tiles that any of them sees: chunk tokens, exact slots, new tokens.
The cache is as it was before the call, but for the chunk tokens that the new tokens complete
(``extend_pool``); ``extend_append`` writes the tokens behind it, ``extend_combine`` adds up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import positions, scores
from flasheva_compile.lowering.emit.chunk_fp8 import (
    after_chunks,
    before_chunks,
    chunk_pointers,
    chunk_tile,
)
from flasheva_compile.lowering.emit.decode import (
    LOWEST,
    exact_pointers,
    ring_slots,
)
from flasheva_compile.lowering.emit.source import Dim, Source

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec, Schedule


def emit_extend(spec: KernelSpec, schedule: Schedule) -> str:
    """Return the body of ``extend``."""
    out = Source()
    d, e = Dim("d", spec.head_dim, split=False), Dim("e", spec.value_dim, split=False)
    queries = schedule.block_m // spec.group
    out.lines(*_program(queries), *place(), *_rows(spec, schedule, queries))
    out.lines(*_ranges(spec, queries), *_pointers(spec))
    out.lines(*d.offsets(), *e.offsets(), "offs_t = tl.arange(0, BLOCK_N)")
    out.lines(*_start(spec, d))
    if spec.window == "whole":
        out.lines(*e.zeros("acc", "BLOCK_M"))
    else:
        visible = f"((offs_n + 1) * {spec.chunk_size})[None, :] <= low[:, None]"
        out.lines("", "# Chunk tokens behind the windows", *_chunk_bounds(spec))
        out.lines(*before_chunks(spec, d, e, "BLOCK_M"))
        with out.block("for offset in range(begin, stop, BLOCK_N):"):
            out.lines(*chunk_tile(spec, schedule, d, e, visible))
        out.lines(*after_chunks(spec, e))
    out.lines("", "# Sinks and window as the cache holds them", *_exact_bounds())
    with out.block("for offset in range(begin, stop, BLOCK_N):"):
        out.lines(*_exact_tile(spec, d, e))
    out.lines("", "# The new tokens", *_new_bounds())
    with out.block("for offset in range(begin, stop, BLOCK_N):"):
        out.lines(*_new_tile(spec, d, e))
    out.lines("", *_store(spec, e))
    return out.text()


def _program(queries: int) -> list[str]:
    """Define this program's part, ``split``, its tile of tokens, its row ``b`` and its head."""
    return [
        "pid = tl.program_id(0)",
        f"token_tiles = tl.cdiv(queries, {queries})",
        "rows = tl.num_programs(0) // (splits * token_tiles)",
        "tile = pid // rows % token_tiles",
        "split = pid // rows // token_tiles",
        *row_of("pid % rows"),
    ]


def row_of(row: str) -> list[str]:
    """Define row ``b`` and key head ``hk`` of a program."""
    return [
        f"bh = {row}",
        "b = bh // heads",
        "hk = bh % heads",
        "b64 = b.to(tl.int64)",
        "bh64 = bh.to(tl.int64)",
    ]


def place() -> list[str]:
    """Define ``before``, the tokens of the row that the cache holds; negative in padding."""
    return [
        "length = tl.load(length_ptr)",
        "start = tl.load(row_start_ptr + b)",
        "before = (length - start).to(tl.int32)",
    ]


def _rows(spec: KernelSpec, schedule: Schedule, queries: int) -> list[str]:
    """Define the token, query head and position of each row of the tile."""
    full = queries * spec.group == schedule.block_m
    inside = "" if full else f"(offs_m < {queries * spec.group}) & "
    return [
        "offs_m = tl.arange(0, BLOCK_M)",
        f"token = tile * {queries} + offs_m // {spec.group}",
        f"head = hk * {spec.group} + offs_m % {spec.group}",
        f"is_row = {inside}(token < queries)",
        "position = before + token",
        *(positions.window(spec, "position", "low", "high") if spec.window != "whole" else []),
        f"end_token = tl.minimum(tile * {queries} + {queries}, queries)",
    ]


def _ranges(spec: KernelSpec, queries: int) -> list[str]:
    """Define what any row sees, in tiles, and this program's part of them."""
    part = ["tile_begin = split * tiles // splits", "tile_end = (split + 1) * tiles // splits"]
    if spec.window == "whole":
        return [
            "chunk_tiles = 0",
            "exact_stop = tl.minimum(tl.maximum(before, 0), room)",
            "exact_tiles = tl.cdiv(exact_stop, BLOCK_N)",
            "new_begin = tl.maximum(-before, 0)",
            "new_tiles = tl.cdiv(tl.maximum(end_token - new_begin, 0), BLOCK_N)",
            "tiles = exact_tiles + new_tiles",
            *part,
        ]
    c, sinks, ring = spec.chunk_size, spec.sink_size, ring_slots(spec)
    minus = f" - {sinks // c}" if sinks else ""
    slot = f"{sinks} + (last - {sinks}) % {ring}" if sinks else f"last % {ring}"
    new_begin = "tl.maximum(low_first - before, 0)"
    return [
        f"first = before + tile * {queries}",
        "final = before + end_token - 1",
        *positions.window(spec, "first", "low_first", "high"),
        *positions.window(spec, "final", "low_final", "high"),
        f"chunk_stop = tl.minimum(low_final // {c}, chunks)",
        f"chunk_tiles = tl.cdiv(tl.maximum(chunk_stop{minus}, 0), BLOCK_N)",
        "last = before - 1",
        f"last_slot = tl.where(last < {max(sinks, 1)}, last, {slot})",
        f"held_slots = tl.minimum(tl.maximum(before, 0), {sinks + ring})",
        "# Windows that begin among the new tokens need no more of the cache than its sinks.",
        f"exact_stop = tl.where(low_first < before, held_slots, tl.minimum(held_slots, {sinks}))",
        "exact_tiles = tl.cdiv(exact_stop, BLOCK_N)",
        f"new_begin = tl.where(before < {sinks}, 0, {new_begin})"
        if sinks
        else f"new_begin = {new_begin}",
        "new_tiles = tl.cdiv(tl.maximum(end_token - new_begin, 0), BLOCK_N)",
        "tiles = chunk_tiles + exact_tiles + new_tiles",
        *part,
    ]


def _pointers(spec: KernelSpec) -> list[str]:
    """Move the pointers of the cache to row ``b`` and head ``hk``."""
    chunks = chunk_pointers(spec) if spec.window != "whole" else []
    return [
        *exact_pointers(spec),
        *chunks,
        *new_pointers(),
    ]


def new_pointers() -> list[str]:
    """Do the same with the new keys, values and their mask ``[B, queries]``."""
    return [
        *(
            f"{name}_ptr += b64 * stride_{name}b + hk * tl.cast(stride_{name}h, tl.int64)"
            for name in "kv"
        ),
        "flags_ptr = key_mask_ptr + b64 * queries",
    ]


def _start(spec: KernelSpec, d: Dim) -> list[str]:
    """Load the queries; start the softmax at the lowest finite maximum: nothing seen is no NaN."""
    return [
        "q_at = head * tl.cast(stride_qh, tl.int64) + token * tl.cast(stride_qm, tl.int64)",
        *d.load("q", "q_ptr + b64 * stride_qb", "q_at", "1", "is_row"),
        *scores.cached_slopes(spec, "head", "is_row", "position.to(tl.float32)"),
        f"m_i = tl.full([BLOCK_M], {LOWEST}, tl.float32)",
        "l_i = tl.zeros([BLOCK_M], tl.float32)",
    ]


# --- tiles ----------------------------------------------------------------------------------------


def _chunk_bounds(spec: KernelSpec) -> list[str]:
    first = spec.sink_size // spec.chunk_size
    origin = f"{first} + " if first else ""
    return [
        f"begin = {origin}tl.minimum(tile_begin, chunk_tiles) * BLOCK_N",
        f"stop = tl.minimum({origin}tl.minimum(tile_end, chunk_tiles) * BLOCK_N, chunk_stop)",
    ]


def _exact_bounds() -> list[str]:
    return [
        "begin = tl.maximum(tile_begin - chunk_tiles, 0) * BLOCK_N",
        "stop = tl.minimum(tl.maximum(tile_end - chunk_tiles, 0) * BLOCK_N, exact_stop)",
    ]


def _new_bounds() -> list[str]:
    tiles = "tl.maximum({} - chunk_tiles - exact_tiles, 0) * BLOCK_N"
    return [
        f"begin = new_begin + {tiles.format('tile_begin')}",
        f"stop = tl.minimum(new_begin + {tiles.format('tile_end')}, end_token)",
    ]


def _exact_tile(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    sinks, ring = spec.sink_size, ring_slots(spec)
    held = f"held = offs_n + (last - last_slot) - tl.where(offs_n > last_slot, {ring}, 0)"
    visible = [f"seen = {_in_window('held', 'offs_n', sinks)}", "visible = is_key[None, :] & seen"]
    if spec.window == "whole":
        held, visible = "held = offs_n", ["visible = is_key[None, :]"]
    return [
        "offs_n = offset + offs_t",
        held,
        "inside = offs_n < stop",
        *d.load_tile("k", "exact_k_ptr", "inside"),
        "is_key = tl.load(exact_mask_ptr + offs_n, mask=inside, other=0) != 0",
        *visible,
        *scores.cached_position(spec, "key", scores.exact_position(spec)),
        *_attend(spec, d, e),
        *e.load_tile("v", "exact_v_ptr", "inside"),
        *e.accumulate("acc", "p", "v", scores.precision(spec)),
    ]


def _in_window(held: str, sink: str, sinks: int) -> str:
    """Return the condition under which rows see the keys at positions ``held``.

    Args:
        held: Positions.
        sink: What is below ``sinks`` of a sink, and only of one.
        sinks: Exact first tokens.
    """
    inside = f"({held}[None, :] >= low[:, None])"
    if not sinks:
        return inside
    # A slot of the ring may hold nothing newer than a sink's position: it is none.
    return f"({sink} < {sinks})[None, :] | {inside} & ({held} >= {sinks})[None, :]"


def _new_tile(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    is_key = "(inside & (key_at >= 0))"
    flags = []
    if spec.key_mask:
        flags = ["is_key = tl.load(flags_ptr + offs_n, mask=inside, other=0) != 0"]
        is_key = "(is_key & (key_at >= 0))"
    in_window = _in_window("key_at", "key_at", spec.sink_size)
    whole = spec.window == "whole"
    return [
        "offs_n = offset + offs_t",
        "inside = offs_n < stop",
        "key_at = before + offs_n",
        *d.load("k", "k_ptr", "offs_n", "tl.cast(stride_kn, tl.int64)", "inside"),
        *flags,
        "causal = offs_n[None, :] <= token[:, None]",
        *([] if whole else [f"seen = {in_window}"]),
        f"visible = {is_key}[None, :] & causal" + " & seen" * (not whole),
        *scores.cached_position(spec, "key", "key_at"),
        *_attend(spec, d, e),
        *e.load("v", "v_ptr", "offs_n", "tl.cast(stride_vn, tl.int64)", "inside"),
        *e.accumulate("acc", "p", "v", scores.precision(spec)),
    ]


def _attend(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    """Go on with the softmax by the scores of a tile of keys."""
    return [
        *d.contract("s", "q", "k", scores.precision(spec)),
        *scores.scores(spec, "key", keys_first=False),
        's = tl.where(visible, s, float("-inf"))',
        *scores.softmax_step(e),
    ]


def _store(spec: KernelSpec, e: Dim) -> list[str]:
    """Store sums, maxima and masses: ``[splits, B, Hq, L, Dv]``, then twice ``[splits, ...]``."""
    lost = "position >= room" if spec.window == "whole" else f"low // {spec.chunk_size} > chunks"
    return [
        "# A cache that was too small for a token must not go unnoticed.",
        f"lost = {lost}",
        *(f'acc{n} = tl.where(lost[:, None], float("nan"), acc{n})' for n in e.indices),
        f"total = rows.to(tl.int64) * {spec.group} * queries",
        f"row = (b64 * heads * {spec.group} + head) * queries + token",
        "part = split * total + row",
        *e.store("acc", "partial_ptr", "part", str(e.size), "is_row"),
        "parts = splits * total",
        f"peak_ptr = partial_ptr + parts * {e.size}",
        "tl.store(peak_ptr + part, m_i, mask=is_row)",
        "tl.store(peak_ptr + parts + part, l_i, mask=is_row)",
    ]
