"""``assume_mask``: what a declared mask may be, and what it certainly is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import flasheva_compile as fe
from tests.attention_cores import OPTIONS, Core, causal


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch._dynamo.reset()


def test_what_is_proved_of_a_mask_survives_a_declaration():
    class Masked(Core):
        def forward(self, x, opaque):
            padding = (x[:, :, 0] > -9)[:, None, None]
            self.core = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, padding & opaque)
            return super().forward(x)

    x, opaque = torch.randn(2, 24, 32), causal(24)
    declared = {**OPTIONS, "assume_mask": "causal"}
    (row,) = fe.explain(Masked(None), x, opaque, options=declared).layers
    assert (row.decision, row.causal) == ("eva", True)
    x[0, :5, 0] = -10
    model = Masked(None)
    whole = {"window_size": 32, "inner_backend": "eager", "assume_mask": "causal"}
    ours = torch.compile(model, backend="flasheva", options=whole)(x, opaque)
    assert (ours - model(x, opaque))[:, :, 5:].abs().max() < 1e-5 * ours.abs().max()


class Biased(Core):
    """Attention with a position bias, ``[H, N, N]`` or ``[N, N]``, held or given."""

    def __init__(self, bias=None):
        super().__init__(None)
        self.bias = bias

    def forward(self, x, given=None):
        bias = self.bias if given is None else given
        self.core = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, bias)
        return super().forward(x)


@pytest.mark.parametrize("declared", ["causal", "bidirectional"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(24, 24), (4, 24, 24)])
def test_a_declared_mask_is_not_a_position_bias(declared, frozen, shape):
    """What differs from head to head, or is a parameter, hides nothing: it must not be dropped."""
    options = {"window_size": 32, "inner_backend": "eager", "assume_mask": declared}
    bias = torch.randn(shape)
    held = Biased(torch.nn.Parameter(bias, requires_grad=not frozen)), ()
    for model, given in (held, *([(Biased(), (bias,))] if len(shape) > 2 else ())):
        x = torch.randn(2, 24, 32)
        ours = torch.compile(model, backend="flasheva", options=options)(x, *given)
        (row,) = fe.explain(model).layers
        assert (row.decision, "position bias" in row.reason) == ("full", True)
        torch.testing.assert_close(ours, model(x, *given))


class Buffered(Core):
    """Attention to which a registered buffer is added, a part of it for short inputs."""

    def __init__(self, added):
        super().__init__(None)
        self.register_buffer("added", added)

    def forward(self, x):
        added = self.added[: x.shape[1], : x.shape[1]]
        self.core = lambda q, k, v: (q @ k.mT + added).softmax(-1) @ v
        return super().forward(x)


def hiding(value, dtype=torch.float32):
    return torch.zeros(24, 24, dtype=dtype).masked_fill(~causal(24), value)


@pytest.mark.parametrize(
    "added",
    [
        -0.1 * torch.arange(24.0).sub(torch.arange(24.0)[:, None]).abs(),
        hiding(-math.inf) + torch.randn(24),
        hiding(-5.0),
        hiding(math.nan),
    ],
    ids=["distances", "a bias under a mask", "too soft", "not a number"],
)
def test_a_declared_mask_is_not_a_buffer_of_other_numbers(added):
    options = {**OPTIONS, "inner_backend": "eager", "assume_mask": "causal"}
    model, x = Buffered(added), torch.randn(2, 20, 32)
    ours = torch.compile(model, backend="flasheva", options=options)(x)
    (row,) = fe.explain(model).layers
    assert (row.decision, "position bias: a buffer" in row.reason) == ("full", True)
    torch.testing.assert_close(ours, model(x), equal_nan=True)


@pytest.mark.parametrize("value", [-math.inf, -1e4, torch.finfo(torch.float32).min])
def test_a_buffer_that_hides_is_a_declared_mask_until_it_is_written_to(value, caplog):
    options = {"window_size": 32, "inner_backend": "eager", "assume_mask": "causal"}
    model, x = Buffered(hiding(value)), torch.randn(2, 20, 32)
    compiled = torch.compile(model, backend="flasheva", options=options)
    torch.testing.assert_close(compiled(x), model(x))
    assert fe.explain(model).layers[0].mask == "assumed causal"
    model.added[3, 1] = 2.0
    torch.testing.assert_close(compiled(x), model(x))
    assert "no longer true: buffer" in caplog.text


def test_half_precision_hides_by_what_it_has_of_a_number():
    options = {**OPTIONS, "assume_mask": "causal"}
    model = Buffered(hiding(-1e4, torch.bfloat16)).bfloat16()
    (row,) = fe.explain(model, torch.randn(2, 24, 32).bfloat16(), options=options).layers
    assert row.decision == "eva"


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
def test_a_bias_of_small_integers_is_a_bias(dtype):
    class Added(Core):
        def __init__(self):
            super().__init__(None)
            self.register_buffer("bias", torch.arange(24 * 24).view(24, 24).remainder(5).to(dtype))
            self.core = lambda q, k, v: ((q @ k.mT) + self.bias).softmax(-1) @ v

    (row,) = fe.explain(
        Added(), torch.randn(2, 24, 32), options={**OPTIONS, "assume_mask": "causal"}
    ).layers
    assert row.decision == "full"
    assert "additive position bias" in row.reason
