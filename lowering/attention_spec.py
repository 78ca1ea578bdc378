"""From the tensors and settings of a call to the specs of its kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from flasheva_compile.lowering.kernel_arguments import DTYPES
from flasheva_compile.lowering.spec import KernelSpec

if TYPE_CHECKING:
    from flasheva_compile.kernels.blocked.block import Operands
    from flasheva_compile.kernels.blocked.geometry import AttentionSettings
    from flasheva_compile.lowering.pooled_chunks import PooledChunks
    from flasheva_compile.lowering.rows import Rows
    from flasheva_compile.lowering.spec import AnyKind, Documents
    from torch import Tensor


def attention_spec(
    t: Operands, s: AttentionSettings, rows: Rows, pooled: PooledChunks | None
) -> KernelSpec:
    """Return the spec of the ``forward`` kernel of a call."""
    rule = None if pooled is None else pooled.rule
    return call_spec((t.q, t.k, t.v), s, rows, rule, sloped=t.alibi_slopes is not None)


def call_spec(
    qkv: tuple[Tensor, Tensor, Tensor],
    s: AttentionSettings,
    rows: Rows,
    rule: str | None,
    *,
    sloped: bool,
) -> KernelSpec:
    """Return :func:`attention_spec` from what is known before pooling."""
    q, k, v = qkv
    inside = s.q_offset >= 0 and s.q_offset + q.shape[2] <= k.shape[2]
    tf32 = q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    masked, whole = rows.valid is not None, rule == "mean" and inside
    heads = (q.shape[1] // k.shape[1], q.shape[3], v.shape[3])
    return _spec((q.dtype, *heads), s, (rows.documents, masked, sloped, tf32, whole))


@lru_cache(maxsize=1024)
def _spec(
    heads: tuple[torch.dtype, int, int, int],
    s: AttentionSettings,
    facts: tuple[Documents, bool, bool, bool, bool],
) -> KernelSpec:
    dtype, group, head_dim, value_dim = heads
    documents, key_mask, alibi, tf32, mean_inside = facts
    return KernelSpec(
        kind="forward",
        dtype=DTYPES[dtype],
        head_dim=head_dim,
        value_dim=value_dim,
        chunk_size=s.chunk_size,
        documents=documents,
        key_mask=key_mask,
        group=group,
        window_size=s.window_size,
        sink_size=s.sink_tokens,
        window=s.window,
        causal=s.causal,
        softcap=s.softcap > 0,
        alibi=alibi,
        dropout=s.dropout_p > 0,
        negative_scale=s.scale <= 0,
        tf32=tf32,
        whole_chunks=mean_inside and s.causal and documents == "dense",
    )


@lru_cache(maxsize=4096)
def of_kind(spec: KernelSpec, kind: AnyKind) -> KernelSpec:
    """Return :meth:`KernelSpec.of_kind`, remembered."""
    return spec.of_kind(kind)
