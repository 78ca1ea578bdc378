"""CPU time and peak memory of FlashEVA attention, pooling included, against SDPA, as JSON.

Run ``python benchmarks/attention_cpu.py``. Each measurement is its own process, so that the peak
resident memory belongs to it alone: ``ru_maxrss`` after the runs minus ``ru_maxrss`` before the
first one, inputs excluded, outputs and gradients included. Times are medians.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

from flasheva_compile.ops import flasheva_attention

LENGTHS = (1024, 4096, 16384)
SHAPE = {"batch": 1, "heads": 9, "kv_heads": 3, "head_dim": 64}
OPTIONS = {"window_size": 256, "chunk_size": 16, "sink_tokens": 16}
CONTESTANTS = ("flasheva", "sdpa", "sdpa_gqa")
RESULT = Path(__file__).parent / "results" / "attention_cpu.json"


def contestant(name: str, length: int, *, backward: bool):  # noqa: ANN201 - a closure
    """Return a function that runs one forward (and backward) on fixed fp32 inputs."""
    torch.manual_seed(0)
    heads = SHAPE["heads"] if name == "sdpa" else SHAPE["kv_heads"]
    q, k, v = (
        torch.randn(SHAPE["batch"], h, length, SHAPE["head_dim"], requires_grad=backward)
        for h in (SHAPE["heads"], heads, heads)
    )
    phi = torch.zeros(SHAPE["kv_heads"], SHAPE["head_dim"], requires_grad=backward)
    dout = torch.randn_like(q)

    def run() -> None:
        if name == "flasheva":
            out, _ = flasheva_attention(q, k, v, parameters=[phi], **OPTIONS)
        else:
            out = functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=name == "sdpa_gqa"
            )
        if backward:
            out.backward(dout)
            for x in (q, k, v, phi):
                x.grad = None

    return run


def measure(name: str, length: int, *, backward: bool, runs: int) -> dict[str, float]:
    """Time one contestant in this process."""
    contestant(name, 128, backward=backward)()  # libraries and thread pools are set up
    run = contestant(name, length, backward=backward)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    # The first run touches fresh memory and is left out.
    median = statistics.median(times[1:])
    return {"median_ms": median * 1e3, "min_ms": min(times[1:]) * 1e3, "peak_mib": peak_kib / 1024}


def in_own_process(name: str, length: int, *, backward: bool, runs: int) -> dict[str, float]:
    """Run :func:`measure` in a fresh interpreter."""
    arguments = ["--measure", name, "--length", str(length), "--runs", str(runs)]
    command = [sys.executable, __file__, *arguments, *(["--backward"] if backward else [])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def device_name() -> str:
    """Name the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), platform.machine())


def report(runs: int) -> dict[str, object]:
    """Measure everything."""
    rows = []
    for length in LENGTHS:
        for backward in (False, True):
            row: dict[str, object] = {"length": length, "pass": "fwd+bwd" if backward else "fwd"}
            for name in CONTESTANTS:
                row[name] = in_own_process(name, length, backward=backward, runs=runs)
            fastest = min(row[name]["median_ms"] for name in CONTESTANTS[1:])
            row["speedup_over_fastest_sdpa"] = fastest / row["flasheva"]["median_ms"]
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    return {
        "what": "fp32 causal attention; sdpa has 9 kv heads, sdpa_gqa and flasheva have 3",
        "memory": "ru_maxrss of a fresh process after the runs minus before (inputs excluded)",
        "shape": SHAPE,
        "options": OPTIONS,
        "runs": runs,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "load_average_at_end": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": rows,
    }


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=CONTESTANTS)
    parser.add_argument("--length", type=int)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.measure:
        options = {"backward": arguments.backward, "runs": arguments.runs}
        print(json.dumps(measure(arguments.measure, arguments.length, **options)))
        return
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report(arguments.runs), indent=1) + "\n")


if __name__ == "__main__":
    main()
