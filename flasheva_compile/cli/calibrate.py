"""``flasheva calibrate``: a prepared model, or codebooks for its cache, without training."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from flasheva_compile.adaptation.calibrate import calibrate
from flasheva_compile.adaptation.calibrate_kv import calibrate_kv
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
from flasheva_compile.generation.prepare import prepare
from flasheva_compile.generation.prepared import prepared_of
from flasheva_compile.quantization.codebooks import CODEBOOKS

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from flasheva_compile.cli.sources import Source
    from flasheva_compile.config import HybridConfig


def run(arguments: argparse.Namespace) -> int:
    """Prepare a model, calibrate it on text, and save it; or add codebooks to one."""
    config = read_config(arguments.config)
    source = find_model(arguments.model)
    read_texts(arguments.data)
    folder = _folder(arguments, source, config)
    tokenizer = load_tokenizer(source, arguments)
    model = load_model(source, arguments)
    rows = read_windows(model, tokenizer, arguments, most=arguments.rows)
    batches = rows.split(arguments.batch_size)
    reports: list[Any] = []
    if arguments.out is not None:
        if config is not None or not source.adapted:
            prepare(model, config)
        reports.append(calibrate(model, batches))
    if arguments.kv is not None:
        reports.append(calibrate_kv(model, batches, arguments.kv))
    if arguments.out is not None:
        layers = prepared_of(model).hybrid.to_dict()
        report = {"layers": layers, "calibration": reports[0].to_dict()}
        save(model, tokenizer, folder, report)
    if arguments.kv is not None:
        reports[-1].save(folder / CODEBOOKS)
    sys.stdout.write("\n\n".join([*map(str, reports), f"saved to {folder}"]) + "\n")
    return 0


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
