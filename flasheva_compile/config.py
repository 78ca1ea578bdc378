"""From what a user writes to validated, frozen configuration.

``EvaConfig`` says how one attention is approximated, ``HybridConfig`` which attention gets which
``EvaConfig``, ``Options`` is everything that ``torch.compile(..., options=)`` may carry. All
of them refuse unknown names and impossible values with a ``ConfigError`` before anything changes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from flasheva_compile.errors import ConfigError
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
    expect_integer,
    expect_mapping,
    expect_version,
    load_json,
    unknown,
)

__all__ = ["EvaConfig", "HybridConfig", "LayerName", "LayerRule", "Options", "parse_options"]

ChunkRule: TypeAlias = Literal["mean", "tangent", "evabyte", "eva"]
WindowKind: TypeAlias = Literal["sliding", "block"]
AssumedMask: TypeAlias = Literal["causal", "bidirectional"]
InnerBackend: TypeAlias = Literal["inductor", "aot_eager", "eager"]

_LEAST = dict.fromkeys(("window_size", "chunk_size", "retrieve_block"), 1)
_LEAST |= dict.fromkeys(("sink_tokens", "retrieve_chunks"), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaConfig:
    """How FlashEVA approximates one attention.

    Args:
        window_size: Keys seen exactly before each query [tokens]; a multiple of ``chunk_size``.
        chunk_size: Keys behind one chunk token [tokens].
        sink_tokens: First keys of the sequence that every query sees exactly [tokens].
        chunk_rule: How a chunk becomes its chunk token.
        window: ``"sliding"`` moves with the query; ``"block"`` starts anew every ``window_size``.
        retrieve_chunks: Best-scoring chunks that each query also sees exactly; 0 = none.
        retrieve_block: Consecutive queries that share the selection of the first of them [tokens].

    Raises:
        ConfigError: A value has the wrong type or is out of range.
    """

    window_size: int = 256
    chunk_size: int = 16
    sink_tokens: int = 1
    chunk_rule: ChunkRule = "tangent"
    window: WindowKind = "sliding"
    retrieve_chunks: int = 0
    retrieve_block: int = 1

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            expect_integer(name, getattr(self, name), least)
        expect_choice("chunk_rule", self.chunk_rule, get_args(ChunkRule))
        expect_choice("window", self.window, get_args(WindowKind))
        if self.window_size % self.chunk_size:
            below = self.window_size - self.window_size % self.chunk_size
            near = [str(size) for size in (below, below + self.chunk_size) if size]
            raise ConfigError(
                f"must be a multiple of chunk_size={self.chunk_size}, got {self.window_size}",
                subject="window_size",
                hint=f"use {' or '.join(near)}",
            )
        if self.retrieve_block > 1 and not self.retrieve_chunks:
            message = f"{self.retrieve_block} without retrieve_chunks"
            raise ConfigError(message, subject="retrieve_block", hint="set both, or neither")

    @classmethod
    def paper(cls) -> EvaConfig:
        """Return the geometry of the EVA paper: blocks of 256, chunks of 16, no sinks."""
        return cls(window_size=256, chunk_size=16, sink_tokens=0, chunk_rule="eva", window="block")

    @classmethod
    def evabyte(cls) -> EvaConfig:
        """Return the geometry of EvaByte: blocks of 2048, chunks of 16, no sinks."""
        return cls(
            window_size=2048, chunk_size=16, sink_tokens=0, chunk_rule="evabyte", window="block"
        )

    @property
    def sink_size(self) -> int:
        """Sink keys, rounded up to whole chunks [tokens]."""
        return -(-self.sink_tokens // self.chunk_size) * self.chunk_size

    def replace(self, **changes: object) -> EvaConfig:
        """Return a copy with some fields changed."""
        return self._merge(changes)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict that ``from_dict`` and ``json`` accept."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> EvaConfig:
        """Read ``to_dict``'s result; fields that are absent keep their defaults."""
        return cls()._merge(expect_mapping("EvaConfig", fields))

    def to_json(self) -> str:
        """Return ``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> EvaConfig:
        """Read ``to_json``'s result."""
        return cls.from_dict(load_json(text))

    def _merge(self, changes: Mapping[str, Any]) -> EvaConfig:
        """Return a copy with the given fields changed, ``version`` checked and dropped."""
        expect_version(changes)
        for name in changes:
            if name not in (*_EVA_FIELDS, "version"):
                raise unknown(name, _EVA_FIELDS, what="field")
        fields = {name: value for name, value in changes.items() if name != "version"}
        return dataclasses.replace(self, **fields)


_EVA_FIELDS = tuple(entry.name for entry in dataclasses.fields(EvaConfig))
LayerConfig: TypeAlias = EvaConfig | Literal["full"]


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
                ``"default"``; values are ``"full"``, ``"eva"`` (as the default), an ``EvaConfig``
                or a dict of fields that differ from the default's.
            base: What the fields of ``"default"`` differ from; ``EvaConfig()`` if absent.

        Raises:
            ConfigError: A key or value is malformed, or one key is given twice.
        """
        layers = expect_mapping("layers", layers)
        expect_version(layers)
        base = base or EvaConfig()
        default = _layer_config("default", layers.get("default", base), base)
        base = base if default == "full" else default
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
            str(key): dataclasses.asdict(config) if isinstance(config, EvaConfig) else config
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
    fields = {name: options[name] for name in _EVA_FIELDS if name in options}
    inductor: dict[str, Any] = {}
    for name, value in options.items():
        if name in own or name in fields or name == "version":
            continue
        spelled = name.replace("-", "_") if isinstance(name, str) else name
        if spelled not in (inductor_options or ()):
            valid = (*_OWN_OPTIONS, *_EVA_FIELDS, *sorted(inductor_options or ()))
            raise unknown(name, valid, what="option", shown=(*_OWN_OPTIONS, *_EVA_FIELDS))
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
    return Options(
        hybrid=_hybrid(own, fields),
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
    if isinstance(value, EvaConfig) or value == "full":
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
    if raw in _EVA_FIELDS:
        raise ConfigError(
            "is a field of EvaConfig, not a layer",
            subject=label(raw),
            hint='put it into the dict of a layer or of "default"',
        )
    return int(raw) if raw.removeprefix("-").isdecimal() else raw


def _layer_config(key: int | str, value: object, base: EvaConfig) -> LayerConfig:
    """Read a value of ``layers``."""
    if isinstance(value, EvaConfig) or value == "full":
        return value  # pyright: ignore[reportReturnType]
    if value == "eva":
        return base
    if not isinstance(value, Mapping):
        raise ConfigError(
            f'must be "full", "eva", an EvaConfig or a dict of its fields, got {value!r}',
            subject=label(key),
        )
    try:
        return base._merge(value)  # pyright: ignore[reportPrivateUsage]
    except ConfigError as error:
        subject = f"{label(key)}.{error.subject}"
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
