"""GPU time of one causal attention forward with retrieval, against SDPA and without, as JSON.

Run ``PYTHONPATH=. python benchmarks/retrieval_forward.py``. All contestants get the same tensors in
the same run; times are medians. ``retrieval`` and ``flasheva`` include the pooling of chunk tokens;
``pool``, ``select``, ``attend`` and ``retrieve`` are the phases of ``retrieval``, one by one.
SDPA computes full attention, another function: what is compared is the time, not the quality.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from flasheva_compile.kernels.blocked.block import Operands
from flasheva_compile.kernels.blocked.geometry import AttentionSettings
from flasheva_compile.kernels.blocked.retrieval_select import Retrieval
from flasheva_compile.lowering import launch_retrieval, schedule
from flasheva_compile.lowering.rows import rows_of
from records import OUT_OF_TIME, Results, Row, header, restart
from timing import DeviceLostError, Effort, describe, measure, release, side_stream
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from flasheva_compile.op_checks import OP_VERSION
from flasheva_compile.ops import flasheva_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from flasheva_compile.lowering.spec import KernelSpec, Schedule
    from torch import Tensor

WHAT = "one causal attention forward, bf16: SDPA, FlashEVA, FlashEVA with retrieval and its phases"
RESULT = Path(__file__).parent / "results" / "retrieval_forward.json"
FULL = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}
PHASES: tuple[str, ...] = ("select", "attend", "retrieve")
CONTESTANTS = (*FULL, "flasheva", "retrieval", "pool", *PHASES)
SHAPE = ("length", "head_dim", "heads", "kv_heads")
EVA = ("window_size", "chunk_size", "sink_tokens")
RETRIEVAL = ("retrieve_chunks", "retrieve_block")
EXIT_LOST = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention to measure; lengths and sizes in tokens."""

    length: int
    head_dim: int
    heads: int
    kv_heads: int
    window_size: int
    chunk_size: int
    sink_tokens: int
    retrieve_chunks: int
    retrieve_block: int

    @property
    def eva(self) -> dict[str, Any]:
        """Return the options of an attention without retrieval."""
        return {"window": "sliding", **{name: getattr(self, name) for name in EVA}}

    def settings(self) -> AttentionSettings:
        """Return the same for the launches."""
        scale = self.head_dim**-0.5
        return AttentionSettings(causal=True, q_offset=0, scale=scale, **self.eva)

    def identity(self, contestant: str) -> Row:
        """Return the fields that tell a row apart, those that the contestant knows."""
        row: Row = {"contestant": contestant}
        row |= {name: getattr(self, name) for name in (*SHAPE, *EVA, *RETRIEVAL)}
        unknown = (*EVA, *RETRIEVAL) if contestant in FULL else ()
        if contestant in ("flasheva", "pool"):
            unknown = RETRIEVAL
        return row | dict.fromkeys(unknown)


@dataclass(kw_only=True)
class Run:
    """One run of the benchmark: what was found, how and until when to measure."""

    device: torch.device
    results: Results
    effort: Effort
    deadline: float
    contestants: Sequence[str]
    schedules: dict[str, dict[str, Any]]


def cases(a: argparse.Namespace) -> Iterator[Case]:
    """List what is to be measured, long rows first."""
    axes = (sorted(a.lengths, reverse=True), a.head_dims, a.chunk_sizes, a.chunks, a.blocks)
    for length, head_dim, chunk, count, block in itertools.product(*axes):
        yield Case(
            length=length,
            head_dim=head_dim,
            heads=a.heads,
            kv_heads=a.kv_heads,
            window_size=a.window_size,
            chunk_size=chunk,
            sink_tokens=-(-a.sink_tokens // chunk) * chunk,
            retrieve_chunks=count,
            retrieve_block=block,
        )


def make_inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries, keys and values; at random, so that neighbours select different chunks."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        shape = (1, heads, case.length, case.head_dim)
        return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)

    return normal(case.heads), normal(case.kv_heads), normal(case.kv_heads)


def _pool(case: Case, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    phi = torch.zeros(case.kv_heads, case.head_dim, dtype=k.dtype, device=k.device)
    options = {"rule": "tangent", "chunk_size": case.chunk_size, "scale": case.head_dim**-0.5}
    pool = torch.ops.flasheva.chunk_tokens
    return pool(k, v, [phi], None, None, **options, version=OP_VERSION)


def functions(case: Case, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    """Return what is timed, by contestant."""

    def full(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    found: dict[str, Callable[[], object]] = {n: partial(full, b) for n, b in FULL.items()}
    phi = torch.zeros(case.kv_heads, case.head_dim, dtype=k.dtype, device=k.device)
    options = {**case.eva, "parameters": [phi]}
    retrieve = {name: getattr(case, name) for name in RETRIEVAL}
    found["flasheva"] = lambda: flasheva_attention(q, k, v, **options)
    found["retrieval"] = lambda: flasheva_attention(q, k, v, **options, **retrieve)
    found["pool"] = lambda: _pool(case, k, v)
    return found


def launched(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """Return the arguments of the launches, chunk tokens made."""
    names = ("rfa_k", "rfa_v", "rfa_bias")
    tokens = dict(zip(names, _pool(case, k, v), strict=True))
    t = Operands(q=q, k=k, v=v, **tokens)
    retrieval = Retrieval(chunks=case.retrieve_chunks, block=case.retrieve_block)
    return t, rows_of(k, None, None, chunk_size=case.chunk_size), case.settings(), retrieval


def phase_functions(arguments: tuple[Any, ...]) -> dict[str, Callable[[], object]]:
    """Return the launches of the retrieval tier one by one."""
    launches = launch_retrieval.launches(*arguments)
    for one in launches:
        one()  # each needs the results of those before it
    return dict(zip(PHASES, launches, strict=True))


def given_schedules(run: Run, arguments: tuple[Any, ...]) -> dict[KernelSpec, Schedule]:
    """Return the schedules that the command line changes."""
    named = dict(zip(PHASES, launch_retrieval.specs(*arguments), strict=True))
    return {
        named[name]: dataclasses.replace(schedule.choose(named[name]), **fields)
        for name, fields in run.schedules.items()
    }


def run_case(run: Run, case: Case) -> None:
    """Measure what is not there yet of one case."""
    todo = [case.identity(name) for name in run.contestants]
    todo = [row for row in todo if not run.results.has(row)]
    if not todo:
        return
    if time.monotonic() > run.deadline:
        for row in todo:
            run.results.add({**row, "skipped": OUT_OF_TIME})
        return
    inputs = make_inputs(case, run.device)
    arguments = launched(case, *inputs)
    found = functions(case, *inputs)
    for row in todo:
        name = row["contestant"]
        try:
            with schedule.forced(given_schedules(run, arguments)):
                function = phase_functions(arguments)[name] if name in PHASES else found[name]
                measured = measure([torch.no_grad()(function)], run.device, run.effort).fields()
        except Exception as error:  # noqa: BLE001, RUF100 - the run goes on, the row says why
            measured = {"error": describe(error)}
        run.results.add({**row, **measured})
        print(json.dumps(run.results.rows[-1]), flush=True)
    release(run.device)


def add_ratios(rows: list[Row]) -> None:
    """Add, to rows of FlashEVA, how many times longer each SDPA takes: ``vs_<peer>``."""
    measured = [row for row in rows if "ms" in row]
    for row, peer in itertools.product(measured, measured):
        same = all(row[name] == peer[name] for name in SHAPE)
        if row["contestant"] in ("retrieval", "flasheva") and peer["contestant"] in FULL and same:
            row[f"vs_{peer['contestant']}"] = round(peer["ms"] / row["ms"], 3)


def size(text: str) -> int:
    """Read ``64k`` as 65536."""
    return int(text[:-1]) * 1024 if text.lower().endswith("k") else int(text)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--lengths", type=size, nargs="+", default=[16384, 65536], help="tokens; 64k = 65536")
    add("--head-dims", type=int, nargs="+", default=[128, 64])
    add("--heads", type=int, default=32)
    add("--kv-heads", type=int, default=8)
    add("--window-size", type=int, default=256)
    add("--sink-tokens", type=int, default=16)
    add("--chunk-sizes", type=int, nargs="+", default=[16, 32])
    add("--chunks", type=int, nargs="+", default=[8, 16], help="retrieved by each query")
    add("--blocks", type=int, nargs="+", default=[1, 16, 64], help="queries of one selection")
    add("--contestants", choices=CONTESTANTS, nargs="+", default=list(CONTESTANTS))
    add("--budget-s", type=float, default=math.inf, help="start nothing new after that")
    add("--measure-ms", type=float, default=60.0)
    add("--schedules", default="{}", help="JSON: phase to fields of Schedule that differ")
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
    names = ("contestant", *SHAPE, *EVA, *RETRIEVAL)
    what = {**header(device, a.commit), "what": WHAT}
    results = Results(path=a.out, identity=names, header=what)
    if a.resume:
        results.resume()
    spent = {"measure_ms": 0.0, "warmup_ms": 0.0, "min_samples": 1}
    effort = spent if a.dry_run else {"measure_ms": a.measure_ms, "warmup_ms": 20.0}
    run = Run(
        device=device,
        results=results,
        effort=Effort(**effort),
        deadline=start + a.budget_s,
        contestants=a.contestants,
        schedules=json.loads(a.schedules),
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
