"""Launches of generated kernels: tensors in, tensors out. Grids and arguments, nothing else."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from flasheva_compile.lowering.load import load
from flasheva_compile.lowering.schedule import choose
from flasheva_compile.lowering.spec import KernelSpec, parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from flasheva_compile.kernels.blocked.block import Operands
    from flasheva_compile.kernels.blocked.geometry import AttentionSettings
    from flasheva_compile.lowering.rows import Rows
    from flasheva_compile.lowering.spec import Schedule
    from torch import Tensor

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""Dtypes that kernels compute in."""

_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class PooledChunks:
    """How the chunk tokens of a call were made, for the gradient of pooling.

    Attributes:
        rule: ``"mean"``, ``"tangent"``, ``"evabyte"`` or ``"eva"``.
        parameters: The rule's parameters.
        mass_k: ``[B, Hkv, C]`` fp32, log-mass of the softmax over keys; None for ``mean``.
        mass_v: The same of the softmax over values, where it is another.
    """

    rule: str
    parameters: tuple[Tensor, ...] = ()
    mass_k: Tensor | None = None
    mass_v: Tensor | None = None


def kernel_rule(rule: str, parameters: tuple[Tensor, ...] | list[Tensor]) -> str:
    """Return the rule that a kernel implements: without parameters ``tangent`` is ``mean``."""
    return "mean" if rule == "tangent" and not parameters else rule


def kept_masses(rule: str) -> tuple[bool, bool]:
    """Return which log-masses pooling keeps: of the keys' weights, of the values' own."""
    kept = {"mean": (False, False), "tangent": (True, False), "evabyte": (True, True)}
    return kept.get(rule, (False, True))


def unit_stride(x: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous, as kernels read it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def attention_spec(
    t: Operands, s: AttentionSettings, rows: Rows, pooled: PooledChunks | None
) -> KernelSpec:
    """Return the spec of the ``forward`` kernel of a call."""
    inside = s.q_offset >= 0 and s.q_offset + t.q.shape[2] <= t.k.shape[2]
    mean = pooled is not None and pooled.rule == "mean"
    return KernelSpec(
        kind="forward",
        dtype=DTYPES[t.q.dtype],
        head_dim=t.q.shape[3],
        value_dim=t.v.shape[3],
        chunk_size=s.chunk_size,
        documents=rows.documents,
        key_mask=rows.valid is not None,
        group=t.q.shape[1] // t.k.shape[1],
        window_size=s.window_size,
        sink_size=s.sink_tokens,
        window=s.window,
        causal=s.causal,
        softcap=s.softcap > 0,
        alibi=t.alibi_slopes is not None,
        dropout=s.dropout_p > 0,
        negative_scale=s.scale <= 0,
        tf32=t.q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest",
        whole_chunks=mean and inside and s.causal and rows.documents == "dense",
    )


def run(spec: KernelSpec, programs: Callable[[Schedule], int], values: dict[str, Any]) -> None:
    """Launch the kernel of a spec with the values that it reads."""
    schedule = choose(spec)
    if schedule.tma and not all(describable(values[name]) for name in TILES[spec.kind]):
        schedule = dataclasses.replace(schedule, tma=False)
    kernel = load(spec, schedule)
    count = programs(schedule)
    if count:
        described = descriptors(kernel.generated.arguments, spec, schedule, values)
        values = values | described
        kernel.launch(count, *[values[name] for name in kernel.generated.arguments])


TILES = {
    "forward": ("k_ptr", "v_ptr", "rfa_k_ptr", "rfa_v_ptr"),
    "dq": ("k_ptr", "v_ptr", "rfa_k_ptr", "rfa_v_ptr"),
    **dict.fromkeys(("dchunk", "dsink", "dkv"), ("q_ptr", "do_ptr")),
}
"""Tensors that a kernel's loops read in tiles."""


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can describe ``[B, H, rows, D]``: 16-byte strides, no expansion."""
    strides = [n for size, n in zip(x.shape, x.stride(), strict=True) if size > 1][:-1]
    aligned = all(n > 0 and n * x.element_size() % 16 == 0 for n in strides)
    return aligned and x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and 0 not in x.shape


def descriptors(
    arguments: tuple[str, ...], spec: KernelSpec, schedule: Schedule, values: dict[str, Any]
) -> dict[str, Any]:
    """Describe the tensors whose tiles the kernel fetches."""
    names = [name for name in arguments if "_desc" in name]
    if not names:
        return {}
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows = schedule.block_n if spec.kind in ("forward", "dq") else schedule.block_m
    result = {}
    for name in names:
        tensor, part = name.split("_desc")
        x = values[f"{tensor}_ptr"]
        _, size = parts(x.shape[3])[int(part)]
        result[name] = TensorDescriptor(x, list(x.shape), _full_strides(x), [1, 1, rows, size])
    return result


def _full_strides(x: Tensor) -> list[int]:
    """Return the strides, with harmless ones for dimensions of size 1."""
    contiguous = [math.prod(x.shape[n + 1 :]) for n in range(4)]
    plain = math.prod(x.shape) * 8  # a multiple of 16 bytes for every dtype and head dimension
    strides = zip(x.shape, x.stride(), contiguous, strict=True)
    return [stride if size > 1 else (plain if n else 1) for size, stride, n in strides][:3] + [1]


def attention_forward(
    t: Operands, rows: Rows, s: AttentionSettings, pooled: PooledChunks | None = None
) -> tuple[Tensor, Tensor]:
    """Attend; see :func:`flasheva_compile.kernels.blocked.attention.attention_forward`.

    ``pooled`` says how the chunk tokens were made, if that is known: it saves reading biases.
    """
    batch, heads, length, _ = t.q.shape
    out = t.q.new_empty(batch, heads, length, t.v.shape[3])
    lse = t.q.new_empty((batch, heads, length), dtype=torch.float32)
    values = {**_values(t, rows, s), "out_ptr": out, "lse_ptr": lse}
    run(attention_spec(t, s, rows, pooled), _query_programs(t), values)
    return out, lse


def _query_programs(t: Operands) -> Callable[[Schedule], int]:
    batch, heads, length, _ = t.q.shape
    return lambda schedule: batch * heads * -(-length // schedule.block_m)


def _values(t: Operands, rows: Rows, s: AttentionSettings) -> dict[str, Any]:
    """Return what kernels of this call may read, by argument name."""
    q, k, v = (unit_stride(x) for x in (t.q, t.k, t.v))
    scale = s.scale * _LOG2E
    return {
        "q_ptr": q,
        **_strides("q", q, "bhm"),
        **key_values(k, v),
        "rfa_k_ptr": t.rfa_k.contiguous(),
        "rfa_v_ptr": t.rfa_v.contiguous(),
        "rfa_bias_ptr": t.rfa_bias.contiguous(),
        **row_values(rows),
        "slopes_ptr": t.alibi_slopes,
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
        "keep_scale": 1 / (1 - s.dropout_p) if s.dropout_p < 1 else 1.0,
    }


def _strides(letter: str, x: Tensor, dims: str) -> dict[str, int]:
    return {f"stride_{letter}{dim}": x.stride(n) for n, dim in enumerate(dims)}


def key_values(k: Tensor, v: Tensor) -> dict[str, Any]:
    """Return keys and values with their strides."""
    values = {"k_ptr": k, "v_ptr": v, "columns": k.shape[2]}
    return values | _strides("k", k, "bhn") | _strides("v", v, "bhn")


def row_values(rows: Rows) -> dict[str, Any]:
    """Return the layout of the rows."""
    mean = rows.chunk_mean
    return {
        "valid_ptr": None if rows.valid is None else rows.valid.view(torch.uint8),
        "start_ptr": rows.start,
        "stop_ptr": rows.stop,
        "begin_ptr": rows.begin,
        "end_ptr": rows.end,
        "chunk_first_ptr": rows.chunk_first,
        "chunk_mean_ptr": mean,
        "stride_mean": mean.stride(0) if mean is not None and mean.shape[0] > 1 else 0,
    }


# --- backward -------------------------------------------------------------------------------------

_TILES_IN_FLIGHT = 32  # resident tiles a head below which their queries are shared out
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

    Three launches, four with sinks in front of windows; no atomics, so every run gives the same
    bits, and a row alone the same as in a batch.

    Args:
        dout: Gradient of ``out``, ``[B, Hq, L, Dv]``.
        out: Forward result, contiguous.
        lse: Forward log-sum-exp.
        t: The tensors of the call.
        rows: Their layout.
        s: Window, chunks, scale and so on.
        pooled: How the chunk tokens were made; None = they are inputs.

    Returns:
        ``dq, dk, dv``, then fp32 ``drfa_k, drfa_v, drfa_bias``, then with ``pooled`` the gradients
        of its head vectors (fp32); ``dk`` and ``dv`` then include the way through the chunk tokens.
    """
    spec = attention_spec(t, s, rows, pooled)
    batch, heads, length, size = t.q.shape
    kv_rows = batch * t.k.shape[1]
    do = unit_stride(dout)
    values = _values(t, rows, s) | {"do_ptr": do, "out_ptr": out, "lse_ptr": lse}
    values |= _strides("g", do, "bhm")
    dq = t.q.new_empty(batch, heads, length, size)
    states = {"lse2_ptr": torch.empty_like(lse), "delta_ptr": torch.empty_like(lse)}
    values |= states | {"dq_ptr": dq}
    run(spec.of_kind("dq"), _query_programs(t), values)
    grads = _chunk_gradients(spec.of_kind("dchunk"), values, kv_rows)
    values |= {"drfa_k_ptr": grads[0], "drfa_v_ptr": grads[1], "drfa_bias_ptr": grads[2]}
    if spec.sink_size and spec.documents != "packed":
        values |= _sink_gradients(spec.of_kind("dsink"), values, kv_rows)
    dk, dv, vectors = _key_gradients(spec.of_kind("dkv"), values, kv_rows, t, pooled)
    return dq, dk, dv, *(g.view_as(x) for g, x in zip(grads, _tokens(t), strict=True)), *vectors


def _tokens(t: Operands) -> tuple[Tensor, Tensor, Tensor]:
    return t.rfa_k, t.rfa_v, t.rfa_bias


def _splits(wanted: int) -> int:
    """Round down to a power of two; lengths alone decide, so that batches change no bit."""
    return 1 << max(0, min(wanted, _MOST_SPLITS).bit_length() - 1)


def _partial_sums(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x[0] if x.shape[0] == 1 else x.sum(0) for x in parts)


def _chunk_gradients(
    spec: KernelSpec, values: dict[str, Any], kv_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    schedule = choose(spec)
    chunks, like = values["chunks"], values["lse_ptr"]
    tiles = -(-chunks // schedule.block_n)
    splits = _splits(_TILES_IN_FLIGHT // tiles)
    dims = (spec.head_dim, spec.value_dim)
    sums = [like.new_empty(splits, kv_rows, chunks, dim) for dim in dims]
    sums.append((like.new_zeros if spec.whole_chunks else like.new_empty)(splits, kv_rows, chunks))
    names = ("drfa_k_ptr", "drfa_v_ptr", "drfa_bias_ptr")
    outputs = dict(zip(names, sums, strict=True)) | {"splits": splits}
    run(spec, lambda _: kv_rows * tiles * splits, values | outputs)
    return _partial_sums(tuple(sums))  # pyright: ignore[reportReturnType]


def _sink_gradients(spec: KernelSpec, values: dict[str, Any], kv_rows: int) -> dict[str, Tensor]:
    like, sinks = values["lse_ptr"], spec.sink_size
    tiles = -(-sinks // choose(spec).block_n)
    splits = _splits(values["queries"] * spec.group // _QUERIES_PER_SINK_PROGRAM)
    sums = tuple(
        like.new_empty(splits, kv_rows, sinks, dim) for dim in (spec.head_dim, spec.value_dim)
    )
    outputs = {"dk_sink_ptr": sums[0], "dv_sink_ptr": sums[1], "splits": splits}
    run(spec, lambda _: kv_rows * tiles * splits, values | outputs)
    dk, dv = _partial_sums(sums)
    return {"dk_sink_ptr": dk, "dv_sink_ptr": dv}


def _key_gradients(
    spec: KernelSpec,
    values: dict[str, Any],
    kv_rows: int,
    t: Operands,
    pooled: PooledChunks | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    dk, dv = (x.new_empty(x.shape) for x in (t.k, t.v))
    if pooled is not None:
        pooled = _with_vectors(pooled, t.k)
        spec = pooling_spec(spec, pooled)
    tiles = -(-values["columns"] // choose(spec).block_n)
    outputs = values | {"dk_ptr": dk, "dv_ptr": dv}
    vectors: tuple[Tensor, ...] = ()
    if pooled is not None:
        pool_values, vectors = _pool_values(pooled, kv_rows, tiles, values["lse_ptr"], spec)
        outputs |= pool_values
    run(spec, lambda _: kv_rows * tiles, outputs)
    return dk, dv, _vector_sums(vectors, t.k.shape[0])


# --- pooling --------------------------------------------------------------------------------------


def pooling_spec(spec: KernelSpec, pooled: PooledChunks) -> KernelSpec:
    """Return a spec with the gradient of pooling added."""
    return dataclasses.replace(
        spec, chunk_rule=pooled.rule, parameters=0 if pooled.rule == "eva" else len(pooled.parameters)
    )


def _pool_values(
    pooled: PooledChunks, kv_rows: int, tiles: int, like: Tensor, spec: KernelSpec
) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    count = {"mean": 0, "tangent": 1, "evabyte": 2, "eva": 0}[pooled.rule]
    vectors = tuple(like.new_empty(kv_rows, tiles, spec.head_dim) for _ in range(count))
    values: dict[str, Any] = {"mass_k_ptr": pooled.mass_k, "mass_v_ptr": pooled.mass_v}
    values |= dict(zip(("dphi_ptr", "dp_ptr"), vectors, strict=False))
    return values | rule_values(pooled.rule, pooled.parameters), vectors


def _with_vectors(pooled: PooledChunks, k: Tensor) -> PooledChunks:
    """Give ``evabyte`` without parameters vectors of zeros, which mean the same."""
    if pooled.rule != "evabyte" or pooled.parameters:
        return pooled
    zeros = k.new_zeros(k.shape[1], k.shape[3])
    return dataclasses.replace(pooled, parameters=(zeros, zeros))


def rule_values(rule: str, parameters: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return a rule's parameters by argument name."""
    if rule == "eva":
        return {"omega_ptr": parameters[1].contiguous()}
    contiguous = (x.contiguous() for x in parameters)
    return dict(zip(("phi_ptr", "p_ptr", "b_ptr"), contiguous, strict=False))


def _vector_sums(vectors: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    """Add the parts of head vectors, ``[B * Hkv, tiles, D]``, to ``[Hkv, D]``."""
    return tuple(x.view(batch, -1, *x.shape[1:]).sum((0, 2)) for x in vectors)


def chunk_tokens_forward(
    k: Tensor,
    v: Tensor,
    parameters: tuple[Tensor, ...],
    rows: Rows,
    *,
    rule: str,
    chunk_size: int,
    scale: float,
) -> tuple[tuple[Tensor, Tensor, Tensor], PooledChunks]:
    """Pool; see :func:`flasheva_compile.kernels.blocked.chunk_tokens.chunk_tokens_forward`.

    Returns:
        ``(rfa_k, rfa_v, rfa_bias)`` and what their gradient needs.
    """
    k, v = unit_stride(k), unit_stride(v)
    head = (k.shape[0], k.shape[1], -(-k.shape[2] // chunk_size))
    rfa_k, rfa_v = k.new_empty(*head, k.shape[3]), v.new_empty(*head, v.shape[3])
    like = k.new_empty(head, dtype=torch.float32)
    pooled = _complete(rule, parameters, like, k)
    spec = pooling_spec(_pool_spec("chunk_tokens", k, v, rows, chunk_size), pooled)
    values = {
        **key_values(k, v),
        **row_values(rows),
        **rule_values(pooled.rule, pooled.parameters),
        "rfa_k_ptr": rfa_k,
        "rfa_v_ptr": rfa_v,
        "rfa_bias_ptr": like,
        "mass_k_ptr": pooled.mass_k,
        "mass_v_ptr": pooled.mass_v,
        "heads": k.shape[1],
        "chunks": head[2],
        "scale": scale,
    }
    run(spec, lambda schedule: head[0] * head[1] * -(-head[2] // schedule.block_n), values)
    if rule == "eva":
        rfa_k = torch.where(like[..., None] > -torch.inf, parameters[0], 0)
    return (rfa_k, rfa_v, like), pooled


def _complete(
    rule: str, parameters: tuple[Tensor, ...], like: Tensor, k: Tensor
) -> PooledChunks:
    """Allocate the log-masses of a rule."""
    rule = kernel_rule(rule, parameters)
    masses = (torch.empty_like(like) if kept else None for kept in kept_masses(rule))
    return _with_vectors(PooledChunks(rule, parameters, *masses), k)


def _pool_spec(
    kind: str, k: Tensor, v: Tensor, rows: Rows, chunk_size: int
) -> KernelSpec:
    return KernelSpec(
        kind=kind,  # pyright: ignore[reportArgumentType]
        dtype=DTYPES[k.dtype],
        head_dim=k.shape[3],
        value_dim=v.shape[3],
        chunk_size=chunk_size,
        documents=rows.documents,
        key_mask=rows.valid is not None,
    )


def chunk_tokens_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    parameters: tuple[Tensor, ...],
    rows: Rows,
    *,
    rule: str,
    chunk_size: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """Differentiate pooling alone: ``dk``, ``dv`` and fp32 gradients of head vectors."""
    k, v = unit_stride(k), unit_stride(v)
    tokens, pooled = chunk_tokens_forward(
        k, v, parameters, rows, rule=rule, chunk_size=chunk_size, scale=scale
    )
    spec = pooling_spec(_pool_spec("dpool", k, v, rows, chunk_size), pooled)
    kv_rows, tiles = k.shape[0] * k.shape[1], -(-k.shape[2] // choose(spec).block_n)
    pool_values, vectors = _pool_values(pooled, kv_rows, tiles, tokens[2], spec)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    values = {
        **key_values(k, v),
        **row_values(rows),
        **pool_values,
        **dict(zip(("rfa_k_ptr", "rfa_v_ptr", "rfa_bias_ptr"), tokens, strict=True)),
        **dict(
            zip(
                ("drfa_k_ptr", "drfa_v_ptr", "drfa_bias_ptr"),
                (g.contiguous() for g in grads),
                strict=True,
            )
        ),
        "dk_ptr": dk,
        "dv_ptr": dv,
        "heads": k.shape[1],
        "chunks": tokens[2].shape[2],
        "scale": scale,
    }
    run(spec, lambda _: kv_rows * tiles, values)
    return dk, dv, *_vector_sums(vectors, k.shape[0])
