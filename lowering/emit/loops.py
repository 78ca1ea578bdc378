"""Loops of a block of queries as data: what is walked over, from where to where, which mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from flasheva_compile.lowering.emit import positions

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec, Schedule


@dataclass(frozen=True, slots=True)
class Compare:
    """``key op query``: one side is a vector over keys, the other over queries (or a scalar)."""

    key: str
    op: str
    query: str

    def text(self, *, keys_first: bool) -> str:
        """Return the comparison of a tile; ``keys_first``: keys are its rows."""
        key, query = ("[:, None]", "[None, :]") if keys_first else ("[None, :]", "[:, None]")
        return f"({self.key}{key} {self.op} {self.query}{query})"


@dataclass(frozen=True, slots=True)
class Either:
    """One of two comparisons holds."""

    left: Compare
    right: Compare

    def text(self, *, keys_first: bool) -> str:
        """Return the disjunction of a tile."""
        left, right = (side.text(keys_first=keys_first) for side in (self.left, self.right))
        return f"({left} | {right})"


@dataclass(frozen=True, slots=True)
class KeyFlag:
    """A condition on keys alone."""

    condition: str

    def text(self, *, keys_first: bool) -> str:
        """Return the condition spread over a tile."""
        return f"({self.condition}){'[:, None]' if keys_first else '[None, :]'}"


Mask = tuple[Compare | Either | KeyFlag, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A walk of a block of queries over keys or chunk tokens, in tiles of ``step``.

    Attributes:
        purpose: Comment above the loop.
        source: ``"chunk"`` or ``"key"``.
        begin: First index.
        end: Index after the last.
        step: Indices per tile.
        mask: What may attend; () = everything.
        bounded: The last tile may reach beyond ``end``.
    """

    purpose: str
    source: Literal["chunk", "key"]
    begin: str
    end: str
    step: str = "BLOCK_N"
    mask: Mask = ()
    bounded: bool = True


SINK_STEP = 64
"""Most sinks in one tile."""


def _whole(begin: str, end: str) -> str:
    """Return the end of the whole tiles in ``[begin, end)``."""
    return f"{begin} + tl.maximum({end} - {begin}, 0) // BLOCK_N * BLOCK_N"


def query_setup(spec: KernelSpec) -> list[str]:
    """Define what the loops of a block of queries refer to."""
    c, sinks = spec.chunk_size, spec.sink_size // spec.chunk_size
    if spec.documents == "packed":
        return [
            "begin = tl.load(begin_ptr + b_row + i, mask=rows < queries, other=columns)",
            *positions.window(spec, "i", "lo", "hi"),
            f"sink_stop = begin + {spec.sink_size}",
            "document = tl.min(begin)",
            "lo_first = tl.min(lo)",
            f"chunk_end = tl.minimum(tl.max(tl.where(begin < columns, lo, 0)) // {c}, chunks)",
        ]
    lines = [
        *positions.window(spec, "i", "lo", "hi"),
        *positions.window(spec, "first", "lo_first", "hi_first"),
        *positions.window(spec, "last", "lo_last", "hi_last"),
        f"chunk_stop = tl.minimum(lo // {c}, slots)",
    ]
    if spec.sink_size:
        stop = f"tl.minimum({spec.sink_size}, keys)"
        lines.append(f"sink_stop = {f'tl.minimum(lo, {stop})' if spec.causal else stop}")
    if not spec.causal:
        after = f"tl.cdiv(hi, {c})"
        lines.append(f"chunk_start = {f'tl.maximum({after}, {sinks})' if sinks else after}")
    return lines


def query_loops(spec: KernelSpec, schedule: Schedule) -> list[tuple[list[str], Loop]]:
    """Return the loops of a block of queries, each with the lines that define its bounds."""
    if spec.documents == "packed":
        return _packed_loops(spec)
    loops = _left_chunks(spec)
    if spec.sink_size:
        loops.append(_sinks(spec))
    if schedule.split_window:
        loops += _split_window(spec, wide=_is_wide(spec, schedule))
    else:
        loops.append(([], _window(spec)))
    return loops if spec.causal else loops + _right_chunks(spec)


def _left_chunks(spec: KernelSpec) -> list[tuple[list[str], Loop]]:
    c, sinks = spec.chunk_size, str(spec.sink_size // spec.chunk_size)
    whole = _whole(sinks, f"tl.minimum(lo_first // {c}, slots)")
    return [
        (
            [f"whole = {whole}"],
            Loop(
                purpose="Chunk tokens that every query of the block sees.",
                source="chunk",
                begin=sinks,
                end="whole",
                bounded=False,
            ),
        ),
        (
            [],
            Loop(
                purpose="Chunk tokens that only some queries of the block see.",
                source="chunk",
                begin="whole",
                end=f"tl.minimum(lo_last // {c}, slots)",
                mask=(Compare("offs_n", "<", "chunk_stop"),),
            ),
        ),
    ]


def _sinks(spec: KernelSpec) -> tuple[list[str], Loop]:
    if spec.causal:
        # A query may stand behind all keys, of which there may be fewer than sinks.
        end = f"tl.minimum(tl.minimum(lo_last, hi_last), {spec.sink_size})"
        mask = (Compare("offs_n", "<", "sink_stop"),)
    else:
        outside = Either(Compare("offs_n", "<", "lo"), Compare("offs_n", ">=", "hi"))
        end, mask = "sink_stop", (KeyFlag("offs_n < sink_stop"), outside)
    return [], Loop(
        purpose="Sinks in front of the window." if spec.causal else "Sinks outside the window.",
        source="key",
        begin="0",
        end=end,
        step="BLOCK_S",
        mask=mask,
    )


def _window(spec: KernelSpec) -> Loop:
    return Loop(
        purpose="The window.",
        source="key",
        begin="lo_first",
        end="hi_last",
        mask=(Compare("offs_n", ">=", "lo"), Compare("offs_n", "<", "hi")),
    )


def _is_wide(spec: KernelSpec, schedule: Schedule) -> bool:
    """Whether the tiles at the window's left edge hold only keys before the block's queries."""
    inside = spec.causal and spec.whole_chunks and spec.window == "sliding"
    return inside and spec.window_size >= schedule.block_m + schedule.block_n


def _split_window(spec: KernelSpec, *, wide: bool) -> list[tuple[list[str], Loop]]:
    edge = "lo_first + tl.cdiv(lo_last - lo_first, BLOCK_N) * BLOCK_N"
    both = (Compare("offs_n", ">=", "lo"), Compare("offs_n", "<", "hi"))
    first, whole, last = "lo_first", "left", "middle"
    return [
        (
            [f"left = {edge}"],
            Loop(
                purpose="Left edge of the window.",
                source="key",
                begin=first,
                end="tl.minimum(left, hi_last)",
                mask=both[:1] if wide else both,
            ),
        ),
        (
            [f"middle = {_whole('left', 'hi_first')}"],
            Loop(
                purpose="Keys that every query of the block has in its window.",
                source="key",
                begin=whole,
                end="middle",
                bounded=False,
            ),
        ),
        (
            [],
            Loop(
                purpose="Right edge of the window.",
                source="key",
                begin=last,
                end="hi_last",
                mask=both[1:],
            ),
        ),
    ]


def _right_chunks(spec: KernelSpec) -> list[tuple[list[str], Loop]]:
    c, sinks = spec.chunk_size, spec.sink_size // spec.chunk_size
    start, stop = f"tl.cdiv(hi_first, {c})", f"tl.cdiv(hi_last, {c})"
    if sinks:
        start, stop = f"tl.maximum({start}, {sinks})", f"tl.maximum({stop}, {sinks})"
    return [
        (
            [
                f"right = {start}",
                f"after = tl.minimum(right + tl.cdiv({stop} - right, BLOCK_N) * BLOCK_N, slots)",
            ],
            Loop(
                purpose="Chunk tokens behind the window that only some queries see.",
                source="chunk",
                begin="right",
                end="after",
                mask=(Compare("offs_n", ">=", "chunk_start"), KeyFlag("offs_n < slots")),
            ),
        ),
        (
            [f"rest = {_whole('after', 'slots')}"],
            Loop(
                purpose="Chunk tokens behind the window that every query sees.",
                source="chunk",
                begin="after",
                end="rest",
                bounded=False,
            ),
        ),
        (
            [],
            Loop(
                purpose="The last of them.",
                source="chunk",
                begin="rest",
                end="slots",
                mask=(KeyFlag("offs_n < slots"),),
            ),
        ),
    ]


SEEN_CHUNK = (Compare("chunk_first", ">=", "sink_stop"), Compare("chunk_last", "<", "lo"))


def _packed_loops(spec: KernelSpec) -> list[tuple[list[str], Loop]]:
    c, t = spec.chunk_size, spec.sink_size
    inside = Compare("offs_n", ">=", "begin")
    window = Compare("offs_n", ">=", "lo")
    if t:
        window = Either(window, Compare("offs_n", "<", "sink_stop"))
    loops = [
        (
            [],
            Loop(
                purpose="Chunk tokens of the documents in the block.",
                source="chunk",
                begin=f"(document + {t}) // {c}",
                end="chunk_end",
                mask=SEEN_CHUNK,
            ),
        )
    ]
    if t:
        sinks = Loop(
            purpose="Sinks of the block's first document; the others' are in the window loop.",
            source="key",
            begin="document",
            end=f"tl.minimum(document + {t}, lo_first)",
            step="BLOCK_S",
            mask=(inside, Compare("offs_n", "<", "sink_stop"), KeyFlag("offs_n < lo_first")),
        )
        loops.append(([], sinks))
    keys = Loop(
        purpose="The window, and sinks of documents that begin in it.",
        source="key",
        begin="lo_first",
        end="tl.minimum(last + 1, keys)",
        mask=(inside, window, Compare("offs_n", "<", "hi")),
    )
    return [*loops, ([], keys)]
