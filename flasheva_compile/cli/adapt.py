"""``flasheva adapt``: prepare, calibrate, choose full layers, train, save."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.adaptation.calibrate import calibrate, converted_attentions, exact_attention
from flasheva_compile.adaptation.recipes import distill, paper
from flasheva_compile.adaptation.select_layers import select_full_layers
from flasheva_compile.adaptation.train import adapt
from flasheva_compile.cli.curves import MISSING, draw_curves
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
from flasheva_compile.evaluation.passkey import passkey_batches
from flasheva_compile.evaluation.perplexity import perplexity_by_position
from flasheva_compile.generation.fingerprint import fingerprint
from flasheva_compile.generation.prepare import prepare
from flasheva_compile.generation.prepared import prepared_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from flasheva_compile.adaptation.recipes import Phase
    from flasheva_compile.adaptation.train import AdaptationReport
    from flasheva_compile.cli.sources import Source

_CALIBRATION_BATCHES, _SELECTION_BATCHES = 8, 4
_PROBES, _PROBE_SEED = 8, 1  # prompts; `flasheva eval` draws others, from seed 0
_HELD_OUT = 8  # rows of text that are not trained on, at most a tenth
_STATE, _START = "state", "start.json"
# A run that goes on must be the run that was started.
_SAME = (
    *("recipe", "steps", "length", "batch_size", "seed", "precision", "dtype"),
    *("config", "keep_full", "select"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    """Rows of tokens: batches to train on, to measure on, and, if asked, to choose layers with."""

    training: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    probe: tuple[dict[str, Tensor], ...] | None = None


def run(arguments: argparse.Namespace) -> int:
    """Adapt a model as the command line says, or go on with it."""
    config = read_config(arguments.config)
    source = find_model(arguments.model)
    read_texts(arguments.data)
    _expect_convertible(source, arguments)
    expect_new_folder(arguments.out)
    state = arguments.out / _STATE
    asked = {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in _SAME}
    start = _read_start(state, asked, resume=arguments.resume)
    tokenizer = load_tokenizer(source, arguments)
    model = load_model(source, arguments)
    rows = read_windows(model, tokenizer, arguments)
    text = _split(rows, arguments)
    if arguments.keep_full and arguments.select == "retrieval":
        probe = passkey_batches(tokenizer, [arguments.length], samples=_PROBES, seed=_PROBE_SEED)
        text = dataclasses.replace(text, probe=tuple(probe))
    torch.manual_seed(arguments.seed)
    same = {"model": fingerprint(model), "tokens": [*rows.shape, int(rows.sum())]}
    if start is None:
        start = asked | same | _begin(model, source, arguments, config, text)
        state.mkdir(exist_ok=True)
        (state / _START).write_text(json.dumps(start))
    else:
        _expect_same(start, same)
        prepare(model, {"layers": start["layers"]})
    phases = _phases(arguments)
    report = adapt(
        model, text.training, phases, out=state, save_every=arguments.save_every, progress=True
    )
    _finish(model, tokenizer, arguments.out, start, report, text)
    return 0


def _expect_convertible(source: Source, arguments: argparse.Namespace) -> None:
    if source.adapted and (arguments.config is not None or arguments.keep_full):
        raise ConfigError(
            "is adapted already; --config and --keep-full are for a model with full attention",
            subject=str(source.path),
            hint="leave them out to train it further",
        )


def _split(rows: Tensor, arguments: argparse.Namespace) -> _Text:
    """Shuffle rows and keep some of them back.

    Raises:
        ConfigError: They do not fill one batch.
    """
    size = arguments.batch_size
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(arguments.seed))
    kept = min(_HELD_OUT, len(rows) // 10)
    training = rows[order[kept:]].split(size)
    training = tuple(batch for batch in training if len(batch) == size)
    if not training:
        raise ConfigError(
            f"{len(rows)} rows of --length {arguments.length} do not fill a batch of {size}",
            subject="--data",
            hint="give more text, or lower --batch-size or --length",
        )
    return _Text(training=training, held_out=rows[order[:kept]].split(size) if kept else ())


# --- before training ------------------------------------------------------------------------------


def _begin(
    model: Any,  # noqa: ANN401
    source: Source,
    arguments: argparse.Namespace,
    config: Any,  # noqa: ANN401
    text: _Text,
) -> dict[str, Any]:
    """Prepare and calibrate a model; return all that is known before training."""
    start: dict[str, Any] = {}
    if not source.adapted:
        prepare(model, config)
        calibration = calibrate(model, text.training[:_CALIBRATION_BATCHES])
        if arguments.keep_full:
            layers, start["selection"] = _place_full_layers(model, arguments, text)
            prepare(model, layers)
            calibration = calibrate(model, text.training[:_CALIBRATION_BATCHES])
        start["calibration"] = calibration.to_dict()
    start["layers"] = prepared_of(model).hybrid.to_dict()
    with exact_attention(converted_attentions(model)):
        full = _loss(model, text.held_out)
    start["held_out_loss"] = {"full": full, "before": _loss(model, text.held_out)}
    return start


def _place_full_layers(
    model: Any,  # noqa: ANN401
    arguments: argparse.Namespace,
    text: _Text,
) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Return a configuration with full layers, and how they were chosen."""
    keep, evas = arguments.keep_full, converted_attentions(model)
    if keep >= len(evas):
        message = f"must be less than {len(evas)}, the number of converted layers, got {keep}"
        raise ConfigError(message, subject="--keep-full")
    if arguments.select != "periodic":
        batches, mode = text.training[:_SELECTION_BATCHES], "greedy" if text.probe else "restore"
        selection = select_full_layers(model, batches, keep, probe=text.probe, mode=mode)
        sys.stdout.write(f"{selection}\n\n")
        return {"layers": selection.layers}, {"by": arguments.select, **selection.to_dict()}
    layers: dict[Any, Any] = dict(prepared_of(model).hybrid.to_dict())
    paths = [evas[(step + 1) * len(evas) // keep - 1].path for step in range(keep)]
    return {"layers": layers | dict.fromkeys(paths, "full")}, {"by": "periodic", "full": paths}


def _phases(arguments: argparse.Namespace) -> tuple[Phase, ...]:
    """Return the recipe's phases; the first of ``distill`` is a third of all steps."""
    steps = arguments.steps
    if arguments.recipe == "paper":
        phases = paper(attention_steps=steps // 6, steps=steps - steps // 6)
    else:
        phases = distill(rule_steps=steps // 3, logit_steps=steps - steps // 3)
    return tuple(
        dataclasses.replace(
            phase, precision=arguments.precision, warmup=min(phase.warmup, phase.steps // 4)
        )
        for phase in phases
    )


def _loss(model: Any, batches: Sequence[Tensor]) -> float | None:  # noqa: ANN401
    return perplexity_by_position(model, batches).loss if batches else None


# --- going on, and the end ------------------------------------------------------------------------


def _read_start(state: Path, asked: dict[str, Any], *, resume: bool) -> dict[str, Any] | None:
    """Return what an interrupted run started from; None for a new run.

    Raises:
        ConfigError: ``--resume`` is given and there is none or it is another, or it is not given
            and there is one.
    """
    path, found = state / _START, (state / _START).is_file()
    if found and not resume:
        hint = "--resume goes on with it"
        raise ConfigError("holds a run that was interrupted", subject=str(state), hint=hint)
    if not found and resume:
        raise ConfigError("there is nothing to resume", subject=str(state), hint="drop --resume")
    if not found:
        return None
    start = json.loads(path.read_text())
    _expect_same(start, asked)
    return start


def _expect_same(start: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with another run than the one that was started.

    Raises:
        ConfigError: It was started with other values.
    """
    for name, value in now.items():
        if start[name] != value:
            message = f"the run was started with {start[name]}, not {value}"
            raise ConfigError(message, subject=name, hint="name a new folder with --out")


def _finish(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    out: Path,
    start: dict[str, Any],
    report: AdaptationReport,
    text: _Text,
) -> None:
    """Measure, save, draw, and say what came out."""
    losses = {**start["held_out_loss"], "after": _loss(model, text.held_out)}
    steps = json.loads(report.to_json())
    save(model, tokenizer, out, {**start, "held_out_loss": losses, "steps": steps})
    if not draw_curves(report, out / "curves.png"):
        sys.stderr.write(f"{MISSING}\n")
    for name in (_START, "adaptation.pt"):
        (out / _STATE / name).unlink(missing_ok=True)
    (out / _STATE).rmdir()
    sys.stdout.write(f"{report}\n{_compared(losses)}\nsaved to {out}\n")


def _compared(losses: dict[str, float | None]) -> str:
    """Say what became of the loss on rows that were not trained on."""
    if losses["after"] is None:
        return "no loss on held-out text: fewer than 10 rows"
    shown = [f"{name} {loss:.4f}" for name, loss in losses.items()]
    return f"loss on held-out text [nats]: {', '.join(shown)} (full: as it was, full attention)"
