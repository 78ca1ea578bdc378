"""``forward`` by specialised warps, in Gluon: one streams tiles, the others attend.

A producer warp copies tiles of keys, values and biases into rings in shared memory, ahead of
``consumers``, warpgroups that keep 64 queries each and share every tile. Barriers in shared memory
say which slots are full and which may be written again. With ``overlap`` a consumer adds the
values of one tile while it scores the next; with ``persistent`` as many programs as fit go through
all blocks, and the producer is a block ahead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit.source import Source
from flasheva_compile.lowering.emit.specialised_consumer import emit_consumer, emit_steps
from flasheva_compile.lowering.emit.specialised_names import (
    BARRIERS,
    RESULTS,
    SLOTS,
    TENSORS,
    layout,
    lengths,
    without_biases,
)
from flasheva_compile.lowering.emit.specialised_producer import emit_load_tile, emit_producer
from flasheva_compile.lowering.emit.specialised_walks import emit_window
from flasheva_compile.lowering.spec import BIAS_COLUMNS
from flasheva_compile.lowering.specialists import OWN, consumer_registers, query_stages

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec, Schedule

PRODUCER_REGISTERS = 24

IMPORTS = """\
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.8 gave it another name.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
"""


def arguments(spec: KernelSpec, schedule: Schedule) -> tuple[str, ...]:
    """Return the arguments of the entry point."""
    tensors = without_biases(TENSORS, schedule)
    return (*tensors, *RESULTS, *layout(spec), *lengths(spec), "score_scale")


def emit_specialised(spec: KernelSpec, schedule: Schedule) -> str:
    """Return the functions and constants of a module, without header and launcher."""
    parts = [
        _constants(spec, schedule),
        _RING,
        _item(schedule),
        _query_slot(schedule),
        emit_window(spec),
        emit_load_tile(schedule),
        emit_producer(spec, schedule),
        *emit_steps(spec, schedule),
        emit_consumer(spec, schedule),
        _entry(spec, schedule),
    ]
    return "\n\n".join(part if part.endswith("\n") else part + "\n" for part in parts)


def _constants(spec: KernelSpec, schedule: Schedule) -> str:
    n, e = schedule.block_n, spec.value_dim
    lines = [
        f"CONSUMERS = gl.constexpr({schedule.consumers})",
        f"OWN = gl.constexpr({OWN})  # queries of a consumer",
        f"BLOCK_M = gl.constexpr({schedule.block_m})",
        f"BLOCK_N = gl.constexpr({n})",
        f"STAGES = gl.constexpr({schedule.num_stages})",
        f"QUERY_STAGES = gl.constexpr({query_stages(schedule)})",
        f"SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {n}, 16]))",
        f"SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {e}, 16]))",
        "WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, SUMS, 2))",
        "ROWS = gl.constexpr(gl.SliceLayout(1, SCORES))",
        "COLUMNS = gl.constexpr(gl.SliceLayout(0, SCORES))",
        f"RESULTS = gl.constexpr(gl.BlockedLayout([1, 8], [{256 // e}, {e // 8}], [4, 1], [1, 0]))",
        "# A new length is no new kernel.",
        f"LENGTHS = ({', '.join(f'{n!r}' for n in lengths(spec))})".replace("'", '"'),
    ]
    if schedule.product_bias:
        lines.insert(-2, "ONES = gl.constexpr(gl.DotOperandLayout(0, SCORES, 2))")
    return "\n".join(lines)


_RING = '''\
@gluon.jit
def ring(n, SIZE: gl.constexpr):
    """Return the slot and the phase of the n-th use of a ring."""
    return n % SIZE, n // SIZE & 1
'''


def _item(schedule: Schedule) -> str:
    if schedule.persistent:
        return '''\
@gluon.jit
def block_of(item, items, blocks):
    """Return row times head, and block of queries: the longest first, there and back."""
    programs = gl.num_programs(0)
    begin = item // programs * programs
    size = gl.minimum(programs, items - begin)
    turned = begin + size - 1 - (item - begin)
    item = gl.where(item // programs % 2 == 0, item, turned)
    rows = items // blocks
    return item % rows, blocks - 1 - item // rows
'''
    return '''\
@gluon.jit
def block_of(item, items, blocks):
    """Return row times head, the last first, and block of queries, the longest first."""
    return items // blocks - 1 - item // blocks, blocks - 1 - item % blocks
'''


def _query_slot(schedule: Schedule) -> str:
    turn = "item // gl.num_programs(0)" if schedule.persistent else "0"
    return f'''\
@gluon.jit
def query_slot(item):
    """Return where the queries of a program's item are, and the phase of their barriers."""
    return ring({turn}, QUERY_STAGES)
'''


# --- the entry point ------------------------------------------------------------------------------


def _entry(spec: KernelSpec, schedule: Schedule) -> str:
    out = Source()
    taken = ", ".join(arguments(spec, schedule))
    with out.block(f"@gluon.jit(do_not_specialize=LENGTHS)\ndef {spec.kind}({taken}):"):
        out.lines("# Slots of queries, keys, values and biases, and who may use them")
        tiles = [
            ("qs", "q_desc0", "QUERY_STAGES * CONSUMERS", f"OWN, {spec.head_dim}"),
            ("ks", "k_desc0", "STAGES", f"BLOCK_N, {spec.head_dim}"),
            ("vs", "v_desc0", "STAGES", f"BLOCK_N, {spec.value_dim}"),
        ]
        if schedule.product_bias:
            tiles.append(("bs", "bias_columns_desc0", "STAGES", f"BLOCK_N, {BIAS_COLUMNS}"))
        for name, described, count, shape in tiles:
            out.line(
                f"{name} = gl.allocate_shared_memory("
                f"{described}.dtype, [{count}, 1, 1, {shape}], {described}.layout)"
            )
        for name in BARRIERS:
            count = "QUERY_STAGES * CONSUMERS" if name.startswith("q") else "STAGES"
            barriers = f"gl.int64, [{count}, 1], mbarrier.MBarrierLayout()"
            out.line(f"{name} = gl.allocate_shared_memory({barriers})")
        for letters, count, users in (
            ("q", "QUERY_STAGES * CONSUMERS", "1"),
            ("kv", "STAGES", "CONSUMERS"),
        ):
            with out.block(f"for n in gl.static_range({count}):"):
                for x in letters:
                    out.line(f"mbarrier.init({x}_full.index(n), count=1)")
                    out.line(f"mbarrier.init({x}_empty.index(n), count={users})")
        out.lines(
            f"slots = ({', '.join(without_biases(SLOTS, schedule))})",
            f"barriers = ({', '.join(BARRIERS)})",
            f"lengths = ({', '.join(lengths(spec))})",
            *([f"layout = ({', '.join(layout(spec))})"] if layout(spec) else []),
            f"tensors = ({', '.join(without_biases(TENSORS, schedule))})",
        )
        walked = "slots, barriers, lengths" + ", layout" * bool(layout(spec))
        warps = [4] * (schedule.consumers - 1) + [1]
        most = [consumer_registers(schedule)] * (schedule.consumers - 1) + [PRODUCER_REGISTERS]
        with out.block("gl.warp_specialize("):
            with out.block("["):
                out.lines(
                    *(
                        f"(consumer, ({c}, {walked}, score_scale, out_ptr, lse_ptr)),"
                        for c in range(schedule.consumers)
                    )
                )
                out.line(f"(producer, (tensors, {walked})),")
            out.lines("],", f"{warps},", f"{most},")
        out.line(")")
    return out.text()
