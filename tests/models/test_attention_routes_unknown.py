"""Attentions that have a route, but are not what it was written for: versions, wrappers, others."""

from __future__ import annotations

import dataclasses
import functools
import types

import pytest
import torch
from transformers.models.gptj.modeling_gptj import GPTJAttention
from transformers.models.xglm.modeling_xglm import XGLMAttention

import flasheva_compile as fe
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.routes import ROUTES
from tests.models.generation_models import build_language_model
from tests.models.test_attention_routes import attentions
from tests.models.test_generate import SMALL, tokens


def test_a_method_that_computes_something_else_stays_full(monkeypatch):
    own = GPTJAttention._attn

    def sharper(self, query, key, value, attention_mask=None):
        return own(self, 2 * query, key, value, attention_mask)

    monkeypatch.setattr(GPTJAttention, "_attn", sharper)
    with pytest.raises(ConfigError, match="something else than softmax attention"):
        fe.prepare(build_language_model("gptj"), SMALL)


def _scaled(self, hidden_states, **inputs):
    out, weights = type(self)._own_forward(self, hidden_states, **inputs)
    return 2 * out, weights


def _other_keys(self, hidden_states, **inputs):
    cache = inputs.get("past_key_values")
    if cache is not None:
        update = cache.update
        inputs["past_key_values"] = types.SimpleNamespace(
            update=lambda key, value, place: update(key.flip(-1), value, place)
        )
    return type(self)._own_forward(self, hidden_states, **inputs)


def _of_another_name(self, hidden_states, **inputs):
    self.q_proj = self.projection
    try:
        return type(self)._own_forward(self, hidden_states, **inputs)
    finally:
        del self.q_proj


def _with_another_input(self, hidden_states, head_mask=None, **inputs):
    out, weights = type(self)._own_forward(self, hidden_states, **inputs)
    return (out if head_mask is None else out * head_mask), weights


FORWARDS = [_scaled, _other_keys, _of_another_name, _with_another_input]


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_forward_that_is_not_as_known_refuses_the_model(monkeypatch, forward):
    monkeypatch.setattr(XGLMAttention, "_own_forward", XGLMAttention.forward, raising=False)
    monkeypatch.setattr(XGLMAttention, "forward", forward)
    model = build_language_model("xglm")
    for module in attentions(model) if forward is _of_another_name else ():
        module.projection = module._modules.pop("q_proj")
    before = model(tokens(1, 20), use_cache=False).logits
    with pytest.raises(ConfigError, match="not as in the versions known"):
        fe.prepare(model, SMALL)
    assert torch.equal(model(tokens(1, 20), use_cache=False).logits, before)


def wrap(module):
    """Replace a module's forward, as accelerate's hooks do."""
    old = module.forward
    module.forward = functools.update_wrapper(functools.partial(lambda *a, **k: old(*a, **k)), old)


def test_wrapped_forwards_are_refused_before_and_kept_after():
    model = build_language_model("xglm")
    wrap(attentions(model)[0])
    with pytest.raises(ConfigError, match="its forward was replaced on the instance"):
        fe.prepare(model, SMALL)
    model = fe.prepare(build_language_model("xglm"), SMALL)
    want = model(tokens(1, 20)).logits
    wrap(attentions(model)[1])
    assert torch.equal(model(tokens(1, 20)).logits, want)
    with pytest.raises(ConfigError, match="wrapped after the model was prepared"):
        fe.revert(model)
    assert torch.equal(model(tokens(1, 20)).logits, want)


def test_subclasses_are_not_taken_for_what_they_inherit_from():
    class Other(GPTJAttention):
        pass

    model = build_language_model("gptj")
    for module in attentions(model):
        module.__class__ = Other
    with pytest.raises(ConfigError, match="no attention goes through"):
        fe.prepare(model, SMALL)


def test_routes_are_values():
    route = ROUTES["gptj.modeling_gptj.GPTJAttention"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        route.method = "forward"
