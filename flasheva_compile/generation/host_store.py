"""The exact keys and values of a retrieving layer in host memory, fetched chunk by chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.kernels.blocked.retrieval_block import gather_chunks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class HostStore:
    """Keys, values and mask by column, on the host; pinned where the layer is on a GPU.

    A fetch gathers whole chunks into a pinned buffer and copies that on a stream of its own, so
    that what runs meanwhile on the current stream hides the copy. On a CPU the same code copies
    plain memory.

    Args:
        k: Any keys of the layer, ``[B, Hkv, *, D]``: gives sizes, dtype and device.
        v: Any values, ``[B, Hkv, *, Dv]``.
        columns: Tokens to make room for.
    """

    def __init__(self, k: Tensor, v: Tensor, columns: int) -> None:
        self.device, self.pinned = k.device, k.device.type == "cuda"
        self.length = 0
        head = k.shape[:2]
        self.keys = self._new(*head, columns, k.shape[3], dtype=k.dtype)
        self.values = self._new(*head, columns, v.shape[3], dtype=v.dtype)
        self.mask = self._new(head[0], columns, dtype=torch.bool)
        self.stream: Any = torch.cuda.Stream(self.device) if self.pinned else None
        self.staged: dict[str, Tensor] = {}

    def _new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, pin_memory=self.pinned)

    def append(self, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
        """Copy new tokens behind the others; more room is made in steps of a quarter."""
        tokens, room = k.shape[2], self.keys.shape[2]
        first, self.length = self.length, self.length + tokens
        if self.length > room:
            self._grow(max(self.length, room + room // 4) - room)
        self.keys[:, :, first : self.length].copy_(k)
        self.values[:, :, first : self.length].copy_(v)
        self.mask[:, first : self.length].copy_(
            torch.tensor(True) if key_mask is None else key_mask
        )

    def _grow(self, more: int) -> None:
        for name in ("keys", "values", "mask"):
            x, at = getattr(self, name), 1 if name == "mask" else 2
            shape = [more if axis == at else size for axis, size in enumerate(x.shape)]
            whole = torch.cat([x, torch.zeros(shape, dtype=x.dtype)], at)
            setattr(self, name, whole.pin_memory() if self.pinned else whole)

    def fetch(self, first: Tensor, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Begin to copy chunks; :meth:`wait` before the results are read.

        Args:
            first: ``[B, Hkv, n]`` int64 on the host, each chunk's first column; negative ones are
                masked.
            chunk_size: Keys of a chunk.

        Returns:
            Keys ``[B, Hkv, n c, D]``, values, and whether each is a key, ``[B, Hkv, n c]``.
        """
        batch, heads, n = first.shape
        at = first.clamp(0, self.keys.shape[2] - chunk_size)
        columns = (at[..., None] + torch.arange(chunk_size)).flatten(2)
        row = torch.arange(batch)[:, None, None]
        valid = self.mask[row, columns] & (first >= 0).repeat_interleave(chunk_size, 2)
        found = []
        for name, source in (("keys", self.keys), ("values", self.values)):
            shape = (batch, heads, n * chunk_size, source.shape[3])
            out = self._staging(name, shape, source.dtype)
            gather_chunks(source, at, chunk_size, out)
            found.append(self._to_device(out))
        mask = self._staging("mask", valid.shape, torch.bool).copy_(valid)
        return found[0], found[1], self._to_device(mask)

    def _staging(self, name: str, shape: Any, dtype: torch.dtype) -> Tensor:  # noqa: ANN401
        if name not in self.staged or self.staged[name].shape != shape:
            self.staged[name] = self._new(*shape, dtype=dtype)
        return self.staged[name]

    def _to_device(self, staged: Tensor) -> Tensor:
        if not self.pinned:
            return staged.clone()
        with torch.cuda.stream(self.stream):
            return staged.to(self.device, non_blocking=True)

    def wait(self, *fetched: Tensor) -> None:
        """Let the current stream wait for copies, and keep their memory until it has read them."""
        if self.pinned:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for x in fetched:
                x.record_stream(current)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the rows of all tensors."""
        for name in ("keys", "values", "mask"):
            x = change(getattr(self, name))
            setattr(self, name, x.pin_memory() if self.pinned else x)

    def nbytes(self) -> int:
        """Return the bytes of keys, values and mask."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values, self.mask))
