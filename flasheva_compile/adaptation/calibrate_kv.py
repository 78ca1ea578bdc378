"""``calibrate_kv``: scales and codebooks for a cache in few bits, from the model's own tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from flasheva_compile.adaptation.calibrate import model_inputs, running_eagerly
from flasheva_compile.adaptation.kv_tokens import recording
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.fingerprint import weights_fingerprint
from flasheva_compile.generation.prepared import ATTRIBUTE
from flasheva_compile.quantization.codebooks import KvCodebooks
from flasheva_compile.quantization.formats import FORMATS, WordKvFormat, kv_format
from flasheva_compile.quantization.learn import LearningOptions, Readers, learn_layer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flasheva_compile.adaptation.kv_tokens import KvTokens
    from flasheva_compile.generation.prepared import FullLayer
    from flasheva_compile.quantization.codebooks import LayerShape

log = logging.getLogger(__name__)

_USUAL = "vq-2bit"
_TOKENS = 32  # that transform coding is given where a codeword is given one vector


def calibrate_kv(
    model: Any,  # noqa: ANN401 - a transformers model
    batches: Iterable[Any],
    format: str | Mapping[int, str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    options: LearningOptions | None = None,
) -> KvCodebooks:
    """Learn how to store a model's keys and values in few bits.

    Runs the model on the batches and watches what its attentions get: queries, and keys after the
    rotary embedding and values as the cache has them. Each layer's scales and codebooks are learned
    from a random sample of its tokens, each of which counts by the attention that it gets from
    queries so far behind it that they would read it as a code. The model is not changed. Rows
    should be as long as the texts to be cached, where the model takes that: keys turn with their
    position, and codewords of early positions fit late ones badly. In rows shorter than what stays
    exact, all tokens count alike.

    Args:
        model: A causal language model of transformers, prepared or not. It runs uncompiled, in
            evaluation mode.
        batches: An iterable of token ids ``[B, N]``, or of dicts of the model's inputs; tokens
            that an ``attention_mask`` hides are left out.
        format: A name of :data:`~flasheva_compile.quantization.formats.FORMATS`, or one for each
            place in the cache; None = as the configuration of a prepared model says (``kv``), or
            "vq-2bit" where it says nothing.
        layers: Places in the cache; None = those that the format says, that a prepared model left
            full, or all.
        options: How codebooks are learned.

    Returns:
        Scales and codebooks, for ``FlashEvaCache.for_model(..., codebooks=...)``; ``save`` them.

    Raises:
        ConfigError: A format is unknown or does not fit a layer, a layer has no format, or no keys
            and values in the cache, or the batches are none, of the wrong type, too short, or give
            numbers that are not finite.

    Example:
        >>> books = fe.calibrate_kv(model, batches, "vq-2bit")
        >>> books.save("model/kv-2bit.safetensors")
    """
    options = options or LearningOptions()
    formats = _Formats.of(model, format, layers)
    seen = _run(model, batches, formats, options)
    learned = {}
    for index, record in sorted(seen.items()):
        readers = Readers(record.attention, record.queries / record.read)
        tokens = (record.keys, record.values, record.largest)
        learned[index] = learn_layer(*tokens, kv_format(formats[index]), options, readers)
        log.info("layer %d: %s, %d tokens", index, formats[index], record.keys.shape[0])
    return KvCodebooks(
        formats={index: formats[index] for index in learned},
        model=weights_fingerprint(model),
        tokens=next(iter(seen.values())).tokens,
        layers=learned,
        shapes={index: record.shape for index, record in sorted(seen.items())},
    )


@dataclass(frozen=True)
class _Formats:
    """Which layers are learned, and in which format each.

    Attributes:
        layers: Places in the cache; None = all.
        every: The format of all; "" = each its own.
        own: Place in the cache -> format.
    """

    layers: list[int] | None
    every: str
    own: Mapping[int, str]

    def __getitem__(self, index: int) -> str:
        return self.every or self.own[index]

    @classmethod
    def of(
        cls,
        model: Any,  # noqa: ANN401
        format: str | Mapping[int, str] | None,
        layers: Sequence[int] | None,
    ) -> _Formats:
        """Read what ``calibrate_kv`` was given."""
        prepared = getattr(model, ATTRIBUTE, None)
        full = {} if prepared is None else prepared.full
        wanted = None if layers is None else list(layers)
        if format is None:
            asked = {index: layer.kv for index, layer in full.items() if layer.kv in FORMATS}
            format = asked or _USUAL
        if isinstance(format, Mapping):
            if not format:
                raise ConfigError("names no layer", subject="format")
            wanted = sorted(format) if wanted is None else wanted
            for index in wanted:
                if index not in format:
                    message = f"layer {index} has no format; there are {dict(format)}"
                    raise ConfigError(message, subject="layers")
        if prepared is not None:
            wanted = _quantizable(full, wanted)
        every, own = ("", format) if isinstance(format, Mapping) else (format, {})
        for name in own.values() if own else (every,):
            kv_format(name)
        return cls(layers=wanted, every=every, own=own)


def _run(
    model: Any,  # noqa: ANN401
    batches: Iterable[Any],
    formats: _Formats,
    options: LearningOptions,
) -> dict[int, KvTokens]:
    """Return what was seen of each layer."""
    wanted = formats.layers
    most = partial(_sample_size, formats, options)
    seen: dict[int, KvTokens] = {}
    with running_eagerly(model), recording(model, wanted, most, options.seed) as forward:
        for inputs in model_inputs(model, batches):
            seen = forward(inputs)
    missing = sorted(set(wanted or ()) - set(seen))
    if missing or not seen:
        what = f"layer {missing[0]} has" if missing else "the model has"
        raise ConfigError(f"{what} no keys and values in its cache", subject="layers")
    if not all(record.tokens for record in seen.values()):
        raise ConfigError("hold no valid token", subject="batches")
    return seen


def _quantizable(full: Mapping[int, FullLayer], wanted: list[int] | None) -> list[int]:
    """Return the layers to learn from; None = all that are full attentions of a prepared model."""
    for index in wanted or ():
        if index in full and full[index].alibi:
            raise ConfigError(full[index].not_quantizable, subject=full[index].path)
    if wanted is not None:
        return wanted
    found = [index for index, layer in full.items() if not layer.not_quantizable]
    if not found:
        message = "no full attention of the model can be quantised"
        hint = 'prepare with layers that are "full"'
        raise ConfigError(message, subject="layers", hint=hint)
    return found


def _sample_size(formats: _Formats, options: LearningOptions, index: int, shape: LayerShape) -> int:
    """Return the tokens that give both codebooks their vectors, or transforms their statistics.

    Raises:
        ConfigError: The layer's heads do not fit the format: before the model has run on all.
    """
    form = kv_format(formats[index])
    codes = (form.key.codes(shape.head_dim), form.value.codes(shape.value_dim))
    if isinstance(form, WordKvFormat):
        return _TOKENS * options.vectors
    heads = 1 if options.per_head else shape.kv_heads
    needed = [
        -(-options.vectors * part.entries // (heads * count))
        for part, count in zip((form.key, form.value), codes, strict=True)
    ]
    return max(needed)
