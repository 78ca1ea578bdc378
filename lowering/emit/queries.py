"""Kernels that keep a block of queries: ``forward`` and ``dq``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import loops, positions, scores
from flasheva_compile.lowering.emit.product_bias import bias_product, bias_setup
from flasheva_compile.lowering.emit.selection_bits import selection_setup, unselected
from flasheva_compile.lowering.emit.source import Dim, Source
from flasheva_compile.lowering.spec import BIAS_COLUMNS, STATE_BLOCK

if TYPE_CHECKING:
    from flasheva_compile.lowering.emit.loops import Loop
    from flasheva_compile.lowering.spec import KernelSpec, Schedule


def emit_query_kernel(spec: KernelSpec, schedule: Schedule) -> str:
    """Return the body of ``forward`` or ``dq``."""
    out, d, e = Source(), Dim("d", spec.head_dim), Dim("e", spec.value_dim)
    _program(out, spec)
    out.lines(*d.offsets(), *e.offsets(), "")
    out.lines(*_load_queries(spec, d, e))
    out.lines(*loops.query_setup(spec), "")
    if spec.selection_group:
        out.lines(*selection_setup(spec), "")
    out.lines(*(bias_setup(spec) if schedule.product_bias else ()))
    out.lines(*_initial(spec, d, e))
    for bounds, loop in loops.query_loops(spec, schedule):
        out.line()
        out.line(f"# {loop.purpose}")
        out.lines(*bounds)
        out.line(f"stop = {loop.end}")
        with out.block(f"for offset in range({loop.begin}, stop, {loop.step}):"):
            out.lines(*_tile(spec, schedule, loop, d, e))
    out.line()
    out.lines(*_results(spec, d, e))
    return out.text()


def _program(out: Source, spec: KernelSpec) -> None:
    # Pooling has just read the last heads: their keys and values may still be in the cache.
    last_heads_first = ["bh = tl.num_programs(0) // blocks - 1 - bh"] * (spec.kind == "forward")
    out.lines(
        "# Later blocks of queries see more: start them first.",
        "blocks = tl.cdiv(queries, BLOCK_M)",
        "pid = tl.program_id(0)",
        "bh = pid // blocks",
        *last_heads_first,
        "block = blocks - 1 - pid % blocks",
        "b = bh // heads",
        "h = bh % heads",
        f"hk = h // {spec.group}" if spec.group > 1 else "hk = h",
        "b64 = b.to(tl.int64)",
        "bh64 = bh.to(tl.int64)",
        f"bhk64 = b64 * (heads // {spec.group}) + hk" if spec.group > 1 else "bhk64 = bh64",
    )
    out.lines(*row_pointers(spec, chunks=True))


def row_pointers(spec: KernelSpec, *, chunks: bool) -> list[str]:
    """Move the pointers of keys, values and chunk tokens to row ``b`` and head ``hk``."""
    lines = positions.row_origin(spec)
    if spec.documents != "padded":
        lines += ["keys = columns", "slots = chunks"]
    if spec.documents == "packed" or spec.key_mask:
        lines.append("b_row = b64 * columns")
    shift_k, shift_v, first = "", "", ""
    if spec.documents == "padded":
        shift_k, shift_v = (
            " + tl.cast(start, tl.int64) * stride_kn",
            (" + tl.cast(start, tl.int64) * stride_vn"),
        )
        first = " + first_slot"
    lines += [
        f"k_ptr += b64 * stride_kb + tl.cast(hk, tl.int64) * stride_kh{shift_k}",
        f"v_ptr += b64 * stride_vb + tl.cast(hk, tl.int64) * stride_vh{shift_v}",
    ]
    if spec.key_mask:
        lines.append(f"valid_ptr += b_row{' + start' if spec.documents == 'padded' else ''}")
    if chunks:
        lines += [
            f"chunk_row = bhk64 * chunks{first}",
            f"rfa_k_ptr += chunk_row * {spec.head_dim}",
            f"rfa_v_ptr += chunk_row * {spec.value_dim}",
            "rfa_bias_ptr += chunk_row",
            f"bias_columns_ptr += chunk_row * {BIAS_COLUMNS}",
        ]
        if spec.alibi:
            lines.append(f"chunk_mean_ptr += b64 * stride_mean{first}")
        if spec.documents == "packed":
            lines.append("chunk_first_ptr += b64 * chunks")
    return lines


def _load_queries(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    origin = " - start" if spec.documents == "padded" else ""
    lines = [
        "row = block * BLOCK_M",
        "offs_m = tl.arange(0, BLOCK_M)",
        "rows = row + offs_m",
        f"first = row + q_offset{origin}",
        f"last = tl.minimum(row + BLOCK_M, queries) - 1 + q_offset{origin}",
        "i = first + offs_m",
        "q_rows = q_ptr + b64 * stride_qb + h * tl.cast(stride_qh, tl.int64)"
        " + row * tl.cast(stride_qm, tl.int64)",
        *d.load("q", "q_rows", "offs_m", "stride_qm", "rows < queries"),
        "state_row = bh64 * queries + row",
    ]
    if spec.kind == "dq":
        lines += [
            "do_rows = do_ptr + b64 * stride_gb + h * tl.cast(stride_gh, tl.int64)"
            " + row * tl.cast(stride_gm, tl.int64)",
            *e.load("do", "do_rows", "offs_m", "stride_gm", "rows < queries"),
        ]
    if spec.alibi:
        lines += [
            f"slope = tl.load(slopes_ptr + h).to(tl.float32) * {scores.LOG2E}",
            "query_position = i.to(tl.float32)",
        ]
    if spec.dropout:
        column = "i + start" if spec.documents == "padded" else "i"
        lines.append(f"state = dropout_state(seed_ptr, b, h, {column})")
    return lines


def _initial(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    if spec.kind == "forward":
        return [
            "# The lowest finite maximum: a row that has seen nothing yet makes no NaN.",
            "m_i = tl.full([BLOCK_M], -3.4028234663852886e38, tl.float32)",
            "l_i = tl.zeros([BLOCK_M], tl.float32)",
            *e.zeros("acc", "BLOCK_M"),
        ]
    loads = e.load(
        "o",
        f"out_ptr + state_row * {spec.value_dim}",
        "offs_m",
        str(spec.value_dim),
        "rows < queries",
    )
    products = " + ".join(
        f"tl.sum(o{n}.to(tl.float32) * do{n}.to(tl.float32), 1)" for n in e.indices
    )
    return [
        *loads,
        f"delta = {products}",
        "# +inf for rows that see nothing: their weights are exp2(x - inf) = 0.",
        'lse = tl.load(lse_ptr + state_row + offs_m, mask=rows < queries, other=float("-inf"))',
        f'lse = tl.where(lse == float("-inf"), float("inf"), lse * {scores.LOG2E})',
        f"state_rows = state_blocks * {STATE_BLOCK}",
        "tl.store(lse2_ptr + bh64 * state_rows + rows, lse)",
        "tl.store(delta_ptr + bh64 * state_rows + rows, delta)",
        "# Rows behind the last query weigh nothing, so that no kernel has to ask.",
        f"rest = blocks * BLOCK_M + tl.arange(0, {2 * STATE_BLOCK})",
        "is_rest = (block == blocks - 1) & (rest < state_rows)",
        'tl.store(lse2_ptr + bh64 * state_rows + rest, float("inf"), mask=is_rest)',
        "tl.store(delta_ptr + bh64 * state_rows + rest, 0.0, mask=is_rest)",
        *d.zeros("dq", "BLOCK_M"),
    ]


def _tile(spec: KernelSpec, schedule: Schedule, loop: Loop, d: Dim, e: Dim) -> list[str]:
    """Return the body of one loop."""
    dot = scores.precision(spec)
    bound = "offs_n < stop" if loop.bounded else None
    k_ptr, v_ptr, k_stride, v_stride = (
        ("rfa_k_ptr", "rfa_v_ptr", str(spec.head_dim), str(spec.value_dim))
        if loop.source == "chunk"
        else ("k_ptr", "v_ptr", "stride_kn", "stride_vn")
    )
    lines = [f"offs_t = tl.arange(0, {loop.step})", "offs_n = offset + offs_t"]
    product_bias = schedule.product_bias and loop.source == "chunk"
    origin = "first_slot" if loop.source == "chunk" else "start"
    at = f"b, hk, offset{f' + {origin}' if spec.documents == 'padded' else ''}"
    if schedule.tma and loop.step == "BLOCK_N":
        prefix = "rfa_" if loop.source == "chunk" else ""
        lines += d.fetch("k", f"{prefix}k", at, loop.step)
        value_load = e.fetch("v", f"{prefix}v", at, loop.step)
    else:
        lines.append(f"k_tile = {k_ptr} + offset * tl.cast({k_stride}, tl.int64)")
        lines += d.load("k", "k_tile", "offs_t", k_stride, bound)
        value_load = [
            f"v_tile = {v_ptr} + offset * tl.cast({v_stride}, tl.int64)",
            *e.load("v", "v_tile", "offs_t", v_stride, bound),
        ]
    lines += key_side(spec, loop.source, bound, "bias_scale" if product_bias else scores.LOG2E)
    lines += bias_product(spec, schedule, at, bound) if product_bias else []
    lines += d.contract("s", "q", "k", dot, more=product_bias)
    text = scores.mask_text(loop.mask, valid_flags(spec, loop.source), keys_first=False)
    if spec.selection_group and loop.source == "chunk":
        bits, is_left = unselected(spec, schedule.block_n)
        lines += bits
        text = f"{text} & {is_left}" if text else is_left
    if spec.kind == "forward":
        return (
            lines
            + _softmax_step(spec, loop, text, product_bias=product_bias)
            + value_load
            + e.accumulate("acc", "p", "v", dot)
        )
    scored = scores.scores(spec, loop.source, keys_first=False, product_bias=product_bias)
    return lines + value_load + scored + _dq_step(spec, loop, text, d, e)


def key_side(
    spec: KernelSpec, source: scores.KeySource, bound: str | None, bias_scale: str = scores.LOG2E
) -> list[str]:
    """Load what scores and masks need of a tile of keys or chunk tokens at ``offs_n``."""
    guard = f", mask={bound}, other=" if bound else ""
    lines = []
    if source == "chunk" and not spec.whole_chunks:
        other = f'{guard}float("-inf")' if guard else ""
        lines.append(f"bias = tl.load(rfa_bias_ptr + offs_n{other}) * {bias_scale}")
    if source == "chunk" and spec.documents == "packed":
        other = f"{guard}-1" if guard else ""
        lines += [
            f"chunk_first = tl.load(chunk_first_ptr + offs_n{other})",
            f"chunk_last = chunk_first + {spec.chunk_size - 1}",
        ]
    if source == "key" and spec.key_mask:
        lines.append(f"valid = tl.load(valid_ptr + offs_n{f'{guard}0' if guard else ''}) != 0")
    zero = f"{guard}0.0" if guard else ""
    return lines + scores.key_position(spec, source, f"tl.load(chunk_mean_ptr + offs_n{zero})")


def valid_flags(spec: KernelSpec, source: scores.KeySource) -> str | None:
    """Return the vector of valid keys, where a key mask is read."""
    return "valid" if spec.key_mask and source == "key" else None


def _softmax_step(
    spec: KernelSpec, loop: Loop, mask: str | None, *, product_bias: bool
) -> list[str]:
    shift = scores.constant_bias(spec, loop.source)
    if scores.is_plain(spec, loop.source, product_bias=product_bias):
        peak = f"tl.max(s, 1) * score_scale{shift.replace('-', '+')}"
        lines = [
            *scores.masked(mask),
            f"m_new = tl.maximum(m_i, {peak})",
            f"p = tl.exp2(s * score_scale - (m_new{shift})[:, None])",
        ]
    else:
        lines = [
            *scores.scores(spec, loop.source, keys_first=False),
            *scores.masked(mask),
            f"m_new = tl.maximum(m_i, tl.max(s, 1){shift.replace('-', '+')})",
            f"p = tl.exp2(s - (m_new{shift})[:, None])",
        ]
    e = Dim("e", spec.value_dim)
    lines += ["alpha = tl.exp2(m_i - m_new)", "l_i = l_i * alpha + tl.sum(p, 1)", "m_i = m_new"]
    lines += e.scale("acc", "alpha[:, None]")
    lines += scores.keep(spec, loop.source, keys_first=False)
    lines += ["p = tl.where(keep, p, 0.0)"] if spec.dropout else []
    return [*lines, "p = p.to(v_ptr.dtype.element_ty)"]


def _dq_step(spec: KernelSpec, loop: Loop, mask: str | None, d: Dim, e: Dim) -> list[str]:
    dot = scores.precision(spec)
    lines = [
        f"p = tl.exp2(s - (lse{scores.constant_bias(spec, loop.source)})[:, None])",
        *scores.masked_weights(mask),
        *e.contract("dp", "do", "v", dot),
        *scores.keep(spec, loop.source, keys_first=False),
    ]
    lines += ["dp = tl.where(keep, dp * keep_scale, 0.0)"] if spec.dropout else []
    factor = " * (1.0 - tanh * tanh)" if spec.softcap else ""
    return [
        *lines,
        f"ds = (p * (dp - delta[:, None]){factor}).to(k_ptr.dtype.element_ty)",
        *d.accumulate("dq", "ds", "k", dot),
    ]


def _results(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    if spec.kind == "dq":
        return [
            *d.scale("dq", "scale"),
            *d.store(
                "dq",
                f"dq_ptr + state_row * {spec.head_dim}",
                "offs_m",
                str(spec.head_dim),
                "rows < queries",
            ),
        ]
    inverse = "keep_scale / l_safe" if spec.dropout else "1.0 / l_safe"
    return [
        "l_safe = tl.where(l_i == 0.0, 1.0, l_i)",
        f"inverse = {inverse}",
        *e.scale("acc", "inverse[:, None]"),
        *e.store(
            "acc",
            f"out_ptr + state_row * {spec.value_dim}",
            "offs_m",
            str(spec.value_dim),
            "rows < queries",
        ),
        f'lse = tl.where(l_i == 0.0, float("-inf"), (m_i + tl.log2(l_safe)) / {scores.LOG2E})',
        "tl.store(lse_ptr + state_row + offs_m, lse, mask=rows < queries)",
    ]
