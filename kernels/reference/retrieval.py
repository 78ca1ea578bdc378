"""Reference retrieval tier: each query attends exactly inside the chunks that score highest.

Dense and literal; the definition that every other implementation is tested against.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from flasheva_compile.kernels.reference.attention import joint_scores, masked_attention
from flasheva_compile.kernels.reference.chunk_rules import chunk_tokens, eva_features
from flasheva_compile.kernels.reference.positions import chunks_of, key_positions
from flasheva_compile.kernels.reference.visibility import query_positions, visibility

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flasheva_compile.kernels.reference.positions import Chunks, Positions
    from torch import Tensor


def retrieval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    retrieve_chunks: int,
    retrieve_block: int = 1,
    retrieve_by: str = "token",
    selector_weight: Tensor | None = None,
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
    selected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend as ``eva_attention``, with the keys of selected chunks moved to the exact set.

    Args:
        q: Queries, ``[B, Hq, L, D]``.
        k: Keys, ``[B, Hkv, S, D]``.
        v: Values, ``[B, Hkv, S, Dv]``.
        retrieve_chunks: Chunks that each query attends exactly.
        retrieve_block: Consecutive positions that use the selection of the first of them; more
            than 1 needs ``q_offset == 0``.
        retrieve_by: What scores a chunk: ``"token"``, its chunk token's logit, or ``"bounds"``,
            see :func:`chunk_bounds`.
        selector_weight: Weights of the bounds, ``[Hkv, 3, D]``; see :func:`chunk_bounds`.
        window_size: As all that follow: see :func:`eva_attention`.
        chunk_size: Keys per chunk [tokens].
        sink_tokens: Exact first tokens.
        window: ``"sliding"`` or ``"block"``.
        chunk_rule: The chunk rule.
        parameters: The rule's parameters.
        causal: True; there is no bidirectional retrieval.
        q_offset: Column of the first query.
        scale: Score scale.
        softcap: Bound of the scores; 0 = none.
        alibi_slopes: ``[Hq]``.
        key_mask: ``[B, S]``, True = may attend.
        segment_ids: ``[B, S]``, packed documents.
        selected: ``[B, Hkv, L, C]`` bool, a selection to use instead of the formula's.

    Returns:
        ``out [B, Hq, L, Dv]`` and the joint log-sum-exp ``lse [B, Hq, L]``.

    Source:
        Ours. With ``retrieve_chunks`` at least the number of chunks it is softmax attention.
    """
    assert causal
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    keys = key_positions(k, key_mask, segment_ids)
    chunks = chunks_of(keys, chunk_size)
    if chunk_rule == "eva":
        parameters = eva_features(q, k, chunks.members[:, None], parameters)
    rfa_k, rfa_v, rfa_bias = chunk_tokens(
        k, v, chunks.members, rule=chunk_rule, parameters=parameters, scale=factor
    )
    exact, chunk = visibility(
        keys,
        chunks,
        length=q.shape[2],
        q_offset=q_offset,
        window_size=window_size,
        chunk_size=chunk_size,
        sink_tokens=sink_tokens,
        window=window,
        causal=True,
    )
    score = partial(
        joint_scores,
        members=chunks.members,
        seen=torch.cat([chunk, exact], -1)[:, None],
        q_offset=q_offset,
        scale=factor,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )
    scores = score(q, k, rfa_k, rfa_bias)
    if selected is None:
        selector = scores
        if retrieve_by == "bounds":
            magnitudes, wide = torch.cat([q, q.abs()], -1), torch.cat([k, k], -1)
            bounds = chunk_bounds(k, chunks.members, selector_weight)
            selector = score(magnitudes, wide, bounds, torch.zeros_like(rfa_bias))
        selector = selector[..., : rfa_k.shape[2]].unflatten(1, (k.shape[1], group)).amax(2)
        selected = select_chunks(selector, chunk, retrieve_chunks)
        selected = _of_first_in_block(selected, keys, q_offset, retrieve_block)
    seen = torch.cat(retrieved_visibility(exact, chunk, chunks, selected), -1)
    values = torch.cat([rfa_v, v], 2).repeat_interleave(group, 1)
    return masked_attention(scores, seen.repeat_interleave(group, 1), values)


def chunk_bounds(k: Tensor, members: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return what scores a chunk halfway from its mean key to its bounds: ``[centre | spread]``.

    With ``low`` and ``high`` the smallest and largest value of each channel among the chunk's
    keys, no key scores more than ``s (q.(low + high) + |q|.(high - low)) / 2``. The score is the
    mean of that and of the mean key's, ``s (q.centre + |q|.spread)``. Weights take the place of
    its halves: ``centre = w0 mean + w1 (low + high) / 2``, ``spread = w2 (high - low) / 2``.

    Args:
        k: Keys, ``[B, Hkv, S, D]``.
        members: ``[B, C, S]``, which keys each chunk has.
        weight: ``w``, ``[Hkv, 3, D]``; None = 1/2 everywhere.

    Returns:
        ``[B, Hkv, C, 2 D]``; 0 for an empty chunk.

    Source:
        The bounds are Quest's (arXiv:2406.10774); going halfway is ours.
    """
    flag = members[:, None, :, :, None]
    count = flag.sum(3)
    keys = k[:, :, None].detach()
    low = keys.masked_fill(~flag, torch.inf).amin(3).masked_fill(count == 0, 0)
    high = keys.masked_fill(~flag, -torch.inf).amax(3).masked_fill(count == 0, 0)
    mean = keys.masked_fill(~flag, 0).sum(3) / count.clamp(min=1)
    w = k.new_full((k.shape[1], 3, k.shape[3]), 0.5) if weight is None else weight.to(k.dtype)
    of_mean, of_middle, of_range = w[:, :, None].unbind(1)
    centre = of_mean * mean + of_middle * (low + high) / 2
    return torch.cat([centre, of_range * (high - low) / 2], -1)


def select_chunks(scores: Tensor, visible: Tensor, count: int) -> Tensor:
    """Select the ``count`` visible chunks with the largest score; equal scores: lower index first.

    Args:
        scores: ``[B, Hkv, L, C]``, the chunk logits' maximum over a kv head's query heads.
        visible: ``[B, L, C]``, True where the query sees the chunk.
        count: Chunks to select; fewer if fewer are visible.

    Returns:
        ``[B, Hkv, L, C]`` bool. Scores compare in fp32: what differs less is equal.
    """
    visible = visible[:, None].expand_as(scores)
    scores = scores.detach().float().masked_fill(~visible, -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    best = torch.zeros_like(visible).scatter(-1, order[..., :count], True)
    return best & visible


def _of_first_in_block(selected: Tensor, keys: Positions, q_offset: int, block: int) -> Tensor:
    """Give every query the selection of its block's first query; blocks count positions."""
    if block == 1 or selected.numel() == 0:
        return selected
    assert q_offset == 0
    length = selected.shape[2]
    position = query_positions(keys, length, q_offset)[1][..., 0]
    query = torch.arange(length, device=selected.device)
    first = torch.where(position >= 0, query - position % block, query)
    return selected.gather(2, first[:, None, :, None].expand_as(selected))


def retrieved_visibility(
    exact: Tensor, chunk: Tensor, chunks: Chunks, selected: Tensor
) -> tuple[Tensor, Tensor]:
    """Move the keys of selected chunks to the exact set.

    Args:
        exact: ``[B, L, S]``, keys that a query sees exactly anyway.
        chunk: ``[B, L, C]``, chunks that it sees.
        chunks: Which keys each chunk has.
        selected: ``[B, Hkv, L, C]``, a part of ``chunk``.

    Returns:
        ``chunk [B, Hkv, L, C]`` without the selected ones and ``exact [B, Hkv, L, S]`` with their
        valid keys: still a partition of what full attention sees.
    """
    members = chunks.members[:, None].to(torch.float64)
    retrieved = (selected.to(torch.float64) @ members) > 0
    return chunk[:, None] & ~selected, exact[:, None] | retrieved
