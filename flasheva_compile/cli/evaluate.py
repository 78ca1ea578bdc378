"""``flasheva eval``: the evaluation suite on an adapted model, or on any with full attention."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from flasheva_compile.cli.sources import find_model, load_model, load_tokenizer, read_texts
from flasheva_compile.errors import ConfigError
from flasheva_compile.evaluation.extractive import read_items
from flasheva_compile.evaluation.suite import EvaluationOptions, evaluate, expect_tasks
from flasheva_compile.generation.prepare import revert

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from flasheva_compile.cli.sources import Source

_NEEDS = {"perplexity": "--data", "agreement": "--data", "extractive": "--items"}


def run(arguments: argparse.Namespace) -> int:
    """Evaluate a model; print tables, and write JSON where asked for."""
    tasks = _tasks(arguments)
    source = find_model(arguments.model)
    _expect_adapted(source, arguments)
    texts = read_texts(arguments.data)
    items = read_items(arguments.items) if arguments.items is not None else []
    tokenizer = load_tokenizer(source, arguments)
    model = load_model(source, arguments)
    if source.adapted and arguments.full:
        revert(model)
    options = EvaluationOptions(
        samples=arguments.samples,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        windows=arguments.windows,
        pairs=tuple(arguments.pairs),
        new_tokens=arguments.new_tokens,
        progress=True,
    )
    given: dict[str, Any] = {"texts": texts, "items": items, "options": options}
    report = evaluate(model, tokenizer, lengths=arguments.lengths, tasks=tasks, **given)
    sys.stdout.write(f"{report}\n")
    if arguments.json is not None:
        asked = {n: str(x) if n in ("model", "json") else x for n, x in _asked(arguments).items()}
        arguments.json.write_text(json.dumps({"arguments": asked, **report.to_dict()}, indent=1))
    return 0


def _tasks(arguments: argparse.Namespace) -> Sequence[str]:
    """Return the tasks to run.

    Raises:
        ConfigError: One is unknown, or the command line names no data for it.
    """
    given = {"--data": arguments.data, "--items": arguments.items}
    if arguments.tasks is None:
        tasks = ["passkey", "recall", *(name for name, need in _NEEDS.items() if given[need])]
        return [name for name in tasks if name != "agreement" or not arguments.full]
    expect_tasks(arguments.tasks)
    for name in arguments.tasks:
        if name in _NEEDS and not given[_NEEDS[name]]:
            raise ConfigError(f"needs {_NEEDS[name]}", subject=name)
    if arguments.full and "agreement" in arguments.tasks:
        raise ConfigError("compares with full attention: drop --full", subject="agreement")
    return arguments.tasks


def _expect_adapted(source: Source, arguments: argparse.Namespace) -> None:
    if not source.adapted and not arguments.full:
        raise ConfigError(
            "is not an adapted checkpoint",
            subject=str(source.path),
            hint="--full evaluates it with full attention; flasheva adapt and calibrate convert it",
        )


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what results depend on."""
    names = ("model", "full", "lengths", "pairs", "samples", "windows", "seed", "dtype")
    return {name: getattr(arguments, name) for name in names}
