"""The configuration of a prepared model with some of its attentions left full."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from flasheva_compile.config import HybridConfig
from flasheva_compile.generation.prepared import prepared_of
from flasheva_compile.layer_names import covers, name_layers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flasheva_compile.config import FullConfig, LayerName


def attention_names(model: Any) -> dict[str, LayerName]:  # noqa: ANN401
    """Return the names of all attentions of a prepared model by their paths."""
    paths = [row.path for row in prepared_of(model).report.layers]
    names = name_layers(paths, [path for path, _ in model.named_modules()])
    return {name.path: name for name in names}


def layers_with_full(
    model: Any,  # noqa: ANN401
    full: Mapping[str, FullConfig | Literal["full"]],
) -> dict[str | int, Any]:
    """Return the model's own configuration with the attentions at these paths full.

    A layer is named by its index where that names nothing else and no path overrules it.
    """
    hybrid, names = prepared_of(model).hybrid, attention_names(model)
    layers = {k: v for k, v in hybrid.to_dict().items() if k != "version"}
    wanted = {path: hybrid.resolve(name) for path, name in names.items()}
    wanted |= full
    for path, config in full.items():
        value = config if isinstance(config, str) else config.to_dict()
        index = names[path].index
        alone = index is not None and sum(covers(index, name) for name in names.values()) == 1
        if alone and _resolved(_with_index(layers, names[path], value), names[path]) == config:
            layers = _with_index(layers, names[path], value)
        else:
            layers[path] = value
    assert wanted == {path: _resolved(layers, name) for path, name in names.items()}
    return {"default": layers.pop("default")} | {_key(key): layers[key] for key in layers}


def _with_index(layers: dict[str, Any], name: LayerName, value: Any) -> dict[str, Any]:  # noqa: ANN401
    """Name a layer by its index; other indices that name it are dropped."""
    kept = {key: other for key, other in layers.items() if not _is_index(key, name)}
    return {**kept, str(name.index): value}


def _is_index(key: str, name: LayerName) -> bool:
    number = _key(key)
    return isinstance(number, int) and covers(number, name)


def _key(key: str) -> str | int:
    return int(key) if key.removeprefix("-").isdecimal() else key


def _resolved(layers: dict[str, Any], name: LayerName) -> Any:  # noqa: ANN401
    return HybridConfig.from_dict(layers).resolve(name)
