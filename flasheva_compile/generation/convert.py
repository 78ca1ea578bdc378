"""Carry out what was decided for a model's attentions: submodules, hooks, configurations."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from flasheva_compile.config import EvaConfig
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation import interface
from flasheva_compile.generation.alibi import SLOPES, AlibiSlopes
from flasheva_compile.generation.cache_layer import EvaCacheLayer
from flasheva_compile.generation.default_cache import prepare_cache
from flasheva_compile.generation.eva_attention import EvaAttention
from flasheva_compile.generation.full_cache_layer import FullCacheLayer
from flasheva_compile.generation.interface import KeptAttention
from flasheva_compile.generation.prepared import (
    CachedLayer,
    FullLayer,
    Prepared,
    attention_configs,
)
from flasheva_compile.generation.rerouting import reroute
from flasheva_compile.generation.routes import CACHE_ARGUMENTS, place_of, route_of
from flasheva_compile.generation.state_layer import StateLayer
from flasheva_compile.layer_config import kv_of
from flasheva_compile.layer_names import name_layers
from flasheva_compile.scope import KEPT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from flasheva_compile.config import HybridConfig
    from flasheva_compile.generation.probe import ProbedAttention
    from flasheva_compile.report import CompileReport

# In config.json: transformers refuses it, unless FlashEVA loads the checkpoint. Not the name of the
# running attention, which is known in every process that has prepared a model.
SAVED_NAME = "FlashEVA"

_VERSION = 1


def convert(
    model: Any,  # noqa: ANN401
    found: Sequence[ProbedAttention],
    decisions: Mapping[str, EvaConfig | str],
    hybrid: HybridConfig,
    report: CompileReport,
) -> None:
    """Convert in place; :func:`revert` undoes it.

    Args:
        model: The model.
        found: Its attentions.
        decisions: Path -> configuration, or the reason why it stays full.
        hybrid: The configuration, to be saved with the model.
        report: One row per attention.
    """
    interface.register()
    by_id = {id(seen.module): seen for seen in found}
    converted: dict[int, CachedLayer] = {}
    for module in list(model.modules()):
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        seen = by_id.get(id(module))
        decision = None if seen is None else decisions[seen.path]
        if seen is not None and isinstance(decision, EvaConfig):
            module.flasheva = _eva_attention(seen, decision)
            assert seen.index is not None
            converted[seen.index] = CachedLayer(
                path=seen.path,
                config=decision,
                kv_heads=seen.kv_heads,
                head_dim=seen.head_dim,
                value_dim=seen.value_dim,
                alibi=seen.slopes is not None,
            )
        elif seen is not None:
            if seen.slopes is not None:
                setattr(module, SLOPES, AlibiSlopes(seen.slopes, _device_of(seen)))
            setattr(module, KEPT, KeptAttention(seen.implementation, seen.causal))
        elif implementation is not None:
            setattr(module, KEPT, KeptAttention(implementation, causal=False))
        if seen is not None:
            route = route_of(module)
            if route is not None:
                reroute(module, route.replace(interface.attention_forward))
            module.register_forward_pre_hook(announce_cache, with_kwargs=True)
    for module in model.modules():
        parts = {id(part) for part in module.modules()}
        if isinstance(module, PreTrainedModel) and any(i in by_id for i in parts):
            module.register_forward_pre_hook(refuse_weights, with_kwargs=True)
    model._flasheva_prepared = Prepared(
        hybrid=hybrid,
        converted=converted,
        full=_full_layers(model, found, converted, hybrid),
        report=report,
        implementations=_switch(model, hybrid),
    )
    model._prepare_cache_for_generation = types.MethodType(prepare_cache, model)


def _full_layers(
    model: nn.Module,
    found: Sequence[ProbedAttention],
    converted: Mapping[int, CachedLayer],
    hybrid: HybridConfig,
) -> dict[int, FullLayer]:
    """Return the attentions that stay full, by their place in the cache."""
    modules = [name for name, _ in model.named_modules()]
    names = name_layers([seen.path for seen in found], modules)
    return {
        seen.index: FullLayer(
            path=seen.path,
            reason=seen.reason,
            kv_heads=seen.kv_heads,
            head_dim=seen.head_dim,
            value_dim=seen.value_dim,
            kv=kv_of(hybrid.resolve(name)),
            alibi=seen.slopes is not None,
        )
        for seen, name in zip(found, names, strict=True)
        if seen.index is not None and seen.index not in converted
    }


def _eva_attention(seen: ProbedAttention, config: EvaConfig) -> EvaAttention:
    device = _device_of(seen)
    return EvaAttention(seen.path, config, seen.kv_heads, seen.head_dim, device, seen.slopes)


def _device_of(seen: ProbedAttention) -> torch.device:
    return next((p.device for p in seen.module.parameters()), torch.device("cpu"))


def _switch(model: nn.Module, hybrid: HybridConfig) -> dict[int, tuple[Any, str]]:
    """Point every configuration of the model at the attention "eva"."""
    before = {id(config): (config, name) for config, name in attention_configs(model)}
    for config, name in before.values():
        config._attn_implementation = interface.NAME
        config.attn_implementation = SAVED_NAME
        config.flasheva = announced_config(hybrid, name)
    return before


def announced_config(hybrid: HybridConfig, full_implementation: str) -> dict[str, Any]:
    """Return what ``config.json`` of a prepared model says of it."""
    return {
        "version": _VERSION,
        "layers": hybrid.to_dict(),
        "full_implementation": full_implementation,
    }


def refuse_weights(module: Any, args: Any, kwargs: dict[str, Any]) -> None:  # noqa: ANN401
    """Before a model runs, refuse to be asked for weights, which transformers would leave out."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", interface.NAME)
    if kwargs.get("output_attentions") and name == interface.NAME:
        raise no_weights()


def no_weights() -> ConfigError:
    """Return what is said to those who ask a prepared model for attention weights."""
    return ConfigError(
        "a prepared model has none: no weights of all tokens are computed",
        subject="output_attentions",
        hint='leave it out, or revert(model) and model.set_attn_implementation("eager")',
    )


def announce_cache(module: Any, args: Any, kwargs: dict[str, Any]) -> None:  # noqa: ANN401
    """Before an attention runs, tell it which cache layer it will update."""
    refuse_weights(module, args, kwargs)  # given to the model by position
    cache = next((kwargs[n] for n in CACHE_ARGUMENTS if kwargs.get(n) is not None), None)
    eva = getattr(module, "flasheva", None)
    layer, index = None, place_of(module)
    if cache is not None and not hasattr(cache, "layers"):
        raise ConfigError(
            f"cannot attend through a {type(cache).__name__}",
            subject="past_key_values",
            hint="call the model with use_cache=False if it attends to another sequence, too",
        )
    if cache is not None and index is not None and index < len(cache.layers):
        layer = cache.layers[index]
    if isinstance(layer, StateLayer):
        _expect_our_attention(module)
    if eva is None:
        getattr(module, KEPT).announced.set(layer)
        if isinstance(layer, FullCacheLayer):
            layer.announced = True
        return
    if not isinstance(eva, EvaAttention):
        # peft's wrapper hands reading on to the module that runs, but not writing.
        eva = eva.rule_parameters.__self__
    eva.announced.set(None)  # a call that failed half-way has left its own
    if isinstance(layer, EvaCacheLayer):
        if layer.path != eva.path or layer.config != eva.config:
            message = f"its cache was made for {layer.path} with {layer.config}"
            raise ConfigError(message, subject=eva.path, hint="use FlashEvaCache.for_model(model)")
        eva.announced.set(layer)
        layer.announced = True
    elif layer is not None and type(layer) is not DynamicLayer:
        # Its keys are not the columns so far: a preallocated one returns those to come, too.
        raise ConfigError(
            f"cannot attend through a {type(layer).__name__}",
            subject=eva.path,
            hint="pass FlashEvaCache.for_model(model), or let generate make its cache",
        )


def _expect_our_attention(module: Any) -> None:  # noqa: ANN401
    """Refuse a layer of ours under another attention: it hands out the new keys and values only."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", interface.NAME)
    if name != interface.NAME:
        raise ConfigError(
            f"the attention implementation was set to {name!r} after the model was prepared",
            subject=type(module).__name__,
            hint="call revert(model), set it, and call prepare(model, config) again",
        )
