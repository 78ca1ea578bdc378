"""Models with FlashEVA parameters on disk, and caches: what is written is what is read."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.cache import FlashEvaCache
from flasheva_compile.generation.cache_layer import EvaCacheLayer
from flasheva_compile.generation.prepare import prepare
from flasheva_compile.generation.prepared import prepared_of
from flasheva_compile.kernels.blocked.cache_state import CacheState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

_VERSION = "1"
_SAMPLE = 64  # elements of each parameter that identify a model's weights
_NUMBERS = ("cumulative_length", "seen", "is_empty")


# --- models ---------------------------------------------------------------------------------------


def from_pretrained(path: str | Path, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Load a model that was saved while it was prepared, and prepare it again.

    Args:
        path: What ``save_pretrained`` wrote.
        *args: As of ``AutoModelForCausalLM.from_pretrained``.
        **kwargs: As of ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        The prepared model, with the chunk rules' parameters as saved.

    Raises:
        ConfigError: The checkpoint was not written by a prepared model, or lacks parameters.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    if not getattr(config, "flasheva", None):
        raise ConfigError(
            "its config.json has no FlashEVA configuration",
            subject=str(path),
            hint="load it with transformers and call prepare(model, config)",
        )
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    with _ignoring_our_keys(model_class):
        model = AutoModelForCausalLM.from_pretrained(path, *args, **kwargs)
    training = model.training
    model = prepare(model).train(training)
    own = {name: x for name, x in model.named_parameters() if ".flasheva." in name}
    saved = _our_tensors(Path(path))
    missing = sorted(set(own) - set(saved))
    if missing:
        raise ConfigError(f"lacks {missing[0]} and {len(missing) - 1} more", subject=str(path))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])
    return model


@contextmanager
def _ignoring_our_keys(model_class: Any) -> Iterator[None]:  # noqa: ANN401
    """Keep transformers from reporting our parameters as unexpected: they are loaded later."""
    before = model_class._keys_to_ignore_on_load_unexpected
    model_class._keys_to_ignore_on_load_unexpected = [*(before or ()), r"\.flasheva\."]
    try:
        yield
    finally:
        model_class._keys_to_ignore_on_load_unexpected = before


def _our_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            ours = [name for name in stored.keys() if ".flasheva." in name]  # noqa: SIM118
            tensors |= {name: stored.get_tensor(name) for name in ours}
    return tensors


# --- caches ---------------------------------------------------------------------------------------


def save_cache(cache: FlashEvaCache, model: Any, path: str | Path) -> None:  # noqa: ANN401
    """Write a cache as safetensors, with what identifies its model.

    Args:
        cache: A cache of ``model``.
        model: The prepared model.
        path: The file to write.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    numbers: list[dict[str, int]] = []
    for index, layer in enumerate(cache.layers):
        numbers.append({n: v for n in _NUMBERS if isinstance(v := vars(layer).get(n), int)})
        for name, x in _tensors_of(layer).items():
            tensors[f"{index}.{name}"] = x.contiguous()
    metadata = {
        "version": _VERSION,
        "model": fingerprint(model),
        "config": prepared_of(model).hybrid.to_json(),
        "max_cache_len": str(cache.get_max_length()),
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
    cache = FlashEvaCache.for_model(model, max_cache_len=length if length >= 0 else None)
    numbers = json.loads(metadata["numbers"])
    for index, layer in enumerate(cache.layers):
        prefix = f"{index}."
        own = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        _restore(layer, own, numbers[index])
    return cache


def fingerprint(model: nn.Module) -> str:
    """Return a digest of a model's parameter names, shapes, dtypes and of some of its weights."""
    digest = hashlib.sha256()
    for name, x in model.named_parameters():
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        sample = x.detach().flatten()[:_SAMPLE].float().cpu()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


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
    if isinstance(layer, EvaCacheLayer):
        return {} if layer.state is None else layer.state._asdict()
    return {
        name: x
        for name, x in vars(layer).items()
        if isinstance(x, torch.Tensor) and not name.startswith("_")
    }


def _restore(layer: Any, tensors: dict[str, Tensor], numbers: dict[str, int]) -> None:  # noqa: ANN401
    if not tensors:
        return
    if isinstance(layer, EvaCacheLayer):
        layer.lazy_initialization(tensors["exact_k"], tensors["exact_v"])
        state = CacheState(**tensors)
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
