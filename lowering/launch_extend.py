"""Launches of several new tokens per row over a cache: pool, attend, append.

What depends on shapes, dtypes and settings alone is a plan, made once. A plan's grids follow from
the number of new tokens and the room in the cache: no host synchronisation.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from flasheva_compile.lowering.direct_launch import on_device
from flasheva_compile.lowering.kernel_arguments import DTYPES, rule_values, unit_stride
from flasheva_compile.lowering.launch_decode import (
    STATE_ARGUMENTS,
    exact_slots,
    is_whole,
    parts_of,
    whole,
)
from flasheva_compile.lowering.load import load
from flasheva_compile.lowering.schedule import choose
from flasheva_compile.lowering.schedule_extend import fitted
from flasheva_compile.lowering.spec import KernelSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from flasheva_compile.kernels.blocked.cache_state import CacheState
    from flasheva_compile.kernels.blocked.geometry import AttentionSettings
    from flasheva_compile.lowering.spec import Schedule
    from torch import Tensor

_LOG2E = math.log2(math.e)


class Pooling(NamedTuple):
    """The chunk rule that the kernels apply.

    Attributes:
        rule: See ``pooled_chunks.kernel_rule``.
        parameters: Of the rule; of ``eva``, none or its eight of both feature maps.
    """

    rule: str
    parameters: tuple[Tensor, ...] = ()


class _Shape(NamedTuple):
    """What a plan depends on besides the settings.

    Attributes:
        q_heads: ``Hq``.
        k: Shape of the new keys, ``[B, Hkv, L, D]``.
        value_dim: ``Dv``.
        chunks: Chunk tokens that the cache has room for.
        dtype: Of all tensors but biases and what is stored in fp8.
        device: Where they are.
        rule: Chunk rule that the kernels apply.
        parameters: How many parameters it gets.
        key_mask: Whether the new tokens have a key mask.
        fp8_chunks: Whether chunk tokens are stored in fp8.
        alibi: Whether scores get ALiBi's slopes, and positions of chunk tokens are kept.
    """

    q_heads: int
    k: torch.Size
    value_dim: int
    chunks: int
    dtype: torch.dtype
    device: torch.device
    rule: str
    parameters: int
    key_mask: bool
    fp8_chunks: bool
    alibi: bool


class _Launch(NamedTuple):
    """One kernel with its grid."""

    launch: Callable[..., None]
    programs: int
    arguments: tuple[str, ...]

    def __call__(self, values: dict[str, Any]) -> None:
        self.launch(self.programs, *[values[name] for name in self.arguments])


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What calls of one shape have in common.

    Attributes:
        pool: ``extend_pool``; None = nothing is pooled, and no row can begin with padding.
        attend: ``extend``.
        append: ``extend_append``.
        combine: ``extend_combine``.
        scratch: Numbers that the parts leave for ``extend_combine``.
        constants: Arguments that are the same in every call.
    """

    pool: _Launch | None
    attend: _Launch
    append: _Launch
    combine: _Launch
    scratch: int
    constants: dict[str, Any]


def decode(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    key_mask: Tensor | None,
    state: CacheState,
    settings: AttentionSettings,
    pooling: Pooling,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Append ``L`` tokens per row and attend from them; four launches.

    Args:
        q: Queries, ``[B, Hq, L, D]``, any strides; as ``kv``.
        kv: New keys ``[B, Hkv, L, D]`` and values ``[B, Hkv, L, Dv]``.
        key_mask: ``[B, L]`` bool; None = all valid.
        state: Contiguous tensors, written in place.
        settings: The layer's.
        pooling: How to pool the chunks that the tokens complete.
        alibi_slopes: ``[Hq]`` fp32; None = no ALiBi.

    Returns:
        ``out [B, Hq, L, Dv]`` and fp32 ``lse [B, Hq, L]``, as ``kernels/blocked/cache.py`` defines.
    """
    with on_device(q.device):
        plan, values = _prepared(q, kv, key_mask, state, settings, pooling, alibi_slopes)
        out = q.new_empty((*q.shape[:3], kv[1].shape[3]))
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        partial = q.new_empty(plan.scratch, dtype=torch.float32)
        values |= {"out_ptr": out, "lse_ptr": lse, "partial_ptr": partial}
        if plan.pool is not None:
            plan.pool(values)
        plan.attend(values)
        plan.append(values)
        plan.combine(values)  # counts the tokens, too
    return out, lse


def cache_append(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    key_mask: Tensor | None,
    state: CacheState,
    settings: AttentionSettings,
    pooling: Pooling,
) -> None:
    """Append ``L`` tokens per row: two launches and a count; see :func:`decode`."""
    with on_device(q.device):
        plan, values = _prepared(q, kv, key_mask, state, settings, pooling)
        if plan.pool is not None:
            plan.pool(values)
        plan.append(values)
        state.length.add_(kv[0].shape[2])


def _prepared(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    key_mask: Tensor | None,
    state: CacheState,
    settings: AttentionSettings,
    pooling: Pooling,
    alibi_slopes: Tensor | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """Return the plan of a call and what its kernels read."""
    assert all(x.is_contiguous() for x in state)  # kernels compute the addresses
    q, k, v = unit_stride(q), unit_stride(kv[0]), unit_stride(kv[1])
    rule, parameters = pooling
    shape = _Shape(
        q.shape[1],
        k.shape,
        v.shape[3],
        state.rfa_k.shape[2],
        k.dtype,
        k.device,
        rule,
        len(parameters),
        key_mask is not None,
        state.fp8_chunks,
        state.alibi or alibi_slopes is not None,
    )
    plan = _plan(shape, settings)
    values = {
        **plan.constants,
        **dict(zip(STATE_ARGUMENTS, state, strict=True)),
        **(rule_values(rule, parameters) if parameters else {}),
        "slopes_ptr": None if alibi_slopes is None else alibi_slopes.contiguous().float(),
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "key_mask_ptr": None if key_mask is None else key_mask.contiguous(),
    }
    values["stride_qb"], values["stride_qh"], values["stride_qm"], _ = q.stride()
    values["stride_kb"], values["stride_kh"], values["stride_kn"], _ = k.stride()
    values["stride_vb"], values["stride_vh"], values["stride_vn"], _ = v.stride()
    return plan, values


# --- plans ----------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _plan(shape: _Shape, s: AttentionSettings) -> Plan:
    spec = extend_spec(shape, s)
    schedule = fitted(choose(spec), spec, shape.k[2])
    pooling = spec if spec.window == "whole" else _with_rule(spec, shape)
    append_spec = pooling.of_kind("extend_append")
    append_schedule = choose(append_spec)
    batch, kv_heads, tokens, _ = shape.k
    rows, outputs = batch * kv_heads, batch * shape.q_heads * tokens
    slots, in_order = exact_slots(s), is_whole(shape.chunks, shape.rule, s)
    tiles = -(-tokens // (schedule.block_m // spec.group))
    splits = parts_of(schedule, rows * tiles, shape.chunks, slots + tokens)
    scale = s.scale * _LOG2E
    combine = spec.of_kind("extend_combine")
    appended = -(-(tokens if in_order else slots) // append_schedule.block_n)
    pooled = (not in_order) * -(-tokens // s.chunk_size) or int(shape.key_mask)
    return Plan(
        pool=_launch(pooling.of_kind("extend_pool"), rows * pooled) if pooled else None,
        attend=_launch(spec.of_kind("extend"), rows * tiles * splits, schedule),
        append=_launch(append_spec, rows * appended, append_schedule),
        combine=_launch(combine, outputs),
        scratch=outputs * splits * (shape.value_dim + 2),
        constants={
            "heads": kv_heads,
            "queries": tokens,
            "chunks": shape.chunks,
            "room": slots,
            "splits": splits,
            # tanh(x / softcap) is computed as a sigmoid of twice its argument.
            "score_scale": 2 * scale / s.softcap if s.softcap else scale,
            "scale": s.scale,
            "softcap": s.softcap * _LOG2E,
        },
    )


def _launch(spec: KernelSpec, programs: int, schedule: Schedule | None = None) -> _Launch:
    kernel = load(spec, schedule or choose(spec))
    return _Launch(kernel.launch, programs, kernel.generated.arguments)


def extend_spec(shape: _Shape, s: AttentionSettings) -> KernelSpec:
    """Return the spec of the ``extend`` kernel of a layer."""
    spec = KernelSpec(
        kind="extend",
        dtype=DTYPES[shape.dtype],
        head_dim=shape.k[3],
        value_dim=shape.value_dim,
        chunk_size=s.chunk_size,
        key_mask=shape.key_mask,
        group=shape.q_heads // shape.k[1],
        window_size=s.window_size,
        sink_size=s.sink_tokens,
        window=s.window,
        softcap=s.softcap > 0,
        fp8_chunks=shape.fp8_chunks,
        alibi=shape.alibi,
    )
    return whole(spec) if is_whole(shape.chunks, shape.rule, s) else spec


def _with_rule(spec: KernelSpec, shape: _Shape) -> KernelSpec:
    return dataclasses.replace(spec, chunk_rule=shape.rule, parameters=shape.parameters)
