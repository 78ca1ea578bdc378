"""First calls: kernels that a pass launches one after the other are compiled side by side.

Triton compiles a kernel when it is first launched, for a second or two each. So a pass stops at the
first launch that would compile; what it launches in all is collected, compiled by as many threads
(compilers hold Python's lock for a small part of their time), and the pass begins anew.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from flasheva_compile.lowering.direct_launch import Uncompiled, may_compile, on_device

if TYPE_CHECKING:
    from collections.abc import Callable

    T = TypeVar("T")
    Launch = tuple[torch.device, Callable[..., None], tuple[Any, ...]]

log = logging.getLogger(__name__)
_collected: ContextVar[list[Launch] | None] = ContextVar("collected", default=None)


def side_by_side(launches: Callable[[], T]) -> T:
    """Return what a pass returns; what it launches for the first time is compiled together.

    What goes wrong in that is left to the launches themselves: they compile what is not there yet.

    Args:
        launches: Makes its launches, in the end by ``launch.run``. It writes nothing that it reads,
            so that it can begin anew, and may compute with what its launches would have written,
            whatever that memory holds.
    """
    if not may_compile.get() or _collected.get() is not None:
        return launches()  # as a part of another pass
    token = may_compile.set(False)
    try:
        return launches()
    except Uncompiled:
        pass
    finally:
        may_compile.reset(token)
    if not _is_capturing():  # which work of other threads would disturb
        _compile_all(_launches_of(launches))
    return launches()


def collect(device: torch.device, launch: Callable[..., None], arguments: tuple[Any, ...]) -> bool:
    """Take a launch instead of its being made; return whether launches are collected."""
    found = _collected.get()
    if found is None:
        return False
    found.append((device, launch, arguments))
    return True


def _launches_of(launches: Callable[[], object]) -> list[Launch]:
    found: list[Launch] = []
    token = _collected.set(found)
    try:
        launches()
    finally:
        _collected.reset(token)
    return found


def _compile_all(found: list[Launch]) -> None:
    if not found:
        return
    with ThreadPoolExecutor(len(found)) as pool:
        compiling = [pool.submit(_compile, *launch) for launch in found]
    for future in compiling:
        if future.exception() is not None:
            log.debug("not compiled ahead of its launch", exc_info=future.exception())


def _compile(device: torch.device, launch: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with on_device(device):  # a thread of its own begins with the first one
        launch(0, *arguments)  # no programs: Triton compiles and loads, and launches nothing


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
