"""The oracle of matching: with a window over every key, FlashEVA is softmax attention."""

from __future__ import annotations

import pytest
import torch

import flasheva_compile as fe
from flasheva_compile.backend import reports_of
from tests.models.families import BY_NAME, FAMILIES, LENGTH, logits_of
from tests.models.oracle import (
    WHOLE,
    assert_as_accurate,
    assert_same_to_rounding,
    in_double,
    pytorchs_own,
    real_tokens,
    run,
)

IMPLEMENTATIONS = ("sdpa", "eager")
CASES = [
    pytest.param(family, implementation, padded, id=f"{family}-{implementation}-{padded=}")
    for family in FAMILIES
    for implementation in IMPLEMENTATIONS
    for padded in (False, True)
    if not (padded and family.name in {"nanogpt", "vit"})
]


def paths(rows):
    return tuple(row.path for row in rows)


@pytest.mark.parametrize(("family", "implementation", "padded"), CASES)
def test_training_step_equals_the_model_as_it_is(family, implementation, padded):
    model, inputs = family.build(implementation).train(), family.inputs(padded=padded)
    exact, theirs = in_double(model, inputs), pytorchs_own(model, inputs)
    model.compile(backend="flasheva", options={**WHOLE, "inner_backend": "aot_eager"})
    ours = run(model, model, inputs)
    assert_same_to_rounding(ours, theirs, exact)
    if family.name != "opt":  # LayerDrop breaks OPT's training graph before the mask is known
        assert paths(fe.explain(model).rewritten) == family.rewritten


@pytest.mark.parametrize(("family", "implementation", "padded"), CASES)
def test_evaluation_equals_the_model_as_it_is(family, implementation, padded):
    model, inputs = family.build(implementation).eval(), family.inputs(padded=padded)
    model.compile(backend="flasheva", options={**WHOLE, "inner_backend": "eager"})
    exact, theirs = in_double(model, inputs), pytorchs_own(model, inputs)
    ours = run(model, model, inputs)
    assert_same_to_rounding(ours, theirs, exact)
    report = fe.explain(model)
    assert paths(report.rewritten) == family.rewritten
    reasons = {row.path: row.reason for row in report.left_full}
    assert reasons.keys() == dict(family.left_full).keys()
    for path, part in family.left_full:
        assert part in reasons[path]


DYNAMIC = [(family.name, "sdpa") for family in FAMILIES if family.kind != "pixels"]
DYNAMIC += [(name, "eager") for name in ("llama", "bert", "nanogpt")]


@pytest.mark.parametrize(("name", "implementation"), DYNAMIC)
def test_dynamic_shapes_serve_every_length_with_one_graph(name, implementation):
    family = BY_NAME[name]
    model, graphs = family.build(implementation).eval(), []
    padded = name != "nanogpt"
    model.compile(backend="flasheva", dynamic=True, options={**WHOLE, "inner_backend": "aot_eager"})
    for length in (LENGTH, LENGTH + 7, LENGTH - 5):
        inputs = family.inputs(padded=padded, length=length)
        exact, theirs = in_double(model, inputs), pytorchs_own(model, inputs)
        assert_same_to_rounding(run(model, model, inputs), theirs, exact)
        graphs.append(len(reports_of(model)))
    assert paths(fe.explain(model).rewritten) == family.rewritten
    assert graphs[0] == graphs[-1], "a new length compiled a new graph"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_inductor(name):
    family = BY_NAME[name]
    model, inputs = family.build("sdpa"), family.inputs(padded=True)
    exact, theirs = in_double(model, inputs), pytorchs_own(model, inputs)
    model.compile(backend="flasheva", options=WHOLE)
    assert_same_to_rounding(run(model, model, inputs), theirs, exact)
    assert paths(fe.explain(model).rewritten) == family.rewritten


def test_a_plain_function():
    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = torch.randn(3, 2, 4, 20, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(
        attend, backend="flasheva", options={**WHOLE, "inner_backend": "eager"}
    )
    exact = attend(q.double(), k.double(), v.double())
    assert_as_accurate(compiled(q, k, v), [attend(q, k, v)], exact)
    rows = fe.explain(attend, q, k, v).layers
    assert [row.decision for row in rows] == ["eva"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    family = BY_NAME["llama"]
    model, inputs = family.build("sdpa").eval().to(dtype), family.inputs(padded=True)
    model.compile(backend="flasheva", options={**WHOLE, "inner_backend": "aot_eager"})
    exact, theirs = in_double(model, inputs), pytorchs_own(model, inputs)
    assert_same_to_rounding(run(model, model, inputs), theirs, exact)


def test_autocast():
    family = BY_NAME["llama"]
    model, inputs = family.build("sdpa").eval(), family.inputs(padded=False)
    model.compile(backend="flasheva", options={**WHOLE, "inner_backend": "aot_eager"})
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = logits_of(model._call_impl(**inputs)), logits_of(model(**inputs))
    exact = real_tokens(in_double(model, inputs).logits, inputs)
    assert ours.dtype == theirs.dtype
    assert_as_accurate(ours, [theirs], exact)
    assert len(fe.explain(model).rewritten) == 2
