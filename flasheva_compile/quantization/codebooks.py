"""What a model's codes mean: in memory, and as safetensors that know their model."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flasheva_compile.errors import ConfigError
from flasheva_compile.quantization.formats import WordKvFormat, kv_format
from flasheva_compile.quantization.transform_coding import LayerTransforms
from flasheva_compile.quantization.vecinfer import LayerCodebooks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flasheva_compile.quantization.formats import KvFormat

_KIND, _VERSION = "flasheva kv codebooks", "3"
CODEBOOKS = "kv_codebooks.safetensors"
"""The file beside a saved model."""

_FLAGS = ("rotate_keys", "rotate_values")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What a layer caches per token.

    Attributes:
        kv_heads: ``Hkv``.
        head_dim: ``D``.
        value_dim: ``Dv``.
    """

    kv_heads: int
    head_dim: int
    value_dim: int

    def __str__(self) -> str:
        return f"{self.kv_heads} kv heads of {self.head_dim} and {self.value_dim} channels"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCodebooks:
    """What :func:`flasheva_compile.calibrate_kv` learned.

    Attributes:
        formats: Place in the cache -> a name of
            :data:`~flasheva_compile.quantization.formats.FORMATS`.
        model: Fingerprint of the model.
        tokens: Valid tokens that it was learned from.
        layers: Place in the cache -> scales and codebooks, or transforms.
        shapes: Place in the cache -> shape.
    """

    formats: Mapping[int, str]
    model: str
    tokens: int
    layers: Mapping[int, LayerCodebooks | LayerTransforms]
    shapes: Mapping[int, LayerShape]

    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(layer.nbytes() for layer in self.layers.values())

    def __str__(self) -> str:
        counts = Counter(self.formats[index] for index in sorted(self.layers))
        what = " and ".join(f"{name} codebooks of {n} layers" for name, n in counts.items())
        return f"{what}, {self.tokens} tokens, {self.nbytes() / 1024:.0f} KiB"

    @classmethod
    def chosen(cls, learned: Mapping[int, KvCodebooks]) -> KvCodebooks:
        """Return one of several layers, each taken from what is given for its place.

        Raises:
            ConfigError: They were learned from different models.
        """
        models = {books.model for books in learned.values()}
        if len(models) != 1:
            message = f"were learned from {len(models)} models"
            raise ConfigError(message, subject="codebooks", hint="give those of one model")
        return cls(
            formats={index: books.formats[index] for index, books in learned.items()},
            model=models.pop(),
            tokens=min(books.tokens for books in learned.values()),
            layers={index: books.layers[index] for index, books in learned.items()},
            shapes={index: books.shapes[index] for index, books in learned.items()},
        )

    # --- on disk ----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write safetensors, with what identifies formats, model and layers."""
        from safetensors.torch import save_file

        tensors = {
            f"{index}.{name}": tensor.cpu().contiguous()
            for index, layer in self.layers.items()
            for name, tensor in layer.tensors().items()
        }
        shapes = {
            index: {
                "format": self.formats[index],
                "kv_heads": shape.kv_heads,
                "head_dim": shape.head_dim,
                "value_dim": shape.value_dim,
                **_flags(self.layers[index]),
                "tensors": list(self.layers[index].tensors()),
            }
            for index, shape in self.shapes.items()
        }
        metadata = {
            "kind": _KIND,
            "version": _VERSION,
            "model": self.model,
            "tokens": str(self.tokens),
            "layers": json.dumps(shapes),
        }
        save_file(tensors, str(path), metadata)

    @classmethod
    def load(cls, path: str | Path) -> KvCodebooks:
        """Read what :meth:`save` wrote; whose it is, is checked where it is used.

        Raises:
            ConfigError: It is no such file, of another version, or not complete.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise ConfigError("is no file", subject=str(path), hint="calibrate_kv(...).save(path)")
        try:
            with safe_open(str(path), framework="pt") as stored:
                metadata = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ConfigError(f"cannot be read: {error}", subject=str(path)) from error
        if metadata.get("kind") != _KIND:
            raise ConfigError("holds no codebooks of a cache", subject=str(path))
        if metadata.get("version") != _VERSION:
            message = f"is of version {metadata.get('version')}, not {_VERSION}"
            raise ConfigError(message, subject=str(path), hint="calibrate again")
        layers: dict[int, LayerCodebooks | LayerTransforms] = {}
        shapes: dict[int, LayerShape] = {}
        formats: dict[int, str] = {}
        for key, facts in json.loads(metadata["layers"]).items():
            flags: dict[str, Any] = {flag: facts.pop(flag) for flag in _FLAGS if flag in facts}
            names, formats[int(key)] = facts.pop("tensors"), facts.pop("format")
            missing = [name for name in names if f"{key}.{name}" not in tensors]
            if missing:
                raise ConfigError(f"lacks {key}.{missing[0]}", subject=str(path))
            own: dict[str, Any] = {name: tensors[f"{key}.{name}"] for name in names}
            layers[int(key)] = (LayerCodebooks if flags else LayerTransforms)(**own, **flags)
            shapes[int(key)] = LayerShape(**facts)
        return cls(
            formats=formats,
            model=metadata["model"],
            tokens=int(metadata["tokens"]),
            layers=layers,
            shapes=shapes,
        )

    # --- whose it is ------------------------------------------------------------------------------

    def expect(
        self, formats: Mapping[int, str], model: str, shapes: Mapping[int, LayerShape]
    ) -> None:
        """Verify that the codebooks are those of a model's layers.

        Args:
            formats: Place in the cache -> the format that is asked for, of the layers to quantise.
            model: Fingerprint of the model.
            shapes: Place in the cache -> shape, of the same layers.

        Raises:
            ConfigError: They are of other formats, another model or shape, or lack a layer.
        """
        hint = "call calibrate_kv on this model"
        if self.model != model:
            message = "were learned from another model, or other weights"
            raise ConfigError(message, subject="codebooks", hint=hint)
        for index, shape in shapes.items():
            own = self.shapes.get(index)
            if own != shape:
                has = "nothing" if own is None else str(own)
                message = f"have {has} for layer {index} of the cache, which has {shape}"
                raise ConfigError(message, subject="codebooks", hint=hint)
            if self.formats[index] != formats[index]:
                message = f"are of format {self.formats[index]!r}, not {formats[index]!r}"
                message += f", for layer {index} of the cache"
                raise ConfigError(message, subject="codebooks", hint=hint)
            reason = _misfit(self.layers[index], kv_format(formats[index]), shape)
            if reason:
                raise ConfigError(f"{index}.{reason}", subject="codebooks", hint=hint)


def _flags(layer: LayerCodebooks | LayerTransforms) -> dict[str, bool]:
    if isinstance(layer, LayerTransforms):
        return {}
    return {flag: getattr(layer, flag) for flag in _FLAGS}


def _misfit(
    layer: LayerCodebooks | LayerTransforms, form: KvFormat | WordKvFormat, shape: LayerShape
) -> str:
    """Return why a layer's tensors are not those of a format; "" = they are."""
    if isinstance(layer, LayerTransforms) and isinstance(form, WordKvFormat):
        return layer.misfit(form, shape.kv_heads, shape.head_dim, shape.value_dim)
    if isinstance(layer, LayerTransforms) or isinstance(form, WordKvFormat):
        return "tensors are of another sort"
    for name, part in (("keys", form.key), ("values", form.value)):
        got = tuple(getattr(layer, name).shape[1:])
        if got != (part.entries, part.vector):
            return f"{name} has codewords {got}, {part} has others"
    return ""
