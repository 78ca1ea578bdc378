"""How one attention is computed, and what of it a cache keeps: ``EvaConfig``, ``FullConfig``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from flasheva_compile.errors import ConfigError
from flasheva_compile.validation import (
    VERSION,
    expect_choice,
    expect_integer,
    expect_mapping,
    expect_version,
    load_json,
    unknown,
)

if TYPE_CHECKING:
    from typing_extensions import TypeIs

ChunkRule: TypeAlias = Literal["mean", "tangent", "evabyte", "eva"]
WindowKind: TypeAlias = Literal["sliding", "block"]
Selector: TypeAlias = Literal["token", "bounds"]
KvFormatName: TypeAlias = Literal[
    "exact",
    "fp8",
    "vq-4bit",
    "vq-2bit",
    "vq-1.5bit",
    "vq-1.25bit",
    "vq-1bit",
    "tc-4bit",
    "tc-3bit",
    "tc-2bit",
]

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
        retrieve_by: What scores chunks: their ``"token"``, or their keys' ``"bounds"``.

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
    retrieve_by: Selector = "token"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            expect_integer(name, getattr(self, name), least)
        expect_choice("chunk_rule", self.chunk_rule, get_args(ChunkRule))
        expect_choice("window", self.window, get_args(WindowKind))
        expect_choice("retrieve_by", self.retrieve_by, get_args(Selector))
        if self.window_size % self.chunk_size:
            below = self.window_size - self.window_size % self.chunk_size
            near = [str(size) for size in (below, below + self.chunk_size) if size]
            raise ConfigError(
                f"must be a multiple of chunk_size={self.chunk_size}, got {self.window_size}",
                subject="window_size",
                hint=f"use {' or '.join(near)}",
            )
        for name, plain in (("retrieve_block", 1), ("retrieve_by", "token")):
            if getattr(self, name) != plain and not self.retrieve_chunks:
                message = f"{getattr(self, name)} without retrieve_chunks"
                raise ConfigError(message, subject=name, hint="set both, or neither")

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
            if name not in (*EVA_FIELDS, "version"):
                raise unknown(name, EVA_FIELDS, what="field")
        fields = {name: value for name, value in changes.items() if name != "version"}
        return dataclasses.replace(self, **fields)


EVA_FIELDS = tuple(entry.name for entry in dataclasses.fields(EvaConfig))


@dataclass(frozen=True, slots=True, kw_only=True)
class FullConfig:
    """An attention that stays full, and how a prepared model's cache stores its keys and values.

    Args:
        kv: ``"fp8"``, ``"vq-2bit"`` or another number of bits; ``"exact"`` = in the model's dtype.

    Raises:
        ConfigError: There is no such format.
    """

    kv: KvFormatName = "exact"

    def __post_init__(self) -> None:
        expect_choice("kv", self.kv, get_args(KvFormatName))

    def to_dict(self) -> dict[str, str]:
        """Return a plain dict, as ``layers`` takes it."""
        return {"attention": "full", "kv": self.kv}


LayerConfig: TypeAlias = EvaConfig | FullConfig | Literal["full"]


def is_full(config: object) -> TypeIs[FullConfig | Literal["full"]]:
    """Whether an attention stays full."""
    return config == "full" or isinstance(config, FullConfig)


def kv_of(config: object) -> str:
    """Return how the keys and values of an attention that stays full are stored."""
    return config.kv if isinstance(config, FullConfig) else "exact"


def left_full(config: object) -> str:
    """Return why an attention stays full that the configuration leaves so."""
    kv = kv_of(config)
    return "the configuration leaves it full" + f", its cache in {kv!r}" * (kv != "exact")


def read_layer_config(value: object, base: EvaConfig) -> LayerConfig:
    """Read what a layer is given.

    Args:
        value: ``"full"``, ``"eva"`` (as ``base``), an ``EvaConfig``, a ``FullConfig``, a dict of
            fields that differ from ``base``, or ``{"attention": "full", "kv": ...}``.
        base: What fields differ from.

    Raises:
        ConfigError: It is malformed.
    """
    if value == "eva":
        return base
    if isinstance(value, Mapping) and "attention" in value:
        rest = {name: field for name, field in value.items() if name != "attention"}
        expect_choice("attention", value["attention"], ("full", "eva"))
        if value["attention"] == "eva":
            return read_layer_config(rest, base)
        for name in rest:
            if name != "kv":
                raise unknown(name, ("attention", "kv"), what="field")
        value = FullConfig(**rest)
    if isinstance(value, Mapping):
        if "kv" in value:
            hint = 'write {"attention": "full", "kv": ...}'
            raise ConfigError("is for attentions that stay full", subject="kv", hint=hint)
        return base._merge(value)
    if isinstance(value, EvaConfig) or is_full(value):
        return "full" if value == FullConfig() else value
    raise ConfigError(
        f'must be "full", "eva", an EvaConfig or a dict of its fields, got {value!r}',
    )
