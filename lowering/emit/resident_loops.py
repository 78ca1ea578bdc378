"""Loops of a block of keys or chunk tokens as data: which queries see it, and under which mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import positions
from flasheva_compile.lowering.emit.loops import SEEN_CHUNK, Compare, Either

if TYPE_CHECKING:
    from flasheva_compile.lowering.emit.loops import Mask
    from flasheva_compile.lowering.spec import KernelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryLoop:
    """A walk of a resident block over tiles of queries, ``[begin, end)`` counted in tiles."""

    purpose: str
    begin: str
    end: str
    mask: Mask = ()


_SEEN_LATER = (Compare("seen_from", "<=", "i"),)


def resident_bounds(spec: KernelSpec) -> list[str]:
    """Define the queries that see each resident row, where positions alone decide."""
    if not spec.causal or spec.documents == "packed":
        return []
    if spec.kind == "dkv":
        return [f"seen_until = {positions.seen_until(spec, 'offs_n')}"]
    chunk = "offs_n" if spec.kind == "dchunk" else f"(offs_n // {spec.chunk_size})"
    return [f"seen_from = {positions.seen_from(spec, chunk)}"]


def resident_mask(spec: KernelSpec) -> Mask:
    """Return who sees the resident rows ``n`` of a kernel that walks over queries."""
    if spec.kind == "dchunk":
        if spec.documents == "packed":
            return SEEN_CHUNK
        if spec.causal:
            return _SEEN_LATER
        return (Either(Compare("chunk_last", "<", "lo"), Compare("chunk_first", ">=", "hi")),)
    if spec.kind == "dsink":
        if spec.causal:
            return _SEEN_LATER
        return (Either(Compare("offs_n", "<", "lo"), Compare("offs_n", ">=", "hi")),)
    if spec.causal and spec.documents != "packed":
        return (Compare("offs_n", "<=", "i"), Compare("seen_until", ">", "i"))
    window: Compare | Either = Compare("offs_n", ">=", "lo")
    if spec.documents != "packed":
        return (window, Compare("offs_n", "<", "hi"))
    if spec.sink_size:
        window = Either(window, Compare("offs_n", "<", "sink_stop"))
    return (Compare("offs_n", ">=", "begin"), window, Compare("offs_n", "<", "hi"))


def resident_loops(spec: KernelSpec) -> tuple[list[str], list[QueryLoop]]:
    """Return the lines that define the bounds, in tiles after ``row_begin``, and the loops."""
    masked = QueryLoop(
        purpose="Queries of which only some see the block's rows.",
        begin="0",
        end="tiles_masked",
        mask=resident_mask(spec),
    )
    if spec.documents == "packed":
        lines = _packed_range(spec)
        return [*lines, *_ALIGNED], [masked]
    if spec.kind == "dkv":
        return [*_window_range(spec), *_ALIGNED], [masked]
    if spec.kind == "dsink" and not spec.causal:
        lines = ["row_begin = 0", "tiles_masked = tl.cdiv(queries, BLOCK_M)"]
        return lines, [masked]
    whole = QueryLoop(
        purpose="Queries that all see all rows of the block.", begin="tiles_masked", end="tiles"
    )
    if spec.causal:
        seen_by_all = QueryLoop(purpose=whole.purpose, begin="0", end="tiles_whole")
        edge = QueryLoop(purpose=masked.purpose, begin="tiles_whole", end="tiles", mask=masked.mask)
        return _later_queries(spec), [seen_by_all, edge]
    left = QueryLoop(
        purpose="Queries in front that all see all rows of the block.", begin="0", end="tiles_left"
    )
    middle = QueryLoop(
        purpose=masked.purpose, begin="tiles_left", end="tiles_masked", mask=masked.mask
    )
    return _both_sides(spec), [left, middle, whole]


_ALIGNED = [
    "row_begin = row_begin // 16 * 16",  # states are read in aligned vectors
    "tiles_masked = tl.cdiv(row_end - row_begin, BLOCK_M)",
]


def _row(position: str) -> str:
    """Return the row of the query at a position, held inside ``[0, queries]``."""
    return f"tl.minimum(tl.maximum({position} + shift, 0), queries)"


def _later_queries(spec: KernelSpec) -> list[str]:
    """Bound the causal queries that see a block of chunk tokens or sinks."""
    if spec.kind == "dsink":
        c, last = spec.chunk_size, f"tl.minimum(offset + BLOCK_N, {spec.sink_size}) - 1"
        begin = positions.seen_from(spec, f"(offset // {c})")
        whole = positions.seen_from(spec, f"(({last}) // {c})")
    else:
        begin = positions.seen_from(spec, f"tl.maximum(j, {spec.sink_size // spec.chunk_size})")
        whole = positions.seen_from(spec, "(j + BLOCK_N - 1)")
    return [
        "# From the last queries backwards, so that the programs of a head read the same tiles.",
        "tiles_m = tl.cdiv(queries, BLOCK_M)",
        f"tiles = tiles_m - {_row(begin)} // BLOCK_M",
        f"tiles_whole = tl.minimum(tiles_m - tl.cdiv({_row(whole)}, BLOCK_M), tiles)",
    ]


def tile_row(spec: KernelSpec) -> str:
    """Return the first row of a tile of queries."""
    backwards = spec.causal and spec.documents != "packed" and spec.kind != "dkv"
    return "(tiles_m - 1 - tile) * BLOCK_M" if backwards else "row_begin + tile * BLOCK_M"


def _both_sides(spec: KernelSpec) -> list[str]:
    """Bound the bidirectional queries that see a block of chunk tokens."""
    first = f"tl.maximum(j, {spec.sink_size // spec.chunk_size})"
    _, any_right = positions.seen_after(spec, "j_first")
    right_last, all_right = positions.seen_after(spec, "j_last")
    lines = [
        "row_begin = 0",
        f"j_first = {first}",
        f"j_last = tl.minimum(j + BLOCK_N - 1, tl.cdiv(keys, {spec.chunk_size}) - 1)",
    ]
    for name, chunk in (("left_all", "j_first"), ("left_any", "j_last")):
        lines += [
            f"{name} = {positions.seen_before(spec, chunk)}",
            f"{name} = tl.where({name} > 0, {_row(name)}, 0)",
        ]
    return [
        *lines,
        f"right_all = tl.where({all_right}, {_row(right_last)}, queries)",
        f"middle = tl.where({any_right}, right_all, left_any)",
        "tiles_left = left_all // BLOCK_M",
        "tiles_masked = tl.maximum(tiles_left, tl.cdiv(middle, BLOCK_M))",
        f"tiles = tl.where({any_right}, tl.cdiv(queries, BLOCK_M), tiles_masked)",
    ]


def _window_range(spec: KernelSpec) -> list[str]:
    """Bound the queries that have one of a block's keys, at ``first`` to ``last``, in a window."""
    w, c = spec.window_size, spec.chunk_size
    if spec.causal:
        return [
            f"row_begin = {_row('tl.maximum(first, 0)')}",
            f"row_end = {_row(positions.seen_until(spec, 'last'))}",
            "row_end = tl.where(last < 0, row_begin, tl.maximum(row_begin, row_end))",
        ]
    if spec.window == "block":
        begin, end = f"tl.maximum(first, 0) // {w} * {w}", f"last // {w} * {w} + {w}"
        at_end = f"{end} >= keys"
    else:
        begin = f"tl.maximum(first - {w + c - 1 - w // 2}, 0)"
        begin = f"tl.where(first < {w + c}, 0, {begin})"
        end = f"last // {c} * {c} + {c + w // 2}"
        at_end = f"last // {c} * {c} + {c} > keys - {w}"
    # Queries in the padding count as standing at the edge of the row.
    return [
        f"row_begin = {begin}",
        f"row_begin = tl.where(row_begin > 0, {_row('row_begin')}, 0)",
        f"row_end = tl.where({at_end}, queries, {_row(end)})",
        "row_end = tl.where(last < 0, row_begin, tl.maximum(row_begin, row_end))",
    ]


def _packed_range(spec: KernelSpec) -> list[str]:
    w, c = spec.window_size, spec.chunk_size
    if spec.kind == "dchunk":
        distance = c + w - 1 if spec.window == "sliding" else c
        return [
            "pooled = chunk_first >= 0",
            f"first = tl.min(tl.where(pooled, chunk_first, columns)) + {distance}",
            "document_end = tl.load(end_ptr + b_row + chunk_first, mask=pooled, other=0)",
            "last = tl.max(document_end)",
            f"row_begin = {_row('first')}",
            f"row_end = tl.maximum({_row('last')}, row_begin)",
        ]
    reach = w + c if spec.window == "sliding" else w
    lines = [
        "document_end = tl.load(end_ptr + b_row + offs_n, mask=offs_n < columns, other=0)",
        f"reach = tl.minimum(offs_n + {reach}, document_end)",
    ]
    if spec.sink_size:
        lines.append(f"reach = tl.where(offs_n - begin_n < {spec.sink_size}, document_end, reach)")
    return [
        *lines,
        f"row_begin = {_row('first')}",
        f"row_end = tl.maximum({_row('tl.max(reach)')}, row_begin)",
    ]
