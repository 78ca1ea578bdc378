"""``calibrate_kv``: scales and codebooks for a cache in few bits, from the model's own tokens."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.adaptation.calibrate import model_inputs, running_eagerly
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.fingerprint import weights_fingerprint
from flasheva_compile.generation.prepared import ATTRIBUTE
from flasheva_compile.quantization.codebooks import KvCodebooks, LayerShape
from flasheva_compile.quantization.formats import kv_format
from flasheva_compile.quantization.learn import LearningOptions, learn_layer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from flasheva_compile.quantization.formats import KvFormat

log = logging.getLogger(__name__)

_VECTORS_PER_ENTRY = 256  # what k-means is given for each codeword, where there are as many


def calibrate_kv(
    model: Any,  # noqa: ANN401 - a transformers model
    batches: Iterable[Any],
    format: str = "vq-2bit",
    *,
    layers: Sequence[int] | None = None,
    options: LearningOptions | None = None,
) -> KvCodebooks:
    """Learn how to store a model's keys and values in few bits.

    Runs the model on the batches and watches what goes into its cache: keys after the rotary
    embedding, and values. Of each layer, keys' scales come from all tokens, codebooks from as many
    random tokens as give k-means 256 vectors per codeword. The model is not changed.

    Args:
        model: A causal language model of transformers, prepared or not. It runs uncompiled, in
            evaluation mode.
        batches: An iterable of token ids ``[B, N]``, or of dicts of the model's inputs; tokens
            that an ``attention_mask`` hides are left out.
        format: A name of :data:`~flasheva_compile.quantization.formats.FORMATS`.
        layers: Places in the cache; None = those that a prepared model left full, or all.
        options: How codebooks are learned.

    Returns:
        Scales and codebooks, for ``FlashEvaCache.for_model(..., codebooks=...)``; ``save`` them.

    Raises:
        ConfigError: The format is unknown or does not fit a layer, a layer has no keys and values
            in the cache, or the batches are none, of the wrong type, too short, or give numbers
            that are not finite.

    Example:
        >>> books = fe.calibrate_kv(model, batches, "vq-2bit")
        >>> books.save("model/kv-2bit.safetensors")
    """
    form, options = kv_format(format), options or LearningOptions()
    wanted = layers
    if layers is None and (prepared := getattr(model, ATTRIBUTE, None)) is not None:
        wanted = [index for index, layer in prepared.full.items() if not layer.reason]
    with running_eagerly(model), _recording(form, wanted, options.seed) as (cache_of, seen):
        for inputs in model_inputs(model, batches):
            model(**inputs, past_key_values=cache_of(model, inputs), use_cache=True)
    missing = sorted(set(wanted or ()) - set(seen))
    if missing or not seen:
        what = f"layer {missing[0]} has" if missing else "the model has"
        raise ConfigError(f"{what} no keys and values in its cache", subject="layers")
    if not all(record.tokens for record in seen.values()):
        raise ConfigError("hold no valid token", subject="batches")
    learned = {}
    for index, record in sorted(seen.items()):
        learned[index] = learn_layer(record.keys, record.values, record.largest, form, options)
        log.info("layer %d: %s codebooks of %d tokens", index, format, record.keys.shape[0])
    return KvCodebooks(
        format=format,
        model=weights_fingerprint(model),
        tokens=next(iter(seen.values())).tokens,
        layers=learned,
        shapes={index: record.shape for index, record in sorted(seen.items())},
    )


@dataclass(slots=True)
class _Tokens:
    """Keys and values of one layer: a random sample, and the largest keys of all.

    Attributes:
        keys: ``[T, Hkv, D]``.
        values: ``[T, Hkv, Dv]``.
        largest: ``max |k|``, ``[Hkv, D]``.
        priority: The sample's random numbers, ``[T]``: the smallest stay.
        tokens: How many there were.
    """

    keys: Tensor
    values: Tensor
    largest: Tensor
    priority: Tensor
    tokens: int

    @property
    def shape(self) -> LayerShape:
        """What the layer caches per token."""
        (_, heads, size), value_size = self.keys.shape, self.values.shape[2]
        return LayerShape(kv_heads=heads, head_dim=size, value_dim=value_size)

    def joined(self, other: _Tokens) -> _Tokens:
        """Return both."""
        return _Tokens(
            keys=torch.cat([self.keys, other.keys]),
            values=torch.cat([self.values, other.values]),
            largest=torch.maximum(self.largest, other.largest),
            priority=torch.cat([self.priority, other.priority]),
            tokens=self.tokens + other.tokens,
        )

    def sampled(self, most: int) -> _Tokens:
        """Keep at most ``most`` tokens of the sample, in their order."""
        kept = self.priority.argsort(stable=True)[:most].sort().values
        on_device = kept.to(self.keys.device)
        return _Tokens(
            keys=self.keys[on_device],
            values=self.values[on_device],
            largest=self.largest,
            priority=self.priority[kept],
            tokens=self.tokens,
        )


@contextmanager
def _recording(form: KvFormat, wanted: Sequence[int] | None, seed: int) -> Iterator[Any]:
    """Yield a function that makes a cache which is watched, and what was seen, by layer."""
    from transformers.cache_utils import DynamicCache

    seen: dict[int, _Tokens] = {}
    generator = torch.Generator().manual_seed(seed)

    def cache_of(model: Any, inputs: dict[str, Any]) -> Any:  # noqa: ANN401
        cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
        update, mask = cache.update, inputs.get("attention_mask")

        def watched(k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if wanted is None or layer_idx in wanted:
                new = _tokens(k, v, mask, generator)
                both = seen[layer_idx].joined(new) if layer_idx in seen else new
                seen[layer_idx] = both.sampled(_sample_size(form, new.shape))
            return update(k, v, layer_idx, *args, **kwargs)

        cache.update = watched
        return cache

    yield cache_of, seen


def _tokens(k: Tensor, v: Tensor, mask: Tensor | None, generator: torch.Generator) -> _Tokens:
    """Return the valid tokens of one call."""
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    valid = torch.ones(keys.shape[:2], dtype=torch.bool, device=k.device)
    if mask is not None:
        valid = mask.to(k.device).bool()
    keys, values = keys[valid], values[valid]
    return _Tokens(
        keys=keys,
        values=values,
        largest=torch.cat([keys.new_zeros(1, *keys.shape[1:]), keys.abs()]).amax(0),
        priority=torch.rand(keys.shape[0], generator=generator),
        tokens=keys.shape[0],
    )


def _sample_size(form: KvFormat, shape: LayerShape) -> int:
    """Return the tokens that give both codebooks their vectors."""
    needed = [
        -(-_VECTORS_PER_ENTRY * part.entries // (shape.kv_heads * part.codes(size)))
        for part, size in ((form.key, shape.head_dim), (form.value, shape.value_dim))
    ]
    return max(needed)
