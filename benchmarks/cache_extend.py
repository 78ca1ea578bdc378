"""Time of several new tokens on a compressed cache, and of filling it after a prompt, as JSON.

Run ``PYTHONPATH=. python benchmarks/cache_extend.py``. One layer of 32 query and 8 key heads of 64:
``flasheva::decode`` for drafts and portions of a prompt over a cache that holds ``context`` tokens,
``flasheva::cache_append`` for whole prompts into an empty one. Beside them SDPA's flash kernel over
as many exact keys, without a mask and without an append: faster than anything that is right. Before
every call the lengths are put back, by a copy of eight bytes that counts.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attention_gpu import power_of_two_or_k
from decode_kernel import copy_bandwidth
from records import OUT_OF_TIME, Results, Row, header
from timing import Effort, describe, measure, release, side_stream
from torch.nn.attention import SDPBackend, sdpa_kernel

from flasheva_compile.cache_ops import cache_options, new_state
from flasheva_compile.config import EvaConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from flasheva_compile.kernels.blocked.cache_state import CacheState

RESULT = Path(__file__).parent / "results" / "cache_extend.json"
IDENTITY = ("arm", "batch", "context", "tokens")
KV_HEADS, GROUP, SIZE, SCALE = 8, 4, 64, 0.125
RULES = ("tangent", "eva")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A call: ``tokens`` new ones over ``context``; 0 = a prompt into an empty cache."""

    arm: str
    batch: int
    context: int
    tokens: int


def cells(a: argparse.Namespace) -> list[Cell]:
    """List what is to be measured."""
    found = []
    for batch, context, tokens in itertools.product(a.batches, a.contexts, a.tokens):
        at: Any = {"batch": batch, "context": context, "tokens": tokens}
        found += [Cell(arm=arm, **at) for arm in ("sdpa_flash", *RULES)]
    for batch, tokens, rule in itertools.product(a.batches, a.contexts, RULES):
        found.append(Cell(arm=f"{rule}, fill", batch=batch, context=0, tokens=tokens))
    return found


def call(cell: Cell, device: torch.device) -> Callable[[], Any]:
    """Return the function to time."""

    def normal(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(cell.batch, heads, tokens, SIZE, device=device, dtype=torch.bfloat16)

    q = normal(KV_HEADS * GROUP, cell.tokens)
    if cell.arm == "sdpa_flash":
        k, v = (normal(KV_HEADS, cell.context + cell.tokens) for _ in range(2))
        return partial(exactly, q, k, v)
    rule: Any = cell.arm.split(",")[0]
    config = EvaConfig(window_size=256, chunk_size=16, sink_tokens=16, chunk_rule=rule)
    options = cache_options(config, SCALE)
    k, v = normal(KV_HEADS, cell.tokens), normal(KV_HEADS, cell.tokens)
    state = new_state(k, v, (cell.context + cell.tokens) // 16 + 2, options)
    for x in state[:6]:  # what it holds: any numbers, all valid
        x.fill_(1) if x.dtype == torch.bool else x.normal_()
    state.length.fill_(cell.context)
    return partial(ours, cell, (q, k, v), state, options)


def exactly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend to everything."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def ours(
    cell: Cell, qkv: tuple[torch.Tensor, ...], state: CacheState, options: dict[str, Any]
) -> torch.Tensor:
    """Append and attend, or fill."""
    state.length.fill_(cell.context)
    if cell.context:
        return torch.ops.flasheva.decode(*qkv, [], None, *state, **options)[0]  # pyright: ignore[reportReturnType]
    torch.ops.flasheva.cache_append(*qkv, [], None, *state, **options)
    return state.length


def measured(cell: Cell, device: torch.device) -> Row:
    """Measure one cell; write down why if that fails."""
    try:
        found = measure([call(cell, device)], device, Effort(measure_ms=40, warmup_ms=10))
    except Exception as error:  # noqa: BLE001, RUF100 - the run goes on, the row says why
        return {**asdict(cell), "error": describe(error)}
    return {**asdict(cell), **found.fields()}


def add_ratios(rows: list[Row]) -> None:
    """Add how many times faster than SDPA a row is."""
    size = ("batch", "context", "tokens")
    for row in rows:
        same = [x for x in rows if x["arm"] == "sdpa_flash" and all(x[n] == row[n] for n in size)]
        peers = [x["ms"] for x in same if "ms" in x]
        if peers and "ms" in row and row["arm"] != "sdpa_flash":
            row["vs_sdpa_flash"] = round(peers[0] / row["ms"], 2)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add, size = parser.add_argument, power_of_two_or_k
    add("--batches", type=int, nargs="+", default=[1, 8])
    add("--contexts", type=size, nargs="+", default=[16384, 65536], help="tokens; 64k = 65536")
    add("--tokens", type=size, nargs="+", default=[4, 16, 256, 2048], help="of a call")
    add("--budget-s", type=float, default=60.0, help="start nothing new after that")
    add("--device", default="cuda:0")
    add("--out", type=Path, default=RESULT)
    add("--commit", help="recorded where git cannot say it")
    return parser.parse_args()


def main() -> None:
    """Measure, print and store."""
    started, a = time.monotonic(), parse_arguments()
    device = torch.device(a.device)
    described = header(device, a.commit) | {"window_size": 256, "chunk_size": 16, "sink_tokens": 16}
    results = Results(path=a.out, identity=IDENTITY, header=described | {"dtype": "bfloat16"})
    if device.type == "cuda":
        results.header["copy_gbs"] = round(copy_bandwidth(), 1)
    with side_stream(device), torch.no_grad():
        for cell in cells(a):
            late = time.monotonic() - started > a.budget_s
            row = {**asdict(cell), "skipped": OUT_OF_TIME} if late else measured(cell, device)
            results.rows.append(row)
            add_ratios(results.rows)
            results.write()
            print(row, flush=True)
            release(device)


if __name__ == "__main__":
    main()
