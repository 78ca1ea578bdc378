"""One step over a cache of codes: ``vecinfer_decode`` attends to a part of it.

The first parts take exact tokens: sinks, then the ring of the last ones. All others take tokens
before those, from their codes. A program holds up to sixteen queries of one key head. The new
tokens are there already; what a query sees follows from lengths that only the device knows, so that
the grid never changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import scores, vecinfer_fp8
from flasheva_compile.lowering.emit import vecinfer_fp8_tiles as fp8_tiles
from flasheva_compile.lowering.emit import vecinfer_words as words
from flasheva_compile.lowering.emit.decode import LOWEST
from flasheva_compile.lowering.emit.source import Dim, Source
from flasheva_compile.lowering.emit.vecinfer_codes import (
    key_setup,
    key_tile,
    value_setup,
    value_tile,
)
from flasheva_compile.lowering.spec_vecinfer import EXACT_PART

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import Schedule
    from flasheva_compile.lowering.spec_vecinfer import VecInferSpec

_EXACT_TILE = {"bf16": 32, "fp16": 32, "fp32": 16}


def emit_vecinfer_decode(spec: VecInferSpec, schedule: Schedule) -> str:
    """Return the body of ``vecinfer_decode``."""
    out = Source()
    out.lines(*_program(spec), *seen(spec), *_rows(spec), "")
    out.lines(
        "# The lowest finite maximum: a part with no key makes no NaN.",
        f"m_i = tl.full([BLOCK_M], {LOWEST}, tl.float32)",
        "l_i = tl.zeros([BLOCK_M], tl.float32)",
    )
    with out.block(f"if part < {spec.exact_parts}:"):
        _exact(out, spec)
    with out.block("else:"):
        _coded(out, spec, schedule)
    return out.text()


# --- who sees what --------------------------------------------------------------------------------


def _program(spec: VecInferSpec) -> list[str]:
    """Define this program's part, row ``b``, key head ``hk`` and queries."""
    blocks = spec.row_blocks
    row = f"bh = row // {blocks}" if blocks > 1 else "bh = row"
    first = f"row % {blocks} * BLOCK_M + " if blocks > 1 else ""
    return [
        "pid = tl.program_id(0)",
        "rows = tl.num_programs(0) // splits",
        "part = pid // rows",
        "row = pid % rows",
        row,
        "b = bh // heads",
        "hk = bh % heads",
        "b64 = b.to(tl.int64)",
        "bh64 = bh.to(tl.int64)",
        f"offs_g = {first}tl.arange(0, BLOCK_M)",
        f"is_query = offs_g < {spec.queries}",
    ]


def coded_until(spec: VecInferSpec, tokens: str) -> str:
    """Return how many tokens behind the sinks a query that sees ``tokens`` reads from codes."""
    beyond = f"tl.maximum({tokens} - {spec.sink_size + spec.exact_tokens}, 0)"
    return f"{beyond} // {spec.block_tokens} * {spec.block_tokens}"


def seen(spec: VecInferSpec) -> list[str]:
    """Define ``length`` before the call, ``total`` after it, and ``sees`` of several queries."""
    lines, count = ["length = tl.load(length_ptr + b).to(tl.int32)"], spec.new_tokens
    if count == 1:
        new = "tl.load(key_mask_ptr + b64 * stride_mask).to(tl.int32)" if spec.key_mask else "1"
        return [*lines, f"total = length + {new}"]
    if not spec.key_mask:
        return [*lines, f"total = length + {count}", f"sees = length + 1 + offs_g % {count}"]
    return [
        *lines,
        f"offs_l = tl.arange(0, {1 << (count - 1).bit_length()})",
        "flags = key_mask_ptr + b64 * stride_mask + offs_l",
        f"is_new = tl.load(flags, mask=offs_l < {count}, other=0).to(tl.int32)",
        "total = length + tl.sum(is_new, 0)",
        f"is_before = offs_l[None, :] <= offs_g[:, None] % {count}",
        "sees = length + tl.sum(tl.where(is_before, is_new[None, :], 0), 1)",
    ]


def _rows(spec: VecInferSpec) -> list[str]:
    """Move pointers to row ``b`` and head ``hk``; notice a cache that was too small."""
    exponents = ["exponents_ptr += bh64 * room * 2"] if spec.is_fp8 else []
    return [
        *exponents,
        f"sink_k_ptr += bh64 * {spec.sink_size * spec.head_dim}",
        f"sink_v_ptr += bh64 * {spec.sink_size * spec.value_dim}",
        f"tail_k_ptr += bh64 * {spec.ring * spec.head_dim}",
        f"tail_v_ptr += bh64 * {spec.ring * spec.value_dim}",
        f"key_codes_ptr += bh64 * room * {spec.keys.nbytes}",
        f"value_codes_ptr += bh64 * room * {spec.values.nbytes}",
        f"lost = total > room + {spec.sink_size}",
    ]


# --- exact tokens ---------------------------------------------------------------------------------


def _exact(out: Source, spec: VecInferSpec) -> None:
    d, e = Dim("d", spec.head_dim, split=False), Dim("e", spec.value_dim, split=False)
    out.lines(
        *d.offsets(),
        *e.offsets(),
        f"offs_e = tl.arange(0, {_EXACT_TILE[spec.dtype]})",
        *_query_rows(spec),
        *d.load("q", "q_rows", "q_row", "1", "is_query"),
        *e.zeros("acc", "BLOCK_M"),
        *_exact_range(spec),
    )
    with out.block(f"for offset in range(begin, stop, {_EXACT_TILE[spec.dtype]}):"):
        out.lines(*_exact_tile(spec, d, e))
    out.lines(*_store(spec, "acc0", "offs_e0", e.bound(0)))


def _exact_range(spec: VecInferSpec) -> list[str]:
    """Define the places ``begin`` to ``stop`` of this part, and where they are stored."""
    sinks, near = spec.sink_size, spec.sink_parts
    first = coded_until(spec, "total" if spec.new_tokens == 1 else "length")
    if not sinks:
        return [
            f"begin = {first} + part * {EXACT_PART}",
            f"stop = tl.minimum(begin + {EXACT_PART}, total)",
            "k_rows = tail_k_ptr",
            "v_rows = tail_v_ptr",
        ]
    return [
        f"is_sink = part < {near}",
        f"low = {sinks} + {first} - {near * EXACT_PART}",
        f"begin = tl.where(is_sink, 0, low) + part * {EXACT_PART}",
        f"stop = tl.where(is_sink, tl.minimum(total, {sinks}), total)",
        f"stop = tl.minimum(begin + {EXACT_PART}, stop)",
        "k_rows = tl.where(is_sink, sink_k_ptr, tail_k_ptr)",
        "v_rows = tl.where(is_sink, sink_v_ptr, tail_v_ptr)",
    ]


def _query_rows(spec: VecInferSpec) -> list[str]:
    """Define where the queries lie."""
    count = spec.new_tokens
    head, token = (f"offs_g // {count}", f"offs_g % {count}") if count > 1 else ("offs_g", "")
    rows = f"({head}) * tl.cast(stride_qh, tl.int64)"
    rows += f" + {token} * tl.cast(stride_qm, tl.int64)" if token else ""
    return [
        f"q_rows = q_ptr + b64 * stride_qb + hk * tl.cast(stride_qh, tl.int64) * {spec.group}",
        f"q_row = {rows}",
    ]


def _exact_tile(spec: VecInferSpec, d: Dim, e: Dim) -> list[str]:
    sinks = spec.sink_size
    slot = f"place % {spec.ring}"
    lines = [
        "place = offset + offs_e",
        "inside = place < stop",
        f"slot = tl.where(is_sink, place, {slot})" if sinks else f"slot = {slot}",
    ]
    visible = "inside[None, :]"
    if spec.new_tokens > 1:
        near = "is_sink | " if sinks else ""
        origin = f"{sinks} + " if sinks else ""
        lines += [
            f"coded = {origin}{coded_until(spec, 'sees')}",
            "is_near = place[None, :] >= coded[:, None]",
            "is_past = place[None, :] < sees[:, None]",
        ]
        visible += f" & is_past & ({near}is_near)"
    return [
        *lines,
        *d.load("k", "k_rows", "slot", str(d.size), "inside"),
        *d.contract("s", "q", "k", scores.precision(spec)),
        *scores.scores(spec, "key", keys_first=False),
        f"visible = {visible}",
        's = tl.where(visible, s, float("-inf"))',
        *scores.softmax_step(e, "tail_v_ptr"),
        *e.load("v", "v_rows", "slot", str(e.size), "inside"),
        *e.accumulate("acc", "p", "v", scores.precision(spec)),
    ]


# --- coded tokens ---------------------------------------------------------------------------------


def _coded(out: Source, spec: VecInferSpec, schedule: Schedule) -> None:
    keys, values, warps = spec.keys, spec.values, schedule.num_warps
    ragged = spec.block_tokens % schedule.block_n != 0
    out.lines(
        f"split = part - {spec.exact_parts}",
        f"stop = tl.where(lost, 0, {coded_until(spec, 'total')})",
        "tiles = tl.cdiv(stop, BLOCK_N)",
        f"coded_parts = splits - {spec.exact_parts}",
        "begin = split * tiles // coded_parts * BLOCK_N",
        "end = (split + 1) * tiles // coded_parts * BLOCK_N",
        "offs_t = tl.arange(0, BLOCK_N)",
        f"offs_q = tl.arange(0, {keys.padded})",
        *_coded_queries(spec),
        f"sums = tl.zeros([BLOCK_M, {values.padded}], tl.float32)",
        *_setup(spec, warps),
    )
    if spec.new_tokens > 1:
        out.line(f"row_stop = {coded_until(spec, 'sees')}")
    stop, inside = ("stop", "offset + offs_t < stop") if ragged else (None, None)
    if spec.is_words:
        out.lines(*words.load_keys(keys, "begin", stop))
        out.lines(*words.load_values(values, warps, "begin", stop))
    with out.block("for offset in range(begin, end, BLOCK_N):"):
        out.lines(*_key_tile(spec, inside, stop))
        out.line(f"s = tl.dot(q, k{scores.precision(spec)})")
        if spec.is_words:
            out.line("ahead = offset + BLOCK_N")
            out.lines(*words.load_keys(keys, "ahead", stop))
        out.lines(*_coded_softmax(spec, inside))
        out.lines(*_value_tile(spec, warps, stop))
        if spec.is_words:
            out.lines(*words.load_values(values, warps, "ahead", stop))
        out.line(f"sums = tl.dot(p, v, sums{scores.precision(spec)})")
    out.lines(f"offs_v = tl.arange(0, {values.padded})", *_values_of_sums(spec, warps))
    places = "axis" if spec.is_words else "channel"
    bound = None if values.padded == spec.value_dim else f"{places}[None, :] < {spec.value_dim}"
    out.lines(*_store(spec, "sums", "channel", bound))


def _key_tile(spec: VecInferSpec, inside: str | None, stop: str | None) -> list[str]:
    """Make ``k``; words were loaded while the tile before was multiplied."""
    if spec.is_words:
        return words.key_tile(spec.keys, spec.coded_dtype)
    if not spec.is_fp8:
        return key_tile(spec.keys, inside)
    return [
        *fp8_tiles.load_words(spec.keys, spec.values, stop),
        *vecinfer_fp8.exponents(inside),
        *fp8_tiles.key_tile(spec.keys, spec.coded_dtype),
    ]


def _value_tile(spec: VecInferSpec, warps: int, stop: str | None) -> list[str]:
    """Make ``v``, and order ``p`` alike."""
    if spec.is_words:
        return words.value_tile(spec.values, warps, spec.coded_dtype)
    if spec.is_fp8:
        return fp8_tiles.value_tile(spec.values, warps, spec.coded_dtype)
    return value_tile(spec.values, warps, stop)


def _values_of_sums(spec: VecInferSpec, warps: int) -> list[str]:
    """Make sums of values of sums of tiles, and say which ``channel`` each column is."""
    values = spec.values
    if spec.is_words:
        return [f"axis = {words.value_axis(values, 'offs_v', warps)}", *words.sums(values)]
    if spec.is_fp8:
        column = fp8_tiles.value_channel(values, "offs_v", warps)
        return [*vecinfer_fp8.scaled_sums(), f"channel = {column}"]
    column = values.channel("offs_v", warps)
    return ["sums *= tl.load(book_scale_ptr + 1)", f"channel = {column}"]


def _setup(spec: VecInferSpec, warps: int) -> list[str]:
    """Define where tiles of codes lie."""
    if spec.is_fp8:
        return fp8_tiles.setup(spec.keys, spec.values, warps)
    if spec.is_words:
        return words.setup(spec.keys, spec.values, warps)
    return [*_own_books(spec), *key_setup(spec.keys), *value_setup(spec.values, warps)]


def _coded_queries(spec: VecInferSpec) -> list[str]:
    """Load ``q`` for products with coded keys, and what makes scores of them."""
    if spec.is_fp8:
        return [*_query_rows(spec), *vecinfer_fp8.coded_queries(spec)]
    return [
        f"coded_row = bh64 * {spec.row_blocks * 16} + offs_g",
        f"q = tl.load(coded_q_ptr + coded_row[:, None] * {spec.keys.padded} + offs_q[None, :])",
        "q_scale = tl.load(q_scale_ptr + coded_row)",
        "q_bias = tl.load(q_scale_ptr + rows * 16 + coded_row)",
    ]


def _own_books(spec: VecInferSpec) -> list[str]:
    """Move to the codebooks of the key head, if it has its own: that costs registers."""
    if not spec.per_head:
        return []
    return [f"{x}_book_ptr += hk * tl.cast({x}_stride, tl.int64)" for x in ("key", "value")]


def _coded_softmax(spec: VecInferSpec, inside: str | None) -> list[str]:
    """Go on with the softmax by products ``s``; ``q_scale`` and ``q_bias`` make scores of them."""
    lines: list[str] = []
    bounds = ["(offset + offs_t)[None, :] < stop"] if inside and spec.new_tokens == 1 else []
    if spec.new_tokens > 1:
        bounds = ["(offset + offs_t)[None, :] < row_stop[:, None]"]
    if spec.is_fp8:
        return vecinfer_fp8.softmax(spec, bounds)
    if not bounds and not spec.softcap:
        # Its own form: one multiplication and addition per score.
        lines += [
            "m_new = tl.maximum(m_i, tl.max(s, 1) * q_scale + q_bias)",
            "p = tl.exp2(s * q_scale[:, None] - (m_new - q_bias)[:, None])",
        ]
    else:
        lines.append("s = s * q_scale[:, None] + q_bias[:, None]")
        if spec.softcap:
            lines.append("s = (1.0 - 2.0 / (tl.exp2(s) + 1.0)) * softcap")
        lines += [f's = tl.where({bound}, s, float("-inf"))' for bound in bounds]
        lines += ["m_new = tl.maximum(m_i, tl.max(s, 1))", "p = tl.exp2(s - m_new[:, None])"]
    return [
        *lines,
        "alpha = tl.exp2(m_i - m_new)",
        "l_i = l_i * alpha + tl.sum(p, 1)",
        "m_i = m_new",
        "sums *= alpha[:, None]",
        "p = p.to(coded_q_ptr.dtype.element_ty)",
    ]


def _store(spec: VecInferSpec, sums: str, columns: str, bound: str | None) -> list[str]:
    """Store sums, maxima and masses: ``[parts, B, Hq, L, Dv]``, then twice ``[parts, B, Hq, L]``.

    A cache that was too small must not go unnoticed: it gives NaN.
    """
    mask = f"is_query[:, None] & ({bound})" if bound else "is_query[:, None]"
    size = spec.value_dim
    blocks = f" // {spec.row_blocks}" if spec.row_blocks > 1 else ""
    return [
        f'{sums} = tl.where(lost, float("nan"), {sums})',
        f"pairs = rows{blocks}",
        f"at = (part * pairs + bh).to(tl.int64) * {spec.queries} + offs_g",
        f"tl.store(partial_ptr + at[:, None] * {size} + {columns}[None, :], {sums}, mask={mask})",
        f"parts = splits * pairs.to(tl.int64) * {spec.queries}",
        f"peak_ptr = partial_ptr + parts * {size}",
        "tl.store(peak_ptr + at, m_i, mask=is_query)",
        "tl.store(peak_ptr + parts + at, l_i, mask=is_query)",
    ]
