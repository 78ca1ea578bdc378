"""Selection in one step of generation: ``retrieval_scores``, then ``retrieval_select``.

A program of ``retrieval_scores`` scores a tile of chunk tokens for all query heads of a key head,
and notes the best of every run of 16 chunks. The k best chunks lie in the k best runs, as each of
these has a chunk that is as good as its run: so ``retrieval_select`` sorts peaks of runs, then the
chunks of the best runs. A score in fp32 and its index become one integer that orders as both do,
the lower index first (as in ``kernels/blocked/retrieval_select.py``): all are distinct, so that
sorting networks give the same chunks whatever the tiles. The first program of ``retrieval_scores``
also appends the new token, which no chunk token that is scored depends on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import scores
from flasheva_compile.lowering.emit.decode import (
    group_bound,
    place,
    program,
    ring_slots,
)
from flasheva_compile.lowering.emit.decode_append import append_column
from flasheva_compile.lowering.emit.retrieval_bounds import (
    bounds_product,
    load_bounds,
    magnitudes,
    without_bias,
)
from flasheva_compile.lowering.emit.retrieval_decode import chunk_range, queries, store_rows
from flasheva_compile.lowering.emit.source import Dim, Source

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec, Schedule

_INVISIBLE = "-0x7FFFFFFFFFFFFFFF"
"""Below the integer of every score but some NaN."""
_NO_PEAK = "-0x80000000"
"""Of a run without a visible chunk: below the bits of every score but some NaN."""
_NO_SLOT = "0x7FFFFFFF"
RUN = 16
"""Chunks; no tile is smaller."""


def network_size(spec: KernelSpec) -> int:
    """Return how many chunks the sorting networks keep: a power of two."""
    return max(16, 1 << (spec.retrieve_chunks - 1).bit_length())


# --- retrieval_scores -----------------------------------------------------------------------------


def emit_decode_scores(spec: KernelSpec, schedule: Schedule) -> str:
    """Return the body of ``retrieval_scores``."""
    out = Source()
    d, e = Dim("d", spec.head_dim, split=False), Dim("e", spec.value_dim, split=False)
    out.line("# The first tile also appends the token: start it first.")
    out.lines(*program(), *place(spec), *chunk_range(spec), *_rows(spec))
    out.lines(*d.offsets(), *e.offsets(), "offs_t = tl.arange(0, BLOCK_N)", "")
    out.lines(*queries(spec, d), *_scores(spec, d), "")
    if spec.by_bounds:
        out.lines("# What selects is not what weighs.", *_scores_by_bounds(spec, d), "")
    out.lines(*_selector(spec), *_peaks(schedule.block_n // RUN), "")
    append_column(out, spec, d, e, ring=ring_slots(spec))
    return out.text()


def _rows(spec: KernelSpec) -> list[str]:
    """Move pointers to row ``b`` and head ``hk``."""
    token = (
        f"{name}_ptr += b64 * stride_{name}b + hk * tl.cast(stride_{name}h, tl.int64)"
        for name in "kv"
    )
    return [
        *store_rows(spec),
        "chunk_row = bh64 * chunks",
        f"rfa_k_ptr += chunk_row * {spec.head_dim}",
        f"rfa_v_ptr += chunk_row * {spec.value_dim}",
        "rfa_bias_ptr += chunk_row",
        f"scores_ptr += chunk_row * {spec.group}",
        f"bounds_ptr += chunk_row * {2 * spec.head_dim}",
        "selector_ptr += chunk_row",
        *token,
    ]


def _scores(spec: KernelSpec, d: Dim) -> list[str]:
    """Score a tile of chunk tokens and keep the scores, ``[B, Hq, C]`` in base 2."""
    first, bound = spec.sink_size // spec.chunk_size, group_bound(spec)
    seen = "(offs_n < chunk_stop)" + (f" & (offs_n >= {first})" if first else "")
    is_score = f"({bound})[:, None] & inside[None, :]" if bound else "inside[None, :]"
    address = "scores_ptr + offs_g[:, None] * tl.cast(chunks, tl.int64) + offs_n[None, :]"
    return [
        "offset = split * BLOCK_N",
        "offs_n = offset + offs_t",
        f"inside = {seen}",
        *d.load_tile("token", "rfa_k_ptr", "inside"),
        f'bias = tl.load(rfa_bias_ptr + offs_n, mask=inside, other=float("-inf")) * {scores.LOG2E}',
        *d.contract("s", "q", "token", scores.precision(spec)),
        *scores.scores(spec, "chunk", keys_first=False),
        f"tl.store({address}, s, mask={is_score})",
    ]


def _scores_by_bounds(spec: KernelSpec, d: Dim) -> list[str]:
    """Score the same tile by bounds."""
    return [
        *magnitudes(d, "q", "abs_q"),
        *load_bounds(d, "inside"),
        without_bias(),
        *bounds_product(d, "s", ("q", "abs_q"), scores.precision(spec)),
        *scores.scores(spec, "chunk", keys_first=False),
    ]


def _selector(spec: KernelSpec) -> list[str]:
    """Define ``score``, the largest of the query heads; keep it where no head's is kept."""
    bound = group_bound(spec)
    heads = f'tl.where(({bound})[:, None], s, float("-inf"))' if bound else "s"
    kept = ["tl.store(selector_ptr + offs_n, score, mask=inside)"] * spec.by_bounds
    return [f"score = tl.max({heads}, 0)", *kept]


def _peaks(runs: int) -> list[str]:
    """Store the best score of each run of the tile, as integers that order as scores do."""
    return [
        *_ordered(),
        f"ordered = tl.reshape(tl.where(inside, ordered, {_NO_PEAK}), [{runs}, {RUN}])",
        f"peaks = peaks_ptr + (bh64 * splits + split) * {runs}",
        f"tl.store(peaks + tl.arange(0, {runs}), tl.max(ordered, 1))",
    ]


def _ordered() -> list[str]:
    """Turn fp32 scores into int32 of the same order."""
    return [
        "bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 equals 0.0",
        "ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)",
    ]


# --- retrieval_select -----------------------------------------------------------------------------


def emit_decode_select(spec: KernelSpec, schedule: Schedule) -> str:
    """Return the body of ``retrieval_select``: one program for each row and key head."""
    out, count = Source(), network_size(spec)
    tile = max(schedule.block_n, count)
    out.lines(
        "row = tl.program_id(0).to(tl.int64)",
        "b = row // heads",
        "position = (tl.load(length_ptr) - tl.load(row_start_ptr + b)).to(tl.int32)",
        *chunk_range(spec),
        f"scores_ptr += row * chunks * {spec.group}",
        "selector_ptr += row * chunks",
        "peaks_ptr += row * runs",
        f"offs_t = tl.arange(0, {tile})",
        f"best = tl.full([{count}], {_INVISIBLE}, tl.int64)",
    )
    with out.block(f"for offset in range(0, runs, {tile}):"):
        out.lines(
            "offs_n = offset + offs_t",
            f"peak = tl.load(peaks_ptr + offs_n, mask=offs_n < runs, other={_NO_PEAK})",
            "number = (peak.to(tl.int64) << 32) + (runs - 1 - offs_n)",
            f"number = tl.where(peak == {_NO_PEAK}, {_INVISIBLE}, number)",
            f"both = tl.join(best, tl.topk(number, {count}))",
            f"best = tl.topk(tl.reshape(both, [{2 * count}]), {count})",
        )
    out.lines(*_chunks_of_runs(spec, count), *_selection(spec, count))
    return out.text()


def _chunks_of_runs(spec: KernelSpec, count: int) -> list[str]:
    """Find the best chunks of the best runs."""
    first = spec.sink_size // spec.chunk_size
    seen = "(offs_n < chunk_stop)" + (f" & (offs_n >= {first})" if first else "")
    address = "scores_ptr + head * tl.cast(chunks, tl.int64) + offs_n"
    best_head = [
        f'score = tl.full([{count}, {RUN}], float("-inf"), tl.float32)',
        f"for head in range({spec.group}):",
        f'    score = tl.maximum(score, tl.load({address}, mask=inside, other=float("-inf")))',
    ]
    if spec.by_bounds:
        best_head = ['score = tl.load(selector_ptr + offs_n, mask=inside, other=float("-inf"))']
    return [
        "run = runs - 1 - (best & 0xFFFFFFFF).to(tl.int32)",
        f"offs_n = run[:, None] * {RUN} + tl.arange(0, {RUN})[None, :]",
        f"inside = (best != {_INVISIBLE})[:, None] & {seen}",
        *best_head,
        *_ordered(),
        "number = (ordered.to(tl.int64) << 32) + (chunks - 1 - offs_n)",
        f"number = tl.where(inside, number, {_INVISIBLE})",
        f"best = tl.topk(tl.reshape(number, [{count * RUN}]), {count})",
    ]


def _selection(spec: KernelSpec, count: int) -> list[str]:
    """Store slots in ascending order; take the selected chunks out of the scores."""
    is_score = "is_found[None, :]"
    bound = group_bound(spec)
    is_score += f" & ({bound})[:, None]" if bound else ""
    return [
        f"rank = tl.arange(0, {count})",
        f"is_wanted = rank < {spec.retrieve_chunks}",
        f"is_found = is_wanted & (best != {_INVISIBLE})",
        "slot = chunks - 1 - (best & 0xFFFFFFFF).to(tl.int32)",
        "offs_g = tl.arange(0, BLOCK_G)",
        "taken = scores_ptr + offs_g[:, None] * tl.cast(chunks, tl.int64) + slot[None, :]",
        f'tl.store(taken, float("-inf"), mask={is_score})',
        f"slots = tl.sort(tl.where(is_found, slot, {_NO_SLOT}))",
        f"slots = tl.where(slots == {_NO_SLOT}, -1, slots)",
        f"tl.store(selected_ptr + row * {spec.retrieve_chunks} + rank, slots, mask=is_wanted)",
    ]
