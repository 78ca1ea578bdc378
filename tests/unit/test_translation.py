"""Translation validation: what was understood wrongly stays full."""

from __future__ import annotations

import dataclasses
import math

import pytest
import sympy as sp
import torch
from torch.nn import functional as F

import flasheva_compile as fe
from flasheva_compile import analysis, slices, translation
from flasheva_compile.errors import ConfigError, PlanError
from flasheva_compile.masks.symbolic import KEY
from flasheva_compile.site import Keep, RewritePlan
from tests.attention_cores import OPTIONS, Core, causal, report


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch._dynamo.reset()


def core(q, k, v):
    scores = (q @ k.mT) * 0.3
    return scores.masked_fill(~causal(q.shape[2]), -math.inf).softmax(-1) @ v


class Padded(Core):
    """Attention under a causal mask and a padding mask that the caller gives."""

    def forward(self, x, padding):
        keep = causal(x.shape[1]) & padding.bool()[:, None, None]
        self.core = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, keep)
        return super().forward(x)


def replaced(part, **changes):
    return lambda decision: dataclasses.replace(
        decision, **{part: dataclasses.replace(getattr(decision, part), **changes)}
    )


def swapped(first, second):
    def swap(decision):
        site = decision.site
        changes = {first: getattr(site, second), second: getattr(site, first)}
        return dataclasses.replace(decision, site=dataclasses.replace(site, **changes))

    return swap


def transposed(decision):
    query = decision.site.query
    wrong = dataclasses.replace(query, layout=(("flip", ((2,),)),))
    return dataclasses.replace(decision, site=dataclasses.replace(decision.site, query=wrong))


MISTAKES = {
    "scale": replaced("op", scale=0.31),
    "softcap": replaced("op", softcap=3.0),
    "not causal": replaced("op", causal=False),
    "query for key": swapped("query", "key"),
    "key for value": swapped("key", "value"),
    "layout": transposed,
}
MASK_MISTAKES = {
    "no key mask": replaced("op", has_key_mask=False),
    "another key mask": replaced("mask", key_mask=sp.Le(KEY, 7)),
    "documents": lambda decision: replaced("op", has_segments=True)(
        replaced("mask", segments=sp.floor(KEY / 4))(decision)
    ),
}


def plan_with(mistake, monkeypatch):
    """Let every replacement be planned with a mistake in it."""
    plan = analysis.plan

    def mistaken(*arguments):
        decisions = plan(*arguments).decisions
        assert not any(isinstance(d, Keep) for d in decisions)
        return RewritePlan(decisions=tuple(map(mistake, decisions)))

    monkeypatch.setattr(analysis, "plan", mistaken)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_matching_leaves_the_attention_full(name, monkeypatch):
    plan_with(MISTAKES[name], monkeypatch)
    (row,) = report(core).layers
    assert row.decision == "full"
    assert row.reason.startswith("validation failed: differs from softmax attention")
    assert not row.expected
    with pytest.raises(PlanError, match="validation failed"):
        report(core, {**OPTIONS, "strict": True})


@pytest.mark.parametrize("name", MASK_MISTAKES)
def test_a_mistake_of_the_mask_proof_leaves_the_attention_full(name, monkeypatch):
    plan_with(MASK_MISTAKES[name], monkeypatch)
    torch.manual_seed(0)
    inputs = (torch.randn(2, 24, 32), torch.ones(2, 24, dtype=torch.long))
    (row,) = fe.explain(Padded(None), *inputs, options=OPTIONS).layers
    assert row.decision == "full"
    assert row.reason.startswith("validation failed")


def test_it_can_be_turned_off(monkeypatch):
    plan_with(MISTAKES["scale"], monkeypatch)
    found = report(core, {**OPTIONS, "validate": False})
    assert [row.decision for row in found.layers] == ["eva"]
    assert "validate" not in found.seconds
    with pytest.raises(ConfigError, match="validate"):
        report(core, {**OPTIONS, "validate": "yes"})


def test_equal_structures_are_run_once(monkeypatch):
    runs = []
    monkeypatch.setattr(translation, "run", lambda *a, **o: runs.append(a) or slices.run(*a, **o))

    def three(q, k, v):
        first = core(q, k, v)
        return core(first, k, v) + F.scaled_dot_product_attention(first, k, v, is_causal=True)

    found = report(three)
    assert {row.decision for row in found.layers} == {"eva"}
    assert len(runs) == 2, "two cores of one spelling, one of another"


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_long_sequence_is_checked_at_a_short_length(dynamic, monkeypatch):
    lengths = []

    def counted(part, values, sizes, **options):
        found = slices.run(part, values, sizes, **options)
        lengths.append(found[part.result].shape[2])
        return found

    monkeypatch.setattr(translation, "run", counted)
    x, padding = torch.randn(2, 2048, 32), torch.ones(2, 2048, dtype=torch.long)
    for mistake, decision in ((lambda d: d, "eva"), (MISTAKES["not causal"], "full")):
        torch._dynamo.reset()
        with monkeypatch.context() as patch:
            plan_with(mistake, patch)
            model = Padded(None)
            options = {**OPTIONS, "inner_backend": "eager"}
            model.compile(backend="flasheva", dynamic=dynamic, options=options)
            model(x, padding)
        found = fe.explain(model)
        assert [row.decision for row in found.layers] == [decision]
        assert found.warnings == ()
    assert lengths
    assert max(lengths) <= 64


def test_what_cannot_be_run_is_rewritten_with_a_warning(monkeypatch):
    def fails(*_, **__):
        raise slices.NotRunError("no such op here")

    monkeypatch.setattr(translation, "run", fails)
    found = report(core)
    assert [row.decision for row in found.layers] == ["eva"]
    assert found.warnings == ("1 rewritten but not validated: no such op here",)


def test_the_callers_random_numbers_stay_what_they_were():
    torch.manual_seed(5)
    model, x = Core(core), torch.randn(2, 24, 32)
    torch.manual_seed(9)
    fe.explain(model, x, options=OPTIONS)
    after = torch.rand(3)
    torch._dynamo.reset()
    torch.manual_seed(9)
    fe.explain(model, x, options={**OPTIONS, "validate": False})
    assert torch.equal(after, torch.rand(3))


def test_a_gradient_that_stops_inside_is_noticed(monkeypatch):
    """Behind matching, which refuses what stops a gradient: its results are the same."""

    def stopped(part, values, sizes, **options):
        found = dict(slices.run(part, values, sizes, **options))
        found[part.result] = found[part.result].detach()
        return found

    monkeypatch.setattr(translation, "run", stopped)
    (row,) = report(core).layers
    assert row.reason == "validation failed: has no gradient"
    with torch.no_grad():
        assert report(core).layers[0].decision == "eva"
