"""GPU time and memory of FlashEVA against SDPA's kernels and FlexAttention, as JSON.

Run ``PYTHONPATH=. python benchmarks/attention_gpu.py``; ``plot.py`` turns the result into plots.
All contestants get the same tensors in the same run; times are medians. ``flasheva`` includes the
pooling of chunk tokens; ``flasheva_attention`` and ``flex`` get them ready-made. SDPA computes full
attention, another function: what is compared with it is the time, not the quality.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from flasheva_compile.lowering.op import EvaOp
from peers import (
    FORMULATIONS,
    Case,
    FlexSettings,
    Inputs,
    agrees,
    build,
    compare_with_flex,
    compare_with_reference,
    make_inputs,
)
from records import OUT_OF_TIME, Results, Row, header, restart
from roofline import Pass, Peak, bound_ms, flops
from timing import (
    DeviceLostError,
    Effort,
    describe,
    measure,
    release,
    sets_for_cold_cache,
    side_stream,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from peers import Prepared

WHAT = "full attention by SDPA; FlashEVA and FlexAttention: sinks, window and chunk tokens"
RESULT = Path(__file__).parent / "results" / "attention_gpu.json"
PASSES: tuple[Pass, ...] = ("fwd", "bwd", "fwd+bwd")
SHAPE = ("length", "head_dim", "heads", "kv_heads", "causal")
EVA = ("window", "window_size", "chunk_size", "sink_tokens")
ASSUMED_TFLOPS = 300.0  # of a full attention, to foresee which would take too long
EXIT_LOST = 3


@dataclass(kw_only=True)
class Run:
    """One run of the benchmark: what to do, until when, and what was found."""

    arguments: argparse.Namespace
    device: torch.device
    results: Results
    effort: Effort
    peak: Peak
    deadline: float

    @property
    def is_over(self) -> bool:
        """Whether the time budget is spent."""
        return time.monotonic() > self.deadline

    def flex_settings(self, contestant: str) -> FlexSettings:
        """Return how FlexAttention is compiled under this name."""
        return FlexSettings(
            mode="max-autotune-no-cudagraphs" if contestant == "flex_autotuned" else None,
            bias=self.arguments.flex_bias,
            kernel_options=json.loads(self.arguments.flex_options),
            compiled=self.device.type == "cuda",
        )


def power_of_two_or_k(text: str) -> int:
    """Read ``64k`` as 65536."""
    return int(text[:-1]) * 1024 if text.lower().endswith("k") else int(text)


def cases(a: argparse.Namespace) -> Iterator[Case]:
    """List what is to be measured, in the order of the options."""
    axes = itertools.product(a.gqa, a.masks, a.chunks, a.lengths, a.head_dims, a.windows)
    for group, mask, chunks, length, head_dim, kind in axes:
        window, _, sinks = kind.partition(":")
        number = a.chunk_number if chunks == "number" else None
        chunk_size = max(1, -(-length // number)) if number else a.chunk_size
        heads = a.hidden // head_dim
        op = EvaOp(
            window_size=-(-a.window_size // chunk_size) * chunk_size,
            chunk_size=chunk_size,
            sink_size=-(-int(sinks or 0) // chunk_size) * chunk_size,
            window=window,  # pyright: ignore[reportArgumentType]
            chunk_rule="tangent",
            causal=mask == "causal",
            scale=head_dim**-0.5,
            heads=heads,
            kv_heads=heads // group,
            head_dim=head_dim,
            value_dim=head_dim,
        )
        yield Case(op=op, length=length, batch=a.batch)


def identity(case: Case, contestant: str, step: Pass) -> Row:
    """Return the fields that tell a row apart; full attention has no window."""
    op = case.op
    row: Row = {"contestant": contestant, "pass": step, "batch": case.batch, "length": case.length}
    row |= {name: getattr(op, name) for name in SHAPE[1:]}
    if FORMULATIONS[contestant] == "full":
        return row | dict.fromkeys(EVA)
    return row | {name: getattr(op, name) for name in EVA[:3]} | {"sink_tokens": op.sink_size}


def too_long(run: Run, case: Case, contestant: str, step: Pass) -> str | None:
    """Say why full attention is left out at this length."""
    if FORMULATIONS[contestant] != "full":
        return None
    seconds = case.batch * flops(case.op, case.length, "full", step) / (ASSUMED_TFLOPS * 1e12)
    if seconds <= run.arguments.max_call_s:
        return None
    return f"one call would take about {seconds:.1f} s"


def step_function(prepared: Prepared, x: Inputs, step: Pass) -> Callable[[], object]:
    """Return the function that is timed, for one set of inputs."""
    forward, leaves = prepared
    if step == "fwd":
        return torch.no_grad()(forward)
    if step == "fwd+bwd":
        return lambda: torch.autograd.grad(forward(), leaves, x.dout)
    out = forward()
    return partial(torch.autograd.grad, out, leaves, x.dout, retain_graph=True)


def costs(run: Run, case: Case, contestant: str, step: Pass, ms: float) -> Row:
    """Return rate and roofline of a time; rates count the contestant's own pairs."""
    formulation = FORMULATIONS[contestant]
    work = case.batch * flops(case.op, case.length, formulation, step)
    bound = case.batch * bound_ms(case.op, case.length, formulation, step, run.peak)
    return {
        "tflops": round(work / ms * 1e-9, 2),
        "roofline_ms": round(bound, 5),
        "roofline_fraction": round(bound / ms, 4),
    }


def measure_row(
    run: Run, case: Case, row: Row, inputs: Sequence[Inputs], prepare: Callable[..., Prepared]
) -> Row:
    """Measure one contestant in one pass; a failure is a row too."""
    step: Pass = row["pass"]
    if "flex" in row["contestant"]:
        row = row | {"chunk_bias": run.arguments.flex_bias}
    try:
        functions = [step_function(prepare(case, x), x, step) for x in inputs]
        measured = measure(functions, run.device, run.effort)
    except Exception as error:  # noqa: BLE001, RUF100 - the run goes on, the row says why
        return {**row, "error": describe(error)}
    return {**row, **measured.fields(), **costs(run, case, row["contestant"], step, measured.ms)}


def check_flex(run: Run, case: Case, inputs: Inputs, prepare: Callable[..., Prepared]) -> str:
    """Compare FlexAttention with the op; say why the two must not be compared, if so."""
    backward = any(step != "fwd" for step in run.arguments.passes) and run.device.type == "cuda"
    check = identity(case, "flex", "fwd+bwd" if backward else "fwd")
    start = time.perf_counter()
    try:
        found = compare_with_flex(case, inputs, prepare, backward=backward)
        check["seconds_with_compilation"] = round(time.perf_counter() - start, 2)
        against_formula = compare_with_reference(case, inputs)
    except Exception as error:  # noqa: BLE001, RUF100 - recorded
        run.results.checks.append({**check, "error": describe(error)})
        return ""  # the rows will have their own errors
    ok = agrees(found)
    check |= {**found, **{f"flasheva_vs_fp32_{k}": v for k, v in against_formula.items()}}
    check |= {"ok": ok and agrees(against_formula)}
    run.results.checks.append(check)
    return "" if ok else "FlexAttention and flasheva_attention differ: see checks"


def run_contestant(run: Run, case: Case, contestant: str, inputs: Sequence[Inputs]) -> None:
    """Measure one contestant in all passes of one case."""
    todo = [identity(case, contestant, step) for step in run.arguments.passes]
    todo = [row for row in todo if not run.results.has(row)]
    prepare, reason = None, ""
    for row in todo:
        skipped = OUT_OF_TIME if run.is_over else too_long(run, case, contestant, row["pass"])
        if skipped or reason:
            run.results.add({**row, "skipped": skipped or reason})
            continue
        if prepare is None:
            try:
                prepare = build(contestant, case, run.flex_settings(contestant), run.device)
            except Exception as error:  # noqa: BLE001, RUF100 - recorded
                run.results.add({**row, "error": describe(error)})
                continue
            reason = check_flex(run, case, inputs[0], prepare) if "flex" in contestant else ""
            if reason:
                run.results.add({**row, "skipped": reason})
                continue
        found = measure_row(run, case, row, inputs, prepare)
        run.results.add(found)
        add_ratios(run.results.rows)
        print(json.dumps(found), flush=True)
        release(run.device)


def run_case(run: Run, case: Case) -> None:
    """Measure all contestants of one case on the same tensors."""
    wanted = itertools.product(run.arguments.contestants, run.arguments.passes)
    if all(run.results.has(identity(case, name, step)) for name, step in wanted):
        return
    sets = 1 if run.arguments.warm_cache else sets_for_cold_cache(case.set_bytes, run.device)
    try:
        inputs = [make_inputs(case, run.device, seed) for seed in range(sets)]
    except torch.OutOfMemoryError as error:
        for name, step in itertools.product(run.arguments.contestants, run.arguments.passes):
            run.results.add({**identity(case, name, step), "error": describe(error)})
        return
    for contestant in run.arguments.contestants:
        run_contestant(run, case, contestant, inputs)
        release(run.device)


def add_ratios(rows: list[Row]) -> None:
    """Add, to rows of FlashEVA, how many times longer each peer takes: ``vs_<peer>``."""
    measured = [row for row in rows if "ms" in row]
    for row in measured:
        if not row["contestant"].startswith("flasheva"):
            continue
        for peer in measured:
            name = peer["contestant"]
            same = ("pass", "batch", *SHAPE, *(() if FORMULATIONS[name] == "full" else EVA))
            if not name.startswith("flasheva") and all(row[f] == peer[f] for f in same):
                row[f"vs_{name}"] = round(peer["ms"] / row["ms"], 3)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    lengths = [1024 << shift for shift in range(1, 9)]
    size = power_of_two_or_k
    names = tuple(FORMULATIONS)
    add("--lengths", type=size, nargs="+", default=lengths, help="tokens; 64k = 65536")
    add("--head-dims", type=int, nargs="+", default=[64, 128])
    add("--hidden", type=int, default=2048, help="heads = hidden / head dim")
    add("--batch", type=int, default=1)
    add("--gqa", type=int, nargs="+", default=[1], help="query heads per key head")
    add("--masks", choices=("causal", "full"), nargs="+", default=["causal"])
    add("--windows", nargs="+", default=["block:0", "sliding:16"], help="kind:sink tokens")
    add("--window-size", type=int, default=256)
    add("--chunks", choices=("size", "number"), nargs="+", default=["size"], help="what is fixed")
    add("--chunk-size", type=int, default=16)
    add("--chunk-number", type=int, default=256, help="the window grows to one chunk if need be")
    add("--passes", choices=PASSES, nargs="+", default=list(PASSES))
    add("--contestants", choices=names, nargs="+", default=list(names[:-1]))
    add("--flex-bias", choices=("constant", "tensor"), default="constant")
    add("--flex-options", default="{}", help="JSON for flex_attention(kernel_options=)")
    add("--max-call-s", type=float, default=3.0, help="leave out full attention beyond that")
    add("--budget-s", type=float, default=math.inf, help="start nothing new after that")
    add("--measure-ms", type=float, default=300.0)
    add("--no-graphs", action="store_true", help="time with events only")
    add("--warm-cache", action="store_true", help="one set of inputs, however small")
    add("--peak-tflops", type=float, default=Peak.tflops)
    add("--peak-tbs", type=float, default=Peak.tbs)
    add("--device", default="cuda:0")
    add("--out", type=Path, default=RESULT)
    add("--resume", action="store_true", help="keep the rows that --out has")
    add("--commit", help="recorded where git cannot say it")
    add("--dry-run", action="store_true", help="one sample each: does everything run?")
    return parser.parse_args()


def main() -> None:
    """Measure, print and store."""
    a = parse_arguments()
    device, start = torch.device(a.device), time.monotonic()
    what = {"what": WHAT, "hidden": a.hidden, "peak_tflops": a.peak_tflops, "peak_tbs": a.peak_tbs}
    names = ("contestant", "pass", "batch", *SHAPE, *EVA)
    results = Results(path=a.out, identity=names, header={**header(device, a.commit), **what})
    if a.resume:
        results.resume()
    budget = {"measure_ms": 0.0, "warmup_ms": 0.0} if a.dry_run else {"measure_ms": a.measure_ms}
    run = Run(
        arguments=a,
        device=device,
        results=results,
        effort=Effort(graphs=not a.no_graphs, **budget),
        peak=Peak(tflops=a.peak_tflops, tbs=a.peak_tbs),
        deadline=start + a.budget_s,
    )
    try:
        with side_stream(device):
            for case in cases(a):
                run_case(run, case)
    except DeviceLostError as error:
        results.header["device_lost"] = str(error)
        results.write()
        left = run.deadline - time.monotonic()
        if left < 1:
            sys.exit(EXIT_LOST)
        restart(a.out, min(left, 1e6))
    add_ratios(results.rows)
    results.write()


if __name__ == "__main__":
    main()
