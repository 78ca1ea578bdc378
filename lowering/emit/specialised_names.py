"""What the warps of a specialised ``forward`` hand each other, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec, Schedule

SLOTS = ("qs", "ks", "vs", "bs")
BARRIERS = ("q_full", "q_empty", "k_full", "k_empty", "v_full", "v_empty")
TENSORS = ("q_desc0", "k_desc0", "v_desc0", "rfa_k_desc0", "rfa_v_desc0", "bias_columns_desc0")
RESULTS = ("out_ptr", "lse_ptr")


def without_biases(names: tuple[str, ...], schedule: Schedule) -> tuple[str, ...]:
    """Leave out what holds biases, where no products add them."""
    biases = ("bs", "bias_columns_desc0")
    return tuple(n for n in names if schedule.product_bias or n not in biases)


def lengths(spec: KernelSpec) -> tuple[str, ...]:
    """Return the integers that decide what is walked over."""
    columns = () if spec.causal and spec.documents == "dense" else ("columns",)
    words = ("words",) if spec.selection_group else ()
    return ("heads", "queries", *columns, "chunks", "q_offset", "items", *words)


def layout(spec: KernelSpec) -> tuple[str, ...]:
    """Return the pointers to the layout of the rows, and to which chunk tokens were selected."""
    bits = ("bits_ptr",) if spec.selection_group else ()
    if spec.documents == "dense":
        return bits
    ends = () if spec.causal else ("stop_ptr",)
    return ("start_ptr", *ends, "valid_ptr", *bits)


def unpacked(spec: KernelSpec, schedule: Schedule) -> list[str]:
    """Give names to what a partition was handed."""
    pointers = layout(spec)
    return [
        f"{', '.join(without_biases(SLOTS, schedule))} = slots",
        f"{', '.join(BARRIERS)} = barriers",
        f"{', '.join(lengths(spec))} = lengths",
        *([f"{', '.join(pointers)} = layout"] if pointers else []),
    ]


def items_loop(schedule: Schedule) -> str:
    """Return the loop over the blocks of queries of a program."""
    if schedule.persistent:
        return "for item in range(gl.program_id(0), items, gl.num_programs(0)):"
    return "for item in range(gl.program_id(0), gl.program_id(0) + 1):"
