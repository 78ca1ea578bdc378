"""One layer of the cache with retrieval whose exact keys lie in host memory.

The device holds sinks, window and chunk tokens, as a layer without retrieval does. A step selects
chunks, begins to fetch them, attends to what is on the device meanwhile, then to what has come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.cache_ops import cache_options, cache_settings
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.cache_layer import EvaCacheLayer
from flasheva_compile.generation.host_store import HostStore
from flasheva_compile.kernels.blocked.cache_state import advance
from flasheva_compile.kernels.blocked.chunk_bounds import bounds_of_each
from flasheva_compile.kernels.blocked.retrieval import join
from flasheva_compile.kernels.blocked.retrieval_cache import RetrievalState, select
from flasheva_compile.kernels.blocked.retrieval_select import Retrieval

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from flasheva_compile.config import EvaConfig

_NEVER = -1e30  # bias of a chunk token that no query attends to; -inf would be a chunk without keys
_FIRST_TOKENS = 1024  # room on the host beyond the prompt


class OffloadedCacheLayer(EvaCacheLayer):
    """What one retrieving attention keeps on the device, and beside it a :class:`HostStore`.

    Computes what :class:`RetrievalCacheLayer` does. Tokens after the prompt go one by one.

    Args:
        path: The attention's module path, for messages.
        config: How it approximates.
        max_cache_len: None; a layer that asks the host in every step cannot be captured.

    Raises:
        ConfigError: What the configuration or the cache asks for is not supported.
    """

    def __init__(self, path: str, config: EvaConfig, max_cache_len: int | None = None) -> None:
        super().__init__(path, config, max_cache_len)
        refused = {
            "chunk_rule='eva'": config.chunk_rule == "eva",
            f"retrieve_block={config.retrieve_block}": config.retrieve_block > 1,
            f"max_cache_len={max_cache_len}": max_cache_len is not None,
        }
        for what, wrong in refused.items():
            if wrong:
                message = f"{what} with a store in host memory"
                raise ConfigError(message, subject=path, hint='use store="device"')
        self.store: Any = None
        self.bounds: Any = None
        self.open_k: Any = None
        self.open_mask: Any = None

    # --- what transformers calls ------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the first tokens."""
        super().lazy_initialization(key_states, value_states)
        k, c = key_states.detach(), self.config.chunk_size
        self.store = HostStore(k, value_states.detach(), k.shape[2] + _FIRST_TOKENS)
        chunks = self.state.rfa_k.shape[2] if self.config.retrieve_by == "bounds" else 0
        self.bounds = k.new_zeros(*k.shape[:2], chunks, 2 * k.shape[3])
        self.open_k = k.new_zeros(*k.shape[:2], c, k.shape[3])
        self.open_mask = k.new_zeros(k.shape[0], c, dtype=torch.bool)

    def reset(self) -> None:
        """Forget everything, in place."""
        super().reset()
        if self.store is not None:
            self.store.length = 0

    def activate_past_recording(self) -> None:
        """Refuse: the host's tokens are not rolled back."""
        message = "a store in host memory cannot be rolled back"
        raise ConfigError(message, subject=self.path, hint='use store="device"')

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._map_rows(change)
        if self.store is not None:
            self.store.map_rows(change)
            for name in ("bounds", "open_k", "open_mask"):
                setattr(self, name, change(getattr(self, name)))

    def __deepcopy__(self, memo: dict[int, Any]) -> EvaCacheLayer:
        message = "a store in host memory is not copied"
        raise ConfigError(message, subject=self.path, hint='use store="device"')

    def _extend(self, room: dict[str, int]) -> None:
        super()._extend(room)
        if self.bounds.shape[2]:
            shape = (*self.bounds.shape[:2], room["rfa_k"], self.bounds.shape[3])
            self.bounds = torch.cat([self.bounds, self.bounds.new_zeros(shape)], 2)

    # --- the ops of the base class ----------------------------------------------------------------

    def _options(self, scale: float, softcap: float) -> dict[str, Any]:
        return cache_options(self.config, scale, softcap)

    def _append(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - as of the op
        _, k, v, _, key_mask, *_ = args
        _, before, _ = advance(self.state.start, self.state.length, key_mask, k.shape[2])
        super()._append(*args, **options)
        self.store.append(k, v, key_mask)
        self._bound(k, key_mask, before)

    def _decode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        q, k, v, parameters, key_mask, *_ = args
        parts = []
        for at in range(k.shape[2]):
            new = [x[:, :, at : at + 1] for x in (q, k, v)]
            mask = None if key_mask is None else key_mask[:, at : at + 1]
            parts.append(self._step(new, parameters, mask, options))
        out, lse = zip(*parts, strict=True)
        return torch.cat(out, 2), torch.cat(lse, 2)

    def _step(
        self,
        new: list[Tensor],
        parameters: list[Tensor],
        key_mask: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Append one token and attend from it."""
        q, k, v = new
        start, position, _ = advance(self.state.start, self.state.length, key_mask, 1)
        selected = self._select(q, position, options)
        first = selected.long() * self.config.chunk_size + start[:, None, None]
        fetched = self.store.fetch(
            first.masked_fill(selected < 0, -1).cpu(), self.config.chunk_size
        )
        # What comes exactly is not attended as chunk tokens; a kv head selects for all its queries.
        slot, bias = selected.clamp(min=0).long(), self.state.rfa_bias
        before = bias.gather(2, slot)
        bias.scatter_(2, slot, torch.where(selected < 0, before, _NEVER))
        result = super()._decode(q, k, v, parameters, key_mask, *self.state, **options)
        bias.scatter_(2, slot, before)
        self.store.append(k, v, key_mask)
        self._bound(k, key_mask, position)
        self.store.wait(*fetched)
        return _joined(result, _attend(q, fetched, options))

    def _select(self, q: Tensor, position: Tensor, options: dict[str, Any]) -> Tensor:
        """Return the chunks that the query selects, ``[B, Hkv, n]`` int32, -1 = none."""
        state, count = self.state, self.config.retrieve_chunks
        kept = state.start.new_zeros(*state.rfa_bias.shape[:2], count, dtype=torch.int32)
        view = RetrievalState(
            keys=state.exact_k,
            values=state.exact_v,
            mask=state.exact_mask,
            rfa_k=state.rfa_k,
            rfa_v=state.rfa_v,
            rfa_bias=state.rfa_bias,
            selected=kept,
            bounds=self.bounds,
            start=state.start,
            length=state.length,
        )
        settings, retrieval = cache_settings(options), Retrieval(chunks=count)
        return select(q, position[:, None], view, settings, retrieval)[:, :, 0]

    def _bound(self, k: Tensor, key_mask: Tensor | None, before: Tensor) -> None:
        """Write the bounds of chunks that ``k``, from position ``before [B]`` on, completes."""
        if not self.bounds.shape[2]:
            return
        c, tokens = self.config.chunk_size, k.shape[2]
        new = torch.ones_like(before[:, None]).expand(-1, tokens) > 0
        new = new if key_mask is None else key_mask
        first = before.clamp(min=0) // c
        chunks = (tokens + c - 1) // c + 1  # from the open one on
        position = first[:, None] * c + torch.arange(chunks * c, device=k.device)
        index = position - before[:, None]
        fresh, at = (index >= 0) & (index < tokens), index.clamp(0, tokens - 1)
        wide = at[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        keys = torch.where(
            fresh[:, None, :, None], k.gather(2, wide), self.open_k.repeat(1, 1, chunks, 1)
        )
        valid = torch.where(fresh, new.gather(1, at), self.open_mask.repeat(1, chunks))
        bounds = bounds_of_each(keys, valid, c)
        slot = first[:, None] + torch.arange(chunks, device=k.device)
        complete = (slot + 1) * c <= (before + tokens)[:, None]
        slot = slot.clamp(max=self.bounds.shape[2] - 1)[:, None, :, None].expand_as(bounds)
        old = self.bounds.gather(2, slot)
        # Clamped slots are not complete: they write what is there.
        self.bounds.scatter_(2, slot, torch.where(complete[:, None, :, None], bounds, old))
        self._keep_open(keys, valid, first, before + tokens)

    def _keep_open(self, keys: Tensor, valid: Tensor, first: Tensor, end: Tensor) -> None:
        """Keep the chunk that is not complete."""
        c = self.config.chunk_size
        start = (end.clamp(min=0) // c - first) * c
        at = (start[:, None] + torch.arange(c, device=keys.device)).clamp(max=keys.shape[2] - 1)
        self.open_mask = valid.gather(1, at)
        self.open_k = keys.gather(2, at[:, None, :, None].expand_as(self.open_k))


def _attend(
    q: Tensor, fetched: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Softmax of one query per row over fetched keys: ``[B, Hq, 1, Dv]`` and ``lse [B, Hq, 1]``."""
    k, v, mask = fetched
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(dtype).mul(options["scale"]).unflatten(1, (k.shape[1], -1))[:, :, :, 0]
    scores = grouped @ k.to(dtype).mT
    if options["softcap"]:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse.nan_to_num(neginf=0.0)).exp()
    return (weights @ v.to(dtype)).flatten(1, 2)[:, :, None], lse.flatten(1, 2)


def _joined(near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    out, lse = join(near[0].to(far[0].dtype), near[1][..., None], far[0], far[1][..., None])
    return out.to(near[0].dtype), lse[..., 0]
