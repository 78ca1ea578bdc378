"""GPU time of one causal attention with retrieval, against SDPA and without, as JSON.

Run ``PYTHONPATH=. python benchmarks/retrieval_attention.py``; ``--passes bwd`` for the backward
pass alone. All contestants get the same tensors in the same run; times are medians. ``retrieval``
and ``flasheva`` include the pooling of chunk tokens; ``pool`` and the names behind it are the
phases of ``retrieval``, one by one. SDPA computes full attention, another function: what is
compared is the time, not the quality.
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
from flasheva_compile.lowering import launch_retrieval, launch_retrieval_backward, schedule
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

WHAT = "one causal attention, bf16: SDPA, FlashEVA, FlashEVA with retrieval and its phases"
RESULT = Path(__file__).parent / "results" / "retrieval_attention.json"
FULL = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}
PHASES: dict[str, tuple[str, ...]] = {
    "fwd": ("bounds", "select", "attend", "retrieve"),
    "bwd": (
        *("lists", "selection_bits", "dq", "retrieved_dq", "retrieved_dkv"),
        *("dchunk", "dsink", "dkv"),
    ),
}
KINDS = {"bounds": "chunk_bounds", "attend": "forward"}  # of phases with a name of their own
WHOLE = (*FULL, "flasheva", "retrieval", "pool")
CONTESTANTS = (*WHOLE, *itertools.chain.from_iterable(PHASES.values()))
SHAPE = ("length", "head_dim", "heads", "kv_heads")
EVA = ("window_size", "chunk_size", "sink_tokens")
RETRIEVAL = ("retrieve_chunks", "retrieve_block", "retrieve_by")
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
    retrieve_by: str

    @property
    def eva(self) -> dict[str, Any]:
        """Return the options of an attention without retrieval."""
        return {"window": "sliding", **{name: getattr(self, name) for name in EVA}}

    def settings(self) -> AttentionSettings:
        """Return the same for the launches."""
        scale = self.head_dim**-0.5
        return AttentionSettings(causal=True, q_offset=0, scale=scale, **self.eva)

    def identity(self, contestant: str, step: str) -> Row:
        """Return the fields that tell a row apart, those that the contestant knows."""
        row: Row = {"contestant": contestant, "pass": step}
        row |= {name: getattr(self, name) for name in (*SHAPE, *EVA, *RETRIEVAL)}
        unknown = (*EVA, *RETRIEVAL) if contestant in FULL else ()
        if contestant in ("flasheva", "pool"):
            unknown = RETRIEVAL
        if self.retrieve_by == "token":  # rows from before there was a choice do not say it
            unknown = (*unknown, "retrieve_by")
        return row | dict.fromkeys(unknown)


@dataclass(kw_only=True)
class Run:
    """One run of the benchmark: what was found, how and until when to measure."""

    device: torch.device
    results: Results
    effort: Effort
    deadline: float
    contestants: Sequence[str]
    passes: Sequence[str]
    schedules: dict[str, dict[str, Any]]


def cases(a: argparse.Namespace) -> Iterator[Case]:
    """List what is to be measured, long rows first."""
    sizes = (sorted(a.lengths, reverse=True), a.head_dims, a.chunk_sizes, a.chunks, a.blocks)
    for length, head_dim, chunk, count, block, by in itertools.product(*sizes, a.retrieve_by):
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
            retrieve_by=by,
        )


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Tensors of one case: random, so that neighbours select different chunks."""

    q: Tensor
    k: Tensor
    v: Tensor
    phi: Tensor
    dout: Tensor


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw queries, keys, values and what arrives at the output."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        shape = (1, heads, case.length, case.head_dim)
        return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)

    q, k, v, dout = (normal(n) for n in (case.heads, case.kv_heads, case.kv_heads, case.heads))
    return Inputs(q=q, k=k, v=v, dout=dout, phi=k.new_zeros(case.kv_heads, case.head_dim))


def _pool(case: Case, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    options = {"rule": "tangent", "chunk_size": case.chunk_size, "scale": case.head_dim**-0.5}
    pool = torch.ops.flasheva.chunk_tokens
    return pool(x.k, x.v, [x.phi], None, None, **options, version=OP_VERSION)


def forward_function(case: Case, x: Inputs, contestant: str) -> Callable[[], Any]:
    """Return the forward pass of a contestant that is no phase."""
    q, k, v = x.q, x.k, x.v
    options = {**case.eva, "parameters": [x.phi]}
    retrieve = {name: getattr(case, name) for name in RETRIEVAL}

    def full() -> Tensor:
        with sdpa_kernel(FULL[contestant]):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    functions: dict[str, Callable[[], Any]] = {
        "flasheva": lambda: flasheva_attention(q, k, v, **options),
        "retrieval": lambda: flasheva_attention(q, k, v, **options, **retrieve),
        "pool": lambda: _pool(case, x),
    }
    return functions.get(contestant, full)


def whole_function(case: Case, x: Inputs, contestant: str, step: str) -> Callable[[], object]:
    """Return what is timed of a contestant that is no phase."""
    if step == "fwd":
        return torch.no_grad()(forward_function(case, x, contestant))
    leaves = {name: getattr(x, name).detach().requires_grad_() for name in ("q", "k", "v", "phi")}
    learned = dataclasses.replace(x, **leaves)
    out = forward_function(case, learned, contestant)()
    outputs = [y for y in (out if isinstance(out, tuple) else (out,)) if y.requires_grad]
    grads = [x.dout] if len(outputs) == 1 else [torch.randn_like(y) for y in outputs]
    inputs = list(leaves.values())
    return partial(
        torch.autograd.grad, outputs, inputs, grads, retain_graph=True, allow_unused=True
    )


def phases(case: Case, step: str) -> tuple[str, ...]:
    """Return the names of the phases of a case's pass."""
    unused = () if case.retrieve_by == "bounds" else ("bounds",)
    return tuple(name for name in PHASES[step] if name not in unused)


def phase_functions(case: Case, x: Inputs, step: str) -> dict[str, Callable[[], None]]:
    """Return the launches of the retrieval tier one by one; each has run once."""
    arguments = launched(case, x)
    steps = launch_retrieval.steps(*arguments)
    found = {name: steps[KINDS.get(name, name)] for name in phases(case, "fwd")}
    if step == "bwd":
        result = launch_retrieval.retrieval_forward(*arguments)
        found = launch_retrieval_backward.steps(x.dout, result, *arguments)
    for one in found.values():
        one()  # each needs the results of those before it
    return found


def launched(case: Case, x: Inputs) -> tuple[Any, ...]:
    """Return the arguments of the launches, chunk tokens made."""
    names = ("rfa_k", "rfa_v", "rfa_bias")
    tokens = dict(zip(names, _pool(case, x), strict=True))
    t = Operands(q=x.q, k=x.k, v=x.v, **tokens)
    count, block, by = case.retrieve_chunks, case.retrieve_block, case.retrieve_by
    retrieval = Retrieval(chunks=count, block=block, by=by)
    return t, rows_of(x.k, None, None, chunk_size=case.chunk_size), case.settings(), retrieval


def given_schedules(run: Run, case: Case, x: Inputs) -> dict[KernelSpec, Schedule]:
    """Return the schedules that the command line changes."""
    arguments = launched(case, x)
    specs = launch_retrieval.specs(*arguments)
    named = {name: specs[KINDS.get(name, name)] for name in phases(case, "fwd")}
    named |= launch_retrieval_backward.specs(*arguments)
    return {
        named[name]: dataclasses.replace(schedule.choose(named[name]), **fields)
        for name, fields in run.schedules.items()
    }


def run_case(run: Run, case: Case) -> None:
    """Measure what is not there yet of one case."""
    for step in run.passes:
        names = [n for n in run.contestants if n in (*WHOLE, *phases(case, step))]
        todo = [case.identity(name, step) for name in names]
        todo = [row for row in todo if not run.results.has(row)]
        if todo and time.monotonic() > run.deadline:
            for row in todo:
                run.results.add({**row, "skipped": OUT_OF_TIME})
        elif todo:
            measure_rows(run, case, step, todo)
            release(run.device)


def measure_rows(run: Run, case: Case, step: str, todo: list[Row]) -> None:
    """Measure one pass of some contestants."""
    x = make_inputs(case, run.device)
    launches: dict[str, Callable[[], None]] = {}
    with schedule.forced(given_schedules(run, case, x)):
        for row in todo:
            name = row["contestant"]
            try:
                if name in WHOLE:
                    function = whole_function(case, x, name, step)
                else:
                    launches = launches or phase_functions(case, x, step)
                    function = launches[name]
                measured = measure([function], run.device, run.effort).fields()
            except Exception as error:  # noqa: BLE001, RUF100 - the run goes on, the row says why
                measured = {"error": describe(error)}
            run.results.add({**row, **measured})
            print(json.dumps(run.results.rows[-1]), flush=True)


def add_ratios(rows: list[Row]) -> None:
    """Add, to rows of FlashEVA, how many times longer each SDPA takes: ``vs_<peer>``."""
    measured = [row for row in rows if "ms" in row]
    for row, peer in itertools.product(measured, measured):
        same = all(row[name] == peer[name] for name in ("pass", *SHAPE))
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
    add("--retrieve-by", choices=("token", "bounds"), nargs="+", default=["token"])
    add("--passes", choices=list(PHASES), nargs="+", default=list(PHASES))
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
    names = ("contestant", "pass", *SHAPE, *EVA, *RETRIEVAL)
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
        passes=a.passes,
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
