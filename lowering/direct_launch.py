"""Launches that repeat: straight to the compiled kernel, past Triton's search for it.

Triton inspects all arguments of a launch in several passes to find the binary, and hands tensors on
whose pointers the launcher then asks the driver about. A model's step repeats the same launches in
every layer: one pass over the arguments finds the binary that Triton chose for such arguments
before.
"""

from __future__ import annotations

from contextlib import nullcontext
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

may_compile: ContextVar[bool] = ContextVar("may_compile", default=True)
"""Whether a launch may compile its kernel; otherwise it raises ``Uncompiled``."""
_INT32 = 2**31
_INT64 = 2**63


class Uncompiled(Exception):  # noqa: N818 - no error: who forbids compiling catches it
    """A launch would have to compile its kernel, which ``may_compile`` forbids."""


def direct(launch: Callable[..., Any], function: Any) -> Callable[..., None]:  # noqa: ANN401
    """Return what launches a kernel, past Triton's search where that is understood.

    It is not where Triton interprets, nor on AMD, whose compiler looks at sizes, too.

    Args:
        launch: The generated module's ``launch``, which returns what Triton compiled.
        function: The Triton function.
    """
    from triton.runtime.jit import JITFunction

    compiles = isinstance(function, JITFunction) and torch.version.hip is None
    return DirectLaunch(launch) if compiles else launch


class DirectLaunch:
    """Launches one kernel: ``launch(programs, *arguments)``.

    Triton's choice of a binary depends on the device, on dtype and 16-byte alignment of each
    tensor, on whether an integer is 1, divides by 16 or needs 64 bits, and on the blocks of tensor
    descriptors. All of it is looked at in every launch; arguments that differ in any of it go
    through Triton, as do launches that a profiler has hooked.

    Args:
        launch: The generated module's ``launch``, which returns what Triton compiled.
    """

    __slots__ = ("_compiled", "_driver", "_launch", "_runtime")

    def __init__(self, launch: Callable[..., Any]) -> None:
        from triton import knobs
        from triton.runtime import driver

        self._launch = launch
        self._driver: Any = driver
        self._runtime: Any = knobs.runtime
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, programs: int, *arguments: Any) -> None:  # noqa: ANN401 - a kernel's own
        """Launch over so many programs, on the current device and stream."""
        active = self._driver.active
        device = active.get_current_device()
        key, values = _kinds(device, arguments)
        compiled = self._compiled.get(key)
        if compiled is None and not may_compile.get():
            raise Uncompiled
        if compiled is None or self._is_hooked():
            self._compiled[key] = self._launch(programs, *arguments)
            return
        stream = active.get_current_stream(device)
        function, metadata = compiled.function, compiled.packed_metadata
        compiled.run(programs, 1, 1, stream, function, metadata, None, None, None, *values)

    def _is_hooked(self) -> bool:
        """Whether something, such as a profiler, wants to hear of every launch."""
        runtime = self._runtime
        return _is_set(runtime.launch_enter_hook) or _is_set(runtime.launch_exit_hook)


def _is_set(hook: Any) -> bool:  # noqa: ANN401 - a chain of hooks, or a callable, or None
    return hook is not None and bool(getattr(hook, "calls", True))


def _kinds(device: int, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Any]]:
    """Return what the choice of a binary depends on, and the arguments with plain pointers."""
    key: list[Any] = [device]
    values = list(arguments)
    for n, x in enumerate(arguments):
        kind = type(x)
        if kind is int:
            key.append(_int_kind(x))
        elif kind is float:
            key.append(float)
        elif isinstance(x, Tensor):
            pointer, on_device = x.data_ptr(), x.is_cuda
            key += (x.dtype, on_device, pointer & 15)
            # Of a tensor in host memory the driver has to say whether the device can read it.
            if on_device:
                values[n] = pointer
        else:  # a tensor descriptor
            key.append(x.base.dtype)
            key += x.block_shape
    return tuple(key), values


@lru_cache(maxsize=4096)
def _int_kind(x: int) -> int:
    """Return 1 for 1, else a number that tells multiples of 16 and widths apart."""
    if x == 1:
        return 1
    kind = 2 if x & 15 else 4
    if -_INT32 <= x < _INT32:
        return kind
    return kind + (8 if -_INT64 <= x < _INT64 else 16)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make the tensors' device the current one, for Triton; it nearly always is."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
