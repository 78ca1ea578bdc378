"""Models with FlashEVA parameters on disk, and caches: what is written is what is read."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation import interface
from flasheva_compile.generation.cache import FlashEvaCache
from flasheva_compile.generation.cache_layer import EvaCacheLayer
from flasheva_compile.generation.eva_attention import EvaAttention
from flasheva_compile.generation.fingerprint import fingerprint
from flasheva_compile.generation.offloaded_layer import OffloadedCacheLayer
from flasheva_compile.generation.prepare import prepare
from flasheva_compile.generation.prepared import prepared_of
from flasheva_compile.generation.retrieval_layer import Fp8CacheLayer
from flasheva_compile.generation.state_layer import StateLayer
from flasheva_compile.generation.vecinfer_layer import VecInferLayer
from flasheva_compile.quantization.codebooks import CODEBOOKS, KvCodebooks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from flasheva_compile.retrieval_cache_ops import Store

_VERSION = "6"
# Arguments of from_pretrained that say where a checkpoint is.
_LOCATION = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
_TOLD = "told"
_NUMBERS = ("cumulative_length", "seen", "all_seen", "is_empty")


# --- models ---------------------------------------------------------------------------------------


def from_pretrained(path: str | Path, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Load a model that was saved while it was prepared, and prepare it again.

    Args:
        path: What ``save_pretrained`` wrote: a folder, or a name that transformers can resolve.
        *args: As of transformers' ``from_pretrained``.
        **kwargs: As of transformers' ``from_pretrained``.

    Returns:
        The prepared model, with the chunk rules' parameters as saved, and with the codebooks of
        its cache if a local folder holds ``kv_codebooks.safetensors``.

    Raises:
        ConfigError: The checkpoint was not written by a prepared model, its parameters are not
            those of the attentions that are converted, or its codebooks cannot be read.
    """
    import transformers

    config = checkpoint_config(path, kwargs)
    if not config.get("flasheva"):
        raise ConfigError(
            "its config.json has no FlashEVA configuration",
            subject=str(path),
            hint="load it with transformers and call prepare(model, config)",
        )
    name = (config.get("architectures") or [""])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ConfigError(
            f"is a {name!r}, which transformers does not have",
            subject=str(path),
            hint="call register_with_transformers() and load it by its own class",
        )
    return load_prepared(model_class.from_pretrained, model_class, path, *args, **kwargs)


def checkpoint_config(path: str | Path, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Read a checkpoint's ``config.json``, as ``from_pretrained`` with these arguments does."""
    from transformers import PreTrainedConfig

    return PreTrainedConfig.get_config_dict(path, **_only(kwargs, _LOCATION))[0]


def load_prepared(
    load: Callable[..., Any],
    model_class: Any,  # noqa: ANN401 - a class of transformers
    path: str | Path,
    *args: Any,  # noqa: ANN401
    **kwargs: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Load what a prepared model saved by a function that knows nothing of FlashEVA.

    Args:
        load: ``from_pretrained`` of a class of transformers.
        model_class: The class of the model that it returns.
        path: Of the checkpoint.
        *args: Of ``load``.
        **kwargs: Of ``load``.

    Returns:
        What ``load`` returns, with the model prepared.

    Raises:
        ConfigError: As of :func:`from_pretrained`.
    """
    # The checkpoint names an attention that only a prepared model has.
    named = kwargs.get("attn_implementation")
    kwargs["attn_implementation"] = None if named == interface.NAME else named
    with _ignoring_our_keys(model_class):
        loaded = load(path, *args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    training = model.training
    prepare(model, model.config.flasheva["layers"]).train(training)
    saved = kwargs.get("state_dict") or _our_tensors(path, kwargs)
    _set_parameters(model, saved, str(path))
    codebooks = Path(path) / CODEBOOKS
    if codebooks.is_file():
        prepared_of(model).codebooks = KvCodebooks.load(codebooks)
    return loaded


def _set_parameters(model: Any, saved: Mapping[str, Tensor], subject: str) -> None:  # noqa: ANN401
    """Copy the saved chunk-rule parameters into a prepared model; all of them, or none."""
    known = {_relative(model, name): x for name, x in saved.items() if ".flasheva." in name}
    own = {name: x for name, x in model.named_parameters() if ".flasheva." in name}
    wanted = {_relative(model, _name_on_disk(model, name, x)): x for name, x in own.items()}
    wanted |= _selector_weights(model, known)
    hint = "save the prepared model again with save_pretrained"
    missing, unknown = sorted(set(wanted) - set(known)), sorted(set(known) - set(wanted))
    if missing:
        message = f"lacks {missing[0]}{_and_more(missing)}"
        raise ConfigError(message, subject=subject, hint=hint)
    if unknown:
        path = unknown[0].rpartition(".flasheva.")[0]
        rows = prepared_of(model).report.layers
        reason = next((row.reason for row in rows if row.path.endswith(path)), "")
        raise ConfigError(
            f"holds {unknown[0]}{_and_more(unknown)}, but that attention stays full: "
            f"{reason or 'there is no such attention'}",
            subject=subject,
            hint="load it with the versions of torch and transformers that it was saved with",
        )
    for name, parameter in wanted.items():
        if parameter.shape != known[name].shape:
            message = f"{name} is {tuple(known[name].shape)}, not {tuple(parameter.shape)}"
            raise ConfigError(message, subject=subject, hint=hint)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(known[name])


def _selector_weights(model: Any, known: Mapping[str, Tensor]) -> dict[str, Tensor]:  # noqa: ANN401
    """Make room for the selectors' weights that a checkpoint holds: only calibrated ones do."""
    found: dict[str, Tensor] = {}
    for path, eva in model.named_modules():
        if isinstance(eva, EvaAttention) and eva.config.retrieve_by == "bounds":
            attention = model.get_submodule(path.rpartition(".")[0])
            weight = eva.new_selector_weight(next(attention.parameters()).device)
            name = _relative(model, _name_on_disk(model, f"{path}.selector_weight", weight))
            if name in known:
                eva.selector_weight = found[name] = weight
    return found


def _name_on_disk(model: Any, name: str, x: Tensor) -> str:  # noqa: ANN401
    """Return the name that a tensor has in checkpoints: transformers renames some modules."""
    from transformers.core_model_loading import revert_weight_conversion

    return next(iter(revert_weight_conversion(model, {name: x})))


def _relative(model: Any, name: str) -> str:  # noqa: ANN401
    """Return a name without the base model's: a checkpoint fits its model with and without head."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


@contextmanager
def _ignoring_our_keys(model_class: Any) -> Iterator[None]:  # noqa: ANN401
    """Keep transformers from reporting our parameters as unexpected: they are loaded later."""
    before = model_class._keys_to_ignore_on_load_unexpected
    model_class._keys_to_ignore_on_load_unexpected = [*(before or ()), r"\.flasheva\."]
    try:
        yield
    finally:
        model_class._keys_to_ignore_on_load_unexpected = before


def _our_tensors(path: str | Path, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the chunk-rule parameters of a checkpoint of one file or of several."""
    from safetensors import safe_open

    variant = f".{kwargs['variant']}" if kwargs.get("variant") else ""
    index = _file(path, f"model.safetensors.index{variant}.json", kwargs)
    if index is None:
        files = {f"model{variant}.safetensors"}
    else:
        places = json.loads(Path(index).read_text())["weight_map"]
        files = {file for name, file in places.items() if ".flasheva." in name}
    tensors: dict[str, Tensor] = {}
    for name in sorted(files):
        file = _file(path, name, kwargs)
        if file is None:
            raise ConfigError(f"has no {name}", subject=str(path), hint="save it as safetensors")
        with safe_open(file, framework="pt") as stored:
            ours = [key for key in stored.keys() if ".flasheva." in key]  # noqa: SIM118
            tensors |= {key: stored.get_tensor(key) for key in ours}
    return tensors


def _file(path: str | Path, name: str, kwargs: Mapping[str, Any]) -> str | None:
    """Return where a file of a checkpoint is, in a folder or in the cache of the Hub."""
    from transformers.utils.hub import cached_file

    location = {**_only(kwargs, _LOCATION), "_raise_exceptions_for_missing_entries": False}
    return cached_file(path, name, **location)


def _only(kwargs: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: kwargs[name] for name in names if name in kwargs}


# --- caches ---------------------------------------------------------------------------------------


def save_cache(cache: FlashEvaCache, model: Any, path: str | Path) -> None:  # noqa: ANN401
    """Write a cache as safetensors, with what identifies its model.

    Args:
        cache: A cache of ``model``.
        model: The prepared model.
        path: The file to write.
    """
    from safetensors.torch import save_file

    quantized = [layer.path for layer in cache.layers if isinstance(layer, VecInferLayer)]
    if quantized:
        message = "its quantised layer cannot be written to a file yet"
        raise ConfigError(message, subject=quantized[0], hint="build the cache without full_layers")
    offloaded = [layer.path for layer in cache.layers if isinstance(layer, OffloadedCacheLayer)]
    if offloaded:
        message = "its store in host memory cannot be written to a file yet"
        raise ConfigError(message, subject=offloaded[0], hint='build the cache with store="device"')
    tensors: dict[str, Tensor] = {}
    numbers: list[dict[str, int]] = []
    for index, layer in enumerate(cache.layers):
        numbers.append({n: v for n in _NUMBERS if isinstance(v := vars(layer).get(n), int)})
        for name, x in _tensors_of(layer).items():
            tensors[f"{index}.{name}"] = x.contiguous()
    if cache.told is not None:
        tensors[_TOLD] = cache.told.contiguous()
    metadata = {
        "version": _VERSION,
        "model": fingerprint(model),
        "config": prepared_of(model).hybrid.to_json(),
        "max_cache_len": str(cache.room()),
        "offloading": str(cache.offloading),
        "store": "fp8" if any(isinstance(x, Fp8CacheLayer) for x in cache.layers) else "device",
        "chunk_tokens": "fp8" if _has_fp8_chunks(cache) else "",
        "numbers": json.dumps(numbers),
    }
    save_file(tensors, str(path), metadata)


def load_cache(model: Any, path: str | Path) -> FlashEvaCache:  # noqa: ANN401
    """Read a cache that :func:`save_cache` wrote.

    Args:
        model: The prepared model that the cache was written for.
        path: The file.

    Raises:
        ConfigError: It was written for another model or configuration, or by another version.
    """
    from safetensors import safe_open

    device = next(model.parameters()).device
    with safe_open(str(path), framework="pt", device=str(device)) as stored:
        metadata = stored.metadata() or {}
        _expect_same(metadata, model, str(path))
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    length = int(metadata["max_cache_len"])
    room = length if length >= 0 else None
    # Full layers of a preallocated cache are of another kind if transformers moves them.
    offloading = room is not None and metadata["offloading"] == "True"
    store = cast("Store", metadata["store"])
    chunk_tokens = "fp8" if metadata["chunk_tokens"] else None
    kinds = {"offloading": offloading, "store": store, "chunk_tokens": chunk_tokens}
    cache = FlashEvaCache.for_model(model, max_cache_len=room, **kinds)
    numbers = json.loads(metadata["numbers"])
    for index, layer in enumerate(cache.layers):
        prefix = f"{index}."
        own = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        _restore(layer, own, numbers[index])
    cache.told = tensors.get(_TOLD)
    return cache


def _has_fp8_chunks(cache: FlashEvaCache) -> bool:
    return any(isinstance(layer, EvaCacheLayer) and layer.fp8_chunks for layer in cache.layers)


def _expect_same(metadata: dict[str, str], model: Any, path: str) -> None:  # noqa: ANN401
    checks = (
        ("version", _VERSION, "another version of FlashEVA"),
        ("config", prepared_of(model).hybrid.to_json(), "another configuration"),
        ("model", fingerprint(model), "another model, or other weights"),
    )
    for name, expected, what in checks:
        if metadata.get(name) != expected:
            message = f"was written for {what}"
            raise ConfigError(message, subject=path, hint="prefill a new cache")


def _tensors_of(layer: Any) -> dict[str, Tensor]:  # noqa: ANN401
    if isinstance(layer, StateLayer):
        return {} if layer.state is None else layer.state._asdict()
    return {
        name: x
        for name, x in vars(layer).items()
        if isinstance(x, torch.Tensor) and not name.startswith("_")
    }


def _restore(layer: Any, tensors: dict[str, Tensor], numbers: dict[str, int]) -> None:  # noqa: ANN401
    if not tensors:
        return
    if isinstance(layer, StateLayer):
        # Sizes and dtype are those of what no bytes hold: a window, or else chunk tokens.
        kind = "exact" if "exact_k" in tensors else "rfa"
        layer.lazy_initialization(tensors[f"{kind}_k"], tensors[f"{kind}_v"])
        state = layer.state_type(**tensors)
        if layer.max_cache_len is not None and layer.state is not None:
            for x, stored in zip(layer.state, state, strict=True):
                x.copy_(stored)
        else:
            layer.state = state
    else:
        layer.lazy_initialization(tensors["keys"], tensors["values"])
        for name, x in tensors.items():
            setattr(layer, name, x)
    for name, number in numbers.items():
        setattr(layer, name, number)
