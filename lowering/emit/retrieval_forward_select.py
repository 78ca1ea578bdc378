"""First kernel of the retrieval tier: which chunks each group of queries attends exactly.

A program holds the first queries of some groups, all query heads of one key head, and walks over
the chunk tokens that they see. Each row keeps its best chunks so far as integers that order as
(score, lower index first) do; a tile's scores enter one at a time, the largest first, for as long
as some row has one above its least. Most tiles need a few rounds, so no matrix of scores leaves
the program, and what is selected does not depend on tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import positions, scores
from flasheva_compile.lowering.emit.queries import row_pointers
from flasheva_compile.lowering.emit.retrieval_bounds import (
    bounds_product,
    load_bounds,
    magnitudes,
    without_bias,
)
from flasheva_compile.lowering.emit.selection_bits import (
    group_count,
    store_bits,
    times,
    words_seen,
)
from flasheva_compile.lowering.emit.source import Dim, Source

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec

_SIGN = "0x7FFFFFFF"
_EMPTY = -(2**31) + 1  # below every score's upper word, -inf included
_LOWEST = _EMPTY << 32
_NEVER = 2**63 - 1  # in places of the list beyond the number of chunks to select


def emit_select(spec: KernelSpec) -> str:
    """Return the body of ``select``."""
    out, d = Source(), Dim("d", spec.head_dim)
    first = spec.sink_size // spec.chunk_size
    out.lines(*_program(spec), *d.offsets(), *_leaders(spec), *_load_heads(spec, d))
    out.lines("offs_t = tl.arange(0, BLOCK_N)", "", *_nothing_yet(spec))
    with out.block(f"for offset in range({first}, chunk_end, BLOCK_N):"):
        out.lines(*_scores(spec, d))
        out.lines("best = tl.max(s, 1)", "better = best > threshold")
        with out.block("if tl.max(better.to(tl.int32), 0) > 0:"):
            _insert(out)
    out.lines("", *_sorted(spec, first))
    store_bits(out)
    return out.text()


def list_size(chunks: int) -> int:
    """Return the length of a row's list, a power of two, for a number of chunks to select."""
    return max(4, 1 << (chunks - 1).bit_length())


def kv_program(spec: KernelSpec) -> list[str]:
    """Define row ``b`` and key head ``hk`` from ``bh``."""
    return [
        f"kv_heads = heads // {spec.group}",
        "b = bh // kv_heads",
        "hk = bh % kv_heads",
        "b64 = b.to(tl.int64)",
        "bh64 = bh.to(tl.int64)",
        "bhk64 = bh64",
    ]


def _program(spec: KernelSpec) -> list[str]:
    return [
        "# Later queries see more: start them first.",
        group_count(spec),
        "blocks = tl.cdiv(groups, BLOCK_M)",
        "pid = tl.program_id(0)",
        "bh = pid // blocks",
        "block = blocks - 1 - pid % blocks",
        *kv_program(spec),
        *row_pointers(spec, chunks=True),
        f"bounds_ptr += chunk_row * {2 * spec.head_dim}",
    ]


def _leaders(spec: KernelSpec) -> list[str]:
    """Define the query that selects for each group, and the chunk tokens that it sees."""
    origin = " - start" if spec.documents == "padded" else ""
    back = " + start" if spec.documents == "padded" else ""
    size, block = spec.selection_group, spec.retrieve_block
    shares = block > size
    lines = [
        "offs_m = tl.arange(0, BLOCK_M)",
        "rows = block * BLOCK_M + offs_m",
        "is_group = rows < groups",
        f"i = {times('rows', size)} + q_offset{origin}",
    ]
    if shares:
        lines.append(f"i = tl.where(i >= 0, i - i % {block}, i)")
    final = f"tl.minimum({times('(block + 1) * BLOCK_M', size)}, queries) - 1 + q_offset{origin}"
    c = spec.chunk_size
    return [
        *lines,
        *positions.window(spec, "i", "lo", "hi"),
        f"chunk_stop = tl.where(is_group, tl.minimum(lo // {c}, slots), 0)",
        "chunk_end = tl.max(chunk_stop, 0)",
        f"last = {final}",
        *positions.window(spec, "last", "lo_last", "hi_last"),
        f"leader = (i - q_offset{back}).to(tl.int64)",
    ]


def _load_heads(spec: KernelSpec, d: Dim) -> list[str]:
    lines = [f"q_head = q_ptr + b64 * stride_qb + hk * tl.cast(stride_qh, tl.int64) * {spec.group}"]
    for g in range(spec.group):
        pointer = f"q_head + {g} * tl.cast(stride_qh, tl.int64)" if g else "q_head"
        lines += d.load(f"q{g}_", pointer, "leader", "stride_qm", "is_group")
        lines += magnitudes(d, f"q{g}_", f"abs_q{g}_")
        if spec.alibi:
            slope = f"tl.load(slopes_ptr + hk * {spec.group} + {g}).to(tl.float32)"
            lines.append(f"slope{g} = {slope}")
    return [*lines, "query_position = i.to(tl.float32)"]


def _nothing_yet(spec: KernelSpec) -> list[str]:
    size = list_size(spec.retrieve_chunks)
    places = f"tl.where(offs_k < {spec.retrieve_chunks}, {_LOWEST} + offs_k, {_NEVER})"
    return [
        f"offs_k = tl.arange(0, {size}).to(tl.int64)",
        f"kept = {places}[None, :] + tl.zeros([BLOCK_M, 1], tl.int64)",
        f"least = tl.full([BLOCK_M], {_LOWEST}, tl.int64)",
        'threshold = tl.full([BLOCK_M], float("-inf"), tl.float32)',
    ]


def _scores(spec: KernelSpec, d: Dim) -> list[str]:
    """Compute a tile's scores: the maximum over the query heads, ``-inf`` where invisible.

    In natural units, as the formula does: base 2 would round scores apart that are equal.
    """
    dot = scores.precision(spec)
    lines = [
        "offs_n = offset + offs_t",
        *_load_chunks(spec, d),
        *scores.key_position(spec, "chunk", _load("chunk_mean_ptr", "0")),
    ]
    commutes = not (spec.alibi or spec.negative_scale)
    for g in range(spec.group):
        if spec.by_bounds:
            lines += bounds_product(d, "s", (f"q{g}_", f"abs_q{g}_"), dot)
        else:
            lines += d.contract("s", f"q{g}_", "k", dot)
        if not commutes:
            lines += [f"slope = slope{g}"] if spec.alibi else []
            lines += scores.scores(spec, "chunk", keys_first=False)
        lines.append("top = tl.maximum(top, s)" if g else "top = s")
    lines.append("s = top")
    if commutes:
        lines += scores.scores(spec, "chunk", keys_first=False)
    return [*lines, *scores.masked("offs_n[None, :] < chunk_stop[:, None]")]


def _load_chunks(spec: KernelSpec, d: Dim) -> list[str]:
    bound = "offs_n < chunk_end"
    bias = [] if spec.whole_chunks else [f"bias = {_load('rfa_bias_ptr', '-inf')}"]
    if spec.by_bounds:
        return [*load_bounds(d, bound), *bias, without_bias()]
    return [
        f"k_tile = rfa_k_ptr + offset * tl.cast({spec.head_dim}, tl.int64)",
        *d.load("k", "k_tile", "offs_t", str(spec.head_dim), bound),
        *bias,
    ]


def _load(pointer: str, other: str) -> str:
    return f'tl.load({pointer} + offs_n, mask=offs_n < chunk_end, other=float("{other}"))'


def _insert(out: Source) -> None:
    """Put the tile's scores into the rows' lists, the largest first, while any is large enough."""
    with out.block("while tl.max(better.to(tl.int32), 0) > 0:"):
        out.lines(
            "at = tl.min(tl.where(s == best[:, None], offs_t[None, :], BLOCK_N), 1)",
            "# + 0.0: -0.0 equals 0.0.",
            "upper = (best + 0.0).to(tl.int32, bitcast=True)",
            f"upper = (upper ^ ((upper >> 31) & {_SIGN})).to(tl.int64)",
            f"number = (upper << 32) + ({_SIGN} - (offset + at)).to(tl.int64)",
            "replaced = (kept == least[:, None]) & better[:, None]",
            "kept = tl.where(replaced, number[:, None], kept)",
            "least = tl.min(kept, 1)",
            "lowest = (least >> 32).to(tl.int32)",
            f"level = (lowest ^ ((lowest >> 31) & {_SIGN})).to(tl.float32, bitcast=True)",
            f'threshold = tl.where(lowest == {_EMPTY}, float("-inf"), level)',
            's = tl.where(offs_t[None, :] == at[:, None], float("-inf"), s)',
            "best = tl.max(s, 1)",
            "better = best > threshold",
        )


def _sorted(spec: KernelSpec, first: int) -> list[str]:
    """Store the slots in ascending order, then -1; define each one's bit."""
    shift = " + first_slot" if spec.documents == "padded" else ""
    size = list_size(spec.retrieve_chunks)
    minus = f" - {first}" if first else ""
    return [
        f"is_chunk = ((kept >> 32) != {_EMPTY}) & (kept != {_NEVER})",
        f"found = tl.where(is_chunk, {_SIGN} - (kept & 0xFFFFFFFF).to(tl.int32), {_SIGN})",
        "found = tl.sort(found, 1)",
        f"is_found = found != {_SIGN}",
        f"slot = tl.where(is_found, found{shift}, -1)",
        f"places = tl.arange(0, {size})[None, :]",
        "row_places = selected_ptr + (bh64 * groups + rows)[:, None] * picks + places",
        "tl.store(row_places, slot, mask=is_group[:, None] & (places < picks))",
        "",
        f"bit = tl.where(is_found, found{minus}, -1)",
        *words_seen(spec),
    ]
