"""The compressed cache of a prepared model, as transformers' ``Cache``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.cache_layer import EvaCacheLayer
from flasheva_compile.generation.full_layers import (
    device_of,
    exact_layers,
    quantized_layers,
    storage_of_layers,
)
from flasheva_compile.generation.offloaded_layer import OffloadedCacheLayer
from flasheva_compile.generation.prepared import cached_layers, prepared_of
from flasheva_compile.generation.retrieval_layer import Fp8CacheLayer, RetrievalCacheLayer
from flasheva_compile.generation.state_layer import StateLayer
from flasheva_compile.generation.vecinfer_layer import VecInferLayer
from flasheva_compile.retrieval_cache_ops import Store
from flasheva_compile.validation import expect_choice

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from flasheva_compile.generation.full_layers import FullLayers
    from flasheva_compile.generation.prepared import CachedLayer
    from flasheva_compile.quantization.codebooks import KvCodebooks
    from flasheva_compile.quantization.formats import KvStorage


Prefill: TypeAlias = Literal["formula", "exact"]
_RETRIEVING: dict[Store, type[RetrievalCacheLayer]] = {
    "device": RetrievalCacheLayer,
    "offloaded": OffloadedCacheLayer,
    "fp8": Fp8CacheLayer,
}


class FlashEvaCache(Cache):
    """A cache whose FlashEVA layers keep sinks, window and chunk tokens, whose others keep all.

    Layers with ``retrieve_chunks`` keep every key too, and read few of them.

    Build it by :meth:`for_model`; ``generate`` of a prepared model does so by itself. It grows, or
    is preallocated and then fit for CUDA graphs.

    Args:
        layers: One cache layer per attention.
        **options: As of transformers' ``Cache``: ``offloading``, ``offload_only_non_sliding``.

    Attributes:
        told: Which columns the last ``generate`` was told are valid, ``[B, columns]`` bool, all
            behind them being valid; ``[1, 0]`` = all, None = unknown.
    """

    def __init__(self, layers: list[Any], **options: Any) -> None:  # noqa: ANN401
        super().__init__(layers=layers, **options)
        self.told: Tensor | None = None
        self._in_step: list[int] = []  # layers that get the same tokens in every call, in order

    @classmethod
    def for_model(  # noqa: PLR0913 - one way to build every kind of cache
        cls,
        model: nn.Module,
        config: Any = None,  # noqa: ANN401 - what prepare takes
        *,
        max_batch_size: int | None = None,
        max_cache_len: int | None = None,
        offloading: bool = False,
        full_layers: FullLayers = None,
        codebooks: KvCodebooks | str | Path | None = None,
        prefill: Prefill = "formula",
        store: Store = "device",
        chunk_tokens: Literal["fp8"] | None = None,
    ) -> FlashEvaCache:
        """Build an empty cache.

        Args:
            model: A prepared model; with ``config`` given, it is prepared first.
            config: As for :func:`flasheva_compile.prepare`.
            max_batch_size: Rows to preallocate for; None = at the first call.
            max_cache_len: Tokens to preallocate for; None = grow.
            offloading: Keep full layers on the host while others run, and attend from a
                preallocated cache as transformers does; FlashEVA layers stay.
            full_layers: How all layers that stay full are stored: "fp8", "vq-2bit" or another
                format, a :class:`KvStorage`, or "exact"; or those at some places in the cache, as a
                dict. None = as the configuration says (``kv`` of its ``FullConfig``).
            codebooks: What :func:`flasheva_compile.calibrate_kv` learned from this model, or the
                file that it was saved in. None = what lay beside the model when it was loaded.
            prefill: How the first call reads several tokens: by the "formula", or "exact", by full
                attention, as its layers' ``repr`` then says. Later tokens follow the formula.
            store: How retrieving layers keep every key: exactly on the "device", "offloaded" to the
                host, or in "fp8" on the device, where only selected chunks are read rounded.
            chunk_tokens: How FlashEVA layers store them: "fp8", in about half of the bytes of bf16;
                None = in the model's dtype. What the first call attends to is not rounded.

        Raises:
            ConfigError: Model not prepared, contradicting arguments, or another model's codebooks.
        """
        _expect_choices(prefill, store, chunk_tokens)
        if config is not None:
            from flasheva_compile.generation.prepare import prepare

            prepare(model, config)
        if max_cache_len is None and max_batch_size is not None:
            message = f"{max_batch_size} without max_cache_len"
            raise ConfigError(message, subject="max_batch_size", hint="give both, or neither")
        layers = _own_layers(model, max_cache_len)
        for index, layer in _eva_layers(model, store, max_cache_len, chunk_tokens).items():
            layers[index] = layer
            layer.exact_prefill = prefill == "exact"
        storages = storage_of_layers(model, full_layers, layers)
        _expect_unmoved(storages, offloading=offloading)
        quantized = quantized_layers(model, storages, codebooks, max_cache_len)
        layers = [quantized.get(index, layer) for index, layer in enumerate(layers)]
        layers = layers if offloading else exact_layers(model, layers)  # moved: transformers' own
        cache = cls(layers, offloading=offloading)
        cache._in_step = _layers_in_step(model)
        if max_batch_size is not None:
            cache._allocate(model, max_batch_size)
        return cache

    def _allocate(self, model: nn.Module, batch_size: int) -> None:
        """Allocate the layers that keep a state; others allocate at their first call.

        So do codes, and layers whose weights only come to a device when they run.
        """
        weight = next(p for p in model.parameters() if p.is_floating_point())
        prepared, modules = prepared_of(model), dict(model.named_modules())
        for index, shape in {**prepared.converted, **prepared.full}.items():
            layer, device = self.layers[index], torch.device(device_of(modules[shape.path]))
            if isinstance(layer, VecInferLayer) or device.type == "meta":
                continue
            if isinstance(layer, StateLayer):
                like = weight.new_empty(0, device=device)
                k = like.new_empty(batch_size, shape.kv_heads, 0, shape.head_dim)
                layer.lazy_initialization(k, k.new_empty(*k.shape[:3], shape.value_dim))

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,  # noqa: ANN401 - what other layers take
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Hand new keys and values to a layer.

        Raises:
            ConfigError: A call before has failed half-way, so that layers hold different tokens.
        """
        if layer_idx in self._in_step[1:] and not torch.compiler.is_compiling():
            first, own = (_held(self.layers[i]) for i in (self._in_step[0], layer_idx))
            tokens = key_states.shape[2]
            if first is not None and own is not None and own + tokens != first:
                raise ConfigError(
                    f"layer {layer_idx} holds {own} tokens, layer {self._in_step[0]} held "
                    f"{first - tokens}: a call has failed half-way",
                    subject="past_key_values",
                    hint="reset() it, or build a new one",
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the columns that the mask of a layer covers, and the first one.

        Models ask before their first layer runs: what one layer has no room for, none may append.

        Raises:
            ConfigError: A layer has no room for ``query_length`` tokens.
        """
        for layer in self.layers:
            if isinstance(layer, StateLayer):
                layer.expect_room(query_length)
        return super().get_mask_sizes(query_length, layer_idx)

    def room(self) -> int:
        """Return the tokens there is room for, -1 = any number; sliding windows forget."""
        rooms = (x.get_max_length() for x in self.layers if not getattr(x, "is_sliding", False))
        return max(rooms, default=-1)

    def reset(self) -> None:
        """Forget everything."""
        self.told = None
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row ``i`` go on as row ``beam_idx[i]`` did."""
        if self.told is not None and self.told.numel():
            self.told = self.told.index_select(0, beam_idx.to(self.told.device))
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self.told is not None and self.told.numel():
            self.told = self.told.repeat_interleave(repeats, 0)
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        if self.told is not None and self.told.numel():
            self.told = self.told[indices.to(self.told.device)]
        super().batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens in every layer, or in none.

        Raises:
            ConfigError: A layer cannot; see its own ``crop``.
        """
        ours = [layer for layer in self.layers if isinstance(layer, StateLayer)]
        for layer in ours:
            layer.expect_croppable(tokens_to_remove)
        # Others raise when they are cropped: windows may, and come before layers that never do.
        others: list[Any] = [x for x in self.layers if not isinstance(x, StateLayer)]
        others.sort(key=lambda layer: type(layer) is DynamicLayer)
        for layer in (*others, *ours):
            layer.crop(tokens_to_remove)

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


def _expect_choices(prefill: str, store: str, chunk_tokens: str | None) -> None:
    expect_choice("prefill", prefill, get_args(Prefill))
    expect_choice("store", store, get_args(Store))
    if chunk_tokens is not None:
        expect_choice("chunk_tokens", chunk_tokens, ("fp8",))


def _expect_unmoved(storages: Mapping[int, KvStorage], *, offloading: bool) -> None:
    if offloading and storages:
        message, hint = "quantised layers stay on their device", 'pass full_layers="exact"'
        raise ConfigError(message, subject="offloading", hint=hint)


def _own_layers(model: Any, max_cache_len: int | None) -> list[Any]:  # noqa: ANN401
    """Return the layers that transformers would take."""
    text = model.config.get_text_config(decoder=True)
    if max_cache_len is None:
        layers = list(DynamicCache(config=text).layers)
    else:
        layers = list(StaticCache(config=text, max_cache_len=max_cache_len).layers)
    prepared = prepared_of(model)
    last = max((*prepared.converted, *prepared.full))
    if last >= len(layers):
        raise ConfigError(
            f"its configuration has {len(layers)} layers, {last + 1} were prepared",
            subject=type(model).__name__,
            hint="revert(model) before a part of it runs alone (assistant_early_exit does that)",
        )
    return layers


def _eva_layers(
    model: Any,  # noqa: ANN401
    store: Store,
    max_cache_len: int | None,
    chunk_tokens: str | None,
) -> dict[int, EvaCacheLayer]:
    """Return the cache layers of converted attentions."""
    converted = cached_layers(model)
    if chunk_tokens is not None:
        _expect_roundable(converted)
    retrieving = _retrieving_kind(store, converted)
    kinds = {
        n: retrieving if x.config.retrieve_chunks else EvaCacheLayer for n, x in converted.items()
    }
    layers = {n: kinds[n](x.path, x.config, max_cache_len) for n, x in converted.items()}
    for n, layer in layers.items():
        layer.fp8_chunks, layer.alibi = chunk_tokens == "fp8", converted[n].alibi
    return layers


def _expect_roundable(converted: dict[int, CachedLayer]) -> None:
    """Refuse chunk tokens in fp8 where there are none, or where they select chunks."""
    if not converted:
        message = "no layer has chunk tokens: all attentions stay full"
        raise ConfigError(message, subject="chunk_tokens", hint="leave it out")
    retrieving = next((x.path for x in converted.values() if x.config.retrieve_chunks), None)
    if retrieving is not None:
        raise ConfigError(
            f"'fp8', but {retrieving} retrieves: its chunk tokens select chunks, so that rounding "
            "selects others, and few bytes are theirs beside the exact keys that it keeps",
            subject="chunk_tokens",
            hint="set retrieve_chunks=0, or leave chunk_tokens out",
        )


def _retrieving_kind(store: Store, converted: dict[int, CachedLayer]) -> type[EvaCacheLayer]:
    """Return the kind of layers that retrieve."""
    if store != "device" and not any(layer.config.retrieve_chunks for layer in converted.values()):
        message = "no layer has retrieve_chunks, so none keeps every key"
        raise ConfigError(message, subject="store", hint="set retrieve_chunks, or drop store")
    return _RETRIEVING[store]


def _layers_in_step(model: Any) -> list[int]:  # noqa: ANN401
    """Return the places of plain causal attentions: each runs once in every call."""
    prepared = prepared_of(model)
    plain = [index for index, layer in prepared.full.items() if not layer.reason]
    return sorted((*prepared.converted, *plain))


def _held(layer: Any) -> int | None:  # noqa: ANN401
    """Return the tokens that a layer holds; None = not known."""
    if isinstance(layer, StateLayer):
        return layer.held()
    return layer.get_seq_length() if type(layer) is DynamicLayer else None


def _tensors(layer: Any) -> list[torch.Tensor]:  # noqa: ANN401 - any cache layer
    if isinstance(layer, StateLayer):
        return list(layer.state or ())
    return [x for x in vars(layer).values() if isinstance(x, torch.Tensor)]
