"""Fuzzers of matching: any spelling of attention is rewritten exactly, no near miss ever is.

``FLASHEVA_FUZZ_EXAMPLES`` sets how many examples each of them tries.
"""

from __future__ import annotations

import copy
import dataclasses
import os

import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import flasheva_compile as fe
from tests.models.oracle import assert_as_accurate
from tests.spellings import (
    DIM,
    HEADS,
    LENGTH,
    MASKS,
    NEAR_MISSES,
    PRODUCTS,
    PROJECTIONS,
    REPEATS,
    SCALES,
    SLOPES,
    SOFTMAXES,
    Choice,
    Spelled,
)

OPTIONS = {"window_size": 16, "chunk_size": 4, "inner_backend": "aot_eager"}
EXAMPLES = int(os.environ.get("FLASHEVA_FUZZ_EXAMPLES", "30"))
fuzz = settings(
    deadline=None,
    derandomize="FLASHEVA_FUZZ_EXAMPLES" not in os.environ,
    max_examples=EXAMPLES,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # shrinking a compilation takes minutes
)
RIGHT_SLOPES = [name for name in SLOPES if not name.startswith("slopes")]
RIGHT_MASKS = [name for name in MASKS if name == "none" or name.startswith("causal")]


def choices(products):
    return st.builds(
        Choice,
        projection=st.sampled_from(list(PROJECTIONS)),
        kv_heads=st.sampled_from([1, 2, HEADS]),
        repeat=st.sampled_from(list(REPEATS)),
        scale=st.sampled_from(list(SCALES)),
        product=st.sampled_from(products),
        mask=st.sampled_from(RIGHT_MASKS),
        softcap=st.booleans(),
        softmax=st.sampled_from(list(SOFTMAXES)),
        dropout=st.booleans(),
        padded=st.booleans(),
        alibi=st.one_of(st.just("none"), st.sampled_from(RIGHT_SLOPES)),
    ).map(_possible)


def _possible(choice):
    """ALiBi is of causal attention; a factor on the scores comes before anything is hidden."""
    if choice.mask == "causal by a factor":
        return dataclasses.replace(choice, alibi="none", padded=False)
    return dataclasses.replace(choice, alibi="none") if choice.mask == "none" else choice


def inputs(choice):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, LENGTH, 16, generator=generator)
    padding = torch.ones(2, LENGTH, dtype=torch.long)
    padding[0, -3:] = 0
    return (x, padding) if choice.padded else (x,)


def scale_of(choice):
    """What is left for the scores: queries and keys are taken as they enter the product."""
    scales = {"other": 0.2, "scores": DIM**-0.5}
    fused = choice.product in {"sdpa", "flex"}
    rest = DIM**-0.5 if fused and choice.scale != "none" else 1.0
    return scales.get(choice.scale, rest)


def step(call, model, x, padding=None):
    """Output at the real tokens, and the gradients of every parameter in one vector."""
    model.zero_grad()
    trains = model.choice.product != "flex"  # which PyTorch does not differentiate on a CPU
    with torch.set_grad_enabled(trains):
        out = call(x, padding) if padding is not None else call(x)
    out = out[padding.bool()] if padding is not None else out
    if not trains:
        return (out,)
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * target.to(out)).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return out.detach(), torch.cat(gradients)


@fuzz
@given(choices([*PRODUCTS, "sdpa", "flex"]))
@example(Choice(product="elements, summed", kv_heads=2, softmax="by sums", padded=True))
@example(Choice(product="elements, summed, in three axes", dropout=True, mask="none"))
@example(Choice(product="vecdot", kv_heads=1, repeat="contiguous", softcap=True))
def test_every_composed_spelling_is_rewritten_exactly(choice):
    torch._dynamo.reset()
    model, given_inputs = Spelled(choice), inputs(choice)
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="flasheva", options=OPTIONS)
    ours = step(compiled, model, *given_inputs)
    found = fe.explain(model)
    assert found.warnings == ()
    (row,) = found.layers
    assert row.decision == "eva", row.reason
    assert row.causal is (choice.mask != "none")
    assert (row.heads, row.head_dim) == (HEADS, DIM)
    assert row.kv_heads in {choice.kv_heads, HEADS}
    assert ("key padding" in row.mask) is choice.padded
    assert ("ALiBi" in row.mask) is (choice.alibi != "none")
    assert abs(row.scale - scale_of(choice)) < torch.finfo(torch.float32).eps
    theirs = step(model, model, *given_inputs)
    x, *padding = given_inputs
    truth = step(exact, exact, x.double(), *padding)
    for got, plain, true in zip(ours, theirs, truth, strict=True):
        assert_as_accurate(got, [plain], true)


@fuzz
@given(choices(list(PRODUCTS)), st.sampled_from(NEAR_MISSES))
def test_no_near_miss_is_rewritten(choice, near_miss):
    torch._dynamo.reset()
    model = Spelled(choice, near_miss)
    with torch.set_grad_enabled(not near_miss.startswith("flex")):
        report = fe.explain(model, *inputs(choice), options=OPTIONS)
    for row in report.layers:
        assert row.decision == "full", (choice, near_miss)
        assert row.reason
        assert not row.reason.startswith("validation failed"), "only the second line held"
