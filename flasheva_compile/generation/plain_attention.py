"""Softmax attention in plain PyTorch code, for classes whose own is part of their ``forward``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


def softmax_attention(  # noqa: PLR0913 - of the interface
    module: Any,  # noqa: ANN401
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    alibi_slopes: Tensor | None = None,
    **_: Any,  # noqa: ANN401 - what transformers' other attention functions take
) -> tuple[Tensor, Tensor]:
    """Attend by plain code, as an attention function of the interface; masks are additive.

    ``alibi_slopes [Hq]`` add ``slope * key column``, exactly even in low precision.

    Returns:
        ``[B, L, Hq, D]`` and the weights ``[B, Hq, L, S]``.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if alibi_slopes is not None:
        column = torch.arange(1 - key.shape[2], 1, device=key.device)  # the last ones count most
        scores = scores + alibi_slopes[:, None, None] * column
    scores = scores if mask is None else scores + mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights
