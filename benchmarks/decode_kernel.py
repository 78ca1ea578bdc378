"""Time of the decode kernels of one layer on a GPU, and the share of a copy's bandwidth, as JSON.

Run ``PYTHONPATH=. python benchmarks/decode_kernel.py [--sweep] [--fp8]``. One call appends a token
and attends from it: both launches, in CUDA graphs of 20 calls. States rotate where they would stay
in the L2 cache. With ``--sweep`` other tiles and splits are timed beside the default choice. With
``--fp8`` chunk tokens are stored in fp8.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from flasheva_compile.kernels.blocked import fp8
from flasheva_compile.kernels.blocked.cache_state import CacheState, ring_size
from flasheva_compile.kernels.blocked.geometry import AttentionSettings
from flasheva_compile.lowering import launch_decode
from flasheva_compile.lowering.schedule import choose, current_target
from flasheva_compile.lowering.schedule_fp8 import converting
from flasheva_compile.lowering.spec import Schedule
from records import header

KV_HEADS, GROUP, CALLS, REPLAYS = 8, 4, 20, 5
SETTINGS = AttentionSettings(
    window_size=256,
    chunk_size=16,
    sink_tokens=16,
    window="sliding",
    causal=True,
    q_offset=0,
    scale=0.125,
)
CONTEXTS, BATCHES, HEAD_DIMS = (16384, 65536, 131072), (1, 8, 32), (64, 128)
L2_BYTES = 200_000_000  # of states between two uses of one: more than any L2 cache


def main() -> None:
    """Measure every shape and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="time other schedules, too")
    parser.add_argument("--fp8", action="store_true", help="chunk tokens in fp8")
    parser.add_argument("--out", type=Path, default=Path("decode_kernel.json"))
    parser.add_argument("--commit", help="recorded where git cannot say it")
    arguments = parser.parse_args()
    copy = copy_bandwidth()
    rows: list[dict[str, Any]] = []
    for shape in itertools.product(HEAD_DIMS, BATCHES, CONTEXTS):
        rows += measure(*shape, copy, sweep=arguments.sweep, fp8_chunks=arguments.fp8)
        print(rows[-1], flush=True)
    record = {"header": header(torch.device("cuda"), arguments.commit), "copy_gbs": copy}
    record["header"] |= {
        "kv_heads": KV_HEADS,
        "group": GROUP,
        "dtype": "bfloat16",
        "rule": "tangent",
        "chunk_tokens": "fp8" if arguments.fp8 else None,
    }
    arguments.out.write_text(json.dumps({**record, "rows": rows}, indent=1))


def measure(
    size: int, batch: int, context: int, copy: float, *, sweep: bool, fp8_chunks: bool
) -> list[dict[str, Any]]:
    """Return one row for each schedule of a shape, the default last."""
    moved = bytes_moved(size, batch, context, fp8_chunks=fp8_chunks)
    states = max(1, min(CALLS, -(-L2_BYTES // moved)))
    call = inputs(size, batch, context, states, fp8_chunks=fp8_chunks)
    rows = []
    trials = [(None, None)]
    if sweep:
        blocks = itertools.product((32, 64, 128), (2, 4, 8), (2, 3, 4))
        tiles = [Schedule(block_m=16, block_n=n, num_warps=w, num_stages=s) for n, w, s in blocks]
        trials = [*itertools.product(tiles, (1, 4, 16, 32)), *trials]
    for schedule, splits in trials:
        with forced(schedule, splits):
            time = microseconds(*call)
        row = {"head_dim": size, "batch": batch, "context": context, "us": time, "bytes": moved}
        row |= {"of_copy": moved / time / 1e3 / copy, "default": schedule is None}
        if schedule is not None:
            row |= {"block_n": schedule.block_n, "num_warps": schedule.num_warps}
            row |= {"num_stages": schedule.num_stages, "splits": splits}
        rows.append(row)
    return rows


def inputs(
    size: int, batch: int, context: int, copies: int, *, fp8_chunks: bool
) -> tuple[tuple[Any, ...], list[CacheState]]:
    """Return queries, keys, values and phi of a step, and states that hold ``context`` tokens."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    slots = SETTINGS.sink_tokens + ring_size(SETTINGS)
    chunks = context // SETTINGS.chunk_size + 64
    head = (batch, KV_HEADS)

    def stored(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = normal(*shape)
        return fp8.encode(x) if fp8_chunks else (x, torch.empty_like(x[..., :0], dtype=torch.int8))

    pooled = [(stored(*head, chunks, size), stored(*head, chunks, size)) for _ in range(copies)]
    states = [
        CacheState(
            exact_k=normal(*head, slots, size),
            exact_v=normal(*head, slots, size),
            exact_mask=torch.ones(batch, slots, dtype=torch.bool, device="cuda"),
            rfa_k=rfa_k,
            rfa_v=rfa_v,
            rfa_bias=torch.full((*head, chunks), 2.7, device="cuda"),
            rfa_exponents=torch.cat([of_k, of_v], -1),
            chunk_mean=torch.empty(batch, 0, chunks, device="cuda"),
            open_q=normal(*head, 0, size),
            start=torch.zeros(batch, dtype=torch.int64, device="cuda"),
            length=torch.full((1,), context, dtype=torch.int64, device="cuda"),
        )
        for (rfa_k, of_k), (rfa_v, of_v) in pooled
    ]
    q, k, v = (
        normal(batch, KV_HEADS * GROUP, 1, size),
        normal(*head, 1, size),
        normal(*head, 1, size),
    )
    return (q, k, v, (normal(KV_HEADS, size),)), states


def forced(schedule: Schedule | None, splits: int | None) -> Any:  # noqa: ANN401 - a context manager
    """Run with other tiles and splits than the default choice."""
    launch_decode._plan.cache_clear()
    own = launch_decode.parts_of

    def chosen(spec: Any, *rest: Any) -> Schedule:  # noqa: ANN401
        if schedule is None or spec.kind != "decode":
            return choose(spec, *rest)
        tiled = converting(spec, schedule, current_target())
        return dataclasses.replace(tiled, dependent=choose(spec, *rest).dependent)

    def parts(*known: Any) -> int:  # noqa: ANN401
        return splits or own(*known)

    return mock.patch.multiple(launch_decode, choose=chosen, parts_of=parts)


def microseconds(call: tuple[Any, ...], states: list[CacheState]) -> float:
    """Return the median time of a call; lengths are put back between replays."""
    q, k, v, parameters = call

    def run(index: int) -> None:
        state = states[index % len(states)]
        launch_decode.decode(q, k, v, None, parameters, state, SETTINGS, "tangent")

    for index in range(2 * len(states)):
        run(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(CALLS):
            run(index)
    lengths = [state.length.clone() for state in states]
    times = []
    for _ in range(REPLAYS + 1):
        for state, length in zip(states, lengths, strict=True):
            state.length.copy_(length)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times[1:])


def bytes_moved(size: int, batch: int, context: int, *, fp8_chunks: bool) -> int:
    """Return what a step must read: visible chunk tokens with biases, window, sinks [bytes]."""
    s, token = SETTINGS, 2 * size * 2
    first = max(context - s.window_size + 1, 0) // s.chunk_size * s.chunk_size
    chunks = (first - s.sink_tokens) // s.chunk_size
    exact = s.sink_tokens + context - max(first, s.sink_tokens)
    pooled = token // 2 + 2 if fp8_chunks else token
    return batch * KV_HEADS * (chunks * (pooled + 4) + exact * token)


def copy_bandwidth() -> float:
    """Return what a copy of 1 GiB reads and writes [GB/s]."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 2 * source.numel() * 20 / start.elapsed_time(end) / 1e6


if __name__ == "__main__":
    main()
