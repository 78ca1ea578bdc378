"""Launches of one step of generation: attend from one new token per row to a cache, and append it.

This runs once per layer and token, so that its time on the host counts. What depends on shapes,
dtypes and settings alone is a plan, made once.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from flasheva_compile.kernels.blocked.cache_state import ring_size
from flasheva_compile.lowering.direct_launch import on_device
from flasheva_compile.lowering.kernel_arguments import DTYPES, rule_values, unit_stride
from flasheva_compile.lowering.load import load
from flasheva_compile.lowering.schedule import choose, current_target
from flasheva_compile.lowering.spec import NARROW, KernelSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from flasheva_compile.kernels.blocked.cache_state import CacheState
    from flasheva_compile.kernels.blocked.geometry import AttentionSettings
    from flasheva_compile.lowering.spec import Schedule
    from torch import Tensor

STATE_ARGUMENTS = (
    *("exact_k_ptr", "exact_v_ptr", "exact_mask_ptr", "rfa_k_ptr", "rfa_v_ptr", "rfa_bias_ptr"),
    *("rfa_exponents_ptr", "chunk_mean_ptr"),  # of fp8, of ALiBi alone
    *("open_q_ptr", "row_start_ptr", "length_ptr"),  # open_q is of the rule eva alone
)
"""Names of the arguments that the fields of ``CacheState`` are, in order."""

_is_contiguous = torch.Tensor.is_contiguous
_LOG2E = math.log2(math.e)
_TILE_COST = 20  # of a tile that a part reads, where adding a part up costs 1 (measured: 10 to 20)
_TILES_PER_LONG_PART = 32  # more parts than fill the device must not cost what they leave behind
_OCCUPIED = 0.9
_MOST_PARTS = 128
_FEW_ROWS = 64  # and key heads


class StepShape(NamedTuple):
    """What a plan depends on besides the settings.

    Attributes:
        q: Shape of the queries, ``[B, Hq, 1, D]``.
        v: Shape of the new values, ``[B, Hkv, 1, Dv]``.
        chunks: Chunk tokens that the cache has room for.
        dtype: Of all tensors but biases and what is stored in fp8.
        device: Where they are.
        rule: Chunk rule of the kernel.
        parameters: How many parameters it gets.
        key_mask: Whether the new tokens have a key mask.
        fp8_chunks: Whether chunk tokens are stored in fp8.
        alibi: Whether scores get ALiBi's slopes.
    """

    q: torch.Size
    v: torch.Size
    chunks: int
    dtype: torch.dtype
    device: torch.device
    rule: str
    parameters: int
    key_mask: bool
    fp8_chunks: bool = False
    alibi: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What all steps of a layer have in common.

    Attributes:
        programs: Programs of ``decode``.
        heads: Programs of ``decode_combine``: one per row and query head.
        scratch: Numbers that the parts leave for ``decode_combine``.
        decode: Launches ``decode`` with its arguments.
        decode_arguments: Their names, in order.
        combine: Launches ``decode_combine``.
        combine_arguments: The names of its arguments.
        constants: Arguments that are the same in every step.
    """

    programs: int
    heads: int
    scratch: int
    decode: Callable[..., None]
    decode_arguments: tuple[str, ...]
    combine: Callable[..., None]
    combine_arguments: tuple[str, ...]
    constants: dict[str, Any]


def decode(  # noqa: PLR0913 - the arguments of the op
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    parameters: tuple[Tensor, ...],
    state: CacheState,
    settings: AttentionSettings,
    rule: str,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Append one token per row and attend from it.

    Two launches, no host synchronisation, and the same grid at every length: a captured CUDA graph
    stays valid.

    Args:
        q: Queries, ``[B, Hq, 1, D]``, any strides; as ``k`` and ``v``.
        k: New keys, ``[B, Hkv, 1, D]``.
        v: New values, ``[B, Hkv, 1, Dv]``.
        key_mask: ``[B, 1]`` bool; None = all valid.
        parameters: Of the chunk rule; of ``eva``, none or its eight of both feature maps.
        state: Contiguous tensors, written in place.
        settings: The layer's.
        rule: Chunk rule of the kernel (see ``pooled_chunks.kernel_rule``).
        alibi_slopes: ``[Hq]`` fp32; None = no ALiBi.

    Returns:
        ``out [B, Hq, 1, Dv]`` and fp32 ``lse [B, Hq, 1]``, as ``kernels/blocked/cache.py`` defines.
    """
    assert all(map(_is_contiguous, state))  # kernels compute the addresses
    device, count, chunks = q.device, len(parameters), state.rfa_k.shape[2]
    kinds = key_mask is not None, state.fp8_chunks, alibi_slopes is not None
    shape = StepShape(q.shape, v.shape, chunks, q.dtype, device, rule, count, *kinds)
    with on_device(device):
        plan = _plan(shape, settings)
        q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
        batch, heads = q.shape[:2]
        out = q.new_empty((batch, heads, 1, v.shape[3]))
        lse = q.new_empty((batch, heads, 1), dtype=torch.float32)
        values = {
            **plan.constants,
            **dict(zip(STATE_ARGUMENTS, state, strict=True)),
            **(rule_values(rule, parameters) if parameters else {}),
            "slopes_ptr": None if alibi_slopes is None else alibi_slopes.contiguous().float(),
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "partial_ptr": q.new_empty(plan.scratch, dtype=torch.float32),
            "out_ptr": out,
            "lse_ptr": lse,
        }
        values["stride_qb"], values["stride_qh"], _, _ = q.stride()
        values["stride_kb"], values["stride_kh"], _, _ = k.stride()
        values["stride_vb"], values["stride_vh"], _, _ = v.stride()
        if key_mask is not None:
            values["key_mask_ptr"], values["stride_mask"] = key_mask, key_mask.stride(0)
        plan.decode(plan.programs, *[values[name] for name in plan.decode_arguments])
        plan.combine(plan.heads, *[values[name] for name in plan.combine_arguments])
    return out, lse


# --- plans ----------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _plan(shape: StepShape, s: AttentionSettings) -> Plan:
    """Generate and load the kernels; schedules are those of the first step of such a layer."""
    spec = decode_spec(shape, s)
    schedule, combine_spec = choose(spec), spec.of_kind("decode_combine")
    rows, heads = shape.v[0] * shape.v[1], shape.q[0] * shape.q[1]
    added = choose(combine_spec)
    # Where programs are many, those that wait are in the way of those that read (measured).
    added = dataclasses.replace(added, dependent=added.dependent and rows <= _FEW_ROWS)
    kernel, combine = load(spec, schedule), load(combine_spec, added)
    slots = exact_slots(s)
    splits = parts_of(schedule, rows, shape.chunks, slots, _held(spec))
    scale = s.scale * _LOG2E
    return Plan(
        programs=rows * splits,
        heads=heads,
        scratch=heads * splits * (shape.v[3] + 2),
        decode=kernel.launch,
        decode_arguments=kernel.generated.arguments,
        combine=combine.launch,
        combine_arguments=combine.generated.arguments,
        constants={
            "heads": shape.v[1],
            "chunks": shape.chunks,
            "room": slots,
            "splits": splits,
            # tanh(x / softcap) is computed as a sigmoid of twice its argument.
            "score_scale": 2 * scale / s.softcap if s.softcap else scale,
            "scale": s.scale,
            "softcap": s.softcap * _LOG2E,
        },
    )


def decode_spec(shape: StepShape, s: AttentionSettings) -> KernelSpec:
    """Return the spec of the ``decode`` kernel of a layer."""
    assert shape.q[2] == 1  # longer calls run the blocked code
    spec = KernelSpec(
        kind="decode",
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
        fp8_chunks=shape.fp8_chunks,
        alibi=shape.alibi,
    )
    return whole(spec) if is_whole(shape.chunks, shape.rule, s) else spec


def exact_slots(s: AttentionSettings) -> int:
    """Return the exact slots of a row and key head."""
    return s.sink_tokens + ring_size(s)


def is_whole(chunks: int, rule: str, s: AttentionSettings) -> bool:
    """Whether tokens see every token so far: a first block that no room for chunk tokens follows.

    A row that leaves it is lost, whatever its chunks are. ``eva`` keeps its queries all the same.
    """
    return chunks == 0 and rule != "eva" and s.window == "block" and s.sink_tokens == 0


def whole(spec: KernelSpec) -> KernelSpec:
    """Return the spec of such a cache, whose slots are no part of the kernel."""
    return dataclasses.replace(
        spec,
        window="whole",
        window_size=0,
        chunk_size=1,
        chunk_rule=None,
        parameters=0,
        fp8_chunks=False,
    )


def parts_of(
    schedule: Schedule, rows: int, chunks: int, slots: int, held: tuple[int, ...] = (2,)
) -> int:
    """Return into how many parts the cache of a row and head is split.

    It follows from the room in the cache, not from what is in it, so that a captured graph with
    its fixed grid stays valid; parts that turn out to be empty end at once.

    Args:
        schedule: Of the kernel that attends.
        rows: Rows times key heads.
        chunks: Chunk tokens that the cache has room for.
        slots: Its exact slots.
        held: Programs of four warps that a multiprocessor gets, best first.
    """
    tiles = -(-chunks // schedule.block_n) - (-slots // schedule.block_n)
    most = max(1, min(_filling(schedule, max(1, rows), tiles, held), tiles, _MOST_PARTS))
    # With rows to spare there is room for parts of few tiles, but each part has to be added up.
    return min(range(1, most + 1), key=lambda n: _TILE_COST * -(-tiles // n) + n)


def _held(spec: KernelSpec) -> tuple[int, ...]:
    """Return how many programs of four warps to give a multiprocessor; narrow heads leave room."""
    narrow = max(spec.head_dim, spec.value_dim) <= NARROW and spec.dtype != "fp32"
    return (3, 4) if narrow and not spec.fp8_chunks else (2,)


def _filling(schedule: Schedule, rows: int, tiles: int, held: tuple[int, ...]) -> int:
    """Return how many parts fill the device: evenly, since the last program ends the step."""
    capacities = [
        programs * max(1, 4 // schedule.num_warps) * current_target().multiprocessors
        for programs in held
    ]

    def occupied(splits: int, capacity: int) -> float:
        """Return which share of the device is busy while all programs run."""
        waves = rows * splits / capacity
        return waves / math.ceil(waves)

    for capacity in capacities:
        if capacity >= rows and occupied(capacity // rows, capacity) >= _OCCUPIED:
            return capacity // rows
    # Long parts of rows that do not fill the device evenly leave it idle at the end.
    capacity = capacities[0]
    fewest = max(1, capacity // rows)
    tried = range(fewest, max(fewest, tiles // _TILES_PER_LONG_PART) + 1)
    known = ((n, occupied(n, capacity)) for n in tried)
    found = [n for n, share in known if share >= _OCCUPIED]
    return found[0] if found else max(tried, key=lambda n: occupied(n, capacity))
