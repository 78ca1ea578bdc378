"""Which tiles the warps of a specialised ``forward`` walk over, and in which order.

All go through the same tiles: the window from right to left, so that in causal rows the first holds
every query's own key, then sinks, then chunk tokens from the latest to the first, then those behind
the window. The producer knows them by the block's first and last query; what a consumer makes of
one depends on its own queries. There is always a tile, also for queries that see nothing.

A padded row is a dense one that begins at its first valid key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import positions
from flasheva_compile.lowering.emit.loops import Compare, Either, KeyFlag

if TYPE_CHECKING:
    from flasheva_compile.lowering.emit.loops import Mask
    from flasheva_compile.lowering.emit.scores import KeySource
    from flasheva_compile.lowering.spec import KernelSpec, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """Tiles that a consumer goes through, from ``last`` down to ``first``.

    Attributes:
        purpose: Comment above the loop.
        source: ``"chunk"`` or ``"key"``.
        first: Number of the first tile.
        last: Number after the last.
        origin: Where tile 0 begins.
        mask: What may attend; () = everything.
    """

    purpose: str
    source: KeySource
    first: str
    last: str
    origin: str
    mask: Mask = ()

    def header(self, counter: str = "tile") -> str:
        """Return the loop; a counter that nobody reads is ``_``."""
        last = f"{self.last} - 1".replace("- 1 - 1", "- 2")
        first = "-1" if self.first == "0" else f"{self.first} - 1"
        return f"for {counter} in range({last}, {first}, -1):"

    @property
    def offset(self) -> str:
        """Where a tile begins."""
        tiles = "tile * BLOCK_N"
        return tiles if self.origin == "0" else f"{self.origin} + {tiles}"


LO, HI = Compare("offs_n", ">=", "lo"), Compare("offs_n", "<", "hi")
_SINKS = (Compare("offs_n", "<", "sink_stop"),)
_SINKS_OUTSIDE = (
    KeyFlag("offs_n < sink_stop"),
    Either(Compare("offs_n", "<", "lo"), Compare("offs_n", ">=", "hi")),
)


def consumer_walks(spec: KernelSpec, schedule: Schedule) -> list[Walk]:
    """Return what a consumer walks over; where products overlap, after the first tile."""
    behind_first = "own_tiles - 1" if schedule.overlap else "own_tiles"
    walks = [
        Walk(
            purpose="The window's right edge.",
            source="key",
            first="right",
            last=behind_first,
            origin="lo_first",
            mask=(LO, HI),
        ),
        Walk(
            purpose="Keys that all own queries have in their window.",
            source="key",
            first="left",
            last="right",
            origin="lo_first",
        ),
        Walk(
            purpose="The window's left edge.",
            source="key",
            first="0",
            last="left",
            origin="lo_first",
            mask=(LO,),
        ),
    ]
    if spec.sink_size:
        walks.append(
            Walk(
                purpose="Sinks in front of the window." if spec.causal else "Sinks outside it.",
                source="key",
                first="0",
                last="sink_tiles",
                origin="0",
                mask=_SINKS if spec.causal else _SINKS_OUTSIDE,
            )
        )
    first_chunk = str(spec.sink_size // spec.chunk_size)
    return [
        *walks,
        Walk(
            purpose="Chunk tokens that only some own queries see.",
            source="chunk",
            first="whole",
            last="chunk_tiles",
            origin=first_chunk,
            mask=(Compare("offs_n", "<", "chunk_stop"),),
        ),
        Walk(
            purpose="Chunk tokens that all of them see.",
            source="chunk",
            first="0",
            last="whole",
            origin=first_chunk,
        ),
        *([] if spec.causal else _walks_behind()),
    ]


def _walks_behind() -> list[Walk]:
    """Return the walks over the chunk tokens behind the window, whose tiles end where they do."""
    return [
        Walk(
            purpose="Chunk tokens behind the window that all of them see.",
            source="chunk",
            first="all_behind",
            last="tiles_behind",
            origin="behind",
        ),
        Walk(
            purpose="Chunk tokens behind it that only some own queries see.",
            source="chunk",
            first="0",
            last="all_behind",
            origin="behind",
            mask=(Compare("offs_n", ">=", "chunk_start"),),
        ),
    ]


def producer_walks(spec: KernelSpec) -> list[Walk]:
    """Return the same tiles as the producer sees them: whatever a consumer makes of them."""
    keys = Walk(purpose="The window.", source="key", first="0", last="tiles", origin="lo_first")
    sinks = Walk(purpose="Sinks.", source="key", first="0", last="sink_tiles", origin="0")
    chunks = Walk(
        purpose="Chunk tokens.",
        source="chunk",
        first="0",
        last="chunk_tiles",
        origin=str(spec.sink_size // spec.chunk_size),
    )
    behind = Walk(
        purpose="Those behind.", source="chunk", first="0", last="tiles_behind", origin="behind"
    )
    found = [keys, *([sinks] if spec.sink_size else []), chunks]
    return found if spec.causal else [*found, behind]


# --- bounds ---------------------------------------------------------------------------------------


def emit_window(spec: KernelSpec) -> str:
    """Return what finds a window's first key, and where rows have two sides, the key behind it."""
    w, c = spec.window_size, spec.chunk_size
    if not spec.causal:
        found = "\n    ".join(positions.window(spec, "i", "lo", "hi")).replace("tl.", "gl.")
        return f'''\
@gluon.jit
def window(i, keys):
    """Return the first key in the window of a query, or of several, and the key behind it."""
    {found}
    return lo, hi
'''
    position = "gl.maximum(i, 0)" if spec.documents == "padded" else "i"
    lo = f"{position} // {w} * {w}"
    if spec.window == "sliding":
        lo = f"gl.maximum(i - {w - 1}, 0) // {c} * {c}"
    return f'''\
@gluon.jit
def window_start(i):
    """Return the first key in the window of a query, or of several."""
    return {lo}
'''


def row_lines(spec: KernelSpec, *, keys: bool = True) -> list[str]:
    """Define how many ``keys`` a row has; of a padded one, where it and its chunk tokens begin."""
    if spec.documents == "padded":
        lines = [x for x in positions.row_origin(spec) if keys or not x.startswith("keys")]
        # These slots are not those of shared memory.
        return [x.replace("tl.", "gl.").replace("slots", "row_chunks") for x in lines]
    return [] if spec.causal else ["keys = columns"]


def _windows(spec: KernelSpec, pairs: tuple[tuple[str, str, str], ...]) -> list[str]:
    """Define the windows of queries: their first keys, and on two sides those behind them."""
    if spec.causal:
        return [f"{lo} = window_start({query})" for query, lo, _ in pairs]
    return [f"{lo}, {hi} = window({query}, keys)" for query, lo, hi in pairs]


def _chunks(spec: KernelSpec) -> str:
    return "row_chunks" if spec.documents == "padded" else "chunks"


def _tiles(spec: KernelSpec, count: str) -> str:
    """Return how many tiles hold so many keys, at least one: a padded row may have none."""
    if spec.documents == "padded":
        count = f"gl.maximum({count}, 1)"
    return f"gl.cdiv({count}, BLOCK_N)"


def walk_bounds(spec: KernelSpec) -> list[str]:
    """Define the tiles of a block: what its first and last query see, and all between."""
    c, sinks = spec.chunk_size, spec.sink_size
    seen = f"gl.minimum(lo_last // {c}, {_chunks(spec)})"
    first = sinks // c
    origin = " - start" if spec.documents == "padded" else ""
    behind = "last + 1" if spec.causal else "hi_last"
    lines = [
        f"first = row + q_offset{origin}",
        f"last = gl.minimum(row + BLOCK_M, queries) - 1 + q_offset{origin}",
        *_windows(spec, (("first", "lo_first", "hi_first"), ("last", "lo_last", "hi_last"))),
        f"tiles = {_tiles(spec, f'{behind} - lo_first')}",
        f"chunk_tiles = gl.cdiv({f'gl.maximum({seen} - {first}, 0)' if first else seen}, BLOCK_N)",
    ]
    if sinks:
        most = "lo_last" if spec.causal else "keys"
        lines.append(f"sink_tiles = gl.cdiv(gl.minimum({most}, {sinks}), BLOCK_N)")
    if not spec.causal:
        start = _chunk_start(spec, "hi_first")
        lines += [
            f"tiles_behind = gl.cdiv(gl.maximum({_chunks(spec)} - {start}, 0), BLOCK_N)",
            f"behind = {_chunks(spec)} - tiles_behind * BLOCK_N",
        ]
    return lines


def _chunk_start(spec: KernelSpec, hi: str) -> str:
    """Return the first chunk token behind a window."""
    after, sinks = f"gl.cdiv({hi}, {spec.chunk_size})", spec.sink_size // spec.chunk_size
    return f"gl.maximum({after}, {sinks})" if sinks else after


def own_bounds(spec: KernelSpec, schedule: Schedule) -> list[str]:
    """Define what a consumer's own queries see of the block's tiles, and wait for them."""
    c, sinks = spec.chunk_size, spec.sink_size
    first, last = (
        ("own_first + 1", "own_last + 1") if spec.causal else ("own_hi_first", "own_hi_last")
    )
    seen = f"gl.minimum(own_lo_first // {c}, {_chunks(spec)})"
    seen = f"gl.maximum({seen} - {sinks // c}, 0)" if sinks else seen
    right = f"({first} - lo_first) // BLOCK_N"
    if spec.documents == "padded":  # queries may stand in front of all keys
        right = f"gl.maximum({first} - lo_first, 0) // BLOCK_N"
    own = (
        ("own_first", "own_lo_first", "own_hi_first"),
        ("own_last", "own_lo_last", "own_hi_last"),
    )
    return [
        "# What the own queries see of it.",
        "own_first = gl.minimum(first + c * OWN, last)",
        "own_last = gl.minimum(own_first + OWN - 1, last)",
        *_windows(spec, own),
        f"own_tiles = {_tiles(spec, f'{last} - lo_first')}",
        f"right = {f'gl.minimum({right}, own_tiles - 1)' if schedule.overlap else right}",
        "left = gl.minimum(gl.cdiv(own_lo_last - lo_first, BLOCK_N), right)",
        f"whole = gl.minimum({seen} // BLOCK_N, chunk_tiles)",
        *_own_behind(spec),
        "i = first + c * OWN + own",
        *_windows(spec, (("i", "lo", "hi"),)),
        *(["hi = i + 1"] if spec.causal else []),
        *_sink_stop(spec),
        f"chunk_stop = gl.minimum(lo // {c}, {_chunks(spec)})",
        *([] if spec.causal else [f"chunk_start = {_chunk_start(spec, 'hi')}"]),
        "",
        "slot, phase = query_slot(item)",
        "at = slot * CONSUMERS + c",
        "mbarrier.wait(q_full.index(at), phase)",
        f"q = qs.index(at).reshape([OWN, {spec.head_dim}])",
    ]


def _own_behind(spec: KernelSpec) -> list[str]:
    """Define from which tile on all own queries see the chunk tokens behind their windows."""
    if spec.causal:
        return []
    ahead = f"gl.maximum({_chunk_start(spec, 'own_hi_last')} - behind, 0)"
    return [f"all_behind = gl.minimum(gl.cdiv({ahead}, BLOCK_N), tiles_behind)"]


def _sink_stop(spec: KernelSpec) -> list[str]:
    if not spec.sink_size:
        return []
    return [f"sink_stop = gl.minimum({'lo' if spec.causal else 'keys'}, {spec.sink_size})"]
