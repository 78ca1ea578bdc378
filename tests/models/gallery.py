"""Survey attention in transformers' architectures, PyTorch's modules, x-transformers and timm.

``python -m tests.models.gallery`` surveys everything that is installed, keeps what it found in
``build/gallery/``, one file for each environment, and writes ``docs/gallery.md`` from those files
(that with the most architectures first); names as arguments survey only those and print them.
Every model is tiny, with random weights; one that does not build or run within the limits is
listed as such. An attention that the model runs and the report does not mention is a failure.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import logging
import multiprocessing
import signal
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import flasheva_compile as fe
from tests.models import gallery_document, gallery_models
from tests.models.attention_calls import attention_calls
from tests.models.gallery_libraries import subjects
from tests.models.oracle import assert_as_accurate

FOUND = Path(__file__).parents[2] / "build" / "gallery"
WHOLE = {"window_size": 8192, "chunk_size": 8, "inner_backend": "eager"}
SECONDS = 25
ROUNDING = 64  # machine epsilons of the largest number, where double precision is no help


@dataclass
class Entry:
    """What a survey of one architecture found.

    Attributes:
        name: Model type of transformers, or library and model.
        ran: Attentions that the model runs, counted without the matcher.
        found: Rows of the report.
        rewritten: Those that compute FlashEVA.
        refused: Reason -> how many were left full for it.
        not_seen: What the report could not look into.
        exact: Whether the compiled model equals the model, and by which comparison.
        failure: Why it was not surveyed.
        seconds: Processor time of all this.
    """

    name: str
    ran: int = 0
    found: int = 0
    rewritten: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    not_seen: tuple[str, ...] = ()
    exact: str = ""
    failure: str = ""
    seconds: float = 0.0


class TooSlowError(Exception):
    """The time for one architecture is over."""


@contextmanager
def limited(seconds: int):
    """Limit the processor time, which another program on the machine does not change."""

    def stop(*_: object) -> None:
        raise TooSlowError(f"more than {seconds} s")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def names() -> list[str]:
    """Architectures of transformers with a base model, then those of other libraries."""
    return [*gallery_models.architectures(), *subjects()]


def representative() -> list[str]:
    """Return a part of the names: those of other libraries, and of transformers some."""
    return [*gallery_models.REPRESENTATIVE, *subjects()]


def survey(name: str, seconds: int = SECONDS) -> Entry:
    """Explain one architecture, and compare it compiled with itself as it is."""
    entry, start = Entry(name), time.process_time()
    try:
        with limited(seconds), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _survey(entry)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        entry.failure = f"{type(error).__name__}: {lines[0][:90]}"
    entry.seconds = round(time.process_time() - start, 1)
    return entry


def _built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    if name in (known := subjects()):
        return known[name].build().eval(), known[name].inputs()
    model = gallery_models.build(name)
    return model, gallery_models.inputs_of(model)


def _survey(entry: Entry) -> None:
    model, given = _built(entry.name)
    output, places = attention_calls(model, given)
    entry.ran, plain = len(places), _tensors(output)
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    compiled.compile(backend="flasheva", options=WHOLE)
    ours = _tensors(compiled(**given))
    report = fe.explain(compiled)
    entry.found, entry.rewritten = len(report.layers), len(report.rewritten)
    entry.refused = dict(collections.Counter(row.reason for row in report.left_full))
    entry.not_seen = report.warnings
    if entry.rewritten:
        entry.exact = _compared(model, given, ours, plain)
        if entry.exact.startswith("DIFFERS"):
            entry.exact = _as_dynamo_runs_it(model, given, ours) or entry.exact


def _compared(model: nn.Module, given: dict, ours: list, plain: list) -> str:
    truth = _in_double(model, given)
    if not all(own.isfinite().all() for own in plain):
        return "the model's own result is not finite"
    if truth is None:
        same = _equal_to_rounding(ours, plain)
        return "yes, in single precision" if same else "DIFFERS in single precision"
    try:
        for got, own, true in zip(ours, plain, truth, strict=True):
            assert_as_accurate(got, [own], true)
    except AssertionError as error:
        return f"DIFFERS: {error}"
    return "yes"


def _in_double(model: nn.Module, given: dict) -> list[torch.Tensor] | None:
    """Return what the model computes in double precision, if it can."""
    exact = copy.deepcopy(model).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation("eager")  # grouped products know no double precision
    doubled = {n: x.double() if x.is_floating_point() else x for n, x in given.items()}
    try:
        truth = _tensors(exact(**doubled))
    except TooSlowError:
        raise
    except Exception:
        return None
    return truth if all(true.isfinite().all() for true in truth) else None


def _as_dynamo_runs_it(model: nn.Module, given: dict, ours: list) -> str:
    """Compare with the model under Dynamo alone: some models choose other masks there."""
    torch._dynamo.reset()
    traced = copy.deepcopy(model)
    traced.compile(backend="eager")
    same = _equal_to_rounding(ours, _tensors(traced(**given)))
    return "yes, as under Dynamo alone" if same else ""


def _equal_to_rounding(ours: list, plain: list) -> bool:
    return all(
        bool(
            (got - own).abs().max()
            <= ROUNDING * torch.finfo(own.dtype).eps * own.abs().max().clamp(min=1)
        )
        for got, own in zip(ours, plain, strict=True)
    )


def _tensors(output: Any) -> list[torch.Tensor]:
    """The first tensor that a model returns."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    return [next(v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())]


def environment() -> dict[str, str]:
    """Name the versions that a survey is about."""
    return {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}


def _quiet() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)


def main() -> None:
    """Survey and write the document, or print what was asked for."""
    parser = argparse.ArgumentParser(description="Survey attention in many models.")
    parser.add_argument("names", nargs="*", help="print what is found in these alone")
    parser.add_argument("--continue", dest="goes_on", action="store_true", help="after a stop")
    parser.add_argument("--representative", action="store_true", help="a part, for other versions")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    file = FOUND / "torch-{torch}-transformers-{transformers}.jsonl".format(**environment())
    FOUND.mkdir(parents=True, exist_ok=True)
    if not options.names and not options.goes_on:
        file.unlink(missing_ok=True)
    done = gallery_document.read(file).entries if options.goes_on and file.exists() else {}
    wanted = options.names or (representative() if options.representative else names())
    # Fresh processes now and then: compiled code is kept as long as a process lives.
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, _quiet, maxtasksperchild=40) as pool:
        for entry in pool.imap(survey, [name for name in wanted if name not in done]):
            line = json.dumps(asdict(entry))
            print(line, flush=True)
            if not options.names:
                with file.open("a") as kept:
                    kept.write(line + "\n")
    if not options.names:
        gallery_document.write(sorted(FOUND.glob("*.jsonl")))


if __name__ == "__main__":
    main()
