"""What attentions of a running model read and store: queries, keys, values, and who attends whom.

A cache that is watched hands over keys and values, an attention function in the place of the
model's own the queries that read them.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.generation.interface import own_attention_function
from flasheva_compile.generation.prepared import attention_configs
from flasheva_compile.quantization.codebooks import LayerShape
from flasheva_compile.quantization.formats import FP8, KvStorage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

_NAME = "eva_kv_tokens"
_ROWS = 256  # queries whose weights are in memory at once


@dataclass(slots=True, kw_only=True)
class KvTokens:
    """Keys and values of one layer: a random sample, and sums over all.

    Attributes:
        keys: ``[T, Hkv, D]``.
        values: ``[T, Hkv, Dv]``.
        attention: What each token gets from queries that would read it as a code, ``[T, Hkv]``.
        priority: The sample's random numbers, ``[T]``, on the CPU: the smallest stay.
        largest: ``max |k|`` of all tokens, ``[Hkv, D]``.
        queries: Sum of squares of all queries, ``[Hkv, D]`` fp64.
        read: How many queries that were, of a kv head.
        tokens: How many tokens there were.
    """

    keys: Tensor
    values: Tensor
    attention: Tensor
    priority: Tensor
    largest: Tensor
    queries: Tensor
    read: int
    tokens: int

    @property
    def shape(self) -> LayerShape:
        """What the layer caches per token."""
        (_, heads, size), value_size = self.keys.shape, self.values.shape[2]
        return LayerShape(kv_heads=heads, head_dim=size, value_dim=value_size)

    def joined(self, other: KvTokens) -> KvTokens:
        """Return both."""
        parts = ("keys", "values", "attention", "priority")
        return KvTokens(
            **{name: torch.cat([getattr(self, name), getattr(other, name)]) for name in parts},
            largest=torch.maximum(self.largest, other.largest),
            queries=self.queries + other.queries,
            read=self.read + other.read,
            tokens=self.tokens + other.tokens,
        )

    def sampled(self, most: int) -> KvTokens:
        """Keep at most ``most`` tokens of the sample, in their order."""
        kept = self.priority.argsort(stable=True)[:most].sort().values
        on_device = kept.to(self.keys.device)
        return KvTokens(
            keys=self.keys[on_device],
            values=self.values[on_device],
            attention=self.attention[on_device],
            priority=self.priority[kept],
            largest=self.largest,
            queries=self.queries,
            read=self.read,
            tokens=self.tokens,
        )


@dataclass(slots=True, kw_only=True)
class _Run:
    """One calibration; attention and mask functions find it in ``_running``.

    Attributes:
        wanted: Places in the cache; None = all.
        most: Place in the cache and shape of a layer -> tokens to sample.
        generator: Of the sample.
        implementations: ``id(config)`` -> the name of its own implementation.
        seen: Place in the cache -> tokens.
        stored: Keys and values whose attention has not run yet.
        valid: Which tokens are no padding, ``[B, N]`` bool; None = all.
    """

    wanted: list[int] | None
    most: Callable[[int, LayerShape], int]
    generator: torch.Generator
    implementations: dict[int, str]
    seen: dict[int, KvTokens] = field(default_factory=dict)
    stored: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    valid: Tensor | None = None

    def add(self, index: int, query: Tensor | None, scale: float, softcap: float) -> None:
        """Take what is stored of a layer, with the queries that read it; None = unknown."""
        key, value = self.stored.pop(index)
        valid = self.valid
        if valid is None:
            valid = key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool)
        valid = valid.to(key.device)
        heads, size = key.shape[1], key.shape[3]
        attention = key.new_zeros(key.shape[:3], dtype=torch.float32)
        queries, read = key.new_ones(heads, size, dtype=torch.float64), 1
        if query is not None:
            grouped = query.unflatten(1, (heads, -1))
            attention = attention_received(grouped, key, valid, scale, softcap)
            kept = grouped.masked_fill(~valid[:, None, None, :, None], 0)
            queries = kept.double().square().sum((0, 2, 3))
            read = int(valid.sum()) * grouped.shape[2]
        keys, values = (x.transpose(1, 2)[valid] for x in (key, value))
        new = KvTokens(
            keys=keys,
            values=values,
            attention=attention.transpose(1, 2)[valid],
            priority=torch.rand(keys.shape[0], generator=self.generator),
            largest=torch.cat([keys.new_zeros(1, *keys.shape[1:]), keys.abs()]).amax(0),
            queries=queries,
            read=read,
            tokens=keys.shape[0],
        )
        both = self.seen[index].joined(new) if index in self.seen else new
        self.seen[index] = both.sampled(self.most(index, new.shape))


_running: list[_Run] = []


def attention_received(
    query: Tensor, key: Tensor, valid: Tensor, scale: float, softcap: float
) -> Tensor:
    """Return what each key gets of the attention of queries that would read it as a code.

    Args:
        query: ``[B, Hkv, G, N, D]``.
        key: ``[B, Hkv, N, D]``.
        valid: Which tokens are no padding, ``[B, N]`` bool.
        scale: Score scale.
        softcap: ``softcap * tanh(score / softcap)``; 0 = none.

    Returns:
        ``[B, Hkv, N]`` fp32, summed over queries; what a cache keeps exactly gets nothing.
    """
    storage = KvStorage(format=FP8)
    place = valid.cumsum(1) - 1
    column = torch.arange(key.shape[2], device=key.device)
    keys = key.float()[:, :, None].mT
    total = torch.zeros(key.shape[:3], device=key.device)
    # No query before these reads a code.
    first = storage.sink_tokens + storage.exact_tokens
    for start in range(first, key.shape[2], _ROWS):
        rows, seen_by = column[start : start + _ROWS], slice(0, start + _ROWS)  # none is later
        scores = (query[:, :, :, rows].float() @ keys[..., seen_by]).mul_(scale)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        seen = (rows[:, None] >= column[seen_by]) & valid[:, None, seen_by]
        weights = scores.masked_fill_(~seen[:, None, None], -torch.inf).softmax(-1).sum(2)
        coded = place[:, rows, None] - place[:, None, seen_by] >= storage.exact_tokens
        coded &= seen & (place >= storage.sink_tokens)[:, None, seen_by] & valid[:, rows, None]
        total[:, :, seen_by] += weights.masked_fill_(~coded[:, None], 0).sum(2)
    return total


@contextmanager
def recording(
    model: Any,  # noqa: ANN401 - a transformers model
    wanted: list[int] | None,
    most: Callable[[int, LayerShape], int],
    seed: int,
) -> Iterator[Callable[[dict[str, Any]], dict[int, KvTokens]]]:
    """Yield a function that runs the model and returns what was seen so far, by place in the cache.

    Args:
        model: A causal language model, prepared or not.
        wanted: Places in the cache; None = all.
        most: Returns how many tokens to keep of a layer.
        seed: Of the sample.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
    before = attention_configs(model)
    run = _Run(
        wanted=wanted,
        most=most,
        generator=torch.Generator().manual_seed(seed),
        implementations={id(config): name for config, name in before},
    )

    def forward(inputs: dict[str, Any]) -> dict[int, KvTokens]:
        mask = inputs.get("attention_mask")
        run.valid = None if mask is None else mask.bool()
        model(**inputs, past_key_values=_watched_cache(model, run), use_cache=True)
        for index in list(run.stored):  # an attention that is no AttentionInterface's
            run.add(index, None, 1.0, 0.0)
        return run.seen

    _running.append(run)
    try:
        for config, _ in before:
            config._attn_implementation = _NAME
        yield forward
    finally:
        for config, own in before:
            config._attn_implementation = own
        _running.remove(run)


def _watched_cache(model: Any, run: _Run) -> Any:  # noqa: ANN401
    from transformers.cache_utils import DynamicCache

    cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    update = cache.update

    def watched(k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if run.wanted is None or layer_idx in run.wanted:
            run.stored[layer_idx] = (k, v)
        return update(k, v, layer_idx, *args, **kwargs)

    cache.update = watched
    return cache


def _attention(
    module: Any,  # noqa: ANN401 - an attention of transformers
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **inputs: Any,  # noqa: ANN401
) -> tuple[Tensor, Tensor | None]:
    """Note the queries, then run the attention's own function."""
    run, index = _running[-1], getattr(module, "layer_idx", None)
    stored = None if index is None else run.stored.get(index)
    if index is not None and stored is not None and stored[0].shape == key.shape:
        scale = inputs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        run.add(index, query, scale, inputs.get("softcap") or 0.0)
    own = run.implementations[id(module.config)]
    return own_attention_function(module, own)(module, query, key, value, attention_mask, **inputs)


def _mask(**inputs: Any) -> Any:  # noqa: ANN401 - the interface's keywords
    """Return the mask that the model's own implementation wants."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    names = _running[-1].implementations
    own = names.get(id(inputs.get("config")), next(iter(names.values())))
    return ALL_MASK_ATTENTION_FUNCTIONS[own](**inputs)
