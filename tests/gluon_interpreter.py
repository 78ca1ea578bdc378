"""Runs generated Gluon kernels on a CPU: each partition of warps is a thread, barriers are real.

What it is strict about:
- shared memory begins as NaN, and a copy that lands in a slot replaces all of it;
- a product reads its operands when it is waited for, not when it begins: a slot that is given back
  too early may be overwritten before that (copies are made at once);
- what has not been waited for cannot be used;
- barriers count arrivals and bytes as the hardware does, so a partition that walks over other tiles
  than the rest never ends: after a time limit that is a failure that names the waiting;
- nothing negative is divided: machines round to zero, Python rounds down.
"""

from __future__ import annotations

import ast
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT_S = 20.0
_local = threading.local()


class DeadlockError(AssertionError):
    """A partition waits for what no other does."""


@dataclass
class Barrier:
    """A barrier in shared memory: a phase ends when all have arrived and all bytes are there."""

    run: Run
    count: int = 0
    waiting: int = 0
    bytes: int = 0
    phase: int = 0

    def init(self, count: int) -> None:
        self.count = self.waiting = count

    def arrive(self, count: int = 1, more: int = 0) -> None:
        with self.run.changed:
            assert count <= self.waiting, "more arrivals than a phase has"
            self.waiting, self.bytes = self.waiting - count, self.bytes + more
            self._end()

    def land(self, size: int) -> None:
        with self.run.changed:
            self.bytes -= size
            self._end()

    def _end(self) -> None:
        if self.waiting == 0 and self.bytes == 0:
            self.phase, self.waiting = self.phase + 1, self.count
            self.run.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.run.changed:
            done = lambda: self.run.failed or self.phase % 2 != parity  # noqa: E731
            if not self.run.changed.wait_for(done, LIMIT_S):
                raise DeadlockError(f"phase {self.phase}, {self.waiting} have not arrived")
            if self.run.failed:
                raise DeadlockError("another partition failed")


class Run:
    """What the partitions of one program share."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.failed: list[BaseException] = []


class Slots(list):
    """An allocation in shared memory."""

    dtype: torch.dtype

    def index(self, n: int) -> Any:
        return self[n]


@dataclass
class Pointer:
    """Addresses of numbers of a tensor."""

    flat: torch.Tensor
    at: Any = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.flat, self.at + offset)


@dataclass
class Product:
    """A product that was begun; ``result`` is there after it was waited for."""

    compute: Callable[[], torch.Tensor]
    result: torch.Tensor | None = None


class Tile:
    """A described tensor as kernels see it."""

    def __init__(self, described: Any) -> None:
        self.described, self.base = described, described.base
        self.dtype, self.layout = described.base.dtype, None
        self.block = described.block_shape
        size = torch.Size(self.block).numel() * described.base.element_size()
        self.block_type = SimpleNamespace(nbytes=size)


def copy_tile(tile: Tile, begin: list[int], barrier: Barrier, slot: torch.Tensor) -> None:
    """Copy a tile; what lies outside of the tensor is zero."""
    d = tile.described
    whole = torch.as_strided(d.base, d.shape, d.strides, d.base.storage_offset())
    got = torch.zeros(tile.block, dtype=tile.dtype)
    assert all(0 <= int(x) < size for x, size in zip(begin[:2], d.shape, strict=False))
    there, here = [], []
    for x, n, size in zip(map(int, begin), tile.block, d.shape, strict=True):
        low = max(x, 0)
        high = max(min(x + n, size), low)
        there.append(slice(low, high))
        here.append(slice(low - x, high - x))
    got[tuple(here)] = whole[tuple(there)]
    slot.copy_(got.view(slot.shape))
    barrier.land(tile.block_type.nbytes)


def warpgroup_mma(a: Any, b: Any, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Any:
    assert is_async

    def compute() -> torch.Tensor:
        before = acc.result if isinstance(acc, Product) else acc
        return a.float() @ b.float() + (before if use_acc else 0)

    product = Product(compute)
    _local.begun.append(product)
    return product


def warpgroup_mma_wait(num_outstanding: int = 0, deps: tuple[Any, ...] = ()) -> Any:
    while len(_local.begun) > num_outstanding:
        product = _local.begun.pop(0)
        product.result = product.compute()
    found = [x.result if isinstance(x, Product) else x for x in deps]
    assert all(x is not None for x in found), "used before it was waited for"
    return found[0] if len(found) == 1 else tuple(found)


def _either(of_ints: Callable[..., int], of_tensors: Callable[..., torch.Tensor]) -> Any:
    def function(x: Any, y: Any) -> Any:
        if isinstance(x, int) and isinstance(y, int):
            return of_ints(x, y)
        return of_tensors(torch.as_tensor(x), torch.as_tensor(y))

    return function


def _where(condition: Any, x: Any, y: Any) -> Any:
    if isinstance(condition, bool):
        return x if condition else y
    return torch.where(condition, x, y)


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Slots:
    if layout == "barriers":
        return Slots(Barrier(_local.run) for _ in range(shape[0]))
    slots = Slots(torch.full(shape[1:], torch.nan, dtype=dtype) for _ in range(shape[0]))
    slots.dtype = dtype
    return slots


def _load(places: Pointer, mask: Any = None, other: Any = None) -> Any:
    if not isinstance(places.at, torch.Tensor):
        return int(places.flat[places.at])
    at = places.at
    mask = torch.full(at.shape, True) if mask is None else mask
    found = torch.full(at.shape, other or 0, dtype=places.flat.dtype)
    assert ((at[mask] >= 0) & (at[mask] < len(places.flat))).all(), "read outside of a tensor"
    found[mask] = places.flat[at[mask]]
    return found


def _divided(x: Any, y: int) -> Any:
    assert x >= 0 if isinstance(x, int) else (x >= 0).all(), f"{x} is negative"
    return x // y


class _Divisions(ast.NodeTransformer):
    """Turns ``x // y`` into ``divided(x, y)``."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if not isinstance(node.op, ast.FloorDiv):
            return node
        divided = ast.Name("divided", ast.Load())
        return ast.copy_location(ast.Call(divided, [node.left, node.right], []), node)


def _store(places: Pointer, values: torch.Tensor, mask: torch.Tensor) -> None:
    at, mask = torch.broadcast_tensors(torch.as_tensor(places.at), mask)
    kept = places.flat[at[mask]]
    assert kept.isnan().all(), "stored twice"
    places.flat[at[mask]] = values.broadcast_to(mask.shape)[mask].to(places.flat.dtype)


def _specialise(parts: list[tuple[Any, tuple[Any, ...]]], warps: list[int], _: list[int]) -> None:
    assert len(warps) == len(parts) - 1
    run, program = _local.run, _local.program

    def partition(function: Any, arguments: tuple[Any, ...]) -> None:
        _local.run, _local.program, _local.begun = run, program, []
        try:
            function(*arguments)
            assert not _local.begun, "a product that nobody waited for"
        except BaseException as error:
            with run.changed:
                run.failed.append(error)
                run.changed.notify_all()

    threads = [threading.Thread(target=partition, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if run.failed:
        raise run.failed[0]


def _language() -> SimpleNamespace:
    layouts = dict.fromkeys(
        ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout"),
        lambda *_: None,
    )
    return SimpleNamespace(
        **layouts,
        constexpr=lambda x: x,
        float32=torch.float32,
        bfloat16=torch.bfloat16,
        int64=torch.int64,
        program_id=lambda _: _local.program[0],
        num_programs=lambda _: _local.program[1],
        arange=lambda first, last, _: torch.arange(first, last),
        full=lambda shape, x, dtype, _: torch.full(shape, x, dtype=dtype),
        zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype),
        where=_where,
        minimum=_either(min, torch.minimum),
        maximum=_either(max, torch.maximum),
        max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis),
        exp2=torch.exp2,
        log2=torch.log2,
        cdiv=lambda x, y: _divided(x + y - 1, y),
        load=_load,
        cast=lambda x, _: x,
        convert_layout=lambda x, _: x,
        static_range=range,
        allocate_shared_memory=_allocate,
        store=_store,
        warp_specialize=_specialise,
    )


def _jit(function: Any = None, **_: Any) -> Any:
    return function or (lambda f: f)


MBARRIER = SimpleNamespace(
    MBarrierLayout=lambda: "barriers",
    init=lambda barrier, count: barrier.init(count),
    expect=lambda barrier, size: barrier.arrive(1, size),
    arrive=lambda barrier, count: barrier.arrive(count),
    wait=lambda barrier, parity: barrier.wait(parity),
)


def interpreted(source: str, name: str) -> Callable[..., None]:
    """Return ``launch(programs, *arguments)`` of the kernel ``name`` of a generated module.

    Results must be NaN before.
    """
    _, _, text = source.partition("tma.async_copy_global_to_shared\n")
    text = text.partition("\n\ndef launch(")[0]
    names = {
        "gluon": SimpleNamespace(jit=_jit),
        "gl": _language(),
        "mbarrier": MBARRIER,
        "warpgroup_mma": warpgroup_mma,
        "warpgroup_mma_wait": warpgroup_mma_wait,
        "copy_tile": copy_tile,
        "divided": _divided,
    }
    tree = ast.fix_missing_locations(_Divisions().visit(ast.parse(text)))
    exec(compile(tree, f"<{name}>", "exec"), names)

    def launch(programs: int, *arguments: Any) -> None:
        made = [
            Tile(x)
            if hasattr(x, "block_shape")
            else Pointer(x.view(-1))
            if isinstance(x, torch.Tensor)
            else x
            for x in arguments
        ]
        for program in range(programs):
            _local.run, _local.program = Run(), (program, programs)
            names[name](*made)

    return launch
