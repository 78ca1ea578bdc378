"""Several new tokens enter a cache: ``extend_pool`` before they attend, ``extend_append`` after.

Chunks that the tokens complete are pooled first, for a later token of the same call may see them;
the ring keeps what the first token still sees until all have attended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit.chunk_fp8 import chunk_pointers
from flasheva_compile.lowering.emit.decode import exact_pointers, ring_slots
from flasheva_compile.lowering.emit.decode_append import pool_members, pool_results, pool_start
from flasheva_compile.lowering.emit.decode_features import (
    MEMBERS,
    keeps_queries,
    new_queries,
    open_queries,
    pool_by_features,
    query_pointer,
)
from flasheva_compile.lowering.emit.extend import new_pointers, place, row_of
from flasheva_compile.lowering.emit.source import Dim, Source

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec, Schedule

_FLAGS = 64  # of the key mask per step


# --- extend_pool ----------------------------------------------------------------------------------


def emit_extend_pool(spec: KernelSpec) -> str:
    """Return the body of ``extend_pool``: a program for each chunk that may become complete."""
    out, c = Source(), spec.chunk_size
    d, e = Dim("d", spec.head_dim, split=False), Dim("e", spec.value_dim, split=False)
    slots = spec.sink_size + ring_slots(spec)
    if spec.window == "whole":  # there is nothing to pool
        out.lines("pid = tl.program_id(0)", "nth = 0", *row_of("pid"), *new_pointers())
        _find_start(out)
        return out.text()
    out.lines(
        "pid = tl.program_id(0)",
        f"rows = tl.num_programs(0) // tl.cdiv(queries, {c})",
        "nth = pid // rows",
        *row_of("pid % rows"),
        *chunk_pointers(spec),
        *new_pointers(),
    )
    if spec.key_mask:
        _find_start(out)
        out.line("before = (length - start).to(tl.int32)")
    else:
        out.lines(*place())
    out.line(f"chunk = tl.maximum(before, 0) // {c} + nth")
    with out.block(f"if ((chunk + 1) * {c} <= before + queries) & (chunk < chunks):"):
        out.lines(*d.offsets(), *e.offsets())
        out.lines(
            f"exact_k_ptr += bh64 * {slots * spec.head_dim}",
            f"exact_v_ptr += bh64 * {slots * spec.value_dim}",
            f"exact_mask_ptr += b64 * {slots}",
        )
        if keeps_queries(spec):
            out.lines(open_queries(spec), query_pointer())
            loads = {"mq": _query_loads(spec, d), "k": _loads(d, "k"), "v": _loads(e, "v")}
            pool_by_features(out, spec, d, e, _seen(spec), loads)
            return out.text()
        out.lines(*pool_start(spec, d, e))
        with out.block(f"for member in range(0, {c}, {MEMBERS}):"):
            loads = (_loads(d, "k"), _loads(e, "v"))
            out.lines(*_seen(spec), *pool_members(spec, d, e, *loads))
        out.lines(*pool_results(spec, d, e))
    return out.text()


def _find_start(out: Source) -> None:
    """Find the first valid token of a row that waits for it; define ``start``."""
    out.lines(
        "length = tl.load(length_ptr)",
        "start = tl.load(row_start_ptr + b)",
        "# A row that has waited until now. Other programs of this row move its start to the same",
        "# column, before or after this one reads it: then it is still behind all tokens so far.",
        "waits = start >= length",
        "leading = queries",
    )
    with out.block(f"for offset in range(0, tl.where(waits, queries, 0), {_FLAGS}):"):
        out.lines(
            f"at = offset + tl.arange(0, {_FLAGS})",
            "is_valid = tl.load(flags_ptr + at, mask=at < queries, other=0) != 0",
            "leading = tl.minimum(leading, tl.min(tl.where(is_valid, at, queries), 0))",
        )
    out.lines(
        "start = tl.where(waits, length + leading, start)",
        "tl.store(row_start_ptr + b, start, mask=waits & (hk == 0) & (nth == 0))",
    )


def _seen(spec: KernelSpec) -> list[str]:
    """Define ``seen`` of a tile of the chunk's keys: old ones are in the cache, new ones come."""
    sinks, ring, c = spec.sink_size, ring_slots(spec), spec.chunk_size
    slot = f"{sinks} + (key_at - {sinks}) % {ring}" if sinks else f"key_at % {ring}"
    fresh = "is_new"
    if spec.key_mask:
        fresh = "tl.load(flags_ptr + token, mask=is_new, other=0) != 0"
    return [
        f"at = member + tl.arange(0, {MEMBERS})",
        f"key_at = chunk * {c} + at",
        "token = key_at - before",
        f"is_old = (at < {c}) & (token < 0)",
        f"is_new = (at < {c}) & (token >= 0)",
        f"slot = tl.where(key_at < {sinks}, key_at, {slot})" if sinks else f"slot = {slot}",
        "seen = tl.load(exact_mask_ptr + slot, mask=is_old, other=0) != 0",
        f"fresh = {fresh}",
        "seen |= fresh",
    ]


def _loads(dim: Dim, name: str) -> list[str]:
    stride, cast = f"tl.cast(stride_{name}n, tl.int64)", ".to(tl.float32)"
    old = dim.load(name, f"exact_{name}_ptr", "slot", str(dim.size), "is_old", cast=cast)
    new = dim.load(f"new_{name}", f"{name}_ptr", "token", stride, "is_new", cast=cast)
    return [*old, *new, *(f"{name}{n} += new_{name}{n}" for n in dim.indices)]


def _query_loads(spec: KernelSpec, d: Dim) -> list[str]:
    """Load mean queries: kept ones stand where their keys stand in the chunk."""
    return [
        *d.load("mq", "open_q_ptr", "at", str(d.size), "is_old", cast=".to(tl.float32)"),
        *new_queries(spec, d, "token", "is_new"),
        *(f"mq{n} += new_mq{n}.to(tl.float32)" for n in d.indices),
    ]


# --- extend_append --------------------------------------------------------------------------------


def emit_extend_append(spec: KernelSpec, schedule: Schedule) -> str:
    """Return the body of ``extend_append``: a program for a tile of slots; each is written once."""
    if spec.window == "whole":
        return _append_in_order(spec)
    out = Source()
    d, e = Dim("d", spec.head_dim, split=False), Dim("e", spec.value_dim, split=False)
    sinks, ring = spec.sink_size, ring_slots(spec)
    slots = sinks + ring
    tiles = -(-slots // schedule.block_n)
    # A multiple of the ring that keeps the remainder's argument positive.
    turn = -(-slots // ring) * ring
    held = f"last - (last - offs_n + {turn}) % {ring}"
    out.lines(
        "pid = tl.program_id(0)",
        f"rows = tl.num_programs(0) // {tiles}",
        *row_of("pid % rows"),
        *place(),
        *new_pointers(),
        "offs_n = pid // rows * BLOCK_N + tl.arange(0, BLOCK_N)",
        "last = before + queries - 1",
        "# What each slot holds after the call",
        f"held = {held}",
        *([_sinks_of(sinks)] if sinks else []),
        "token = held - before",
        f"take = (offs_n < {slots}) & (held >= 0) & (token >= 0) & (token < queries)",
        *d.offsets(),
        *e.offsets(),
    )
    for dim, name in ((d, "k"), (e, "v")):
        stride = f"tl.cast(stride_{name}n, tl.int64)"
        out.lines(
            *dim.load(name, f"{name}_ptr", "token", stride, "take"),
            f"{name}_slots = exact_{name}_ptr + bh64 * {slots * dim.size}",
            *dim.store(name, f"{name}_slots", "offs_n", str(dim.size), "take"),
        )
    flag = "tl.load(flags_ptr + token, mask=take, other=0) != 0" if spec.key_mask else "take"
    out.lines(
        f"is_key = {flag}",
        f"tl.store(exact_mask_ptr + b64 * {slots} + offs_n, is_key, mask=take & (hk == 0))",
    )
    if keeps_queries(spec):
        _append_queries(out, spec, d)
    return out.text()


def _append_queries(out: Source, spec: KernelSpec, d: Dim) -> None:
    """Keep the mean queries of the chunk that is open after the call: one program for each head."""
    c = spec.chunk_size
    with out.block("if pid < rows:"):
        out.lines(query_pointer(), open_queries(spec))
        with out.block(f"for member in range(0, {c}, {MEMBERS}):"):
            out.lines(
                f"at = member + tl.arange(0, {MEMBERS})",
                f"position = last - (last - at + {c}) % {c}",
                "queried = position - before",
                f"is_open = (at < {c}) & (position >= 0) & (queried >= 0)",
                *new_queries(spec, d, "queried", "is_open"),
                *d.store("new_mq", "open_q_ptr", "at", str(d.size), "is_open"),
            )


def _sinks_of(sinks: int) -> str:
    """Give the slots of sinks their positions; a ring that sinks alone have reached is empty."""
    ring = f"tl.where(held < {sinks}, -1, held)"
    return f"held = tl.where(offs_n < {sinks}, offs_n, {ring})"


def _append_in_order(spec: KernelSpec) -> str:
    """Return the body where positions are slots: a program for a tile of tokens."""
    out = Source()
    d, e = Dim("d", spec.head_dim, split=False), Dim("e", spec.value_dim, split=False)
    out.lines(
        "pid = tl.program_id(0)",
        "rows = tl.num_programs(0) // tl.cdiv(queries, BLOCK_N)",
        *row_of("pid % rows"),
        *place(),
        *exact_pointers(spec),
        *new_pointers(),
        "token = pid // rows * BLOCK_N + tl.arange(0, BLOCK_N)",
        "slot = before + token",
        "take = (token < queries) & (slot >= 0) & (slot < room)",
        *d.offsets(),
        *e.offsets(),
    )
    for dim, name in ((d, "k"), (e, "v")):
        stride = f"tl.cast(stride_{name}n, tl.int64)"
        out.lines(
            *dim.load(name, f"{name}_ptr", "token", stride, "take"),
            *dim.store(name, f"exact_{name}_ptr", "slot", str(dim.size), "take"),
        )
    flag = "tl.load(flags_ptr + token, mask=take, other=0) != 0" if spec.key_mask else "take"
    out.lines(
        f"is_key = {flag}",
        "tl.store(exact_mask_ptr + slot, is_key, mask=take & (hk == 0))",
    )
    return out.text()
