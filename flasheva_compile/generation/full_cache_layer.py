"""What cache layers have in common whose attention stays full."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.state_layer import StateLayer

if TYPE_CHECKING:
    from torch import Tensor


class FullCacheLayer(StateLayer):
    """What one full attention keeps: the first call attends as the model itself, others here.

    ``seen`` counts the columns of a preallocated layer, too, as far as no captured graph appended
    them: enough to notice a lack of room before it is too late.
    """

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
        self.expect_room(key_states.shape[2])
        return new

    def expect_room(self, tokens: int) -> None:
        """Refuse more new tokens than there is room for."""
        if self.max_cache_len is None:
            return
        if not torch.compiler.is_compiling():
            tokens += self.seen
        if tokens > self.max_cache_len:
            message = f"{tokens} tokens in a cache of {self.max_cache_len}"
            raise ConfigError(message, subject=self.path, hint="give a larger max_cache_len")

    @abstractmethod
    def append(self, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """Store the first tokens.

        Args:
            k: ``[B, Hkv, L, D]``.
            v: ``[B, Hkv, L, Dv]``.
            mask: Of every column, ``[B or 1, columns]`` bool; None = all valid.
        """

    @abstractmethod
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

    @abstractmethod
    def expect_croppable(self, tokens_to_remove: int) -> Any:  # noqa: ANN401 - what crop needs
        """Raise what :meth:`crop` raises."""

    def _columns_of(self, mask: Tensor, columns: Tensor) -> Tensor:
        """Return columns ``[L]`` of the mask of a preallocated layer, ``[B or 1, L]``."""
        assert self.max_cache_len is not None
        if mask.shape[1] < self.max_cache_len:
            message = f"a mask of {mask.shape[1]} columns for a cache of {self.max_cache_len}"
            raise ConfigError(message, subject=self.path)
        # A captured graph may go on beyond the room: what it reads then must exist.
        return mask.index_select(1, columns.clamp_max(mask.shape[1] - 1))
