"""Every spelling of attention is found, and computes what it computed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flasheva_compile as fe
from tests.attention_cores import OPTIONS, Core, causal, report
from tests.models.oracle import assert_as_accurate


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch._dynamo.reset()


def plain(q, k, v):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~causal(q.shape[2]), -math.inf).softmax(-1) @ v


def scale_on_queries(q, k, v):
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.mT)
    return torch.where(causal(q.shape[2]), scores, -math.inf).softmax(-1) @ v


def softmax_in_float32(q, k, v):
    scores = (q @ k.mT).mul(0.3) + torch.full((24, 24), -math.inf).triu(1)
    return F.softmax(scores.float(), -1, dtype=torch.float32).to(q.dtype) @ v


def in_place(q, k, v):
    scores = q @ k.transpose(-2, -1)
    scores /= 2.0
    scores += torch.full((24, 24), torch.finfo(torch.float32).min).triu(1)
    return F.dropout(scores.softmax(-1), 0.1, training=False) @ v


def keys_transposed_by_permute(q, k, v):
    return plain(q, k.permute(0, 1, 3, 2).contiguous().transpose(-1, -2), v)


def softcap(q, k, v):
    scores = 5.0 * torch.tanh(q @ k.mT * 0.3 / 5.0)
    return scores.masked_fill(~causal(24), -1e9).softmax(-1) @ v


def repeated_heads(q, k, v):
    def repeat(x):
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, 2, n, d).reshape(b, h * 2, n, d)

    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True)


def interleaved_heads(q, k, v):
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def repeated_tokens(q, k, v):
    """What repeat_kv does to heads, done to tokens: the same ops, another merge."""

    def repeat(x):
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, 2, n, d).reshape(b, h, 2 * n, d)

    mask = torch.arange(48)[None] <= torch.arange(24, 48)[:, None]
    return F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask)


def unevenly_repeated_heads(q, k, v):
    repeats = torch.tensor([3, 1])
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def tiled_heads(q, k, v):
    k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def enable_gqa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.2)


def multiplied_by_ones_and_zeros(q, k, v):
    """GPT: what is hidden becomes -10000, whatever the score."""
    keep = causal(24).float()
    return ((q @ k.mT) * 0.3 * keep + -1e4 * (1 - keep)).softmax(-1) @ v


def keys_before_heads(q, k, v):
    """Scores ``[B, L, S, H]``: the softmax runs over an axis that is not the last."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("blhd,bshd->blsh", q, k)
    weights = scores.masked_fill(~causal(24)[..., None], -math.inf).softmax(2)
    return torch.einsum("blsh,bshd->bhld", weights, v)


def maximum_over_keys_taken_off(q, k, v):
    """Scores ``[B, H, S, L]`` and a softmax by hand over their keys."""
    scores = (k @ q.mT).masked_fill(~causal(24).mT, -math.inf)
    weights = (scores - scores.amax(-2, keepdim=True)).exp()
    weights = weights / weights.sum(-2, keepdim=True)
    return torch.einsum("bhsl,bhsd->bhld", weights, v)


def linalg_products(q, k, v):
    scores = torch.linalg.matmul(q, k.mT).masked_fill(~causal(24), -math.inf)
    return torch.linalg.matmul(scores.softmax(-1), v)


UNGROUPED = (tiled_heads, unevenly_repeated_heads)
GROUPED = (repeated_heads, interleaved_heads, enable_gqa, *UNGROUPED)
SPELLINGS = (
    plain,
    scale_on_queries,
    softmax_in_float32,
    in_place,
    keys_transposed_by_permute,
    softcap,
    repeated_tokens,
    multiplied_by_ones_and_zeros,
    keys_before_heads,
    maximum_over_keys_taken_off,
    linalg_products,
    *GROUPED,
)


@pytest.mark.parametrize("core", SPELLINGS, ids=lambda core: core.__name__)
def test_every_spelling_is_found_and_computes_the_same(core):
    shape = {"kv_heads": 2} if core in GROUPED else {}
    found = report(core, **shape)
    assert [(row.decision, row.causal) for row in found.layers] == [("eva", True)], found
    # Tiled heads pair query head h with key head h mod 2: they must not be taken for a group.
    assert found.layers[0].kv_heads == (2 if shape and core not in UNGROUPED else 4)
    model, x = Core(core, **shape).eval(), torch.randn(2, 24, 32)
    whole = {"window_size": 64, "inner_backend": "eager"}
    compiled = torch.compile(model, backend="flasheva", options=whole)
    exact = Core(core, **shape).eval().double()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_as_accurate(compiled(x), [model(x)], exact(x.double()))


def test_a_prefix_of_cached_keys_is_attended_from_the_end():
    """Fewer queries than keys under a mask that proves the offset: a decoding step."""

    def core(q, k, v):
        mask = torch.arange(24)[None] <= torch.arange(20, 24)[:, None]
        return F.scaled_dot_product_attention(q[:, :, 20:], k, v, attn_mask=mask)

    (row,) = report(core).layers
    assert (row.decision, row.causal) == ("eva", True)
    torch.manual_seed(0)
    model, x = Core(core).eval(), torch.randn(2, 24, 32)
    options = {**OPTIONS, "inner_backend": "eager"}
    steps = torch.compile(model, backend="flasheva", options=options)(x)
    model.core = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch._dynamo.reset()
    whole = torch.compile(model, backend="flasheva", options=options)(x)
    assert_as_accurate(steps, [whole[:, :, 20:]], whole[:, :, 20:].double())


def test_cross_attention_of_equal_length_is_refused():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.kv = nn.Linear(16, 16), nn.Linear(16, 32)

        def forward(self, x, y):
            q = self.q(x)[:, None]
            k, v = self.kv(y)[:, None].chunk(2, -1)
            return F.scaled_dot_product_attention(q, k, v)

    x, y = torch.randn(2, 2, 24, 16)
    (row,) = fe.explain(Cross(), x, y, options=OPTIONS).layers
    assert row.decision == "full"
    assert "cross-attention" in row.reason
    declared = {**OPTIONS, "assume_mask": "bidirectional"}
    assert fe.explain(Cross(), x, y, options=declared).layers[0].decision == "eva"


@pytest.mark.parametrize(("own", "decision"), [("queries and keys", "eva"), ("queries", "full")])
def test_multihead_attention_of_two_tensors(own, decision):
    """It transposes queries, keys and values one by one, before it projects them."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x, y):
            keys = x if own == "queries and keys" else y
            return self.attention(x, keys, y.tanh(), need_weights=False)[0]

    model = Attention()
    (row,) = fe.explain(model, *torch.randn(2, 2, 24, 16), options=OPTIONS).layers
    assert (row.decision, "cross-attention" in row.reason) == (decision, decision == "full")


def later_copies(q, k, v):
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out, k.contiguous(), v.to(q.dtype)


def masked_twice(q, k, v):
    """Two attentions under one padding mask, the first result wanted last."""
    mask = (q[:, 0, :, 0] < 9)[:, None, None]
    first = (q @ k.mT).masked_fill(~mask, -math.inf).softmax(-1)
    second = (k @ q.mT).masked_fill(~mask, -math.inf).softmax(-1) @ v
    return second, first @ v


def masked_at_two_lengths(q, k, v):
    def attend(q, k, v):
        mask = (q[:, 0, :, 0] < 9)[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend(q, k, v), attend(*(x[:, :, :12] for x in (q, k, v)))


@pytest.mark.parametrize(
    "core", [later_copies, masked_twice, masked_at_two_lengths], ids=lambda c: c.__name__
)
def test_what_shares_operands_or_masks_still_compiles(core):
    torch.manual_seed(0)
    model, x = Core(core).eval(), torch.randn(2, 24, 32)
    whole = {"window_size": 32, "inner_backend": "aot_eager", "strict": True}
    compiled = torch.compile(model, backend="flasheva", options=whole)
    exact = Core(core).eval().double()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        for ours, theirs, truth in zip(compiled(x), model(x), exact(x.double()), strict=True):
            assert_as_accurate(ours, [theirs], truth)


def one_after_the_other(q, k, v):
    """Queries that are the result of an attention, with nothing in between."""
    first = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    second = (first @ k.mT).masked_fill(~causal(24), -math.inf).softmax(-1) @ v
    return F.scaled_dot_product_attention(second, first, v, is_causal=True)


class Sloped(Core):
    """ALiBi that is added before the scores are scaled."""

    def __init__(self, product):
        super().__init__(lambda q, k, v: self.attend(q, k, v, product))
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625]))

    def attend(self, q, k, v, product):
        distance = torch.arange(24) - torch.arange(24)[:, None]
        scores = product(q, k, self.slopes[:, None, None] * distance)
        return scores.masked_fill(~causal(24), -math.inf).softmax(-1) @ v


def added_by_baddbmm(q, k, bias):
    bias = bias.expand(2, 4, 24, 24).flatten(0, 1)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.5, alpha=0.3)
    return scores.view(2, 4, 24, 24)


WITHOUT_VALIDATION = {
    "chained": lambda: Core(one_after_the_other),
    "bias, then scale": lambda: Sloped(lambda q, k, bias: (q @ k.mT + bias) * 0.3),
    "bias with a factor": lambda: Sloped(added_by_baddbmm),
}


@pytest.mark.parametrize("name", WITHOUT_VALIDATION)
def test_what_is_understood_needs_no_validation(name):
    torch.manual_seed(0)
    model, x = WITHOUT_VALIDATION[name]().double().eval(), torch.randn(2, 24, 32).double()
    options = {"window_size": 32, "inner_backend": "eager", "strict": True, "validate": False}
    ours = torch.compile(model, backend="flasheva", options=options)(x)
    torch.testing.assert_close(ours, model(x))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_result_that_is_overwritten_has_the_same_gradient(inner):
    def core(q, k, v):
        out = (q @ k.mT).masked_fill(~causal(24), -math.inf).softmax(-1) @ v
        out.mul_(2)
        return out

    model, x = Core(core).double(), torch.randn(2, 24, 32, dtype=torch.double, requires_grad=True)
    options = {"window_size": 32, "inner_backend": inner, "strict": True}
    compiled = torch.compile(model, backend="flasheva", options=options)
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, model))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("upcast", [False, True])
def test_scores_wider_than_the_result_lose_nothing(upcast):
    """Float32 queries and keys beside bfloat16 values; what was only cast up costs nothing."""

    def core(q, k, v):
        q, k = ((x.bfloat16() if upcast else x).float() * 1 for x in (q * 32, k * 8))
        weights = (q @ k.mT).masked_fill(~causal(24), -math.inf).softmax(-1)
        return weights.to(v.dtype) @ v

    def narrow(q, k, v):
        return core(q, k, v.bfloat16())

    torch.manual_seed(0)
    x, exact = torch.randn(2, 24, 32), Core(core).double()
    model = Core(narrow)
    exact.load_state_dict(model.state_dict())
    options = {"window_size": 32, "inner_backend": "eager", "strict": True}
    with torch.no_grad():
        ours = torch.compile(model, backend="flasheva", options=options)(x)
        assert ours.dtype == torch.bfloat16
        own, error = ((y.double() - exact(x.double())).abs().max() for y in (model(x), ours))
    assert error <= 2 * own


def test_autocast_inside_the_graph():
    def core(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, k, v.bfloat16(), is_causal=True)

    torch.manual_seed(0)
    model, x = Core(core).eval(), torch.randn(2, 24, 32)
    whole = {"window_size": 32, "inner_backend": "aot_eager", "strict": True}
    ours, theirs = torch.compile(model, backend="flasheva", options=whole)(x), model(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    model.core = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_as_accurate(ours, [theirs], model.double()(x.double()))


def test_transforms_of_torch_func_are_left_alone():
    def attend(q):
        weights = (q @ q.mT).masked_fill(~causal(6), -math.inf).softmax(-1)
        return (weights @ q).sum()

    q = torch.randn(1, 1, 6, 4)
    gradient = torch.func.grad(attend)
    options = {**OPTIONS, "inner_backend": "eager"}
    compiled = torch.compile(gradient, backend="flasheva", options=options)
    assert torch.equal(compiled(q), gradient(q))
    assert torch.is_grad_enabled()
