"""One step of generation: ``decode`` attends to a part of the cache, ``decode_combine`` adds up.

A program of ``decode`` holds all query heads of one key head, so that the cache is read once, and
walks over one of ``splits`` equal parts of the tiles that the token sees: chunk tokens, then exact
slots. Where things are follows from the token's position, which only the device knows: the grid
never changes. Nothing asks the host, nothing is atomic.

A ``whole`` window is every token so far: positions are slots, and there are no chunk tokens.
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
from flasheva_compile.lowering.emit.decode_append import append
from flasheva_compile.lowering.emit.source import Dim, Source

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec, Schedule

LOWEST = "-3.4028234663852886e38"


def ring_slots(spec: KernelSpec) -> int:
    """Return the slots behind the sinks, as ``kernels/blocked/cache_state.py`` defines them."""
    return spec.window_size + (spec.chunk_size if spec.window == "sliding" else 0)


def exact_pointers(spec: KernelSpec) -> list[str]:
    """Move the pointers of the exact slots to row ``b`` and key head ``hk``."""
    slots = spec.sink_size + ring_slots(spec)
    whole = spec.window == "whole"
    k, v = (
        f"room * {size}" if whole else str(slots * size) for size in (spec.head_dim, spec.value_dim)
    )
    return [
        f"exact_k_ptr += bh64 * {k}",
        f"exact_v_ptr += bh64 * {v}",
        f"exact_mask_ptr += b64 * {'room' if whole else slots}",
    ]


# --- decode ---------------------------------------------------------------------------------------


def emit_decode(spec: KernelSpec, schedule: Schedule) -> str:
    """Return the body of ``decode``."""
    out = Source()
    d, e = Dim("d", spec.head_dim, split=False), Dim("e", spec.value_dim, split=False)
    out.line("# The first part also appends the token: start it first.")
    out.lines(*program(), *place(spec), *_ranges(spec), *_rows(spec))
    out.lines(*d.offsets(), *e.offsets(), "offs_t = tl.arange(0, BLOCK_N)", "")
    out.lines(*_own_token(spec, d, e))
    if spec.window == "whole":
        out.lines(*e.zeros("acc", "BLOCK_G"))
    else:
        out.lines("", "# Chunk tokens behind the window", *_chunk_bounds(spec))
        out.lines(*before_chunks(spec, d, e, "BLOCK_G"))
        with out.block("for offset in range(begin, stop, BLOCK_N):"):
            out.lines(*chunk_tile(spec, schedule, d, e))
        out.lines(*after_chunks(spec, e))
    out.lines(*_own_value(e))
    out.lines("", "# Sinks and window", *_exact_bounds())
    with out.block(f"for offset in {exact_range(schedule)}:"):
        out.lines(*_exact_tile(spec, d, e))
    lost = "position >= room" if spec.window == "whole" else f"low // {spec.chunk_size} > chunks"
    out.lines("", *store_part(spec, e, lost), "")
    append(out, spec, d, e, ring=ring_slots(spec))
    return out.text()


def program() -> list[str]:
    """Define this program's part, ``split``, its row ``b`` and its key head ``hk``."""
    return [
        "pid = tl.program_id(0)",
        "rows = tl.num_programs(0) // splits",
        "split = pid // rows",
        "bh = pid % rows",
        "b = bh // heads",
        "hk = bh % heads",
        "b64 = b.to(tl.int64)",
        "bh64 = bh.to(tl.int64)",
    ]


def place(spec: KernelSpec) -> list[str]:
    """Define ``position`` of the new token, -1 in padding before the row's first valid token."""
    lines = ["length = tl.load(length_ptr)", "start = tl.load(row_start_ptr + b)"]
    if not spec.key_mask:
        return [*lines, "position = (length - start).to(tl.int32)"]
    return [
        *lines,
        "is_valid = tl.load(key_mask_ptr + b64 * stride_mask)",
        "# A row that waits for its first valid token keeps start == length: one program moves its",
        "# start along, others may read it before or after. Both give -1.",
        "waits = (start == length) & (is_valid == 0)",
        "position = tl.where(waits, -1, length - start).to(tl.int32)",
    ]


def _ranges(spec: KernelSpec) -> list[str]:
    """Define what the token sees of the cache, in tiles, and this program's part of them."""
    part = ["tile_begin = split * tiles // splits", "tile_end = (split + 1) * tiles // splits"]
    if spec.window == "whole":
        return [
            "chunk_tiles = 0",
            "exact_stop = tl.minimum(tl.maximum(position, 0), room)",
            "tiles = tl.cdiv(exact_stop, BLOCK_N)",
            *part,
        ]
    c, sinks, ring = spec.chunk_size, spec.sink_size, ring_slots(spec)
    slot = f"{sinks} + (last - {sinks}) % {ring}" if sinks else f"last % {ring}"
    minus = f" - {sinks // c}" if sinks else ""
    return [
        *positions.window(spec, "position", "low", "high"),
        f"chunk_stop = tl.minimum(low // {c}, chunks)",
        f"chunk_tiles = tl.cdiv(tl.maximum(chunk_stop{minus}, 0), BLOCK_N)",
        "# Slots fill up in order; a full ring goes round, so that they hold the newest positions.",
        f"exact_stop = tl.minimum(tl.maximum(position, 0), {sinks + ring})",
        "last = position - 1",
        f"last_slot = tl.where(last < {max(sinks, 1)}, last, {slot})",
        f"oldest = tl.maximum(low, {sinks})" if sinks else "oldest = low",
        "tiles = chunk_tiles + tl.cdiv(exact_stop, BLOCK_N)",
        *part,
    ]


def _rows(spec: KernelSpec) -> list[str]:
    """Move the pointers of the cache and of the token to row ``b`` and head ``hk``."""
    token = (
        f"{name}_ptr += b64 * stride_{name}b + hk * tl.cast(stride_{name}h, tl.int64)"
        for name in "kv"
    )
    if spec.window == "whole":
        return [*exact_pointers(spec), *token]
    return [
        *exact_pointers(spec),
        *chunk_pointers(spec),
        *token,
    ]


def _own_token(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    """Load the queries; start the softmax, in the first part with the token's own key."""
    is_own = "(split == 0) & (position >= 0)" + (" & is_valid" if spec.key_mask else "")
    products = " + ".join(
        f"tl.sum(q{n}.to(tl.float32) * new_k{n}.to(tl.float32), 1)" for n in d.indices
    )
    capped = ["own = (1.0 - 2.0 / (tl.exp2(own) + 1.0)) * softcap"] if spec.softcap else []
    stride = "tl.cast(stride_qh, tl.int64)"
    return [
        "offs_g = tl.arange(0, BLOCK_G)",
        f"q_rows = q_ptr + b64 * stride_qb + hk * {stride} * {spec.group}",
        *d.load("q", "q_rows", "offs_g", stride, group_bound(spec)),
        *scores.cached_slopes(
            spec,
            f"hk * {spec.group} + offs_g",
            group_bound(spec),
            "tl.zeros([BLOCK_G], tl.float32) + position",
        ),
        *d.load_row("new_k", "k_ptr"),
        *e.load_row("new_v", "v_ptr"),
        f"is_own = {is_own}",
        f"own = ({products}) * score_scale",
        *capped,
        "# The lowest finite maximum: a part that sees nothing makes no NaN.",
        f"m_i = tl.where(is_own, own, {LOWEST})",
        "l_i = tl.where(is_own, 1.0, 0.0) + tl.zeros([BLOCK_G], tl.float32)",
    ]


def _own_value(e: Dim) -> list[str]:
    """Add the token's own value to the sums of the first part."""
    weight = "own_weight = tl.where(is_own, tl.exp2(own - m_i), 0.0)"
    own = "tl.where(is_own, new_v{n}.to(tl.float32), 0.0) * own_weight[:, None]"
    return [weight, *(f"acc{n} += {own.format(n=n)}" for n in e.indices)]


def group_bound(spec: KernelSpec) -> str | None:
    """Return which rows of a tile are query heads; None = all."""
    return f"offs_g < {spec.group}" if spec.group & (spec.group - 1) or spec.group < 16 else None


def _chunk_bounds(spec: KernelSpec) -> list[str]:
    """Define this program's range of chunk tokens."""
    first = spec.sink_size // spec.chunk_size
    origin = f"{first} + " if first else ""
    return [
        f"begin = {origin}tl.minimum(tile_begin, chunk_tiles) * BLOCK_N",
        f"stop = tl.minimum({origin}tl.minimum(tile_end, chunk_tiles) * BLOCK_N, chunk_stop)",
    ]


def exact_range(schedule: Schedule) -> str:
    """Return the loop over tiles of exact slots, which are few.

    Beside tiles of fp8 theirs are large, and no more of them are to wait in shared memory.
    """
    if schedule.e4m3 and schedule.num_stages > _EXACT_STAGES:
        return f"tl.range(begin, stop, BLOCK_N, num_stages={_EXACT_STAGES})"
    return "range(begin, stop, BLOCK_N)"


_EXACT_STAGES = 2


def _exact_bounds() -> list[str]:
    """Define this program's range of exact slots."""
    return [
        "begin = tl.maximum(tile_begin - chunk_tiles, 0) * BLOCK_N",
        "stop = tl.minimum(tl.maximum(tile_end - chunk_tiles, 0) * BLOCK_N, exact_stop)",
    ]


def _exact_tile(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    held = f"offs_n + (last - last_slot) - tl.where(offs_n > last_slot, {ring_slots(spec)}, 0)"
    in_window = "held >= oldest"
    if spec.sink_size:
        in_window = f"((offs_n < {spec.sink_size}) | ({in_window}))"
    else:
        in_window = f"({in_window})"
    places = [f"held = {held}", f"inside = (offs_n < stop) & {in_window}"]
    return [
        "offs_n = offset + offs_t",
        *(["inside = offs_n < stop"] if spec.window == "whole" else places),
        *d.load_tile("k", "exact_k_ptr", "inside"),
        "is_key = tl.load(exact_mask_ptr + offs_n, mask=inside, other=0) != 0",
        *d.contract("s", "q", "k", scores.precision(spec)),
        *scores.cached_position(spec, "key", scores.exact_position(spec)),
        *scores.scores(spec, "key", keys_first=False),
        's = tl.where(is_key[None, :], s, float("-inf"))',
        *scores.softmax_step(e),
        *e.load_tile("v", "exact_v_ptr", "inside"),
        *e.accumulate("acc", "p", "v", scores.precision(spec)),
    ]


def store_part(spec: KernelSpec, e: Dim, lost: str) -> list[str]:
    """Store sums, maxima and masses: ``[splits, B, Hq, Dv]``, then twice ``[splits, B, Hq]``.

    Args:
        spec: What the kernel computes.
        e: The columns of values.
        lost: Condition under which the result is NaN: the cache was too small.
    """
    bound = group_bound(spec)
    guard = f", mask={bound}" if bound else ""
    return [
        "# A cache that was too small must not go unnoticed.",
        f"lost = {lost}",
        *(f'acc{n} = tl.where(lost, float("nan"), acc{n})' for n in e.indices),
        f"part = pid.to(tl.int64) * {spec.group}",
        *e.store("acc", f"partial_ptr + part * {e.size}", "offs_g", str(e.size), bound),
        f"parts = tl.num_programs(0).to(tl.int64) * {spec.group}",
        f"peak_ptr = partial_ptr + parts * {e.size}",
        f"tl.store(peak_ptr + part + offs_g, m_i{guard})",
        f"tl.store(peak_ptr + parts + part + offs_g, l_i{guard})",
    ]


# --- decode_combine -------------------------------------------------------------------------------


def emit_combine(spec: KernelSpec) -> str:
    """Return the body of ``decode_combine``: a query and head, a walk over the parts in order."""
    out, e = Source(), Dim("e", spec.value_dim, split=False)
    tokens = "queries" if spec.kind == "extend_combine" else "1"
    out.lines(
        "pid = tl.program_id(0)",
        "pid64 = pid.to(tl.int64)",
        "heads_out = tl.num_programs(0).to(tl.int64)",
        f"peak_ptr = partial_ptr + heads_out * splits * {e.size}",
        "mass_ptr = peak_ptr + heads_out * splits",
        *e.offsets(),
        "offs_t = tl.arange(0, BLOCK_N)",
        f"m_i = tl.full([1], {LOWEST}, tl.float32)",
        "l_i = tl.zeros([1], tl.float32)",
        *e.zeros("acc", "1"),
    )
    with out.block("for offset in range(0, splits, BLOCK_N):"):
        out.lines(
            "inside = offset + offs_t < splits",
            "at = (offset + offs_t) * heads_out + pid",
            f"m = tl.load(peak_ptr + at, mask=inside, other={LOWEST})",
            "l_part = tl.load(mass_ptr + at, mask=inside, other=0.0)",
            *e.load("part", "partial_ptr", "at", str(e.size), "inside"),
            "m_new = tl.maximum(m_i, tl.max(m, 0))",
            "alpha = tl.exp2(m_i - m_new)",
            "w = tl.exp2(m - m_new)",
            "l_i = l_i * alpha + tl.sum(l_part * w, 0)",
            "m_i = m_new",
            *(
                f"acc{n} = acc{n} * alpha[:, None] + tl.sum(part{n} * w[:, None], 0)[None, :]"
                for n in e.indices
            ),
        )
    out.lines(
        "l_safe = tl.where(l_i == 0.0, 1.0, l_i)",
        *e.scale("acc", "(1.0 / l_safe)[:, None]"),
        *(_within_fp16(e) if spec.dtype == "fp16" else []),
        *e.store_row("acc", f"out_ptr + pid64 * {e.size}"),
        f'lse = tl.where(l_i == 0.0, float("-inf"), (m_i + tl.log2(l_safe)) / {scores.LOG2E})',
        "tl.store(lse_ptr + pid64 + tl.arange(0, 1), lse)",
    )
    with out.block("if pid == 0:"):
        out.line("# No program that attends reads it any more.")
        out.line(f"tl.store(length_ptr, tl.load(length_ptr) + {tokens})")
    return out.text()


def _within_fp16(e: Dim) -> list[str]:
    """Keep results numbers: where values are stored in fp8, rounding takes the largest to 2^16."""
    kept = "tl.minimum(tl.maximum(acc{n}, -65504.0), 65504.0)"
    line = f"acc{{n}} = tl.where(tl.abs(acc{{n}}) < 65540.0, {kept}, acc{{n}})"
    return [line.format(n=n) for n in e.indices]
