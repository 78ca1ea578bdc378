"""Let transformers' own ``from_pretrained`` load what prepared models saved."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.checkpoint import checkpoint_config, load_prepared

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_replaced: list[tuple[Callable[..., Any], Callable[..., Any]]] = []  # ours, and what it was


def register_with_transformers() -> None:
    """Let ``AutoModelForCausalLM.from_pretrained`` and its like restore prepared models.

    Afterwards a checkpoint that a prepared model saved loads as the prepared model, with its chunk
    rules' parameters; every other checkpoint loads as before. Calling it again changes nothing, and
    :func:`unregister_from_transformers` undoes it.

    It wraps one public method, ``PreTrainedModel.from_pretrained``, which all classes of models and
    all ``Auto`` classes end in; the wrapper acts on checkpoints whose ``config.json`` has a
    FlashEVA configuration. The ways that wrap nothing cannot do it: a quantizer's hook
    (``register_quantizer``) runs before there are weights, which preparing a model needs, takes the
    one ``quantization_config`` and makes Trainer take the model for a quantized one; a model type
    of our own (``AutoConfig.register``) would hide from other libraries what the model is.

    Example:
        >>> fe.register_with_transformers()
        >>> model = AutoModelForCausalLM.from_pretrained(folder)
    """
    if not _replaced:
        original = _base_class().from_pretrained.__func__
        ours = _wrapped(original)
        _replaced.append((ours, original))
        _base_class().from_pretrained = classmethod(ours)


def unregister_from_transformers() -> None:
    """Undo :func:`register_with_transformers`, if it was called.

    Raises:
        ConfigError: Something else has wrapped ``from_pretrained`` since.
    """
    if not _replaced:
        return
    ours, original = _replaced[0]
    if _base_class().from_pretrained.__func__ is not ours:
        raise ConfigError(
            "was wrapped by something else after register_with_transformers()",
            subject="PreTrainedModel.from_pretrained",
            hint="undo that first",
        )
    _base_class().from_pretrained = classmethod(original)
    _replaced.clear()


def _base_class() -> Any:  # noqa: ANN401 - pyright forbids to change it
    from transformers import PreTrainedModel

    return PreTrainedModel


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_pretrained(
        cls: Any,  # noqa: ANN401
        pretrained_model_name_or_path: str | Path | None,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        path, load = pretrained_model_name_or_path, functools.partial(original, cls)
        if path is None or not _is_prepared(cls, path, kwargs):
            return load(path, *args, **kwargs)
        adapter = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")
        if adapter:
            raise ConfigError(
                "transformers loads an adapter before its model is prepared",
                subject=str(adapter),
                hint="use peft: AutoPeftModelForCausalLM.from_pretrained(folder)",
            )
        return load_prepared(load, cls, path, *args, **kwargs)

    return from_pretrained


def _is_prepared(model_class: Any, path: str | Path, kwargs: dict[str, Any]) -> bool:  # noqa: ANN401
    """Tell whether a prepared model wrote a checkpoint; what cannot be read is not for us."""
    from transformers import PreTrainedConfig

    config = kwargs.get("config")
    if isinstance(config, PreTrainedConfig):
        return bool(getattr(config, "flasheva", None))
    if kwargs.get("gguf_file") or model_class.config_class is None:
        return False
    try:
        found = checkpoint_config(config or path, kwargs)
    except (OSError, ValueError):
        return False  # transformers says what is wrong with it
    return bool(found.get("flasheva"))
