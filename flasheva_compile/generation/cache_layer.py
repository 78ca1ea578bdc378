"""One layer of the compressed cache: sinks, the window's ring, chunk tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.cache_ops import cache_options, cache_settings, new_state
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.state_layer import StateLayer, without_gradient
from flasheva_compile.kernels.blocked.cache_state import CacheState, visible_chunks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from flasheva_compile.config import EvaConfig
    from flasheva_compile.generation.eva_attention import EvaAttention

FIRST_CHUNKS = 64  # room of a growing layer beyond its first tokens


class EvaCacheLayer(StateLayer):
    """What one FlashEVA attention keeps; see :class:`CacheState`.

    Args:
        path: The attention's module path, for messages.
        config: How it approximates.
        max_cache_len: Tokens to preallocate for; None = grow.
    """

    state_type: type[Any] = CacheState
    # What a rollback restores: chunk tokens that do not exist yet are never visible.
    restored = ("exact_k", "exact_v", "exact_mask", "open_q", "start", "length")

    def __init__(self, path: str, config: EvaConfig, max_cache_len: int | None = None) -> None:
        super().__init__(path, max_cache_len)
        self.config = config
        self.record_past = False
        self.exact_prefill = False
        self.fp8_chunks = False
        self.alibi = False  # whether the attention adds ALiBi biases
        self.snapshot: dict[str, Tensor] = {}  # tensors of the state before what is recorded
        self.recorded: list[tuple[Tensor, ...]] = []
        self.replay: Callable[..., None] | None = None

    def __repr__(self) -> str:
        c = self.config
        kind = f"{c.chunk_rule}, {c.window} window={c.window_size}, chunk={c.chunk_size}"
        kind += ", exact prefill" * self.exact_prefill
        kind += ", fp8 chunk tokens" * self.fp8_chunks
        return f"{type(self).__name__}({self.path}: {kind})"

    def _new_state(self, k: Tensor, v: Tensor) -> Any:  # noqa: ANN401 - of state_type
        options = self._options(1.0, 0.0)
        if self.max_cache_len is not None:
            chunks = visible_chunks(self.max_cache_len, cache_settings(options))
        else:
            chunks = -(-k.shape[2] // self.config.chunk_size) + FIRST_CHUNKS
        kinds = {"fp8_chunks": self.fp8_chunks, "alibi": self.alibi}
        return new_state(k, v, max(1, chunks), options, **kinds)

    def _options(self, scale: float, softcap: float) -> dict[str, Any]:
        """Return the keyword arguments of the ops."""
        return cache_options(self.config, scale, softcap)

    def _append(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - as of the op
        torch.ops.flasheva.cache_append(*args, **options)

    def _decode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        return torch.ops.flasheva.decode(*args, **options)

    def reset(self) -> None:
        """Forget everything, in place."""
        super().reset()
        self.snapshot, self.recorded = {}, []

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._map_rows(change)
        self.snapshot = {
            name: x if name == "length" else change(x) for name, x in self.snapshot.items()
        }
        self.recorded = [
            tuple(x if x is None else change(x) for x in call) for call in self.recorded
        ]

    def _copied(self, value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, dict):  # of a state
            return {name: self._clone(x) for name, x in value.items()}
        if isinstance(value, list):
            return [tuple(x if x is None else self._clone(x) for x in call) for call in value]
        return super()._copied(value)

    # --- rollback ---------------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        """Keep what :meth:`crop` needs from now on."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens and what recording kept.

        Raises:
            ConfigError: The tokens came before recording began, or before the last ``crop``, or
                there were more than a preallocated cache has room for.
        """
        recorded = self.expect_croppable(tokens_to_remove)
        if tokens_to_remove < 0:
            self._rewind(recorded + tokens_to_remove)
        self.snapshot, self.recorded = {}, []

    def expect_croppable(self, tokens_to_remove: int) -> int:
        """Raise what :meth:`crop` raises; return how many tokens are recorded."""
        self._expect_removal(tokens_to_remove)
        recorded = sum(call[1].shape[2] for call in self.recorded)
        if -tokens_to_remove > recorded:
            raise ConfigError(
                f"crop({tokens_to_remove}) with {recorded} tokens recorded: what a window let go "
                "cannot be restored",
                subject=self.path,
                hint="call activate_past_recording() before the tokens are appended",
            )
        room = self.max_cache_len
        if recorded and room is not None and int(self.state.length) > room:
            message = f"crop({tokens_to_remove}) after more tokens than the {room} that there is"
            message += " room for"
            raise ConfigError(message, subject=self.path, hint="prefill a new cache")
        return recorded

    def _rewind(self, keep: int) -> None:
        """Restore the snapshot and append the first ``keep`` recorded tokens again."""
        assert self.state is not None
        assert self.replay is not None
        recorded = sum(call[1].shape[2] for call in self.recorded)
        for name, x in self.snapshot.items():
            getattr(self.state, name).copy_(x)
        q, k, v = (torch.cat([call[i] for call in self.recorded], 2)[:, :, :keep] for i in range(3))
        if keep:
            self.replay(q, k, v, self._recorded_mask(keep), self.state)
        growing = self.max_cache_len is None
        self.seen = self.seen - recorded + keep if growing else int(self.state.length)
        self.is_empty = self.seen == 0

    def _recorded_mask(self, keep: int) -> Tensor | None:
        """Return which of the first ``keep`` recorded tokens are valid; None = all."""
        if all(call[3] is None for call in self.recorded):
            return None
        masks = [
            k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if mask is None else mask
            for _, k, _, mask in self.recorded
        ]
        return torch.cat(masks, 1)[:, :keep]

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
        options = self._options(scale, softcap) | eva.selector_options()
        self._make_room(k.shape[2])
        if self.record_past:
            replay = _Replay(self._append, parameters, options)
            self._record(
                (q.detach().clone(), k.detach().clone(), v.detach().clone(), key_mask), replay
            )
        if self.is_empty and k.shape[2] > 1:
            exact = self.exact_prefill
            result = eva.attend_all(qkv, key_mask, None, exact=exact, scale=scale, softcap=softcap)
            new = (x.detach() for x in qkv)
            self._append(*new, parameters, key_mask, *self.state, **options)
        else:
            new = (x.detach() if x.requires_grad else x for x in qkv)
            slopes = {"alibi_slopes": eva.alibi_slopes} if self.alibi else {}
            out, lse = self._decode(*new, parameters, key_mask, *self.state, **options, **slopes)
            result = without_gradient(out, q), lse
        self._count(k.shape[2])
        return result

    def _new_columns(self, mask: Tensor | None, tokens: int) -> Tensor | None:
        if mask is None:
            return None
        self._expect_columns(mask)
        if self.max_cache_len is None:
            return mask[:, self.seen : self.seen + tokens]
        assert self.state is not None
        return mask.index_select(1, self.state.length + torch.arange(tokens, device=mask.device))

    def _make_room(self, tokens: int) -> None:
        """Grow the chunk tokens of a layer that is not preallocated."""
        assert self.state is not None
        if self.max_cache_len is not None:  # first: no graph of it may depend on `seen`
            return
        # All that are complete, for some become visible only after the layer has grown further.
        chunks, capacity = (self.seen + tokens) // self.config.chunk_size, self.state.rfa_k.shape[2]
        if chunks <= capacity:
            return
        more = max(chunks, capacity + capacity // 4 + FIRST_CHUNKS) - capacity
        names = ("rfa_k", "rfa_v", "rfa_bias", "rfa_exponents", "chunk_mean")
        self._extend(dict.fromkeys(names, more))

    def _extend(self, room: dict[str, int]) -> None:
        """Append slots to the third axis of tensors of the state."""
        grown = {name: _extended(getattr(self.state, name), n) for name, n in room.items()}
        self.state = self.state._replace(**grown)


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
