"""A pretrained model adapted in many ways on the same tokens: quality, curves, as JSON.

    python benchmarks/adaptation_gpu.py --model MODEL.gguf --text FOLDER [--gpus 4]

``FOLDER`` is what ``adaptation_text.py`` wrote. Each arm (``adaptation_arms.py``) starts from the
same weights and sees the same sequences in the same order; one process per GPU takes the next arm
that is left. Perplexity on held-out documents by source and position, pass keys by length, what
is left of it with chunk tokens switched off, and every step's loss and gradient norm. Without
``--model`` weights are random: a trial.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from adaptation_arms import Arm, arms, eighth_arms, recipe, retrieval_arms
from adaptation_model import load_model
from extractive_questions import questions
from records import Results, header
from timing import describe

import flasheva_compile as fe
from flasheva_compile.adaptation.calibrate import converted_attentions
from flasheva_compile.evaluation.extractive import extractive, extractive_batches
from flasheva_compile.evaluation.passkey import passkey, passkey_batches
from flasheva_compile.evaluation.perplexity import perplexity_by_position

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

RESULT = Path(__file__).parent / "results" / "adaptation_gpu.json"
EDGES = (0, 256, 512, 1024, 2048, 4096, 8192)
NEVER = -1e30  # bias of a chunk token that no query attends to
SOURCES = ("austen", "faq", "linux")
NOTHING = "skipped: time budget"
TABLES = {"adaptation": arms, "retrieval": retrieval_arms, "eighth": eighth_arms}
EXTRACTIVE_TOKENS = 12  # in which an answer has to come


def main() -> None:
    """Train and evaluate every arm."""
    a = parse_arguments()
    if a.worker:
        work(a)
        return
    results = Results(path=a.out, identity=("name",), header=described(a))
    rows = a.out.parent / f"{a.out.stem}_rows"
    rows.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", "--rows", str(rows)]
    workers = []
    for gpu in range(a.gpus):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(a.first_gpu + gpu)}
        workers.append(subprocess.Popen(command, env=environment if a.device == "cuda" else None))
    while True:
        running = any(worker.poll() is None for worker in workers)
        gather(results, rows, a)
        if not running:
            break
        time.sleep(2)


def gather(results: Results, rows: Path, a: argparse.Namespace) -> None:
    """Write the rows that are there, in the order of the arms."""
    found = {row["name"]: row for row in (json.loads(p.read_text()) for p in rows.glob("*.json"))}
    rows_before = len(results.rows)
    results.rows = [found[arm.name] for arm in wanted(a) if arm.name in found]
    if len(results.rows) != rows_before:
        results.write()


def described(a: argparse.Namespace) -> dict[str, Any]:
    """Return the header of the results."""
    names = ("steps", "batch", "select", "sequences", "passkeys", "length", "extractive")
    return {
        **header(torch.device(a.device), a.commit),
        "model": a.model.name if a.model else "SmolLM2-135M's architecture, RANDOM weights",
        "text": "Debian packages, see adaptation_text.py; documents held out",
        **{name: getattr(a, name) for name in names},
        "tokens": a.steps * a.batch * a.length,
    }


def wanted(a: argparse.Namespace) -> list[Arm]:
    """Return the arms that the command line names."""
    table = TABLES[a.table]()
    if unknown := set(a.arms or ()) - {arm.name for arm in table}:
        raise SystemExit(f"no arm {sorted(unknown)}; there are {[arm.name for arm in table]}")
    return [arm for arm in table if not a.arms or arm.name in a.arms]


# --- one process ----------------------------------------------------------------------------------


def work(a: argparse.Namespace) -> None:
    """Take one arm after the other until none is left or the time is over."""
    end = time.monotonic() + a.budget_s
    text = dict(np.load(a.text / "tokens.npz"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(a.text)
    model = load_model(a.model).to(a.device)
    pristine = {name: x.clone() for name, x in model.state_dict().items()}
    longest = 0.0
    for arm in wanted(a):
        place = a.rows / slug(arm)
        if time.monotonic() + longest > end or not claim(place):
            continue
        start = time.monotonic()
        try:
            row = run_arm(a, arm, model, text, tokenizer)
        except Exception as error:  # noqa: BLE001, RUF100 - the row says why
            row = {**asdict(arm), "error": describe(error)}
        row["arm_seconds"] = time.monotonic() - start
        longest = max(longest, row["arm_seconds"])
        temporary = place.with_suffix(".tmp")
        temporary.write_text(json.dumps(row))
        temporary.rename(place.with_suffix(".json"))
        reset(model, pristine)
        line = {name: row.get(name) for name in ("name", "perplexity", "arm_seconds", "error")}
        print(json.dumps(line), flush=True)


def slug(arm: Arm) -> str:
    """Return the name of an arm as one of a file."""
    return arm.name.replace("/", "_").replace(" ", "_").replace(",", "")


def claim(place: Path) -> bool:
    """Take an arm unless another process has."""
    try:
        place.with_suffix(".claimed").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def reset(model: Any, pristine: dict[str, Tensor]) -> None:  # noqa: ANN401
    """Undo everything that an arm did to the model."""
    if hasattr(model, "_flasheva_prepared"):
        fe.revert(model)
    model.load_state_dict(pristine)
    model.requires_grad_(requires_grad=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_arm(
    a: argparse.Namespace,
    arm: Arm,
    model: Any,  # noqa: ANN401
    text: dict[str, Any],
    tokenizer: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """Prepare, train and evaluate one arm; return its row."""
    row: dict[str, Any] = {**asdict(arm), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
    train = torch.from_numpy(text["train"].astype(np.int64))
    calibration = list(train[-4:, : arm.context_length or 2048].split(1))
    texts = list(train[-a.select :, : arm.select_length].split(1))
    layers = choose_layers(arm, model, tokenizer, (calibration, texts), row, autocast(a))
    fe.prepare(model, layers)
    if arm.chunk_tokens and arm.config["chunk_rule"] in ("tangent", "evabyte"):
        fe.calibrate(model, calibration, context_length=arm.context_length)
    switched = nullcontext() if arm.chunk_tokens else without_chunk_tokens(model)
    with switched:
        if arm.training != "none":
            row |= train_arm(a, arm, model, train)
            if a.save:
                model.save_pretrained(a.save / slug(arm))
        row |= evaluate(a, model, text, tokenizer)
    if arm.chunk_tokens and arm.config["window_size"] < a.length:
        with without_chunk_tokens(model):
            row["chunk_tokens_off"] = perplexities(a, model, text)
    return row


def choose_layers(
    arm: Arm,
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    texts: tuple[list[Tensor], list[Tensor]],
    row: dict[str, Any],
    casting: torch.autocast,
) -> dict[str, Any]:
    """Return what ``prepare`` gets: which layers stay full, and how.

    ``texts`` are those that calibrate rules, and those that choose layers.
    """
    layers: dict[str, Any] = {"default": arm.config}
    count = model.config.num_hidden_layers
    if arm.placement == "periodic":
        full = [round((n + 1) * count / arm.keep) - 1 for n in range(arm.keep)]
        layers |= {str(index): "full" for index in full}
    elif arm.placement:
        fe.prepare(model, {"default": arm.config})
        if arm.chunk_tokens:
            fe.calibrate(model, texts[0])
        switched = nullcontext() if arm.chunk_tokens else without_chunk_tokens(model)
        start = time.monotonic()
        with switched, casting:
            probe = arm.placement == "retrieval"
            prompts = passkey_batches(tokenizer, arm.probe_lengths, samples=4, seed=1)
            if arm.probe_questions:  # of other text and names than those that are measured
                stream = torch.cat(texts[1], 1)[0].tolist()
                items = questions(tokenizer, stream, arm.probe_questions, 4000, seed=1)
                prompts += extractive_batches(tokenizer, items)
            options = {"probe": prompts, "mode": "greedy"} if probe else {}
            selection = fe.select_full_layers(model, texts[1], arm.keep, **options)
        row["selection"] = selection.to_dict() | {"seconds": time.monotonic() - start}
        layers |= {str(index): "full" for index in selection.chosen}
        fe.revert(model)
    return layers


@contextmanager
def without_chunk_tokens(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Let a prepared model attend to sinks and windows alone: chunk tokens of no weight."""
    evas = converted_attentions(model)
    before = [(eva, eva.config, eva.rule_parameters) for eva in evas]
    for eva in evas:
        heads, size = kv_shape(model)
        device = model.get_input_embeddings().weight.device
        zeros = torch.zeros(heads, size, device=device)
        nothing = [zeros, zeros, torch.full((heads,), NEVER, device=device)]
        eva.config = eva.config.replace(chunk_rule="evabyte")
        eva.rule_parameters = lambda nothing=nothing: nothing
    try:
        yield
    finally:
        for eva, config, parameters in before:
            eva.config, eva.rule_parameters = config, parameters


def kv_shape(model: Any) -> tuple[int, int]:  # noqa: ANN401
    """Return the number of key heads and the head dimension."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, size


# --- training and evaluation ----------------------------------------------------------------------


def autocast(a: argparse.Namespace) -> torch.autocast:
    """Evaluate as phases in bf16 train."""
    return torch.autocast(a.device, torch.bfloat16, cache_enabled=False)


def train_arm(a: argparse.Namespace, arm: Arm, model: Any, train: Tensor) -> dict[str, Any]:  # noqa: ANN401
    """Adapt; return curves, speed and memory."""
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    generator, batches = torch.Generator().manual_seed(arm.seed), []
    while len(batches) < a.steps:  # again, in another order, where there are more steps than text
        order = torch.randperm(len(train) - 4, generator=generator)
        whole = (x for x in order.split(a.batch) if len(x) == a.batch)
        batches += [train[x, : a.length] for x in whole]
    batches = batches[: a.steps]
    if arm.compiled:
        model.compile(backend="flasheva")
    try:
        report = fe.adapt(model, batches, recipe(arm, a.steps), progress=False)
    finally:
        model._compiled_call_impl = None
    steps = report.steps
    seconds = sorted(step.seconds for step in steps[len(steps) // 2 :])
    peak = torch.cuda.max_memory_allocated() >> 20 if torch.cuda.is_available() else None
    return {
        "phase": [step.phase for step in steps],
        "loss": [round(step.loss, 5) for step in steps],
        "gradient_norm": [round(step.gradient_norm, 5) for step in steps],
        "skipped": {str(n): step.skipped for n, step in enumerate(steps) if step.skipped},
        "train_seconds": sum(step.seconds for step in steps),
        "tokens_per_s": round(a.batch * a.length / seconds[len(seconds) // 2]),
        "peak_mib": peak,
    }


def evaluate(
    a: argparse.Namespace,
    model: Any,  # noqa: ANN401
    text: dict[str, Any],
    tokenizer: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """Return perplexities, pass keys and answers to questions."""
    row: dict[str, Any] = {"perplexity": perplexities(a, model, text)}
    if a.passkeys:
        start = time.monotonic()
        with autocast(a):
            found = passkey(model, tokenizer, a.passkey_lengths, samples=a.passkeys, batch_size=8)
        row["passkey"] = {str(n): share for n, share in found.by_length.items()}
        row["passkey_seconds"] = time.monotonic() - start
    if a.extractive:
        start = time.monotonic()
        stream = text[f"test_{SOURCES[0]}"]
        items = questions(tokenizer, stream, a.extractive, a.extractive_length)
        with autocast(a):
            answered = extractive(model, tokenizer, items, new_tokens=EXTRACTIVE_TOKENS)
        row["extractive"] = {"accuracy": answered.accuracy, "nll": answered.nll}
        row["extractive_seconds"] = time.monotonic() - start
    return row


def perplexities(a: argparse.Namespace, model: Any, text: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """Return perplexity by source and length, over all sources, and losses by position."""
    found: dict[str, Any] = {}
    for length in a.lengths:
        losses = []
        for source in SOURCES:
            stream = torch.from_numpy(text[f"test_{source}"].astype(np.int64))
            count = min(a.sequences * max(a.lengths) // length, len(stream) // length)
            rows = stream[: count * length].view(count, length)
            batches = rows.split(max(1, a.batch * a.length // length))
            with autocast(a):
                measured = perplexity_by_position(model, batches, EDGES)
            losses.append(measured.loss)
            found[f"{source} {length}"] = {
                "perplexity": measured.perplexity,
                "loss": measured.loss,
                "tokens": sum(measured.tokens),
                "loss_by_position": dict(zip(map(str, measured.edges), measured.nll, strict=False)),
            }
        found[str(length)] = float(np.exp(np.mean(losses)))
    return found


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, help="a GGUF file; none = random weights")
    add("--text", type=Path, required=True, help="what adaptation_text.py wrote")
    add("--gpus", type=int, default=1)
    add("--first-gpu", type=int, default=0)
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--table", choices=tuple(TABLES), default="adaptation")
    add("--arms", nargs="+", help="names; all unless given")
    add("--save", type=Path, help="folder for the models that were trained, one each")
    add("--steps", type=int, default=250, help="optimizer steps of every arm")
    add("--batch", type=int, default=4, help="sequences per step")
    add("--length", type=int, default=8192, help="of training sequences [tokens]")
    add("--lengths", type=int, nargs="+", default=[2048, 8192], help="of held-out text [tokens]")
    add("--sequences", type=int, default=8, help="held-out text per source, of the longest length")
    add("--select", type=int, default=4, help="sequences that choose full layers")
    add("--passkeys", type=int, default=24, help="prompts per length; 0 = none")
    add("--passkey-lengths", type=int, nargs="+", default=[1000, 2000, 4000, 7600])
    add("--extractive", type=int, default=0, help="questions on long documents; 0 = none")
    add("--extractive-length", type=int, default=4000, help="of the documents [tokens]")
    add("--budget-s", type=float, default=1e9, help="begin no arm that may not end by then")
    add("--out", type=Path, default=RESULT)
    add("--commit", help="recorded where git cannot say it")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
