"""Weights of selection by bounds: learned by ``calibrate``, kept, used by every way to attend."""

from __future__ import annotations

import json

import pytest
import torch

import flasheva_compile as fe
from flasheva_compile.adaptation import calibrate_selector, selector
from flasheva_compile.adaptation.calibrate import converted_attentions
from flasheva_compile.adaptation.recipes import Phase
from flasheva_compile.errors import ConfigError
from tests.models.test_generate import SMALL, generate, llama, perturb, tokens
from tests.models.test_retrieval_stores import logits

BY_BOUNDS = {**SMALL, "retrieve_chunks": 2, "retrieve_by": "bounds"}
LENGTH = 96


def calibrated(config=BY_BOUNDS, **options):
    model = fe.prepare(llama(), config)
    report = fe.calibrate(model, [tokens(2, LENGTH)], context_length=LENGTH, **options)
    return model, report


def weights(model):
    return [eva.selector_weight for eva in converted_attentions(model)]


def test_each_selector_by_bounds_gets_weights_and_says_so():
    layers = {"default": BY_BOUNDS, 1: {**BY_BOUNDS, "retrieve_by": "token"}}
    layers |= {2: {**BY_BOUNDS, "chunk_rule": "mean"}}
    model = fe.prepare(llama(layers=3), layers)
    report = fe.calibrate(model, [tokens(2, LENGTH)], context_length=LENGTH)
    found = weights(model)
    assert found[1] is None
    assert all(found[n].shape == (2, 3, 8) for n in (0, 2))
    assert not any(torch.equal(found[n], torch.full_like(found[n], 0.5)) for n in (0, 2))
    assert [bool(row.selector_queries) for row in report.layers] == [True, False, True]
    assert all(row.calibrated for row in report.layers)
    assert str(report).count("selector_weight set from") == 2
    json.dumps(report.to_dict())
    again = fe.prepare(llama(layers=3), layers)
    fe.calibrate(again, (ids for ids in [tokens(2, LENGTH)]), context_length=LENGTH)
    assert all(torch.equal(weights(again)[n], found[n]) for n in (0, 2))


def test_learning_lowers_what_it_is_measured_by():
    """Also for queries that were not learned from, of the same document."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(h, 200, 16, generator=generator) for h in (4, 2, 2))
    k[..., 0] *= 8  # a range that says nothing: the queries hardly look there
    q[..., 0] *= 0.1
    q[..., 1:4] *= 4
    options = {"rule": "mean", "chunk_size": 4, "scale": 0.25, "version": "1"}
    settings = {"window_size": 8, "sink_tokens": 4, "window": "sliding", "softcap": 0.0}
    tokens_ = torch.ops.flasheva.chunk_tokens(k[None], v[None], [], None, None, **options)
    settings = calibrate_selector.cache_settings({**settings, **options})
    sample = selector.selector_sample((q, k, v), tuple(x[0] for x in tokens_), settings, 3)
    assert sample is not None
    weight = selector.learn_selector_weight([sample])
    of_mean, of_middle, of_range = weight.unbind(1)
    learned = torch.stack([of_mean + of_middle, of_middle, of_range])[:, :, None]
    plain = torch.tensor(selector._START).view(3, 1, 1, 1).expand_as(learned)
    everyone = torch.arange(sample.q.shape[2])
    before, after = (selector._cross_entropy(sample, everyone, w) for w in (plain, learned))
    assert after < before


@pytest.mark.parametrize("size", [95, 40])
def test_short_documents_teach_nothing(size):
    model = fe.prepare(llama(), BY_BOUNDS)
    report = fe.calibrate(model, [tokens(2, size)], context_length=LENGTH)
    assert weights(model) == [None, None]
    assert all(row.parameter == "phi" for row in report.layers)
    assert "selector_weight as it was: no document of 96 tokens" in str(report)


def test_weights_are_learned_where_asked_alone():
    model = fe.prepare(llama(), BY_BOUNDS)
    report = fe.calibrate(model, [tokens(1, 256)])
    assert weights(model) == [None, None]
    assert "selector_weight as it was: no context_length" in str(report)


@pytest.mark.parametrize("wrong", [0, -3, 2.0, True])
def test_a_context_length_that_is_none_is_refused(wrong):
    model = fe.prepare(llama(), BY_BOUNDS)
    with pytest.raises(ConfigError, match="positive number of tokens"):
        fe.calibrate(model, [tokens(1, 40)], context_length=wrong)


def test_a_document_has_no_padding_and_no_neighbours():
    device = torch.device("cpu")
    documents = calibrate_selector._documents
    assert documents(None, 3, device)[0].tolist() == [0, 1, 2]
    padded = torch.tensor([False, True, True])
    assert [x.tolist() for x in documents(padded, 3, device)] == [[1, 2]]
    packed = torch.tensor([4, 4, 7, 7, 7])
    assert [x.tolist() for x in documents(packed, 5, device)] == [[0, 1], [2, 3, 4]]


def test_keys_that_are_not_finite_are_refused():
    model = fe.prepare(llama(), {**BY_BOUNDS, "chunk_rule": "mean"})
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.fill_(torch.nan)
    with pytest.raises(ConfigError, match="not finite"):
        fe.calibrate(model, [tokens(1, LENGTH)], context_length=LENGTH)
    assert weights(model) == [None, None]


def test_a_chunk_token_that_claims_any_mass_is_still_a_finite_lesson():
    """Biases of chunks whose keys differ much can be hundreds."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 96, 8, generator=generator) for _ in range(3))
    options = {"window_size": 16, "chunk_size": 4, "sink_tokens": 4, "window": "sliding"}
    settings = calibrate_selector.cache_settings({**options, "scale": 0.5, "softcap": 0.0})
    keys, values = (x.unflatten(1, (24, 4)).mean(2) for x in (k, v))
    bias = torch.zeros(2, 24)
    bias[:, 5] = 400.0
    sample = selector.selector_sample((q, k, v), (keys, values, bias), settings, 3)
    assert sample.worth.isfinite().all()
    assert (sample.worth.argmax(-1)[sample.visible[:, 5].expand(2, -1)] == 5).all()
    assert selector.learn_selector_weight([sample]).isfinite().all()


@pytest.mark.parametrize("block", [1, 4])
def test_decoding_is_the_formula(block):
    model, _ = calibrated({**BY_BOUNDS, "retrieve_block": block})
    model, ids = model.double(), tokens(2, 75)
    stepped, _ = logits(model, ids)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, -21:]
        for eva in converted_attentions(model):
            eva.selector_weight = None
        plain = model(ids, use_cache=False).logits[:, -21:]
    torch.testing.assert_close(stepped, whole)
    assert (plain - whole).abs().max() > 1e-3, "the weights change no selection"


def test_a_compiled_model_uses_the_weights():
    model, _ = calibrated()
    with torch.no_grad():
        want = model(tokens(1, 75), use_cache=False).logits
        model.compile(backend="flasheva", options={"inner_backend": "eager"})
        got = model(tokens(1, 75), use_cache=False).logits
    torch.testing.assert_close(got, want)


def test_a_saved_model_keeps_its_weights(tmp_path):
    model, _ = calibrated({"default": BY_BOUNDS, 0: {**BY_BOUNDS, "chunk_rule": "mean"}})
    model.save_pretrained(tmp_path)
    loaded = fe.from_pretrained(tmp_path)
    assert all(map(torch.equal, weights(loaded), weights(model)))
    ids = tokens(1, 75)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_state_dict_carries_them(tmp_path):
    model, _ = calibrated()
    other = fe.prepare(llama(), BY_BOUNDS)
    other.load_state_dict(model.state_dict())
    assert all(map(torch.equal, weights(other), weights(model)))
    by_token = fe.prepare(llama(), {**BY_BOUNDS, "retrieve_by": "token"})
    with pytest.raises(RuntimeError, match="selector_weight"):
        by_token.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="selector_weight"):
        model.load_state_dict(by_token.state_dict())


def test_a_cache_of_other_weights_is_refused(tmp_path):
    model, _ = calibrated()
    cache = fe.FlashEvaCache.for_model(model)
    generate(model, tokens(1, 60), past_key_values=cache, steps=3)
    cache.save(model, tmp_path / "cache")
    fe.FlashEvaCache.load(model, tmp_path / "cache")
    converted_attentions(model)[0].selector_weight.add_(1)
    with pytest.raises(ConfigError, match="other weights"):
        fe.FlashEvaCache.load(model, tmp_path / "cache")


def test_an_interrupted_training_goes_on_with_them(tmp_path):
    model, _ = calibrated()
    perturb(model)
    options = {"steps": 2, "learning_rate": 1e-3, "warmup": 1}
    phase = Phase(name="r", loss="attention_outputs", trains="rules", **options)
    fe.adapt(model, [tokens(1, 40)], [phase], out=tmp_path, progress=False)
    resumed = fe.prepare(llama(), BY_BOUNDS)
    fe.adapt(resumed, [tokens(1, 40)], [phase], out=tmp_path, progress=False)
    assert all(map(torch.equal, weights(resumed), weights(model)))
