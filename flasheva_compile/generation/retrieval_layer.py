"""One layer of the cache with retrieval: every key exactly, chunk tokens beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.cache_layer import FIRST_CHUNKS, EvaCacheLayer
from flasheva_compile.kernels.blocked.retrieval_state import RetrievalState
from flasheva_compile.retrieval_cache_ops import Store, new_retrieval_state, retrieval_options

if TYPE_CHECKING:
    from torch import Tensor

    from flasheva_compile.config import EvaConfig


class RetrievalCacheLayer(EvaCacheLayer):
    """What one retrieving attention keeps; see :class:`RetrievalState`.

    Args:
        path: The attention's module path, for messages.
        config: How it approximates.
        max_cache_len: Tokens to preallocate for; None = grow.

    Raises:
        ConfigError: The chunk rule is ``eva``, whose queries this cache does not keep.
    """

    state_type = RetrievalState
    store: ClassVar[Store] = "device"
    restored = ("selected", "start", "length")  # other tensors hold nothing beyond the length

    def __init__(self, path: str, config: EvaConfig, max_cache_len: int | None = None) -> None:
        super().__init__(path, config, max_cache_len)
        if config.chunk_rule == "eva":
            message = "chunk_rule='eva' with retrieve_chunks has no cache"
            hint = "pass use_cache=False, or choose another chunk rule"
            raise ConfigError(message, subject=path, hint=hint)

    def _new_state(self, k: Tensor, v: Tensor) -> RetrievalState:
        room = self.max_cache_len
        if room is None:
            room = k.shape[2] + FIRST_CHUNKS * self.config.chunk_size
        return new_retrieval_state(k, v, room, self._options(1.0, 0.0), store=self.store)

    def _options(self, scale: float, softcap: float) -> dict[str, Any]:
        return retrieval_options(self.config, scale, softcap)

    def _append(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - as of the op
        torch.ops.flasheva.retrieval_append(*args, **options)

    def _decode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        return torch.ops.flasheva.retrieval_decode(*args, **options)

    def _make_room(self, tokens: int) -> None:
        """Grow a layer that is not preallocated."""
        if self.max_cache_len is not None:
            return
        needed, room, c = self.seen + tokens, self.state.mask.shape[1], self.config.chunk_size
        if needed <= room:
            return
        more = max(needed, room + room // 4 + FIRST_CHUNKS * c) - room
        chunks = -(-(room + more) // c) - self.state.rfa_k.shape[2]
        self._extend({"keys": more, "values": more})
        if self.state.is_fp8:
            self._extend({"exponents": more})
        self._extend({"rfa_k": chunks, "rfa_v": chunks, "rfa_bias": chunks})
        if self.config.retrieve_by == "bounds":
            self._extend({"bounds": chunks})
        mask = torch.nn.functional.pad(self.state.mask, (0, more))
        self.state = self.state._replace(mask=mask)


class NearCopiesLayer(RetrievalCacheLayer):
    """A :class:`RetrievalCacheLayer` with copies of sinks and window, which are overwritten."""

    restored = (*RetrievalCacheLayer.restored, "near_k", "near_v")


class Fp8CacheLayer(NearCopiesLayer):
    """A :class:`RetrievalCacheLayer` whose store is fp8: selected chunks are read rounded.

    Sinks and window are exact, chunk tokens are pooled from exact keys. Each token and kv head has
    a power of two for its key and one for its value, so that nothing overflows.
    """

    store = "fp8"
