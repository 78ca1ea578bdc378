"""Codewords: the nearest one of a vector, and a codebook learned from vectors by k-means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

_DISTANCES = {"cpu": 1 << 16, "cuda": 1 << 27}  # in memory at once; on a CPU they fit its cache


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the nearest codeword of each vector; of equals, the lowest.

    Distances are sums of squared differences in a fixed order, not expanded into products: so a
    codeword's own index is always found, and a vector's index depends on nothing but itself.

    Args:
        vectors: ``[N, d]``.
        codebook: ``[K, d]``, of the same dtype.

    Returns:
        ``[N]`` int64.
    """
    columns = codebook.T.contiguous()
    found = [_distances(block, columns).argmin(1) for block in _blocks(vectors, codebook.shape[0])]
    return torch.cat(found)


def _distances(vectors: Tensor, columns: Tensor) -> Tensor:
    """Return squared distances ``[N, K]`` to codewords ``[d, K]``."""
    total = (vectors[:, :1] - columns[0]).square_()
    for channel in range(1, columns.shape[0]):
        difference = vectors[:, channel, None] - columns[channel]
        total.addcmul_(difference, difference)
    return total


def learn_codebook(
    vectors: Tensor,
    entries: int,
    *,
    iterations: int,
    generator: torch.Generator,
    weights: Tensor | None = None,
) -> Tensor:
    """Return codewords by Lloyd's k-means from randomly chosen vectors.

    Written here because the libraries that have it (scikit-learn, faiss) are large and would be
    needed for these few lines alone. Clusters that lose all vectors begin again at the vectors that
    are farthest from their codeword. With no more distinct vectors than entries, the codewords are
    those vectors, and the rest repeats the first.

    Args:
        vectors: ``[N, d]``, N > 0, fp32 or fp64.
        entries: ``K``.
        iterations: At most this many; fewer if no vector changes its cluster.
        generator: On the CPU; seeds the choice of the first codewords.
        weights: How much each vector's squared error counts, ``[N]``, positive; None = alike. A
            vector is as likely to be a first codeword.

    Returns:
        ``[K, d]``.
    """
    distinct, of = torch.unique(vectors, dim=0, return_inverse=True)
    if distinct.shape[0] <= entries:
        rest = distinct[:1].expand(entries - distinct.shape[0], -1)
        return torch.cat([distinct, rest])
    weights = torch.ones_like(vectors[:, 0]) if weights is None else weights.to(vectors)
    total = torch.zeros_like(distinct[:, 0]).index_add_(0, of, weights)
    codebook = distinct[_drawn(total, entries, generator)]
    before = None
    for _ in range(iterations):
        cluster, distance = nearest_by_products(vectors, codebook)
        if before is not None and torch.equal(cluster, before):
            break
        before = cluster
        codebook = _means(vectors, weights, cluster, distance, codebook)
    return codebook


def _drawn(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw indices without replacement, with probabilities in proportion to their weights."""
    # The smallest of exponential waiting times; drawn on the CPU, so that devices agree.
    waiting = -torch.rand(weights.shape[0], generator=generator, dtype=torch.float64).log()
    return (waiting.to(weights.device) / weights).topk(count, largest=False).indices


def nearest_by_products(vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest codewords' indices and squared distances ``[N]``, by expanding them.

    Faster than :func:`nearest`, but rounding decides between codewords that are nearly as near.
    """
    half = codebook.square().sum(1) / 2
    clusters, distances = [], []
    for block in _blocks(vectors, codebook.shape[0]):
        score, cluster = torch.addmm(-half, block, codebook.T).max(1)
        clusters.append(cluster)
        distances.append(block.square().sum(1) - 2 * score)
    return torch.cat(clusters), torch.cat(distances)


def _blocks(vectors: Tensor, entries: int) -> Iterator[Tensor]:
    limit = _DISTANCES.get(vectors.device.type, 1 << 22)
    yield from vectors.split(max(1, limit // entries))  # of no vectors: one empty block


def _means(
    vectors: Tensor, weights: Tensor, cluster: Tensor, distance: Tensor, codebook: Tensor
) -> Tensor:
    """Return the clusters' weighted means; empty ones take the vectors of the largest errors."""
    total = torch.zeros_like(codebook).index_add_(0, cluster, vectors * weights[:, None])
    count = torch.zeros_like(codebook[:, 0]).index_add_(0, cluster, weights)
    means = total / count.clamp_min(torch.finfo(count.dtype).tiny)[:, None]
    empty = (count == 0).nonzero()[:, 0]
    if empty.numel():
        farthest = (distance * weights).argsort(descending=True, stable=True)[: empty.numel()]
        means[empty] = vectors[farthest]
    return means
