"""Attention that is never rewritten, but must not be missing from a report."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tests.attention_cores import causal, report


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch._dynamo.reset()


def hidden_scores(q, k):
    return (q @ k.mT).masked_fill(~causal(24), -math.inf)


def normalised_by_other_exponentials(q, k, v):
    return (hidden_scores(q, k).exp() / hidden_scores(q, k).exp().sum(-1, keepdim=True)) @ v


def normalised_after_the_values(q, k, v):
    weights = hidden_scores(q, k).exp()
    return (weights @ v) / weights.sum(-1, keepdim=True)


def normalised_by_a_function(q, k, v):
    return F.normalize(hidden_scores(q, k).exp(), p=1, dim=-1) @ v


def kernel_called_directly(q, k, v):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]


def single_matrices(q, k, v):
    q, k, v = (x[0, 0] for x in (q, k, v))
    return (q @ k.T).softmax(-1) @ v


def ends_behind_the_softmax(q, k, v):
    weights = hidden_scores(q, k).softmax(-1)
    torch._dynamo.graph_break()
    return weights @ v


REFUSED = {
    normalised_by_other_exponentials: "not normalised in a way that is known",
    normalised_after_the_values: "not normalised in a way that is known",
    normalised_by_a_function: "not normalised in a way that is known",
    kernel_called_directly: "a call of _scaled_dot_product_flash_attention_for_cpu",
    single_matrices: "a product of 2 and 2 axes",
    ends_behind_the_softmax: "softmax weights go to output",
}


@pytest.mark.parametrize("core", REFUSED, ids=lambda core: core.__name__)
def test_it_stays_full_and_says_why(core):
    (row,) = report(core).layers
    assert row.decision == "full"
    assert REFUSED[core] in row.reason
