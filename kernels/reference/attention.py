"""Reference FlashEVA attention: the normative formula, dense, differentiable, in the inputs' dtype.

Run it in fp64 for the truth and in a low precision for what PyTorch itself loses there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from flasheva_compile.kernels.reference.chunk_rules import chunk_tokens, eva_features
from flasheva_compile.kernels.reference.positions import chunks_of, key_positions
from flasheva_compile.kernels.reference.visibility import visibility

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def eva_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    chunk_size: int,
    sink_tokens: int = 0,
    window: str = "sliding",
    chunk_rule: str = "tangent",
    parameters: Sequence[Tensor] = (),
    causal: bool = True,
    q_offset: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend exactly to sinks and window, through chunk tokens to the rest, in one softmax.

    Args:
        q: Queries, ``[B, Hq, L, D]``.
        k: Keys, ``[B, Hkv, S, D]``.
        v: Values, ``[B, Hkv, S, Dv]``.
        window_size: Window ``w``, a multiple of ``chunk_size`` [tokens].
        chunk_size: Keys per chunk ``c`` [tokens].
        sink_tokens: First tokens of a document that stay exact [tokens].
        window: ``"sliding"`` or ``"block"``.
        chunk_rule: ``"mean"``, ``"tangent"``, ``"evabyte"`` or ``"eva"``.
        parameters: The rule's parameters; for ``eva`` those of its feature maps.
        causal: Whether a query sees only its past.
        q_offset: Column of the first query.
        scale: Score scale; None = ``D ** -0.5``.
        softcap: ``x -> softcap * tanh(x / softcap)`` on the scores; 0 = none.
        alibi_slopes: ``[Hq]``; adds ``slope * (key column - query column)``.
        key_mask: ``[B, S]``, True = may attend.
        segment_ids: ``[B, S]``, packed documents.
        noise: For ``eva`` in training, ``[B, Hkv, C, D]``.

    Returns:
        ``out [B, Hq, L, Dv]`` and the joint log-sum-exp ``lse [B, Hq, L]``.

    Source:
        EVA (arXiv:2302.04542) with control variates per chunk; sinks, sliding windows and the
        partition are ours. Design notes, section 2.
    """
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    members = chunks_of(key_positions(k, key_mask, segment_ids), chunk_size).members
    if chunk_rule == "eva":
        parameters = eva_features(q, k, members[:, None], parameters, noise)
    tokens = chunk_tokens(k, v, members, rule=chunk_rule, parameters=parameters, scale=factor)
    return eva_attention_from_chunk_tokens(
        q,
        k,
        v,
        *tokens,
        window_size=window_size,
        chunk_size=chunk_size,
        sink_tokens=sink_tokens,
        window=window,
        causal=causal,
        q_offset=q_offset,
        scale=factor,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        key_mask=key_mask,
        segment_ids=segment_ids,
    )


def eva_attention_from_chunk_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rfa_k: Tensor,
    rfa_v: Tensor,
    rfa_bias: Tensor,
    *,
    window_size: int,
    chunk_size: int,
    sink_tokens: int = 0,
    window: str = "sliding",
    causal: bool = True,
    q_offset: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what :func:`eva_attention` does, with chunk tokens that the caller made."""
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    keys = key_positions(k, key_mask, segment_ids)
    chunks = chunks_of(keys, chunk_size)
    exact, chunk = visibility(
        keys,
        chunks,
        length=length,
        q_offset=q_offset,
        window_size=window_size,
        chunk_size=chunk_size,
        sink_tokens=sink_tokens,
        window=window,
        causal=causal,
    )
    seen = torch.cat([chunk, exact], -1)[:, None]
    scores = joint_scores(
        q,
        k,
        rfa_k,
        rfa_bias,
        chunks.members,
        seen=seen,
        q_offset=q_offset,
        scale=factor,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )
    return masked_attention(scores, seen, torch.cat([rfa_v, v], 2).repeat_interleave(group, 1))


def joint_scores(
    q: Tensor,
    k: Tensor,
    rfa_k: Tensor,
    rfa_bias: Tensor,
    members: Tensor,
    *,
    seen: Tensor,
    q_offset: int,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Return the scores of chunk tokens, then of keys, ``[B, Hq, L, C + S]``; masks come later.

    ``seen`` says where biases matter: those of empty chunks are infinite.
    """
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    all_k = torch.cat([rfa_k, k], 2).repeat_interleave(group, 1)
    bias = torch.cat([rfa_bias, torch.zeros_like(k[..., 0])], 2).repeat_interleave(group, 1)
    scores = scale * (q @ all_k.mT)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias[:, :, None, :].masked_fill(~seen, 0).to(scores.dtype)
    if alibi_slopes is not None:
        query_column = q_offset + torch.arange(length, device=q.device)[:, None]
        distance = _columns(members, k)[:, None, None, :] - query_column
        scores = scores + alibi_slopes[:, None, None].to(scores.dtype) * distance
    return scores


def _columns(members: Tensor, k: Tensor) -> Tensor:
    """Column of each chunk token (mean over its members) and of each key, ``[B, C + S]``."""
    column = torch.arange(k.shape[2], device=k.device, dtype=k.dtype)
    count = members.sum(-1).clamp(min=1)
    return torch.cat([members.to(k.dtype) @ column / count, column.expand(k.shape[0], -1)], -1)


def masked_attention(scores: Tensor, seen: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over what is seen, times values; 0 and ``-inf`` where nothing is seen."""
    nothing = ~seen.any(-1, keepdim=True)
    # Rows that see nothing take finite scores through the softmax, so that no NaN reaches autograd.
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(nothing, 0)
    out = (scores.softmax(-1) * seen) @ values
    if scores.shape[-1] == 0:
        return out, scores.new_full(scores.shape[:-1], -torch.inf)
    return out, scores.logsumexp(-1).masked_fill(nothing.squeeze(-1), -torch.inf)
