"""Kernels around chunk tokens alone: ``chunk_tokens`` pools, ``dpool`` and ``domega`` go back."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import positions
from flasheva_compile.lowering.emit.keys import (
    key_rows,
    load_gradient,
    program,
    store_keys,
    store_values,
)
from flasheva_compile.lowering.emit.pool_gradient import pool_gradient
from flasheva_compile.lowering.emit.product_bias import store_columns
from flasheva_compile.lowering.emit.queries import row_pointers
from flasheva_compile.lowering.emit.scores import LOG2E
from flasheva_compile.lowering.emit.source import Dim, Source
from flasheva_compile.lowering.spec import BIAS_COLUMNS, padded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flasheva_compile.lowering.spec import KernelSpec

_FP32 = ".to(tl.float32)"
UNROLLED = 16
"""Members of a chunk whose loads are in flight at once, at most: more spill and compile long."""

_WIDE = 256  # channels of a key and a value together, beyond which a quarter as many are


def emit_pool_gradient(spec: KernelSpec) -> str:
    """Return the body of ``dpool``: a block of keys, no queries."""
    out, d, e = Source(), Dim("d", spec.head_dim), Dim("e", spec.value_dim)
    program(out, spec)
    out.lines(*d.offsets(), *e.offsets(), *row_pointers(spec, chunks=False))
    origin = " - start" if spec.documents == "padded" else ""
    out.lines(
        f"offset = tile_n * BLOCK_N{origin}",
        "offs_t = tl.arange(0, BLOCK_N)",
        "offs_n = offset + offs_t",
        "exists = (offs_n >= 0) & (offs_n < keys)",
    )
    if spec.documents == "packed":
        out.line("begin_n = tl.load(begin_ptr + b_row + offs_n, mask=exists, other=columns)")
    if spec.key_mask:
        out.line("valid = tl.load(valid_ptr + offs_n, mask=exists, other=0) != 0")
    if spec.chunk_rule != "mean":
        out.lines(
            "k_tile = k_ptr + offset * tl.cast(stride_kn, tl.int64)",
            "v_tile = v_ptr + offset * tl.cast(stride_vn, tl.int64)",
            *d.load("k", "k_tile", "offs_t", "stride_kn", "exists"),
            *e.load("v", "v_tile", "offs_t", "stride_vn", "exists"),
        )
    out.lines(*key_rows())
    if spec.accumulate:
        bound = "column + offs_t < columns"
        out.lines(
            *load_gradient("dk", "dk_ptr", d, bound), *load_gradient("dv", "dv_ptr", e, bound)
        )
    else:
        out.lines(*d.zeros("dk", "BLOCK_N"), *e.zeros("dv", "BLOCK_N"))
    out.lines(*pool_gradient(spec, d, e), *store_keys(d), *store_values(e))
    return out.text()


def emit_chunk_tokens(spec: KernelSpec) -> str:
    """Return the body of ``chunk_tokens``: a block of chunks, a walk over their members."""
    out, d, e = Source(), Dim("d", spec.head_dim), Dim("e", spec.value_dim)
    program(out, spec)
    out.lines(*d.offsets(), *e.offsets(), *chunk_columns(spec), *_parameters(spec, d))
    out.lines(*_initial(spec, d, e))
    with members(out, spec.chunk_size, _at_once(spec)):
        out.lines(*_member(spec, d, e))
    out.lines(*_results(spec, d, e))
    return out.text()


def _at_once(spec: KernelSpec) -> int:
    """Return the members whose keys and values are in flight at once."""
    channels = padded(spec.head_dim) + padded(spec.value_dim)
    if spec.chunk_rule == "eva" and spec.dtype == "fp32":
        return 1  # a centre for each chunk is a tile more: it would spill
    if channels * (2 if spec.dtype == "fp32" else 1) > _WIDE:
        return UNROLLED // 4
    return UNROLLED if spec.chunk_size <= UNROLLED else UNROLLED // 2


@contextmanager
def members(out: Source, chunk_size: int, at_once: int) -> Iterator[None]:
    """Walk over the members of chunks: ``member``; unrolled in parts of at most ``at_once``."""
    part = max(n for n in range(1, at_once + 1) if chunk_size % n == 0)
    if part in (1, chunk_size):
        with out.block(
            f"for member in {'range' if part == 1 else 'tl.static_range'}({chunk_size}):"
        ):
            yield
        return
    parts, inside = f"range(0, {chunk_size}, {part})", f"tl.static_range({part})"
    with out.block(f"for part in {parts}:"), out.block(f"for offset in {inside}:"):
        out.line("member = part + offset")
        yield


def emit_centre_gradient(spec: KernelSpec) -> str:
    """Return the body of ``domega``: a block of chunks of the ``eva`` rule, a walk over members.

    ``dpool`` has the same weights, but goes by key: a chunk's sum would cross its tiles.
    """
    out, d, e = Source(), Dim("d", spec.head_dim), Dim("e", spec.value_dim)
    rows_d, rows_e = str(d.size), str(e.size)
    program(out, spec)
    out.lines(
        *d.offsets(),
        *e.offsets(),
        *chunk_columns(spec),
        *_omega(d),
        "mass = tl.load(mass_v_ptr + chunk_row + offs_t, mask=exists, other=0.0)",
        *e.load("mv", f"rfa_v_ptr + chunk_row * {rows_e}", "offs_t", rows_e, "exists", cast=_FP32),
        *e.load("gv", f"drfa_v_ptr + chunk_row * {rows_e}", "offs_t", rows_e, "exists", cast=_FP32),
        *d.zeros("domega", "BLOCK_N"),
    )
    # Not unrolled: with all loads in flight at once, wide heads would spill.
    with out.block(f"for member in range({spec.chunk_size}):"):
        inner = (f"tl.sum((v{n} - mv{n}) * gv{n}, 1)" for n in e.indices)
        out.lines(
            *member_keys(spec, d),
            *e.load("v", "v_ptr", "at", "stride_vn", "seen", cast=_FP32),
            f"square = {d.row_sum('k', 'k')}",
            f"centre_dot = {d.row_sum('k', 'omega')}",
            "logits = scale * (centre_dot - 0.5 * square)",
            f"w = tl.where(seen, tl.exp2((logits - mass) * {LOG2E}), 0.0)",
            f"inner = {' + '.join(inner)}",
            "dlogit = scale * w * inner",
            *(f"domega{n} += dlogit[:, None] * k{n}" for n in d.indices),
        )
    out.lines(*d.store("domega", f"domega_ptr + chunk_row * {rows_d}", "offs_t", rows_d, "exists"))
    return out.text()


def chunk_columns(spec: KernelSpec) -> list[str]:
    """Define ``columns_in``, first column of each chunk relative to ``origin``."""
    c = spec.chunk_size
    lines = positions.row_origin(spec)[:1]
    lines += [
        "slot = tile_n * BLOCK_N",
        "offs_t = tl.arange(0, BLOCK_N)",
        "exists = slot + offs_t < chunks",
        "chunk_row = bhk64 * chunks + slot",
        f"origin = slot * {c}",
        f"relative = offs_t * {c}",
        "in_chunk = exists",
    ]
    if spec.documents == "padded":
        lines += [
            f"origin = start + (slot - start // {c}) * {c}",
            "in_chunk = exists & (origin + relative >= start)",
        ]
    if spec.documents == "packed":
        lines += [
            "chunk_slots = b64 * chunks + slot + offs_t",
            "first = tl.load(chunk_first_ptr + chunk_slots, mask=exists, other=-1)",
            "in_chunk = first >= 0",
            "relative = first - origin",
        ]
    for name in "kv":
        lines.append(
            f"{name}_ptr += b64 * stride_{name}b + hk * tl.cast(stride_{name}h, tl.int64)"
            f" + origin * tl.cast(stride_{name}n, tl.int64)"
        )
    if spec.key_mask:
        lines.append("valid_ptr += b64 * columns + origin")
    return lines


def _parameters(spec: KernelSpec, d: Dim) -> list[str]:
    vectors = {"tangent": ("phi",), "evabyte": ("phi", "p")}.get(spec.chunk_rule or "", ())
    lines = []
    for name in vectors:
        for n in d.indices:
            guard = f", mask=offs_d{n} < {d.size}, other=0.0" if d.bound(n) else ""
            load = f"tl.load({name}_ptr + hk * {d.size} + offs_d{n}{guard})"
            lines.append(f"{name}{n} = {load}.to(tl.float32)[None, :]")
    return lines + _omega(d) if spec.chunk_rule == "eva" else lines


def _omega(d: Dim) -> list[str]:
    """Load what each chunk's values are pooled around."""
    rows = f"omega_ptr + chunk_row * {d.size}"
    return d.load("omega", rows, "offs_t", str(d.size), "exists", cast=_FP32)


def _softmaxes(spec: KernelSpec) -> tuple[str, ...]:
    """Names of the softmaxes over a chunk: of keys, of values; one where they agree."""
    return {"mean": (), "tangent": ("k",), "evabyte": ("k", "v"), "eva": ("v",)}[
        spec.chunk_rule or "mean"
    ]


def _initial(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    lines = ["count = tl.zeros([BLOCK_N], tl.float32)"]
    for name in _softmaxes(spec):
        lines += [
            f"m_{name} = tl.full([BLOCK_N], -3.4028234663852886e38, tl.float32)",
            f"l_{name} = tl.zeros([BLOCK_N], tl.float32)",
        ]
    lines += d.zeros("sk", "BLOCK_N") if spec.chunk_rule != "eva" else []
    return lines + e.zeros("sv", "BLOCK_N")


def member_keys(spec: KernelSpec, d: Dim) -> list[str]:
    """Load key ``member`` of each chunk in fp32, ``k0``, ...; ``seen`` are those that exist."""
    lines = [
        "at = relative + member",
        "seen = in_chunk & (origin + at < columns)",
    ]
    if spec.key_mask:
        lines.append("seen &= tl.load(valid_ptr + at, mask=seen, other=0) != 0")
    return lines + d.load("k", "k_ptr", "at", "stride_kn", "seen", cast=_FP32)


def _member(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    lines = member_keys(spec, d)
    lines += e.load("v", "v_ptr", "at", "stride_vn", "seen", cast=_FP32)
    lines.append("count += seen.to(tl.float32)")
    if spec.chunk_rule == "mean":
        lines += [f"sk{n} += k{n}" for n in d.indices]
        return lines + [f"sv{n} += v{n}" for n in e.indices]
    lines.append(f"square = {d.row_sum('k', 'k')}")
    for name in _softmaxes(spec):
        lines += _logit(spec, name, d) + _softmax_step(name)
    weight = {"tangent": ("w_k", "a_k"), "evabyte": ("w_v", "a_v"), "eva": ("w_v", "a_v")}
    if spec.chunk_rule != "eva":
        lines += [f"sk{n} = sk{n} * a_k[:, None] + w_k[:, None] * k{n}" for n in d.indices]
    w, a = weight[spec.chunk_rule or ""]
    return lines + [f"sv{n} = sv{n} * {a}[:, None] + {w}[:, None] * v{n}" for n in e.indices]


def _logit(spec: KernelSpec, name: str, d: Dim) -> list[str]:
    """Define the logit ``x`` of a member."""
    if spec.chunk_rule == "tangent":
        return [f"x = scale * ({d.row_sum('k', 'phi')})"]
    if name == "k":
        return [f"x = {d.row_sum('k', 'phi')}"]
    centre = "omega" if spec.chunk_rule == "eva" else "p"
    return [f"centre_dot = {d.row_sum('k', centre)}", "x = scale * (centre_dot - 0.5 * square)"]


def _softmax_step(name: str) -> list[str]:
    return [
        'x = tl.where(seen, x, float("-inf"))',
        f"m_new = tl.maximum(m_{name}, x)",
        f"a_{name} = tl.exp2((m_{name} - m_new) * {LOG2E})",
        f"w_{name} = tl.exp2((x - m_new) * {LOG2E})",
        f"l_{name} = l_{name} * a_{name} + w_{name}",
        f"m_{name} = m_new",
    ]


def _results(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    lines = ["filled = count > 0.0"]
    if spec.chunk_rule == "mean":
        lines.append("inverse_k = 1.0 / tl.maximum(count, 1.0)")
    for name in _softmaxes(spec):
        lines += [
            f"l_{name} = tl.where(filled, l_{name}, 1.0)",
            f"inverse_{name} = 1.0 / l_{name}",
            f'mass_{name} = tl.where(filled, m_{name} + tl.log(l_{name}), float("-inf"))',
            f"tl.store(mass_{name}_ptr + chunk_row + offs_t, mass_{name}, mask=exists)",
        ]
    own = "v" if "v" in _softmaxes(spec) else "k"
    lines += e.scale("sv", f"inverse_{own}[:, None]")
    if spec.chunk_rule != "eva":
        lines += d.scale("sk", "inverse_k[:, None]")
        lines += d.store("sk", f"rfa_k_ptr + chunk_row * {d.size}", "offs_t", str(d.size), "exists")
    lines += e.store("sv", f"rfa_v_ptr + chunk_row * {e.size}", "offs_t", str(e.size), "exists")
    bias = {
        "mean": "tl.log(tl.maximum(count, 1.0))",
        "tangent": f"mass_k - scale * ({d.row_sum('sk', 'phi')})",
        "evabyte": "tl.load(b_ptr + hk).to(tl.float32)" if spec.parameters > 2 else "0.0",
        "eva": "0.0",
    }[spec.chunk_rule or "mean"]
    lines.append(f'bias = tl.where(filled, {bias}, float("-inf"))')
    lines.append("tl.store(rfa_bias_ptr + chunk_row + offs_t, bias, mask=exists)")
    if spec.bias_columns:
        lines += store_columns(f"bias_columns_ptr + chunk_row * {BIAS_COLUMNS}", "offs_t")
    return lines
