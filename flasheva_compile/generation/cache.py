"""The compressed cache of a prepared model, as transformers' ``Cache``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.cache_layer import EvaCacheLayer
from flasheva_compile.generation.full_layers import quantized_layers, storage_of_layers
from flasheva_compile.generation.offloaded_layer import OffloadedCacheLayer
from flasheva_compile.generation.prepared import cached_layers
from flasheva_compile.generation.retrieval_layer import RetrievalCacheLayer
from flasheva_compile.generation.vecinfer_layer import VecInferLayer
from flasheva_compile.validation import expect_choice

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from flasheva_compile.generation.prepared import CachedLayer
    from flasheva_compile.quantization.codebooks import KvCodebooks
    from flasheva_compile.quantization.formats import KvStorage


Prefill: TypeAlias = Literal["formula", "exact"]
Store: TypeAlias = Literal["device", "offloaded"]


class FlashEvaCache(Cache):
    """A cache whose FlashEVA layers keep sinks, window and chunk tokens, whose others keep all.

    Layers with ``retrieve_chunks`` keep every key too, and read few of them.

    Build it by :meth:`for_model`; ``generate`` of a prepared model does so by itself. It grows, or
    is preallocated and then fit for CUDA graphs.

    Args:
        layers: One cache layer per attention.
        **options: As of transformers' ``Cache``: ``offloading``, ``offload_only_non_sliding``.
    """

    def __init__(self, layers: list[Any], **options: Any) -> None:  # noqa: ANN401
        super().__init__(layers=layers, **options)

    @classmethod
    def for_model(  # noqa: PLR0913 - one way to build every kind of cache
        cls,
        model: nn.Module,
        config: Any = None,  # noqa: ANN401 - what prepare takes
        *,
        max_batch_size: int | None = None,
        max_cache_len: int | None = None,
        offloading: bool = False,
        full_layers: str | KvStorage | None = None,
        codebooks: KvCodebooks | str | Path | None = None,
        prefill: Prefill = "formula",
        store: Store = "device",
    ) -> FlashEvaCache:
        """Build an empty cache.

        Args:
            model: A prepared model; with ``config`` given, it is prepared first.
            config: As for :func:`flasheva_compile.prepare`.
            max_batch_size: Rows to preallocate for; None = at the first call.
            max_cache_len: Tokens to preallocate for; None = grow.
            offloading: Keep full layers on the host while others run; FlashEVA layers stay.
            full_layers: How all layers that stay full are stored: "fp8", "vq-2bit" or another
                format, a :class:`KvStorage`, or "exact". None = as the configuration says
                (``kv`` of its ``FullConfig``).
            codebooks: What :func:`flasheva_compile.calibrate_kv` learned from this model, or the
                file that it was saved in. None = what lay beside the model when it was loaded.
            prefill: How the first call reads several tokens: by the "formula", or "exact", by full
                attention, as its layers' ``repr`` then says. Later tokens follow the formula.
            store: Where retrieving layers keep exact keys: on the "device", or "offloaded" to the
                host, from where kernels read the selected chunks, sinks and window.

        Raises:
            ConfigError: Model not prepared, contradicting arguments, or another model's codebooks.
        """
        expect_choice("prefill", prefill, get_args(Prefill))
        expect_choice("store", store, get_args(Store))
        if config is not None:
            from flasheva_compile.generation.prepare import prepare

            prepare(model, config)
        if max_cache_len is None and max_batch_size is not None:
            message = f"{max_batch_size} without max_cache_len"
            raise ConfigError(message, subject="max_batch_size", hint="give both, or neither")
        converted = cached_layers(model)
        layers = _own_layers(model, max_cache_len)
        retrieving = _retrieving_kind(store, converted)
        for index, layer in converted.items():
            kind = retrieving if layer.config.retrieve_chunks else EvaCacheLayer
            layers[index] = made = kind(layer.path, layer.config, max_cache_len)
            made.exact_prefill = prefill == "exact"
        storages = storage_of_layers(model, full_layers, layers)
        if offloading and storages:
            message, hint = "quantised layers stay on their device", 'pass full_layers="exact"'
            raise ConfigError(message, subject="offloading", hint=hint)
        for index, layer in quantized_layers(model, storages, codebooks, max_cache_len).items():
            layers[index] = layer
        cache = cls(layers, offloading=offloading)
        if max_batch_size is not None:
            cache._allocate(model, converted, max_batch_size)
        return cache

    def _allocate(
        self, model: nn.Module, converted: dict[int, CachedLayer], batch_size: int
    ) -> None:
        """Allocate the FlashEVA layers; others allocate at their first call."""
        weight = next(p for p in model.parameters() if p.is_floating_point())
        for index, layer in converted.items():
            k = weight.new_empty(batch_size, layer.kv_heads, 0, layer.head_dim)
            v = weight.new_empty(batch_size, layer.kv_heads, 0, layer.value_dim)
            eva: Any = self.layers[index]
            eva.lazy_initialization(k, v)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens in every layer, or in none.

        Raises:
            ConfigError: A layer cannot; see its own ``crop``.
        """
        for layer in self.layers:
            if isinstance(layer, EvaCacheLayer | VecInferLayer):
                layer.expect_croppable(tokens_to_remove)
        super().crop(tokens_to_remove)

    def save(self, model: nn.Module, path: str | Path) -> None:
        """Write the cache as safetensors; see :meth:`load`."""
        from flasheva_compile.generation.checkpoint import save_cache

        save_cache(self, model, path)

    @classmethod
    def load(cls, model: nn.Module, path: str | Path) -> FlashEvaCache:
        """Read what :meth:`save` wrote for the same model, weights and configuration.

        Raises:
            ConfigError: It was written for others.
        """
        from flasheva_compile.generation.checkpoint import load_cache

        return load_cache(model, path)

    def nbytes(self) -> int:
        """Return the bytes of all tensors of all layers, without what is in a store on the host."""
        tensors = [x for layer in self.layers for x in _tensors(layer)]
        return sum(x.numel() * x.element_size() for x in tensors) - self.host_nbytes()

    def host_nbytes(self) -> int:
        """Return the bytes of exact keys and values in host memory."""
        layers = [x for x in self.layers if isinstance(x, OffloadedCacheLayer)]
        return sum(layer.host_nbytes() for layer in layers)


def _own_layers(model: Any, max_cache_len: int | None) -> list[Any]:  # noqa: ANN401
    """Return the layers that transformers would take."""
    text = model.config.get_text_config(decoder=True)
    if max_cache_len is None:
        return list(DynamicCache(config=text).layers)
    return list(StaticCache(config=text, max_cache_len=max_cache_len).layers)


def _retrieving_kind(store: str, converted: dict[int, CachedLayer]) -> type[EvaCacheLayer]:
    """Return the kind of layers that retrieve."""
    if store == "device":
        return RetrievalCacheLayer
    if not any(layer.config.retrieve_chunks for layer in converted.values()):
        message = "no layer has retrieve_chunks, so none keeps exact keys"
        raise ConfigError(message, subject="store", hint="set retrieve_chunks, or drop store")
    return OffloadedCacheLayer


def _tensors(layer: Any) -> list[torch.Tensor]:  # noqa: ANN401 - any cache layer
    if isinstance(layer, EvaCacheLayer | VecInferLayer):
        return list(layer.state or ())
    return [x for x in vars(layer).values() if isinstance(x, torch.Tensor)]
