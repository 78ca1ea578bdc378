"""What a command line names: models, tokenizers, texts, configurations, all from local files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.errors import ConfigError
from flasheva_compile.evaluation.suite import text_windows
from flasheva_compile.generation.checkpoint import from_pretrained
from flasheva_compile.generation.prepare import hybrid_config
from flasheva_compile.validation import load_json

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from torch import Tensor

    from flasheva_compile.config import HybridConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": "auto"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a model is.

    Attributes:
        path: As the command line has it.
        location: What ``from_pretrained`` takes.
        adapted: Whether it was saved while it was prepared.
    """

    path: Path
    location: dict[str, Any]
    adapted: bool


def find_model(path: Path) -> Source:
    """Find a model's files.

    Raises:
        ConfigError: There are none.
    """
    if path.is_file() and path.suffix == ".gguf":
        location = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        return Source(path=path, location=location, adapted=False)
    if not path.exists():
        raise ConfigError("no such folder or file", subject=str(path))
    config = path / "config.json"
    if not config.is_file():
        hint = "give a folder that save_pretrained wrote, or a .gguf file"
        raise ConfigError("is not a model: there is no config.json", subject=str(path), hint=hint)
    try:
        adapted = bool(json.loads(config.read_text()).get("flasheva"))
    except (ValueError, AttributeError):
        raise ConfigError("is not a JSON object", subject=str(config)) from None
    location = {"pretrained_model_name_or_path": path}
    return Source(path=path, location=location, adapted=adapted)


def load_model(source: Source, arguments: argparse.Namespace) -> Any:  # noqa: ANN401
    """Load a causal language model, prepared if it was saved so, in evaluation mode.

    Raises:
        ConfigError: transformers cannot load it, weights are missing, or the device is unknown.
    """
    device = _device(arguments.device)
    options = {"dtype": _DTYPES[arguments.dtype], "local_files_only": True}
    try:
        model = _load(source, options).to(device)
    except (ConfigError, MemoryError, torch.OutOfMemoryError, ImportError):
        raise
    except Exception as error:  # whatever transformers, safetensors and torch raise for bad files
        raise ConfigError(f"cannot be loaded: {_first(error)}", subject=str(source.path)) from error
    return model.eval()


def _device(name: str | None) -> torch.device:
    """Return the device of that name; None = a GPU if there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # unknown, absent, or not compiled in
        raise ConfigError(f"cannot be used: {_first(error)}", subject=f"--device {name}") from error


def _load(source: Source, options: dict[str, Any]) -> Any:  # noqa: ANN401
    from transformers import AutoModelForCausalLM

    if source.adapted:
        return from_pretrained(source.path, **options)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **source.location, **options, output_loading_info=True
    )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        message = f"lacks {len(missing)} weights, {missing[0]} among them"
        raise ConfigError(message, subject=str(source.path))
    if "gguf_file" in source.location:
        # Its weights are plain tensors now; saved as quantized, they could not be loaded again.
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
    return model


def load_tokenizer(source: Source, arguments: argparse.Namespace) -> Any:  # noqa: ANN401
    """Load the model's tokenizer, or the one that the command line names.

    Raises:
        ConfigError: There is none.
    """
    from transformers import AutoTokenizer

    other: Path | None = arguments.tokenizer
    if other is not None and not other.is_dir():
        raise ConfigError("no such folder", subject=str(other))
    location = source.location if other is None else {"pretrained_model_name_or_path": other}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**location, local_files_only=True)
    except ImportError:
        raise
    except Exception as error:  # whatever transformers raises where files are missing or wrong
        hint = "name a folder with --tokenizer, or save the tokenizer beside the model"
        message = f"has no tokenizer that can be loaded: {_first(error)}"
        raise ConfigError(message, subject=str(other or source.path), hint=hint) from error
    return _with_split_digits(tokenizer, source) if other is None else tokenizer


def _with_split_digits(tokenizer: Any, source: Source) -> Any:  # noqa: ANN401
    """Restore a rule of SmolLM's tokenizers that transformers drops: one token per digit."""
    if "gguf_file" not in source.location:
        return tokenizer
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    kind = GGUFReader(source.path).fields.get("tokenizer.ggml.pre")
    if kind is not None and kind.contents() == "smollm":
        rules = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules)
    return tokenizer


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Read text files.

    Raises:
        ConfigError: One is missing, empty, or not UTF-8.
    """
    texts: list[str] = []
    for path in paths:
        if not path.is_file():
            raise ConfigError("no such file", subject=str(path))
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"is not UTF-8 text: {error}", subject=str(path)) from None
        if not texts[-1].strip():
            raise ConfigError("is empty", subject=str(path))
    return texts


def read_windows(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    arguments: argparse.Namespace,
    *,
    most: int | None = None,
) -> Tensor:
    """Cut the command line's texts into rows of ``--length`` tokens.

    Returns:
        ``[rows, length]``, all there are, or ``most`` of them spread evenly.

    Raises:
        ConfigError: A text cannot be read, or all are too short.
    """
    texts = read_texts(arguments.data)
    return text_windows(model, tokenizer, texts, [arguments.length], most)[arguments.length]


def read_config(text: str | None) -> HybridConfig | None:
    """Read ``--config``: JSON, or a file of it; None = the defaults.

    Raises:
        ConfigError: It is neither, or not a configuration.
    """
    if text is None:
        return None
    if not text.lstrip().startswith("{"):
        path = Path(text)
        if not path.is_file():
            raise ConfigError("is neither JSON nor a file", subject=f"--config {text}")
        text = path.read_text()
    return hybrid_config(load_json(text))


def expect_new_folder(path: Path) -> None:
    """Refuse a folder that holds a model already, before hours of work go into it.

    Raises:
        ConfigError: It does, or it is a file.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError("is a file", subject=f"--out {path}", hint="name a new folder")
    if (path / "config.json").exists():
        raise ConfigError(
            "holds a model already", subject=f"--out {path}", hint="name a new folder"
        )
    path.mkdir(parents=True, exist_ok=True)


def save(model: Any, tokenizer: Any, out: Path, report: dict[str, Any]) -> None:  # noqa: ANN401
    """Write the model, its tokenizer and ``report.json`` into a folder."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "report.json").write_text(json.dumps(report, indent=1))


def _first(error: Exception) -> str:
    """Return the first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
