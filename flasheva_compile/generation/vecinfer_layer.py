"""One layer of the cache whose attention stays full: old tokens as codes, the last ones exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile import _torch_compat as compat
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.full_cache_layer import FullCacheLayer
from flasheva_compile.generation.state_layer import without_gradient
from flasheva_compile.quantization.state import QuantizedState, can_crop, new_state, ring_size
from flasheva_compile.vecinfer_ops import op_books, vecinfer_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from flasheva_compile.quantization.formats import KvStorage
    from flasheva_compile.quantization.state import Codec

_FIRST_ROOM = 256  # codes that a growing layer has room for beyond its first tokens


class VecInferLayer(FullCacheLayer):
    """Keys and values in codes; see :class:`QuantizedState`.

    The first call attends in full precision; what it leaves behind is quantised. Later calls attend
    to codes, by ``flasheva::vecinfer_decode``.

    Args:
        path: The attention's module path, for messages.
        codec: Writes and reads codes; on the device of the attention.
        storage: What is exact.
        max_cache_len: Tokens to preallocate for; None = grow.
        dtype: Of keys and values, as far as known: codebooks for others are made at the first call.
    """

    state_type = QuantizedState
    shared = ()

    def __init__(
        self,
        path: str,
        codec: Codec,
        storage: KvStorage,
        max_cache_len: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(path, max_cache_len)
        self.codec, self.storage = codec, storage
        self.options = vecinfer_options(codec, storage, 1.0)
        self._prepare_books(dtype)
        # Rows leave their padding out, so that columns are counted apart: of a preallocated layer
        # on its device, ``[1]``.
        self.columns: Tensor | None = None
        self.most_seen = 0  # columns before the last rollback, the most there were
        self.recent: Tensor | None = None  # [B, ring] bool: whether column c is valid, at c % ring

    def __repr__(self) -> str:
        s = self.storage
        return f"VecInferLayer({self.path}: {s.format}, exact {s.sink_tokens} + {s.exact_tokens})"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the first tokens."""
        if key_states.dtype != self.books_dtype:
            self._prepare_books(key_states.dtype)
        super().lazy_initialization(key_states, value_states)
        shape, device = (self.batch_size, ring_size(self.storage)), self.device
        self.recent = torch.ones(shape, dtype=torch.bool, device=device)
        if self.max_cache_len is not None:
            self.columns = torch.zeros(1, dtype=torch.long, device=device)
            compat.mark_static_addresses([self.recent, self.columns, *self.books])

    def _new_state(self, k: Tensor, v: Tensor) -> QuantizedState:
        tokens = self.max_cache_len or k.shape[2] + _FIRST_ROOM
        return new_state(k, v, self.codec, self.storage, max(0, tokens - self.storage.sink_tokens))

    @torch.compiler.disable()
    def _prepare_books(self, dtype: torch.dtype) -> None:
        self.books, self.books_dtype = op_books(self.codec, dtype), dtype

    def _columns_seen(self) -> Tensor | None:
        return self.columns

    def reset(self) -> None:
        """Forget everything, in place."""
        super().reset()
        self.most_seen = 0
        for x in (self.recent, self.columns):
            if x is not None:
                x.zero_()

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.recent is not None:
            self.recent = self._changed({"recent": self.recent}, change)["recent"]
        super()._map_rows(change)

    def _copied(self, value: Any) -> Any:  # noqa: ANN401
        # Nothing writes codebooks: both layers read the same.
        return self._clone(value) if isinstance(value, torch.Tensor) else super()._copied(value)

    # --- rollback ---------------------------------------------------------------------------------

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
        self._expect_removal(tokens_to_remove)
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
        """Store the first tokens."""
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
        alibi_slopes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens and attend from them; see :func:`append_and_attend`."""
        assert alibi_slopes is None  # full_layers.py refuses them
        query, k, v = qkv
        key_mask = self._arrived(k, v, mask)
        assert self.state is not None
        options = {**self.options, "scale": scale, "softcap": softcap}
        new = (x.detach() if x.requires_grad else x for x in qkv)
        out, lse = torch.ops.flasheva.vecinfer_decode(
            *new, key_mask, self.books, *self.state, **options
        )
        return without_gradient(out, query), lse

    def _arrived(self, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor | None:
        """Make room and count columns; return which new ones are valid, ``[B, L]``; None = all."""
        if mask is not None:
            self._expect_columns(mask)
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
        self._count(tokens)
        self._make_room()
        return key_mask

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
