"""Launches of one step over a cache of codes: append, attend, add up.

As in :mod:`launch_decode`: what depends on shapes, dtypes and settings alone is a plan, made once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from flasheva_compile.lowering.direct_launch import on_device
from flasheva_compile.lowering.emit.vecinfer_fp8_tiles import WORD
from flasheva_compile.lowering.kernel_arguments import DTYPES, unit_stride
from flasheva_compile.lowering.load import load
from flasheva_compile.lowering.schedule import choose, current_target
from flasheva_compile.lowering.spec_vecinfer import VecInferSpec
from flasheva_compile.lowering.vecinfer_books import KernelCodebooks

from flasheva_compile.quantization.formats import FP8, KvFormat, WordKvFormat
from flasheva_compile.quantization.state import QuantizedState, ring_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from flasheva_compile.lowering.load import LoadedKernel
    from flasheva_compile.lowering.schedule_cost import Target
    from flasheva_compile.lowering.spec import Schedule
    from flasheva_compile.lowering.vecinfer_books import KernelTransforms
    from torch import Tensor

    from flasheva_compile.quantization.formats import CodeFormat, KvStorage

MOST_NEW_TOKENS = 16
"""Tokens of one call that the kernels take; more are a prompt, and its products are large."""

_STATE_ARGUMENTS = (
    *("sink_k_ptr", "sink_v_ptr", "tail_k_ptr", "tail_v_ptr", "key_codes_ptr", "value_codes_ptr"),
    *("exponents_ptr", "length_ptr", "written_ptr"),
)
"""Names of the arguments that the fields of ``QuantizedState`` are, in order."""

AnyKvFormat: TypeAlias = KvFormat | WordKvFormat

_is_contiguous = torch.Tensor.is_contiguous
_LOG2E = math.log2(math.e)
_LARGEST_HEAD_DIM = 256
_REGISTERS = 65536  # of a multiprocessor
_REGISTERS_PER_THREAD = 256  # what the decode kernel needs where its schedule says nothing, about
_AMD_WITH_SUBNORMALS = ("gfx942", "gfx950")
_TILES_PER_PART = 2
_MOST_PARTS = 160


class _Shape(NamedTuple):
    """What a plan depends on besides scale and softcap.

    Attributes:
        q: Shape of the queries, ``[B, Hq, L, D]``.
        v: Shape of the new values, ``[B, Hkv, L, Dv]``.
        room: Codes that the cache has room for.
        dtype: Of queries, keys and values.
        device: Where they are.
        key_mask: Whether the new tokens have a key mask.
        form: Of the codes; None = fp8.
        storage: What is exact.
        per_head: Whether keys, and whether values, have a codebook for each head, and whether keys
            have a rotation.
        rotate: Whether coded keys, and whether coded values, are rotated.
    """

    q: torch.Size
    v: torch.Size
    room: int
    dtype: torch.dtype
    device: torch.device
    key_mask: bool
    form: AnyKvFormat | None
    storage: KvStorage
    per_head: tuple[bool, bool, bool]
    rotate: tuple[bool, bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What all steps of a layer have in common.

    Attributes:
        launches: Kernels with their numbers of programs, in order.
        constants: Arguments that are the same in every step.
        coded_q: Transformed queries [numbers]; fp8 has none.
        q_scale: Their scales and what is added to their scores [numbers].
        partial: What the parts leave for the last kernel [numbers].
    """

    launches: tuple[tuple[Callable[..., Any], int, tuple[str, ...]], ...]
    constants: dict[str, Any]
    coded_q: int
    q_scale: int
    partial: int


def fits(form: AnyKvFormat | None, dtype: torch.dtype) -> bool:
    """Whether there are kernels for such codes of such a model; None = fp8."""
    vectors = () if form is None else (form.key.vector, form.value.vector)
    return dtype in DTYPES and all(x & (x - 1) == 0 for x in vectors)


def covers(q: Tensor, v: Tensor, form: AnyKvFormat | None) -> bool:
    """Whether the kernels can run such a call; else the PyTorch code runs."""
    sizes = (q.shape[3], v.shape[3])
    few = q.shape[2] <= MOST_NEW_TOKENS and max(sizes) <= _LARGEST_HEAD_DIM
    few &= form is not None or all(size % WORD == 0 for size in sizes)
    if isinstance(form, WordKvFormat):
        with on_device(q.device):
            few &= _multiplies_subnormals(current_target())
    return fits(form, q.dtype) and few and 0 not in q.shape


def _multiplies_subnormals(target: Target) -> bool:
    """Whether products take subnormal fp16 numbers, which all digits are, for what they are.

    MFMA of MI200 (gfx90a) takes them for zeros; of AMD's devices only those that do not are named.
    """
    return not target.is_amd or target.arch in _AMD_WITH_SUBNORMALS


def vecinfer_decode(  # noqa: PLR0913 - the arguments of the op
    qkv: tuple[Tensor, Tensor, Tensor],
    key_mask: Tensor | None,
    state: QuantizedState,
    books: KernelCodebooks | KernelTransforms | None,
    form: AnyKvFormat | None,
    storage: KvStorage,
    *,
    rotate: tuple[bool, bool],
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Append a few tokens per row and attend from them.

    Three launches, no host synchronisation, and the same grids at every length: a captured CUDA
    graph stays valid.

    Args:
        qkv: ``[B, Hq, L, D]``, ``[B, Hkv, L, D]``, ``[B, Hkv, L, Dv]``, any strides.
        key_mask: ``[B, L]`` bool; None = all valid.
        state: Contiguous tensors, written in place.
        books: Of ``kernel_codebooks`` or ``kernel_transforms``; fp8 has none.
        form: Of the codes; None = fp8; see :func:`covers`.
        storage: What is exact.
        rotate: Whether coded keys, and whether coded values, are rotated.
        scale: Score scale.
        softcap: ``softcap * tanh(score / softcap)``; 0 = none.

    Returns:
        ``out [B, Hq, L, Dv]`` and fp32 ``lse [B, Hq, L]``, as ``quantization/attention.py`` defines
        them; NaN where the cache was too small.
    """
    assert all(map(_is_contiguous, state))  # kernels compute the addresses
    q, k, v = map(unit_stride, qkv)
    per_head = _per_head(books)
    room, masked = state.key_codes.shape[2], key_mask is not None
    made_of = (room, q.dtype, q.device, masked, form, storage, per_head, rotate)
    with on_device(q.device):
        plan = _plan(_Shape(q.shape, v.shape, *made_of), scale, softcap)
        rotated = (2,) if rotate[1] else ()
        kind = torch.float32 if rotated else q.dtype
        out = q.new_empty((*rotated, *q.shape[:3], v.shape[3]), dtype=kind)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        values = {
            **plan.constants,
            **dict(zip(_STATE_ARGUMENTS, state, strict=True)),
            **_book_values(books, plan),
            **_token_values(q, k, v, key_mask),
            "partial_ptr": lse.new_empty(plan.partial),
            "out_ptr": out,
            "lse_ptr": lse,
        }
        for launch, programs, names in plan.launches:
            launch(programs, *[values[name] for name in names])
        if rotated and isinstance(books, KernelCodebooks):
            out = (out[0] + out[1] @ books.value_rotation).to(q.dtype)
    return out, lse


def _per_head(books: KernelCodebooks | KernelTransforms | None) -> tuple[bool, bool, bool]:
    """Return whether heads have key codebooks, value codebooks and key rotations of their own."""
    if books is None:
        return False, False, False
    own = books.key_rotation.shape[0] > 1
    if not isinstance(books, KernelCodebooks):
        return False, False, own
    return books.key_book.shape[0] > 1, books.value_book.shape[0] > 1, own


def _book_values(books: KernelCodebooks | KernelTransforms | None, plan: _Plan) -> dict[str, Any]:
    """Return codebooks or transforms, and room for the queries that they transform."""
    if books is None:
        return {}
    coded = books.key_book if isinstance(books, KernelCodebooks) else books.coded
    return {
        **{f"{name}_ptr": x for name, x in books._asdict().items()},
        "coded_q_ptr": coded.new_empty(plan.coded_q),
        "q_scale_ptr": books.book_scale.new_empty(plan.q_scale),
    }


def _token_values(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> dict[str, Any]:
    values: dict[str, Any] = {"q_ptr": q, "k_ptr": k, "v_ptr": v}
    values["stride_qb"], values["stride_qh"], values["stride_qm"], _ = q.stride()
    values["stride_kb"], values["stride_kh"], values["stride_kn"], _ = k.stride()
    values["stride_vb"], values["stride_vh"], values["stride_vn"], _ = v.stride()
    if key_mask is not None:
        if key_mask.stride(1) != 1 and key_mask.shape[1] > 1:
            key_mask = key_mask.contiguous()
        values["key_mask_ptr"], values["stride_mask"] = key_mask, key_mask.stride(0)
    return values


# --- plans ----------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _plan(shape: _Shape, scale: float, softcap: float) -> _Plan:
    """Generate and load the kernels; schedules are those of the first step of such a layer."""
    append = vecinfer_spec(shape, softcap=softcap > 0)
    decode, combine = append.of_kind("vecinfer_decode"), append.of_kind("vecinfer_combine")
    pairs = shape.v[0] * shape.v[1]
    rows = pairs * decode.row_blocks
    schedule = choose(decode)
    splits = decode.exact_parts + parts_of(schedule, rows, shape.room)
    base2 = scale * _LOG2E
    return _Plan(
        launches=(
            _launch(load(append, choose(append)), pairs * sum(append.append_jobs)),
            _launch(load(decode, schedule), rows * splits),
            _launch(load(combine, choose(combine)), pairs * decode.queries),
        ),
        constants={
            "heads": shape.v[1],
            "room": shape.room,
            "splits": splits,
            **_book_strides(shape.form, shape.per_head),
            "rotation_stride": shape.q[3] ** 2 if shape.per_head[2] else 0,
            # tanh(x / softcap) is computed as a sigmoid of twice its argument.
            "score_scale": 2 * base2 / softcap if softcap else base2,
            "softcap": softcap * _LOG2E,
        },
        coded_q=rows * 16 * append.keys.padded,
        q_scale=2 * rows * 16,
        partial=pairs * decode.queries * splits * (shape.v[3] + 2),
    )


def _launch(kernel: LoadedKernel, programs: int) -> tuple[Callable[..., Any], int, tuple[str, ...]]:
    return kernel.launch, programs, kernel.generated.arguments


def _book_strides(form: AnyKvFormat | None, per_head: tuple[bool, bool, bool]) -> dict[str, int]:
    """Return how far codebooks of neighbouring heads are apart."""
    if not isinstance(form, KvFormat):
        return {}

    def stride(part: CodeFormat, own: bool) -> int:  # noqa: FBT001
        return part.entries * part.vector if own else 0

    return {
        "key_stride": stride(form.key, per_head[0]),
        "value_stride": stride(form.value, per_head[1]),
    }


def vecinfer_spec(shape: _Shape, *, softcap: bool) -> VecInferSpec:
    """Return the spec of the ``vecinfer_append`` kernel of a layer."""
    storage = shape.storage
    return VecInferSpec(
        kind="vecinfer_append",
        dtype=DTYPES[shape.dtype],
        head_dim=shape.q[3],
        value_dim=shape.v[3],
        chunk_size=1,
        key_mask=shape.key_mask,
        group=shape.q[1] // shape.v[1],
        sink_size=storage.sink_tokens,
        softcap=softcap,
        key_code=str(shape.form.key) if shape.form else FP8,
        value_code=str(shape.form.value) if shape.form else FP8,
        new_tokens=shape.q[2],
        exact_tokens=storage.exact_tokens,
        block_tokens=storage.block_tokens,
        ring=ring_size(storage),
        per_head=any(shape.per_head[:2]),
        rotate_keys=shape.rotate[0],
        rotate_values=shape.rotate[1],
    )


def parts_of(schedule: Schedule, rows: int, room: int) -> int:
    """Return into how many parts the codes of a row and head are split.

    It follows from the room in the cache, not from what is in it, so that a captured graph with
    its fixed grid stays valid; parts that turn out to be empty end at once. The fewest parts are
    taken that keep the multiprocessors nearly as busy as any number would.

    Args:
        schedule: Of ``vecinfer_decode``.
        rows: Rows times key heads times blocks of queries.
        room: Codes that the cache has room for.
    """
    threads = 32 * schedule.num_warps
    resident = _REGISTERS // ((schedule.max_registers or _REGISTERS_PER_THREAD) * threads)
    slots = max(1, resident) * current_target().multiprocessors
    most = max(1, min(-(-room // schedule.block_n) // _TILES_PER_PART, _MOST_PARTS))

    def busy(parts: int) -> float:
        programs = rows * parts
        return programs / (-(-programs // slots) * slots)

    wanted = range(1, min(most, max(1, 4 * slots // rows)) + 1)
    best = max(map(busy, wanted))
    return next(parts for parts in wanted if busy(parts) >= 0.95 * best)
