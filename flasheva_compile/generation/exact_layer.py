"""One layer of a preallocated cache whose attention stays full: every key and value as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.cache_ops import cache_options, new_state
from flasheva_compile.config import EvaConfig
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.cache_layer import NoGradient
from flasheva_compile.generation.state_layer import StateLayer, expect_boolean
from flasheva_compile.kernels.blocked.cache_state import CacheState

if TYPE_CHECKING:
    from torch import Tensor


class ExactCacheLayer(StateLayer):
    """What one full attention keeps: a :class:`CacheState` whose window is all there is room for.

    The first call attends by the model's own function. Later calls attend by ``flasheva::decode``,
    which reads the tokens that there are, not those that there is room for; where it is asked for
    more, it returns NaN. Whether a token may be attended is what the mask said when it came, as in
    :class:`EvaCacheLayer`: later masks say nothing about it.

    Args:
        path: The attention's module path, for messages.
        max_cache_len: Tokens to preallocate for.
    """

    state_type = CacheState
    max_cache_len: int

    def __init__(self, path: str, max_cache_len: int) -> None:
        super().__init__(path, max_cache_len)
        # One block without room for chunk tokens behind it: `seen` counts the columns that no
        # graph appended, enough to notice a lack of room before it is too late.
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

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *_: Any,  # noqa: ANN401 - what other layers take
        **__: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values; the attention that follows appends them.

        Raises:
            ConfigError: No attention of a prepared model follows, or there is no room. Where a
                captured graph went on beyond the room, the attention returns NaN instead.
        """
        new = super().update(key_states, value_states)
        expect_room(self, key_states.shape[2])
        return new

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
        if tokens_to_remove > 0:
            message = f"crop({tokens_to_remove}): a number of tokens to remove is negative"
            raise ConfigError(message, subject=self.path)
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
        """Store the first tokens.

        Args:
            k: ``[B, Hkv, L, D]``.
            v: ``[B, Hkv, L, Dv]``.
            mask: Of every column, ``[B or 1, columns]`` bool; None = all valid.
        """
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
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens and attend from them to all so far.

        Args:
            qkv: Queries ``[B, Hq, L, D]``, new keys ``[B, Hkv, L, D]`` and values
                ``[B, Hkv, L, Dv]``.
            mask: As of :meth:`append`.
            scale: Score scale.
            softcap: ``softcap * tanh(score / softcap)``; 0 = none.

        Returns:
            ``out [B, Hq, L, Dv]`` and ``lse [B, Hq, L]``.
        """
        query, k, v = qkv
        key_mask = self._arrived(k, v, mask)
        options = cache_options(self.config, scale, softcap)
        new = (x.detach() if x.requires_grad else x for x in qkv)
        out, lse = torch.ops.flasheva.decode(*new, [], key_mask, *self.state, **options)
        if torch.is_grad_enabled() and query.requires_grad:
            out = NoGradient.apply(out, query)
        return out, lse  # pyright: ignore[reportReturnType]

    def _arrived(self, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor | None:
        """Allocate and count; return which new columns are valid, ``[B, L]``; None = all."""
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        key_mask = None if mask is None else self._columns_of(mask, k)
        self.is_empty = False
        if not torch.compiler.is_compiling():
            self.seen += k.shape[2]
        return key_mask

    def _columns_of(self, mask: Tensor, k: Tensor) -> Tensor:
        expect_boolean(mask, self.path)
        if mask.shape[1] < self.max_cache_len:
            message = f"a mask of {mask.shape[1]} columns for a cache of {self.max_cache_len}"
            raise ConfigError(message, subject=self.path)
        columns = self.state.length + torch.arange(k.shape[2], device=k.device)
        # A captured graph may go on beyond the room: what it reads then must exist.
        columns = columns.clamp_max(mask.shape[1] - 1)
        return mask.index_select(1, columns).expand(k.shape[0], -1)


def expect_room(layer: Any, tokens: int) -> None:  # noqa: ANN401 - a preallocated cache layer
    """Refuse more new tokens than there is room for behind those that no graph appended."""
    if not torch.compiler.is_compiling():
        tokens += layer.seen
    if tokens > layer.max_cache_len:
        message = f"{tokens} tokens in a cache of {layer.max_cache_len}"
        raise ConfigError(message, subject=layer.path, hint="give a larger max_cache_len")
