"""Which full layer is stored in which format: what is measured, what is chosen, what is refused."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import flasheva_compile as fe
from flasheva_compile.adaptation.kv_trials import KvTrials
from flasheva_compile.adaptation.select_kv_formats import cheapest
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.prepare import report_of
from tests.models.test_generate import SMALL, llama, tokens

NAMES = ("vq-1bit", "vq-2bit", "tc-4bit")


@pytest.fixture(scope="module", name="hybrid")
def _hybrid():
    """A model with full layers 0, 1 and 3, and codebooks of three formats."""
    model = llama(layers=4)
    fe.prepare(model, {"default": SMALL, **dict.fromkeys((0, 1, 3), "full")})
    return model, [fe.calibrate_kv(model, [tokens(2, 300)], name) for name in NAMES]


@pytest.mark.parametrize("seed", range(20))
def test_the_cheapest_is_the_best_of_all_choices(seed):
    rng = random.Random(seed)
    keys = list(itertools.product(range(4), NAMES))
    values = {key: rng.random() for key in keys}
    costs = {key: 6 * rng.randint(1, 5) for key in keys}
    most = sum(min(costs[layer, name] for name in NAMES) for layer in range(4)) + 6 * seed
    choices = [dict(enumerate(names)) for names in itertools.product(NAMES, repeat=4)]
    allowed = [way for way in choices if sum(costs[key] for key in way.items()) <= most]
    best = min(sum(values[key] for key in way.items()) for way in allowed)
    got = cheapest(values, costs, most)
    assert got in allowed
    assert sum(values[key] for key in got.items()) == pytest.approx(best)


def test_a_divergence_is_that_of_decoding_token_by_token(hybrid):
    """Of all 97 tokens but those beyond the 64 likeliest, which count together."""
    model, codebooks = hybrid
    ids = tokens(1, 330, seed=5)
    ways = {"full_layers": {1: "vq-1bit"}, "codebooks": codebooks[0]}, {"full_layers": "exact"}
    said = []
    for way in ways:
        cache = fe.FlashEvaCache.for_model(model, **way)
        with torch.no_grad():
            steps = [model(x, past_key_values=cache).logits for x in ids.split(1, 1)]
        said.append(torch.cat(steps, 1).double().log_softmax(-1))
    order = said[1].argsort(-1, descending=True)
    q, p = (x.gather(-1, order) for x in said)
    q, p = (torch.cat([x[..., :64], x[..., 64:].logsumexp(-1, keepdim=True)], -1) for x in (q, p))
    expected = (p.exp() * (p - q)).sum(-1).mean()
    trials = KvTrials(model, [ids])
    assert trials.tokens == 330
    assert trials.divergence({1: "vq-1bit"}, codebooks[0]) == pytest.approx(
        float(expected), rel=1e-3
    )
    assert float(expected) > 1e-4


def test_layers_are_stored_as_was_chosen(hybrid):
    model, codebooks = hybrid
    with torch.no_grad():
        next(iter(p for n, p in model.named_parameters() if ".flasheva." in n)).fill_(0.25)
    selection = fe.select_kv_formats(model, [tokens(2, 300, seed=3)], codebooks, 2.4)
    found = {(score.index, score.format): score.divergence for score in selection.scores}
    assert list(found) == list(itertools.product((0, 1, 3), NAMES))
    bits = dict(zip(NAMES, (1, 2, 4), strict=True))
    assert selection.formats == cheapest(found, {key: bits[key[1]] for key in found}, 7)
    mixtures = {mixture.name: mixture for mixture in selection.mixtures}
    assert {name: mixtures[name].bits for name in NAMES} == bits
    assert mixtures["selected"].bits == sum(bits[x] for x in selection.formats.values()) / 3 <= 2.4
    assert "selected" in str(selection)
    assert selection.to_json()
    assert selection.codebooks.formats == selection.formats
    module = model.model.layers[2].self_attn.flasheva
    fe.prepare(model, selection.layers)
    assert model.model.layers[2].self_attn.flasheva is module  # what was learned is kept
    assert (next(iter(module.parameters())) == 0.25).all()
    cache = fe.FlashEvaCache.for_model(model, codebooks=selection.codebooks)
    formats = {n: x.storage.format for n, x in enumerate(cache.layers) if hasattr(x, "storage")}
    assert formats == selection.formats
    assert f"its cache in {selection.formats[0]!r}" in str(report_of(model))
    assert model.config.flasheva["layers"]["0"] == {"attention": "full", "kv": formats[0]}
    fe.prepare(model, {"default": SMALL, **dict.fromkeys((0, 1, 3), "full")})
    assert model.model.layers[2].self_attn.flasheva is module
    assert not any(hasattr(x, "storage") for x in fe.FlashEvaCache.for_model(model).layers)


def test_what_cannot_be_chosen_from_is_refused(hybrid):
    model, codebooks = hybrid
    text = [tokens(1, 300)]
    padded = {
        "input_ids": text[0],
        "attention_mask": torch.ones_like(text[0]).index_fill(1, torch.tensor(0), 0),
    }
    other = llama(layers=4)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    fe.prepare(other, {"default": SMALL, 0: "full"})
    fewer = fe.calibrate_kv(model, text, "vq-1bit", layers=[0])
    foreign = fe.calibrate_kv(llama(layers=4), text, "vq-1bit")
    refusals = [
        (model, text, [], 2, "codebooks: are none"),
        (model, text, codebooks[0], 2, "codebooks: must be a list, .* got KvCodebooks"),
        (model, text, ["file"], 2, "codebooks: must be what calibrate_kv returned, got str"),
        (model, text, [codebooks[0]] * 2, 2, "codebooks: are to be one for each format"),
        (model, text, [codebooks[1], fewer], 2, "of the same layers"),
        (model, text, [foreign], 2, "codebooks: have layer 2, which does not stay full"),
        (other, text, [fewer], 2, "were learned from another model"),
        (model, text, codebooks[1:], 1.9, "bits: must be at least 2, what the fewest are, got 1.9"),
        (model, text, codebooks, True, "bits: must be at least 1"),
        (model, [padded], codebooks, 2, r"batches\[0\]: has padding"),
        (
            model,
            [{"input_ids": text[0], "position_ids": text[0]}],
            codebooks,
            2,
            "has position_ids",
        ),
        (model, [tokens(1, 160)], codebooks, 2, "160 tokens are all read exactly"),
        (model, [], codebooks, 2, "batches: is empty"),
    ]
    for owner, batches, given, bits, match in refusals:
        with pytest.raises(ConfigError, match=match):
            fe.select_kv_formats(owner, batches, given, bits)


def test_layers_that_a_cache_is_asked_for_must_stay_full(hybrid):
    model, codebooks = hybrid
    with pytest.raises(ConfigError, match=r"full_layers: 2 is no layer that stays full"):
        fe.FlashEvaCache.for_model(model, full_layers={2: "vq-1bit"}, codebooks=codebooks[0])
    with pytest.raises(ConfigError, match=r"full_layers: True is no layer that stays full"):
        fe.FlashEvaCache.for_model(model, full_layers={True: "fp8"})
    cache = fe.FlashEvaCache.for_model(model, full_layers={3: "fp8", 0: "exact"})
    assert [n for n, x in enumerate(cache.layers) if hasattr(x, "storage")] == [3]
