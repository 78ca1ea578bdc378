"""Launches of generated kernels: tensors in, tensors out. Grids and arguments, nothing else."""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from flasheva_compile.lowering import first_calls, recording
from flasheva_compile.lowering.attention_spec import attention_spec, call_spec, of_kind
from flasheva_compile.lowering.direct_launch import on_device
from flasheva_compile.lowering.fitting import (
    LEAST_SCALE,
    alike,
    resident_programs,
    with_what_is_there,
)
from flasheva_compile.lowering.kernel_arguments import (
    descriptors,
    key_values,
    row_values,
    rule_values,
    strides,
    unit_stride,
)
from flasheva_compile.lowering.load import load
from flasheva_compile.lowering.partial_sums import partial_sums, reduced
from flasheva_compile.lowering.pooled_chunks import with_vectors
from flasheva_compile.lowering.schedule import choose, current_target
from flasheva_compile.lowering.spec import (
    BIAS_COLUMNS,
    NARROW,
    STATE_BLOCK,
    KernelSpec,
    pools_by_products,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from flasheva_compile.kernels.blocked.block import Operands
    from flasheva_compile.kernels.blocked.geometry import AttentionSettings
    from flasheva_compile.lowering.pooled_chunks import PooledChunks
    from flasheva_compile.lowering.rows import Rows
    from flasheva_compile.lowering.schedule_cost import Target
    from flasheva_compile.lowering.spec import Schedule
    from torch import Tensor

_LOG2E = math.log2(math.e)


def run(spec: KernelSpec, programs: Callable[[Schedule], int], values: dict[str, Any]) -> None:
    """Launch the kernel of a spec with the values that it reads."""
    if recording.specs is not None:
        recording.specs.append(spec)
        return
    device = values["k_ptr"].device
    with on_device(device):
        schedule = with_what_is_there(choose(spec), spec, values)
        count = programs(schedule)
        if not count:
            return
        kernel = load(spec, schedule)
        if schedule.tma:
            described = descriptors(kernel.generated.arguments, spec, schedule, values)
            if described is None:
                schedule = dataclasses.replace(alike(spec, schedule), tma=False)
                kernel, count = load(spec, schedule), programs(schedule)
            else:
                values = {**values, **described}
        if schedule.consumers:
            values = {**values, "items": count}
            count = min(count, resident_programs(schedule)) if schedule.persistent else count
        arguments = tuple(values[name] for name in kernel.generated.arguments)
        if not first_calls.collect(device, kernel.launch, arguments):
            kernel.launch(count, *arguments)


def reads_bias_columns(
    qkv: tuple[Tensor, Tensor, Tensor],
    s: AttentionSettings,
    rows: Rows,
    rule: str,
    *,
    sloped: bool = False,
) -> bool:
    """Whether attention to what ``rule`` is about to pool reads biases as columns of keys."""
    spec = call_spec(qkv, s, rows, rule, sloped=sloped)
    return _reads_columns(spec, {"k_ptr": qkv[1], "scale": s.scale})


def _reads_columns(spec: KernelSpec, values: dict[str, Any]) -> bool:
    return _schedule(spec, values).product_bias and values["scale"] >= LEAST_SCALE


def with_bias_columns(spec: KernelSpec, values: dict[str, Any]) -> dict[str, Any]:
    """Add the columns of biases that ``forward`` reads, if any; a launch unless pooling did it."""
    if "bias_columns_ptr" in values or not _reads_columns(spec, values):
        return values
    bias = values["rfa_bias_ptr"]
    found = {**values, "bias_columns_ptr": empty_columns(bias)}
    count = bias.numel()
    run(
        of_kind(spec, "bias_columns"),
        lambda how: -(-count // how.block_n),
        {**found, "chunks": count},
    )
    return found


def empty_columns(bias: Tensor) -> Tensor:
    """Allocate the columns of biases ``[B, Hkv, C]``: bf16 ``[B, Hkv, C, 16]``."""
    return bias.new_empty((*bias.shape, BIAS_COLUMNS), dtype=torch.bfloat16)


def _schedule(spec: KernelSpec, values: dict[str, Any]) -> Schedule:
    """Choose for the device of the tensors, which need not be the current one."""
    with on_device(values["k_ptr"].device):
        return choose(spec)


def attention_forward(
    t: Operands, rows: Rows, s: AttentionSettings, pooled: PooledChunks | None = None
) -> tuple[Tensor, Tensor]:
    """Attend; see :func:`flasheva_compile.kernels.blocked.attention.attention_forward`.

    ``pooled`` says how the chunk tokens were made, if that is known: it saves reading biases, or
    writing their columns.
    """
    batch, heads, length, _ = t.q.shape
    out = t.q.new_empty(batch, heads, length, t.v.shape[3])
    lse = t.q.new_empty((batch, heads, length), dtype=torch.float32)
    spec = attention_spec(t, s, rows, pooled)
    values = {**call_values(t, rows, s), "out_ptr": out, "lse_ptr": lse}
    if pooled is not None and pooled.bias_columns is not None:
        values["bias_columns_ptr"] = pooled.bias_columns
    run(spec, query_programs(t), with_bias_columns(spec, values))
    return out, lse


def query_programs(t: Operands) -> Callable[[Schedule], int]:
    """Count the programs of a kernel that keeps a block of queries."""
    batch, heads, length, _ = t.q.shape
    return lambda schedule: batch * heads * -(-length // schedule.block_m)


def call_values(t: Operands, rows: Rows, s: AttentionSettings) -> dict[str, Any]:
    """Return what kernels of this call may read, by argument name."""
    assert s.dropout_p < 1  # 2 ** 32 is no 32-bit threshold: the caller runs the blocked code
    q, k, v = (unit_stride(x) for x in (t.q, t.k, t.v))
    scale = s.scale * _LOG2E
    return {
        "q_ptr": q,
        **strides("q", q, "bhm"),
        **key_values(k, v),
        "rfa_k_ptr": t.rfa_k.contiguous(),
        "rfa_v_ptr": t.rfa_v.contiguous(),
        "rfa_bias_ptr": t.rfa_bias.contiguous(),
        **row_values(rows),
        "slopes_ptr": None if t.alibi_slopes is None else t.alibi_slopes.contiguous(),
        "seed_ptr": t.dropout_seed,
        "heads": q.shape[1],
        "queries": q.shape[2],
        "chunks": t.rfa_k.shape[2],
        "q_offset": s.q_offset,
        # tanh(x / softcap) is computed as a sigmoid of twice its argument.
        "score_scale": 2 * scale / s.softcap if s.softcap else scale,
        "scale": s.scale,
        "softcap": s.softcap * _LOG2E,
        "drop_below": int(s.dropout_p * 2**32),
        "keep_scale": 1 / (1 - s.dropout_p),
    }


# --- backward -------------------------------------------------------------------------------------

_PROGRAMS_IN_FLIGHT = 512  # of a row, below which queries are shared out (measured: 256 to 1024)
_QUERIES_PER_SINK_PROGRAM = 1024
_MOST_SPLITS = 64


def attention_backward(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    t: Operands,
    rows: Rows,
    s: AttentionSettings,
    pooled: PooledChunks | None = None,
) -> tuple[Tensor, ...]:
    """Differentiate :func:`attention_forward`, and with ``pooled`` the pooling in front of it.

    Three launches, one more with sinks in front of windows, for learned rules of wide heads, for
    ``eva``; no atomics, so every run gives the same bits, and a row alone the same as in a batch.

    Args:
        dout: Gradient of ``out``, ``[B, Hq, L, Dv]``.
        out: Forward result.
        lse: Forward log-sum-exp.
        t: The tensors of the call.
        rows: Their layout.
        s: Window, chunks, scale and so on.
        pooled: How the chunk tokens were made; None = they are inputs.

    Returns:
        ``dq, dk, dv``, then fp32 ``drfa_k, drfa_v, drfa_bias``, then with ``pooled`` the gradients
        of its parameters (fp32); ``dk`` and ``dv`` then include the way through the chunk tokens.
    """
    spec = attention_spec(t, s, rows, pooled)
    kv_rows = t.q.shape[0] * t.k.shape[1]
    values = backward_values(dout, out, lse, t, rows, s)
    run(of_kind(spec, "dq"), query_programs(t), values)
    grads = chunk_gradients(of_kind(spec, "dchunk"), values, kv_rows)
    values |= {"drfa_k_ptr": grads[0], "drfa_v_ptr": grads[1], "drfa_bias_ptr": grads[2]}
    if spec.sink_size and spec.documents != "packed":
        values |= sink_gradients(of_kind(spec, "dsink"), values, kv_rows)
    dk, dv, vectors = _key_gradients(of_kind(spec, "dkv"), values, kv_rows, t, pooled)
    tokens = (g.view_as(x) for g, x in zip(grads, _tokens(t), strict=True))
    return values["dq_ptr"], dk, dv, *tokens, *vectors


def backward_values(
    dout: Tensor, out: Tensor, lse: Tensor, t: Operands, rows: Rows, s: AttentionSettings
) -> dict[str, Any]:
    """Return what kernels of a backward pass may read, the gradient of queries allocated."""
    batch, heads, length, size = t.q.shape
    do = unit_stride(dout)
    blocks = -(-length // STATE_BLOCK) + 1
    states = lse.new_empty(2, batch * heads, blocks * STATE_BLOCK)
    return {
        **call_values(t, rows, s),
        "do_ptr": do,
        **strides("g", do, "bhm"),
        # Kernels compute their addresses; a compiler between the passes may have laid them out
        # anew.
        "out_ptr": out.contiguous(),
        "lse_ptr": lse.contiguous(),
        "lse2_ptr": states[0],
        "delta_ptr": states[1],
        "state_blocks": blocks,
        "dq_ptr": t.q.new_empty(batch, heads, length, size),
    }


def _tokens(t: Operands) -> tuple[Tensor, Tensor, Tensor]:
    return t.rfa_k, t.rfa_v, t.rfa_bias


def _splits(wanted: int) -> int:
    """Round down to a power of two; never by the batch, which may change no bit."""
    return 1 << max(0, min(wanted, _MOST_SPLITS).bit_length() - 1)


def chunk_splits(spec: KernelSpec, programs: int) -> int:
    """Return the splits of ``dchunk`` for its programs a row; sums take ``dq``'s bytes at most."""
    wanted = _PROGRAMS_IN_FLIGHT // programs
    return _splits(min(wanted, spec.chunk_size * spec.group // 4))


def chunk_gradients(
    spec: KernelSpec, values: dict[str, Any], kv_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run ``dchunk``: fp32 gradients of chunk tokens, rows ``B * Hkv``; they share storage."""
    schedule = _schedule(spec, values)
    chunks, like = values["chunks"], values["lse_ptr"]
    tiles = -(-chunks // schedule.block_n)
    splits = chunk_splits(spec, tiles * (values["heads"] // spec.group))
    # A bias has four columns, of which one is used: all rows begin at multiples of 16 bytes.
    rows, columns = kv_rows * chunks, (spec.head_dim, spec.value_dim, 4 - 4 * spec.whole_chunks)
    parts, begins = partial_sums(like, splits, rows, columns)
    names = ("drfa_k_ptr", "drfa_v_ptr", "drfa_bias_ptr")
    outputs = dict(zip(names, begins, strict=True)) | {"splits": splits}
    run(spec, lambda _: kv_rows * tiles * splits, values | outputs)
    dk, dv, dbias = reduced(parts, rows, columns)
    dbias = like.new_zeros(rows) if spec.whole_chunks else dbias[:rows]
    k, v, bias = (x.view(kv_rows, chunks, -1) for x in (dk, dv, dbias))
    return k, v, bias[..., 0]


def sink_gradients(spec: KernelSpec, values: dict[str, Any], kv_rows: int) -> dict[str, Tensor]:
    """Run ``dsink``: fp32 gradients of sinks, as values for ``dkv``."""
    like, sinks = values["lse_ptr"], spec.sink_size
    tiles = -(-sinks // _schedule(spec, values).block_n)
    splits = _splits(values["queries"] * spec.group // _QUERIES_PER_SINK_PROGRAM)
    rows, columns = kv_rows * sinks, (spec.head_dim, spec.value_dim)
    parts, (dk, dv) = partial_sums(like, splits, rows, columns)
    outputs = {"dk_sink_ptr": dk, "dv_sink_ptr": dv, "splits": splits}
    run(spec, lambda _: kv_rows * tiles * splits, values | outputs)
    return dict(zip(("dk_sink_ptr", "dv_sink_ptr"), reduced(parts, rows, columns), strict=True))


def _key_gradients(
    spec: KernelSpec,
    values: dict[str, Any],
    kv_rows: int,
    t: Operands,
    pooled: PooledChunks | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    dk, dv = (x.new_empty(x.shape) for x in (t.k, t.v))
    values = values | {"dk_ptr": dk, "dv_ptr": dv}
    if pooled is None:
        run_over_keys(spec, values, kv_rows)
        return dk, dv, ()
    pooled = with_vectors(pooled, t.k)
    whole = pooling_spec(spec, pooled)
    with on_device(dk.device):
        fuses = fuses_pooling(whole, current_target())
    if not fuses:
        run_over_keys(spec, values, kv_rows)
        whole = dataclasses.replace(of_kind(whole, "dpool"), accumulate=True)
        values = values | {"heads": t.k.shape[1]}  # pooling knows only heads of keys
    return dk, dv, run_over_keys(whole, values, kv_rows, pooled)


def fuses_pooling(spec: KernelSpec, target: Target) -> bool:
    """Whether ``dkv`` also does the gradient of pooling, or ``dpool`` adds it.

    Weights that depend on keys take four more tiles of registers, which wide heads do not have, or
    products with few rows, which spill where no warpgroup multiplies from shared memory.
    """
    size = max(spec.head_dim, spec.value_dim)
    measured = target.capability == 90 and size <= 128
    few = spec.chunk_rule == "mean" or size <= NARROW
    return few or (pools_by_products(spec) and measured)


def run_over_keys(
    spec: KernelSpec,
    values: dict[str, Any],
    kv_rows: int,
    pooled: PooledChunks | None = None,
) -> tuple[Tensor, ...]:
    """Run ``dkv`` or ``dpool``; return fp32 gradients of the rule's vectors or features."""
    tiles = -(-values["columns"] // _schedule(spec, values).block_n)
    if pooled is None:
        run(spec, lambda _: kv_rows * tiles, values)
        return ()
    pool_values, vectors = _pool_values(pooled, kv_rows, tiles, values["rfa_bias_ptr"], spec)
    values = values | pool_values
    run(spec, lambda _: kv_rows * tiles, values)
    if pooled.rule == "eva":
        return _feature_gradients(of_kind(spec, "domega"), values, kv_rows)
    return _vector_sums(vectors, values["k_ptr"].shape[0])


def _feature_gradients(
    spec: KernelSpec, values: dict[str, Any], kv_rows: int
) -> tuple[Tensor, Tensor]:
    """Run ``domega``: gradients of what the ``eva`` rule gets, ``rfa_k`` and ``omega``."""
    omega, bias = values["omega_ptr"], values["rfa_bias_ptr"]
    domega = bias.new_empty(omega.shape)
    values = values | {"heads": omega.shape[1], "domega_ptr": domega}
    run(spec, lambda schedule: kv_rows * -(-omega.shape[2] // schedule.block_n), values)
    exists = (bias > -math.inf).unsqueeze(-1)  # elsewhere the forward pass wrote zeros
    return torch.where(exists, values["drfa_k_ptr"].view(omega.shape), 0), domega


# --- pooling --------------------------------------------------------------------------------------


def pooling_spec(spec: KernelSpec, pooled: PooledChunks) -> KernelSpec:
    """Return a spec with the gradient of pooling added."""
    count = 0 if pooled.rule == "eva" else len(pooled.parameters)
    return _with_rule(spec, pooled.rule, count)


@lru_cache(maxsize=1024)
def _with_rule(spec: KernelSpec, rule: str, count: int) -> KernelSpec:
    return dataclasses.replace(spec, chunk_rule=rule, parameters=count)


def _pool_values(
    pooled: PooledChunks, kv_rows: int, tiles: int, like: Tensor, spec: KernelSpec
) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    count = {"mean": 0, "tangent": 1, "evabyte": 2, "eva": 0}[pooled.rule]
    vectors = tuple(like.new_empty(kv_rows, tiles, spec.head_dim) for _ in range(count))
    masses = (x if x is None else x.contiguous() for x in (pooled.mass_k, pooled.mass_v))
    values: dict[str, Any] = dict(zip(("mass_k_ptr", "mass_v_ptr"), masses, strict=True))
    values |= dict(zip(("dphi_ptr", "dp_ptr"), vectors, strict=False))
    return values | rule_values(pooled.rule, pooled.parameters), vectors


def _vector_sums(vectors: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    """Add the parts of head vectors, ``[B * Hkv, tiles, D]``, to ``[Hkv, D]``."""
    return tuple(x.view(batch, -1, *x.shape[1:]).sum((0, 2)) for x in vectors)
