"""Which full layers of a prepared model get cache layers of ours: in few bits, preallocated."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from transformers.cache_utils import DynamicLayer, StaticLayer

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.exact_layer import ExactCacheLayer
from flasheva_compile.generation.fingerprint import weights_fingerprint
from flasheva_compile.generation.prepared import prepared_of
from flasheva_compile.generation.vecinfer_layer import VecInferLayer
from flasheva_compile.quantization.codebooks import KvCodebooks, LayerShape
from flasheva_compile.quantization.coding import codec_of
from flasheva_compile.quantization.formats import EXACT, FP8, KvStorage, kv_format
from flasheva_compile.quantization.fp8 import Fp8Codec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flasheva_compile.generation.prepared import FullLayer
    from flasheva_compile.quantization.state import Codec

log = logging.getLogger(__name__)

FullLayers: TypeAlias = str | KvStorage | Mapping[int, str | KvStorage] | None
"""What a cache is told of layers that stay full."""


def storage_of_layers(
    model: Any,  # noqa: ANN401 - a transformers model
    full_layers: FullLayers,
    layers: Sequence[Any],
) -> dict[int, KvStorage]:
    """Return how full attentions of a prepared model are stored that are not in its own dtype.

    Attentions that are no plain causal softmax (sliding windows, for example) keep their cache; the
    log says which, and why.

    Args:
        model: A prepared model.
        full_layers: How all are stored, or those at some places in the cache, which leaves others
            exact; None = each as the configuration says.
        layers: Its cache layers, by their place.

    Raises:
        ConfigError: No attention can be stored so, or one whose configuration asks for it cannot.
    """
    full = prepared_of(model).full
    every, asked = _asked(full_layers, full)
    chosen: dict[int, KvStorage] = {}
    for index, layer in full.items():
        own = asked.get(index)
        storage = every or own
        if storage is None:
            continue
        reason = layer.not_quantizable
        if not reason and type(layers[index]) not in (DynamicLayer, StaticLayer):
            reason = f"its cache is a {type(layers[index]).__name__}"
        if not reason:
            chosen[index] = storage
        elif own is not None:
            message = f"kv={own.format!r}, but it cannot be quantised: {reason}"
            raise ConfigError(message, subject=layer.path, hint='leave it "full"')
        else:
            log.info("%s: its cache stays as it is (%s)", layer.path, reason)
    if every is not None and not chosen:
        message = f"{every.format!r}, but no full attention of the model can be quantised"
        raise ConfigError(
            message, subject="full_layers", hint='prepare with layers that are "full"'
        )
    return chosen


def _asked(
    full_layers: FullLayers, full: Mapping[int, FullLayer]
) -> tuple[KvStorage | None, dict[int, KvStorage]]:
    """Return how all layers are stored, where they can be, and how single ones have to be."""
    if full_layers is None:
        asked = {index: layer.kv for index, layer in full.items() if layer.kv != EXACT}
        return None, {index: KvStorage(format=kv) for index, kv in asked.items()}
    if not isinstance(full_layers, Mapping):
        return (None if full_layers == EXACT else KvStorage.of(full_layers)), {}
    for index in full_layers:
        if isinstance(index, bool) or index not in full:
            message = f"{index!r} is no layer that stays full; there are {sorted(full)}"
            raise ConfigError(message, subject="full_layers")
    asked = {index: x for index, x in full_layers.items() if x != EXACT}
    return None, {index: KvStorage.of(x) for index, x in asked.items()}


def quantized_layers(
    model: Any,  # noqa: ANN401 - a transformers model
    storages: Mapping[int, KvStorage],
    codebooks: KvCodebooks | str | Path | None,
    max_cache_len: int | None,
) -> dict[int, VecInferLayer]:
    """Return cache layers for full attentions of a prepared model.

    Args:
        model: A prepared model.
        storages: Of :func:`storage_of_layers`.
        codebooks: Of ``calibrate_kv``, or the file that they were saved in; None = what lay beside
            the model when it was loaded.
        max_cache_len: Tokens to preallocate for; None = grow.

    Raises:
        ConfigError: Codebooks lack, are useless, or are another model's.
    """
    full = prepared_of(model).full
    of = {index: full[index] for index, s in storages.items() if s.format != FP8}
    if not of and codebooks is not None:
        what = "fp8 has none" if storages else "no layer is stored as codes of them"
        raise ConfigError(what, subject="codebooks", hint="leave them out")
    codecs: dict[int, Codec] = {
        index: Fp8Codec(full[index].head_dim, full[index].value_dim) for index in storages
    }
    if of:
        codecs |= _codecs(model, codebooks, of, storages)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {
        index: VecInferLayer(full[index].path, codecs[index], storage, max_cache_len, dtype)
        for index, storage in storages.items()
    }


def _codecs(
    model: Any,  # noqa: ANN401
    codebooks: KvCodebooks | str | Path | None,
    of: Mapping[int, FullLayer],
    storages: Mapping[int, KvStorage],
) -> dict[int, Codec]:
    """Return what turns keys and values into codes."""
    books = prepared_of(model).codebooks if codebooks is None else codebooks
    if books is None:
        hint = "pass what calibrate_kv returned, or the file that it was saved in"
        asked = storages[min(of)].format
        raise ConfigError(f"{asked!r} needs them", subject="codebooks", hint=hint)
    books = KvCodebooks.load(books) if isinstance(books, str | Path) else books
    shapes = {
        index: LayerShape(
            kv_heads=layer.kv_heads, head_dim=layer.head_dim, value_dim=layer.value_dim
        )
        for index, layer in of.items()
    }
    formats = {index: storages[index].format for index in of}
    books.expect(formats, weights_fingerprint(model), shapes)
    modules = dict(model.named_modules())
    return {
        index: codec_of(
            books.layers[index].to(device_of(modules[layer.path])),
            kv_format(formats[index]),
            (layer.head_dim, layer.value_dim),
            lookup=storages[index].lookup,
        )
        for index, layer in of.items()
    }


def exact_layers(model: Any, layers: Sequence[Any]) -> list[Any]:  # noqa: ANN401
    """Replace transformers' preallocated layers by ours where an attention is plain causal.

    Others, and those whose cache is of another kind, stay as they are.

    Args:
        model: A prepared model.
        layers: Its cache layers, by their place.
    """
    full = prepared_of(model).full
    return [
        ExactCacheLayer(full[index].path, layer.max_cache_len)
        if type(layer) is StaticLayer and index in full and not full[index].reason
        else layer
        for index, layer in enumerate(layers)
    ]


def device_of(module: Any) -> Any:  # noqa: ANN401
    """Return where an attention runs: a model may lie on several devices."""
    return next((p.device for p in module.parameters()), "cpu")
