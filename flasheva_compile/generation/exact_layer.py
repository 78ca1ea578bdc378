"""One layer of a preallocated cache whose attention stays full: every key and value as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flasheva_compile.cache_ops import cache_options, new_state
from flasheva_compile.config import EvaConfig
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.full_cache_layer import FullCacheLayer
from flasheva_compile.generation.state_layer import without_gradient
from flasheva_compile.kernels.blocked.cache_state import CacheState

if TYPE_CHECKING:
    from torch import Tensor


class ExactCacheLayer(FullCacheLayer):
    """Every key and value: a :class:`CacheState` whose window is all there is room for.

    Later calls attend by ``flasheva::decode``, which reads the tokens that there are, not those
    that there is room for; where it is asked for more, it returns NaN. Whether a token may be
    attended is what the mask said when it came, as in :class:`EvaCacheLayer`: later masks say
    nothing about it.

    Args:
        path: The attention's module path, for messages.
        max_cache_len: Tokens to preallocate for.
    """

    state_type = CacheState
    max_cache_len: int

    def __init__(self, path: str, max_cache_len: int) -> None:
        super().__init__(path, max_cache_len)
        # One block without room for chunk tokens behind it.
        self.config = EvaConfig(
            window_size=max_cache_len,
            chunk_size=max_cache_len,
            sink_tokens=0,
            chunk_rule="mean",
            window="block",
        )

    def __repr__(self) -> str:
        return f"ExactCacheLayer({self.path}: {self.max_cache_len} tokens)"

    def _new_state(self, k: Tensor, v: Tensor) -> CacheState:
        return new_state(k, v, 0, cache_options(self.config, 1.0))

    # --- rollback ---------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; later results are as if they never were.

        Raises:
            ConfigError: There are not so many, or more came than there was room for.
        """
        seen = self.expect_croppable(tokens_to_remove)
        if tokens_to_remove == 0 or self.state is None:
            return
        self.state.length.add_(tokens_to_remove)
        self.state.start.clamp_(max=self.state.length)  # of rows that had not begun by then
        self.seen = seen + tokens_to_remove
        self.is_empty = self.seen == 0

    def expect_croppable(self, tokens_to_remove: int) -> int:
        """Raise what :meth:`crop` raises; return how many tokens there are."""
        self._expect_removal(tokens_to_remove)
        if tokens_to_remove == 0:
            return self.seen
        seen = 0 if self.state is None else int(self.state.length)
        if -tokens_to_remove > seen or seen > self.max_cache_len:
            message = f"crop({tokens_to_remove}) of {seen} tokens in a cache of "
            message += str(self.max_cache_len)
            raise ConfigError(message, subject=self.path, hint="prefill a new cache")
        return seen

    # --- attention --------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """Store the first tokens."""
        key_mask = self._arrived(k, v, mask)
        k, v = k.detach(), v.detach()
        options = cache_options(self.config, 1.0)
        torch.ops.flasheva.cache_append(k, k, v, [], key_mask, *self.state, **options)

    def attend(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        scale: float,
        softcap: float,
        alibi_slopes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens and attend from them to all so far."""
        query, k, v = qkv
        key_mask = self._arrived(k, v, mask)
        options = cache_options(self.config, scale, softcap)
        new = (x.detach() if x.requires_grad else x for x in qkv)
        out, lse = torch.ops.flasheva.decode(
            *new, [], key_mask, *self.state, **options, alibi_slopes=alibi_slopes
        )
        return without_gradient(out, query), lse

    def _arrived(self, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor | None:
        """Allocate and count; return which new columns are valid, ``[B, L]``; None = all."""
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        key_mask = None
        if mask is not None:
            self._expect_columns(mask)
            columns = self.state.length + torch.arange(k.shape[2], device=k.device)
            key_mask = self._columns_of(mask, columns).expand(k.shape[0], -1)
        self._count(k.shape[2])
        return key_mask
