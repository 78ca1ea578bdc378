"""What the values of a launch leave of the schedule that its spec has."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from flasheva_compile.lowering.schedule import choose_alike, current_target
from flasheva_compile.lowering.specialists import programs_per_multiprocessor

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec, Schedule

LEAST_SCALE = 1e-10  # biases are divided by it, and must stay numbers


def with_what_is_there(schedule: Schedule, spec: KernelSpec, values: dict[str, Any]) -> Schedule:
    """Leave biases to the scores where the products cannot add them, and specialists alone.

    Specialists mask before they scale: nothing may be scaled to zero.
    """
    if not (schedule.consumers or schedule.product_bias):
        return schedule
    has_columns = spec.kind != "forward" or "bias_columns_ptr" in values
    fits = values["scale"] >= LEAST_SCALE and (has_columns or not schedule.product_bias)
    if schedule.consumers and not (fits and _stands_inside(values)):
        schedule = alike(spec, schedule)
    has_bias = schedule.product_bias and not fits
    return dataclasses.replace(schedule, product_bias=False) if has_bias else schedule


def alike(spec: KernelSpec, schedule: Schedule) -> Schedule:
    """Return a schedule whose warps all do the same."""
    return choose_alike(spec, current_target()) if schedule.consumers else schedule


def _stands_inside(values: dict[str, Any]) -> bool:
    """Whether every query stands at a key, valid or not: behind the last, nothing hides tiles.

    Those in front of a padded row's first valid key see nothing, as elsewhere.
    """
    offset = values["q_offset"]
    return 0 <= offset <= values["columns"] - values["queries"]


def resident_programs(schedule: Schedule) -> int:
    """Return how many programs run side by side."""
    return current_target().multiprocessors * programs_per_multiprocessor(schedule)
