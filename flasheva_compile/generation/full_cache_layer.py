"""What cache layers have in common whose attention stays full."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.state_layer import StateLayer

if TYPE_CHECKING:
    from torch import Tensor


class FullCacheLayer(StateLayer):
    """What one full attention keeps: the first call attends as the model itself, others here."""

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
        alibi_slopes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens and attend from them to all so far.

        Args:
            qkv: Queries ``[B, Hq, L, D]``, new keys ``[B, Hkv, L, D]`` and values
                ``[B, Hkv, L, Dv]``.
            mask: As of :meth:`append`.
            scale: Score scale.
            softcap: ``softcap * tanh(score / softcap)``; 0 = none.
            alibi_slopes: ``[Hq]``; adds ``slope * (key position - query position)``.

        Returns:
            ``out [B, Hq, L, Dv]`` and ``lse [B, Hq, L]``.
        """

    def _columns_of(self, mask: Tensor, columns: Tensor) -> Tensor:
        """Return columns ``[L]`` of the mask of a preallocated layer, ``[B or 1, L]``."""
        assert self.max_cache_len is not None
        if mask.shape[1] < self.max_cache_len:
            message = f"a mask of {mask.shape[1]} columns for a cache of {self.max_cache_len}"
            raise ConfigError(message, subject=self.path)
        # A captured graph may go on beyond the room: what it reads then must exist.
        return mask.index_select(1, columns.clamp_max(mask.shape[1] - 1))
