"""Compare a model just prepared with what it was: wiring, end to end."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation import interface
from flasheva_compile.generation.alibi import SLOPES
from flasheva_compile.generation.cache import FlashEvaCache
from flasheva_compile.generation.eva_attention import EvaAttention
from flasheva_compile.generation.prepared import prepared_of
from flasheva_compile.generation.probe import evaluating, probe_calls
from flasheva_compile.generation.rerouting import restored
from flasheva_compile.generation.routes import route_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flasheva_compile.config import EvaConfig


def verify(model: Any) -> None:  # noqa: ANN401
    """Compare the prepared model, windows over everything, with the model as it was."""
    evas = [m for m in model.modules() if isinstance(m, EvaAttention)]
    before = [eva.config for eva in evas]
    converted = prepared_of(model).converted
    try:
        for eva in evas:
            eva.config = _over_everything(eva.config)
        prepared_of(model).converted = {
            index: dataclasses.replace(layer, config=_over_everything(layer.config))
            for index, layer in converted.items()
        }
        ours = _logits(model, FlashEvaCache.for_model(model, full_layers="exact"))
    except ConfigError:
        raise
    except Exception as error:
        raise _does_not_run(model, error) from error
    finally:
        prepared_of(model).converted = converted
        for eva, config in zip(evas, before, strict=True):
            eva.config = config
    with _as_it_was(model):
        from transformers.cache_utils import DynamicCache

        full = _logits(model, DynamicCache(config=model.config.get_text_config(decoder=True)))
    error, scale = (ours - full).abs().max(), full.abs().max()
    # Layers amplify what rounding does to one of them; a wrong wiring is of the logits' own size.
    if not error <= max(1e-3, 64 * torch.finfo(_precision(model, full.dtype)).eps) * scale:
        raise ConfigError(
            f"{type(model).__name__} computes something else once prepared (by {float(error):.2g} "
            f"of {float(scale):.2g}), although each attention agrees",
            hint='use torch.compile(model, backend="flasheva")',
        )


def _precision(model: Any, dtype: torch.dtype) -> torch.dtype:  # noqa: ANN401
    """Return the precision that a model computes in: bf16 if it rounds its ALiBi biases to that."""
    for module in model.modules():
        route, eva = route_of(module), getattr(module, "flasheva", None)
        biased = hasattr(module, SLOPES) or (eva is not None and eva.slopes is not None)
        if biased and route is not None and route.alibi is not None and route.alibi.rounds(module):
            return torch.bfloat16
    return dtype


def _does_not_run(model: Any, error: Exception) -> ConfigError:  # noqa: ANN401
    why = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    return ConfigError(
        f"{type(model).__name__} does not run with a compressed cache: {why}",
        hint='use torch.compile(model, backend="flasheva")',
    )


def _over_everything(config: EvaConfig) -> EvaConfig:
    c = config.chunk_size
    # The probe's rows are shorter than the window: nothing is left to retrieve.
    nothing = {"retrieve_chunks": 0, "retrieve_block": 1, "retrieve_by": "token"}
    return config.replace(window_size=-(-16 // c) * c, **nothing)


def _logits(model: Any, cache: Any) -> torch.Tensor:  # noqa: ANN401
    """Return the logits of the probe's calls where tokens are valid, as one row."""
    parts: list[torch.Tensor] = []
    with evaluating(model), torch.no_grad():
        for inputs in probe_calls(model):
            result = model(**inputs, past_key_values=cache, use_cache=True)
            hidden = result.logits if hasattr(result, "logits") else result.last_hidden_state
            valid = inputs["attention_mask"][:, -hidden.shape[1] :].bool()
            parts.append(hidden[valid].flatten())
    return torch.cat(parts)


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Run the model's own attention functions for a while."""
    before = list(prepared_of(model).implementations.values())
    for config, name in before:
        config._attn_implementation = name
    try:
        with restored(model):
            yield
    finally:
        for config, _ in before:
            config._attn_implementation = interface.NAME
