"""What is not attention, or not understood: each refusal with its reason."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import flasheva_compile as fe
from tests.attention_cores import OPTIONS, causal, report


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch._dynamo.reset()


def weights_returned(q, k, v):
    weights = (q @ k.mT).masked_fill(~causal(24), -math.inf).softmax(-1)
    return weights @ v, weights


def weights_used_twice(q, k, v):
    weights = (q @ k.mT).masked_fill(~causal(24), -math.inf).softmax(-1)
    return weights @ v + weights.sum(-1, keepdim=True)


def learned_scale(q, k, v):
    return ((q @ k.mT) * q.mean().exp()).masked_fill(~causal(24), -math.inf).softmax(-1) @ v


def weights_on_the_right(q, k, v):
    weights = (q @ k.mT).masked_fill(~causal(24), -math.inf).softmax(-1)
    return v.mT @ weights


def relative_bias(q, k, v):
    distance = torch.arange(24)[:, None] - torch.arange(24)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=-0.1 * distance.abs().float())


def prefix_lm(q, k, v):
    mask = causal(24) | (torch.arange(24) < 5)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def strictly_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal(24).tril(-1))


def soft_mask(q, k, v):
    scores = (q @ k.mT).masked_fill(~causal(24), -5.0)
    return scores.softmax(-1) @ v


def powers_of_weights(q, k, v):
    return (q @ k.mT).softmax(-1).pow(2) @ v


def fewer_keys(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :, :20], v[:, :, :20])


def causal_from_the_left(q, k, v):
    return F.scaled_dot_product_attention(q[:, :, 4:], k, v, is_causal=True)


def written_through_a_view(q, k, v):
    scores = (q @ k.mT).masked_fill(~causal(24), -math.inf)
    scores[..., 3:5] = 1.0
    return scores.softmax(-1) @ v


def keys_overwritten_before_the_result(q, k, v):
    weights = (q @ k.mT).masked_fill(~causal(24), -math.inf).softmax(-1)
    k[..., 3:5] = 0.0
    return weights @ v


def weights_detached(q, k, v):
    return (q @ k.mT).masked_fill(~causal(24), -math.inf).softmax(-1).detach() @ v


def scores_detached(q, k, v):
    return (q @ k.mT).detach().masked_fill(~causal(24), -math.inf).softmax(-1) @ v


def weights_without_gradient(q, k, v):
    with torch.no_grad():
        weights = (q @ k.mT).masked_fill(~causal(24), -math.inf).softmax(-1)
    return weights @ v


def weights_rounded_to_integers(q, k, v):
    weights = (q @ k.mT).masked_fill(~causal(24), -math.inf).softmax(-1)
    return weights.to(torch.int32).to(v.dtype) @ v


def constant_inside_the_softcap(q, k, v):
    scores = 20 * torch.tanh((q @ k.mT + 7) / 20)
    return scores.masked_fill(~causal(24), -math.inf).softmax(-1) @ v


def mask_scaled_to_a_bias(q, k, v):
    mask = torch.where(causal(24), 0.0, -1e4)
    return ((q @ k.mT + mask) * 1e-3).softmax(-1) @ v


def two_dropouts(q, k, v):
    weights = F.dropout((q @ k.mT).softmax(-1), 0.5, training=True)
    return F.dropout(weights, 1e-9, training=True) @ v


def queries_broadcast_over_heads(q, k, v):
    return (q[:, :1] @ k.mT).softmax(-1) @ v


def sink_logit(q, k, v):
    """GPT-OSS: a learned logit joins the softmax and is dropped afterwards."""
    scores = (q @ k.mT).masked_fill(~causal(24), -math.inf)
    sink = torch.zeros_like(scores[..., :1])
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


def scores_written_to_a_buffer(q, k, v):
    """Who holds the buffer sees the scores; a rewritten attention would leave it empty."""
    buffer = torch.empty(2, 4, 24, 24)
    with torch.no_grad():
        scores = torch.mul(q @ k.mT, 0.3, out=buffer)
    return scores.softmax(-1) @ v, buffer


HEADS_MIXED = torch.eye(4) + 0.1


def talking_heads(q, k, v):
    """CaiT: a linear layer over the heads, on axes that were moved to the end for it."""
    scores = F.linear((q @ k.mT).permute(0, 2, 3, 1), HEADS_MIXED).permute(0, 3, 1, 2)
    return scores.softmax(-1) @ v


def weights_of_mixed_heads(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return F.linear(weights.permute(0, 2, 3, 1), HEADS_MIXED).permute(0, 3, 1, 2) @ v


def heads_mixed_by_einsum(q, k, v):
    scores = torch.einsum("bhij,hg->bgij", q @ k.mT, HEADS_MIXED)
    return scores.masked_fill(~causal(24), -math.inf).softmax(-1) @ v


def heads_mixed_by_a_convolution(q, k, v):
    scores = q @ k.mT
    scores = scores + F.conv2d(scores, HEADS_MIXED[..., None, None])
    return scores.masked_fill(~causal(24), -math.inf).softmax(-1) @ v


def distances(q, k, v):
    scores = -(torch.cdist(q.flatten(0, 1), k.flatten(0, 1)) ** 2).unflatten(0, (2, 4))
    return (scores * 0.1).masked_fill(~causal(24), -math.inf).softmax(-1) @ v


def additive_scores(q, k, v):
    """Bahdanau: a layer over features of every pair."""
    pairs = torch.tanh(q[:, :, :, None] + k[:, :, None])
    return F.linear(pairs, torch.ones(1, 8)).squeeze(-1).softmax(-1) @ v


def scores_of_a_layer(q, k, v):
    """Synthesizer: the weights of a token are computed from it alone."""
    return F.linear(q, torch.ones(24, 8)).softmax(-1) @ v


def pooled_by_scores(q, k, v):
    return F.linear(k, torch.ones(1, 8)).mT.softmax(-1) @ v


def mask_made_of_the_scores(q, k, v):
    scores = q @ k.mT
    return (scores + scores.detach().relu().sin()).softmax(-1) @ v


def zeroed_but_visible(q, k, v):
    """GPT's way to mask, of a factor that is 0 where the mask hides nothing."""
    keep = causal(24).float()
    return ((q @ k.mT) * keep.tril(-1) + -1e4 * (1 - keep)).softmax(-1) @ v


def zeroed_and_not_hidden(q, k, v):
    return ((q @ k.mT) * causal(24).float()).softmax(-1) @ v


def zeroed_and_hidden_too_little(q, k, v):
    keep = causal(24).float()
    return ((q @ k.mT) * keep + -50.0 * (1 - keep)).softmax(-1) @ v


def hidden_scores_enlarged(q, k, v):
    keep = causal(24).float()
    return ((q @ k.mT) * (4 - 3 * keep) + -1e4 * (1 - keep)).softmax(-1) @ v


def zeroed_after_they_are_hidden(q, k, v):
    """Minus infinity times 0 is not a number."""
    keep = causal(24)
    scores = (q @ k.mT).masked_fill(~keep, -math.inf) * keep.float()
    return (scores + -1e4 * (1 - keep.float())).softmax(-1) @ v


def maximum_over_queries_taken_off(q, k, v):
    """Scores ``[B, H, S, L]``: the last axis is not that of the softmax."""
    scores = k @ q.mT
    weights = (scores - scores.amax(-1, keepdim=True)).softmax(-2)
    return torch.einsum("bhsl,bhsd->bhld", weights, v)


def leading_axes_split_anew(q, k, v):
    scores, keep = (q @ k.mT).view(4, 2, 24, 24), q[:, :2, :, 0].reshape(4, 1, 1, 24) > -1
    return scores.masked_fill(~keep, -math.inf).view(2, 4, 24, 24).softmax(-1) @ v


def queries_split_anew(q, k, v):
    """Masked as twice as many sequences of half as many queries: scores ``[B, L, H, S]``."""
    scores = torch.einsum("bhld,bhsd->blhs", q, k).reshape(4, 12, 4, 24)
    scores = scores.masked_fill(~causal(24)[:12, None], -math.inf)
    return torch.einsum("blhs,bhsd->bhld", scores.view(2, 24, 4, 24).softmax(-1), v)


REFUSED = {
    maximum_over_queries_taken_off: "scores less a tensor that is not their maximum",
    leading_axes_split_anew: "a mask on scores whose leading axes are not those of queries",
    queries_split_anew: "scores are reshaped with queries and keys not last",
    talking_heads: "the scores mix heads: linear before the softmax",
    weights_of_mixed_heads: "the softmax weights mix heads: linear",
    heads_mixed_by_einsum: "the scores mix heads: einsum before the softmax",
    heads_mixed_by_a_convolution: "scores are added to what is made of them",
    distances: "the scores are no product of queries and keys: cdist",
    additive_scores: "the scores are no product of queries and keys: linear",
    scores_of_a_layer: "the scores are no product of queries and keys: linear",
    pooled_by_scores: "the scores are no product of queries and keys: linear",
    mask_made_of_the_scores: "scores are added to what is made of them",
    zeroed_but_visible: "scores are multiplied by a tensor",
    zeroed_and_not_hidden: "scores are multiplied by a tensor",
    zeroed_and_hidden_too_little: "scores are multiplied by a tensor",
    hidden_scores_enlarged: "scores are multiplied by a tensor",
    zeroed_after_they_are_hidden: "multiplied by a tensor after they are masked",
    scores_written_to_a_buffer: "mul(out=) between the product and the softmax",
    written_through_a_view: "overwritten through a view",
    keys_overwritten_before_the_result: "an operand is overwritten",
    weights_detached: "softmax weights go to detach",
    scores_detached: "detach between the product and the softmax",
    weights_without_gradient: "grad mode changes inside",
    weights_rounded_to_integers: "softmax weights go to to",
    constant_inside_the_softcap: "a number is added inside the softcap",
    mask_scaled_to_a_bias: "scaled down after the mask",
    two_dropouts: "two dropouts",
    queries_broadcast_over_heads: "1 query heads are no multiple of 4 key heads",
    sink_logit: "cat between the product and the softmax",
    weights_returned: "softmax weights are also returned",
    weights_used_twice: "softmax weights are also used by",
    learned_scale: "scores are multiplied by a tensor",
    relative_bias: "additive position bias",
    strictly_causal: "causal, but not aligned with the last key",
    prefix_lm: "mask not understood",
    soft_mask: "filled with something that is not minus infinity",
    powers_of_weights: "softmax weights go to pow",
    fewer_keys: "queries and keys differ in length",
    causal_from_the_left: "is_causal with fewer queries than keys",
}


@pytest.mark.parametrize("core", REFUSED, ids=lambda core: core.__name__)
def test_what_is_not_understood_stays_full_and_says_why(core):
    (row,) = report(core).layers
    assert row.decision == "full"
    assert REFUSED[core] in row.reason


BACKWARDS = tuple(range(23, -1, -1))
REORDERED = {
    "index_select": lambda x: x.index_select(2, torch.tensor(BACKWARDS)),
    "gather": lambda x: x.gather(2, torch.tensor(BACKWARDS)[:, None].expand(x.shape)),
    "take_along_dim": lambda x: torch.take_along_dim(x, x[..., :1].argsort(2), 2),
    "index_copy": lambda x: torch.zeros_like(x).index_copy(2, torch.tensor(BACKWARDS), x),
    "sort": lambda x: x.sort(2).values,
    "topk": lambda x: x.topk(24, 2)[0],
    "pad": lambda x: F.pad(x, (0, 0, 7, -7)),
    "flip": lambda x: x.flip(2),
}


@pytest.mark.parametrize("name", REORDERED)
def test_keys_in_another_order_than_queries_are_another_sequence(name):
    def core(q, k, v):
        return F.scaled_dot_product_attention(q, REORDERED[name](k), REORDERED[name](v))

    (row,) = report(core).layers
    assert row.decision == "full"
    assert "cross-attention" in row.reason or "preallocated" in row.reason


def reordered_alike(q, k, v):
    order = torch.tensor(BACKWARDS)
    return F.scaled_dot_product_attention(*(x.index_select(2, order) for x in (q, k, v)))


def features_reordered(q, k, v):
    order = torch.arange(7, -1, -1)
    q, k = (x.index_select(-1, order) + F.pad(x, (4, -4)) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("core", [reordered_alike, features_reordered], ids=lambda c: c.__name__)
def test_tokens_that_are_reordered_alike_or_not_at_all_are_one_sequence(core):
    assert [row.decision for row in report(core).layers] == ["eva"]


def linear_attention(q, k, v):
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


def router(q, k, v):
    return q * (q @ k.mT).mean((-1, -2), keepdim=True).softmax(1)


def mixture_of_experts(q, k, v):
    """Weights of experts, not of tokens, multiply what the experts make of each token."""
    weights = F.linear(q, torch.ones(3, 8)).softmax(-1)
    made = torch.stack([v, k.tanh(), v * k], -2)
    return (weights[..., None, :] @ made).squeeze(-2)


def vocabulary(q, k, v):
    """Expected embeddings: weights of a table's rows."""
    table = torch.ones(50, 8)
    return F.linear(q, table).softmax(-1) @ table


@pytest.mark.parametrize(
    "core",
    [
        linear_attention,
        over_queries,
        router,
        mixture_of_experts,
        vocabulary,
        weights_on_the_right,
    ],
    ids=lambda c: c.__name__,
)
def test_what_is_no_attention_is_not_reported(core):
    assert report(core).layers == ()


def test_pytorchs_fused_layers_are_reported():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 24, 16)
    with torch.no_grad():
        (row,) = fe.explain(layer, x, options=OPTIONS).layers
    assert "fused layer" in row.reason
    (row,) = fe.explain(layer.train(), x, options=OPTIONS).layers
    assert row.decision == "eva"
