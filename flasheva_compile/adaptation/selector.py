"""What ``calibrate`` learns for selection by bounds: weights of the bounds, from a model's queries.

A sample says what each chunk is worth to some queries of a document: how far the layer's output
moves if the chunk is attended exactly and not through its token. Learning makes the softmax of
the scores the chunks' shares of that: a ranking, whatever the number of chunks to select.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flasheva_compile.kernels.blocked.cache_state import first_exact

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from flasheva_compile.kernels.blocked.geometry import AttentionSettings

QUERIES = 256
"""Queries of a document that are learned from, at most."""

_STEPS, _BATCH, _RATE = 200, 64, 0.03  # of learning; queries of a step; Adam's largest rate
_START = (1.0, 0.5, 0.5)  # of mean, middle less mean, half the range: 1/2 for each of three
_MOST_CLAIMED = 30.0  # logarithm of a token's weight relative to the true sum of all
_CPU_BUDGET, _GPU_BUDGET = 1 << 23, 1 << 27  # numbers held at once


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectorSample:
    """Queries of one document, the chunks of its keys, and what these are worth to those.

    Attributes:
        q: ``[Hkv, G, P, D]`` fp32, times the score scale.
        parts: ``[3, Hkv, C, D]`` fp32: mean key, middle of the range less it, half the range.
        visible: ``[P, C]`` bool.
        worth: ``[Hkv, P, C]`` fp32, the norm by which a chunk's exact keys move the output, summed
            over the query heads of a kv head.
    """

    q: Tensor
    parts: Tensor
    visible: Tensor
    worth: Tensor


# --- samples --------------------------------------------------------------------------------------


def selector_sample(
    qkv: tuple[Tensor, Tensor, Tensor],
    tokens: tuple[Tensor, Tensor, Tensor],
    s: AttentionSettings,
    chunks: int,
) -> SelectorSample | None:
    """Return what one document teaches; None if no query of it sees more chunks than are selected.

    Args:
        qkv: ``q [Hq, N, D]``, ``k [Hkv, N, D]``, ``v [Hkv, N, Dv]``, without padding.
        tokens: Its chunk tokens ``[Hkv, C, ...]`` and their biases ``[Hkv, C]``.
        s: The layer's settings.
        chunks: Chunks that a query selects.
    """
    q, k, v = (x.float() for x in qkv)
    size = s.chunk_size
    complete = k.shape[1] // size
    position = torch.arange(k.shape[1], device=k.device)
    slot = torch.arange(complete, device=k.device)
    visible = (slot * size >= s.sink_tokens) & (
        (slot + 1) * size <= first_exact(position, s)[:, None]
    )
    position = (visible.sum(-1) > chunks).nonzero()[:, 0]
    if not len(position):
        return None
    if len(position) > QUERIES:
        order = torch.randperm(len(position), generator=torch.Generator().manual_seed(0))
        position = position[order[:QUERIES].sort().values.to(position.device)]
    keys = k[:, : complete * size].unflatten(1, (complete, size))
    low, high = torch.aminmax(keys, dim=2)
    mean = keys.mean(2)
    q = q[:, position].unflatten(0, (k.shape[0], -1)) * s.scale
    tokens = tuple(x[:, :complete].float() for x in tokens)  # pyright: ignore[reportAssignmentType]
    return SelectorSample(
        q=q,
        parts=torch.stack([mean, (low + high) / 2 - mean, (high - low) / 2]),
        visible=visible[position],
        worth=_worth(q, (k, v), tokens, position, s),
    )


def _worth(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    tokens: tuple[Tensor, Tensor, Tensor],
    position: Tensor,
    s: AttentionSettings,
) -> Tensor:
    """Return :attr:`SelectorSample.worth`, block by block of queries."""
    budget = _CPU_BUDGET if q.device.type == "cpu" else _GPU_BUDGET
    one = q.shape[0] * q.shape[1] * (kv[0].shape[1] + tokens[1].shape[1] * tokens[1].shape[2])
    step = max(1, budget // max(1, one))
    found = [
        _worth_of_block(q[:, :, lo : lo + step], kv, tokens, position[lo : lo + step], s)
        for lo in range(0, len(position), step)
    ]
    return torch.cat(found, 1)


def _worth_of_block(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    tokens: tuple[Tensor, Tensor, Tensor],
    position: Tensor,
    s: AttentionSettings,
) -> Tensor:
    (k, v), (rfa_k, rfa_v, rfa_bias) = kv, tokens
    columns = torch.arange(k.shape[1], device=k.device)
    scores = _capped(q @ k[:, None].mT, s).masked_fill(columns > position[:, None], -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp()
    out = (weights @ v[:, None])[:, :, :, None]
    chunks, size = rfa_k.shape[1], s.chunk_size
    members = weights[..., : chunks * size].unflatten(-1, (chunks, size))
    values = v[:, : chunks * size].unflatten(1, (chunks, size))
    exact = torch.einsum("hgpcm,hcmd->hgpcd", members, values) - members.sum(-1, keepdim=True) * out
    token = _capped(q @ rfa_k[:, None].mT, s) + rfa_bias[:, None, None] - lse
    # A token may claim any multiple of the true mass; that much already is all of the worth.
    token = token.clamp(max=_MOST_CLAIMED).exp()
    compressed = token[..., None] * (rfa_v[:, None, None] - out)
    return (exact - compressed).norm(dim=-1).sum(1)


def _capped(scores: Tensor, s: AttentionSettings) -> Tensor:
    return s.softcap * torch.tanh(scores / s.softcap) if s.softcap else scores


# --- learning -------------------------------------------------------------------------------------


def learn_selector_weight(samples: Sequence[SelectorSample]) -> Tensor:
    """Return weights ``[Hkv, 3, D]`` fp32 of mean, middle and half the range.

    Adam on the cross-entropy of the scores against the chunks' shares; the same bits for the same
    samples on a CPU.

    Args:
        samples: One or more.
    """
    heads, _, _, size = samples[0].q.shape
    start = samples[0].q.new_tensor(_START).view(3, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        weight = start.repeat(1, heads, 1, size).requires_grad_()
        optimizer = torch.optim.Adam([weight], lr=_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_STEPS)
        for step in range(_STEPS):
            sample = samples[step % len(samples)]
            order = torch.randperm(sample.q.shape[2], generator=generator)[:_BATCH]
            loss = _cross_entropy(sample, order.to(weight.device), weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    of_mean, of_middle, of_range = weight.detach().squeeze(2)
    return torch.stack([of_mean - of_middle, of_middle, of_range], 1)


def _cross_entropy(sample: SelectorSample, order: Tensor, weight: Tensor) -> Tensor:
    """Return the cross-entropy of the scores' softmax against each chunk's share of the worth."""
    visible = sample.visible[order]
    worth = sample.worth[:, order] * visible
    share = worth / worth.sum(-1, keepdim=True).clamp(min=torch.finfo(worth.dtype).tiny)
    scores = _scores(sample.q[:, :, order], sample.parts, weight)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return -(share * scores.log_softmax(-1)).sum(-1).mean()


def _scores(q: Tensor, parts: Tensor, weight: Tensor) -> Tensor:
    """Return the selector's scores ``[Hkv, P, C]``, the maximum over query heads."""
    mean, middle, reach = (parts * weight)[:, :, None]
    return (q @ (mean + middle).mT + q.abs() @ reach.mT).amax(1)
