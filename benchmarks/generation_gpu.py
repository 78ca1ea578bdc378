"""GPU time and memory of one decoding step of a whole language model, as JSON.

Run ``PYTHONPATH=. python benchmarks/generation_gpu.py``; ``generation_plot.py`` turns the result
into tables and plots. A model with random weights decodes greedily, every step feeding the next,
after a context whose keys and values are random numbers: nothing is prefilled. The arms are
described in ``generation_caches.ARMS``. Preallocated caches hold the context and 64 tokens more. A
step of theirs is replayed from a CUDA graph of the uncompiled model (``graph``), compiled with
``mode="reduce-overhead"`` (``compile``) or ``"max-autotune"`` (``autotune``) or run as it is
(``eager``); the other caches run ``eager`` or through ``model.generate`` (``generate``).

Rows of earlier runs are kept, and replaced where they are measured again: short runs add up to one
file. ``--resume`` measures only what is missing. ``bound_ms`` is the time to read the weights and
the visible cache once at the measured bandwidth of a copy.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attention_gpu import power_of_two_or_k
from generation_caches import (
    ARMS,
    MODELS,
    TINY,
    Shape,
    build_model,
    filled_cache,
    nbytes,
    static_columns,
    step_weights,
)
from records import OUT_OF_TIME, Results, Row, header, restart
from timing import MIB, DeviceLostError, Effort, describe, measure, release, side_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RESULT = Path(__file__).parent / "results" / "generation_gpu.json"
IDENTITY = ("model", "layers", "arm", "decode", "batch", "context")
MODES = {"compile": "reduce-overhead", "autotune": "max-autotune"}
WARMUP = 3
LARGEST = "largest"  # batch: what fits
GENERATED = ("full_dynamic", "flasheva_dynamic")  # arms that are run through generate, too
MAX_STEPS = 40  # with what warms up, they stay within a preallocated cache


class GreedyLoop:
    """Greedy decoding, one step after the other.

    Args:
        model: A transformers model.
        cache: Its filled cache.
        rows: Sequences.
        context: Tokens in the cache.
    """

    def __init__(self, model: Any, cache: Any, rows: int, context: int) -> None:  # noqa: ANN401
        self.ids = torch.full((rows, 1), 5, device=model.device)
        self.position = torch.full((1, 1), context, device=model.device)

        def forward(ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            out = model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True)
            return out.logits[:, -1].argmax(-1, keepdim=True)

        self.forward = forward

    def step(self) -> None:
        """Decode one token."""
        self.ids.copy_(self.forward(self.ids, self.position))
        self.position.add_(1)

    def prepared(self, decode: str) -> Callable[[], object]:
        """Return what decodes one token, warmed up: a step as it is, compiled or captured."""
        if decode in MODES:
            whole = {"dynamic": False, "fullgraph": True}
            self.forward = torch.compile(self.forward, mode=MODES[decode], **whole)
        for _ in range(WARMUP):
            self.step()
        if decode != "graph":
            return self.step
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            self.step()
        graph.replay()
        return graph.replay


def step_times(step: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Time steps that follow on each other, in milliseconds."""
    if device.type != "cuda":
        clock = [time.perf_counter()]
        for _ in range(count):
            step()
            clock.append(time.perf_counter())
        return [(b - a) * 1e3 for a, b in itertools.pairwise(clock)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


class _Clock:
    """A streamer of ``generate`` that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


def generate_times(model: Any, cache: Any, rows: int, context: int, count: int) -> list[float]:  # noqa: ANN401
    """Time the steps of ``generate`` after a filled cache, in milliseconds."""
    ids = torch.full((rows, context + 1), 5, device=model.device)
    clock = _Clock()
    new = count + WARMUP
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        streamer=clock,
        pad_token_id=0,
    )
    steps = [(b - a) * 1e3 for a, b in itertools.pairwise(clock.times)]
    return steps[-count:]


def measure_steps(a: argparse.Namespace, model: Any, row: Row) -> Row:  # noqa: ANN401
    """Measure one arm with ``row["rows"]`` sequences at one context length."""
    device, rows, context = torch.device(a.device), row["rows"], row["context"]
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    cache = filled_cache(model, row["arm"], rows, context, a)
    cache_bytes = nbytes(cache)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    if row["decode"] == "generate":
        times = generate_times(model, cache, rows, context, a.steps)
    else:
        loop = GreedyLoop(model, cache, rows, context)
        step = loop.prepared(row["decode"])
        setup_s = time.perf_counter() - start
        times = step_times(step, device, a.steps)
        decoded = WARMUP + a.steps + (row["decode"] == "graph")
        counted = (int(loop.position) - context, int(cache.get_seq_length()) - context)
        if counted != (decoded, decoded):
            message = f"{decoded} steps, but positions and cache counted {counted}"
            raise AssertionError(message)
        row = {**row, "setup_s": round(setup_s, 2)}
    ms = statistics.median(times)
    found = {
        "ms": round(ms, 4),
        "min_ms": round(min(times), 4),
        "samples": len(times),
        "tokens_per_s": round(rows / ms * 1e3, 1),
        "cache_mib": round(cache_bytes / MIB, 2),
    }
    if on_gpu:
        found["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / MIB, 1)
    return {**row, **found, **bound(a, model, row, ms)}


def bound(a: argparse.Namespace, model: Any, row: Row, ms: float) -> Row:  # noqa: ANN401
    """Return what a step must read, and the time that this takes at the bandwidth of a copy."""
    cache = Shape.of(model).visible_bytes(row["arm"], a, row["context"])
    weights = step_weights(model)
    moved = weights + row["rows"] * cache
    least = moved / (a.bandwidth * 1e9)
    return {
        "weights_mib": round(weights / MIB, 1),
        "step_mib": round(moved / MIB, 1),
        "bound_ms": round(least, 4),
        "roofline_fraction": round(least / ms, 4),
    }


def copy_bandwidth(device: torch.device) -> float:
    """Return the bandwidth of a large copy, reads and writes [TB/s]."""
    size = (1 << 30) if device.type == "cuda" else (1 << 26)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    effort = Effort(measure_ms=50.0, warmup_ms=10.0, graphs=False)
    measured = measure([lambda: target.copy_(source)], device, effort)
    return round(2 * size / measured.ms / 1e9, 4)


def ran_out(error: BaseException | None) -> bool:
    """Tell whether memory was what was missing."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def attempt(a: argparse.Namespace, model: Any, row: Row) -> Row:  # noqa: ANN401
    """Measure; write down why if that fails, and free everything either way."""
    device = torch.device(a.device)
    needed = Shape.of(model).bytes_of(static_columns(row["context"])) * row["rows"]
    if device.type == "cuda" and row["arm"].startswith("full"):
        room = torch.cuda.get_device_properties(device).total_memory
        if needed > room:
            why = f"the cache alone takes {needed >> 20} MiB of {room >> 20}"
            return {**row, "error": f"OutOfMemoryError: {why}", "out_of_memory": True}
    try:
        with torch.no_grad():
            result = measure_steps(a, model, row)
    except Exception as error:  # noqa: BLE001, RUF100 - the run goes on, the row says why
        result = {**row, "error": describe(error)}
        if ran_out(error):
            result["out_of_memory"] = True
    if row["decode"] in MODES:
        torch.compiler.reset()
    release(device)
    return result


def largest_batch(a: argparse.Namespace, model: Any, row: Row, deadline: float) -> Row:  # noqa: ANN401
    """Double the rows until they no longer fit, then halve the gap to a sixteenth; measure that."""
    low, high, first = 0, a.largest_limit + 1, 32
    if torch.device(a.device).type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        least = Shape.of(model).visible_bytes(row["arm"], a, row["context"])
        first = 1 << max(0, (free // least // 2).bit_length() - 1)
    brief = argparse.Namespace(**{**vars(a), "steps": 2})
    rows = min(first, a.largest_limit)
    while high - low > max(1, low // 16) and rows and time.monotonic() < deadline:
        result = attempt(brief, model, {**row, "rows": rows})
        if "ms" in result:
            low = rows
        elif result.get("out_of_memory"):
            high = rows
        else:
            return result
        unbounded = high > a.largest_limit
        rows = min(2 * low, a.largest_limit) if unbounded else (low + high) // 2
    if not low:
        return {**row, "error": f"OutOfMemoryError: {high} rows were too many"}
    tried = {"too_many": high} if high <= a.largest_limit else {}
    return {**attempt(a, model, {**row, "rows": low}), **tried}


def planned(a: argparse.Namespace, name: str, arm: str) -> Iterator[Row]:
    """List what is to be measured for one model and arm."""
    static = ARMS[arm].static
    layers = a.layers or (TINY if a.tiny else MODELS[name][1])["num_hidden_layers"]
    base = {"model": f"tiny-{name}" if a.tiny else name, "layers": layers, "arm": arm}
    cells = list(itertools.product(a.batches, a.contexts))
    for decode in a.decode if static else ["eager"]:
        for batch, context in cells:
            yield {**base, "decode": decode, "batch": batch, "context": context}
        if a.largest_at and static and not arm.endswith(("unmasked", "sinks")):
            yield {**base, "decode": decode, "batch": LARGEST, "context": a.largest_at}
    if a.generate_at and arm in GENERATED:
        yield {**base, "decode": "generate", "batch": 1, "context": a.generate_at}


def run_arm(a: argparse.Namespace, name: str, arm: str, results: Results, deadline: float) -> None:
    """Measure one arm of one model: what is there is measured again unless it is a resumed run."""
    cells = [row for row in planned(a, name, arm) if not (a.resume and results.has(row))]
    if not cells:
        return
    device, model, failed = torch.device(a.device), None, ""
    if time.monotonic() < deadline:
        try:
            model = build_model(a, name, ARMS[arm])
        except Exception as error:  # noqa: BLE001, RUF100
            failed = describe(error)
        release(device)
    for cell in cells:
        where = {"device": results.header["device"], "run": results.header["date"]}
        row = {**cell, "rows": cell["batch"], **where}
        if ARMS[arm].static and arm != "window_sinks":
            row["max_cache_len"] = static_columns(cell["context"])
        if arm.startswith(("flasheva", "window")):
            row |= {n: getattr(a, n) for n in ("window_size", "chunk_size", "sink_tokens")}
        if model is None or time.monotonic() > deadline:
            if not results.has(row):
                results.add({**row, "error": failed} if failed else {**row, "skipped": OUT_OF_TIME})
            continue
        if cell["batch"] == LARGEST:
            row = largest_batch(a, model, row, deadline)
        else:
            row = attempt(a, model, row)
        row = {**row, "batch": cell["batch"]}
        results.add(row)
        add_ratios(results.rows)
        print(line_of(results.rows[-1]), flush=True)


def line_of(row: Row) -> str:
    """Write a row on one line."""
    what = [str(row[name]) for name in IDENTITY]
    if "ms" not in row:
        return " ".join([*what, row.get("error") or row["skipped"]])
    names = ("rows", "ms", "tokens_per_s", "peak_mib", "roofline_fraction", "setup_s", "note")
    return " ".join([*what, *(f"{name}={row[name]}" for name in names if name in row)])


def add_ratios(rows: list[Row]) -> None:
    """Add, to rows of FlashEVA, how many times more tokens they make than every other arm."""
    same = ["device", *(name for name in IDENTITY if name not in ("arm", "decode"))]
    for row, peer in itertools.product(rows, rows):
        comparable = row["decode"] == peer["decode"] or (
            peer["arm"] == "full_dynamic" and (row["decode"], peer["decode"]) == ("graph", "eager")
        )
        if not row["arm"].startswith("flasheva") or peer["arm"].startswith("flasheva"):
            continue
        if comparable and "ms" in row and "ms" in peer and all(row[f] == peer[f] for f in same):
            row[f"vs_{peer['arm']}"] = round(row["tokens_per_s"] / peer["tokens_per_s"], 3)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add, size = parser.add_argument, power_of_two_or_k
    add("--model", choices=tuple(MODELS), nargs="+", default=list(MODELS))
    add("--arms", choices=tuple(ARMS), nargs="+", default=list(ARMS))
    add("--decode", choices=("graph", *MODES, "eager"), nargs="+", default=["graph"])
    contexts = [size(text) for text in ("1k", "4k", "10k", "16k", "64k", "128k")]
    add("--contexts", type=size, nargs="+", default=contexts, help="tokens; 64k = 65536")
    add("--batches", type=int, nargs="+", default=[1, 8, 32])
    add("--largest-at", type=size, default=size("10k"), help="find what fits there; 0 = do not")
    add("--largest-limit", type=int, default=4096, help="more rows are not tried")
    add("--generate-at", type=size, default=size("10k"), help="context for generate; 0 = none")
    add("--layers", type=int, default=0, help="0 = all; nothing is extrapolated from fewer")
    add("--window-size", type=int, default=256)
    add("--chunk-size", type=int, default=16)
    add("--sink-tokens", type=int, default=16)
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--steps", type=int, default=32, help=f"timed steps, at most {MAX_STEPS}")
    add("--budget-s", "--seconds", type=float, default=330.0, help="start nothing new after that")
    add("--quick", action="store_true", help="a first look: one model, one row and 32, 80 s")
    add("--tiny", action="store_true", help="a trial of the code: tiny models")
    add("--device", default="cuda:0")
    add("--out", type=Path, default=RESULT)
    add("--fresh", action="store_true", help="forget the rows that --out has")
    add("--resume", action="store_true", help="measure only what --out does not have")
    add("--commit", help="recorded where git cannot say it")
    a = parser.parse_args()
    if a.steps > MAX_STEPS:
        parser.error(f"--steps {a.steps}: at most {MAX_STEPS}")
    if a.quick:
        a.model, a.batches, a.contexts = a.model[:1], [1, 32], [size("1k"), size("10k"), 65536]
        a.budget_s, a.largest_at = min(a.budget_s, 80.0), 0
    return a


def main() -> None:
    """Measure, print and store."""
    started = time.monotonic()
    a = parse_arguments()
    device, deadline = torch.device(a.device), started + a.budget_s
    names = ("dtype", "window_size", "chunk_size", "sink_tokens", "steps")
    described = {**header(device, a.commit), **{name: getattr(a, name) for name in names}}
    described["arms"] = {name: arm.about for name, arm in ARMS.items()}
    results = Results(path=a.out, identity=IDENTITY, header=described)
    if not a.fresh:
        results.resume()
    try:
        with side_stream(device):
            a.bandwidth = described["copy_tbs"] = copy_bandwidth(device)
            release(device)
            for name, arm in itertools.product(a.model, a.arms):
                run_arm(a, name, arm, results, deadline)
                release(device)
    except DeviceLostError as error:
        results.header["device_lost"] = str(error)
        left = deadline - time.monotonic()
        results.write()
        if left < 1:
            sys.exit(str(error))
        restart(a.out, left)
    add_ratios(results.rows)
    results.write()


if __name__ == "__main__":
    main()
