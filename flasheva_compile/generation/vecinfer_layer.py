"""One layer of the cache whose attention stays full: old tokens as codes, the last ones exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from flasheva_compile import _torch_compat as compat
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.cache_layer import NoGradient
from flasheva_compile.quantization.state import QuantizedState, can_crop, new_state, ring_size
from flasheva_compile.vecinfer_ops import op_books, vecinfer_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from flasheva_compile.quantization.formats import KvStorage
    from flasheva_compile.quantization.state import Codec

_FIRST_ROOM = 256  # codes that a growing layer has room for beyond its first tokens


class VecInferLayer(CacheLayerMixin):
    """What one full attention keeps; see :class:`QuantizedState`.

    The first call attends in full precision by the model's own function; what it leaves behind is
    quantised. Later calls attend to codes, by ``flasheva::vecinfer_decode``. ``update`` returns the
    new keys and values as they are: so the layer works only under an attention of a prepared model.

    Args:
        path: The attention's module path, for messages.
        codec: Writes and reads codes; on the device of the attention.
        storage: What is exact.
        max_cache_len: Tokens to preallocate for; None = grow.
        dtype: Of keys and values, as far as known: codebooks for others are made at the first call.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        path: str,
        codec: Codec,
        storage: KvStorage,
        max_cache_len: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.path, self.codec, self.storage = path, codec, storage
        self.max_cache_len, self.is_compileable = max_cache_len, max_cache_len is not None
        self.options = vecinfer_options(codec, storage, 1.0)
        self._prepare_books(dtype)
        self.state: QuantizedState | None = None
        self.is_empty = True
        # Columns, padding included. Of a preallocated layer `columns` [1] counts them on its
        # device, and `seen` only those that no graph appended: enough to notice a lack of room.
        self.seen = 0
        self.columns: Tensor | None = None
        self.most_seen = 0  # columns before the last rollback, the most there were
        self.announced = False
        self.recent: Tensor | None = None  # [B, ring] bool: whether column c is valid, at c % ring

    def __repr__(self) -> str:
        s = self.storage
        return f"VecInferLayer({self.path}: {s.format}, exact {s.sink_tokens} + {s.exact_tokens})"

    # --- what transformers calls ------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the first tokens."""
        k, v = key_states.detach(), value_states.detach()
        self.dtype, self.device, self.batch_size = k.dtype, k.device, k.shape[0]
        if k.dtype != self.books_dtype:
            self._prepare_books(k.dtype)
        tokens = self.max_cache_len or k.shape[2] + _FIRST_ROOM
        room = max(0, tokens - self.storage.sink_tokens)
        self.state = new_state(k, v, self.codec, self.storage, room)
        ring = ring_size(self.storage)
        self.recent = torch.ones(k.shape[0], ring, dtype=torch.bool, device=k.device)
        if self.max_cache_len is not None:
            self.columns = torch.zeros(1, dtype=torch.long, device=k.device)
            compat.mark_static_addresses([*self.state, self.recent, self.columns, *self.books])
        self.keys = self.values = k.new_empty(0)  # models ask whether there are any
        self.is_initialized = True

    @torch.compiler.disable()
    def _prepare_books(self, dtype: torch.dtype) -> None:
        self.books, self.books_dtype = op_books(self.codec, dtype), dtype

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
        if not self.announced:
            raise ConfigError(
                "its quantised cache was updated outside of a prepared attention",
                subject=self.path,
                hint="pass the cache to the model that FlashEvaCache.for_model was called with",
            )
        self.announced = False
        if self.max_cache_len is not None and not torch.compiler.is_compiling():
            tokens = self.seen + key_states.shape[2]
            if tokens > self.max_cache_len:
                message = f"{tokens} tokens in a cache of {self.max_cache_len}"
                raise ConfigError(message, subject=self.path, hint="give a larger max_cache_len")
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns that the two-dimensional mask covers, and 0."""
        if self.max_cache_len is not None:
            return self.max_cache_len, 0
        return self.seen + query_length, 0

    def get_seq_length(self) -> Any:  # noqa: ANN401 - as of transformers' own preallocated layers
        """Return the tokens seen: an int, or a tensor if preallocated."""
        if self.max_cache_len is None:
            return self.seen
        return self.columns[0] if self.columns is not None else 0

    def get_max_length(self) -> int:
        """Return the tokens there is room for, -1 = any number."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def reset(self) -> None:
        """Forget everything, in place."""
        self.is_empty, self.seen, self.announced, self.most_seen = True, 0, False, 0
        for x in self._tensors():
            x.zero_()

    def _tensors(self) -> list[Tensor]:
        """Return what changes as tokens arrive."""
        if self.state is None:
            return []
        assert self.recent is not None
        return [*self.state, self.recent, *(() if self.columns is None else (self.columns,))]

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
        old = (*self.state, self.recent)
        new = [change(x) for x in old]
        if self.max_cache_len is not None and new[-1].shape == self.recent.shape:
            for x, changed in zip(old, new, strict=True):
                x.copy_(changed)  # captured CUDA graphs know these addresses
            return
        self.state, self.recent = QuantizedState(*new[:-1]), new[-1]
        self.batch_size = self.recent.shape[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> VecInferLayer:
        copy = type(self)(self.path, self.codec, self.storage, self.max_cache_len, self.books_dtype)
        memo[id(self)] = copy
        vars(copy).update(vars(self))  # nothing writes codebooks: both read the same
        if self.state is not None:
            assert self.recent is not None
            # Tensors that an op returned cannot be deep-copied where gradients are on.
            copy.state = QuantizedState(*(x.detach().clone() for x in self.state))
            copy.recent = self.recent.clone()
            copy.columns = None if self.columns is None else self.columns.clone()
        return copy

    def offload(self) -> None:
        """Stay: the attention reads the state after ``update``, when transformers offloads."""

    def prefetch(self) -> None:
        """Do nothing: the state has not left its device."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; later results are as if they never were.

        Raises:
            ConfigError: So many that tokens would be read exactly which only codes are left of.
        """
        tokens = self.expect_croppable(tokens_to_remove)
        if tokens is None:
            return
        assert self.state is not None
        self.state.length.sub_(tokens)
        seen = self._columns_so_far()
        self.seen, self.most_seen = seen + tokens_to_remove, max(seen, self.most_seen)
        if self.columns is not None:
            self.columns.fill_(self.seen)
        self.is_empty = self.seen == 0

    def expect_croppable(self, tokens_to_remove: int) -> Tensor | None:
        """Raise what :meth:`crop` raises; return what each row forgets, ``[B]``, None = nothing."""
        if tokens_to_remove > 0:
            message = f"crop({tokens_to_remove}): a number of tokens to remove is negative"
            raise ConfigError(message, subject=self.path)
        if tokens_to_remove == 0 or self.state is None:
            return None
        assert self.recent is not None
        count, ring = -tokens_to_remove, self.recent.shape[1]
        seen = self._columns_so_far()
        most = max(seen, self.most_seen)
        # What the ring knows of: nothing before the last `ring` columns that there ever were.
        known = count <= seen - max(0, most - ring)
        slots = torch.arange(seen - count, seen, device=self.recent.device) % ring
        tokens = self.recent[:, slots].sum(1)
        if not known or not can_crop(self.state, self.storage, tokens):
            raise ConfigError(
                f"crop({tokens_to_remove}) of {seen} tokens: what became codes cannot be restored",
                subject=self.path,
                hint="prefill a new cache",
            )
        return tokens

    def _columns_so_far(self) -> int:
        return self.seen if self.columns is None else int(self.columns)

    # --- attention --------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """Store the first tokens.

        Args:
            k: ``[B, Hkv, L, D]``.
            v: ``[B, Hkv, L, Dv]``.
            mask: Of every column, ``[B, columns]`` bool; None = all valid.
        """
        key_mask = self._arrived(k, v, mask)
        assert self.state is not None
        new = (k.detach(), v.detach(), key_mask)
        torch.ops.flasheva.vecinfer_append(*new, self.books, *self.state, **self.options)

    def attend(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens and attend from them; see :func:`append_and_attend`."""
        query, k, v = qkv
        key_mask = self._arrived(k, v, mask)
        assert self.state is not None
        options = {**self.options, "scale": scale, "softcap": softcap}
        new = (x.detach() if x.requires_grad else x for x in qkv)
        out, lse = torch.ops.flasheva.vecinfer_decode(
            *new, key_mask, self.books, *self.state, **options
        )
        if torch.is_grad_enabled() and query.requires_grad:
            out = NoGradient.apply(out, query)
        return out, lse  # pyright: ignore[reportReturnType]

    def _arrived(self, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor | None:
        """Make room and count columns; return which new ones are valid, ``[B, L]``; None = all."""
        if mask is not None and mask.dtype != torch.bool:
            message = "packed documents cannot be appended to a cache"
            raise ConfigError(message, subject=self.path, hint="pass use_cache=False")
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        tokens, key_mask = k.shape[2], None
        if self.columns is None:
            columns = torch.arange(self.seen, self.seen + tokens, device=k.device)
        else:
            columns = self.columns + torch.arange(tokens, device=k.device)
        if mask is not None and self.columns is None:
            key_mask = mask[:, self.seen : self.seen + tokens].expand(k.shape[0], -1)
        elif mask is not None:
            key_mask = self._columns_of(mask, columns).expand(k.shape[0], -1)
        self._note(columns, key_mask)
        self.is_empty = False
        if self.columns is None or not torch.compiler.is_compiling():
            self.seen += tokens
        self._make_room()
        return key_mask

    def _columns_of(self, mask: Tensor, columns: Tensor) -> Tensor:
        """Return columns of the mask of a preallocated layer, ``[B or 1, L]``."""
        assert self.max_cache_len is not None
        if mask.shape[1] < self.max_cache_len:
            message = f"a mask of {mask.shape[1]} columns for a cache of {self.max_cache_len}"
            raise ConfigError(message, subject=self.path)
        # A captured graph may go on beyond the room: what it reads then must exist.
        return mask.index_select(1, columns.clamp_max(mask.shape[1] - 1))

    def _note(self, columns: Tensor, key_mask: Tensor | None) -> None:
        """Count new columns, ``[L]``, and remember which of the last ones are valid."""
        assert self.recent is not None
        ring = self.recent.shape[1]
        slots = columns[-ring:] % ring
        if key_mask is None:
            self.recent.index_fill_(1, slots, True)
        else:
            self.recent.index_copy_(1, slots, key_mask[:, -ring:])
        if self.columns is not None:
            self.columns.add_(columns.shape[0])

    def _make_room(self) -> None:
        """Grow the codes of a layer that is not preallocated."""
        assert self.state is not None
        if self.max_cache_len is not None:
            return
        room = self.state.key_codes.shape[2]
        needed = self.seen - self.storage.sink_tokens
        if needed <= room:
            return
        more = max(needed, room + room // 4 + _FIRST_ROOM) - room
        pad = torch.nn.functional.pad
        coded = ("key_codes", "value_codes", "exponents")
        grown = {name: pad(getattr(self.state, name), (0, 0, 0, more)) for name in coded}
        self.state = self.state._replace(**grown)
