"""Launches of one step of generation with retrieval: append, select, attend.

As in :mod:`launch_decode`: what depends on shapes, dtypes and settings alone is a plan, made once.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from flasheva_compile.lowering.emit.retrieval_decode_select import RUN
from flasheva_compile.lowering.kernel_arguments import DTYPES, rule_values, unit_stride
from flasheva_compile.lowering.launch_decode import on_device, parts_of
from flasheva_compile.lowering.load import load
from flasheva_compile.lowering.schedule import choose
from flasheva_compile.lowering.schedule_retrieval_decode import fitted
from flasheva_compile.lowering.spec import KernelSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from flasheva_compile.kernels.blocked.geometry import AttentionSettings
    from flasheva_compile.kernels.blocked.retrieval_state import RetrievalState
    from flasheva_compile.lowering.load import LoadedKernel
    from torch import Tensor

MOST_CHUNKS = 64
"""Chunks that the sorting networks can keep."""

_STATE_ARGUMENTS = (
    *("exact_k_ptr", "exact_v_ptr", "exact_mask_ptr", "rfa_k_ptr", "rfa_v_ptr", "rfa_bias_ptr"),
    # Every query selects for itself: no open block's selection.
    *("none", "bounds_ptr", "near_k_ptr", "near_v_ptr", "exponents_ptr"),
    *("row_start_ptr", "length_ptr"),
)
"""Names of the arguments that the fields of ``RetrievalState`` are, in order."""
_CODES = ("key_codes_ptr", "value_codes_ptr")
"""Names of the first two in fp8."""

_is_contiguous = torch.Tensor.is_contiguous
_LOG2E = math.log2(math.e)


class _Shape(NamedTuple):
    """What a plan depends on besides the settings.

    Attributes:
        q: Shape of the queries, ``[B, Hq, 1, D]``.
        v: Shape of the new values, ``[B, Hkv, 1, Dv]``.
        columns: Tokens that the cache has room for.
        chunks: Chunk tokens that it has room for.
        retrieved: Chunks to retrieve.
        by_bounds: Whether their bounds select.
        weighted: Whether the bounds have weights.
        near_store: Whether sinks and window have copies.
        fp8_store: Whether the store holds fp8.
        dtype: Of all tensors but biases and fp8.
        device: Where they are.
        rule: Chunk rule of the kernels.
        parameters: How many parameters it gets.
        key_mask: Whether the new tokens have a key mask.
    """

    q: torch.Size
    v: torch.Size
    columns: int
    chunks: int
    retrieved: int
    by_bounds: bool
    weighted: bool
    near_store: bool
    fp8_store: bool
    dtype: torch.dtype
    device: torch.device
    rule: str
    parameters: int
    key_mask: bool


@dataclass(frozen=True, slots=True)
class _Launch:
    """One kernel: its programs, the names of its arguments, and what only it gets."""

    launch: Callable[..., None]
    programs: int
    names: tuple[str, ...]
    own: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What all steps of a layer have in common.

    Attributes:
        launches: In order.
        constants: Arguments that are the same in every step.
        scores: Chunk scores, one per query head and chunk [numbers].
        selectors: Chunk scores by bounds, one per key head and chunk [numbers]; 0 = no bounds.
        runs: Best scores of runs of chunks [numbers].
        partial: What the parts leave for ``decode_combine`` [numbers].
    """

    launches: tuple[_Launch, ...]
    constants: dict[str, Any]
    scores: int
    selectors: int
    runs: int
    partial: int


def covers(state: RetrievalState, chunks: int) -> bool:
    """Whether the kernels can retrieve so many chunks; with more, the blocked code runs."""
    return min(chunks, state.rfa_k.shape[2]) <= MOST_CHUNKS


def retrieval_decode(  # noqa: PLR0913 - the arguments of the op
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    parameters: tuple[Tensor, ...],
    state: RetrievalState,
    settings: AttentionSettings,
    rule: str,
    chunks: int,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Append one token per row, select its chunks and attend from it.

    Four launches, no host synchronisation, and the same grids at every length: a captured CUDA
    graph stays valid.

    Args:
        q: Queries, ``[B, Hq, 1, D]``, any strides; as ``k`` and ``v``.
        k: New keys, ``[B, Hkv, 1, D]``.
        v: New values, ``[B, Hkv, 1, Dv]``.
        key_mask: ``[B, 1]`` bool; None = all valid.
        parameters: Of the chunk rule.
        state: Contiguous tensors, written in place; its bounds select, if it has any.
        settings: The layer's.
        rule: Chunk rule of the kernel (see ``pooled_chunks.kernel_rule``), any but ``eva``.
        chunks: Chunks to attend exactly; see :func:`covers`.
        weight: Contiguous weights of the bounds, ``[Hkv, 3, D]``; None = 1/2 each.

    Returns:
        ``out [B, Hq, 1, Dv]`` and fp32 ``lse [B, Hq, 1]`` (see ``kernels/blocked``), and the
        selection ``[B, Hkv, min(chunks, C)]`` int32 in ascending order, then -1.
    """
    assert all(map(_is_contiguous, state))  # kernels compute the addresses
    columns, room, device = state.mask.shape[1], state.rfa_k.shape[2], q.device
    count, by_bounds, weighted = min(chunks, room), state.bounds.shape[2] > 0, weight is not None
    stored = (count, by_bounds, weighted, state.is_near, state.is_fp8)
    made_of = (*stored, q.dtype, device, rule, len(parameters), key_mask is not None)
    with on_device(device):
        plan = _plan(_Shape(q.shape, v.shape, columns, room, *made_of), settings)
        q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
        out = q.new_empty((*q.shape[:3], v.shape[3]))
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        selected = q.new_empty((*k.shape[:2], count), dtype=torch.int32)
        values = plan.constants | {
            **dict(zip((*_STATE_ARGUMENTS, *_CODES), (*state, *state[:2]), strict=True)),
            **(rule_values(rule, parameters) if parameters else {}),
            **_call_values((q, k, v), key_mask, weight),
            "scores_ptr": q.new_empty(plan.scores, dtype=torch.float32),
            "selector_ptr": q.new_empty(plan.selectors, dtype=torch.float32),
            "peaks_ptr": q.new_empty(plan.runs, dtype=torch.int32),
            "selected_ptr": selected,
            "partial_ptr": q.new_empty(plan.partial, dtype=torch.float32),
            "out_ptr": out,
            "lse_ptr": lse,
        }
        for step in plan.launches:
            of_step = values | step.own
            step.launch(step.programs, *[of_step[name] for name in step.names])
    return out, lse, selected


def _call_values(
    qkv: tuple[Tensor, Tensor, Tensor], key_mask: Tensor | None, weight: Tensor | None
) -> dict[str, Any]:
    q, k, v = qkv
    values: dict[str, Any] = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "selector_weight_ptr": weight}
    values["stride_qb"], values["stride_qh"], _, _ = q.stride()
    values["stride_kb"], values["stride_kh"], _, _ = k.stride()
    values["stride_vb"], values["stride_vh"], _, _ = v.stride()
    if key_mask is not None:
        values["key_mask_ptr"], values["stride_mask"] = key_mask, key_mask.stride(0)
    return values


# --- plans ----------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _plan(shape: _Shape, s: AttentionSettings) -> _Plan:
    """Generate and load the kernels; schedules are those of the first step of such a layer."""
    spec = scores_spec(shape, s)
    schedule = choose(spec)
    rows, heads = shape.v[0] * shape.v[1], shape.q[0] * shape.q[1]
    tiles = -(-shape.chunks // schedule.block_n)
    runs = tiles * (schedule.block_n // RUN)
    select, attend = spec.of_kind("retrieval_select"), spec.of_kind("retrieval_decode")
    near = shape.retrieved * s.chunk_size + s.sink_tokens + s.window_size + s.chunk_size
    splits = parts_of(choose(attend), rows, shape.chunks, near)
    combine = spec.of_kind("decode_combine")
    # What gathers would be placed unevenly beside programs that wait: one launch after the other.
    added = dataclasses.replace(choose(combine), dependent=False)
    scale = s.scale * _LOG2E
    return _Plan(
        launches=(
            _launch(load(spec, schedule), rows * tiles, splits=tiles),
            _launch(load(select, fitted(choose(select), runs)), rows),
            _launch(load(attend, choose(attend)), rows * splits, splits=splits),
            _launch(load(combine, added), heads, splits=splits),
        ),
        constants={
            "heads": shape.v[1],
            "columns": shape.columns,
            "chunks": shape.chunks,
            "runs": runs,
            # tanh(x / softcap) is computed as a sigmoid of twice its argument.
            "score_scale": 2 * scale / s.softcap if s.softcap else scale,
            "scale": s.scale,
            "softcap": s.softcap * _LOG2E,
        },
        scores=heads * shape.chunks,
        selectors=rows * shape.chunks if shape.by_bounds else 0,
        runs=rows * runs,
        partial=heads * splits * (shape.v[3] + 2),
    )


def _launch(kernel: LoadedKernel, programs: int, **own: int) -> _Launch:
    return _Launch(kernel.launch, programs, kernel.generated.arguments, own)


def scores_spec(shape: _Shape, s: AttentionSettings) -> KernelSpec:
    """Return the spec of the ``retrieval_scores`` kernel of a layer."""
    assert shape.q[2] == 1  # longer calls run the blocked code
    assert shape.rule != "eva"  # its chunks need mean queries, which no state keeps
    assert shape.retrieved <= MOST_CHUNKS  # see covers
    return KernelSpec(
        kind="retrieval_scores",
        dtype=DTYPES[shape.dtype],
        head_dim=shape.q[3],
        value_dim=shape.v[3],
        chunk_size=s.chunk_size,
        key_mask=shape.key_mask,
        group=shape.q[1] // shape.v[1],
        window_size=s.window_size,
        sink_size=s.sink_tokens,
        window=s.window,
        softcap=s.softcap > 0,
        chunk_rule=shape.rule,
        parameters=shape.parameters,
        retrieve_chunks=shape.retrieved,
        by_bounds=shape.by_bounds,
        weighted_bounds=shape.weighted,
        near_store=shape.near_store,
        fp8_store=shape.fp8_store,
    )
