"""What the first part of ``decode`` does after it has attended: append the token, pool its chunk.

Other programs may still read the slot that is written. What it held before and what it holds after
are both outside of the token's window, so that they mask it out either way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit.chunk_fp8 import store_chunk_token
from flasheva_compile.lowering.emit.decode_features import (
    MEMBERS,
    keeps_queries,
    place_members,
    place_result,
    place_start,
    pool_by_features,
    store_query,
)
from flasheva_compile.lowering.emit.fp8_tokens import store_fp8_token
from flasheva_compile.lowering.emit.retrieval_bounds import (
    bounds_members,
    bounds_results,
    bounds_start,
)
from flasheva_compile.lowering.emit.scores import LOG2E

if TYPE_CHECKING:
    from flasheva_compile.lowering.emit.source import Dim, Source
    from flasheva_compile.lowering.spec import KernelSpec


def append(out: Source, spec: KernelSpec, d: Dim, e: Dim, *, ring: int) -> None:
    """Write token, row start and, if the token completes its chunk, the chunk token."""
    _move_start(out, spec)
    if spec.window == "whole":
        with out.block("if (split == 0) & (position >= 0) & (position < room):"):
            out.lines("slot = position", *_store_token(spec, d, e))
        return
    with out.block("if (split == 0) & (position >= 0):"):
        out.lines(
            f"slot = {near_slot(spec, 'position', ring)}",
            *_store_token(spec, d, e),
            *(store_query(spec, d) if keeps_queries(spec) else []),
            f"chunk = position // {spec.chunk_size}",
        )
        _pool_complete(out, spec, d, e)


def append_column(out: Source, spec: KernelSpec, d: Dim, e: Dim, *, ring: int) -> None:
    """Do the same where every token keeps its column, padding included; ``columns`` fit in.

    With copies of what is near, the token goes there, too, unless its row has not begun. Where the
    store is fp8, chunks are pooled from the copies.
    """
    _move_start(out, spec)
    with out.block("if (split == 0) & (length < columns):"):
        out.lines(
            *d.load_row("new_k", "k_ptr"),
            *e.load_row("new_v", "v_ptr"),
            "slot = length",
            *_store_token(spec, d, e),
            f"chunk = tl.where(position < 0, chunks, position // {spec.chunk_size})",
        )
        if spec.near_store:
            out.line(f"near_slot = {near_slot(spec, 'position', ring)}")
            with out.block("if position >= 0:"):
                out.lines(
                    *d.store_row("new_k", f"near_k_ptr + near_slot * {d.size}"),
                    *e.store_row("new_v", f"near_v_ptr + near_slot * {e.size}"),
                )
        _pool_complete(out, spec, d, e)


def near_slot(spec: KernelSpec, position: str, ring: int) -> str:
    """Return where a sink or one of the latest positions is kept."""
    sinks = spec.sink_size
    if not sinks:
        return f"{position} % {ring}"
    return f"tl.where({position} < {sinks}, {position}, {sinks} + ({position} - {sinks}) % {ring})"


def _move_start(out: Source, spec: KernelSpec) -> None:
    if spec.key_mask:
        waiting = "(split == 0) & (hk == 0) & (position < 0)"
        out.line(f"tl.store(row_start_ptr + b, length + 1, mask={waiting})")


def _store_token(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    store = [
        *d.store_row("new_k", f"exact_k_ptr + slot * {d.size}"),
        *e.store_row("new_v", f"exact_v_ptr + slot * {e.size}"),
    ]
    if spec.fp8_store:
        place = "bh64 * columns + slot"
        store = [*store_fp8_token("k", d.size, place), *store_fp8_token("v", e.size, place)]
    return [
        *store,
        f"tl.store(exact_mask_ptr + slot, {_is_valid(spec)}, mask=hk == 0)",
    ]


def _pool_complete(out: Source, spec: KernelSpec, d: Dim, e: Dim) -> None:
    """Pool the chunk that the token completes, if it does."""
    c = spec.chunk_size
    with out.block(f"if ((position + 1) % {c} == 0) & (chunk < chunks):"):
        if keeps_queries(spec):
            out.line(f"first_slot = slot - {c - 1}")
            loads = {"mq": _open_rows(d), "k": _rows(spec, d, "k"), "v": _rows(spec, e, "v")}
            pool_by_features(out, spec, d, e, _seen(spec), loads)
            return
        out.lines(*pool_start(spec, d, e), *(bounds_start(d, "1") if spec.by_bounds else []))
        out.line(f"first_slot = slot - {c - 1}")
        if spec.fp8_store:
            out.line(f"first_near = near_slot - {c - 1}")
        with out.block(f"for member in range(0, {c}, {MEMBERS}):"):
            out.lines(*_members(spec, d, e), *(bounds_members(d) if spec.by_bounds else []))
        out.line("count = l_n")
        out.lines(*pool_results(spec, d, e), *(bounds_results(spec, d) if spec.by_bounds else []))


def _is_valid(spec: KernelSpec) -> str:
    return "is_valid" if spec.key_mask else "True"


def _softmaxes(spec: KernelSpec) -> tuple[str, ...]:
    """Names of the softmaxes over the chunk; without one, all valid keys weigh the same."""
    if spec.chunk_rule == "evabyte":
        return ("k", "v") if spec.parameters else ("v",)
    return ("k",) if spec.chunk_rule == "tangent" else ()


def _weights(spec: KernelSpec) -> tuple[str, str]:
    """Return the names of what weighs the keys and of what weighs the values."""
    names = _softmaxes(spec)
    of_keys = "k" if "k" in names else "n"
    return of_keys, "v" if "v" in names else of_keys


def _parameters(spec: KernelSpec, d: Dim) -> list[str]:
    vectors = {"tangent": ("phi",), "evabyte": ("phi", "p")}.get(spec.chunk_rule or "", ())
    lines = []
    for name in vectors[: spec.parameters]:
        lines += d.load_row(name, f"{name}_ptr + hk * {d.size}", cast=".to(tl.float32)")
    return lines


def pool_start(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    """Load the rule's vectors of head ``hk``; start its sums."""
    lines = [*_parameters(spec, d), "l_n = tl.zeros([1], tl.float32)", *place_start(spec)]
    for name in _softmaxes(spec):
        lines += [
            f"m_{name} = tl.full([1], -3.4028234663852886e38, tl.float32)",
            f"l_{name} = tl.zeros([1], tl.float32)",
        ]
    return lines + d.zeros("sk", "1") + e.zeros("sv", "1")


def _members(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    """Add a tile of the chunk's keys."""
    return [*_seen(spec), *pool_members(spec, d, e, _rows(spec, d, "k"), _rows(spec, e, "v"))]


def _seen(spec: KernelSpec) -> list[str]:
    """Define ``seen`` of a tile of keys: all but the last are in the cache, that is the token."""
    c = spec.chunk_size
    return [
        f"at = member + tl.arange(0, {MEMBERS})",
        f"is_old = at < {c - 1}",
        f"is_new = at == {c - 1}",
        "seen = tl.load(exact_mask_ptr + first_slot + at, mask=is_old, other=0) != 0",
        "seen |= is_new & is_valid" if spec.key_mask else "seen |= is_new",
    ]


def pool_members(
    spec: KernelSpec, d: Dim, e: Dim, load_k: list[str], load_v: list[str]
) -> list[str]:
    """Add a tile of a chunk's keys to the rule's sums.

    Args:
        spec: What the kernel computes.
        d: The columns of keys.
        e: The columns of values.
        load_k: Loads the tile of keys, fp32 in ``k0``, ...; ``seen`` are those that exist.
        load_v: Loads their values, ``v0``, ...
    """
    of_keys, of_values = _weights(spec)
    lines = ["w_n = seen.to(tl.float32)", "l_n += tl.sum(w_n, 0)", *place_members(spec), *load_k]
    if of_values == "v":
        lines.append(f"square = {d.row_sum('k', 'k')}")
    for name in _softmaxes(spec):
        lines += [
            f'x = tl.where(seen, {_logit(spec, name, d)}, float("-inf"))',
            f"m_new = tl.maximum(m_{name}, tl.max(x, 0))",
            f"a_{name} = tl.exp2((m_{name} - m_new) * {LOG2E})",
            f"w_{name} = tl.exp2((x - m_new) * {LOG2E})",
            f"l_{name} = l_{name} * a_{name} + tl.sum(w_{name}, 0)",
            f"m_{name} = m_new",
        ]
    lines += _add(spec, d, "k", of_keys)
    return [*lines, *load_v, *_add(spec, e, "v", of_values)]


def _open_rows(d: Dim) -> list[str]:
    """Do as :func:`_rows` with mean queries."""
    return _with_token(d, "mq", "open_q_ptr")


def _rows(spec: KernelSpec, dim: Dim, name: str) -> list[str]:
    """Load a tile of old rows, put the token's row into its place."""
    if spec.fp8_store:
        return _with_token(dim, name, f"near_{name}_ptr + first_near * {dim.size}")
    return _with_token(dim, name, f"exact_{name}_ptr + first_slot * {dim.size}")


def _with_token(dim: Dim, name: str, first: str) -> list[str]:
    return [
        *dim.load(name, first, "at", str(dim.size), "is_old", cast=".to(tl.float32)"),
        *(
            f"{name}{n} = tl.where(is_new[:, None], new_{name}{n}.to(tl.float32), {name}{n})"
            for n in dim.indices
        ),
    ]


def _add(spec: KernelSpec, dim: Dim, name: str, weight: str) -> list[str]:
    rescaled = f" * a_{weight}[:, None]" if weight in _softmaxes(spec) else ""
    return [
        f"s{name}{n} = s{name}{n}{rescaled} + tl.sum(w_{weight}[:, None] * {name}{n}, 0)[None, :]"
        for n in dim.indices
    ]


def _logit(spec: KernelSpec, name: str, d: Dim) -> str:
    if spec.chunk_rule == "tangent":
        return f"scale * ({d.row_sum('k', 'phi')})"
    if name == "k":
        return d.row_sum("k", "phi")
    centre = f"{d.row_sum('k', 'p')} - 0.5 * square" if spec.parameters else "-0.5 * square"
    return f"scale * ({centre})"


def pool_results(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    """Store the chunk token ``chunk`` and its bias."""
    of_keys, of_values = _weights(spec)
    bias = {
        "mean": "tl.log(l_n)",
        "tangent": f"m_k + tl.log(l_k) - scale * ({d.row_sum('sk', 'phi')})",
        "evabyte": "tl.load(b_ptr + hk).to(tl.float32)" if spec.parameters > 2 else "0.0",
    }[spec.chunk_rule or "mean"]
    masses = dict.fromkeys((of_keys, of_values))
    return [
        "filled = l_n > 0.0",
        "chunk64 = chunk.to(tl.int64)",
        *(f"l_{name} = tl.where(filled, l_{name}, 1.0)" for name in masses),
        *d.scale("sk", f"(1.0 / l_{of_keys})[:, None]"),
        *e.scale("sv", f"(1.0 / l_{of_values})[:, None]"),
        *store_chunk_token(spec, d, e),
        f'pooled_bias = tl.where(filled, {bias}, float("-inf"))',
        "tl.store(rfa_bias_ptr + chunk64 + tl.arange(0, 1), pooled_bias)",
        *place_result(spec),
    ]
