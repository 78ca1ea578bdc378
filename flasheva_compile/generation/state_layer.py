"""What cache layers have in common that keep a state of tensors under an attention of ours."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from flasheva_compile import _torch_compat as compat
from flasheva_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class StateLayer(CacheLayerMixin):
    """A cache layer whose tensors are one named tuple, whose first axis is rows.

    ``update`` returns the new keys and values as they are: the attention attends to them and to the
    state, then appends them. So the layer works only under the attention it was made for.

    Args:
        path: The attention's module path, for messages.
        max_cache_len: Tokens to preallocate for; None = grow.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False
    state_type: type[Any]
    shared: tuple[str, ...] = ("length",)  # tensors of the state that have no axis of rows

    def __init__(self, path: str, max_cache_len: int | None = None) -> None:
        super().__init__()
        self.path, self.max_cache_len = path, max_cache_len
        self.is_compileable = max_cache_len is not None
        self.state: Any = None
        self.is_empty = True
        # Columns. A preallocated layer counts on its device; here, as far as no captured graph
        # appended them: enough to notice a lack of room before it is too late.
        self.seen = 0
        self.all_seen = True  # whether those are all
        self.announced = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the first tokens."""
        k, v = key_states.detach(), value_states.detach()
        self.dtype, self.device, self.batch_size = k.dtype, k.device, k.shape[0]
        self.state = self._new_state(k, v)
        if self.max_cache_len is not None:
            compat.mark_static_addresses(self.state)
        self.keys = self.values = k.new_empty(0)  # models ask whether there are any
        self.is_initialized = True

    @abstractmethod
    def _new_state(self, k: Tensor, v: Tensor) -> Any:  # noqa: ANN401 - of state_type
        """Return an empty state for keys and values like these."""

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
                "its cache was updated outside of a prepared attention",
                subject=self.path,
                hint="pass the cache to the model that FlashEvaCache.for_model was called with",
            )
        self.announced = False
        self.expect_room(key_states.shape[2])
        return key_states, value_states

    def expect_room(self, tokens: int) -> None:
        """Refuse more new tokens than there is room for."""
        if self.max_cache_len is None:
            return
        if not torch.compiler.is_compiling():
            tokens += self.seen
        if tokens > self.max_cache_len:
            message = f"{tokens} tokens in a cache of {self.max_cache_len}"
            raise ConfigError(message, subject=self.path, hint="give a larger max_cache_len")

    def _count(self, tokens: int) -> None:
        """Count new columns, of a preallocated layer those that no graph appends."""
        self.is_empty = False
        if self.max_cache_len is None or not torch.compiler.is_compiling():
            self.seen += tokens
        else:
            self.all_seen = False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns that the two-dimensional mask covers, and 0."""
        if self.max_cache_len is not None:
            return self.max_cache_len, 0
        return self.seen + query_length, 0

    def get_seq_length(self) -> Any:  # noqa: ANN401 - as of transformers' own preallocated layers
        """Return the tokens seen: an int, or a tensor if preallocated."""
        if self.max_cache_len is None:
            return self.seen
        columns = self._columns_seen()
        return 0 if columns is None else columns[0]

    def held(self) -> int | None:
        """Return the tokens seen as far as the host knows; None = the device would have to tell."""
        return self.seen if self.all_seen else None

    def _columns_seen(self) -> Tensor | None:
        """Return how many columns came, counted on the device, ``[1]``."""
        return None if self.state is None else self.state.length

    def get_max_length(self) -> int:
        """Return the tokens there is room for, -1 = any number."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def reset(self) -> None:
        """Forget everything, in place."""
        self.is_empty, self.seen, self.all_seen, self.announced = True, 0, True, False
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
        if self.state is None:
            return
        rows = {n: x for n, x in self.state._asdict().items() if n not in self.shared}
        self.state = self.state._replace(**self._changed(rows, change))
        self.batch_size = change(torch.arange(self.batch_size, device=self.device)).shape[0]

    def _changed(
        self, rows: dict[str, Tensor], change: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Return changed tensors: the same ones, if captured CUDA graphs may know them."""
        after = change(torch.arange(self.batch_size, device=self.device)).shape[0]
        if self.max_cache_len is None or after != self.batch_size:
            return {name: change(x) for name, x in rows.items()}
        return {name: x.copy_(change(x)) for name, x in rows.items()}

    def offload(self) -> None:
        """Stay: the attention reads the state after ``update``, when transformers offloads."""

    def prefetch(self) -> None:
        """Do nothing: the state has not left its device."""

    @abstractmethod
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; later results are as if they never were."""

    @abstractmethod
    def expect_croppable(self, tokens_to_remove: int) -> Any:  # noqa: ANN401 - what crop needs
        """Raise what :meth:`crop` raises."""

    def _expect_removal(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            message = f"crop({tokens_to_remove}): a number of tokens to remove is negative"
            raise ConfigError(message, subject=self.path)

    def __deepcopy__(self, memo: dict[int, Any]) -> StateLayer:
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        # Tensors that an op returned cannot be deep-copied where gradients are on.
        for name, value in vars(self).items():
            setattr(copy, name, self._copied(value))
        return copy

    def _copied(self, value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, tuple) and hasattr(value, "_fields"):  # a state
            return type(value)(*(self._clone(x) for x in value))
        return value

    def _clone(self, x: Tensor) -> Tensor:
        return x.detach().clone()

    def _expect_columns(self, mask: Tensor) -> None:
        """Refuse what is no mask of columns: the ids of packed documents."""
        if mask.dtype != torch.bool:
            message = "packed documents cannot be appended to a cache"
            raise ConfigError(message, subject=self.path, hint="pass use_cache=False")


def without_gradient(out: Tensor, q: Tensor) -> Tensor:
    """Return ``out``; where ``q`` has a gradient, one that refuses to be differentiated."""
    if torch.is_grad_enabled() and q.requires_grad:
        return _NoGradient.apply(out, q)  # pyright: ignore[reportReturnType]
    return out


class _NoGradient(torch.autograd.Function):
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
