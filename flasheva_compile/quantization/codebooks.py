"""What a model's codes mean: in memory, and as safetensors that know their model."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flasheva_compile.errors import ConfigError
from flasheva_compile.quantization.formats import FORMATS, WordKvFormat, kv_format
from flasheva_compile.quantization.transform_coding import TRANSFORM_TENSORS, LayerTransforms
from flasheva_compile.quantization.vecinfer import NEEDED_TENSORS, TENSORS, LayerCodebooks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from flasheva_compile.quantization.formats import KvFormat

_KIND, _VERSION = "flasheva kv codebooks", "3"
CODEBOOKS = "kv_codebooks.safetensors"
"""The file beside a saved model."""

_FLAGS = ("rotate_keys", "rotate_values")
_SIZES = ("kv_heads", "head_dim", "value_dim")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
_Fact = TypeVar("_Fact")


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
            ConfigError: It is no such file, of another version, or damaged.
        """
        file = _File.read(str(path))
        tokens = file.fact(file.metadata, "tokens", str)
        if not _NUMBER.fullmatch(tokens):
            raise file.damaged(f"tokens are {tokens!r}")
        model = file.fact(file.metadata, "model", str)
        layers: dict[int, LayerCodebooks | LayerTransforms] = {}
        shapes: dict[int, LayerShape] = {}
        formats: dict[int, str] = {}
        named: set[str] = set()
        for key, facts in file.described().items():
            formats[int(key)], shapes[int(key)], names = _description(file, key, facts)
            layers[int(key)] = _layer(file, key, facts, names)
            named |= {f"{key}.{name}" for name in names}
        if not named.issuperset(file.tensors):
            raise file.damaged(f"tensor {min(set(file.tensors) - named)} is of no layer")
        return cls(formats=formats, model=model, tokens=int(tokens), layers=layers, shapes=shapes)

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


def _misfit(
    layer: LayerCodebooks | LayerTransforms, form: KvFormat | WordKvFormat, shape: LayerShape
) -> str:
    """Return why a layer's tensors are not those of a format; "" = they are."""
    if isinstance(layer, LayerTransforms) and isinstance(form, WordKvFormat):
        return layer.misfit(form, shape.kv_heads, shape.head_dim, shape.value_dim)
    if isinstance(layer, LayerTransforms) or isinstance(form, WordKvFormat):
        return "tensors are of another sort"
    return layer.misfit(form, shape.kv_heads, shape.head_dim, shape.value_dim)


# --- files ----------------------------------------------------------------------------------------


def _flags(layer: LayerCodebooks | LayerTransforms) -> dict[str, bool]:
    if isinstance(layer, LayerTransforms):
        return {}
    return {flag: getattr(layer, flag) for flag in _FLAGS}


@dataclass(frozen=True, slots=True)
class _File:
    """What a file of codebooks holds, and how it is refused.

    Attributes:
        path: Where it is.
        metadata: Of this kind and version.
        tensors: By name.
    """

    path: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: str) -> _File:
        """Read a file; what its metadata say of layers is not looked at.

        Raises:
            ConfigError: It is no such file, or of another version.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise ConfigError("is no file", subject=path, hint="calibrate_kv(...).save(path)")
        try:
            with safe_open(path, framework="pt") as stored:
                metadata = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ConfigError(f"cannot be read: {error}", subject=path) from error
        if metadata.get("kind") != _KIND:
            raise ConfigError("holds no codebooks of a cache", subject=path)
        if metadata.get("version") != _VERSION:
            message = f"is of version {metadata.get('version')}, not {_VERSION}"
            raise ConfigError(message, subject=path, hint="calibrate again")
        return cls(path, metadata, tensors)

    def damaged(self, what: str) -> ConfigError:
        """Say that the file is damaged, and how."""
        return ConfigError(f"is damaged: {what}", subject=self.path, hint="calibrate again")

    def fact(self, facts: Mapping[str, Any], name: str, kind: type[_Fact], of: str = "") -> _Fact:
        """Return one of some facts, which must be there and of a type (bool is no int)."""
        if name not in facts:
            raise self.damaged(f"{of}there is no {name!r}")
        value = facts[name]
        if type(value) is not kind:
            raise self.damaged(f"{of}{name} is {value!r}")
        return value

    def described(self) -> Mapping[str, Any]:
        """Return what the metadata say of each layer, by its place in the cache."""
        try:
            found = json.loads(self.fact(self.metadata, "layers", str))
        except json.JSONDecodeError as error:
            raise self.damaged(f"layers are not JSON: {error}") from error
        if not isinstance(found, dict) or not all(map(_NUMBER.fullmatch, found)):
            raise self.damaged("layers are not listed by their places in the cache")
        return found


def _description(file: _File, key: str, facts: Any) -> tuple[str, LayerShape, list[str]]:  # noqa: ANN401
    """Return format, shape and names of tensors of one layer, read from what a file says of it."""
    of = f"layer {key}: "
    if not isinstance(facts, dict):
        raise file.damaged(f"{of}{facts!r}")
    name = file.fact(facts, "format", str, of)
    if name not in FORMATS:
        raise file.damaged(f"{of}format {name!r} is not one of {', '.join(map(repr, FORMATS))}")
    words = isinstance(FORMATS[name], WordKvFormat)
    kinds = {"format": str, **dict.fromkeys(_SIZES, int), "tensors": list}
    kinds |= {} if words else dict.fromkeys(_FLAGS, bool)
    for fact, kind in kinds.items():
        file.fact(facts, fact, kind, of)
    known, needed = (TRANSFORM_TENSORS,) * 2 if words else (TENSORS, NEEDED_TENSORS)
    lacking = [x for x in needed if x not in facts["tensors"]]
    if lacking:
        raise file.damaged(f"{of}there is no tensor {lacking[0]!r}")
    unknown = [x for x in facts if x not in kinds] + [x for x in facts["tensors"] if x not in known]
    if unknown:
        raise file.damaged(f"{of}{name} has no {unknown[0]!r}")
    return name, LayerShape(**{size: facts[size] for size in _SIZES}), facts["tensors"]


def _layer(
    file: _File, key: str, facts: Mapping[str, Any], names: list[str]
) -> LayerCodebooks | LayerTransforms:
    """Return the tensors of one layer that a file describes, in their class."""
    missing = [f"{key}.{name}" for name in names if f"{key}.{name}" not in file.tensors]
    if missing:
        raise file.damaged(f"there is no tensor {missing[0]}")
    own: dict[str, Any] = {name: file.tensors[f"{key}.{name}"] for name in names}
    own |= {flag: facts[flag] for flag in _FLAGS if flag in facts}
    words = isinstance(FORMATS[facts["format"]], WordKvFormat)
    return (LayerTransforms if words else LayerCodebooks)(**own)
