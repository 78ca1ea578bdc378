"""How kernels leave out selected chunk tokens: one bit per chunk token and group of queries.

``select`` or ``selection_bits`` write the bits, word by word, groups side by side: ``[B, Hkv,
words, groups]``. Words of chunk tokens that no query of a group sees are not written: who reads
them hides these chunk tokens anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flasheva_compile.lowering.emit.source import Source
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


def words_seen(spec: KernelSpec) -> list[str]:
    """Define ``words_seen``, the words that the queries of a block see, up to ``lo_last``."""
    first = spec.sink_size // spec.chunk_size
    seen = f"tl.minimum(lo_last // {spec.chunk_size}, slots){f' - {first}' if first else ''}"
    return [
        "# Bits for the chunk tokens that some query of these groups sees.",
        f"seen = {seen}",
        f"words_seen = tl.cdiv(tl.maximum(seen, 0), {WORD})",
    ]


def store_bits(out: Source, *after: str) -> None:
    """Write the words of the groups ``rows``, whose selected chunks have the numbers ``bit``.

    ``after`` are lines that do something else with each word, ``taken``.
    """
    with out.block("for word in range(0, words_seen):"):
        out.lines(
            f"here = (bit >= 0) & (bit // {WORD} == word)",
            f"taken = tl.sum(tl.where(here, 1 << (bit % {WORD}), 0), 1)",
            "at_word = bits_ptr + (bh64 * words + word) * groups",
            "tl.store(at_word + rows, taken, mask=is_group)",
            *after,
        )


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
    words = max(1, block_n // WORD)
    place = f"offs_t + {bit} % {WORD}" if block_n < WORD else f"offs_t % {WORD}"
    lines = [
        f"tile_bits = bits_rows + {bit} // {WORD} * tl.cast(groups, tl.int64)",
        *_words("tl", words, "groups", ", mask=rows < queries, other=0", ("offs_t", WORD)),
        f"place = {WORD - 1} - ({place})",
    ]
    return lines, "((bits << place[None, :]) >= 0)"


def _words(language: str, count: int, apart: str, rest: str, steps: tuple[str, int]) -> list[str]:
    """Load the words of a tile, and define ``bits``: for each column that of its chunk.

    Args:
        language: ``"tl"`` or ``"gl"``.
        count: Words of a tile.
        apart: From one to the next, from ``tile_bits`` on.
        rest: Of the address of a load, and its mask.
        steps: What counts columns, and how many share a word.
    """
    lines = []
    for n in range(count):
        at = f"tile_bits + {n} * {apart}" if n else "tile_bits"
        lines.append(f"bits{n} = {language}.load({at}{rest})[:, None]")
    (offsets, each), bits = steps, "bits0"
    for n in range(1, count):
        bits = f"{language}.where(({offsets} < {n * each})[None, :], {bits}, bits{n})"
    return [*lines, f"bits = {bits}"]


def unselected_by_specialists(spec: KernelSpec, block_n: int) -> tuple[list[str], str]:
    """Return what :func:`unselected` does, in Gluon, of the ``tile``-th tile of chunk tokens."""
    words = max(1, block_n // WORD)
    first = times("tile", words) if block_n >= WORD else f"tile // {WORD // block_n}"
    place = (
        f"offs_t + tile % {WORD // block_n} * {block_n}" if block_n < WORD else f"offs_t % {WORD}"
    )
    lines = [
        f"tile_bits = bits_rows + gl.cast(groups, gl.int64) * ({first})",
        *_words("gl", words, "groups", ", mask=is_own, other=0", ("offs_t", WORD)),
        f"place = 1 << ({place})",
    ]
    return lines, "((bits & place[None, :]) == 0)"


def own_bits(spec: KernelSpec) -> list[str]:
    """Define, in Gluon, where the bits of a consumer's own queries are."""
    size, group = spec.selection_group, spec.group
    key_row = f"b * (heads // {group}) + bh % heads // {group}" if group > 1 else "bh"
    index = f"own_query // {size}" if size > 1 else "own_query"
    return [
        group_count(spec).replace("tl.", "gl."),
        "own_query = row + c * OWN + own",
        "is_own = own_query < queries",
        f"key_row = {key_row}",
        f"bits_rows = bits_ptr + gl.cast(key_row, gl.int64) * words * groups + {index}",
    ]


def unselected_rows(spec: KernelSpec, block_m: int) -> tuple[list[str], str]:
    """Return, where chunk tokens are a tile's rows, what :func:`unselected` does."""
    size = spec.selection_group
    index = f"row // {size * WORD}"
    count = max(1, block_m // size // WORD)
    group = f"rows // {size}" if size > 1 else "rows"
    lines = [
        f"tile_bits = turned_ptr + ((bhk64 * group_words + {index}) * words * {WORD} + slot)",
        *_words("tl", count, f"words * {WORD}", " + offs_t", ("offs_m", WORD * size)),
        f"place = {WORD - 1} - ({group} & {WORD - 1})",
    ]
    return lines, "((bits << place[None, :]) >= 0)"
