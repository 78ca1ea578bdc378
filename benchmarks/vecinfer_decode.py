"""GPU time of one decoding step over a cache of codes, against full attention in bf16, as JSON.

Run ``PYTHONPATH=. python benchmarks/vecinfer_decode.py --budget-s 110``; ``--quick`` measures a few
sizes. One call appends a token and attends from it, for one layer of heads of 128 channels; all
calls are replayed from CUDA graphs, over enough copies of the cache that it does not stay in the L2
cache. The arms:

- ``sdpa_*``: SDPA over a static bf16 cache, without the append, through one backend; ``gqa`` passes
  ``enable_gqa``, ``folded`` makes the query heads of a key head the rows of one query: neither
  repeats keys. ``flash_attn``: the package's ``flash_attn_with_kvcache`` (split-KV), if installed.
- ``fp8``, ``vq-...``, ``tc-...``: that format, as the op runs it: append, attend, add up. With
  ``--kernels`` also without the launches after each ``kernel``, whose results nothing reads then;
  with ``--tiles`` with other tiles.

``bytes`` is what a call must read once; ``of_copy`` is its share of the bandwidth of a copy. Before
a format is timed its results are compared with the PyTorch code; one that differs is not timed.
Sizes that do not fit the memory are left out, and say so. Rows that ``--out`` has are kept;
``--resume`` measures only what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
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
from flasheva_compile.lowering import launch_vecinfer
from flasheva_compile.lowering.schedule import choose
from flasheva_compile.lowering.spec import Schedule
from records import OUT_OF_TIME, Results, Row, header
from retrieval_decode import COLD_BYTES, MOST_SETS, ROOM, microseconds
from timing import describe, release, side_stream
from torch.nn.attention import SDPBackend, sdpa_kernel
from vecinfer_codecs import prepared, random_codec

from flasheva_compile.quantization.attention import append_and_attend
from flasheva_compile.quantization.formats import FORMATS, FP8, KvStorage, kv_format
from flasheva_compile.quantization.fp8 import Fp8Codec
from flasheva_compile.quantization.state import QuantizedState, ring_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from flasheva_compile.lowering.vecinfer_books import KernelCodebooks, KernelTransforms

    from flasheva_compile.quantization.transform_coding import TransformCodec
    from flasheva_compile.quantization.vecinfer import VqCodec

RESULT = Path(__file__).parent / "results" / "vecinfer_decode.json"
IDENTITY = ("arm", "batch", "context", "kv_heads", "group", "head_dim", "kernel", "tiles")
ITEM = 2  # bytes of an exact number
STORAGE = KvStorage(format=FP8)  # how many tokens are exact; the format is an arm's own
HEADS = {"gqa": (8, 4), "mha": (32, 1)}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
RIVALS = (
    *("sdpa_flash_gqa", "sdpa_flash_folded", "sdpa_cudnn_gqa", "sdpa_cudnn_folded"),
    *("sdpa_efficient_gqa", "flash_attn"),
)
KERNELS = ("vecinfer_append", "vecinfer_decode", "vecinfer_combine")
MEMORY_SHARE = 0.85
_WRONG = 0.02  # largest difference from the PyTorch code, of results of size 1: a few bf16 steps


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is measured: an arm at one size, up to one kernel; ``tiles`` replace default ones."""

    arm: str
    batch: int
    context: int
    kv_heads: int
    group: int
    head_dim: int = 128
    kernel: str = ""
    tiles: str = ""

    @property
    def bytes(self) -> int:
        """Return what a call must read once: keys and values, or codes and exact tokens."""
        exact = 2 * self.head_dim * ITEM
        rows = self.batch * self.kv_heads
        if self.arm in RIVALS:
            return rows * self.context * exact
        kept = STORAGE.sink_tokens + STORAGE.exact_tokens
        coded = 2 * (self.head_dim + 1)
        if self.arm != FP8:
            coded = kv_format(self.arm).nbytes(self.head_dim, self.head_dim)
        return rows * ((self.context - kept) * coded + kept * exact)

    @property
    def stored(self) -> int:
        """Return the bytes of one cache."""
        return self.bytes + self.batch * self.kv_heads * 512 * 2 * self.head_dim * ITEM


def cells(a: argparse.Namespace) -> Iterator[Cell]:
    """List what is to be measured, sizes outermost."""
    for context, batch, heads in itertools.product(a.contexts, a.batches, a.heads):
        kv_heads, group = HEADS[heads]
        at: Any = {"batch": batch, "context": context, "kv_heads": kv_heads, "group": group}
        at["head_dim"] = a.head_dim
        for arm in RIVALS:
            if not (group == 1 and arm.endswith("_folded")):
                yield Cell(arm=arm, **at)
        for arm in a.formats:
            yield Cell(arm=arm, **at)
        whole = [Cell(arm=arm, **at) for arm in a.formats]
        for cell, kernel in itertools.product(whole, KERNELS[: 2 * a.kernels]):
            yield dataclasses.replace(cell, kernel=kernel)
        for cell, tiles in itertools.product(whole, a.tiles):
            yield dataclasses.replace(cell, tiles=tiles)


# --- inputs ---------------------------------------------------------------------------------------


def normal(*shape: int) -> torch.Tensor:
    """Return random numbers in the dtype of the benchmark."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def sets_of(cell: Cell) -> int:
    """Return how many caches the calls rotate over; 0 = not even one fits."""
    free, _ = torch.cuda.mem_get_info()
    fit = int(MEMORY_SHARE * free) // cell.stored
    return min(MOST_SETS, -(-COLD_BYTES // cell.stored), fit)


def queries(cell: Cell) -> tuple[torch.Tensor, ...]:
    """Return a token: queries, key, value."""
    new = (cell.batch, cell.kv_heads, 1, cell.head_dim)
    return (
        normal(cell.batch, cell.kv_heads * cell.group, 1, cell.head_dim),
        normal(*new),
        normal(*new),
    )


def codec_of(cell: Cell) -> VqCodec | TransformCodec | Fp8Codec:
    """Return a codec, with random codewords or transforms where it has some."""
    if cell.arm == FP8:
        return Fp8Codec(cell.head_dim, cell.head_dim)
    return random_codec(kv_format(cell.arm), cell.kv_heads, cell.head_dim)


def state_of(cell: Cell, codec: VqCodec | TransformCodec | Fp8Codec) -> QuantizedState:
    """Return a state of random codes that holds ``context`` tokens."""
    head, is_fp8 = (cell.batch, cell.kv_heads), cell.arm == FP8
    room = cell.context + ROOM - STORAGE.sink_tokens

    def codes(size: int) -> torch.Tensor:
        random = torch.empty(*head, room, size, dtype=torch.uint8, device="cuda").random_(0, 256)
        return random.bitwise_and_(0xFE) if is_fp8 else random  # without NaN

    exact = [normal(*head, n, cell.head_dim) for n in (STORAGE.sink_tokens, ring_size(STORAGE))]
    length = torch.full((cell.batch,), cell.context, dtype=torch.int64, device="cuda")
    return QuantizedState(
        sink_k=exact[0],
        sink_v=normal(*exact[0].shape),
        tail_k=exact[1],
        tail_v=normal(*exact[1].shape),
        key_codes=codes(codec.key_bytes),
        value_codes=codes(codec.value_bytes),
        exponents=codes(2 * is_fp8).random_(246, 250),  # 2^-10 to 2^-7: numbers of size 1
        length=length,
        written=length.clone(),
    )


def calls(cell: Cell, sets: int) -> tuple[Sequence[Callable[[], Any]], list[torch.Tensor]]:
    """Return one function for each set, and the counters that calls move on."""
    q, k, v = queries(cell)
    if cell.arm in RIVALS:
        attend = flash_attn if cell.arm == "flash_attn" else sdpa
        # ``flash_attn`` has tokens before heads.
        shape = (cell.batch, cell.kv_heads, cell.context, cell.head_dim)
        shape = shape if attend is sdpa else (shape[0], shape[2], shape[1], shape[3])
        stores = [(normal(*shape), normal(*shape)) for _ in range(sets)]
        return [partial(attend, cell, q, *store) for store in stores], []
    codec = codec_of(cell)
    states, books = [state_of(cell, codec) for _ in range(sets)], prepared(codec)
    functions = [partial(decode, (q, k, v), x, codec, books) for x in states]
    return functions, [x for state in states for x in (state.length, state.written)]


def decode(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    state: QuantizedState,
    codec: VqCodec | TransformCodec | Fp8Codec,
    books: KernelCodebooks | KernelTransforms | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append a token and attend from it."""
    form = None if isinstance(codec, Fp8Codec) else codec.form
    rest, rotate = (None, state, books, form, STORAGE), (form is not None, False)
    return launch_vecinfer.vecinfer_decode(
        qkv, *rest, rotate=rotate, scale=qkv[0].shape[3] ** -0.5, softcap=0.0
    )


def sdpa(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend to the whole context."""
    _, backend, how = cell.arm.split("_")
    folded = how == "folded"
    q = q.view(cell.batch, cell.kv_heads, cell.group, cell.head_dim) if folded else q
    grouped = cell.group > 1 and not folded
    with sdpa_kernel(BACKENDS[backend]):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)


def flash_attn(cell: Cell, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Do the same with the package of that name."""
    from flash_attn import flash_attn_with_kvcache

    return flash_attn_with_kvcache(q.transpose(1, 2), k, v, cache_seqlens=cell.context)


# --- measuring ------------------------------------------------------------------------------------


@contextmanager
def as_asked(cell: Cell) -> Iterator[None]:
    """Launch no kernel after the cell's, and with its tiles, if it says so."""
    module = launch_vecinfer
    own = module._plan
    parts = 0

    def chosen(spec: Any, *rest: Any) -> Schedule:  # noqa: ANN401
        if spec.kind != "vecinfer_decode":
            return choose(spec, *rest)
        n, warps, stages, registers, _ = map(int, cell.tiles.split("x"))
        return Schedule(
            block_m=16, block_n=n, num_warps=warps, num_stages=stages, max_registers=registers
        )

    def planned(*known: Any) -> Any:  # noqa: ANN401
        plan = own(*known)
        first = plan.launches[: KERNELS.index(cell.kernel) + 1]
        return dataclasses.replace(plan, launches=first)

    with ExitStack() as stack:
        if cell.tiles:
            own.cache_clear()
            stack.callback(own.cache_clear)
            stack.enter_context(mock.patch.object(module, "choose", chosen))
            parts = int(cell.tiles.split("x")[-1])
        if parts:
            stack.enter_context(mock.patch.object(module, "parts_of", return_value=parts))
        if cell.kernel:
            stack.enter_context(mock.patch.object(module, "_plan", planned))
        yield


def measured(cell: Cell, copy_gbs: float) -> Row:
    """Measure one cell; write down why if that fails."""
    row: Row = {**dataclasses.asdict(cell), "bytes": cell.bytes}
    sets = sets_of(cell)
    if not sets:
        return {**row, "skipped": "memory"}
    try:
        with as_asked(cell):
            row |= microseconds(*calls(cell, sets))
    except Exception as error:  # noqa: BLE001, RUF100 - the run goes on, the row says why
        return {**row, "error": describe(error)}
    share = round(cell.bytes / row["us"] / 1e3 / copy_gbs, 4)
    return row if cell.kernel else {**row, "of_copy": share}


def compare(cell: Cell) -> Row:
    """Compare some steps on the kernels with plain PyTorch, over the same codes."""
    small = dataclasses.replace(cell, batch=2, context=5000, kernel="", tiles="")
    qkv, codec = queries(small), codec_of(small)
    state, books = state_of(small, codec), prepared(codec)
    differences = []
    other = QuantizedState(*(x.clone() for x in state))
    valid = torch.ones(2, 1, dtype=torch.bool, device="cuda")
    for _ in range(4):
        out, lse = decode(qkv, state, codec, books)
        want, want_lse = append_and_attend(
            qkv, valid, other, codec, STORAGE, cell.head_dim**-0.5, 0.0
        )
        size = max(1.0, float(want.float().abs().max()))
        differences += [float((out.float() - want.float()).abs().max()) / size]
        differences += [float((lse - want_lse).abs().max()) / max(1.0, float(want_lse.abs().max()))]
    same = [torch.equal(x, y) for x, y in zip(state, other, strict=True)]
    if cell.arm != FP8:  # codes may differ where two are as near
        same[4:6] = ()
    row = {"arm": cell.arm, "group": cell.group, "largest_difference": max(differences)}
    row["same_state"] = all(same)
    return {**row, "right": row["same_state"] and max(differences) < _WRONG}


def add_ratios(rows: list[Row]) -> None:
    """Add to rows of codes how many times faster they are than the fastest rival."""
    size = ("batch", "context", "kv_heads", "group")
    for row in rows:
        same = [x for x in rows if all(x[n] == row[n] for n in size) and x["arm"] in RIVALS]
        peers = [x["us"] for x in same if "us" in x]
        if peers and "us" in row and row["arm"] not in RIVALS and not row["kernel"]:
            row["vs_bf16"] = round(min(peers) / row["us"], 2)


# --- command line ---------------------------------------------------------------------------------


def is_right(cell: Cell, results: Results) -> bool:
    """Compare an arm once with plain PyTorch; rivals need no comparison."""
    if cell.arm in RIVALS:
        return True
    for check in results.checks:
        if (check["arm"], check["group"]) == (cell.arm, cell.group):
            return check["right"]
    try:
        check = compare(cell)
    except Exception as error:  # noqa: BLE001, RUF100 - the run goes on, the check says why
        check = {"arm": cell.arm, "group": cell.group, "right": False, "error": describe(error)}
    results.checks.append(check)
    print(check, flush=True)
    return check["right"]


def run(a: argparse.Namespace, results: Results, deadline: float) -> None:
    """Measure what is missing."""
    copy_gbs = results.header["copy_gbs"] = round(copy_bandwidth(), 1)
    for cell in cells(a):
        row: Row = dataclasses.asdict(cell)
        if a.resume and results.has(row):
            continue
        if time.monotonic() >= deadline:
            row["skipped"] = OUT_OF_TIME
        elif not is_right(cell, results):
            row["error"] = "differs from the PyTorch code: see checks"
        else:
            row = measured(cell, copy_gbs)
        results.rows = [x for x in results.rows if results.key(x) != results.key(row)]
        results.rows.append(row)
        add_ratios(results.rows)
        results.write()
        print({n: x for n, x in row.items() if x not in ("", 0)}, flush=True)
        release(torch.device("cuda", 0))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add, size = parser.add_argument, power_of_two_or_k
    contexts = [size(text) for text in ("64k", "128k", "192k", "16k")]
    add("--contexts", type=size, nargs="+", default=contexts, help="tokens; 64k = 65536")
    add("--batches", type=int, nargs="+", default=[1, 8, 32])
    add("--heads", choices=HEADS, nargs="+", default=list(HEADS))
    add("--head-dim", type=int, default=128)
    add("--formats", choices=(FP8, *FORMATS), nargs="+", default=["vq-2bit", "vq-4bit", "vq-1bit"])
    add("--quick", action="store_true", help="64k tokens, batches 1 and 8, GQA, 2 bits, kernels")
    add("--kernels", action="store_true", help="time the first launches without the rest, too")
    what = "with these tiles, too: tokens x warps x stages x registers x parts, 0 = as chosen"
    add("--tiles", nargs="+", default=[], help=what)
    add("--budget-s", type=float, default=110.0, help="start nothing new after that")
    add("--out", type=Path, default=RESULT)
    add("--resume", action="store_true", help="measure only what --out does not have")
    add("--dry-run", action="store_true", help="list what would be measured; needs no GPU")
    add("--commit", help="recorded where git cannot say it")
    a = parser.parse_args()
    if a.quick:
        a.contexts, a.batches, a.heads = [65536], [1, 8], ["gqa"]
        a.formats, a.kernels = ["vq-2bit"], True
    return a


def main() -> None:
    """Measure, print and store."""
    started, a = time.monotonic(), parse_arguments()
    if a.dry_run:
        for cell in cells(a):
            print(cell, f"{cell.bytes / 1e6:.1f} MB")
        return
    device = torch.device("cuda", 0)
    described = {**header(device, a.commit), "dtype": "bfloat16"}
    results = Results(path=a.out, identity=IDENTITY, header=described)
    results.resume()
    with side_stream(device):
        run(a, results, started + a.budget_s)


if __name__ == "__main__":
    main()
