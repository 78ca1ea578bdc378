"""Clock and power of a GPU while one attention runs on and on, and its time after a pause, as JSON.

Run ``PYTHONPATH=. python benchmarks/sustained_power.py``. Benchmarks repeat a call for hundreds of
milliseconds; a device at its limit of power then lowers its clock, whatever the kernel waits for.
``burst_ms`` is a call after a quarter of a second of rest, ``ms`` one among two seconds of them.
Needs nvidia-ml-py, by which PyTorch asks the driver.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attention_gpu import cases, power_of_two_or_k, step_function
from peers import FORMULATIONS, FlexSettings, build, make_inputs
from records import Results, header
from roofline import flops
from timing import release, side_stream

if TYPE_CHECKING:
    from collections.abc import Callable

RESULT = Path(__file__).parent / "results" / "sustained_power.json"
IDENTITY = ("contestant", "pass", "length", "head_dim")
BURSTS, REST_S, SUSTAINED_S = 6, 0.25, 2.0


def main() -> None:
    """Measure every contestant and write the JSON."""
    a = parse_arguments()
    device = torch.device("cuda:0")
    results = Results(path=a.out, identity=IDENTITY, header=header(device, a.commit))
    with side_stream(device):
        for case, name, step in itertools.product(cases(a), a.contestants, a.passes):
            x = make_inputs(case, device, 0)
            prepare = build(name, case, FlexSettings(), device)
            call = step_function(prepare(case, x), x, step)
            row: dict[str, Any] = {"contestant": name, "pass": step, "length": case.length}
            row |= {"head_dim": case.op.head_dim, **measured(call)}
            work = flops(case.op, case.length, FORMULATIONS[name], step)
            row |= {f"{k}tflops": round(work / row[f"{k}ms"] * 1e-9, 1) for k in ("", "burst_")}
            results.add(row)
            print(row, flush=True)
            del x, call
            release(device)


def measured(call: Callable[[], object]) -> dict[str, Any]:
    """Return times [ms], and median clock [MHz] and power [W] while calls go on."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    bursts = []
    for _ in range(BURSTS):
        time.sleep(REST_S)
        bursts.append(milliseconds(call, 1))
    calls = max(4, int(SUSTAINED_S * 1e3 / statistics.median(bursts)))
    milliseconds(call, calls // 2)
    seen: list[tuple[int, float]] = []
    stop = threading.Event()
    watch = threading.Thread(target=watched, args=(seen, stop))
    watch.start()
    sustained = milliseconds(call, calls)
    stop.set()
    watch.join()
    clocks, powers = zip(*seen, strict=True)
    return {
        "ms": round(sustained, 4),
        "burst_ms": round(statistics.median(bursts), 4),
        "clock_mhz": statistics.median(clocks),
        "power_w": round(statistics.median(powers)),
    }


def milliseconds(call: Callable[[], object], calls: int) -> float:
    """Return the time of one of so many calls in a row, after one that fills the queue."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def watched(seen: list[tuple[int, float]], stop: threading.Event) -> None:
    """Collect clock [MHz] and power [W] until told to stop."""
    while not stop.is_set():
        seen.append((torch.cuda.clock_rate(), torch.cuda.power_draw() / 1e3))
        time.sleep(0.01)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add, size = parser.add_argument, power_of_two_or_k
    add("--lengths", type=size, nargs="+", default=[65536], help="tokens; 64k = 65536")
    add("--head-dims", type=int, nargs="+", default=[64, 128])
    add("--passes", choices=("fwd", "bwd"), nargs="+", default=["fwd", "bwd"])
    names = ("flasheva", "flasheva_attention", "sdpa_flash", "sdpa_cudnn")
    add("--contestants", choices=names, nargs="+", default=list(names))
    add("--out", type=Path, default=RESULT)
    add("--commit", help="recorded where git cannot say it")
    shape = {"gqa": [1], "masks": ["causal"], "chunks": ["size"], "windows": ["block:0"]}
    sizes = {"hidden": 2048, "batch": 1, "window_size": 256, "chunk_size": 16, "chunk_number": 256}
    return argparse.Namespace(**shape, **sizes, **vars(parser.parse_args()))


if __name__ == "__main__":
    main()
