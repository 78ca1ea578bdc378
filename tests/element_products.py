"""Products of queries and keys, of weights and values, as products of elements and their sums."""

from __future__ import annotations

import torch

ELEMENT_PRODUCTS = {
    "elements, summed": (
        lambda q, k: (q[:, :, :, None] * k[:, :, None]).sum(-1),
        lambda w, v: (w[..., None] * v[:, :, None]).sum(-2),
    ),
    "elements, summed, in three axes": (
        lambda q, k: (k.flatten(0, 1)[:, None] * q.flatten(0, 1).unsqueeze(2)).sum(dim=3),
        lambda w, v: (v.flatten(0, 1)[:, None] * w.unsqueeze(-1)).sum(2),
    ),
    "vecdot": (
        lambda q, k: torch.linalg.vecdot(q.unsqueeze(-2), k.unsqueeze(-3)),
        lambda w, v: torch.linalg.vecdot(w.unsqueeze(-1), v.unsqueeze(-3), dim=-2),
    ),
}
