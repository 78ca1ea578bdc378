"""Masks made by arithmetic from an integer or boolean tensor: ``(1 - m) * min``."""

from __future__ import annotations

import pytest
import torch

import flasheva_compile as fe
from tests.attention_cores import OPTIONS, Core
from tests.models.oracle import assert_as_accurate

LOWEST = torch.finfo(torch.float32).min


class Masked(Core):
    """Attention under what ``build`` makes of the caller's mask."""

    def __init__(self, build):
        super().__init__(None)
        self.build = build

    def forward(self, x, mask):
        added = self.build(mask[:, None, None]).to(x.dtype)
        self.core = lambda q, k, v: (q @ k.mT * 0.3 + added).softmax(-1) @ v
        return super().forward(x)


MASKS = {
    "BERT": (lambda m: (1.0 - m.float()) * LOWEST, "bidirectional+key padding"),
    "BERT, old": (lambda m: (1 - m.float()) * -10000.0, "bidirectional+key padding"),
    "of booleans": (lambda m: (1.0 - m.bool().float()) * -1e9, "bidirectional+key padding"),
    "less one": (lambda m: (m.float() - 1.0) * 1e9, "bidirectional+key padding"),
    "causal": (
        lambda m: (1.0 - (m * torch.ones(24, 24).tril().long()).float()) * -1e9,
        "causal+key padding",
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_zeros_and_ones_are_a_mask(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    build, kind = MASKS[name]
    model, x, mask = Masked(build).eval(), torch.randn(2, 24, 32), torch.ones(2, 24).long()
    mask[0, -4:] = 0
    options = {**OPTIONS, "window_size": 32, "inner_backend": "eager"}
    ours = torch.compile(model, backend="flasheva", options=options)(x, mask)
    (row,) = fe.explain(model).layers
    assert (row.decision, row.mask) == ("eva", kind)
    theirs = model(x, mask)
    assert_as_accurate(ours, [theirs], model.double()(x.double(), mask))


BIASES = {
    "too small": lambda m: (1.0 - m.float()) * -5.0,
    "not of zeros and ones": lambda m: (10.0 - m.float()) * -1e9,
    "of real numbers": lambda m: (1.0 - m.float().sigmoid()) * -1e9,
    "of two tensors": lambda m: (1.0 - m.float() * m.roll(1, -1).float()) * -1e9,
    "squared": lambda m: (1.0 - m.float().pow(2)) * -1e9,
}


@pytest.mark.parametrize("name", BIASES)
def test_what_is_no_mask_for_zeros_and_ones_stays_full(name):
    torch._dynamo.reset()
    model = Masked(BIASES[name])
    inputs = (torch.randn(2, 24, 32), torch.ones(2, 24).long())
    (row,) = fe.explain(model, *inputs, options=OPTIONS).layers
    assert row.decision == "full"
    assert "additive position bias" in row.reason or "mask not understood" in row.reason
