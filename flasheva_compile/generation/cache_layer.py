"""One layer of the compressed cache: sinks, the window's ring, chunk tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from flasheva_compile import _torch_compat as compat
from flasheva_compile.cache_ops import cache_options, cache_settings, new_state
from flasheva_compile.errors import ConfigError
from flasheva_compile.kernels.blocked.cache_state import CacheState, visible_chunks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from flasheva_compile.config import EvaConfig
    from flasheva_compile.generation.eva_attention import EvaAttention

FIRST_CHUNKS = 64  # room of a growing layer beyond its first tokens


class EvaCacheLayer(CacheLayerMixin):
    """What one FlashEVA attention keeps; see :class:`CacheState`.

    ``update`` returns the new keys and values as they are: the attention attends to them and to the
    state, then appends them. So the layer works only under the attention it was made for.

    Args:
        path: The attention's module path, for messages.
        config: How it approximates.
        max_cache_len: Tokens to preallocate for; None = grow.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False
    state_type: type[Any] = CacheState
    # What a rollback restores: chunk tokens that do not exist yet are never visible.
    restored = ("exact_k", "exact_v", "exact_mask", "open_q", "start", "length")

    def __init__(self, path: str, config: EvaConfig, max_cache_len: int | None = None) -> None:
        super().__init__()
        self.path, self.config, self.max_cache_len = path, config, max_cache_len
        self.is_compileable = max_cache_len is not None
        self.state: Any = None
        self.is_empty = True
        self.seen = 0  # columns of a growing layer; a preallocated one counts on its device
        self.announced = False
        self.record_past = False
        self.exact_prefill = False
        self.snapshot: dict[str, Tensor] = {}  # tensors of the state before what is recorded
        self.recorded: list[tuple[Tensor, ...]] = []
        self.replay: Callable[..., None] | None = None

    def __repr__(self) -> str:
        c = self.config
        kind = f"{c.chunk_rule}, {c.window} window={c.window_size}, chunk={c.chunk_size}"
        kind += ", exact prefill" * self.exact_prefill
        return f"{type(self).__name__}({self.path}: {kind})"

    # --- what transformers calls ------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the first tokens."""
        k, v = key_states.detach(), value_states.detach()
        self.dtype, self.device, self.batch_size = k.dtype, k.device, k.shape[0]
        self.state = self._new_state(k, v)
        if self.max_cache_len is not None:
            compat.mark_static_addresses(self.state)
        self.keys = self.values = k.new_empty(0)  # models ask whether there are any
        self.is_initialized = True

    def _new_state(self, k: Tensor, v: Tensor) -> Any:  # noqa: ANN401 - of state_type
        options = self._options(1.0, 0.0)
        if self.max_cache_len is not None:
            chunks = visible_chunks(self.max_cache_len, cache_settings(options))
        else:
            chunks = -(-k.shape[2] // self.config.chunk_size) + FIRST_CHUNKS
        return new_state(k, v, max(1, chunks), options)

    def _options(self, scale: float, softcap: float) -> dict[str, Any]:
        """Return the keyword arguments of the ops."""
        return cache_options(self.config, scale, softcap)

    def _append(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - as of the op
        torch.ops.flasheva.cache_append(*args, **options)

    def _decode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        return torch.ops.flasheva.decode(*args, **options)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *_: Any,  # noqa: ANN401 - what other layers take
        **__: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values; the attention that follows appends them."""
        if not self.announced:
            raise ConfigError(
                "its compressed cache was updated outside of a prepared attention",
                subject=self.path,
                hint="pass the cache to the model that FlashEvaCache.for_model was called with",
            )
        self.announced = False
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
        return self.state.length[0] if self.state is not None else 0

    def get_max_length(self) -> int:
        """Return the tokens there is room for, -1 = any number."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def reset(self) -> None:
        """Forget everything, in place."""
        self.is_empty, self.seen, self.announced = True, 0, False
        self.snapshot, self.recorded = {}, []
        if self.state is not None:
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
        def rows(state: Any) -> Any:  # noqa: ANN401 - of state_type
            changed = self.state_type._make(change(x) for x in (*state[:-1], state.start))
            changed = changed._replace(length=state.length)
            same = changed.start.shape == state.start.shape
            if self.max_cache_len is None or not same:
                return changed
            for x, new in zip(state, changed, strict=True):
                x.copy_(new)  # captured CUDA graphs know these addresses
            return state

        if self.state is not None:
            self.state = rows(self.state)
            self.batch_size = self.state.start.shape[0]
        self.snapshot = {
            name: x if name == "length" else change(x) for name, x in self.snapshot.items()
        }
        self.recorded = [
            tuple(x if x is None else change(x) for x in call) for call in self.recorded
        ]

    def offload(self) -> None:
        """Stay: the attention reads the state after ``update``, when transformers offloads."""

    def prefetch(self) -> None:
        """Do nothing: the state has not left its device."""

    def __deepcopy__(self, memo: dict[int, Any]) -> EvaCacheLayer:
        copy = type(self)(self.path, self.config, self.max_cache_len)
        memo[id(self)] = copy
        # Tensors that an op returned cannot be deep-copied where gradients are on.
        for name, value in vars(self).items():
            setattr(copy, name, self._copied(value))
        return copy

    def _copied(self, value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, tuple) and hasattr(value, "_fields"):  # a state
            return type(value)(*(self._clone(x) for x in value))
        if isinstance(value, dict):  # of a state
            return {name: self._clone(x) for name, x in value.items()}
        if isinstance(value, list):
            return [tuple(x if x is None else self._clone(x) for x in call) for call in value]
        return value

    def _clone(self, x: Tensor) -> Tensor:
        return x.detach().clone()

    # --- rollback ---------------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        """Keep what :meth:`crop` needs from now on."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens and what recording kept.

        Raises:
            ConfigError: The tokens came before recording began, or before the last ``crop``.
        """
        recorded = self.expect_croppable(tokens_to_remove)
        if tokens_to_remove < 0:
            self._rewind(recorded + tokens_to_remove)
        self.snapshot, self.recorded = {}, []

    def expect_croppable(self, tokens_to_remove: int) -> int:
        """Raise what :meth:`crop` raises; return how many tokens are recorded."""
        if tokens_to_remove > 0:
            message = f"crop({tokens_to_remove}): a number of tokens to remove is negative"
            raise ConfigError(message, subject=self.path)
        recorded = sum(call[1].shape[2] for call in self.recorded)
        if -tokens_to_remove > recorded:
            raise ConfigError(
                f"crop({tokens_to_remove}) with {recorded} tokens recorded: what a window let go "
                "cannot be restored",
                subject=self.path,
                hint="call activate_past_recording() before the tokens are appended",
            )
        return recorded

    def _rewind(self, keep: int) -> None:
        """Restore the snapshot and append the first ``keep`` recorded tokens again."""
        assert self.state is not None
        assert self.replay is not None
        removed = sum(call[1].shape[2] for call in self.recorded)
        for name, x in self.snapshot.items():
            getattr(self.state, name).copy_(x)
        growing = self.max_cache_len is None
        self.seen -= removed if growing else 0
        q, k, v = (torch.cat([call[i] for call in self.recorded], 2)[:, :, :keep] for i in range(3))
        masks = [call[3] for call in self.recorded]
        if keep:
            mask = None if masks[0] is None else torch.cat(masks, 1)[:, :keep]
            self.replay(q, k, v, mask, self.state)
            self.seen += keep if growing else 0
        self.is_empty = growing and self.seen == 0

    def _record(self, call: tuple[Tensor | None, ...], replay: Callable[..., None]) -> None:
        if not self.recorded:
            assert self.state is not None
            self.snapshot = {name: getattr(self.state, name).clone() for name in self.restored}
        self.recorded.append(call)  # pyright: ignore[reportArgumentType]
        self.replay = replay

    # --- attention --------------------------------------------------------------------------------

    def attend(
        self,
        eva: EvaAttention,
        qkv: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens and attend from them; see :meth:`EvaAttention.forward`."""
        q, k, v = qkv
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        assert self.state is not None
        key_mask = self._new_columns(mask, k.shape[2])
        parameters = [x.detach() for x in eva.rule_parameters()]
        options = self._options(scale, softcap)
        self._make_room(k.shape[2])
        if self.record_past:
            replay = _Replay(self._append, parameters, options)
            self._record(
                (q.detach().clone(), k.detach().clone(), v.detach().clone(), key_mask), replay
            )
        first, self.is_empty = self.is_empty, False
        self.seen += k.shape[2] if self.max_cache_len is None else 0
        if not first or k.shape[2] == 1:
            new = (x.detach() if x.requires_grad else x for x in qkv)
            out, lse = self._decode(*new, parameters, key_mask, *self.state, **options)
            if torch.is_grad_enabled() and q.requires_grad:
                out = NoGradient.apply(out, q)
            return out, lse
        exact = self.exact_prefill
        result = eva.attend_all(qkv, key_mask, None, exact=exact, scale=scale, softcap=softcap)
        new = (x.detach() for x in qkv)
        self._append(*new, parameters, key_mask, *self.state, **options)
        return result

    def _new_columns(self, mask: Tensor | None, tokens: int) -> Tensor | None:
        if mask is None:
            return None
        if mask.dtype != torch.bool:
            message = "packed documents cannot be appended to a cache"
            raise ConfigError(message, subject=self.path, hint="pass use_cache=False")
        if self.max_cache_len is None:
            return mask[:, self.seen : self.seen + tokens]
        assert self.state is not None
        return mask.index_select(1, self.state.length + torch.arange(tokens, device=mask.device))

    def _make_room(self, tokens: int) -> None:
        """Grow the chunk tokens of a layer that is not preallocated."""
        assert self.state is not None
        # All that are complete, for some become visible only after the layer has grown further.
        chunks, capacity = (self.seen + tokens) // self.config.chunk_size, self.state.rfa_k.shape[2]
        if self.max_cache_len is not None or chunks <= capacity:
            return
        more = max(chunks, capacity + capacity // 4 + FIRST_CHUNKS) - capacity
        self._extend({"rfa_k": more, "rfa_v": more, "rfa_bias": more})

    def _extend(self, room: dict[str, int]) -> None:
        """Append slots to the third axis of tensors of the state."""
        grown = {name: _extended(getattr(self.state, name), n) for name, n in room.items()}
        self.state = self.state._replace(**grown)


class NoGradient(torch.autograd.Function):
    """Hand ``out`` on, and refuse to differentiate it."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, q: Tensor) -> Tensor:  # noqa: ANN401
        """Return ``out``; ``q`` connects it to what it was computed from."""
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:  # noqa: ANN401
        """Raise."""
        raise ConfigError(
            "what was attended through a compressed cache has no gradient",
            subject="past_key_values",
            hint="train with use_cache=False",
        )


class _Replay:
    """Append again what was rolled back too far."""

    def __init__(
        self, append: Callable[..., None], parameters: list[Tensor], options: dict[str, Any]
    ) -> None:
        self.append, self.parameters, self.options = append, parameters, options

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        state: Any,  # noqa: ANN401
    ) -> None:
        self.append(q, k, v, self.parameters, mask, *state, **self.options)


def _extended(x: Tensor, more: int) -> Tensor:
    return torch.cat([x, x.new_zeros(*x.shape[:2], more, *x.shape[3:])], 2)
