"""``flasheva calibrate``: a prepared model, or codebooks for its cache, without training."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from flasheva_compile.adaptation.calibrate import calibrate, converted_attentions
from flasheva_compile.adaptation.calibrate_kv import calibrate_kv
from flasheva_compile.adaptation.kv_selection import KvSelection
from flasheva_compile.adaptation.select_kv_formats import select_kv_formats
from flasheva_compile.cli.arguments import CONFIGURED
from flasheva_compile.cli.sources import (
    expect_new_folder,
    find_model,
    load_model,
    load_tokenizer,
    read_config,
    read_texts,
    read_windows,
    save,
)
from flasheva_compile.errors import ConfigError
from flasheva_compile.evaluation.prompt_tokens import encode
from flasheva_compile.evaluation.suite import text_windows
from flasheva_compile.generation.prepare import prepare
from flasheva_compile.generation.prepared import ATTRIBUTE, prepared_of
from flasheva_compile.quantization.codebooks import CODEBOOKS
from flasheva_compile.quantization.formats import FORMATS
from flasheva_compile.quantization.learn import LearningOptions

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from torch import Tensor

    from flasheva_compile.cli.sources import Source
    from flasheva_compile.config import HybridConfig
    from flasheva_compile.quantization.codebooks import KvCodebooks

_LONGEST = 8192  # rows that codebooks are learned from, unless told [tokens]


def run(arguments: argparse.Namespace) -> int:
    """Prepare a model, calibrate it on text, and save it; or add codebooks to one."""
    _expect_bits(arguments)
    config = read_config(arguments.config)
    source = find_model(arguments.model)
    read_texts(arguments.data)
    folder = _folder(arguments, source, config)
    tokenizer = load_tokenizer(source, arguments)
    model = load_model(source, arguments)
    rows = read_windows(model, tokenizer, arguments, most=arguments.rows)
    batches = rows.split(arguments.batch_size)
    reports: list[Any] = []
    saved: dict[str, Any] = {}
    if arguments.out is not None:
        if config is not None or not source.adapted:
            prepare(model, config)
        if converted_attentions(model):
            found = calibrate(model, batches, context_length=arguments.context_length)
            reports.append(found)
            saved["calibration"] = found.to_dict()
    codebooks = None
    if arguments.kv is not None:
        codebooks = _codebooks(model, _rows_for_codebooks(model, tokenizer, arguments), arguments)
        reports.append(codebooks)
    if isinstance(codebooks, KvSelection):
        prepare(model, codebooks.layers)  # in place: what was calibrated stays
        saved["kv"] = codebooks.to_dict()
        codebooks = codebooks.codebooks
    if arguments.out is not None:
        save(model, tokenizer, folder, {"layers": prepared_of(model).hybrid.to_dict(), **saved})
    if codebooks is not None:
        codebooks.save(folder / CODEBOOKS)
    sys.stdout.write("\n\n".join([*map(str, reports), f"saved to {folder}"]) + "\n")
    return 0


def _expect_bits(arguments: argparse.Namespace) -> None:
    several = arguments.kv is not None and len(arguments.kv) > 1
    if several != (arguments.kv_bits is not None):
        message = "is for several formats" if not several else "is needed to choose among formats"
        raise ConfigError(message, subject="--kv-bits", hint="--kv tc-2bit,tc-3bit --kv-bits 2.3")
    if several and arguments.out is None:
        message = "of several formats changes the configuration, which --out must say a folder for"
        raise ConfigError(message, subject="--kv")


def _codebooks(
    model: Any,  # noqa: ANN401
    rows: Tensor,
    arguments: argparse.Namespace,
) -> KvCodebooks | KvSelection:
    """Learn codebooks of one format, or of several, and choose among them by a quarter of rows."""
    several = len(arguments.kv) > 1
    names = [_format(model, name) for name in arguments.kv] if not several else arguments.kv
    held_out = max(1, rows.shape[0] // 4) if several else 0
    if held_out >= rows.shape[0]:
        message = "of 1 row no part is left to choose formats by"
        raise ConfigError(
            message, subject="--rows", hint="give more text, or a shorter --kv-length"
        )
    options = LearningOptions(per_head=arguments.kv_per_head)
    batches = rows[: rows.shape[0] - held_out].split(arguments.batch_size)
    learned = [calibrate_kv(model, batches, name, options=options) for name in names]
    if not several:
        return learned[0]
    others = rows[-held_out:].split(arguments.batch_size)
    return select_kv_formats(model, others, learned, arguments.kv_bits)


def _format(model: Any, name: str) -> str | None:  # noqa: ANN401
    """Return the one format to learn, None = the configured ones; they may not contradict it."""
    prepared = getattr(model, ATTRIBUTE, None)
    full = {} if prepared is None else prepared.full
    asked = sorted({layer.kv for layer in full.values() if layer.kv in FORMATS})
    if name == CONFIGURED and not asked:
        message = "the configuration names no format"
        raise ConfigError(message, subject="--kv", hint='{"attention": "full", "kv": "tc-3bit"}')
    if name != CONFIGURED and asked and asked != [name]:
        message = f"is {name!r}, but the configuration stores layers in {', '.join(asked)}"
        raise ConfigError(message, subject="--kv", hint=f"--kv {CONFIGURED}")
    return None if name == CONFIGURED else name


def _rows_for_codebooks(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> Tensor:  # noqa: ANN401
    """Cut the texts into rows of ``--kv-length`` tokens, by default as long as they serve.

    Keys turn with their position: codewords of short rows fit late positions badly. So rows have
    the most tokens, up to 8192 and to what the model takes, of which there are ``--rows``.

    Returns:
        ``[rows, tokens]``, spread evenly over the texts.
    """
    texts, rows, length = read_texts(arguments.data), arguments.rows, arguments.kv_length
    if length is None:
        sizes = [len(encode(tokenizer, text)) for text in texts]
        own = getattr(model.config.get_text_config(), "max_position_embeddings", _LONGEST)
        length, least = min(_LONGEST, own), arguments.length
        while length > least and sum(size // length for size in sizes) < rows:
            length //= 2
        length = max(length, min(least, own))
    return text_windows(model, tokenizer, texts, [length], rows)[length]


def _folder(arguments: argparse.Namespace, source: Source, config: HybridConfig | None) -> Path:
    """Return the folder to write into.

    Raises:
        ConfigError: There is none, or something is there that would be lost.
    """
    if arguments.out is not None:
        expect_new_folder(arguments.out)
        return arguments.out
    if arguments.kv is None:
        hint = "give --out for a prepared model, or --kv for codebooks beside this one"
        raise ConfigError("nothing to write", subject="calibrate", hint=hint)
    if config is not None:
        message = "changes the model, which --out must say a folder for"
        raise ConfigError(message, subject="--config")
    if not source.path.is_dir():
        message = "is a single file, which no codebooks can lie beside"
        raise ConfigError(message, subject=str(source.path), hint="give --out")
    if (source.path / CODEBOOKS).exists():
        message = f"holds {CODEBOOKS} already"
        raise ConfigError(message, subject=str(source.path), hint="remove it, or give --out")
    return source.path
