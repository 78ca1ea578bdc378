"""What a configuration asks of an attention that its keys, values or biases do not allow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flasheva_compile.config import EvaConfig
from flasheva_compile.errors import ConfigError
from flasheva_compile.layer_config import is_full, kv_of
from flasheva_compile.quantization.formats import EXACT, FORMATS, FP8, misfit_of_heads

if TYPE_CHECKING:
    from flasheva_compile.generation.prepared import FullLayer
    from flasheva_compile.generation.probe import ProbedAttention


def expect_without_alibi(path: str, config: Any) -> None:  # noqa: ANN401
    """Refuse what attention through a cache cannot do where it adds ALiBi biases."""
    hint = 'torch.compile(model, backend="flasheva") retrieves without a cache'
    why = ""
    if isinstance(config, EvaConfig) and config.retrieve_chunks:
        why = "a cache scores chunks without them"
    elif kv_of(config) != EXACT:
        why, hint = "attention to codes has no place for them", 'leave it "full"'
    if why:
        message = f"{path} adds ALiBi biases, and {why}"
        subject = "kv" if is_full(config) else "retrieve_chunks"
        raise ConfigError(message, subject=subject, hint=hint)


def expect_fitting(seen: ProbedAttention | FullLayer, kv: str) -> None:
    """Refuse a format that an attention's heads do not fit."""
    sizes = seen.head_dim, seen.value_dim
    misfit = misfit_of_heads(FORMATS[kv], *sizes) if kv in FORMATS else ""
    if misfit:
        fitting = [name for name, form in FORMATS.items() if not misfit_of_heads(form, *sizes)]
        hint = f'choose one of {", ".join((FP8, *fitting))}, or leave it "full"'
        raise ConfigError(f"kv={kv!r}, but its {misfit}", subject=seen.path, hint=hint)
