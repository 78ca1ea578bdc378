"""The cache of retrieving models with its store in fp8: bytes, text, files, what stays exact."""

from __future__ import annotations

import pytest
import torch

import flasheva_compile as fe
from flasheva_compile.generation import retrieval_layer
from tests.models.test_generate import GREEDY, SMALL, generate, llama, tokens
from tests.models.test_retrieval_stores import BY_BOUNDS, RETRIEVING, logits


@pytest.mark.parametrize(
    "config", [RETRIEVING, BY_BOUNDS, {**RETRIEVING, "window": "block", "retrieve_block": 4}]
)
@pytest.mark.parametrize("padding", [0, 7])
def test_steps_are_near_those_over_exact_keys(config, padding):
    model, ids = fe.prepare(llama(), config), tokens(2, 75)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    here, _ = logits(model, ids, mask)
    there, cache = logits(model, ids, mask, store="fp8")
    assert torch.equal(there[:, 0], here[:, 0])  # the prompt is read exactly
    off, (plain, _) = (there - here).norm(), logits(fe.prepare(llama(), SMALL), ids, mask)
    assert 0 < off < (plain - here).norm() / 3
    assert "Fp8CacheLayer" in repr(cache.layers[0])


def test_the_store_takes_half_the_bytes_of_bf16():
    model, ids = fe.prepare(llama(), RETRIEVING).bfloat16(), tokens(1, 400)
    _, here = logits(model, ids)
    _, there = logits(model, ids, store="fp8")
    exact, coded = (cache.layers[0].state for cache in (here, there))
    assert coded.keys.nbytes == exact.keys.nbytes / 2
    assert coded.values.nbytes == exact.values.nbytes / 2
    assert coded.exponents.nbytes == coded.keys.nbytes / 4  # two bytes beside keys of eight
    for cache in (here, there):
        counted = sum(x.nbytes for layer in cache.layers for x in layer.state)
        assert cache.nbytes() == counted
        assert cache.host_nbytes() == 0


def test_generate_grows_the_store_as_if_it_was_preallocated(monkeypatch):
    monkeypatch.setattr(retrieval_layer, "FIRST_CHUNKS", 2)
    model, ids = fe.prepare(llama(), RETRIEVING), tokens(2, 20)
    options = {**GREEDY, "num_beams": 2, "max_new_tokens": 40}
    made = [
        model.generate(
            ids,
            past_key_values=fe.FlashEvaCache.for_model(model, store="fp8", max_cache_len=length),
            **options,
        )
        for length in (None, 64)
    ]
    assert torch.equal(*made)


def test_portions_of_a_prompt_and_a_second_turn_go_on():
    """All keys of the first layer are what they are, however they came."""
    model, ids = fe.prepare(llama(), RETRIEVING).double(), tokens(2, 60)
    options = {"store": "fp8", "max_cache_len": 64}
    whole, parts = (fe.FlashEvaCache.for_model(model, **options) for _ in range(2))
    with torch.no_grad():
        model(ids, past_key_values=whole)
        for part in ids.split([23, 1, 1, 30, 5], 1):
            model(part, past_key_values=parts)
    for x, other in zip(whole.layers[0].state, parts.layers[0].state, strict=True):
        if x.dtype != torch.uint8:
            torch.testing.assert_close(other, x)
        else:  # products of other sizes may be rounded otherwise, beside a step of fp8
            assert (other != x).sum() <= 2
    whole.reset()
    assert not any(x.any() for x in whole.layers[0].state)


def test_an_exact_prompt_over_fp8_is_the_model_as_it_was():
    model, ids = llama(), tokens(2, 60)
    with torch.no_grad():
        full = model(ids).logits
        fe.prepare(model, RETRIEVING)
        cache = fe.FlashEvaCache.for_model(model, prefill="exact", store="fp8")
        ours = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(ours, full, rtol=1e-4, atol=1e-4)
    assert "exact prefill" in repr(cache.layers[0])


@pytest.mark.parametrize("length", [None, 96])
def test_a_saved_store_goes_on(tmp_path, length):
    model = fe.prepare(llama(), RETRIEVING)
    cache = fe.FlashEvaCache.for_model(model, max_cache_len=length, store="fp8")
    first = generate(model, tokens(1, 26), past_key_values=cache, steps=5).sequences
    cache.save(model, tmp_path / "cache")
    again = fe.FlashEvaCache.load(model, tmp_path / "cache")
    assert again.layers[0].state.is_fp8
    assert again.nbytes() == cache.nbytes()
    longer = torch.cat([first, tokens(1, 7, seed=4)], 1)
    want, got = (generate(model, longer, past_key_values=x, steps=20) for x in (cache, again))
    assert torch.equal(torch.stack(want.logits), torch.stack(got.logits))


def test_a_compiled_step_over_a_preallocated_store_is_the_step():
    model, ids = fe.prepare(llama(), RETRIEVING), tokens(1, 42)
    made = []
    for run in (model, torch.compile(model, backend="eager", fullgraph=True)):
        cache = fe.FlashEvaCache.for_model(model, max_batch_size=1, max_cache_len=64, store="fp8")
        with torch.no_grad():
            model(ids[:, :40], past_key_values=cache)
            made.append([run(x, past_key_values=cache).logits for x in ids[:, 40:].split(1, 1)])
    assert all(map(torch.equal, *made))


def test_full_layers_in_fp8_go_with_it():
    model, ids = fe.prepare(llama(), {"default": RETRIEVING, 0: "full"}), tokens(1, 60)
    options = {"store": "fp8", "full_layers": "fp8"}
    coded, cache = logits(model, ids, **options)
    exact, _ = logits(model, ids)
    assert [type(x).__name__ for x in cache.layers] == ["VecInferLayer", "Fp8CacheLayer"]
    assert (coded - exact).norm() < 0.1 * exact.norm()
