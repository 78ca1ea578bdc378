"""Masks that are almost a known one: each must stay unknown, or show a bias that is refused."""

from __future__ import annotations

import torch

from tests.mask_programs import FULL, PACKED, B, K, Program, Q, index, padding

ADVERSARIES: list[Program] = []


def adversary(*inputs, shape=FULL, kind="unknown"):
    def register(function):
        ADVERSARIES.append(Program(function, kind, inputs, shape))
        return function

    return register


@adversary()
def prefix_lm():
    _, q, k = index()
    return (k <= q) | (k < 3)


@adversary()
def banded_abs():
    _, q, k = index()
    return (q - k).abs() <= 2


@adversary()
def dilated():
    _, q, k = index()
    return (k <= q) & ((q - k) % 2 == 0)


@adversary()
def one_cell_more():
    _, q, k = index()
    return (k <= q) | ((q == 2) & (k == 5))


@adversary()
def one_cell_less():
    _, q, k = index()
    return (k <= q) & ~((q == 5) & (k == 2))


@adversary(torch.ones(1, 1, Q, K).tril())
def buffer(bias):
    return bias[:, :, :Q, :K] != 0


@adversary(torch.ones(B, 1, Q, K, dtype=torch.bool).tril())
def user_four_dimensional(mask):
    return mask


@adversary(PACKED)
def documents_of_unknown_order(ids):
    return (ids[:, None, :, None] == ids[:, None, None, :]) & torch.ones(Q, K).tril().bool()


@adversary(PACKED)
def token_types(types):
    b, q, k = index()
    return (k <= q) | (types[b, q] == types[b, k])


@adversary(torch.tensor([0, 1, 2]))
def causal_for_some_heads(offset):
    _, q, k = index()
    return k <= q + offset[None, :, None, None]


@adversary(torch.randperm(K))
def permuted_keys(order):
    _, q, _ = index()
    return order[None, None, None, :] <= q


@adversary()
def low_precision_arange():
    i = torch.arange(Q, dtype=torch.bfloat16)  # 257 == 256 in bfloat16
    return i[None, :] <= i[:, None]


@adversary()
def wraps_in_uint8():
    i = torch.arange(Q, dtype=torch.uint8)
    return (i[:, None] - i[None, :]) >= 0


@adversary()
def fractions():
    i = torch.arange(Q, dtype=torch.float32)
    return i[None, :] / 49 * 49 <= i[:, None]


@adversary()
def negative_index_wraps():
    i = torch.arange(Q)
    return i[torch.arange(K) - 4][None, :] <= i[:, None]


@adversary()
def overwritten_slice():
    mask = torch.ones(Q, K, dtype=torch.bool).tril()
    mask[:, :2] = True
    return mask & torch.ones(Q, K, dtype=torch.bool)


@adversary()
def overwritten_after_the_view():
    mask = torch.ones(Q, K).tril()
    view = mask[None, None]
    mask.zero_()
    return view > 0


@adversary(padding())
def sum_of_segments(m):  # a running sum of unknown signs
    b, q, k = index()
    s = m.cumsum(-1)
    return s[b, q] == s[b, k]


@adversary(padding())
def reversed_segments(m):
    b, q, k = index()
    s = -(m != 0).cumsum(-1)
    return s[b, q] == s[b, k]


@adversary(torch.tensor([[1] * K] * B))
def running_sum_that_wraps(new):
    b, q, k = index()
    s = (new != 0).to(torch.int8).cumsum(-1, dtype=torch.int8)
    return (k <= q) & (s[b, q] == s[b, k])


@adversary(torch.tensor([[1] * K] * B))
def ids_rounded_before_they_are_compared(new):
    b, q, k = index()
    s = (new != 0).cumsum(-1).float()  # 2**24 == 2**24 + 1
    return (k <= q) & (s[b, q] == s[b, k])


@adversary(torch.tensor(float("nan")))
def compared_with_data(x):
    _, q, k = index()
    return (k <= q) & (x + k > x + q - 3)


@adversary(torch.randn(B, K), kind="bidirectional+bias")
def data_cancels_the_mask_value(x):
    return x[:, None, None, :] * 1e9 - 1e9
