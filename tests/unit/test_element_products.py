"""Attention by products of elements is FlashEVA at every length, as by products of matrices."""

from __future__ import annotations

import math

import pytest
import torch

from tests.attention_cores import Core, causal
from tests.element_products import ELEMENT_PRODUCTS


def by(scores, values):
    def core(q, k, v):
        hidden = ~causal(q.shape[2])
        return values((scores(q, k) * 8**-0.5).masked_fill(hidden, -math.inf).softmax(-1), v)

    return core


@pytest.mark.parametrize("name", ["elements, summed", "vecdot"])
def test_lengths_that_become_dynamic_compute_the_same(name):
    torch._dynamo.reset()
    matrices = by(lambda q, k: q @ k.mT, lambda w, v: w @ v)
    options = {"window_size": 8, "chunk_size": 4, "inner_backend": "eager", "strict": True}
    elements, plain = (
        torch.compile(Core(core), backend="flasheva", options=options)
        for core in (by(*ELEMENT_PRODUCTS[name]), matrices)
    )
    elements.load_state_dict(plain.state_dict())
    for length in (24, 17, 40):
        x = torch.randn(2, length, 32)
        torch.testing.assert_close(elements(x), plain(x))
        assert (plain(x) - plain._orig_mod(x)).abs().max() > 1e-3
