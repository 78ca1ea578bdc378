"""``flasheva calibrate``: a prepared model without training."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from flasheva_compile.adaptation.calibrate import calibrate
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
from flasheva_compile.generation.prepare import prepare
from flasheva_compile.generation.prepared import prepared_of

if TYPE_CHECKING:
    import argparse


def run(arguments: argparse.Namespace) -> int:
    """Prepare a model, calibrate it on text, and save it."""
    config = read_config(arguments.config)
    source = find_model(arguments.model)
    read_texts(arguments.data)
    expect_new_folder(arguments.out)
    tokenizer = load_tokenizer(source, arguments)
    model = load_model(source, arguments)
    rows = read_windows(model, tokenizer, arguments, most=arguments.rows)
    if config is not None or not source.adapted:
        prepare(model, config)
    calibration = calibrate(model, rows.split(arguments.batch_size))
    layers = prepared_of(model).hybrid.to_dict()
    save(model, tokenizer, arguments.out, {"layers": layers, "calibration": calibration.to_dict()})
    sys.stdout.write(f"{calibration}\n\nsaved to {arguments.out}\n")
    return 0
