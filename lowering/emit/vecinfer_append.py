"""The start of a step over a cache of codes: ``vecinfer_append``.

Its first programs make of queries what products with codewords need (fp8 has none); each of the
others codes some channels of one new key or value, and the first of them store it exactly, too.
Nothing that is written here is read here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import vecinfer_words
from flasheva_compile.lowering.emit.fp8_tokens import store_fp8_token
from flasheva_compile.lowering.emit.source import Dim, Source
from flasheva_compile.lowering.emit.vecinfer_append_words import store_words
from flasheva_compile.lowering.emit.vecinfer_codes import key_channel
from flasheva_compile.lowering.spec_vecinfer import part_codes

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec_vecinfer import CodeLayout, VecInferSpec

_SUMMED = 64  # channels of one product: in fp32 it keeps its operands in registers


def emit_vecinfer_append(spec: VecInferSpec) -> str:
    """Return the body of ``vecinfer_append``; its programs are those of ``spec.append_jobs``."""
    out = Source()
    of_queries, of_keys, _ = spec.append_jobs
    out.lines(
        "pid = tl.program_id(0)",
        f"pairs = tl.num_programs(0) // {sum(spec.append_jobs)}",
        "job = pid // pairs",
        "bh = pid % pairs",
        "b = bh // heads",
        "hk = bh % heads",
        "b64 = b.to(tl.int64)",
        "bh64 = bh.to(tl.int64)",
    )
    if of_queries:
        with out.block(f"if job < {of_queries}:"):
            _queries(out, spec)
    with out.block(f"{'elif' if of_queries else 'if'} job < {of_queries + of_keys}:"):
        _token(out, spec, "k", of_queries)
    with out.block("else:"):
        _token(out, spec, "v", of_queries + of_keys)
    return out.text()


# --- queries --------------------------------------------------------------------------------------


def _queries(out: Source, spec: VecInferSpec) -> None:
    """Transform some channels of up to sixteen queries."""
    d, count, size = Dim("d", spec.head_dim, split=False), spec.new_tokens, spec.keys.padded
    pieces, columns = spec.query_pieces, size // spec.query_pieces
    head, token = (f"(offs_g // {count})", f"offs_g % {count}") if count > 1 else ("offs_g", "")
    rows = f"{head} * tl.cast(stride_qh, tl.int64)"
    rows += f" + {token} * tl.cast(stride_qm, tl.int64)" if token else ""
    out.lines(
        *d.offsets(),
        f"offs_g = job // {pieces} * BLOCK_M + tl.arange(0, BLOCK_M)",
        f"q_rows = q_ptr + b64 * stride_qb + hk * tl.cast(stride_qh, tl.int64) * {spec.group}",
        f"q_row = {rows}",
        f"is_query = offs_g < {spec.queries}",
        *d.load("new_q", "q_rows", "q_row", "1", "is_query", cast=".to(tl.float32)"),
        *d.load_row("smoothing", f"key_scale_ptr + hk * {spec.head_dim}"),
        "q0 = new_q0 * smoothing0 * score_scale",
        "# Rotation keeps the length of a query, so that no element exceeds it.",
        "norm = tl.sqrt(tl.sum(q0 * q0, 1))",
        "q_scale = tl.exp2(tl.ceil(tl.log2(tl.where(norm > 0.0, norm, 1.0))))",
        f"row = bh64 * {spec.row_blocks * 16} + offs_g",
        "scales = q_scale * tl.load(book_scale_ptr)",
        *d.load_row("centre", f"key_centre_ptr + hk * {spec.head_dim}"),
        "biases = score_scale * tl.sum(new_q0 * centre0, 1)",
        f"rows = pairs * {spec.row_blocks * 16}",
        f"is_first = (job % {pieces} == 0) & (offs_g >= 0)",
        "tl.store(q_scale_ptr + row, scales, mask=is_first)",
        "tl.store(q_scale_ptr + rows + row, biases, mask=is_first)",
        f"offs_p = job % {pieces} * {columns} + tl.arange(0, {columns})",
        f"channel = {_column_channel(spec.keys)}",
        f"y = tl.zeros([BLOCK_M, {columns}], tl.float32)",
    )
    step = min(size, _SUMMED)
    with out.block(f"for first in range(0, {size}, {step}):"):
        out.lines(*_rotated_queries(spec, step))
    if spec.is_words:
        exists = f"channel < {spec.head_dim}"
        digit = f"key_digit_ptr + hk * {spec.head_dim} + channel"
        out.line(f"y *= tl.load({digit}, mask={exists}, other=0.0)[None, :]")
    out.lines(
        "y *= (1.0 / q_scale)[:, None]",
        f"coded_rows = coded_q_ptr + row[:, None] * {size}",
        "tl.store(coded_rows + offs_p[None, :], y.to(coded_q_ptr.dtype.element_ty))",
    )


def _column_channel(layout: CodeLayout) -> str:
    """Return the channel of places ``offs_p`` of transformed queries."""
    return (vecinfer_words.key_axis if layout.is_words else key_channel)(layout, "offs_p")


def _rotated_queries(spec: VecInferSpec, step: int) -> list[str]:
    """Add the part of a product with the rotation that comes from ``step`` channels."""
    size = spec.head_dim
    matrix = "(offs_i[:, None] == channel[None, :]).to(tl.float32)"
    if spec.rotate_keys:
        matrix = "key_rotation_ptr + hk * tl.cast(rotation_stride, tl.int64)"
        address = f"{matrix} + offs_i[:, None] + channel[None, :] * {size}"
        exists = f"(offs_i < {size})[:, None] & (channel < {size})[None, :]"
        matrix = f"tl.load({address}, mask={exists}, other=0.0)"
    at = "q_rows + q_row[:, None] + offs_i[None, :]"
    mask = f"is_query[:, None] & (offs_i < {size})[None, :]"
    scale = f"key_scale_ptr + hk * {size} + offs_i"
    # As precise as fp32 and on tensor cores; a result of 16 bits does not need each last bit.
    precision = "ieee" if spec.dtype == "fp32" else "bf16x6"
    return [
        f"offs_i = first + tl.arange(0, {step})",
        f"x = tl.load({at}, mask={mask}, other=0.0).to(tl.float32)",
        f"x *= tl.load({scale}, mask=offs_i < {size}, other=0.0)[None, :] * score_scale",
        f"matrix = {matrix}",
        f'y = tl.dot(x, matrix, y, input_precision="{precision}")',
    ]


# --- keys and values ------------------------------------------------------------------------------


def _token(out: Source, spec: VecInferSpec, name: str, first: int) -> None:
    """Store one new token exactly, and some of its codes."""
    layout = spec.keys if name == "k" else spec.values
    dim = Dim("d" if name == "k" else "e", layout.size, split=False)
    which = "key" if name == "k" else "value"
    parts = 1 if spec.is_fp8 else -(-layout.codes // part_codes(layout, which))
    out.lines(
        *dim.offsets(),
        f"token = (job - {first}) // {parts}",
        f"piece = (job - {first}) % {parts}",
        *_place(spec),
        f"{name}_row = {name}_ptr + b64 * stride_{name}b + hk * tl.cast(stride_{name}h, tl.int64)",
        f"{name}_row += token * tl.cast(stride_{name}n, tl.int64)",
        *dim.load_row(f"new_{name}", f"{name}_row"),
    )
    with out.block("if (piece == 0) & is_valid:"):
        _store_exactly(out, spec, name, dim)
    with out.block(f"if is_valid & (place >= {spec.sink_size}) & (slot < room):"):
        if spec.is_fp8:
            out.lines(*store_fp8_token(name, layout.size, "bh64 * room + slot"))
        elif spec.is_words:
            out.lines(*store_words(name, layout, part_codes(layout, which)))
        else:
            _code(out, spec, name, layout)


def _place(spec: VecInferSpec) -> list[str]:
    """Define ``place`` of the token among the valid ones of its row, and where its codes go."""
    lines, count = ["length = tl.load(length_ptr + b).to(tl.int32)"], spec.new_tokens
    if not spec.key_mask:
        lines += ["place = length + token", "is_valid = token >= 0"]
    else:
        lines += [
            f"offs_l = tl.arange(0, {1 << (count - 1).bit_length()})",
            "flags = key_mask_ptr + b64 * stride_mask + offs_l",
            f"is_new = tl.load(flags, mask=offs_l < {count}, other=0).to(tl.int32)",
            "place = length + tl.sum(tl.where(offs_l < token, is_new, 0), 0)",
            "is_valid = tl.sum(tl.where(offs_l == token, is_new, 0), 0) > 0",
        ]
    return [*lines, f"slot = place - {spec.sink_size}" if spec.sink_size else "slot = place"]


def _store_exactly(out: Source, spec: VecInferSpec, name: str, dim: Dim) -> None:
    sinks, ring, size = spec.sink_size, spec.ring, dim.size
    in_ring = f"tail_{name}_ptr + (bh64 * {ring} + place % {ring}) * {size}"
    if not sinks:
        out.lines(*dim.store_row(f"new_{name}", in_ring))
        return
    # As in quantization/state.py: the ring holds the last tokens, sinks or not.
    with out.block(f"if place < {sinks}:"):
        out.lines(
            *dim.store_row(f"new_{name}", f"sink_{name}_ptr + (bh64 * {sinks} + place) * {size}")
        )
    out.lines(*dim.store_row(f"new_{name}", in_ring))


def _code(out: Source, spec: VecInferSpec, name: str, layout: CodeLayout) -> None:
    """Find the nearest codewords of some subvectors and store their numbers."""
    which = ("key", "value")[name == "v"]
    codes = part_codes(layout, which)
    entries = layout.entries
    block = f"tl.arange(0, {min(entries, _block(codes))})"
    out.lines(f"code = piece * {codes} + tl.arange(0, {codes})", *_transformed(spec, name, layout))
    out.lines(
        f"book = {which}_words_ptr + hk * tl.cast({which}_stride, tl.int64)",
        f'least = tl.full([{codes}], float("inf"), tl.float32)',
        f"nearest = tl.zeros([{codes}], tl.int32)",
    )
    with out.block(f"for first in range(0, {entries}, {min(entries, _block(codes))}):"):
        out.lines(f"entry = first + {block}")
        for n in range(layout.vector):
            out.lines(
                f"word{n} = tl.load(book + entry * {layout.vector} + {n})",
                f"apart = y{n}[:, None] - word{n}[None, :]",
                f"distance {'+' * (n > 0)}= apart * apart",
            )
        out.lines(
            "nearer, index = tl.min(distance, 1, return_indices=True)",
            "is_nearer = nearer < least",
            "nearest = tl.where(is_nearer, first + index, nearest)",
            "least = tl.where(is_nearer, nearer, least)",
        )
    out.lines(*_store_codes(which, layout, codes))


def _block(codes: int) -> int:
    """Return the codewords that are compared at once with so many subvectors."""
    return max(16, 1024 // codes)


def _transformed(spec: VecInferSpec, name: str, layout: CodeLayout) -> list[str]:
    """Define ``y0``, ``y1``, ...: transformed channels 0, 1, ... of the subvectors, in fp32."""
    rotate = spec.rotate_keys if name == "k" else spec.rotate_values
    which, offsets = ("key", "offs_d0") if name == "k" else ("value", "offs_e0")
    d, size = layout.vector, layout.size
    lines: list[str] = []
    if rotate:
        scale = name == "k"
        lines.append(f"x = new_{name}0.to(tl.float32)")
        if scale:
            at = f"key_scale_ptr + hk * {size} + {offsets}[None, :]"
            lines.append(f"x /= tl.load({at}, mask={offsets}[None, :] < {size}, other=1.0)")
        matrix = f"{which}_rotation_ptr"
        matrix += " + hk * tl.cast(rotation_stride, tl.int64)" if scale else ""
        for n in range(d):
            address = f"{matrix} + (code[:, None] * {d} + {n}) * {size}"
            exists = f"(code < {layout.codes})[:, None] & ({offsets} < {size})[None, :]"
            lines += [
                f"matrix = tl.load({address} + {offsets}[None, :], mask={exists}, other=0.0)",
                f"y{n} = tl.sum(matrix * x, 1)",
            ]
            lines += _without_offset(n, layout) if scale else []
        return lines
    for n in range(d):
        exists = f"code < {layout.codes}"
        at = f"code * {d} + {n}"
        lines.append(f"y{n} = tl.load({name}_row + {at}, mask={exists}, other=0.0).to(tl.float32)")
        if name == "k":
            where = f"key_scale_ptr + hk * {size} + {at}"
            lines.append(f"y{n} /= tl.load({where}, mask={exists}, other=1.0)")
            lines += _without_offset(n, layout)
    return lines


def _without_offset(n: int, layout: CodeLayout) -> list[str]:
    at = f"key_offset_ptr + hk * {layout.size} + code * {layout.vector} + {n}"
    return [f"y{n} -= tl.load({at}, mask=code < {layout.codes}, other=0.0)"]


def _store_codes(which: str, layout: CodeLayout, codes: int) -> list[str]:
    row = f"{which}_codes_ptr + (bh64 * room + slot) * {layout.nbytes}"
    if layout.bits <= 8:
        mask = f"code < {layout.codes}"
        return [f"tl.store({row} + code, nearest.to(tl.uint8), mask={mask})"]
    # Two codes in three bytes; see quantization/packing.py.
    return [
        f"nearest = tl.where(code < {layout.codes}, nearest, 0)",
        f"one, two = tl.split(nearest.reshape({codes // 2}, 2))",
        f"pair = piece * {codes // 2} + tl.arange(0, {codes // 2})",
        f"bytes_of = {row} + pair * 3",
        f"is_pair = pair < {-(-layout.codes // 2)}",
        "tl.store(bytes_of, (one & 255).to(tl.uint8), mask=is_pair)",
        "tl.store(bytes_of + 1, (one >> 8 | (two & 15) << 4).to(tl.uint8), mask=is_pair)",
        "tl.store(bytes_of + 2, (two >> 4).to(tl.uint8), mask=is_pair)",
    ]
