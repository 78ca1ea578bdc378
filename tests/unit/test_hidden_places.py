"""Attention inside torch.func, inside higher-order ops, and in bodies that layers share."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flasheva_compile as fe
from tests.attention_cores import Core

WHOLE = {"window_size": 32, "chunk_size": 4, "inner_backend": "aot_eager"}


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch._dynamo.reset()


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_hand(q, k, v):
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(hidden, -1e9).softmax(-1) @ v


class Inside(Core):
    """An attention that ``place`` calls."""

    def __init__(self, place, core=attend):
        super().__init__(core)
        self.place = place

    def split(self, x, heads):
        return x.unflatten(-1, (heads, self.size)).transpose(-3, -2)

    def forward(self, x):
        return self.place(super().forward, x)


def under_vmap(attention, x):
    return torch.vmap(attention)(x)


def under_grad(attention, x):
    return torch.func.grad(lambda y: attention(y).square().sum())(x)


def in_cond(attention, x):
    return torch.cond(x.sum() > -1e9, lambda y: attention(y), lambda y: attention(y) * 2, (x,))


def in_loop(attention, x):
    def step(n, y):
        return n + 1, y + attention(y).transpose(-3, -2).flatten(-2)

    loop = torch._higher_order_ops.while_loop
    return loop(lambda n, _: n < 3, step, (torch.tensor(0), x))[1]


PLACES = {under_vmap: "func.vmap", under_grad: "func.grad", in_cond: "cond", in_loop: "while_loop"}


@pytest.mark.parametrize("core", [attend, by_hand], ids=lambda core: core.__name__)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_what_is_not_looked_into_is_reported_and_unchanged(place, core):
    model, x = (
        Inside(place, core).eval().requires_grad_(requires_grad=False),
        torch.randn(2, 24, 32),
    )
    ours = torch.compile(model, backend="flasheva", options=WHOLE | {"window_size": 4})(x)
    rows = fe.explain(model).layers
    assert rows
    assert {row.decision for row in rows} == {"full"}
    assert all(PLACES[place] in row.reason for row in rows)
    torch.testing.assert_close(ours, model(x))


def by_elements(q, k, v):
    return ((q @ k.mT).softmax(-1)[..., None] * v[..., None, :, :]).sum(-2)


def by_vecdot(q, k, v):
    weights = torch._masked_softmax(torch.linalg.vecdot(q[..., None, :], k[..., None, :, :]), OPEN)
    return weights @ v


OPEN = torch.zeros(2, 4, 24, 24, dtype=torch.bool)


@pytest.mark.parametrize("core", [by_elements, by_vecdot], ids=lambda core: core.__name__)
def test_other_spellings_in_bodies_are_reported(core):
    model = Inside(in_cond, core).eval().requires_grad_(requires_grad=False)
    rows = fe.explain(model, torch.randn(2, 24, 32), options=WHOLE).layers
    assert rows
    assert all("inside cond" in row.reason for row in rows)


def test_a_router_in_a_branch_is_no_attention():
    def routed(attention, x):
        return torch.cond(x.sum() > 0, lambda y: y.softmax(-1) * 2, lambda y: y + 1, (x,))

    report = fe.explain(Inside(routed).eval(), torch.randn(2, 24, 32), options=WHOLE)
    assert report.layers == ()


class Layer(Core):
    """Attention with a mask and a residual."""

    def forward(self, x, mask):
        q, k, v = (self.split(p(x), 4) for p in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return x + out.transpose(1, 2).flatten(2)


class Layers(nn.Module):
    """Three layers that run one compiled region; ``padding`` masks keys."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(attend) for _ in range(3))

    def forward(self, x, padding=None):
        mask = None
        if padding is not None:
            n = torch.arange(x.shape[1])
            mask = (n[:, None] >= n) & (padding > 0)[:, None, None]
        for layer in self.layers:
            x = region(layer, x, mask)
        return x


@torch.compiler.nested_compile_region
def region(layer, x, mask):
    return layer(x, mask)


PADDING = torch.ones(2, 24)
PADDING[0, -5:] = 0


class TestSharedRegions:
    """``nested_compile_region``: one body, edited once, for all the layers that run it."""

    @pytest.mark.parametrize("given", [(), (PADDING,)], ids=["causal", "padded"])
    def test_attention_in_them_is_rewritten(self, given):
        model, x = Layers(), torch.randn(2, 24, 32, requires_grad=True)
        ours = torch.compile(model, backend="flasheva", options=WHOLE)(x, *given)
        theirs = model(x, *given)
        assert len(fe.explain(model).rewritten) > 0
        assert fe.explain(model).left_full == ()
        for left, right in ((ours, theirs), (gradient(ours, x), gradient(theirs, x))):
            torch.testing.assert_close(left, right)

    def test_rules_cannot_tell_their_layers_apart(self):
        model, x = Layers().eval(), torch.randn(2, 24, 32)
        options = WHOLE | {"layers": {0: "full"}}
        ours = torch.compile(model, backend="flasheva", options=options)(x)
        assert {row.decision for row in fe.explain(model).layers} == {"full"}
        torch.testing.assert_close(ours, model(x))

    def test_a_run_that_is_not_understood_keeps_the_body_for_all(self):
        """The scale of the second run is a tensor: the body is not edited for the first either."""
        model, x = Scaled(), torch.randn(2, 24, 32)
        ours = torch.compile(model, backend="flasheva", options=WHOLE)(x)
        rows = fe.explain(model).layers
        assert [row.decision for row in rows] == ["full", "full"]
        assert "treated differently" in rows[0].reason
        assert "multiplied by a tensor" in rows[1].reason
        torch.testing.assert_close(ours, model(x))


class Scaled(nn.Module):
    """Two runs of one region with other scales: a number, and a buffer that may change."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.9))

    def forward(self, x):
        qkv = x.view(2, 24, 4, 8).transpose(1, 2)
        first = scaled_region(qkv.clone(), torch.full((), 0.3))
        return first + scaled_region(qkv.tanh(), self.scale * 1)


@torch.compiler.nested_compile_region
def scaled_region(qkv, scale):
    scores = (qkv @ qkv.transpose(-2, -1)) * scale
    hidden = torch.ones(24, 24, dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, -1e9).softmax(-1) @ qkv).clone()


def gradient(out, x):
    return torch.autograd.grad(out.square().sum(), x)[0]


class Reversed(torch.autograd.Function):
    """The identity, with a gradient of its own."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Tripled(torch.autograd.Function):
    """Attention with a gradient of its own."""

    @staticmethod
    def forward(ctx, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient * 2, gradient * 3


def doubled(x):
    x.register_hook(lambda gradient: gradient * 2)
    return x


def weighed(q, k, v, change_scores=lambda s: s, change_weights=lambda w: w):
    scores = change_scores(q @ k.mT).masked_fill(torch.ones(24, 24).triu(1) > 0, -1e9)
    return change_weights(scores.softmax(-1)) @ v


def repeated(x):
    return x[:, :2].repeat_interleave(2, 1)


OWN_GRADIENTS = {
    "hook on weights": (lambda q, k, v: weighed(q, k, v, change_weights=doubled), "full"),
    "hook on scores": (lambda q, k, v: weighed(q, k, v, doubled), "full"),
    "hook on keys": (lambda q, k, v: attend(q, doubled(k), v), "eva"),
    "hook on repeated keys": (
        lambda q, k, v: attend(q, doubled(repeated(k)), repeated(v)),
        "eva",
    ),
    "function on weights": (
        lambda q, k, v: weighed(q, k, v, change_weights=Reversed.apply),
        "full",
    ),
    "function on repeated keys": (
        lambda q, k, v: attend(q, Reversed.apply(repeated(k)), repeated(v)),
        "eva",
    ),
    "function that attends": (Tripled.apply, "full"),
}


@pytest.mark.parametrize("name", OWN_GRADIENTS)
def test_gradients_of_hooks_and_functions_are_kept(name):
    core, decision = OWN_GRADIENTS[name]
    model, x = Core(core).double(), torch.randn(2, 24, 32, dtype=torch.double, requires_grad=True)
    ours, theirs = torch.compile(model, backend="flasheva", options=WHOLE)(x), model(x)
    torch.testing.assert_close(gradient(ours, x), gradient(theirs, x))
    assert {row.decision for row in fe.explain(model).layers} == {decision}


class _Broken(nn.Module):
    """An attention behind a call that Dynamo cannot follow, and one behind a branch."""

    def forward(self, q, k, v):
        q = attend(q, k, v)
        print(end="")  # breaks the graph
        q = attend(q, k, v)
        return q * 2 if q.sum() > 0 else q


def test_graph_breaks_are_reported_with_their_cause():
    qkv = torch.randn(3, 1, 2, 8, 4)
    report = fe.explain(_Broken(), *qkv)
    assert report.rewritten
    assert not report.left_full
    breaks = [warning for warning in report.warnings if warning.startswith("graph break: ")]
    assert "print" in breaks[0]
    assert "depends on what a tensor holds" in breaks[1]
    assert all("test_hidden_places.py:" in warning for warning in breaks)
    assert not fe.explain(attend, *qkv).warnings
