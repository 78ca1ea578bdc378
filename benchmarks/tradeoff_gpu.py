"""Speed and memory over (window, chunk) of the model that ``adaptation_gpu.py`` adapts, as JSON.

    PYTHONPATH=. python benchmarks/tradeoff_gpu.py [--adapted ADAPTATION.json --plot X.svg]

SmolLM2-135M's shape with random weights, bf16: prefill of one sequence (last logits only) and
greedy decoding of many after a context that nobody computed, both replayed from CUDA graphs of the
prepared, uncompiled model; full attention with a preallocated cache beside it (decoding: SDPA
without a mask, its fastest). With ``--adapted`` it prints and draws the perplexities of adapted
models against them, as the paper's Figure 2 does.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from adaptation_model import load_model
from attention_gpu import power_of_two_or_k
from generation_caches import UNMASKED, filled_cache, nbytes
from generation_gpu import GreedyLoop, step_times
from plot import markdown, number
from records import OUT_OF_TIME, Results, Row, header
from timing import MIB, Effort, describe, measure, release, side_stream

import flasheva_compile as fe

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULT = Path(__file__).parent / "results" / "tradeoff_gpu.json"
IDENTITY = ("window_size", "chunk_size")
FULL = {"window_size": None, "chunk_size": None}
SINKS = 16
STEPS = 20
MEASURES = ("prefill_tokens_per_s", "decode_tokens_per_s", "cache_mib_per_row")


def measured(a: argparse.Namespace, row: Row) -> Row:
    """Measure prefill and decoding of one configuration."""
    device = torch.device(a.device)
    config = None
    with torch.device(device):
        model = load_model(None, getattr(torch, a.dtype)).eval()
    if row["window_size"]:
        config = fe.EvaConfig(**{name: row[name] for name in IDENTITY}, sink_tokens=SINKS)
        model = fe.prepare(model, config)
    found = {**row, **prefill(a, model, device)}
    if config is None:
        model.set_attn_implementation(UNMASKED)
        config = fe.EvaConfig()  # of a preallocated full cache it says nothing
        return {**found, **decode(a, model, "full_unmasked", config)}
    return {**found, **decode(a, model, "flasheva_static", config)}


def prefill(a: argparse.Namespace, model: Any, device: torch.device) -> Row:  # noqa: ANN401
    """Time one sequence without a cache."""
    ids = torch.randint(3, 1000, (1, a.context), device=device)
    effort = Effort(measure_ms=a.measure_ms, min_samples=3)

    def forward() -> torch.Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    found = measure([forward], device, effort)
    return {
        "prefill_ms": round(found.ms, 4),
        "prefill_tokens_per_s": round(a.context / found.ms * 1e3),
        "prefill_method": found.method,
    }


def decode(a: argparse.Namespace, model: Any, arm: str, config: fe.EvaConfig) -> Row:  # noqa: ANN401
    """Time greedy steps of ``a.rows`` sequences."""
    cache = filled_cache(model, arm, a.rows, a.context, config)
    size = nbytes(cache) / a.rows / MIB
    graph = "graph" if a.device.startswith("cuda") else "eager"
    step = GreedyLoop(model, cache, a.rows, a.context).prepared(graph)
    times = sorted(step_times(step, torch.device(a.device), STEPS))
    ms = times[len(times) // 2]
    return {
        "decode_ms": round(ms, 4),
        "decode_tokens_per_s": round(a.rows / ms * 1e3),
        "cache_mib_per_row": round(size, 3),
    }


def run(a: argparse.Namespace) -> list[Row]:
    """Measure what is missing."""
    device, deadline = torch.device(a.device), time.monotonic() + a.budget_s
    names = ("context", "rows", "dtype")
    described = {**header(device, a.commit), **{name: getattr(a, name) for name in names}}
    described |= {"model": "SmolLM2-135M's shape, random weights", "sink_tokens": SINKS}
    results = Results(path=a.out, identity=IDENTITY, header=described)
    grid = [{"window_size": w, "chunk_size": c} for w in a.windows for c in a.chunks]
    with side_stream(device), torch.no_grad():
        for row in [FULL, *grid]:
            if time.monotonic() > deadline:
                results.add({**row, "skipped": OUT_OF_TIME})
                continue
            try:
                results.add(measured(a, row))
            except Exception as error:  # noqa: BLE001, RUF100 - the row says why
                results.add({**row, "error": describe(error)})
            print(json.dumps(results.rows[-1]), flush=True)
            release(device)
    return results.rows


# --- beside what adapted models reach -------------------------------------------------------------


def joined(rows: Sequence[Row], adapted: Sequence[Row], training: str) -> list[Row]:
    """Add the perplexities of adapted models, where there is one with the same window and chunk."""
    return [
        {**row, "name": arm["name"], "perplexity": arm["perplexity"]["8192"]}
        for row in rows
        for arm in adapted
        if arm["training"] == training and matches(row, arm) and "perplexity" in arm
    ]


def matches(row: Row, arm: Row) -> bool:
    """Tell whether an arm is a row's configuration, trained as it is by default."""
    if row["window_size"] is None:
        return arm["name"] == f"full, {arm['training']}"
    c = arm["config"]
    same = all(c[name] == row[name] for name in IDENTITY) and c.get("window", "sliding") != "block"
    plain = not arm["keep"] and not arm["seed"] and not arm.get("compiled")
    return same and plain and c["chunk_rule"] == "tangent" and not c.get("retrieve_chunks")


def table(rows: Sequence[Row]) -> str:
    """Return one line for each configuration."""
    columns = ["window", "chunk", "perplexity", *MEASURES]
    lines = []
    for row in rows:
        size = ["full", ""] if row["window_size"] is None else [str(row[n]) for n in IDENTITY]
        perplexity = f"{row['perplexity']:.2f}" if "perplexity" in row else ""
        lines.append([*size, perplexity, *(number(row.get(name)) for name in MEASURES)])
    return markdown(columns, lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw perplexity against prefill, decoding and cache."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for panel, name in zip(panels, MEASURES, strict=True):
        for row in rows:
            full = row["window_size"] is None
            label = "full" if full else f"w{row['window_size']} c{row['chunk_size']}"
            panel.plot(row[name], row["perplexity"], "s" if full else "o", color=f"C{2 * full}")
            panel.annotate(label, (row[name], row["perplexity"]), fontsize=7)
        panel.set(xlabel=name.replace("_", " "), xscale="log")
    panels[0].set_ylabel("perplexity at 8192")
    figure.savefig(path)


# --- command line ---------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add, size = parser.add_argument, power_of_two_or_k
    add("--windows", type=int, nargs="+", default=[256, 128, 512])
    add("--chunks", type=int, nargs="+", default=[16, 4, 8, 32])
    add("--context", type=size, default=8192, help="tokens; 8k = 8192")
    add("--rows", type=int, default=64, help="sequences that decode together")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--measure-ms", type=float, default=200.0)
    add("--budget-s", type=float, default=math.inf, help="start nothing new after that")
    add("--device", default="cuda:0")
    add("--out", type=Path, default=RESULT)
    add("--adapted", type=Path, help="what adaptation_gpu.py found; measures nothing anew")
    add("--training", default="lm", help="of the adapted models")
    add("--plot", type=Path, help="where to draw")
    add("--commit", help="recorded where git cannot say it")
    return parser.parse_args()


def main() -> None:
    """Measure; or print and draw what was measured."""
    a = parse_arguments()
    if not a.adapted:
        run(a)
        return
    rows = json.loads(a.out.read_text())["rows"]
    measured_rows = [row for row in rows if "decode_ms" in row]
    known = joined(measured_rows, json.loads(a.adapted.read_text())["rows"], a.training)
    perplexity = {tuple(row[n] for n in IDENTITY): row["perplexity"] for row in known}
    every = []
    for row in measured_rows:
        key = tuple(row[n] for n in IDENTITY)
        every.append({**row, "perplexity": perplexity[key]} if key in perplexity else row)
    print(table(every))
    if a.plot:
        draw(known, a.plot)


if __name__ == "__main__":
    main()
