"""Layouts of attention, PyTorch's own modules, and which axis of the model is attended."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flasheva_compile as fe
from tests.attention_cores import OPTIONS, Core, causal, report
from tests.models.oracle import assert_as_accurate

WHOLE = {"window_size": 32, "chunk_size": 4, "inner_backend": "aot_eager"}


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch._dynamo.reset()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(fast)


def assert_exact(model, *inputs, rewritten, **keywords):
    """Forward and gradient equal those of the model as it is; so many attentions rewritten."""
    exact = copy.deepcopy(model).double()
    doubled = [x.double() if x.is_floating_point() else x for x in inputs]
    ours = step(torch.compile(model, backend="flasheva", options=WHOLE), model, inputs, keywords)
    found = fe.explain(model)
    assert len(found.rewritten) == rewritten, found
    assert found.warnings == ()
    theirs, truth = step(model, model, inputs, keywords), step(exact, exact, doubled, keywords)
    for got, plain, true in zip(ours, theirs, truth, strict=True):
        assert_as_accurate(got, [plain], true)
    return found


def step(call, model, inputs, keywords):
    model.zero_grad()
    out = call(*inputs, **keywords)
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * target.to(out)).sum().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` of one sequence."""

    def __init__(self, masked, need_weights, batch_first=True):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first)
        self.masked, self.need_weights = masked, need_weights

    def forward(self, x, hidden=None):
        length = x.shape[1] if self.attention.batch_first else x.shape[0]
        mask = ~causal(length) if self.masked else None
        arguments = {
            "attn_mask": mask,
            "key_padding_mask": hidden,
            "need_weights": self.need_weights,
        }
        return self.attention(x, x, x, **arguments)[0]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_multihead_attention(masked, need_weights, padded, batch_first):
    hidden = torch.zeros(3, 12, dtype=torch.bool)
    hidden[0, -4:] = True
    inputs = (tokens(3, 12, 16) if batch_first else tokens(12, 3, 16), *([hidden] * padded))
    model = SelfAttention(masked, need_weights, batch_first)
    (row,) = assert_exact(model, *inputs, rewritten=1).layers
    assert (row.path, row.heads, row.causal) == ("attention", 2, masked)
    assert ("key padding" in row.mask) is padded


def test_multihead_attention_that_returns_its_weights_stays_full():
    model, x = nn.MultiheadAttention(16, 2, batch_first=True), tokens(2, 12, 16)
    (row,) = fe.explain(model, x, x, x, options=OPTIONS).layers
    assert row.decision == "full"
    assert "softmax weights are also used by" in row.reason


@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder(training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    found = assert_exact(model, tokens(2, 12, 16), rewritten=2)
    assert [row.path for row in found.layers] == ["layers.0.self_attn", "layers.1.self_attn"]


def test_transformer_decoder_keeps_its_cross_attention():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerDecoder(layer, 1)
    mask = nn.Transformer.generate_square_subsequent_mask(12)
    inputs = (tokens(2, 12, 16), tokens(2, 12, 16) * 2)
    found = fe.explain(model, *inputs, tgt_mask=mask, tgt_is_causal=True, options=OPTIONS)
    decisions = {row.path: (row.decision, row.reason) for row in found.layers}
    assert decisions["layers.0.self_attn"][0] == "eva"
    assert decisions["layers.0.multihead_attn"][0] == "full"
    assert "cross-attention" in decisions["layers.0.multihead_attn"][1]


def test_multihead_attention_of_any_length():
    model = SelfAttention(masked=True, need_weights=True)
    compiled = torch.compile(model, backend="flasheva", dynamic=True, options=WHOLE)
    for length in (12, 17):
        x = tokens(2, length, 16)
        exact = copy.deepcopy(model).double()(x.double())
        assert_as_accurate(compiled(x), [model(x)], exact)
    assert len(fe.explain(model).rewritten) == 1


def test_grouped_queries_in_five_axes():
    def core(q, k, v):
        q = q.unflatten(1, (2, 2))
        scores = (q @ k[:, :, None].mT * 0.3).masked_fill(~causal(24), -math.inf)
        return (scores.softmax(-1) @ v[:, :, None]).flatten(1, 2)

    (row,) = assert_exact(Core(core, kv_heads=2), tokens(2, 24, 32), rewritten=1).layers
    assert (row.heads, row.kv_heads) == (4, 2)


def test_heads_before_batch():
    def core(q, k, v):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        scores = torch.einsum("hbid,hbjd->hbij", q, k).masked_fill(~causal(24), -math.inf)
        return torch.einsum("hbij,hbjd->bhid", scores.softmax(-1), v)

    (row,) = assert_exact(Core(core), tokens(2, 24, 32), rewritten=1).layers
    assert row.heads == 4


def test_without_heads():
    def core(q, k, v):
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    (row,) = assert_exact(Core(core), tokens(2, 24, 32), rewritten=1).layers
    assert (row.heads, row.head_dim) == (1, 32)


def channels(q, k, v):
    """XCiT: ``q^T k``; the sequence is summed over, and the keys are features."""
    return ((q.mT @ k * 0.1).softmax(-1) @ v.mT).mT


def heads(q, k, v):
    """Attention among the heads of one token."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


def channels_of_an_einsum(q, k, v):
    scores = torch.einsum("bhnc,bhnd->bhcd", q, k)
    return torch.einsum("bhcd,bhnd->bhnc", scores.softmax(-1), v)


@pytest.mark.parametrize("core", [channels, heads, channels_of_an_einsum], ids=lambda c: c.__name__)
def test_what_attends_over_features_is_refused(core):
    (row,) = report(core).layers
    assert row.decision == "full"
    assert "attends over features" in row.reason


class OfOneProjection(nn.Module):
    """Queries and keys are different tokens of one projection."""

    def __init__(self, take):
        super().__init__()
        self.qkv, self.take = nn.Linear(16, 48), take

    def forward(self, x):
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(*self.take(q, k, v))


DISPLACED = {
    "halves": lambda q, k, v: (q[:, :, :12], k[:, :, 12:], v[:, :, 12:]),
    "flipped": lambda q, k, v: (q, k.flip(2), v.flip(2)),
    "rolled": lambda q, k, v: (q, k.roll(1, 2), v.roll(1, 2)),
    "even and odd": lambda q, k, v: (q[:, :, ::2], k[:, :, 1::2], v[:, :, 1::2]),
    "parts of a view": lambda q, k, v: tuple(
        x.unflatten(2, (2, 12)).select(2, n) for x, n in ((q, 0), (k, 1), (v, 1))
    ),
}


DISPLACED["pieces joined in another order"] = lambda q, k, v: (
    q,
    torch.cat([k[:, :, 3:], k[:, :, :3]], 2),
    torch.cat([v[:, :, 3:], v[:, :, :3]], 2),
)
DISPLACED["pieces that overlap"] = lambda q, k, v: (
    q,
    torch.cat([k[:, :, :3], k[:, :, 2:23]], 2),
    v,
)


@pytest.mark.parametrize("name", DISPLACED)
def test_other_tokens_of_one_projection_are_another_sequence(name):
    model = OfOneProjection(DISPLACED[name])
    (row,) = fe.explain(model, tokens(2, 24, 16), options=OPTIONS).layers
    assert row.decision == "full"
    assert "cross-attention" in row.reason


def partly_scaled(x):
    return torch.cat([x[:, :, :3], x[:, :, 3:] * 1.5], 2)


def partly_scaled_after_a_split(x):
    first, rest = x.split((3, 21), 2)
    return torch.cat([first, rest * 1.5], dim=-2)


IN_PLACE = {
    "all but the first": lambda q, k, v: (q[:, :, 1:], k[:, :, 1:], v[:, :, 1:]),
    "after an empty cache": lambda q, k, v: (
        q,
        *(torch.cat([x.new_empty(*x.shape[:2], 0, x.shape[3]), x], 2) for x in (k, v)),
    ),
    "some changed": lambda q, k, v: (partly_scaled(q), partly_scaled_after_a_split(k), v),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_the_same_tokens_of_one_projection_are_one_sequence(name):
    assert_exact(OfOneProjection(IN_PLACE[name]), tokens(2, 24, 16), rewritten=1)


class UnitsOfOneProjection(nn.Module):
    """Hiera: tokens in units, queries, keys and values on an axis between units and heads."""

    def __init__(self, swapped):
        super().__init__()
        self.qkv, self.swapped = nn.Linear(16, 48), swapped

    def forward(self, x):
        packed = self.qkv(x).reshape(len(x), 6, 4, 3, 2, 8)
        q, k, v = packed.permute(3, 0, 4, 2, 1, 5).unbind(0)
        if self.swapped:
            q, k, v = q[:, :, :2], k[:, :, 2:], v[:, :, 2:]
        return F.scaled_dot_product_attention(q, k, v).flatten(2)


def test_parts_of_a_view_beside_which_features_are_selected_are_one_sequence():
    assert_exact(UnitsOfOneProjection(swapped=False), tokens(2, 24, 16), rewritten=1)
    model = UnitsOfOneProjection(swapped=True)
    (row,) = fe.explain(model, tokens(2, 24, 16), options=OPTIONS).layers
    assert "cross-attention" in row.reason


class PositionsInScoresAlone(nn.Module):
    """DETR: queries and keys are projected from tokens with positions, values without."""

    def __init__(self):
        super().__init__()
        self.qk, self.v = nn.Linear(16, 32), nn.Linear(16, 16)
        self.positions = nn.Parameter(torch.randn(24, 16))

    def forward(self, x):
        q, k = self.qk(x + self.positions).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (q, k, self.v(x)))
        return F.scaled_dot_product_attention(q, k, v)


def test_values_may_be_projected_from_another_tensor():
    assert_exact(PositionsInScoresAlone(), tokens(2, 24, 16), rewritten=1)
