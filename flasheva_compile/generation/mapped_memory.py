"""Host memory that a GPU reads and writes where it lies: tensors of the GPU, bytes of the host."""

from __future__ import annotations

import math
import mmap
import weakref
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class _Pages:
    """Anonymous pages of the host, registered with one GPU until nothing refers to them.

    Pages of their own, for registering a part of a page that is registered fails; not PyTorch's
    pinned allocator, which rounds sizes up to powers of two.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        try:
            self.buffer = mmap.mmap(-1, size)
        except OSError as error:
            raise _lack(size, str(error)) from error
        self.host = torch.frombuffer(self.buffer, dtype=torch.uint8)
        address = self.host.data_ptr()
        with torch.cuda.device(device):
            status = int(_runtime().cudaHostRegister(address, size, 0))
        if status:
            raise _lack(size, f"CUDA error {status}")
        # When the interpreter exits, the driver does it: PyTorch may be gone by then.
        weakref.finalize(self, _unregister, address, device).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        address = self.host.data_ptr()
        return {
            "shape": (self.host.numel(),),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 2,
        }


def _unregister(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # kernels in flight may still read
    _runtime().cudaHostUnregister(address)


def _lack(size: int, reason: str) -> ConfigError:
    return ConfigError(
        f"{size >> 20} MiB of host memory cannot be locked ({reason})",
        subject='store="offloaded"',
        hint="raise the limit of locked memory, free host memory, or keep the store on the device",
    )


def _runtime() -> Any:  # noqa: ANN401 - a module of bindings without types
    return torch.cuda.cudart()


def mapped_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros of ``device`` that take no memory on it.

    On a GPU every access goes to the host's memory over the bus: copy little, and let kernels read
    few rows. On a CPU these are zeros like any.

    Args:
        shape: Sizes.
        dtype: Of the tensor.
        device: On which it is used.

    Raises:
        ConfigError: The host does not lock as much memory.
    """
    if device.type != "cuda":
        return torch.zeros(*shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(*shape, dtype=dtype, device=device)
    # The tensor keeps the pages: it holds a reference to what it was made from.
    return torch.as_tensor(_Pages(size, device), device=device).view(dtype).view(*shape)
