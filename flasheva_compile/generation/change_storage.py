"""Change in place how full layers are stored; nothing that was learned is lost."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.convert import announced_config
from flasheva_compile.generation.expect_storable import expect_fitting, expect_without_alibi
from flasheva_compile.generation.prepared import attention_configs, prepared_of
from flasheva_compile.layer_config import is_full, kv_of, left_full
from flasheva_compile.layer_names import name_layers
from flasheva_compile.quantization.formats import EXACT

if TYPE_CHECKING:
    from flasheva_compile.config import HybridConfig


def change_storage(model: Any, hybrid: HybridConfig) -> bool:  # noqa: ANN401 - a prepared model
    """Take over a configuration that differs from the model's own in ``kv`` alone.

    Returns:
        Whether it was taken over; otherwise nothing is changed.

    Raises:
        ConfigError: Attentions cannot be stored so, or none would be stored or converted.
    """
    prepared = prepared_of(model)
    paths = [row.path for row in prepared.report.layers]
    modules = [name for name, _ in model.named_modules()]
    names = name_layers(paths, modules)
    hybrid.check(names, modules)
    configs = {name.path: hybrid.resolve(name) for name in names}
    before = {name.path: prepared.hybrid.resolve(name) for name in names}
    if any(_but_for_storage(configs[path]) != _but_for_storage(before[path]) for path in paths):
        return False
    full = {
        index: dataclasses.replace(layer, kv=kv_of(configs[layer.path]))
        for index, layer in prepared.full.items()
    }
    for layer in full.values():
        if layer.alibi:
            expect_without_alibi(layer.path, configs[layer.path])
        if not layer.reason:  # else a cache says why
            expect_fitting(layer, layer.kv)
    stored = any(layer.kv != EXACT and not layer.reason for layer in full.values())
    if not stored and not prepared.converted:
        message, hint = "would have nothing left to do", "revert(model), or give layers a kv"
        raise ConfigError(message, subject=type(model).__name__, hint=hint)
    rows = tuple(
        dataclasses.replace(row, reason=left_full(configs[row.path]))
        if row.expected and is_full(configs[row.path])
        else row
        for row in prepared.report.layers
    )
    prepared.hybrid, prepared.full = hybrid, full
    prepared.report = dataclasses.replace(prepared.report, layers=rows)
    for config, _ in attention_configs(model):
        config.flasheva = announced_config(hybrid, config.flasheva["full_implementation"])
    return True


def _but_for_storage(config: object) -> object:
    return "full" if is_full(config) else config
