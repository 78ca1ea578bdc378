"""``prepare`` and ``revert``: route a transformers model's attention through FlashEVA, in place."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flasheva_compile.config import EvaConfig, HybridConfig
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.alibi import SLOPES
from flasheva_compile.generation.change_storage import change_storage
from flasheva_compile.generation.convert import announce_cache, convert, no_weights, refuse_weights
from flasheva_compile.generation.eva_attention import EvaAttention
from flasheva_compile.generation.expect_storable import expect_fitting, expect_without_alibi
from flasheva_compile.generation.interface import own_attention_function
from flasheva_compile.generation.prepared import ATTRIBUTE, attention_configs, prepared_of
from flasheva_compile.generation.probe import ProbedAttention, probe
from flasheva_compile.generation.rerouting import expect_restorable, restore
from flasheva_compile.generation.routes import refusals
from flasheva_compile.generation.verify import verify
from flasheva_compile.layer_config import is_full, kv_of, left_full
from flasheva_compile.layer_names import name_layers
from flasheva_compile.op_checks import CHUNK_RULES
from flasheva_compile.quantization.formats import EXACT
from flasheva_compile.report import PREPARED, CompileReport, LayerReport
from flasheva_compile.scope import KEPT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

log = logging.getLogger(__name__)


def prepare(model: Any, config: Any = None) -> Any:  # noqa: ANN401 - a transformers model
    """Convert a transformers model's attentions to FlashEVA, in place.

    The model then attends through ops of ours, uncompiled or compiled alike; each converted
    attention has a submodule ``flasheva`` with the trainable parameters of its chunk rule, and
    ``generate`` uses a :class:`FlashEvaCache`. A trial run on nine tokens decides which attentions
    can be converted; all others stay full, with a reason (:func:`report_of`). Where the
    configuration leaves all full, some must say how they are stored (``kv``).

    Args:
        model: A causal language model of transformers.
        config: A ``HybridConfig``, an ``EvaConfig``, or a dict: the ``layers`` dict of the backend,
            or fields of ``EvaConfig``. None = the defaults, or what a prepared model has.

    Returns:
        The same model. Preparing it again with the same configuration changes nothing; with one
        that differs in how full layers are stored (``kv``), nothing but that.

    Raises:
        ConfigError: Wrong configuration, nothing to convert, not a model of transformers, or a
            checkpoint of a prepared model that was loaded without its parameters. The model is then
            as it was.
    """
    _expect_language_model(model)
    prepared = getattr(model, ATTRIBUTE, None)
    if config is None and prepared is not None:
        return model
    if config is None and getattr(model.config, "flasheva", None):
        raise ConfigError(
            "was saved while it was prepared, and loaded without its chunk rules' parameters",
            subject=type(model).__name__,
            hint="load it with from_pretrained, or give a configuration to begin anew",
        )
    if any(getattr(config, "output_attentions", False) for config, _ in attention_configs(model)):
        raise no_weights()
    hybrid = hybrid_config(config)
    if prepared is not None:
        if prepared.hybrid.to_dict() == hybrid.to_dict() or change_storage(model, hybrid):
            return model
        return _prepare_again(model, hybrid)
    return _prepare_anew(model, hybrid)


def revert(model: Any) -> Any:  # noqa: ANN401 - a transformers model
    """Undo :func:`prepare`, in place; the chunk rules' parameters are dropped.

    Raises:
        ConfigError: The model is not prepared, or something has wrapped what was replaced.
    """
    prepared = prepared_of(model)
    expect_restorable(model)
    for module in list(model.modules()):
        restore(module)
        module.__dict__.pop(KEPT, None)
        module._modules.pop(SLOPES, None)
        if isinstance(module._modules.get("flasheva"), EvaAttention):
            del module._modules["flasheva"]
        for key, hook in list(module._forward_pre_hooks.items()):
            # By identity: a copied model has no handles.
            if hook is announce_cache or hook is refuse_weights:
                module._forward_pre_hooks.pop(key)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    for config, name in prepared.implementations.values():
        config._attn_implementation = name
        config.__dict__.pop("flasheva", None)
        config.__dict__.pop("attn_implementation", None)
    del model._flasheva_prepared
    model.__dict__.pop("_prepare_cache_for_generation", None)
    return model


def report_of(model: Any) -> CompileReport:  # noqa: ANN401 - a transformers model
    """Return what :func:`prepare` decided, with formats of full layers and weights of bounds."""
    report = prepared_of(model).report
    stored = {x.path: x.kv for x in prepared_of(model).full.values() if not x.not_quantizable}
    learned = {eva.path for eva in _eva_attentions(model) if eva.selector_weight is not None}
    rows = tuple(
        dataclasses.replace(
            row, weighted_bounds=row.path in learned, kv=stored.get(row.path, EXACT)
        )
        for row in report.layers
    )
    return dataclasses.replace(report, layers=rows)


def hybrid_config(config: Any) -> HybridConfig:  # noqa: ANN401
    """Read what :func:`prepare` accepts."""
    if config is None:
        return HybridConfig()
    if isinstance(config, HybridConfig):
        return config
    if isinstance(config, EvaConfig):
        return HybridConfig(default=config)
    if not isinstance(config, Mapping):
        message = f"must be a HybridConfig, an EvaConfig or a dict, got {type(config).__name__}"
        raise ConfigError(message, subject="config")
    if "layers" in config:
        rest = {name: value for name, value in config.items() if name not in ("layers", "version")}
        return HybridConfig.from_dict(config["layers"], base=EvaConfig.from_dict(rest))
    fields = {field.name for field in dataclasses.fields(EvaConfig)}
    if fields & set(config):
        return HybridConfig(default=EvaConfig.from_dict(config))
    return HybridConfig.from_dict(config)


def _expect_language_model(model: Any) -> None:  # noqa: ANN401
    from transformers import PreTrainedModel

    hint = 'use torch.compile(model, backend="flasheva") for any other module'
    if not isinstance(model, PreTrainedModel):
        name = type(model).__name__
        raise ConfigError(f"{name} is not a model of transformers", subject="model", hint=hint)
    if model.config.is_encoder_decoder:
        message = f"{type(model).__name__} is an encoder-decoder model"
        raise ConfigError(message, subject="model", hint=hint)


# --- carrying out ---------------------------------------------------------------------------------


def _prepare_anew(model: Any, hybrid: HybridConfig) -> Any:  # noqa: ANN401
    found = tuple(map(_without_foreign, _without_shared(probe(model))))
    decisions = _decide(model, found, hybrid)
    report = _report(found, decisions)
    convert(model, found, decisions, hybrid, report)
    try:
        verify(model)
    except Exception:
        revert(model)
        raise
    _log(report)
    return model


def _prepare_again(model: Any, hybrid: HybridConfig) -> Any:  # noqa: ANN401
    """Prepare a prepared model in another way, or leave it as it is, with what it has learned."""
    before, evas = prepared_of(model), {eva.path: eva for eva in _eva_attentions(model)}
    revert(model)
    try:
        return _prepare_anew(model, hybrid)
    except Exception:
        _prepare_anew(model, before.hybrid)
        prepared_of(model).codebooks = before.codebooks
        for path, eva in evas.items():
            model.get_submodule(path).flasheva = eva
        raise


def _eva_attentions(model: nn.Module) -> list[EvaAttention]:
    return [module for module in model.modules() if isinstance(module, EvaAttention)]


# --- deciding -------------------------------------------------------------------------------------


def _without_shared(found: Sequence[ProbedAttention]) -> tuple[ProbedAttention, ...]:
    """Give attentions a reason that cannot have a cache layer of their own."""
    reason = "it runs more than once in a forward pass, or shares its cache"
    indices = [seen.index for seen in found]
    return tuple(
        dataclasses.replace(seen, reason=reason)
        if not seen.reason and (seen.calls != 2 or indices.count(seen.index) != 1)
        else seen
        for seen in found
    )


def _without_foreign(seen: ProbedAttention) -> ProbedAttention:
    """Give an attention a reason that runs a function whose meaning is not known.

    The trial run calls "eager", whatever else a model runs.
    """
    name = seen.implementation
    function: Any = own_attention_function(seen.module, name)
    function = getattr(function, "func", function)  # kernels from a hub are partial functions
    if seen.reason or name == "eager" or function.__module__.startswith("transformers."):
        return seen
    reason = (
        f"it runs the attention function {name!r}, which is not one of transformers' "
        '(set_attn_implementation("sdpa") before, if softmax attention is meant)'
    )
    return dataclasses.replace(seen, reason=reason)


def _decide(
    model: nn.Module, found: Sequence[ProbedAttention], hybrid: HybridConfig
) -> dict[str, EvaConfig | str]:
    """Map each attention's path to its configuration, or to the reason why it stays full."""
    modules = [name for name, _ in model.named_modules()]
    names = name_layers([seen.path for seen in found], modules)
    hybrid.check(names, modules)
    decisions: dict[str, EvaConfig | str] = {}
    stored = False
    for seen, name in zip(found, names, strict=True):
        config = hybrid.resolve(name)
        if seen.slopes is not None:
            expect_without_alibi(seen.path, config)
        if not seen.reason:  # else a cache says why
            expect_fitting(seen, kv_of(config))
        if is_full(config):
            decisions[seen.path] = left_full(config)
            stored |= kv_of(config) != EXACT and not seen.reason
        else:
            decisions[seen.path] = seen.reason or config
    converts = any(isinstance(decision, EvaConfig) for decision in decisions.values())
    if not converts and not stored:
        raise _nothing_converted(model, decisions)
    return decisions


def _nothing_converted(model: nn.Module, decisions: Mapping[str, EvaConfig | str]) -> ConfigError:
    reasons = sorted({str(decision) for decision in decisions.values()}) or refusals(model)
    why = "; ".join(reasons) or "no attention goes through transformers' AttentionInterface"
    return ConfigError(
        f"no attention of {type(model).__name__} can be converted: {why}",
        hint='torch.compile(model, backend="flasheva") recognises attention in the graph instead',
    )


def _report(
    found: Sequence[ProbedAttention], decisions: Mapping[str, EvaConfig | str]
) -> CompileReport:
    rows: list[LayerReport] = []
    for seen in found:
        decision = decisions[seen.path]
        facts: dict[str, Any] = {
            "itemsize": seen.itemsize,
            "causal": seen.causal,
            "heads": seen.heads,
            "kv_heads": seen.kv_heads,
            "head_dim": seen.head_dim,
            "value_dim": seen.value_dim,
        }
        if isinstance(decision, str):
            expected = decision.startswith("the configuration")
            row = LayerReport(
                path=seen.path, decision="full", reason=decision, expected=expected, **facts
            )
        else:
            facts |= dataclasses.asdict(decision) | {"sink_tokens": decision.sink_size}
            row = LayerReport(
                path=seen.path,
                decision="eva",
                reason=PREPARED,
                rule_parameters=CHUNK_RULES[decision.chunk_rule][-1],
                mask="causal, padding" + ", ALiBi" * (seen.slopes is not None),
                **facts,
            )
        rows.append(row)
    return CompileReport(layers=tuple(rows))


def _log(report: CompileReport) -> None:
    for row in report.layers:
        log.info("%s: %s%s", row.path, row.decision, f" ({row.reason})" if row.reason else "")
    if report.unexpected:
        reasons = sorted({row.reason for row in report.unexpected})
        log.warning("%d attentions stay full: %s", len(report.unexpected), "; ".join(reasons))
