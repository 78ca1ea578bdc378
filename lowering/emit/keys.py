"""Kernels that keep a block of chunk tokens, sinks or keys: ``dchunk``, ``dsink`` and ``dkv``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import positions, resident_loops, scores
from flasheva_compile.lowering.emit.pool_gradient import pool_gradient
from flasheva_compile.lowering.emit.pool_gradient_products import (
    key_part,
    parameter_part,
    value_part,
)
from flasheva_compile.lowering.emit.queries import key_side, row_pointers, valid_flags
from flasheva_compile.lowering.emit.retrieval_backward_keys import retrieved_parts
from flasheva_compile.lowering.emit.selection_bits import unselected_rows
from flasheva_compile.lowering.emit.source import Dim, Source
from flasheva_compile.lowering.spec import STATE_BLOCK, pools_by_products

if TYPE_CHECKING:
    from flasheva_compile.lowering.emit.resident_loops import QueryLoop
    from flasheva_compile.lowering.spec import KernelSpec, Schedule


def emit_key_kernel(spec: KernelSpec, schedule: Schedule) -> str:
    """Return the body of ``dchunk``, ``dsink`` or ``dkv``."""
    out, d, e = Source(), Dim("d", spec.head_dim), Dim("e", spec.value_dim)
    program(out, spec)
    out.lines(*d.offsets(), *e.offsets(), "")
    out.lines(*_resident(spec, d, e), *resident_loops.resident_bounds(spec), "")
    bounds, walks = resident_loops.resident_loops(spec)
    origin = "start - q_offset" if spec.documents == "padded" else "-q_offset"
    out.lines(f"shift = {origin}", *bounds)
    out.lines(*d.zeros("dk", "BLOCK_N"), *e.zeros("dv", "BLOCK_N"))
    if _has_bias(spec):
        out.line("dbias = tl.zeros([BLOCK_N], tl.float32)")
    if spec.group > 1:
        with out.block(f"for g in range({spec.group}):"):
            _walk(out, spec, schedule, walks, d, e)
    else:
        _walk(out, spec, schedule, walks, d, e)
    out.lines(*_results(spec, schedule, d, e))
    return out.text()


def _has_bias(spec: KernelSpec) -> bool:
    return spec.kind == "dchunk" and not spec.whole_chunks


def _leaves_out(spec: KernelSpec) -> bool:
    """Whether some queries attend the keys of a chunk instead of its chunk token."""
    return spec.kind == "dchunk" and spec.selection_group > 0


def program(out: Source, spec: KernelSpec) -> None:
    """Find row, head and block of a program; one program for each ``split``."""
    chunks = dict.fromkeys(("dchunk", "chunk_tokens", "chunk_bounds", "domega"), "chunks")
    counts = {**chunks, "dsink": str(spec.sink_size)}
    out.line("pid = tl.program_id(0)")
    tiles = f"tiles_n = tl.cdiv({counts.get(spec.kind, 'columns')}, BLOCK_N)"
    if spec.kind in ("dchunk", "dsink"):
        out.lines(
            "# Earlier chunk tokens are seen by more queries: start those of all heads first.",
            "split = pid % splits",
            "pid = pid // splits",
            tiles,
            "kv_rows = tl.num_programs(0) // (splits * tiles_n)",
            "bhk = pid % kv_rows",
            "tile_n = pid // kv_rows",
        )
    else:
        out.lines(tiles, "bhk = pid // tiles_n", "tile_n = pid % tiles_n")
    out.lines(
        "kv_heads = " + (f"heads // {spec.group}" if spec.group > 1 else "heads"),
        "b = bhk // kv_heads",
        "hk = bhk % kv_heads",
        "b64 = b.to(tl.int64)",
        "bhk64 = bhk.to(tl.int64)",
    )


def _resident(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    if spec.kind == "dchunk":
        return _resident_chunks(spec, d, e)
    lines = row_pointers(spec, chunks=False)
    if spec.kind == "dsink":
        lines += [
            "offset = tile_n * BLOCK_N",
            "offs_t = tl.arange(0, BLOCK_N)",
            "offs_n = offset + offs_t",
        ]
        bound = f"offs_n < tl.minimum({spec.sink_size}, keys)"
    else:
        lines += _resident_keys(spec)
        bound = "(offs_n >= 0) & (offs_n < keys)" if spec.documents == "padded" else "offs_n < keys"
    lines += [
        "k_tile = k_ptr + offset * tl.cast(stride_kn, tl.int64)",
        "v_tile = v_ptr + offset * tl.cast(stride_vn, tl.int64)",
        f"exists = {bound}",
        *d.load("k", "k_tile", "offs_t", "stride_kn", "exists"),
        *e.load("v", "v_tile", "offs_t", "stride_vn", "exists"),
        *key_side(spec, "key", "exists"),
    ]
    return lines


def _resident_keys(spec: KernelSpec) -> list[str]:
    origin = " - start" if spec.documents == "padded" else ""
    lines = [
        f"offset = tile_n * BLOCK_N{origin}",
        "offs_t = tl.arange(0, BLOCK_N)",
        "offs_n = offset + offs_t",
        "first = offset",
        "last = tl.minimum(offset + BLOCK_N, keys) - 1",
    ]
    if spec.documents == "packed":
        lines.append(
            "begin_n = tl.load(begin_ptr + b_row + offs_n, mask=offs_n < columns, other=columns)"
        )
    return lines


def _resident_chunks(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    c = spec.chunk_size
    lines = positions.row_origin(spec)
    if spec.documents != "padded":
        lines += ["keys = columns"]
    if spec.documents == "packed":
        lines.append("b_row = b64 * columns")
    lines += [
        "slot = tile_n * BLOCK_N",
        "offs_t = tl.arange(0, BLOCK_N)",
        "exists = slot + offs_t < chunks",
        "chunk_row = bhk64 * chunks + slot",
        *d.load("k", f"rfa_k_ptr + chunk_row * {d.size}", "offs_t", str(d.size), "exists"),
        *e.load("v", f"rfa_v_ptr + chunk_row * {e.size}", "offs_t", str(e.size), "exists"),
    ]
    if _has_bias(spec):
        load = 'tl.load(rfa_bias_ptr + chunk_row + offs_t, mask=exists, other=float("-inf"))'
        lines.append(f"bias = {load} * {scores.LOG2E}")
    if spec.documents == "packed":
        lines += [
            "offs_n = slot + offs_t",
            "chunk_first = tl.load(chunk_first_ptr + b64 * chunks + offs_n, mask=exists, other=-1)",
        ]
    else:
        padded = spec.documents == "padded"
        lines += [
            f"j = slot{' - first_slot' if padded else ''}",
            "offs_n = j + offs_t",
            f"chunk_first = offs_n * {c}",
        ]
    mean = "tl.load(chunk_mean_ptr + b64 * stride_mean + slot + offs_t, mask=exists, other=0.0)"
    return [
        *lines,
        f"chunk_last = chunk_first + {c - 1}",
        *scores.key_position(spec, "chunk", mean),
    ]


def _walk(
    out: Source, spec: KernelSpec, schedule: Schedule, walks: list[QueryLoop], d: Dim, e: Dim
) -> None:
    group = spec.group
    head = f"hk * {group} + g" if group > 1 else "hk"
    row = f"bhk64 * {group} + g" if group > 1 else "bhk64"
    out.lines(
        f"h = {head}",
        "q_head = q_ptr + b64 * stride_qb + h * tl.cast(stride_qh, tl.int64)",
        "do_head = do_ptr + b64 * stride_gb + h * tl.cast(stride_gh, tl.int64)",
        f"state_head = ({row}) * state_blocks * {STATE_BLOCK}",
    )
    if spec.alibi:
        out.line(f"slope = tl.load(slopes_ptr + h).to(tl.float32) * {scores.LOG2E}")
    for loop in walks:
        out.line(f"# {loop.purpose}")
        tiles = loop.end if loop.begin == "0" else f"{loop.begin}, {loop.end}"
        if spec.kind in ("dchunk", "dsink"):
            skip = f"(split - {loop.begin} % splits + splits) % splits"
            begin = "split" if loop.begin == "0" else f"{loop.begin} + {skip}"
            tiles = f"{begin}, {loop.end}, splits"
        with out.block(f"for tile in range({tiles}):"):
            out.lines(*_tile(spec, schedule, loop, d, e))


def _tile(spec: KernelSpec, schedule: Schedule, loop: QueryLoop, d: Dim, e: Dim) -> list[str]:
    dot = scores.precision(spec)
    source: scores.KeySource = "chunk" if spec.kind == "dchunk" else "key"
    if schedule.tma:
        load_q = d.fetch("q", "q", "b, h, row", "BLOCK_M")
        load_do = e.fetch("do", "do", "b, h, row", "BLOCK_M")
    else:
        load_q = [
            "q_rows = q_head + row * tl.cast(stride_qm, tl.int64)",
            *d.load("q", "q_rows", "offs_m", "stride_qm", "rows < queries"),
        ]
        load_do = [
            "do_rows = do_head + row * tl.cast(stride_gm, tl.int64)",
            *e.load("do", "do_rows", "offs_m", "stride_gm", "rows < queries"),
        ]
    mask = scores.mask_text(loop.mask, None, keys_first=True)
    bits: list[str] = []
    if _leaves_out(spec):
        bits, is_left = unselected_rows(spec, schedule.block_m)
        mask = f"{mask} & {is_left}" if mask else is_left
    by_window = bool(loop.mask) and not resident_loops.resident_bounds(spec)
    lines = [
        f"row = {resident_loops.tile_row(spec)}",
        "offs_m = tl.arange(0, BLOCK_M)",
        "rows = row + offs_m",
        *load_q,
        *_query_side(spec, needs_window=by_window),
        "lse = tl.load(lse2_ptr + state_head + rows)",
        "delta = tl.load(delta_ptr + state_head + rows)",
        *bits,
        *d.contract("s", "k", "q", dot),
        *scores.scores(spec, source, keys_first=True),
        f"p = tl.exp2(s - (lse{scores.constant_bias(spec, source)})[None, :])",
        *scores.masked_weights(mask),
        *load_do,
        *scores.keep(spec, source, keys_first=True),
    ]
    weights = "tl.where(keep, p, 0.0)" if spec.dropout else "p"
    lines += [
        f"weights = {weights}.to(q_ptr.dtype.element_ty)",
        *e.accumulate("dv", "weights", "do", dot),
        *e.contract("dp", "v", "do", dot),
    ]
    lines += ["dp = tl.where(keep, dp * keep_scale, 0.0)"] if spec.dropout else []
    lines.append("ds = p * (dp - delta[None, :])")
    lines += ["dbias += tl.sum(ds, 1)"] if _has_bias(spec) else []
    factor = " * (1.0 - tanh * tanh)" if spec.softcap else ""
    return [
        *lines,
        f"ds = (ds{factor}).to(q_ptr.dtype.element_ty)",
        *d.accumulate("dk", "ds", "q", dot),
    ]


def _query_side(spec: KernelSpec, *, needs_window: bool) -> list[str]:
    """Define what masks, ALiBi and dropout need of a tile of queries."""
    lines = ["i = rows - shift"]
    if needs_window:
        if spec.documents == "packed":
            lines += [
                "begin = tl.load(begin_ptr + b_row + i, mask=rows < queries, other=columns)",
                f"sink_stop = begin + {spec.sink_size}",
            ]
        lines += positions.window(spec, "i", "lo", "hi")
    if spec.alibi:
        lines.append("query_position = i.to(tl.float32)")
    if spec.dropout:
        column = "i + start" if spec.documents == "padded" else "i"
        lines.append(f"state = dropout_state(seed_ptr, b, h, {column})")
    return lines


def _results(spec: KernelSpec, schedule: Schedule, d: Dim, e: Dim) -> list[str]:
    lines = d.scale("dk", "scale")
    lines += e.scale("dv", "keep_scale") if spec.dropout else []
    if spec.kind == "dkv":
        return lines + _key_results(spec, schedule, d, e)
    if spec.kind == "dsink":
        rows = str(spec.sink_size)
        flags = valid_flags(spec, "key")
        bound = f"offs_n < {rows}"
        lines += _select("dk", d, f"exists & {flags}" if flags else "exists")
        lines += _select("dv", e, f"exists & {flags}" if flags else "exists")
        return [
            *lines,
            *_first_of_part(spec, rows),
            f"sink_row = bhk64 * {rows} + offset",
            *d.store(
                "dk", f"dk_sink_ptr + part + sink_row * {d.size}", "offs_t", str(d.size), bound
            ),
            *e.store(
                "dv", f"dv_sink_ptr + part + sink_row * {e.size}", "offs_t", str(e.size), bound
            ),
        ]
    lines += _first_of_part(spec, "chunks")
    if spec.documents == "packed":
        seen = "exists & (chunk_first >= 0)"
    else:
        seen = f"exists & (offs_n >= {spec.sink_size // spec.chunk_size})"
    lines += [
        f"seen = {seen}",
        *_select("dk", d, "seen"),
        *_select("dv", e, "seen"),
        *d.store(
            "dk", f"drfa_k_ptr + part + chunk_row * {d.size}", "offs_t", str(d.size), "exists"
        ),
        *e.store(
            "dv", f"drfa_v_ptr + part + chunk_row * {e.size}", "offs_t", str(e.size), "exists"
        ),
    ]
    if _has_bias(spec):
        place = "drfa_bias_ptr + part + chunk_row + offs_t"
        lines.append(f"tl.store({place}, tl.where(seen, dbias, 0.0), mask=exists)")
    return lines


def _first_of_part(spec: KernelSpec, rows: str) -> list[str]:
    """Define where the sums of this program's split begin; all sums of a split lie together."""
    columns = spec.head_dim + spec.value_dim + 4 * _has_bias(spec)
    return [f"part = tl.cast(split, tl.int64) * kv_rows * {rows} * {columns}"]


def _select(tile: str, dim: Dim, rows: str) -> list[str]:
    """Zero the rows that nobody sees: their products are of no meaning."""
    return [f"{tile}{n} = tl.where(({rows})[:, None], {tile}{n}, 0.0)" for n in dim.indices]


def _key_results(spec: KernelSpec, schedule: Schedule, d: Dim, e: Dim) -> list[str]:
    lines = []
    if spec.sink_size and spec.documents != "packed":
        bound = f"exists & (offs_n < {spec.sink_size})"
        for tile, dim, pointer in (("dk", d, "dk_sink_ptr"), ("dv", e, "dv_sink_ptr")):
            rows = f"{pointer} + (bhk64 * {spec.sink_size} + offset) * {dim.size}"
            lines += dim.load("sink", rows, "offs_t", str(dim.size), bound)
            lines += [f"{tile}{n} += sink{n}" for n in dim.indices]
    if spec.selection_group:
        lines += retrieved_parts(spec, d, e)
    if spec.chunk_rule and not pools_by_products(spec):
        lines += pool_gradient(spec, d, e)
    flags = valid_flags(spec, "key") or ("exists" if spec.documents == "padded" else "")
    keys = [*(_select("dk", d, flags) if flags else []), *store_keys(d)]
    values = [*(_select("dv", e, flags) if flags else []), *store_values(e)]
    if not pools_by_products(spec):
        return [*lines, *key_rows(), *keys, *values]
    values = [*value_part(spec, schedule, d, e), *key_rows(), *values]
    return [*lines, *values, *key_part(spec, d), *keys, *parameter_part(spec, schedule, d)]


def key_rows() -> list[str]:
    """Define where the gradients of a block of keys lie: contiguous over columns."""
    return ["column = tile_n * BLOCK_N", "key_row = bhk64 * columns + column"]


def load_gradient(tile: str, pointer: str, dim: Dim, bound: str) -> list[str]:
    """Load gradients that another kernel has written."""
    rows = f"{pointer} + key_row * {dim.size}"
    return dim.load(tile, rows, "offs_t", str(dim.size), bound, cast=".to(tl.float32)")


def store_values(e: Dim) -> list[str]:
    """Store the gradients of a block of values."""
    return e.store("dv", f"dv_ptr + key_row * {e.size}", "offs_t", str(e.size), _BOUND)


def store_keys(d: Dim) -> list[str]:
    """Store the gradients of a block of keys."""
    return d.store("dk", f"dk_ptr + key_row * {d.size}", "offs_t", str(d.size), _BOUND)


_BOUND = "column + offs_t < columns"
