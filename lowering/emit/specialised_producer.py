"""The producer of a specialised ``forward``: a warp that copies tiles ahead of the consumers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit.source import Source
from flasheva_compile.lowering.emit.specialised_names import (
    TENSORS,
    items_loop,
    layout,
    unpacked,
    without_biases,
)
from flasheva_compile.lowering.emit.specialised_walks import producer_walks, row_lines, walk_bounds

if TYPE_CHECKING:
    from flasheva_compile.lowering.emit.specialised_walks import Walk
    from flasheva_compile.lowering.spec import KernelSpec, Schedule


def emit_load_tile(schedule: Schedule) -> str:
    """Return what copies a tile of keys, and one of chunk tokens with biases."""
    plain = '''\
@gluon.jit
def load_tile(k_desc, v_desc, b, hk, offset, ks, vs, k_full, k_empty, v_full, v_empty, t):
    """Copy the t-th tile into its slots, once they are empty."""
    slot, phase = ring(t, STAGES)
    mbarrier.wait(k_empty.index(slot), phase ^ 1)
    mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
    copy_tile(k_desc, [b, hk, offset, 0], k_full.index(slot), ks.index(slot))
    mbarrier.wait(v_empty.index(slot), phase ^ 1)
    mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
    copy_tile(v_desc, [b, hk, offset, 0], v_full.index(slot), vs.index(slot))
'''
    if not schedule.product_bias:
        return plain
    biased = plain.replace(
        "def load_tile(k_desc, v_desc, b,", "def load_chunk_tile(k_desc, v_desc, bias_desc, b,"
    )
    biased = biased.replace("ks, vs, k_full", "ks, vs, bs, k_full").replace(
        "k_desc.block_type.nbytes)", "k_desc.block_type.nbytes + bias_desc.block_type.nbytes)"
    )
    first = "    mbarrier.wait(v_empty"
    copy = "copy_tile(bias_desc, [b, hk, offset, 0], k_full.index(slot), bs.index(slot))"
    return plain + "\n\n" + biased.replace(first, f"    {copy}\n{first}")


def emit_producer(spec: KernelSpec, schedule: Schedule) -> str:
    """Return the function of the producer."""
    out = Source()
    tensors = ", ".join(without_biases(TENSORS, schedule))
    handed = "tensors, slots, barriers, lengths" + ", layout" * bool(layout(spec))
    with out.block(f"@gluon.jit\ndef producer({handed}):"):
        out.line('"""Stream the tiles of one block after the other."""')
        out.lines(f"{tensors} = tensors", *unpacked(spec, schedule))
        out.lines("blocks = gl.cdiv(queries, BLOCK_M)", "t = 0")
        with out.block(items_loop(schedule)):
            out.lines(
                "bh, block = block_of(item, items, blocks)",
                "b = bh // heads",
                "h = bh % heads",
                f"hk = h // {spec.group}" if spec.group > 1 else "hk = h",
                "row = block * BLOCK_M",
                *row_lines(spec, keys=not spec.causal),
                *walk_bounds(spec),
                "slot, phase = query_slot(item)",
            )
            with out.block("for c in gl.static_range(CONSUMERS):"):
                out.lines(
                    "at = slot * CONSUMERS + c",
                    "mbarrier.wait(q_empty.index(at), phase ^ 1)",
                    "mbarrier.expect(q_full.index(at), q_desc0.block_type.nbytes)",
                    "begin = [b, h, row + c * OWN, 0]",
                    "copy_tile(q_desc0, begin, q_full.index(at), qs.index(at))",
                )
            for walk in producer_walks(spec):
                with out.block(walk.header()):
                    out.lines(f"offset = {_column(spec, walk)}", _load(walk, schedule), "t += 1")
    return out.text()


def _column(spec: KernelSpec, walk: Walk) -> str:
    """Return where descriptors find a tile: a padded row begins at its first valid key."""
    origin = "first_slot" if walk.source == "chunk" else "start"
    return f"{origin} + {walk.offset}" if spec.documents == "padded" else walk.offset


def _load(walk: Walk, schedule: Schedule) -> str:
    barriers = "k_full, k_empty, v_full, v_empty, t"
    if walk.source == "key":
        return f"load_tile(k_desc0, v_desc0, b, hk, offset, ks, vs, {barriers})"
    if schedule.product_bias:
        tensors = "rfa_k_desc0, rfa_v_desc0, bias_columns_desc0"
        return f"load_chunk_tile({tensors}, b, hk, offset, ks, vs, bs, {barriers})"
    return f"load_tile(rfa_k_desc0, rfa_v_desc0, b, hk, offset, ks, vs, {barriers})"
