"""What one rewritten attention computes, independent of any graph, device or schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flasheva_compile.config import ChunkRule, Selector, WindowKind


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaOp:
    """One FlashEVA attention; hashable.

    Attributes:
        window_size: Exact keys around each query, a multiple of ``chunk_size`` [tokens].
        chunk_size: Keys behind one chunk token [tokens].
        sink_size: First keys, seen exactly by every query; whole chunks [tokens].
        window: ``"sliding"`` or ``"block"``.
        chunk_rule: How a chunk becomes its chunk token.
        causal: A query sees only its past.
        scale: Factor on ``q.k``.
        softcap: Bound of ``softcap * tanh(score / softcap)``; 0.0 = none.
        dropout_p: Probability of dropping a joint weight; 0.0 = none.
        has_key_mask: Some keys may be padding.
        has_segments: Documents are packed and do not see each other.
        heads: Query heads ``Hq``.
        kv_heads: Key and value heads ``Hkv``; divides ``heads``.
        head_dim: Size ``D`` of queries and keys.
        value_dim: Size ``Dv`` of values.
        retrieve_chunks: Best-scoring chunks that a query sees exactly too; 0 = none.
        retrieve_block: Consecutive queries that share a selection.
        retrieve_by: What scores chunks, their ``"token"`` or their keys' ``"bounds"``.
    """

    window_size: int
    chunk_size: int
    sink_size: int
    window: WindowKind
    chunk_rule: ChunkRule
    causal: bool
    scale: float
    softcap: float = 0.0
    dropout_p: float = 0.0
    has_key_mask: bool = False
    has_segments: bool = False
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    retrieve_chunks: int = 0
    retrieve_block: int = 1
    retrieve_by: Selector = "token"
