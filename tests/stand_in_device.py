"""A GPU that does nothing, so that all the host does for it can be tested and timed on a CPU.

Kernels are chosen for an H100, generated, and launched through Triton's own code with tensors of
the CPU; only compiling and running them is left out. Results are whatever memory holds.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
import triton.backends.driver
import triton.compiler
import triton.compiler.compiler
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

# Imported before anything is patched: they would keep what they import.
from flasheva_compile import cache_ops, implementations, retrieval_cache_ops, vecinfer_ops  # noqa: F401

_CALLERS = (implementations, cache_ops)
# Newer launchers (Triton 3.9) get a kernel's own arguments in a tuple, those of 3.6 one by one.
_IN_ONE_TUPLE = hasattr(triton.backends.driver, "wrap_handle_tensordesc_impl")


class _Device:
    """What Triton asks a driver for."""

    utils = SimpleNamespace(
        fill_tma_descriptor=lambda *arguments: arguments[0],
        fill_tma_descriptor_tiled=lambda *arguments: arguments[0],  # Triton 3.9
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class _Compiled:
    """A compiled kernel up to the call of the driver."""

    function, packed_metadata = 1, ()

    def __init__(self, source: Any, launches: list[tuple[Any, ...]]) -> None:
        described = [x for x in source.signature.values() if str(x).startswith("tensordesc")]
        names = ("swizzle", "elem_size", "elem_type", "block_size", "fp4_padded")
        metadata = [dict.fromkeys(names, 0) for _ in described]
        name = source.fn.__name__

        def record(*arguments: Any) -> None:
            given = (*arguments[:-1], *arguments[-1]) if _IN_ONE_TUPLE else arguments
            launches.append((name, *given))

        launch = nvidia.wrap_handle_tensordesc(record, source.signature, metadata)

        def run(*arguments: Any) -> None:
            # What the launcher adds itself stands before its four arguments about the kernel.
            first, about, own = arguments[:5], arguments[5:9], arguments[9:]
            own = (own,) if _IN_ONE_TUPLE else own
            launch(*first, False, False, None, None, *about, *own)

        self.run = run

    def launch_metadata(self, *_: Any) -> None:
        return None


@contextmanager
def stand_in_device():
    """Run kernels nowhere; yields the list of launches, ``(kernel, programs, ...)``."""
    launches: list[tuple[Any, ...]] = []
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(_Device())

    def compiled(src, **_: Any):
        return _Compiled(src, launches)

    patches = [
        mock.patch.object(triton.compiler.compiler, "compile", compiled),
        mock.patch.object(triton.compiler, "compile", compiled),
        mock.patch.object(nvidia, "TMA_DTYPE_DEVICE_TO_HOST", {0: 0}),
        *(mock.patch.object(caller, "runs_kernels", return_value=True) for caller in _CALLERS),
    ]
    from flasheva_compile.lowering.load import load

    load.cache_clear()  # a launcher of real kernels belongs to a real device
    for patch in patches:
        patch.start()
    try:
        yield launches
    finally:
        for patch in patches:
            patch.stop()
        driver._active = before
        load.cache_clear()
