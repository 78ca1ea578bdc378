"""Attention whose parts are written through a view, or computed without gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tests.attention_cores import causal, report


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch._dynamo.reset()


def keys_turned_without_gradient(q, k, v):
    with torch.no_grad():
        turned = k.transpose(-2, -1)
    return (q @ turned).masked_fill(~causal(24), -math.inf).softmax(-1) @ v


def heads_repeated_without_gradient(q, k, v):
    k, v = k[:, :2], v[:, :2].repeat_interleave(2, 1)
    with torch.no_grad():
        k = k.repeat_interleave(2, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def scale_overwritten_through_a_view(q, k, v):
    scale = torch.full((), 0.5)
    same = scale.detach()
    scale.mul_(2)
    return ((q @ k.mT) * same).masked_fill(~causal(24), -math.inf).softmax(-1) @ v


def sum_overwritten_through_a_view(q, k, v):
    """Attention to nothing as well: one more in the denominator."""
    weights = (q @ k.mT).masked_fill(~causal(24), -math.inf).exp()
    total = weights.sum(-1, keepdim=True)
    total.squeeze(-1).add_(1.0)
    return (weights / total) @ v


REFUSED = {
    keys_turned_without_gradient: "grad mode changes inside",
    heads_repeated_without_gradient: "grad mode changes inside",
    scale_overwritten_through_a_view: "something inside is overwritten through a view",
    sum_overwritten_through_a_view: "something inside is overwritten through a view",
}


@pytest.mark.parametrize("core", REFUSED, ids=lambda core: core.__name__)
def test_it_stays_full_and_says_why(core):
    (row,) = report(core).layers
    assert row.decision == "full"
    assert REFUSED[core] in row.reason
