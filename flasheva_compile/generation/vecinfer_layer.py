"""One layer of the cache whose attention stays full: old tokens as codes, the last ones exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.cache_layer import NoGradient
from flasheva_compile.quantization.attention import append_and_attend
from flasheva_compile.quantization.state import QuantizedState, append, crop, new_state, ring_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from flasheva_compile.quantization.formats import KvStorage
    from flasheva_compile.quantization.state import Codec

_FIRST_ROOM = 256  # codes that a growing layer has room for beyond its first tokens


class VecInferLayer(CacheLayerMixin):
    """What one full attention keeps; see :class:`QuantizedState`.

    The first call attends in full precision by the model's own function; what it leaves behind is
    quantised. Later calls attend to codes. ``update`` returns the new keys and values as they are:
    so the layer works only under an attention of a prepared model.

    Args:
        path: The attention's module path, for messages.
        codec: Writes and reads codes.
        storage: What is exact.
        max_cache_len: Tokens to preallocate for; None = grow.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False
    is_compileable = False  # `append` and `attend` ask how many tokens there are

    def __init__(
        self, path: str, codec: Codec, storage: KvStorage, max_cache_len: int | None = None
    ) -> None:
        super().__init__()
        self.path, self.codec, self.storage = path, codec, storage
        self.max_cache_len = max_cache_len
        self.state: QuantizedState | None = None
        self.is_empty = True
        self.seen = 0  # columns, padding included
        self.announced = False
        self.recent: Tensor | None = None  # [B, columns] bool: which of the last ones are valid

    def __repr__(self) -> str:
        s = self.storage
        return f"VecInferLayer({self.path}: {s.format}, exact {s.sink_tokens} + {s.exact_tokens})"

    # --- what transformers calls ------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the first tokens."""
        k, v = key_states.detach(), value_states.detach()
        self.dtype, self.device, self.batch_size = k.dtype, k.device, k.shape[0]
        tokens = self.max_cache_len or k.shape[2] + _FIRST_ROOM
        room = max(0, tokens - self.storage.sink_tokens)
        self.state = new_state(k, v, self.codec, self.storage, room)
        self.recent = torch.ones(k.shape[0], 0, dtype=torch.bool, device=k.device)
        self.keys = self.values = k.new_empty(0)  # models ask whether there are any
        self.is_initialized = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *_: Any,  # noqa: ANN401 - what other layers take
        **__: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values; the attention that follows appends them.

        Raises:
            ConfigError: No attention of a prepared model follows, or there is no room.
        """
        if not self.announced:
            raise ConfigError(
                "its quantised cache was updated outside of a prepared attention",
                subject=self.path,
                hint="pass the cache to the model that FlashEvaCache.for_model was called with",
            )
        self.announced = False
        tokens = self.seen + key_states.shape[2]
        if self.max_cache_len is not None and tokens > self.max_cache_len:
            message = f"{tokens} tokens in a cache of {self.max_cache_len}"
            raise ConfigError(message, subject=self.path, hint="give a larger max_cache_len")
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns that the two-dimensional mask covers, and 0."""
        return self.max_cache_len or self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Return the tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """Return the tokens there is room for, -1 = any number."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def reset(self) -> None:
        """Forget everything, in place."""
        self.is_empty, self.seen, self.announced = True, 0, False
        if self.state is not None:
            assert self.recent is not None
            self.recent = self.recent[:, :0]
            for x in self.state:
                x.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self._map_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._map_rows(lambda x: x.repeat_interleave(repeats, 0))

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is None:
            return
        assert self.recent is not None
        self.state = QuantizedState(*(change(x) for x in self.state))
        self.recent = change(self.recent)
        self.batch_size = self.recent.shape[0]

    def offload(self) -> None:
        """Stay: the attention reads the state after ``update``, when transformers offloads."""

    def prefetch(self) -> None:
        """Do nothing: the state has not left its device."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; later results are as if they never were.

        Raises:
            ConfigError: So many that tokens would be read exactly which only codes are left of.
        """
        if tokens_to_remove > 0:
            message = f"crop({tokens_to_remove}): a number of tokens to remove is negative"
            raise ConfigError(message, subject=self.path)
        if tokens_to_remove == 0 or self.state is None:
            return
        assert self.recent is not None
        removed = self.recent[:, tokens_to_remove:]
        known = -tokens_to_remove <= self.recent.shape[1]
        if not known or not crop(self.state, self.storage, removed.sum(1)):
            raise ConfigError(
                f"crop({tokens_to_remove}) of {self.seen} tokens: what became codes cannot be "
                "restored",
                subject=self.path,
                hint="prefill a new cache",
            )
        self.recent = self.recent[:, :tokens_to_remove]
        self.seen += tokens_to_remove
        self.is_empty = self.seen == 0

    # --- attention --------------------------------------------------------------------------------

    @torch.compiler.disable()
    def append(self, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """Store the first tokens.

        Args:
            k: ``[B, Hkv, L, D]``.
            v: ``[B, Hkv, L, Dv]``.
            mask: Of every column, ``[B, columns]`` bool; None = all valid.
        """
        valid = self._arrived(k, v, mask)
        assert self.state is not None
        append(self.state, self.codec, self.storage, (k.detach(), v.detach()), valid)

    @torch.compiler.disable()
    def attend(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens and attend from them; see :func:`append_and_attend`."""
        query, k, v = qkv
        valid = self._arrived(k, v, mask)
        assert self.state is not None
        new = (query.detach(), k.detach(), v.detach())
        state, codec, storage = self.state, self.codec, self.storage
        out, lse = append_and_attend(new, valid, state, codec, storage, scale, softcap)
        if torch.is_grad_enabled() and query.requires_grad:
            out = NoGradient.apply(out, query)
        return out, lse  # pyright: ignore[reportReturnType]

    def _arrived(self, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Make room and count columns; return which new ones are valid, ``[B, L]``."""
        if mask is not None and mask.dtype != torch.bool:
            message = "packed documents cannot be appended to a cache"
            raise ConfigError(message, subject=self.path, hint="pass use_cache=False")
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        assert self.recent is not None
        tokens = k.shape[2]
        if mask is None:
            valid = self.recent.new_ones(k.shape[0], tokens)
        else:
            valid = mask[:, self.seen : self.seen + tokens].expand(k.shape[0], -1)
        self.seen += tokens
        self.is_empty = False
        self._make_room()
        self.recent = torch.cat([self.recent, valid], 1)[:, -ring_size(self.storage) :]
        return valid

    def _make_room(self) -> None:
        assert self.state is not None
        room = self.state.key_codes.shape[2]
        needed = self.seen - self.storage.sink_tokens
        if needed <= room:
            return
        more = max(needed, room + room // 4 + _FIRST_ROOM) - room
        pad = torch.nn.functional.pad
        key_codes, value_codes = (
            pad(x, (0, 0, 0, more)) for x in (self.state.key_codes, self.state.value_codes)
        )
        self.state = self.state._replace(key_codes=key_codes, value_codes=value_codes)
