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


def single_matrices_by_inner(q, k, v):
    q, k, v = (x[0, 0] for x in (q, k, v))
    return torch.inner(q, k).masked_fill(~causal(24), -math.inf).softmax(-1) @ v


def single_matrices_by_tensordot(q, k, v):
    q, k, v = (x[0, 0] for x in (q, k, v))
    scores = torch.tensordot(q, k, dims=([1], [1])).masked_fill(~causal(24), -math.inf)
    return torch.tensordot(scores.softmax(-1), v, dims=1)


def batches_out_of_tensordot(q, k, v):
    """Every batch and head with every other, of which the own ones are taken."""

    def own(x):
        return x.diagonal(dim1=0, dim2=3).diagonal(dim1=0, dim2=2).permute(2, 3, 0, 1)

    weights = own(torch.inner(q, k)).masked_fill(~causal(24), -math.inf).softmax(-1)
    return own(torch.tensordot(weights, v, dims=([3], [2])))


def values_by_tensordot(q, k, v):
    return torch.tensordot(hidden_scores(q, k).softmax(-1)[0, 0], v[0, 0], dims=1)


def masked_by_one_op(q, k, v):
    return torch._masked_softmax(q @ k.mT, ~causal(24), -1, 0) @ v


def products_of_two_dtypes(q, k, v):
    scores = (q.double()[:, :, :, None] * k[:, :, None]).sum(-1)
    return scores.softmax(-1).float() @ v


def elements_under_no_grad(q, k, v):
    with torch.no_grad():
        largest = q.amax()
    weights = hidden_scores(q, k).softmax(-1)
    with torch.no_grad():
        products = weights[..., None] * v[:, :, None]
    return products.sum(-2) + 0 * largest


def elements_overwritten(q, k, v):
    products = q[:, :, :, None] * k[:, :, None]
    products[..., 0] = 1.0
    return products.sum(-1).masked_fill(~causal(24), -math.inf).softmax(-1) @ v


def three_factors(q, k, v):
    weights = hidden_scores(q, k).softmax(-1)
    return (weights[..., None] * v[:, :, None] * k[:, :, None]).sum(-2)


def elements_used_twice(q, k, v):
    products = hidden_scores(q, k).softmax(-1)[..., None] * v[:, :, None]
    return products.sum(-2) + products.amax(-2)


def values_averaged(q, k, v):
    weights = (q @ k.mT).masked_fill(~causal(24), -math.inf).softmax(-1)
    return (weights[..., None] * v[:, :, None]).mean(-2) * 24


def values_kept_as_an_axis(q, k, v):
    weights = hidden_scores(q, k).softmax(-1)
    return (weights[..., None] * v[:, :, None]).sum(-2, keepdim=True).squeeze(-2)


def values_scaled(q, k, v):
    weights = hidden_scores(q, k).softmax(-1)
    return torch.multiply(weights[..., None] * 0.5, v[:, :, None]).nansum(-2)


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
    single_matrices_by_inner: "inner, which has no axes of a batch",
    single_matrices_by_tensordot: "tensordot, which has no axes of a batch",
    batches_out_of_tensordot: "permute between the product and the softmax",
    values_by_tensordot: "softmax weights go to select",
    masked_by_one_op: "masked by _masked_softmax",
    products_of_two_dtypes: "a product of torch.float64 and torch.float32",
    elements_under_no_grad: "grad mode changes inside",
    elements_overwritten: "overwritten through a view",
    three_factors: "softmax weights go to unsqueeze",
    elements_used_twice: "softmax weights go to unsqueeze",
    values_averaged: "softmax weights go to unsqueeze",
    values_kept_as_an_axis: "softmax weights go to unsqueeze",
    values_scaled: "softmax weights go to unsqueeze",
    ends_behind_the_softmax: "softmax weights go to output",
}


@pytest.mark.parametrize("core", REFUSED, ids=lambda core: core.__name__)
def test_it_stays_full_and_says_why(core):
    (row,) = report(core).layers
    assert row.decision == "full"
    assert REFUSED[core] in row.reason


EXPERTS = torch.ones(8, 3)


def mixture_of_experts(q, k, v):
    """Weights of experts, not of tokens, multiply what the experts make of each token."""
    weights = (q @ EXPERTS).softmax(-1)
    made = torch.stack([v, k.tanh(), v * k], -2)
    return (weights[..., None] * made).sum(-2)


def pooled_tokens(q, k, v):
    """What a head of a classifier does with the tokens of a sequence."""
    weights = F.linear(k, torch.ones(1, 8)).softmax(-2)
    return q + (weights * v).sum(-2, keepdim=True)


@pytest.mark.parametrize("core", [mixture_of_experts, pooled_tokens], ids=lambda c: c.__name__)
def test_sums_of_weighted_features_are_not_reported(core):
    assert report(core).layers == ()
