"""The configuration of a prepared model with some of its attentions left full."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flasheva_compile.config import HybridConfig
from flasheva_compile.generation.prepared import prepared_of
from flasheva_compile.layer_names import covers, name_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flasheva_compile.config import LayerName


def attention_names(model: Any) -> dict[str, LayerName]:  # noqa: ANN401
    """Return the names of all attentions of a prepared model by their paths."""
    paths = [row.path for row in prepared_of(model).report.layers]
    names = name_layers(paths, [path for path, _ in model.named_modules()])
    return {name.path: name for name in names}


def layers_with_full(model: Any, full: Sequence[str]) -> dict[str | int, Any]:  # noqa: ANN401
    """Return the model's own configuration with the attentions at these paths full.

    A layer is named by its index where that names nothing else and no path overrules it.
    """
    hybrid, names = prepared_of(model).hybrid, attention_names(model)
    layers = {k: v for k, v in hybrid.to_dict().items() if k != "version"}
    wanted = {path: hybrid.resolve(name) for path, name in names.items()}
    wanted |= dict.fromkeys(full, "full")
    for path in full:
        index = names[path].index
        alone = index is not None and sum(covers(index, name) for name in names.values()) == 1
        if alone and _resolved(_with_index(layers, names, path), names[path]) == "full":
            layers = _with_index(layers, names, path)
        else:
            layers[path] = "full"
    assert wanted == {path: _resolved(layers, name) for path, name in names.items()}
    return {"default": layers.pop("default")} | {_key(key): layers[key] for key in layers}


def _with_index(layers: dict[str, Any], names: dict[str, LayerName], path: str) -> dict[str, Any]:
    """Make a layer full by its index; other indices that name it are dropped."""
    index = names[path].index
    kept = {key: value for key, value in layers.items() if not _is_index(key, names[path])}
    return {**kept, str(index): "full"}


def _is_index(key: str, name: LayerName) -> bool:
    number = _key(key)
    return isinstance(number, int) and covers(number, name)


def _key(key: str) -> str | int:
    return int(key) if key.removeprefix("-").isdecimal() else key


def _resolved(layers: dict[str, Any], name: LayerName) -> Any:  # noqa: ANN401
    return HybridConfig.from_dict(layers).resolve(name)
