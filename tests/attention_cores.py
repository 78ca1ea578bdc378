"""Small attention modules around a function that spells the attention, for tests of matching."""

from __future__ import annotations

import torch
from torch import nn

import flasheva_compile as fe

OPTIONS = {"window_size": 16, "chunk_size": 4}


class Core(nn.Module):
    """Projections around an attention function ``core(q, k, v)`` on ``[B, H, N, D]``."""

    def __init__(self, core, heads=4, kv_heads=4, dim=32):
        super().__init__()
        self.core, self.heads, self.kv_heads, self.size = core, heads, kv_heads, dim // heads
        self.q = nn.Linear(dim, heads * self.size)
        self.k = nn.Linear(dim, kv_heads * self.size)
        self.v = nn.Linear(dim, kv_heads * self.size)

    def split(self, x, heads):
        return x.view(*x.shape[:2], heads, self.size).transpose(1, 2)

    def forward(self, x):
        return self.core(
            self.split(self.q(x), self.heads),
            self.split(self.k(x), self.kv_heads),
            self.split(self.v(x), self.kv_heads),
        )


def report(core, options=OPTIONS, **shape):
    torch.manual_seed(0)
    return fe.explain(Core(core, **shape).eval(), torch.randn(2, 24, 32), options=options)


def causal(n):
    return torch.ones(n, n, dtype=torch.bool).tril()
