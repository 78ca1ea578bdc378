"""What a prepared model remembers of its preparation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from flasheva_compile.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from flasheva_compile.config import EvaConfig, HybridConfig
    from flasheva_compile.quantization.codebooks import KvCodebooks
    from flasheva_compile.report import CompileReport

ATTRIBUTE = "_flasheva_prepared"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CachedLayer:
    """What a prepared attention's cache layer is built from.

    Attributes:
        path: The attention's module path.
        config: How it approximates.
        kv_heads: ``Hkv``.
        head_dim: ``D``.
        value_dim: ``Dv``.
        alibi: Whether it adds ALiBi biases.
    """

    path: str
    config: EvaConfig
    kv_heads: int
    head_dim: int
    value_dim: int
    alibi: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FullLayer:
    """An attention of a prepared model that stays full, and has keys and values in the cache.

    Attributes:
        path: The attention's module path.
        reason: Why it is no plain causal softmax attention; empty if it is.
        kv_heads: ``Hkv``.
        head_dim: ``D``.
        value_dim: ``Dv``.
        kv: How the configuration has its keys and values stored; see ``FullConfig``.
        alibi: Whether it adds ALiBi biases.
    """

    path: str
    reason: str
    kv_heads: int
    head_dim: int
    value_dim: int
    kv: str = "exact"
    alibi: bool = False

    @property
    def not_quantizable(self) -> str:
        """Why its keys and values cannot be stored in few bits; empty if they can."""
        biased = "it adds ALiBi biases, which attention to codes has no place for"
        return self.reason or biased * self.alibi


@dataclasses.dataclass(slots=True, kw_only=True)
class Prepared:
    """What :func:`prepare` did to a model; :func:`revert` undoes it.

    Attributes:
        hybrid: The configuration.
        converted: Cache index -> converted attention.
        full: Cache index -> attention that stays full.
        report: One row per attention.
        implementations: ``id(config)`` -> the configuration and its implementation before, a
            configuration before those inside it.
        codebooks: Of the full layers, if they were found beside the model when it was loaded.
    """

    hybrid: HybridConfig
    converted: dict[int, CachedLayer]
    full: dict[int, FullLayer]
    report: CompileReport
    implementations: dict[int, tuple[Any, str]]
    codebooks: KvCodebooks | None = None

    def __reduce__(self) -> Any:  # noqa: ANN401 - of pickle
        # What was replaced on the model's instances would not come back.
        raise ConfigError(
            "a prepared model cannot be pickled",
            hint="use model.save_pretrained and flasheva_compile.from_pretrained, or revert(model)",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepared:
        # A copied model has configurations of its own.
        configs = {
            id(memo.get(key, c)): (memo.get(key, c), name)
            for key, (c, name) in self.implementations.items()
        }
        return dataclasses.replace(self, implementations=configs)


def prepared_of(model: Any) -> Prepared:  # noqa: ANN401 - a transformers model
    """Return what :func:`prepare` left on a model, which DDP may have wrapped since.

    Raises:
        ConfigError: It is not prepared.
    """
    inner = getattr(model, "module", None)
    prepared = getattr(model, ATTRIBUTE, None) or getattr(inner, ATTRIBUTE, None)
    if prepared is None:
        message = f"{type(model).__name__} is not prepared"
        raise ConfigError(message, hint="call prepare(model, config) first")
    return prepared


def cached_layers(model: Any) -> dict[int, CachedLayer]:  # noqa: ANN401
    """Return the converted attentions of a prepared model by their place in the cache."""
    return prepared_of(model).converted


def attention_configs(model: nn.Module) -> list[tuple[Any, str]]:
    """Return every configuration that a module looks its attention implementation up in, and it.

    A configuration comes before those inside it: setting its implementation sets theirs too, so all
    must be read before any is set, and set in this order.
    """
    found: dict[int, tuple[Any, str]] = {}
    configs = [getattr(module, "config", None) for module in model.modules()]
    while configs:
        config: Any = configs.pop(0)
        if id(config) not in found and hasattr(config, "_attn_implementation"):
            found[id(config)] = (config, config._attn_implementation)
            parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
            configs = parts + configs
    return list(found.values())
