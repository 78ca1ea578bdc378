"""Which tiles the warps of a specialised ``forward`` walk over, and in which order.

All go through the same tiles: the window from right to left, so that the first holds every query's
own key, then sinks, then chunk tokens from the latest to the first. The producer knows them by the
block's first and last query; what a consumer makes of one depends on its own queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit.loops import Compare

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
                purpose="Sinks in front of the window.",
                source="key",
                first="0",
                last="sink_tiles",
                origin="0",
                mask=(Compare("offs_n", "<", "sink_stop"),),
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
    return [keys, *([sinks] if spec.sink_size else []), chunks]


# --- bounds ---------------------------------------------------------------------------------------


def emit_window_start(spec: KernelSpec) -> str:
    """Return what finds a window's first key."""
    w, c = spec.window_size, spec.chunk_size
    lo = f"{{0}} // {w} * {w}"
    if spec.window == "sliding":
        lo = f"gl.maximum({{0}} - {w - 1}, 0) // {c} * {c}"
    return f'''\
@gluon.jit
def window_start(i):
    """Return the first key in the window of a query, or of several."""
    return {lo.format("i")}
'''


def walk_bounds(spec: KernelSpec) -> list[str]:
    """Define the tiles of a block: what its first and last query see, and all between."""
    c, sinks = spec.chunk_size, spec.sink_size
    seen = f"gl.minimum(lo_last // {c}, chunks)"
    first = sinks // c
    lines = [
        "first = row + q_offset",
        "last = gl.minimum(row + BLOCK_M, queries) - 1 + q_offset",
        "lo_first = window_start(first)",
        "lo_last = window_start(last)",
        "tiles = gl.cdiv(last + 1 - lo_first, BLOCK_N)",
        f"chunk_tiles = gl.cdiv({f'gl.maximum({seen} - {first}, 0)' if first else seen}, BLOCK_N)",
    ]
    if sinks:
        lines.append(f"sink_tiles = gl.cdiv(gl.minimum(lo_last, {sinks}), BLOCK_N)")
    return lines


def own_bounds(spec: KernelSpec, schedule: Schedule) -> list[str]:
    """Define what a consumer's own queries see of the block's tiles, and wait for them."""
    c, sinks = spec.chunk_size, spec.sink_size
    seen = f"gl.minimum(own_lo_first // {c}, chunks)"
    seen = f"gl.maximum({seen} - {sinks // c}, 0)" if sinks else seen
    right = "(own_first + 1 - lo_first) // BLOCK_N"
    return [
        "# What the own queries see of it.",
        "own_first = gl.minimum(first + c * OWN, last)",
        "own_last = gl.minimum(own_first + OWN - 1, last)",
        "own_lo_first = window_start(own_first)",
        "own_lo_last = window_start(own_last)",
        "own_tiles = gl.cdiv(own_last + 1 - lo_first, BLOCK_N)",
        f"right = {f'gl.minimum({right}, own_tiles - 1)' if schedule.overlap else right}",
        "left = gl.minimum(gl.cdiv(own_lo_last - lo_first, BLOCK_N), right)",
        f"whole = gl.minimum({seen} // BLOCK_N, chunk_tiles)",
        "i = first + c * OWN + own",
        "lo = window_start(i)",
        "hi = i + 1",
        *([f"sink_stop = gl.minimum(lo, {sinks})"] if sinks else []),
        f"chunk_stop = gl.minimum(lo // {c}, chunks)",
        "",
        "slot, phase = query_slot(item)",
        "at = slot * CONSUMERS + c",
        "mbarrier.wait(q_full.index(at), phase)",
        f"q = qs.index(at).reshape([OWN, {spec.head_dim}])",
    ]
