"""Reference chunk rules: how the keys and values of a chunk become one chunk token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

ChunkTokens = tuple["Tensor", "Tensor", "Tensor"]  # rfa_k, rfa_v, rfa_bias


def _weights(logits: Tensor, members: Tensor) -> Tensor:
    """Softmax over each chunk's members, ``[B, H, C, S]``; all 0 for an empty chunk."""
    empty = ~members.any(-1, keepdim=True)
    return logits.masked_fill(~(members | empty), -torch.inf).softmax(-1) * members


def _log_mass(logits: Tensor, members: Tensor) -> Tensor:
    """Log-sum-exp over each chunk's members, ``[B, H, C]``; ``-inf`` for an empty chunk."""
    empty = ~members.any(-1, keepdim=True)
    total = logits.masked_fill(~(members | empty), -torch.inf).logsumexp(-1)
    return total.masked_fill(empty.squeeze(-1), -torch.inf)


def mean_rule(k: Tensor, v: Tensor, members: Tensor) -> ChunkTokens:
    """Weigh all members equally; the bias ``ln n`` counts them."""
    logits = torch.zeros_like(k[..., 0]).unsqueeze(2).expand(-1, -1, members.shape[2], -1)
    weights = _weights(logits, members)
    return weights @ k, weights @ v, _log_mass(logits, members)


def tangent_rule(
    k: Tensor, v: Tensor, members: Tensor, parameters: Sequence[Tensor], scale: float
) -> ChunkTokens:
    """Replace a chunk's log-mass by its tangent plane at the query ``phi [Hkv, D]``.

    ``LSE_m(s q.k_m)`` is convex in ``q``; its tangent at ``phi`` is ``rfa_bias + s q.rfa_k``, so a
    chunk's mass is exact at ``phi`` and never overestimated.

    Source:
        Ours; without ``phi`` it is the mean rule.
    """
    if not parameters:
        return mean_rule(k, v, members)
    (phi,) = parameters
    logits = scale * torch.einsum("hd,bhmd->bhm", phi, k).unsqueeze(2)
    weights = _weights(logits, members)
    rfa_k = weights @ k
    rfa_bias = _log_mass(logits, members) - scale * torch.einsum("hd,bhjd->bhj", phi, rfa_k)
    return rfa_k, weights @ v, rfa_bias


def evabyte_rule(
    k: Tensor, v: Tensor, members: Tensor, parameters: Sequence[Tensor], scale: float
) -> ChunkTokens:
    """Pool keys with a query ``a`` and values with a random feature ``p``, both ``[Hkv, D]``.

    Source:
        EvaByte's ``adaptive_mu_k`` (a) and ``adaptive_phi`` (p); the bias ``b [Hkv]`` is ours.
    """
    a, p = parameters[:2] if parameters else (k.new_zeros(k.shape[1], k.shape[3]),) * 2
    key_logits = torch.einsum("hd,bhmd->bhm", a, k).unsqueeze(2)
    value_logits = scale * (torch.einsum("hd,bhmd->bhm", p, k) - k.square().sum(-1) / 2).unsqueeze(
        2
    )
    bias = parameters[2] if len(parameters) > 2 else torch.zeros_like(a[:, 0])
    exists = members.any(-1)
    rfa_bias = bias[:, None].masked_fill(~exists, -torch.inf)
    return _weights(key_logits, members) @ k, _weights(value_logits, members) @ v, rfa_bias


def eva_features(
    q: Tensor,
    k: Tensor,
    members: Tensor,
    parameters: Sequence[Tensor],
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the control variate's key and the proposal's centre of each chunk.

    Args:
        q: Queries, ``[B, Hq, S, D]``: one for every key column.
        k: Keys, ``[B, Hkv, S, D]``.
        members: ``[B, 1, C, S]``.
        parameters: ``(weight [D, D], bias [D], norm_weight [D], norm_bias [D])`` of ``f_q``, then
            of ``f_k``; none = both are the identity.
        noise: ``[B, Hkv, C, D]``, added to ``omega``; training only.

    Returns:
        ``rfa_k`` and ``omega``, both ``[B, Hkv, C, D]``.

    Source:
        EVA (arXiv:2302.04542), ``f(x) = LayerNorm(Linear(x))`` of its causal variant; the mean of
        ``q`` over the GQA group is ours.
    """
    weights = _weights(torch.zeros_like(members, dtype=k.dtype), members)
    mean_q = weights @ q.unflatten(1, (k.shape[1], -1)).mean(2)
    mean_k = weights @ k
    f_q = f_k = lambda x: x
    if parameters:
        f_q, f_k = _feature_map(parameters[:4]), _feature_map(parameters[4:])
    omega = f_q(mean_q) + f_k(mean_k)
    if noise is not None:
        omega = omega + noise
    return f_k(mean_k), omega


def _feature_map(parameters: Sequence[Tensor]):  # noqa: ANN202 - a closure over its parameters
    weight, bias, norm_weight, norm_bias = parameters
    size = norm_weight.shape
    return lambda x: functional.layer_norm(
        functional.linear(x, weight, bias), size, norm_weight, norm_bias
    )


def eva_rule(
    k: Tensor, v: Tensor, members: Tensor, parameters: Sequence[Tensor], scale: float
) -> ChunkTokens:
    """Pool values by self-normalised importance sampling around ``omega``.

    ``parameters`` is ``(rfa_k, omega)`` from :func:`eva_features`.

    Source:
        EVA (arXiv:2302.04542): one sample ``omega`` per chunk, ``xi(omega, k)`` as weights.
    """
    rfa_k, omega = parameters
    logits = scale * (omega @ k.mT - k.square().sum(-1)[:, :, None, :] / 2)
    exists = members.any(-1)
    rfa_bias = torch.zeros_like(rfa_k[..., 0]).masked_fill(~exists, -torch.inf)
    return rfa_k * exists[..., None], _weights(logits, members) @ v, rfa_bias


def chunk_tokens(
    k: Tensor,
    v: Tensor,
    members: Tensor,
    *,
    rule: str,
    parameters: Sequence[Tensor] = (),
    scale: float,
) -> ChunkTokens:
    """Turn each chunk into ``(rfa_k [B, Hkv, C, D], rfa_v [B, Hkv, C, Dv], rfa_bias [B, Hkv, C])``.

    ``members`` is ``[B, C, S]`` (see :class:`Chunks`); an empty chunk gives ``(0, 0, -inf)``.
    """
    members = members[:, None]
    if rule == "mean":
        return mean_rule(k, v, members)
    rules = {"tangent": tangent_rule, "evabyte": evabyte_rule, "eva": eva_rule}
    return rules[rule](k, v, members, parameters, scale)
