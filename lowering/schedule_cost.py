"""Which tiles a target can run at all, in closed forms, and a model of what the others cost.

The forms over-estimate slightly; the model counts clocks per (query, key) pair, up to a factor.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import sympy
from flasheva_compile.lowering import specialists
from flasheva_compile.lowering.spec import (
    BIAS_COLUMNS,
    STATE_BLOCK,
    Schedule,
    adds_bias_by_product,
    group_rows,
    padded,
    parts,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flasheva_compile.lowering.spec import KernelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A device as far as tiles depend on it.

    Attributes:
        arch: ``"sm_90"``, ``"gfx942"``, ...
        shared_limit: Shared memory of one program, at most [bytes].
        device: Name of the device; ``""`` where there is none.
        multiprocessors: How many programs run side by side, but for those that share one.
    """

    arch: str
    shared_limit: int
    device: str = ""
    multiprocessors: int = 132

    @property
    def is_amd(self) -> bool:
        """Whether tiles are moved and multiplied as AMD's devices do."""
        return self.arch.startswith("gfx")

    @property
    def capability(self) -> int:
        """NVIDIA's compute capability, such as 90; 0 on AMD."""
        return 0 if self.is_amd else int(self.arch.removeprefix("sm_"))


SHARED_LIMITS = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
    "gfx950": 163840,
}
"""Shared memory of one program, at most [bytes]; Triton does not check it."""

QUERY_KINDS = ("forward", "dq")
KEY_KINDS = ("dchunk", "dsink", "dkv")
DECODE_KINDS = ("decode", "decode_combine")

_RESERVED_SHARED = 2048  # reductions and changes of layout
_REGISTERS = 255
_RESERVED_REGISTERS = 40  # addresses, bounds, row states
_LENGTH = 16384  # what waste is judged at

_M, _N, _D, _E, _STAGES, _BYTES, _THREADS = sympy.symbols(
    "block_m block_n head_dim value_dim stages itemsize threads", integer=True, positive=True
)
_ARGUMENTS = (_M, _N, _D, _E, _STAGES, _BYTES, _THREADS)


def shared_memory(kind: str) -> sympy.Expr:
    """Return the bytes of shared memory of a kernel: resident tiles and ``stages`` x loop tiles."""
    rows = _D + _E
    if kind in ("forward", "decode"):
        return _BYTES * (_M * _D + _STAGES * _N * rows) + _RESERVED_SHARED
    if kind == "dq":
        return _BYTES * (_M * rows + _STAGES * _N * rows) + _RESERVED_SHARED
    if kind in KEY_KINDS:
        states = 2 * 4 * _M  # log-sum-exp and delta
        # A tile that was not asked for in advance is written once more as another operand.
        again = sympy.Piecewise((_BYTES * _M * (_D + _N), sympy.Eq(_STAGES, 1)), (0, True))
        tiles = _BYTES * _N * rows + _STAGES * (_BYTES * _M * rows + states)
        return tiles + again + _RESERVED_SHARED
    return 4 * _N * rows + _RESERVED_SHARED  # pooling: a change of layout before the store


def accumulators(kind: str) -> sympy.Expr:
    """Return the registers per thread that hold sums and scores.

    Weights of 16-bit kernels take half a register each; products of fp32 keep both operands, too.
    """
    weights = _M * _N * _BYTES / 4
    if kind in ("forward", "decode"):
        words = _M * _E + _M * _N + weights
    elif kind == "dq":
        words = _M * _D + 2 * _M * _N + weights
    elif kind in KEY_KINDS:
        words = _N * (_D + _E) + 2 * _M * _N + weights
    elif kind == "chunk_tokens":
        words = 2 * _N * (_D + _E)  # sums, and the keys and values that are added
    elif kind == "domega":
        words = 3 * _N * (_D + _E)  # sums, what chunks have, and a key and value of each
    else:
        words = _N * (_D + _E)
    return words / _THREADS


@cache
def _compiled(form: Callable[[str], sympy.Expr], kind: str) -> Callable[..., float]:
    return sympy.lambdify(_ARGUMENTS, form(kind), modules="math")


def _evaluate(
    form: Callable[[str], sympy.Expr], spec: KernelSpec, schedule: Schedule, target: Target
) -> float:
    sizes = (_columns(spec, dim) for dim in (spec.head_dim, spec.value_dim))
    itemsize = 4 if spec.dtype == "fp32" else 2
    rows = group_rows(spec.group) if spec.kind == "decode" else schedule.block_m
    tiles = (rows, schedule.block_n)
    return _compiled(form, spec.kind)(
        *tiles, *sizes, schedule.num_stages, itemsize, threads(schedule, target)
    )


def _columns(spec: KernelSpec, dim: int) -> int:
    """Return the columns of the tiles of a head dimension."""
    return padded(dim) if spec.kind in DECODE_KINDS else sum(size for _, size in parts(dim))


def threads(schedule: Schedule, target: Target) -> int:
    """Return the threads of a program."""
    return schedule.num_warps * (64 if target.is_amd else 32)


def shared_bytes(spec: KernelSpec, schedule: Schedule, target: Target) -> int:
    """Return the shared memory of one program [bytes]."""
    if schedule.consumers:
        return specialists.shared_bytes(spec, schedule)
    biases = 2 * BIAS_COLUMNS * schedule.block_n if schedule.product_bias else 0
    biases *= schedule.num_stages if spec.kind == "forward" else 1
    return int(_evaluate(shared_memory, spec, schedule, target)) + biases


def registers(spec: KernelSpec, schedule: Schedule, target: Target) -> int:
    """Return the registers per thread that hold sums and scores."""
    return int(_evaluate(accumulators, spec, schedule, target))


# --- static rejection -----------------------------------------------------------------------------


def rejection(spec: KernelSpec, schedule: Schedule, target: Target) -> str | None:
    """Return why a kernel cannot or should not be tiled like this; None = it can."""
    checks = (_bad_shape, _bad_features, _bad_matrix_rows, _too_much)
    return next((reason for check in checks if (reason := check(spec, schedule, target))), None)


def _bad_shape(spec: KernelSpec, schedule: Schedule, target: Target) -> str | None:
    least = 8 if spec.kind == "chunk_tokens" else 16  # which multiplies no matrices
    for name, block in (("block_m", schedule.block_m), ("block_n", schedule.block_n)):
        if block < least or block & (block - 1):
            return f"{name}={block} is no power of two of at least {least}"
    if schedule.block_m > STATE_BLOCK:
        return f"block_m={schedule.block_m} exceeds the {STATE_BLOCK} of query states"
    warps, stages = schedule.num_warps, schedule.num_stages
    if warps < 1 or warps & (warps - 1) or threads(schedule, target) > 1024:
        return f"num_warps={warps} is no power of two of at most 1024 threads"
    if stages < 1 or (target.is_amd and stages > 1):
        return f"num_stages={stages} is not possible on {target.arch}"
    return None


def _bad_features(spec: KernelSpec, schedule: Schedule, target: Target) -> str | None:
    if reason := tma_rejection(spec, target) if schedule.tma else None:
        return f"tma: {reason}"
    if schedule.split_window and spec.kind not in QUERY_KINDS:
        return f"split_window: {spec.kind} walks over no window"
    if schedule.product_bias and not adds_bias_by_product(spec):
        return "product_bias: scores are no products, or have no biases"
    if schedule.dependent and target.capability < 90:
        return "dependent: nothing is launched early there"
    return specialists.rejection(spec, schedule, target) if schedule.consumers else None


def tma_rejection(spec: KernelSpec, target: Target) -> str | None:
    """Return why tiles cannot come through tensor descriptors; None = they can."""
    if target.capability < 90:
        return f"{target.arch} has no tensor descriptors"
    if spec.dtype == "fp32":
        return "fp32 tiles are read through pointers"
    if spec.kind in DECODE_KINDS:
        return f"{spec.kind} reads its tiles through pointers"
    if spec.kind not in QUERY_KINDS + KEY_KINDS:
        return f"{spec.kind} reads no tiles in a loop"
    if spec.head_dim % 8 or spec.value_dim % 8:
        return "rows of 16-byte multiples are needed"
    return None


def _bad_matrix_rows(spec: KernelSpec, schedule: Schedule, target: Target) -> str | None:
    """Reject what Triton would do with mma.sync instead of wgmma, which takes 64 rows."""
    if not _has_wgmma(spec, target) or spec.kind in ("dsink", *_POOLING, *DECODE_KINDS):
        return None
    name = "block_m" if spec.kind in QUERY_KINDS else "block_n"
    rows = getattr(schedule, name)
    if rows < 64:
        return f"{name}={rows}: wgmma needs 64 rows"
    # Two warpgroups can share 64 rows and split the columns; worth it where sums are wide.
    wide = spec.head_dim > 128 or spec.value_dim > 128
    if not wide and rows * 4 < 64 * schedule.num_warps:
        return f"{name}={rows}: {schedule.num_warps} warps need 64 rows per warpgroup"
    return None


def _has_wgmma(spec: KernelSpec, target: Target) -> bool:
    """Whether products can have 64 rows; sm_100 has another instruction of the same shape."""
    return 90 <= target.capability < 120 and spec.dtype != "fp32"


_POOLING = ("chunk_tokens", "dpool", "domega")


def _too_much(spec: KernelSpec, schedule: Schedule, target: Target) -> str | None:
    shared = shared_bytes(spec, schedule, target)
    if shared > target.shared_limit:
        return f"{shared} bytes of shared memory, at most {target.shared_limit}"
    if schedule.consumers:
        return specialists.too_many_registers(spec, schedule)
    used, most = registers(spec, schedule, target), register_limit(spec, schedule, target)
    return f"{used} registers of accumulators per thread, at most {most}" if used > most else None


def register_limit(spec: KernelSpec, schedule: Schedule, target: Target) -> int:
    """Return how many registers of a thread sums and scores may take."""
    if target.is_amd:
        return 512 - _RESERVED_REGISTERS
    most = min(_REGISTERS, 65536 // threads(schedule, target), schedule.max_registers or 255)
    if spec.dtype == "fp32" and not spec.tf32 and spec.kind not in (*_POOLING, "decode_combine"):
        return (most - _RESERVED_REGISTERS) // _FMA_SHARE
    return most - _RESERVED_REGISTERS


_FMA_SHARE = 4  # products without matrix instructions keep rows of both operands in registers


# --- ranking --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rates:
    """What a multiprocessor does per clock, and what programs share on it."""

    mma: int  # multiply-adds of 16-bit matrix products
    fma: int
    exp2: int
    shared: int  # bytes


def _rates(target: Target) -> _Rates:
    if target.is_amd:
        return _Rates(mma=1024, fma=128, exp2=16, shared=65536)
    known = {80: (1024, 64), 86: (512, 128), 89: (512, 128), 120: (512, 128)}
    mma, fma = known.get(target.capability, (2048, 128))
    return _Rates(mma=mma, fma=fma, exp2=16, shared=target.shared_limit + 1024)


def cost(spec: KernelSpec, schedule: Schedule, target: Target) -> float:
    """Estimate the clocks of a multiprocessor per useful pair; programs overlap, tiles do not."""
    m, n = schedule.block_m, schedule.block_n
    if spec.kind in (*_POOLING, "decode_combine"):
        return abs(registers(spec, schedule, target) - 16) + abs(schedule.num_warps - 4)
    rates = _rates(target)
    if spec.kind == "decode":
        return _decode_cost(spec, schedule, target, rates)
    products = _product_clocks(spec, schedule, target, rates)
    softmax = _softmax_clocks(spec, m, n, rates)
    resident = _programs(spec, schedule, target, rates)
    latency = _LATENCY / (schedule.num_stages**2 * (1.5 if schedule.tma else 1.0))
    serial = products + softmax + latency
    tile = max(products, softmax, serial / resident)
    return tile * _waste(spec, schedule) / (m * n)


def _decode_cost(spec: KernelSpec, schedule: Schedule, target: Target, rates: _Rates) -> float:
    """Return clocks per key: reading it, and each tile's share of waiting and of fixed work."""
    n, warps = schedule.block_n, schedule.num_warps
    row = (spec.head_dim + spec.value_dim) * (4 if spec.dtype == "fp32" else 2)
    waiting = _LATENCY / (schedule.num_stages**2 * _programs(spec, schedule, target, rates))
    idle = abs(n / 16 - warps) / warps  # warps share a tile's keys by sixteen
    return row / _MEMORY_BYTES + (waiting + _PER_TILE * (1 + idle)) / n


_MEMORY_BYTES = 13  # that memory delivers to a multiprocessor per clock
_LATENCY = 1500  # clocks from asking for a tile to having it, unless asked for in advance


def _product_clocks(spec: KernelSpec, schedule: Schedule, target: Target, rates: _Rates) -> float:
    """Return clocks of the products: multiplying, or reading operands again and again."""
    m, n = schedule.block_m, schedule.block_n
    d, e = (sum(size for _, size in parts(dim)) for dim in (spec.head_dim, spec.value_dim))
    columns = {"forward": d + e, "dq": 2 * d + e}.get(spec.kind, 2 * (d + e))
    wide, narrow = (m, n) if spec.kind in QUERY_KINDS else (n, m)
    if _has_wgmma(spec, target) and wide >= 64:
        down = wide // 64
        across = max(1, schedule.num_warps // 4 // down)
    else:
        down = min(schedule.num_warps, wide // 16)
        across = schedule.num_warps // down
    itemsize = 4 if spec.dtype == "fp32" else 2
    reading = columns * itemsize * (wide * across + narrow * down) / _SHARED_BYTES
    speed = rates.mma if spec.dtype != "fp32" else rates.mma // 2 if spec.tf32 else rates.fma
    return max(m * n * columns / speed, reading)


_SHARED_BYTES = 128  # that a multiprocessor reads per clock


def _softmax_clocks(spec: KernelSpec, m: int, n: int, rates: _Rates) -> float:
    """Return clocks of everything but products: exponentials, and what issues one by one."""
    half = rates.fma / 2  # maxima and conversions
    exponentials = m * n / rates.exp2 + _PER_TILE
    if spec.kind == "forward":  # scale and sum, maximum, conversion; rescaling of the sums
        return exponentials + m * n * (2 / rates.fma + 1.6 / half) + m * spec.value_dim / rates.fma
    return exponentials + m * n * (3 / rates.fma + 1 / half)


_PER_TILE = 150  # clocks of bounds, addresses, barriers and sums across threads


def _programs(spec: KernelSpec, schedule: Schedule, target: Target, rates: _Rates) -> int:
    """Return how many programs a multiprocessor holds."""
    by_shared = rates.shared // (shared_bytes(spec, schedule, target) + 1024)
    thread_registers = registers(spec, schedule, target) + _RESERVED_REGISTERS + 16
    file = 131072 if target.is_amd else 65536
    by_registers = file // (thread_registers * threads(schedule, target))
    return max(1, min(by_shared, by_registers, 8))


def _waste(spec: KernelSpec, schedule: Schedule) -> float:
    """Return pairs computed per useful pair, with masks' extra work, at a typical length."""
    m, n, c, w = schedule.block_m, schedule.block_n, spec.chunk_size, spec.window_size
    chunks = _LENGTH / 2 / c
    if spec.kind == "dsink":
        return -(-max(spec.sink_size, 1) // n) * n / max(spec.sink_size, 1)
    if spec.kind == "dkv":
        return (w + n + m) / max(w, 1) * _MASKED
    if spec.kind == "dchunk":
        return 1 + (m + n * c) / _LENGTH
    edges = m + n
    masked = edges if schedule.split_window else w + edges
    loops = _SPLIT_LOOPS * n if schedule.split_window else 0
    return (chunks + w + edges + n / 2 + (_MASKED - 1) * masked + loops) / (chunks + w)


_MASKED = 1.3  # a masked tile over one that is not
_SPLIT_LOOPS = 0.5  # tiles that starting two more loops costs


def candidates(spec: KernelSpec, target: Target) -> tuple[Schedule, ...]:
    """Return the schedules that a target can run, the most promising first."""
    fitting = (s for s in _schedules(spec, target) if rejection(spec, s, target) is None)
    return tuple(sorted(fitting, key=lambda s: (cost(spec, s, target), *_order(s))))


def _order(schedule: Schedule) -> tuple[int, ...]:
    """Break ties: fewer warps, then smaller tiles."""
    return schedule.num_warps, schedule.num_stages, schedule.block_m, schedule.block_n


def _schedules(spec: KernelSpec, target: Target) -> Iterator[Schedule]:
    if spec.kind in (*_POOLING, "decode_combine"):
        for n, warps in itertools.product((16, 32, 64), (4, 8)):
            yield Schedule(block_m=16, block_n=n, num_warps=warps, num_stages=1)
        return
    blocks, stages = (16, 32, 64, 128), (1,) if target.is_amd else (1, 2, 3, 4)
    if spec.kind == "decode":
        warps_tried = (2, 4) if target.is_amd else (2, 4, 8)  # of 64 lanes there
        for n, warps, depth in itertools.product(blocks, warps_tried, stages):
            yield Schedule(block_m=16, block_n=n, num_warps=warps, num_stages=depth)
        return
    tma = tma_rejection(spec, target) is None
    splits = (False, True) if spec.kind in QUERY_KINDS and spec.documents != "packed" else (False,)
    for m, n, warps, depth, split in itertools.product(blocks, blocks, (4, 8), stages, splits):
        yield Schedule(
            block_m=m, block_n=n, num_warps=warps, num_stages=depth, tma=tma, split_window=split
        )
