"""From what a user writes to validated, frozen configuration.

``HybridConfig`` says which attention gets which ``EvaConfig`` or ``FullConfig``, ``Options`` is
everything that ``torch.compile(..., options=)`` may carry. Both refuse unknown names and impossible
values with a ``ConfigError`` before anything changes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from flasheva_compile.errors import ConfigError
from flasheva_compile.layer_config import (
    EVA_FIELDS,
    ChunkRule,
    EvaConfig,
    FullConfig,
    LayerConfig,
    Selector,
    WindowKind,
    is_full,
    kv_of,
    read_layer_config,
)
from flasheva_compile.layer_names import (
    LayerName,
    covers,
    is_glob,
    label,
    name_layers,
    no_such_layer,
)
from flasheva_compile.validation import (
    VERSION,
    expect_boolean,
    expect_choice,
    expect_mapping,
    expect_version,
    load_json,
    unknown,
)

__all__ = [
    "ChunkRule",
    "EvaConfig",
    "FullConfig",
    "HybridConfig",
    "LayerConfig",
    "LayerName",
    "LayerRule",
    "Options",
    "Selector",
    "WindowKind",
    "parse_options",
]

AssumedMask: TypeAlias = Literal["causal", "bidirectional"]
InnerBackend: TypeAlias = Literal["inductor", "aot_eager", "eager"]


@dataclass(frozen=True, slots=True)
class LayerRule:
    """The attentions that ``key`` names get ``config``.

    Args:
        key: Layer index (negative: from the end), module path, or glob over module paths.
        config: How those attentions are approximated, or ``"full"`` to leave them as they are.
    """

    key: int | str
    config: LayerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridConfig:
    """Which attention is approximated how.

    Precedence: a module path beats an index beats a glob beats ``default``. Of two paths the longer
    one wins, of two globs the later one. Two indices that name one layer (``2`` and ``-1`` of three
    layers) must agree.

    Args:
        default: For every attention that no rule names.
        rules: In the order of the user's dict.
    """

    default: LayerConfig = field(default_factory=EvaConfig)
    rules: tuple[LayerRule, ...] = ()

    @classmethod
    def from_dict(cls, layers: Mapping[Any, Any], *, base: EvaConfig | None = None) -> HybridConfig:
        """Read ``{"default": {...}, 0: "full", "model.layers.1?": {"chunk_size": 8}}``.

        Args:
            layers: Keys are an index (or its digits, as JSON has it), a module path, a glob or
                ``"default"``; values are ``"full"``, ``"eva"`` (as the default), an ``EvaConfig``,
                a dict of fields that differ from the default's, a ``FullConfig`` or
                ``{"attention": "full", "kv": "vq-2bit"}``.
            base: What the fields of ``"default"`` differ from; ``EvaConfig()`` if absent.

        Raises:
            ConfigError: A key or value is malformed, or one key is given twice.
        """
        layers = expect_mapping("layers", layers)
        expect_version(layers)
        base = base or EvaConfig()
        default = _layer_config("default", layers.get("default", base), base)
        base = default if isinstance(default, EvaConfig) else base
        found: dict[int | str, LayerConfig] = {}
        for raw, value in layers.items():
            if raw in ("default", "version"):
                continue
            key = _layer_key(raw)
            config = _layer_config(key, value, base)
            if found.setdefault(key, config) != config:
                raise ConfigError("is given twice, with different values", subject=label(key))
        return cls(default=default, rules=tuple(LayerRule(*item) for item in found.items()))

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict that ``from_dict`` and ``json`` accept."""
        rules = {rule.key: rule.config for rule in self.rules}
        # Keys are strings throughout: json.dumps(sort_keys=True) cannot order 0 and "default".
        return {"version": VERSION} | {
            str(key): _layer_dict(config)
            for key, config in {"default": self.default, **rules}.items()
        }

    def to_json(self) -> str:
        """Return ``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> HybridConfig:
        """Read ``to_json``'s result."""
        return cls.from_dict(load_json(text))

    def resolve(self, layer: LayerName) -> LayerConfig:
        """Return what this attention becomes.

        Raises:
            ConfigError: Two indices name the layer and disagree.
        """
        rules = [rule for rule in self.rules if covers(rule.key, layer)]
        best = max(map(_rank, rules), default=None)
        equals = [rule for rule in rules if _rank(rule) == best]
        for rule in equals[1:]:
            _expect_agreement(equals[0], rule, layer)
        return equals[-1].config if equals else self.default

    def check(self, known: Sequence[LayerName], module_names: Sequence[str] = ()) -> None:
        """Verify that every rule names something and that no two disagree.

        Args:
            known: Every attention that was found.
            module_names: Every module of the model. A rule that names one of them passes even if
                no attention was found there: a graph break may hide it.

        Raises:
            ConfigError: A rule names nothing, or two indices disagree.
        """
        modules = name_layers(module_names, module_names)
        for rule in self.rules:
            if not any(covers(rule.key, layer) for layer in (*known, *modules)):
                raise no_such_layer(rule.key, known)
        for layer in known:
            self.resolve(layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Everything that ``options=`` of the backend says.

    Args:
        hybrid: Which attention is approximated how.
        strict: Raise instead of leaving an attention full that was to be rewritten.
        assume_mask: What a mask is taken for whose meaning cannot be proved.
        inner_backend: What compiles the rewritten graph.
        validate: Run each distinct attention on small random tensors against what it was taken for.
        inductor: Options passed on to Inductor.
    """

    hybrid: HybridConfig = field(default_factory=HybridConfig)
    strict: bool = False
    assume_mask: AssumedMask | None = None
    inner_backend: InnerBackend = "inductor"
    validate: bool = True
    inductor: Mapping[str, Any] = field(default_factory=dict)


_OWN_OPTIONS = ("layers", "config", "strict", "assume_mask", "inner_backend", "validate")


def parse_options(
    options: Mapping[str, Any] | None, *, inductor_options: Collection[str] | None = None
) -> Options:
    """Validate ``options=`` completely.

    Args:
        options: ``layers`` (or ``config``), ``strict``, ``assume_mask``, ``inner_backend``,
            ``validate``, the fields of ``EvaConfig`` (they change the default), and any option of
            Inductor.
        inductor_options: Names that Inductor accepts; None accepts none of them.

    Raises:
        ConfigError: A name is unknown, a value malformed, or two of them contradict each other.
    """
    options = {} if options is None else expect_mapping("options", options)
    expect_version(options)
    own = {name: options[name] for name in _OWN_OPTIONS if name in options}
    fields = {name: options[name] for name in EVA_FIELDS if name in options}
    inductor: dict[str, Any] = {}
    for name, value in options.items():
        if name in own or name in fields or name == "version":
            continue
        spelled = name.replace("-", "_") if isinstance(name, str) else name
        if spelled not in (inductor_options or ()):
            valid = (*_OWN_OPTIONS, *EVA_FIELDS, *sorted(inductor_options or ()))
            raise unknown(name, valid, what="option", shown=(*_OWN_OPTIONS, *EVA_FIELDS))
        inductor[spelled] = value
    switches = {"strict": own.get("strict", False), "validate": own.get("validate", True)}
    for name, value in switches.items():
        expect_boolean(name, value)
    assume_mask = own.get("assume_mask")
    if assume_mask is not None:
        expect_choice("assume_mask", assume_mask, get_args(AssumedMask))
    inner = own.get("inner_backend", "inductor")
    expect_choice("inner_backend", inner, get_args(InnerBackend))
    if inductor and inner != "inductor":
        raise ConfigError(
            f"is an option of Inductor, but inner_backend={inner!r}", subject=next(iter(inductor))
        )
    hybrid = _hybrid(own, fields)
    for config in (hybrid.default, *(rule.config for rule in hybrid.rules)):
        if kv_of(config) != "exact":
            message = f"{kv_of(config)!r} is how a cache stores keys, and a graph has no cache"
            raise ConfigError(message, subject="kv", hint="call prepare(model, config)")
    return Options(
        hybrid=hybrid,
        **switches,
        assume_mask=assume_mask,
        inner_backend=inner,
        inductor=inductor,
    )


def _hybrid(own: Mapping[str, Any], fields: Mapping[str, Any]) -> HybridConfig:
    """Combine ``layers`` or ``config`` with EvaConfig fields of the top level."""
    given = [name for name in ("layers", "config") if name in own]
    base = EvaConfig.from_dict(fields)
    if not given:
        return HybridConfig(default=base)
    if len(given) == 2:
        raise ConfigError("conflicts with layers: both choose the layers", subject="config")
    name, value = given[0], own[given[0]]
    if isinstance(value, Mapping):
        default = value.get("default")
        inner = default if isinstance(default, Mapping) else {}
        clash = [key for key in fields if isinstance(default, EvaConfig) or key in inner]
        if not clash:
            return HybridConfig.from_dict(value, base=base)
        raise ConfigError(f'conflicts with {name}["default"]: both set it', subject=clash[0])
    if fields:
        raise ConfigError(
            f"conflicts with {name}, which is complete without it", subject=next(iter(fields))
        )
    if isinstance(value, HybridConfig):
        return value
    if isinstance(value, EvaConfig) or is_full(value):
        return HybridConfig(default=value)
    raise ConfigError(
        f'must be a dict, an EvaConfig, a HybridConfig or "full", got {value!r}', subject=name
    )


def _layer_key(raw: object) -> int | str:
    """Normalise a key of ``layers``; JSON has turned integers into digit strings."""
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if not isinstance(raw, str) or not raw:
        raise ConfigError(
            'must be a layer index, a module path, a glob or "default"', subject=label(raw)
        )
    if raw in EVA_FIELDS:
        raise ConfigError(
            "is a field of EvaConfig, not a layer",
            subject=label(raw),
            hint='put it into the dict of a layer or of "default"',
        )
    return int(raw) if raw.removeprefix("-").isdecimal() else raw


def _layer_dict(config: object) -> Any:  # noqa: ANN401
    if isinstance(config, EvaConfig):
        return dataclasses.asdict(config)
    return config.to_dict() if isinstance(config, FullConfig) else config


def _layer_config(key: int | str, value: object, base: EvaConfig) -> LayerConfig:
    """Read a value of ``layers``."""
    try:
        return read_layer_config(value, base)
    except ConfigError as error:
        subject = f"{label(key)}.{error.subject}" if error.subject else label(key)
        raise ConfigError(error.message, subject=subject, hint=error.hint) from None


def _expect_agreement(earlier: LayerRule, later: LayerRule, layer: LayerName) -> None:
    """Refuse two indices that name one layer with different values."""
    if isinstance(later.key, int) and earlier.config != later.config:
        raise ConfigError(
            f"conflicts with {label(earlier.key)}: both name layer {layer.index} of {layer.count} "
            f"({layer.path}), with different values",
            subject=label(later.key),
            hint="keep one of the two",
        )


def _rank(rule: LayerRule) -> tuple[int, int]:
    """Order rules by precedence."""
    if isinstance(rule.key, int):
        return (1, 0)
    return (0, 0) if is_glob(rule.key) else (2, len(rule.key))
