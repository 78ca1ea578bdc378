"""GPU time of one decoding step of attention with retrieval, against full attention, as JSON.

Run ``PYTHONPATH=. python benchmarks/retrieval_decode.py --budget-s 120``. A call appends a token
and attends from it in a layer of Llama-3.2-1B's shape; CUDA graphs, more caches than L2 holds.

- ``sdpa_*``: SDPA over a static cache, without the append, through one backend; ``gqa`` passes
  ``enable_gqa``, ``folded`` makes the query heads of a key head the rows of one query: neither
  repeats keys.
- ``flasheva``: chunk tokens, sinks and window, nothing retrieved.
- ``retrieval``: the same, and the keys of the best chunks, ``by`` bounds or their tokens; with
  ``--kernels`` also without the launches after each ``kernel``, whose results nothing reads then.

``bytes`` is what a call must read once; ``of_copy`` is its share of the bandwidth of a copy. Rows
that ``--out`` has are kept; ``--resume`` measures only what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from attention_gpu import power_of_two_or_k
from decode_kernel import copy_bandwidth
from flasheva_compile.kernels.blocked import retrieval_cache
from flasheva_compile.kernels.blocked.cache_state import CacheState, ring_size
from flasheva_compile.kernels.blocked.geometry import AttentionSettings
from flasheva_compile.kernels.blocked.retrieval_select import Retrieval, largest_scores
from flasheva_compile.kernels.blocked.retrieval_state import RetrievalState, exact_tokens
from flasheva_compile.lowering import launch_decode, launch_retrieval_decode
from flasheva_compile.lowering.schedule import choose
from flasheva_compile.lowering.spec import Schedule
from records import OUT_OF_TIME, Results, Row, header
from timing import describe, release, side_stream
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

RESULT = Path(__file__).parent / "results" / "retrieval_decode.json"
IDENTITY = ("arm", "batch", "context", "chunk_size", "chunks", "by", "kernel", "tiles")
KV_HEADS, GROUP, HEAD_DIM, ITEM = 8, 4, 64, 2
WINDOW, SINKS, SCALE = 256, 32, HEAD_DIM**-0.5
ROOM = 64  # steps that fit behind the context
COLD_BYTES, MOST_SETS = 200_000_000, 64  # between two uses of one cache: more than any L2 cache
GRAPH_US, REPLAYS = 2000.0, 7
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
SDPA = tuple(f"sdpa_{name}_{how}" for name in BACKENDS for how in ("gqa", "folded"))
KERNELS = ("retrieval_scores", "retrieval_select", "retrieval_decode", "decode_combine")
TILES = {  # what --sweep tries: kernel to (block_n, num_warps, num_stages)
    "retrieval_scores": ((64, 4, 1), (128, 4, 1), (128, 8, 1), (256, 4, 1), (256, 8, 1)),
    "retrieval_decode": tuple(itertools.product((32, 64, 128), (4, 8), (2, 3))),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is measured: an arm at one size, up to one kernel; ``tiles`` replace default ones."""

    arm: str
    batch: int
    context: int
    chunk_size: int = 0
    chunks: int = 0
    by: str | None = None
    kernel: str = ""
    tiles: str = ""

    @property
    def settings(self) -> AttentionSettings:
        """Return window, chunks and so on."""
        return AttentionSettings(
            window_size=WINDOW,
            chunk_size=self.chunk_size,
            sink_tokens=SINKS,
            window="sliding",
            causal=True,
            q_offset=0,
            scale=SCALE,
        )

    @property
    def bytes(self) -> int:
        """Return what a call must read once: keys, values, chunk tokens with biases [bytes]."""
        token = 2 * HEAD_DIM * ITEM
        if self.arm in SDPA:
            return self.batch * KV_HEADS * self.context * token
        c = self.chunk_size
        first = max(self.context - WINDOW + 1, 0) // c * c
        seen = max(first - SINKS, 0) // c
        exact = SINKS + self.context + 1 - max(first, SINKS)
        retrieved = min(self.chunks, seen) * c
        compressed = (seen - min(self.chunks, seen)) * token + seen * 4
        scored = min(self.chunks, seen) * token // 2 + seen * token * (self.by == "bounds")
        return self.batch * KV_HEADS * ((exact + retrieved) * token + compressed + scored)


def cells(a: argparse.Namespace) -> Iterator[Cell]:
    """List what is to be measured, sizes outermost."""
    for context, batch in itertools.product(a.contexts, a.batches):
        at: Any = {"batch": batch, "context": context}
        for arm in SDPA:
            yield Cell(arm=arm, **at)
        for c in a.chunk_sizes:
            yield Cell(arm="flasheva", chunk_size=c, **at)
        bys = [x if x == "bounds" else None for x in a.retrieve_by]  # as older rows have them
        axes = list(itertools.product(a.chunk_sizes, a.chunks, bys))
        arms = [Cell(arm="retrieval", chunk_size=c, chunks=k, by=x, **at) for c, k, x in axes]
        yield from arms
        if a.kernels or a.sweep:
            yield from (dataclasses.replace(arms[0], kernel=kernel) for kernel in KERNELS)
        if a.sweep:
            for kernel, tiles in TILES.items():
                affected = KERNELS[:2] if kernel == "retrieval_scores" else (kernel,)
                for tile, measured in itertools.product(tiles, affected):
                    spelled = f"{kernel}:{'x'.join(map(str, tile))}"
                    yield dataclasses.replace(arms[0], kernel=measured, tiles=spelled)


# --- inputs ---------------------------------------------------------------------------------------


def normal(*shape: int) -> torch.Tensor:
    """Return random numbers in the dtype of the benchmark."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


@dataclass(frozen=True)
class Stores:
    """Keys and values ``[B, Hkv, N, D]``, once for each set of inputs, and the new token."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    phi: torch.Tensor

    @classmethod
    def random(cls, batch: int, context: int, sets: int) -> Stores:
        """Fill ``sets`` caches."""
        store = (batch, KV_HEADS, context + ROOM, HEAD_DIM)
        keys, values = ([normal(*store) for _ in range(sets)] for _ in range(2))
        new = (batch, KV_HEADS, 1, HEAD_DIM)
        q = normal(batch, KV_HEADS * GROUP, 1, HEAD_DIM)
        return cls(keys, values, q, normal(*new), normal(*new), normal(KV_HEADS, HEAD_DIM))


def sets_of(batch: int, context: int) -> int:
    """Return how many caches the calls rotate over; all arms of a size get as many."""
    least = Cell(arm="flasheva", batch=batch, context=context, chunk_size=32).bytes
    room = int(0.6 * torch.cuda.get_device_properties(0).total_memory)
    full = Cell(arm=SDPA[0], batch=batch, context=context).bytes
    return max(1, min(MOST_SETS, -(-COLD_BYTES // least), room // full))


def chunk_tokens(cell: Cell) -> dict[str, Any]:
    """Return what the states of both FlashEVA arms have in common."""
    chunks = -(-(cell.context + ROOM) // cell.chunk_size)
    shape = (cell.batch, KV_HEADS, chunks)
    return {
        **{name: normal(*shape, HEAD_DIM) for name in ("rfa_k", "rfa_v")},
        "rfa_bias": torch.full(shape, 2.7, device="cuda"),
        "start": torch.zeros(cell.batch, dtype=torch.int64, device="cuda"),
        "length": torch.full((1,), cell.context, dtype=torch.int64, device="cuda"),
    }


def retrieval_state(cell: Cell, keys: torch.Tensor, values: torch.Tensor) -> RetrievalState:
    """Return a state that holds ``context`` tokens."""
    mask = torch.ones(cell.batch, keys.shape[2], dtype=torch.bool, device="cuda")
    none, x = torch.zeros(cell.batch, KV_HEADS, 0, dtype=torch.int32).cuda(), chunk_tokens(cell)
    bounds = normal(*x["rfa_k"].shape[:2], x["rfa_k"].shape[2] * bool(cell.by), 2 * HEAD_DIM)
    x |= {name: normal(cell.batch, KV_HEADS, 0, HEAD_DIM) for name in ("near_k", "near_v")}
    x["exponents"] = none[..., None].byte()
    return RetrievalState(keys, values, mask, selected=none, bounds=bounds, **x)


def plain_state(cell: Cell) -> CacheState:
    """Return the same without retrieval."""
    slots = SINKS + ring_size(cell.settings)
    return CacheState(
        **{n: normal(cell.batch, KV_HEADS, slots, HEAD_DIM) for n in ("exact_k", "exact_v")},
        exact_mask=torch.ones(cell.batch, slots, dtype=torch.bool, device="cuda"),
        rfa_exponents=normal(cell.batch, KV_HEADS, 0, 0).to(torch.int8),
        chunk_mean=torch.empty(cell.batch, 0, 0, device="cuda"),
        open_q=normal(cell.batch, KV_HEADS, 0, HEAD_DIM),
        **chunk_tokens(cell),
    )


def calls(cell: Cell, t: Stores) -> tuple[Sequence[Callable[[], Any]], list[torch.Tensor]]:
    """Return one function for each set, and the lengths that calls move on."""
    if cell.arm in SDPA:
        return [partial(sdpa, cell, t.q, k, v) for k, v in zip(t.keys, t.values, strict=True)], []
    given, s = (t.q, t.k, t.v, None, (t.phi,)), cell.settings
    if cell.arm == "flasheva":
        plain = [plain_state(cell) for _ in t.keys]
        functions = [partial(launch_decode.decode, *given, x, s, "tangent") for x in plain]
        return functions, [x.length for x in plain]
    states = [retrieval_state(cell, k, v) for k, v in zip(t.keys, t.values, strict=True)]
    decode = partial(launch_retrieval_decode.retrieval_decode, *given)
    functions = [partial(decode, x, s, "tangent", cell.chunks) for x in states]
    return functions, [x.length for x in states]


def sdpa(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend to the whole context."""
    _, backend, how = cell.arm.split("_")
    k, v = k[:, :, : cell.context], v[:, :, : cell.context]
    folded = how == "folded"
    q = q.view(q.shape[0], KV_HEADS, GROUP, HEAD_DIM) if folded else q
    with sdpa_kernel(BACKENDS[backend]):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=not folded)


# --- measuring ------------------------------------------------------------------------------------


@contextmanager
def as_asked(cell: Cell) -> Iterator[None]:
    """Launch no kernel after the cell's, and with its tiles, if it says so."""
    module = launch_retrieval_decode
    own = module._plan

    def chosen(spec: Any, *rest: Any) -> Schedule:  # noqa: ANN401
        kernel, _, tile = cell.tiles.partition(":")
        if spec.kind != kernel:
            return choose(spec, *rest)
        n, warps, stages = map(int, tile.split("x"))
        return Schedule(block_m=16, block_n=n, num_warps=warps, num_stages=stages)

    def planned(*known: Any) -> Any:  # noqa: ANN401
        plan = own(*known)
        first = plan.launches[: KERNELS.index(cell.kernel) + 1]
        return dataclasses.replace(plan, launches=first)

    with ExitStack() as stack:
        if cell.tiles:
            own.cache_clear()
            stack.callback(own.cache_clear)
            stack.enter_context(mock.patch.object(module, "choose", chosen))
        if cell.kernel:
            stack.enter_context(mock.patch.object(module, "_plan", planned))
        yield


def microseconds(
    functions: Sequence[Callable[[], object]], lengths: list[torch.Tensor]
) -> dict[str, float]:
    """Time calls in a CUDA graph; lengths are put back between replays."""
    before = [x.clone() for x in lengths]

    def put_back() -> None:
        for x, length in zip(lengths, before, strict=True):
            x.copy_(length)

    def timed(run: Callable[[], object]) -> float:
        put_back()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3

    for function in functions:
        function()
    one = min(timed(functions[0]) for _ in range(3))
    sets = len(functions)
    count = sets * max(1, min(ROOM // 2, int(GRAPH_US / one / sets)))
    put_back()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for index in range(count):
            functions[index % sets]()
    times = [timed(graph.replay) / count for _ in range(REPLAYS + 1)][1:]
    put_back()
    us, least = (round(x, 2) for x in (statistics.median(times), min(times)))
    return {"us": us, "min_us": least, "calls": count, "sets": sets}


def measured(cell: Cell, stores: Stores, copy_gbs: float) -> Row:
    """Measure one cell; write down why if that fails."""
    row: Row = {**dataclasses.asdict(cell), "bytes": cell.bytes}
    try:
        with as_asked(cell):
            row |= microseconds(*calls(cell, stores))
    except Exception as error:  # noqa: BLE001, RUF100 - the run goes on, the row says why
        return {**row, "error": describe(error)}
    share = round(cell.bytes / row["us"] / 1e3 / copy_gbs, 4)
    return row if cell.kernel else {**row, "of_copy": share}


def compare(cell: Cell, stores: Stores) -> Row:
    """Compare one step on the kernels with plain PyTorch, given the selection of the kernels."""
    (function, *_), _ = calls(cell, stores)
    out, lse, selected = function()
    state: RetrievalState = function.args[5]  # pyright: ignore[reportFunctionMemberAccess]
    position = (state.length - 1 - state.start)[:, None]
    new, s = (stores.k, stores.v), cell.settings
    given = (exact_tokens(new, state, state.start, position[:, 0], s), state, s)
    rest = (Retrieval(chunks=cell.chunks), selected[:, :, None])
    want, want_lse = retrieval_cache.attend(stores.q, position, *given, *rest)
    chunks, grouped = state.rfa_k.shape[2], retrieval_cache._grouped(stores.q, state, s)
    scores = retrieval_cache._selector_scores(grouped, state, chunks, s).amax(2)
    visible = retrieval_cache._visible_chunks(position, chunks, s)[:, None]
    own = largest_scores(scores, visible, selected.shape[-1])[:, :, 0]
    return {
        **dataclasses.asdict(cell),
        "largest_difference": float((out.float() - want.float()).abs().max()),
        "largest_value": float(want.float().abs().max()),
        "largest_difference_lse": float((lse - want_lse).abs().max()),
        "same_selection": float((own == selected).float().mean()),
    }


def add_ratios(rows: list[Row]) -> None:
    """Add to FlashEVA's rows how many times faster they are than the fastest SDPA."""
    for row in rows:
        size = (row["batch"], row["context"])
        same = [x for x in rows if x["arm"] in SDPA and (x["batch"], x["context"]) == size]
        peers = [x["us"] for x in same if "us" in x]
        if peers and "us" in row and row["arm"] not in SDPA and not row["kernel"]:
            row["vs_sdpa"] = round(min(peers) / row["us"], 2)


# --- command line ---------------------------------------------------------------------------------


def run(a: argparse.Namespace, results: Results, deadline: float) -> None:
    """Measure what is missing, one size after the other."""
    copy_gbs = results.header["copy_gbs"] = round(copy_bandwidth(), 1)
    left = [x for x in cells(a) if not (a.resume and results.has(dataclasses.asdict(x)))]
    for (context, batch), group in itertools.groupby(left, lambda x: (x.context, x.batch)):
        stores = None
        for cell in group:
            row: Row = {**dataclasses.asdict(cell), "skipped": OUT_OF_TIME}
            if time.monotonic() < deadline:
                if stores is None:
                    stores = Stores.random(batch, context, sets_of(batch, context))
                if cell.arm == "retrieval" and not results.checks:
                    results.checks.append(compare(cell, stores))
                row = measured(cell, stores, copy_gbs)
            results.rows = [x for x in results.rows if results.key(x) != results.key(row)]
            results.rows.append(row)
            add_ratios(results.rows)
            results.write()
            print({n: x for n, x in row.items() if x not in ("", 0)}, flush=True)
        del stores
        release(torch.device("cuda", 0))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add, size = parser.add_argument, power_of_two_or_k
    add("--contexts", type=size, nargs="+", default=[65536, 131072, 16384], help="64k = 65536")
    add("--batches", type=int, nargs="+", default=[1, 8, 32])
    add("--chunk-sizes", type=int, nargs="+", default=[16, 32])
    add("--chunks", type=int, nargs="+", default=[16, 8, 32], help="chunks to retrieve")
    add("--retrieve-by", choices=("token", "bounds"), nargs="+", default=["token"])
    add("--kernels", action="store_true", help="time the first launches without the rest, too")
    add("--sweep", action="store_true", help="and with other tiles")
    add("--budget-s", type=float, default=120.0, help="start nothing new after that")
    add("--out", type=Path, default=RESULT)
    add("--resume", action="store_true", help="measure only what --out does not have")
    add("--dry-run", action="store_true", help="list what would be measured; needs no GPU")
    add("--commit", help="recorded where git cannot say it")
    return parser.parse_args()


def main() -> None:
    """Measure, print and store."""
    started, a = time.monotonic(), parse_arguments()
    if a.dry_run:
        for cell in cells(a):
            print(cell, f"{cell.bytes / 1e6:.1f} MB")
        return
    device = torch.device("cuda", 0)
    shape = {"kv_heads": KV_HEADS, "group": GROUP, "head_dim": HEAD_DIM, "dtype": "bfloat16"}
    shape |= {"window_size": WINDOW, "sink_tokens": SINKS, "rule": "tangent"}
    described = {**header(device, a.commit), **shape}
    results = Results(path=a.out, identity=IDENTITY, header=described)
    results.resume()
    with side_stream(device):
        run(a, results, started + a.budget_s)


if __name__ == "__main__":
    main()
