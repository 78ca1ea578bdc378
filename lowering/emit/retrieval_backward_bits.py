"""First kernel of the retrieval tier's backward pass: one bit per selected chunk token.

The forward pass keeps the selection alone, which is ``32 picks / chunks`` times the size of its
bits. A program writes the words of some groups of queries, those that the groups can see, and the
same bits turned, each word a chunk token's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import positions
from flasheva_compile.lowering.emit.queries import row_pointers
from flasheva_compile.lowering.emit.retrieval_forward_select import kv_program, list_size
from flasheva_compile.lowering.emit.selection_bits import (
    WORD,
    group_count,
    store_bits,
    times,
    words_seen,
)
from flasheva_compile.lowering.emit.source import Source

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec

GROUPS = 128
"""Groups of queries of one program."""


def emit_selection_bits(spec: KernelSpec) -> str:
    """Return the body of ``selection_bits``."""
    out = Source()
    first = spec.sink_size // spec.chunk_size
    padded = spec.documents == "padded"
    final = f"tl.minimum({times(f'(block + 1) * {GROUPS}', spec.selection_group)}, queries) - 1"
    place = f"slot{' - first_slot' if padded else ''}{f' - {first}' if first else ''}"
    out.lines(
        group_count(spec),
        f"blocks = tl.cdiv(groups, {GROUPS})",
        "pid = tl.program_id(0)",
        "bh = pid // blocks",
        "block = pid % blocks",
        *kv_program(spec),
        *row_pointers(spec, chunks=True),
        f"rows = block * {GROUPS} + tl.arange(0, {GROUPS})",
        "is_group = rows < groups",
        f"last = {final} + q_offset{' - start' if padded else ''}",
        *positions.window(spec, "last", "lo_last", "hi_last"),
        f"places = tl.arange(0, {list_size(spec.retrieve_chunks)})[None, :]",
        "row_places = selected_ptr + (bh64 * groups + rows)[:, None] * picks + places",
        "is_place = is_group[:, None] & (places < picks)",
        "slot = tl.load(row_places, mask=is_place, other=-1)",
        f"bit = tl.where(slot >= 0, {place}, -1)",
        *words_seen(spec),
    )
    store_bits(out, *_turned(spec))
    return out.text()


def _turned(spec: KernelSpec) -> list[str]:
    """Store a word of each of 32 chunk slots for every 32 groups."""
    group_words, first = GROUPS // WORD, spec.sink_size // spec.chunk_size
    padding = " + first_slot" if spec.documents == "padded" else ""
    return [
        f"offs_b = tl.arange(0, {WORD})",
        f"spread = tl.reshape(taken, [{group_words}, {WORD}])[:, :, None]",
        "spread = ((spread >> offs_b[None, None, :]) & 1) << offs_b[None, :, None]",
        f"group_word = block * {group_words} + tl.arange(0, {group_words})",
        f"turned = (bh64 * group_words + group_word)[:, None] * words * {WORD}",
        f"column = word * {WORD} + offs_b{f' + {first}' if first else ''}{padding}",
        "tl.store(turned_ptr + turned + column[None, :], tl.sum(spread, 1))",
    ]
