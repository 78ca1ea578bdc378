"""Attention composed of independently chosen spellings of each of its parts, right and wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from tests.element_products import ELEMENT_PRODUCTS
from tests.flex_spelling import FLEX_NEAR_MISSES, flex

LENGTH, HEADS, DIM = 12, 4, 8


@dataclass(frozen=True)
class Choice:
    """One spelling of each part; every field names a function below.

    Args:
        projection: How queries, keys and values are made.
        layout: In which order their axes stand.
        kv_heads: Number of key and value heads.
        repeat: How keys and values get the number of query heads.
        scale: Where the scale is applied.
        product: How scores and result are multiplied.
        mask: Which mask, and how it acts.
        softcap: Whether scores are capped.
        softmax: How the softmax is written.
        dropout: Whether a dropout that does nothing stands on the weights.
        padded: Whether the caller gives a padding mask.
        alibi: How a slope for each head is multiplied by positions, if it is.
    """

    projection: str = "separate"
    layout: str = "bhnd"
    kv_heads: int = HEADS
    repeat: str = "expand"
    scale: str = "scores"
    product: str = "matmul"
    mask: str = "causal fill"
    softcap: bool = False
    softmax: str = "softmax"
    dropout: bool = False
    padded: bool = False
    alibi: str = "none"


class Spelled(nn.Module):
    """An attention as a choice spells it; ``near_miss`` names what is wrong with it."""

    def __init__(self, choice: Choice, near_miss: str = ""):
        super().__init__()
        self.choice, self.near_miss = choice, near_miss
        torch.manual_seed(1)
        width, kv_width = HEADS * DIM, choice.kv_heads * DIM
        self.q, self.k, self.v = (
            nn.Linear(16, width),
            nn.Linear(16, kv_width),
            nn.Linear(16, kv_width),
        )
        self.qkv = nn.Linear(16, width + 2 * kv_width)
        self.out = nn.Linear(width, 16)
        slopes = torch.tensor([0.5**n for n in range(1, HEADS + 1)])
        if near_miss == "slopes that are learned":
            self.slopes = nn.Parameter(slopes)
        else:
            self.register_buffer("slopes", slopes)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(3.0)

    def forward(self, x, padding=None):
        q, k, v = PROJECTIONS[self.choice.projection](self, x)
        q, k, v = (part.unflatten(-1, (-1, DIM)).transpose(1, 2) for part in (q, k, v))
        k, v = (REPEATS[self.choice.repeat](part) for part in (k, v))
        return self.out(self.attend(q, k, v, padding).transpose(1, 2).flatten(2))

    def attend(self, q, k, v, padding):
        if self.near_miss in FLEX_NEAR_MISSES or self.choice.product == "flex":
            return flex(self, q, k, v, padding)
        if self.choice.product == "sdpa":
            return sdpa(self, q, k, v, padding)
        q, k, scale = SCALES[self.choice.scale](q, k)
        multiply, combine = PRODUCTS[self.choice.product]
        scores, batch = multiply(q, k), q.shape[0]
        if self.near_miss in BEFORE_MASK:
            scores = BEFORE_MASK[self.near_miss](scores)
        scores = scores * scale if scale != 1 else scores
        if self.choice.softcap:
            scores = 4.0 * torch.tanh(scores / 4.0)
        shape = scores.shape
        if padding is not None:
            hidden = (padding == 0)[:, None, None, :]
            scores = scores.view(batch, -1, *shape[-2:]).masked_fill(hidden, -math.inf).view(shape)
        bias = SLOPES.get(self.near_miss) or SLOPES[self.choice.alibi]
        if bias is not None:
            scores = bias(scores.view(batch, -1, *shape[-2:]), self.slopes).view(shape)
        mask = MASKS.get(self.near_miss) or MASKS[self.choice.mask]
        scores = mask(scores)
        weights = (WRONG_SOFTMAXES.get(self.near_miss) or SOFTMAXES[self.choice.softmax])(scores)
        if self.near_miss in AFTER_SOFTMAX:
            weights = AFTER_SOFTMAX[self.near_miss](weights)
        if self.choice.dropout:
            weights = F.dropout(weights, 0.3, training=False)
        result = combine(weights, v).reshape(q.shape)
        if self.near_miss == "weights escape":
            return result + weights.view(*q.shape[:2], *shape[-2:]).mean(-1, keepdim=True)
        return result


def separate(self, x):
    return self.q(x), self.k(x), self.v(x)


def packed_split(self, x):
    kv = self.choice.kv_heads * DIM
    return self.qkv(x).split((HEADS * DIM, kv, kv), -1)


def packed_slices(self, x):
    packed, kv = self.qkv(x), self.choice.kv_heads * DIM
    return packed[..., : HEADS * DIM], packed[..., HEADS * DIM : -kv], packed[..., -kv:]


def functional_linear(self, x):
    return tuple(F.linear(x, layer.weight, layer.bias) for layer in (self.q, self.k, self.v))


def weight_products(self, x):
    return tuple(x @ layer.weight.T + layer.bias for layer in (self.q, self.k, self.v))


PROJECTIONS = {
    "separate": separate,
    "packed split": packed_split,
    "packed slices": packed_slices,
    "functional": functional_linear,
    "weight products": weight_products,
}


def expanded(x):
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, HEADS // h, n, d).reshape(b, HEADS, n, d)


REPEATS = {
    "expand": expanded,
    "interleave": lambda x: x.repeat_interleave(HEADS // x.shape[1], 1),
    "contiguous": lambda x: expanded(x).contiguous(),
}
SCALES = {
    "scores": lambda q, k: (q, k, DIM**-0.5),
    "queries": lambda q, k: (q * DIM**-0.5, k, 1),
    "keys": lambda q, k: (q, k / math.sqrt(DIM), 1),
    "both": lambda q, k: (q * DIM**-0.25, k * DIM**-0.25, 1),
    "tensor": lambda q, k: (q / torch.full((), math.sqrt(DIM)), k, 1),
    "none": lambda q, k: (q, k, 1),
    "other": lambda q, k: (q, k, 0.2),
}


def merged(x):
    return x.reshape(-1, *x.shape[-2:])


def tokens_first(x):
    return x.transpose(1, 2)


PRODUCTS = {
    "matmul": (lambda q, k: q @ k.transpose(-2, -1), lambda w, v: w @ v),
    "matmul of permuted": (
        lambda q, k: torch.matmul(q, k.permute(0, 1, 3, 2).contiguous()),
        lambda w, v: torch.matmul(w, v.contiguous()),
    ),
    "bmm": (
        lambda q, k: torch.bmm(merged(q), merged(k).transpose(1, 2)),
        lambda w, v: torch.bmm(w, merged(v)),
    ),
    "baddbmm": (
        lambda q, k: torch.baddbmm(
            q.new_empty(1, 1, 1), merged(q), merged(k).mT, beta=0.0, alpha=1.0
        ),
        lambda w, v: torch.bmm(w, merged(v)),
    ),
    "matmul in three axes": (
        lambda q, k: merged(q) @ merged(k).mT,
        lambda w, v: w @ merged(v),
    ),
    "four axes, then bmm": (
        lambda q, k: q @ k.mT,
        lambda w, v: torch.bmm(merged(w), merged(v)),
    ),
    "einsum bhid": (
        lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k),
        lambda w, v: torch.einsum("bhij,bhjd->bhid", w, v),
    ),
    "einsum blhd": (
        lambda q, k: torch.einsum("blhd,bshd->bhls", tokens_first(q), tokens_first(k)),
        lambda w, v: torch.einsum("bhls,bshd->blhd", w, tokens_first(v)).transpose(1, 2),
    ),
    "einsum keys first": (
        lambda q, k: torch.einsum("bkhd, bqhd -> bhqk", tokens_first(k), tokens_first(q)),
        lambda w, v: torch.einsum("...kd,...qk->...qd", v, w),
    ),
    "einsum dots": (
        lambda q, k: torch.einsum("...id,...jd->...ij", q, k),
        lambda w, v: torch.einsum("...ij,...jd->...id", w, v),
    ),
    "einsum, then matmul": (
        lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k),
        lambda w, v: w @ v,
    ),
    **ELEMENT_PRODUCTS,
}


def lower(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


def additive(dtype, value):
    return torch.full((LENGTH, LENGTH), value, dtype=dtype).triu(1)


def hidden_by(dtype, value):
    return value * (1 - lower(LENGTH).to(dtype))


def by_positions(scores):
    n = torch.arange(LENGTH)
    return torch.where(n[:, None] >= n[None], scores, torch.finfo(scores.dtype).min)


def by_vmap(allowed):
    n = torch.arange(LENGTH)
    rows = torch.vmap(lambda i: torch.vmap(lambda j: allowed(i, j))(n))
    return rows(n)


MASKS = {
    "causal by vmap": lambda s: s.masked_fill(~by_vmap(lambda i, j: i >= j), -math.inf),
    "causal fill": lambda s: s.masked_fill(~lower(LENGTH), -math.inf),
    "causal fill by a number": lambda s: s.masked_fill(lower(LENGTH) == 0, -1e9),
    "causal where": lambda s: torch.where(lower(LENGTH), s, -math.inf),
    "causal positions": by_positions,
    "causal added": lambda s: s + additive(s.dtype, -math.inf),
    "causal added first": lambda s: additive(s.dtype, torch.finfo(s.dtype).min) + s,
    "causal arithmetic": lambda s: s + (1.0 - lower(LENGTH).to(s.dtype)) * -1e9,
    "causal by a factor": lambda s: s * lower(LENGTH).to(s.dtype) + hidden_by(s.dtype, -1e4),
    "causal in place": lambda s: s.clone().masked_fill_(~lower(LENGTH), -math.inf),
    "none": lambda s: s,
    # near misses
    "mask one key short": lambda s: s.masked_fill(
        ~lower(LENGTH).tril(-1) & ~eye(), -math.inf
    ).masked_fill(torch.arange(LENGTH) == 5, -2.0),
    "mask one key more": lambda s: s.masked_fill(
        ~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(1), -math.inf
    ),
    "mask strict": lambda s: s.masked_fill(~lower(LENGTH).tril(-1), -1e9),
    "mask transposed": lambda s: s.masked_fill(~lower(LENGTH).T, -math.inf),
    "mask banded": lambda s: s.masked_fill(~(lower(LENGTH) & lower(LENGTH).T.tril(2)), -1e9),
    "mask with a prefix": lambda s: s.masked_fill(
        ~(lower(LENGTH) | (torch.arange(LENGTH) < 3)), -math.inf
    ),
    "mask too soft": lambda s: s.masked_fill(~lower(LENGTH), -5.0),
    "mask of booleans added": lambda s: s + lower(LENGTH),
    "mask and a factor of 0 on the diagonal": lambda s: (
        s * lower(LENGTH).tril(-1).to(s.dtype) + hidden_by(s.dtype, -1e9)
    ),
    "mask and a factor of 2": lambda s: (
        s * (1 + lower(LENGTH).to(s.dtype)) + hidden_by(s.dtype, -1e9)
    ),
    "mask that is a factor alone": lambda s: s * lower(LENGTH).to(s.dtype),
    "mask of one cell": lambda s: s.masked_fill(~(lower(LENGTH) | one_cell()), -math.inf),
    "mask by vmap of others": lambda s: s.masked_fill(~by_vmap(lambda i, j: j >= i), -math.inf),
    "mask by vmap of two tokens": lambda s: s.masked_fill(
        ~by_vmap(lambda i, j: i // 2 >= j // 2), -math.inf
    ),
    "distance bias": lambda s: s.masked_fill(~lower(LENGTH), -math.inf) - distance() * 0.5,
}


def eye():
    return torch.eye(LENGTH, dtype=torch.bool)


def one_cell():
    n = torch.arange(LENGTH)
    return (n[:, None] == 2) & (n[None] == 7)


def distance():
    n = torch.arange(LENGTH)
    return (n[:, None] - n[None]).abs().float()


def columns():
    return torch.arange(LENGTH)


SLOPES = {
    "none": None,
    "columns": lambda s, slopes: s + slopes[:, None, None] * columns(),
    "columns first": lambda s, slopes: slopes.view(1, -1, 1, 1) * columns().to(s.dtype) + s,
    "distance": lambda s, slopes: s + slopes[:, None, None] * (columns() - columns()[:, None]),
    "from the last": lambda s, slopes: (
        s + (columns() - LENGTH + 1) * slopes.unsqueeze(1).unsqueeze(1)
    ),
    "in place": lambda s, slopes: s.clone().add_(slopes[:, None, None] * columns()),
    # near misses
    "slopes times squares": lambda s, slopes: s + slopes[:, None, None] * columns() ** 2,
    "slopes times products": lambda s, slopes: (
        s + slopes[:, None, None] * (columns() * columns()[:, None]) / LENGTH
    ),
    "slopes of keys": lambda s, slopes: s + slopes.repeat(LENGTH // HEADS) * columns(),
    "slopes that are learned": lambda s, slopes: s + slopes[:, None, None] * columns(),
    "slopes by halves": lambda s, slopes: s + slopes[:, None, None] * (columns() // 2),
}


def less_maximum(s):
    e = torch.exp(s - s.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def by_sums(s):
    e = s.exp()
    return e / e.sum(dim=-1, keepdim=True)


SOFTMAXES = {
    "softmax": lambda s: s.softmax(-1),
    "of float32": lambda s: F.softmax(s, dim=-1, dtype=torch.promote_types(s.dtype, torch.float32)),
    "and back": lambda s: torch.softmax(s.double(), -1).to(s.dtype),
    "of log_softmax": lambda s: s.log_softmax(-1).exp(),
    "by sums": by_sums,
    "less the maximum": less_maximum,
    "by logsumexp": lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(),
    "softmax of shifted": lambda s: (s - s.amax(-1, keepdim=True).detach()).softmax(-1),
}
WRONG_SOFTMAXES = {
    "softmax over queries": lambda s: s.softmax(-2),
    "softmax over batch": lambda s: s.softmax(0),
    "softmax twice": lambda s: s.softmax(-1).softmax(-1),
    "softmax less something else": lambda s: (s - s.mean(-1, keepdim=True).exp() * s).softmax(-1),
    "exponentials not normalised": lambda s: s.exp() / s.exp().sum(-2, keepdim=True),
    "sum of others": lambda s: s.exp() / (s.exp() + 1).sum(-1, keepdim=True),
    "sigmoid": lambda s: s.sigmoid(),
    "log_softmax": lambda s: s.log_softmax(-1),
}
AFTER_SOFTMAX = {
    "mask after the softmax": lambda w: w * lower(LENGTH),
    "mask after the softmax, filled": lambda w: w.masked_fill(~lower(LENGTH), 0.0),
    "weights squared": lambda w: w.pow(2),
    "weights detached": lambda w: w.detach(),
    "weights transposed": lambda w: w.mT,
    "weights shifted": lambda w: w.roll(1, -1),
    "weights scaled": lambda w: w * 0.5,
    "dropout in force twice": lambda w: F.dropout(F.dropout(w, 0.5), 0.5),
}
BEFORE_MASK = {
    "scores times a tensor": lambda s: s * s.mean().exp(),
    "scores of absolute value": lambda s: s.abs(),
    "scores detached": lambda s: s.detach(),
    "scores transposed": lambda s: s.mT,
    "scores shifted by keys": lambda s: s + torch.arange(LENGTH).to(s.dtype).sin() * 0.3,
    "scores rounded": lambda s: s.to(torch.int64).to(s.dtype),
}
NEAR_MISSES = (
    *(name for name in MASKS if name not in {"none"} and not name.startswith("causal")),
    *(name for name in SLOPES if name.startswith("slopes")),
    *FLEX_NEAR_MISSES,
    *WRONG_SOFTMAXES,
    *AFTER_SOFTMAX,
    *BEFORE_MASK,
    "weights escape",
)


def sdpa(self, q, k, v, padding):
    masked = self.choice.mask != "none"
    keep = None
    if padding is not None:
        keep = padding.bool()[:, None, None].expand(-1, 1, LENGTH, -1)
        keep = keep & lower(LENGTH) if masked else keep
    scale = {"none": 1.0, "other": 0.2}.get(self.choice.scale)
    if self.choice.alibi != "none":
        keep = lower(LENGTH) if keep is None else keep
        added = SLOPES[self.choice.alibi](q.new_zeros(1, HEADS, LENGTH, LENGTH), self.slopes)
        keep = torch.where(keep, added, -math.inf)
    causal = masked and keep is None
    return F.scaled_dot_product_attention(q, k, v, keep, is_causal=causal, scale=scale)
