"""How ``forward`` leaves out selected chunks: one bit per chunk token and group of queries.

``select`` writes the bits, word by word, groups side by side: ``[B, Hkv, words, groups]``. They
count from the first chunk behind the sinks, where the loops over chunk tokens begin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec

WORD = 32
"""Chunks in one word."""


def times(name: str, size: int) -> str:
    """Return a product with a constant."""
    return name if size == 1 else f"{name} * {size}"


def group_count(spec: KernelSpec) -> str:
    """Define ``groups``, how many groups of queries share a selection."""
    size = spec.selection_group
    return "groups = queries" if size == 1 else f"groups = tl.cdiv(queries, {size})"


def selection_setup(spec: KernelSpec) -> list[str]:
    """Define, in ``forward``, where each query's bits are."""
    size = spec.selection_group
    index = f"rows // {size}" if size > 1 else "rows"
    return [
        group_count(spec),
        f"bits_rows = bits_ptr + bhk64 * words * groups + {index}",
    ]


def unselected(spec: KernelSpec, block_n: int) -> tuple[list[str], str]:
    """Return the lines that load a tile's bits, and the condition that a chunk is not selected."""
    first = spec.sink_size // spec.chunk_size
    bit = f"(offset - {first})" if first else "offset"
    lines = [f"tile_bits = bits_rows + {bit} // {WORD} * tl.cast(groups, tl.int64)"]
    for n in range(max(1, block_n // WORD)):
        at = f"tile_bits + {n} * groups" if n else "tile_bits"
        lines.append(f"bits{n} = tl.load({at}, mask=rows < queries, other=0)[:, None]")
    bits = "bits0"
    for n in range(1, block_n // WORD):
        bits = f"tl.where((offs_t < {n * WORD})[None, :], {bits}, bits{n})"
    place = f"offs_t + {bit} % {WORD}" if block_n < WORD else f"offs_t % {WORD}"
    lines += [f"bits = {bits}", f"place = {WORD - 1} - ({place})"]
    return lines, "((bits << place[None, :]) >= 0)"
