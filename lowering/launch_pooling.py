"""Launches of pooling alone: keys and values to chunk tokens, and the gradient of that."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from flasheva_compile.lowering import launch
from flasheva_compile.lowering.kernel_arguments import (
    DTYPES,
    key_values,
    row_values,
    rule_values,
    unit_stride,
)
from flasheva_compile.lowering.launch import (
    pooling_spec,
    run_over_keys,
)
from flasheva_compile.lowering.pooled_chunks import (
    PooledChunks,
    kept_masses,
    kernel_rule,
    with_vectors,
)
from flasheva_compile.lowering.spec import KernelSpec

if TYPE_CHECKING:
    from flasheva_compile.lowering.rows import Rows
    from torch import Tensor


def chunk_tokens_forward(  # noqa: PLR0913 - the arguments of pooling, and what attention reads
    k: Tensor,
    v: Tensor,
    parameters: tuple[Tensor, ...],
    rows: Rows,
    *,
    rule: str,
    chunk_size: int,
    scale: float,
    bias_columns: bool = False,
) -> tuple[tuple[Tensor, Tensor, Tensor], PooledChunks]:
    """Pool; see :func:`flasheva_compile.kernels.blocked.chunk_tokens.chunk_tokens_forward`.

    Returns:
        ``(rfa_k, rfa_v, rfa_bias)`` and what their gradient needs; with ``bias_columns`` what
        attention with the same ``scale`` reads, too.
    """
    k, v = unit_stride(k), unit_stride(v)
    head = (k.shape[0], k.shape[1], -(-k.shape[2] // chunk_size))
    rfa_k, rfa_v = k.new_empty(*head, k.shape[3]), v.new_empty(*head, v.shape[3])
    like = k.new_empty(head, dtype=torch.float32)
    pooled = _complete(rule, parameters, like, k)
    if bias_columns:
        pooled = dataclasses.replace(pooled, bias_columns=launch.empty_columns(like))
    own = _pool_spec("chunk_tokens", k, v, rows, chunk_size, bias_columns=bias_columns)
    spec = pooling_spec(own, pooled)
    values = {
        **key_values(k, v),
        **row_values(rows),
        **rule_values(pooled.rule, pooled.parameters),
        "rfa_k_ptr": rfa_k,
        "rfa_v_ptr": rfa_v,
        "rfa_bias_ptr": like,
        "mass_k_ptr": pooled.mass_k,
        "mass_v_ptr": pooled.mass_v,
        "bias_columns_ptr": pooled.bias_columns,
        "heads": k.shape[1],
        "chunks": head[2],
        "scale": scale,
    }
    launch.run(spec, lambda schedule: head[0] * head[1] * -(-head[2] // schedule.block_n), values)
    if rule == "eva":
        rfa_k = torch.where(like[..., None] > -torch.inf, parameters[0], 0)
    return (rfa_k, rfa_v, like), pooled


def _complete(rule: str, parameters: tuple[Tensor, ...], like: Tensor, k: Tensor) -> PooledChunks:
    """Allocate the log-masses of a rule."""
    rule = kernel_rule(rule, parameters)
    masses = (torch.empty_like(like) if kept else None for kept in kept_masses(rule))
    return with_vectors(PooledChunks(rule, parameters, *masses), k)


def _pool_spec(
    kind: str, k: Tensor, v: Tensor, rows: Rows, chunk_size: int, *, bias_columns: bool = False
) -> KernelSpec:
    return KernelSpec(
        kind=kind,  # pyright: ignore[reportArgumentType]
        dtype=DTYPES[k.dtype],
        head_dim=k.shape[3],
        value_dim=v.shape[3],
        chunk_size=chunk_size,
        documents=rows.documents,
        key_mask=rows.valid is not None,
        bias_columns=bias_columns,
    )


def chunk_tokens_backward(  # noqa: PLR0913 - the arguments of the forward pass and its gradients
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
    """Differentiate pooling alone: ``dk``, ``dv`` and fp32 gradients of vectors or features."""
    k, v = unit_stride(k), unit_stride(v)
    tokens, pooled = chunk_tokens_forward(
        k, v, parameters, rows, rule=rule, chunk_size=chunk_size, scale=scale
    )
    spec = pooling_spec(_pool_spec("dpool", k, v, rows, chunk_size), pooled)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    values = {
        **key_values(k, v),
        **row_values(rows),
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
    return dk, dv, *run_over_keys(spec, values, k.shape[0] * k.shape[1], pooled)
