"""``flasheva explain``: what becomes of every attention of a model, and what it costs."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

from flasheva_compile.cli.sources import find_model, load_model, read_config
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.prepare import prepare, report_of
from flasheva_compile.kernel_listing import list_kernels

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from flasheva_compile.report import CompileReport


def run(arguments: argparse.Namespace) -> int:
    """Print the report of a model that is prepared as the command line says."""
    if arguments.sources is not None and arguments.kernels is None:
        raise ConfigError("no kernels are generated", subject="--sources", hint="add --kernels")
    config = read_config(arguments.config)
    source = find_model(arguments.model)
    model = load_model(source, arguments)
    if config is not None or not source.adapted:
        prepare(model, config)
    report = dataclasses.replace(report_of(model), length=arguments.length)
    if arguments.kernels is not None:
        report = dataclasses.replace(report, kernels=list_kernels(report, arguments.kernels))
    sys.stdout.write(f"{report}\n")
    if arguments.json is not None:
        arguments.json.write_text(report.to_json())
    if arguments.sources is not None:
        _write_sources(arguments.sources, report)
    return 0


def _write_sources(folder: Path, report: CompileReport) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kernel in report.kernels:
        (folder / f"{kernel.name}.py").write_text(kernel.source)
