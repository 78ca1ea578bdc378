"""``flasheva explain``: what becomes of every attention of a model, and what it costs."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING

from flasheva_compile.cli.sources import find_model, load_model, read_config
from flasheva_compile.generation.prepare import prepare, report_of

if TYPE_CHECKING:
    import argparse


def run(arguments: argparse.Namespace) -> int:
    """Print the report of a model that is prepared as the command line says."""
    config = read_config(arguments.config)
    source = find_model(arguments.model)
    model = load_model(source, arguments)
    if config is not None or not source.adapted:
        prepare(model, config)
    report = dataclasses.replace(report_of(model), length=arguments.length)
    sys.stdout.write(f"{report}\n")
    if arguments.json is not None:
        arguments.json.write_text(report.to_json())
    return 0
