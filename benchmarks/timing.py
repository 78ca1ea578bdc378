"""Time of a GPU function: median of CUDA-graph replays, of events where it cannot be captured.

Everything is expected to run on one side stream (:func:`side_stream`): graphs are captured there,
and autograd runs a backward on the stream of its forward.
"""

from __future__ import annotations

import contextlib
import gc
import math
import re
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MIB = 1 << 20
DEFAULT_L2_BYTES = 50 * MIB
MIN_GRAPH_MS = 2.0  # the latency of launching a graph, a few microseconds, is lost in this
MAX_UNROLL = 64
LONG_MS = 100.0  # a call that needs no second estimate and no more warming up


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure.

    Attributes:
        measure_ms: Device time of one measurement.
        warmup_ms: Device time before it.
        min_samples: Times taken, however long that is.
        graphs: Whether CUDA graphs are tried.
    """

    measure_ms: float = 300.0
    warmup_ms: float = 50.0
    min_samples: int = 5
    graphs: bool = True


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one measurement found.

    Attributes:
        ms: Median of one call.
        min_ms: Fastest.
        method: ``"cuda graph"``, ``"cuda events"`` or ``"wall clock"``.
        samples: How many times were taken.
        calls_per_sample: Calls that each of them covers.
        input_sets: Sets of inputs that the calls rotate over, so that the L2 cache stays cold.
        first_call_s: Seconds of the first call, compilation included.
        peak_mib: Memory of one call above what was allocated before; None on CPU.
        note: Why it was not a CUDA graph.
    """

    ms: float
    min_ms: float
    method: str
    samples: int
    calls_per_sample: int
    input_sets: int
    first_call_s: float
    peak_mib: float | None
    note: str = ""

    def fields(self) -> dict[str, Any]:
        """Return the fields for a row, without an empty note."""
        return {name: value for name, value in asdict(self).items() if value != ""}


class DeviceLostError(RuntimeError):
    """Nothing more can run on the device in this process."""


def side_stream(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which inputs are made and functions measured."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    torch.cuda.set_device(device)
    return torch.cuda.stream(torch.cuda.Stream(device))


def describe(error: BaseException) -> str:
    """Put an error on one line, without the folders of files."""
    text = " ".join(str(error).split())
    text = re.sub(r"(?:/[^/ ]+)+/", "", text)
    text = text if len(text) <= 600 else f"{text[:300]} ... {text[-300:]}"
    return f"{type(error).__name__}: {text}"


def release(device: torch.device) -> None:
    """Give back unused memory; raise if an error has left the device unusable."""
    gc.collect()
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.zeros(1, device=device).item()
    except Exception as error:
        raise DeviceLostError(describe(error)) from error


def sets_for_cold_cache(bytes_per_set: int, device: torch.device) -> int:
    """Count the input sets whose rotation touches four times the L2 cache between two uses."""
    if device.type != "cuda":
        return 1
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return min(8, max(1, math.ceil(4 * (size or DEFAULT_L2_BYTES) / bytes_per_set)))


def measure(
    functions: Sequence[Callable[[], object]], device: torch.device, effort: Effort
) -> Measurement:
    """Measure a function, given once for each set of inputs."""
    start = time.perf_counter()
    functions[0]()
    _synchronize(device)
    first_call_s = time.perf_counter() - start
    peak_mib = _peak_mib(functions[0], device)
    note = ""
    if device.type != "cuda":
        method, calls, times = "wall clock", 1, _wall_ms(functions, effort)
    else:
        for function in functions[1:]:
            function()
        estimate = _estimate_ms(functions[0])
        method, calls = "cuda graph", _unroll(estimate, len(functions))
        try:
            times = _graph_ms(functions, calls, estimate, effort)
        except Exception as error:  # noqa: BLE001, RUF100 - whatever stops a capture
            note = describe(error)
            release(device)
            method, calls = "cuda events", 1
            times = _flushed_ms(functions, estimate, device, effort)
    return Measurement(
        ms=round(statistics.median(times), 5),
        min_ms=round(min(times), 5),
        method=method,
        samples=len(times),
        calls_per_sample=calls,
        input_sets=len(functions),
        first_call_s=round(first_call_s, 3),
        peak_mib=peak_mib,
        note=note,
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_mib(function: Callable[[], object], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / MIB, 1)


def _wall_ms(functions: Sequence[Callable[[], object]], effort: Effort) -> list[float]:
    times = []
    while not times or sum(times) < effort.measure_ms:
        start = time.perf_counter()
        functions[len(times) % len(functions)]()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _event_ms(
    call: Callable[[], object], samples: int, flush: torch.Tensor | None, calls: int = 1
) -> list[float]:
    """Time ``samples`` executions, enqueued without waiting, as milliseconds per call."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
    for start, end in events:
        if flush is not None:
            flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / calls for start, end in events]


def _estimate_ms(function: Callable[[], object]) -> float:
    (once,) = _event_ms(function, 1, None)
    return once if once > LONG_MS else statistics.median(_event_ms(function, 3, None))


def _unroll(estimate_ms: float, sets: int) -> int:
    """Choose the calls in one graph: a multiple of the sets that takes long enough."""
    wanted = math.ceil(MIN_GRAPH_MS / max(estimate_ms, 1e-3))
    return sets * max(1, min(MAX_UNROLL, wanted) // sets + (wanted % sets > 0))


def _samples(ms: float, budget_ms: float, least: int) -> int:
    return max(least, min(200, int(budget_ms / max(ms, 1e-3))))


def _graph_ms(
    functions: Sequence[Callable[[], object]], calls: int, estimate_ms: float, effort: Effort
) -> list[float]:
    if not effort.graphs:
        message = "CUDA graphs are switched off"
        raise RuntimeError(message)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for index in range(calls):
            functions[index % len(functions)]()
    replay_ms = estimate_ms * calls
    for _ in range(_samples(replay_ms, effort.warmup_ms, 1)):
        graph.replay()
    samples = _samples(replay_ms, effort.measure_ms, effort.min_samples)
    return _event_ms(graph.replay, samples, None, calls)


def _flushed_ms(
    functions: Sequence[Callable[[], object]],
    estimate_ms: float,
    device: torch.device,
    effort: Effort,
) -> list[float]:
    """Time single calls, each after the L2 cache was overwritten."""
    flush = torch.empty(4 * DEFAULT_L2_BYTES, dtype=torch.int8, device=device)
    for _ in range(_samples(estimate_ms, effort.warmup_ms, int(estimate_ms < LONG_MS))):
        functions[0]()
    samples = _samples(estimate_ms, effort.measure_ms, effort.min_samples)
    return _event_ms(functions[0], samples, flush)
