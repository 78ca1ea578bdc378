"""Launches that are collected instead of made: what a call would run, without a device."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flasheva_compile.lowering.schedule_cost import Target
    from flasheva_compile.lowering.spec import KernelSpec

specs: list[KernelSpec] | None = None
"""Where launches are collected; None = they are made."""
target: Target | None = None
"""For what they are collected: its limits decide which kernels a call runs."""


@contextmanager
def recorded(device: Target) -> Iterator[list[KernelSpec]]:
    """Collect specs in place of launches; tensors then need no values. Not thread-safe."""
    global specs, target
    specs, target = [], device
    try:
        yield specs
    finally:
        specs = target = None
