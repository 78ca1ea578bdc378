"""Which full layers of a prepared model can be cached in few bits, and their cache layers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicLayer, StaticLayer

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.fingerprint import weights_fingerprint
from flasheva_compile.generation.prepared import prepared_of
from flasheva_compile.generation.vecinfer_layer import VecInferLayer
from flasheva_compile.quantization.codebooks import KvCodebooks, LayerShape
from flasheva_compile.quantization.formats import FP8, KvStorage, kv_format
from flasheva_compile.quantization.fp8 import Fp8Codec
from flasheva_compile.quantization.vecinfer import VqCodec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flasheva_compile.generation.prepared import FullLayer
    from flasheva_compile.quantization.state import Codec

log = logging.getLogger(__name__)


def quantized_layers(
    model: Any,  # noqa: ANN401 - a transformers model
    storage: KvStorage,
    codebooks: KvCodebooks | str | Path | None,
    layers: Sequence[Any],
    max_cache_len: int | None,
) -> dict[int, VecInferLayer]:
    """Return cache layers for the full attentions of a prepared model.

    Attentions that are no plain causal softmax (sliding windows, for example) keep theirs; the log
    says which, and why.

    Args:
        model: A prepared model.
        storage: How to store.
        codebooks: Of ``calibrate_kv``, or the file that they were saved in; None for fp8.
        layers: The cache layers to replace, by their place.
        max_cache_len: Tokens to preallocate for; None = grow.

    Raises:
        ConfigError: There is no such attention, or codebooks lack, are useless, or are another
            model's.
    """
    chosen: dict[int, FullLayer] = {}
    for index, layer in prepared_of(model).full.items():
        reason = layer.reason
        if not reason and type(layers[index]) not in (DynamicLayer, StaticLayer):
            reason = f"its cache is a {type(layers[index]).__name__}"
        if reason:
            log.info("%s: its cache stays as it is (%s)", layer.path, reason)
        else:
            chosen[index] = layer
    if not chosen:
        message = f"{storage.format!r}, but no full attention of the model can be quantised"
        raise ConfigError(
            message, subject="full_layers", hint='prepare with layers that are "full"'
        )
    codecs = _codecs(model, storage, codebooks, chosen)
    return {
        index: VecInferLayer(layer.path, codecs[index], storage, max_cache_len)
        for index, layer in chosen.items()
    }


def _codecs(
    model: Any,  # noqa: ANN401
    storage: KvStorage,
    codebooks: KvCodebooks | str | Path | None,
    chosen: dict[int, FullLayer],
) -> dict[int, Codec]:
    if storage.format == FP8:
        if codebooks is not None:
            raise ConfigError("fp8 has none", subject="codebooks", hint="leave them out")
        return {i: Fp8Codec(layer.head_dim, layer.value_dim) for i, layer in chosen.items()}
    if codebooks is None:
        hint = "pass what calibrate_kv returned, or the file that it was saved in"
        raise ConfigError(f"{storage.format!r} needs them", subject="codebooks", hint=hint)
    books = KvCodebooks.load(codebooks) if isinstance(codebooks, str | Path) else codebooks
    shapes = {
        index: LayerShape(
            kv_heads=layer.kv_heads, head_dim=layer.head_dim, value_dim=layer.value_dim
        )
        for index, layer in chosen.items()
    }
    books.expect(storage.format, weights_fingerprint(model), shapes)
    form, modules = kv_format(storage.format), dict(model.named_modules())
    return {
        index: VqCodec(
            books.layers[index].to(_device(modules[layer.path])),
            form,
            layer.head_dim,
            layer.value_dim,
            lookup=storage.lookup,
        )
        for index, layer in chosen.items()
    }


def _device(module: Any) -> Any:  # noqa: ANN401
    """Return where an attention runs: a model may lie on several devices."""
    return next((p.device for p in module.parameters()), "cpu")
