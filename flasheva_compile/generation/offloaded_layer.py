"""One layer of the cache with retrieval whose exact keys and values lie in host memory.

The device holds chunk tokens, masks, and copies of sinks and window. Kernels read the selected
chunks from the host in place: no step waits for the host, so steps can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flasheva_compile.generation.mapped_memory import mapped_zeros
from flasheva_compile.generation.retrieval_layer import NearCopiesLayer
from flasheva_compile.kernels.blocked.retrieval_state import RetrievalState

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_ON_HOST = ("keys", "values")


class OffloadedCacheLayer(NearCopiesLayer):
    """A :class:`RetrievalCacheLayer` that computes the same; see there for arguments and errors."""

    store = "offloaded"

    def _new_state(self, k: Tensor, v: Tensor) -> RetrievalState:
        shapes = super()._new_state(k.to("meta"), v.to("meta"))
        made = {
            name: (mapped_zeros if name in _ON_HOST else _zeros)(x.shape, x.dtype, k.device)
            for name, x in shapes._asdict().items()
        }
        return RetrievalState(**made)

    def host_nbytes(self) -> int:
        """Return the bytes of exact keys and values."""
        return sum(x.nbytes for x in self._host_tensors())

    def _host_tensors(self) -> list[Tensor]:
        return [] if self.state is None else [getattr(self.state, name) for name in _ON_HOST]

    def _extend(self, room: dict[str, int]) -> None:
        super()._extend({name: more for name, more in room.items() if name not in _ON_HOST})
        for name in room.keys() & set(_ON_HOST):
            x = getattr(self.state, name)
            shape = (*x.shape[:2], x.shape[2] + room[name], x.shape[3])
            grown = mapped_zeros(shape, x.dtype, x.device)
            grown[:, :, : x.shape[2]].copy_(x)
            self.state = self.state._replace(**{name: grown})

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        host = self._host_tensors()

        def change_in_place(x: Tensor) -> Tensor:
            if not any(x is kept for kept in host):
                return change(x)
            return _rows(x, change(torch.arange(x.shape[0])))

        super()._map_rows(change_in_place)

    def _clone(self, x: Tensor) -> Tensor:
        if any(x is kept for kept in self._host_tensors()):
            return _rows(x, torch.arange(x.shape[0]))
        return super()._clone(x)


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Return rows of a mapped tensor as another one, one after the other: the device holds none."""
    copied = mapped_zeros((len(index), *x.shape[1:]), x.dtype, x.device)
    for to, row in enumerate(index.tolist()):
        copied[to].copy_(x[row])
    return copied
