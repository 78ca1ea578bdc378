"""FLOPs and bytes of one attention, and the time that no kernel can beat."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from flasheva_compile.lowering import cost

if TYPE_CHECKING:
    from flasheva_compile.lowering.op import EvaOp

Formulation = Literal["flasheva", "flasheva_attention", "full"]
Pass = Literal["fwd", "bwd", "fwd+bwd"]
BACKWARD_FLOPS = 2.5  # five matrix products for two
_ITEMSIZE = 2


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What the device can do; defaults: measured on one H100.

    Attributes:
        tflops: bf16 matrix products [TFLOP/s].
        tbs: Memory, reads and writes [TB/s].
    """

    tflops: float = 800.0
    tbs: float = 3.0


@lru_cache(maxsize=1024)
def forward_flops(op: EvaOp, length: int, formulation: Formulation) -> int:
    """Count the FLOPs of the matrix products, ``4 * pairs * d * H``; pooling left out."""
    pairs = cost.full_pairs(causal=op.causal)
    if formulation != "full":
        pairs = cost.exact_pairs(op) + cost.chunk_pairs(op)
    return cost.evaluate(pairs, length) * 2 * (op.head_dim + op.value_dim) * op.heads


def flops(op: EvaOp, length: int, formulation: Formulation, step: Pass) -> float:
    """Count the FLOPs of a pass; the backward is 2.5 times the forward, whoever does more."""
    factor = {"fwd": 1, "bwd": BACKWARD_FLOPS, "fwd+bwd": 1 + BACKWARD_FLOPS}[step]
    return factor * forward_flops(op, length, formulation)


def forward_bytes(op: EvaOp, length: int, formulation: Formulation) -> int:
    """Count the bytes that the forward cannot avoid: every tensor once for each of its kernels."""
    chunks = -(-length // op.chunk_size)
    queries, keys = op.heads * length, op.kv_heads * length
    vectors = {"full": 0, "flasheva_attention": 2, "flasheva": 4}[formulation] * op.kv_heads
    vectors = vectors * chunks + 2 * queries + (4 if formulation == "flasheva" else 2) * keys
    return vectors * op.head_dim * _ITEMSIZE + 4 * queries


def backward_bytes(op: EvaOp, length: int, formulation: Formulation) -> int:
    """Count the bytes of q, out, dout, dq, of k, v, dk, dv, of chunk tokens and of statistics."""
    chunks = 0 if formulation == "full" else -(-length // op.chunk_size)
    vectors = 4 * op.heads * length + 4 * op.kv_heads * (length + chunks)
    return vectors * op.head_dim * _ITEMSIZE + 8 * op.heads * length


def bound_ms(op: EvaOp, length: int, formulation: Formulation, step: Pass, peak: Peak) -> float:
    """Return the roofline: each pass takes its compute or its bytes, whichever is longer."""
    moved = {"fwd": forward_bytes, "bwd": backward_bytes}
    return sum(
        max(
            flops(op, length, formulation, part) / peak.tflops * 1e-9,
            count(op, length, formulation) / peak.tbs * 1e-9,
        )
        for part, count in moved.items()
        if part in step
    )
