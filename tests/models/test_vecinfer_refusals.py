"""What a cache in few bits refuses."""

from __future__ import annotations

import pytest
import torch

import flasheva_compile as fe
from flasheva_compile.errors import ConfigError
from tests.models.generation_models import build_language_model
from tests.models.test_generate import SMALL, tokens
from tests.models.test_vecinfer_cache import COARSE, cache_of, hybrid, learned


def test_wrong_use_is_refused(tmp_path):
    model = hybrid()
    with pytest.raises(ConfigError, match="offloading: quantised layers stay on their device"):
        fe.FlashEvaCache.for_model(model, full_layers="fp8", offloading=True)
    cache = cache_of(model, "fp8", length=16)
    with pytest.raises(ConfigError, match="updated outside of a prepared attention"):
        cache.layers[0].update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))
    with pytest.raises(ConfigError, match="17 tokens in a cache of 16"):
        model(tokens(1, 17), past_key_values=cache)
    with torch.no_grad():
        cache = cache_of(model, "fp8", length=20)
        model(tokens(1, 18), past_key_values=cache)
        with pytest.raises(ConfigError, match="21 tokens in a cache of 20"):
            model(tokens(1, 3), past_key_values=cache)
        k, narrow = torch.zeros(1, 2, 1, 8), torch.ones(1, 19, dtype=torch.bool)
        with pytest.raises(ConfigError, match="a mask of 19 columns for a cache of 20"):
            cache.layers[0].append(k, k, narrow)
    with pytest.raises(ConfigError, match="cannot be written to a file yet"):
        cache_of(model, "fp8").save(model, tmp_path / "cache")


def test_gradients_through_codes_are_refused():
    model = hybrid()
    books = learned(model, tokens(2, 60, seed=5), COARSE)
    cache = cache_of(model, COARSE, books)
    model(tokens(1, 30), past_key_values=cache)
    logits = model(tokens(1, 2), past_key_values=cache).logits
    with pytest.raises(ConfigError, match="has no gradient"):
        logits.sum().backward()


WIDE = {"attention": "full", "kv": "tc-2bit"}  # words of 8 channels, two at a time


@pytest.fixture(scope="module", name="gemma")
def _gemma():
    """Heads of 8 channels: of a sliding window, and of full attention."""
    return build_language_model("gemma2")


def everything_of(model):
    modules = {path: (sorted(vars(m)), sorted(m._modules)) for path, m in model.named_modules()}
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    return modules, hooks, model.config.to_dict(), model.config._attn_implementation


def test_heads_that_do_not_fit_are_refused_before_the_model_is_changed(gemma):
    before, logits = everything_of(gemma), gemma(tokens(1, 20)).logits
    asked = r"model\.layers\.1\.self_attn: kv='tc-2bit', but its keys have 8 channels, no multiple "
    with pytest.raises(ConfigError, match=asked + "of 16. Hint: choose one of fp8, vq-.*, tc-4bit"):
        fe.prepare(gemma, {"default": SMALL, 1: WIDE})
    assert everything_of(gemma) == before
    assert torch.equal(gemma(tokens(1, 20)).logits, logits)


def test_attentions_that_have_no_codes_at_all_say_why(gemma):
    """When a cache is built, whether their heads would fit or not."""
    fe.prepare(gemma, {"default": SMALL, 0: WIDE})
    with pytest.raises(ConfigError, match=r"kv='tc-2bit', but it cannot be quantised: .* window"):
        fe.FlashEvaCache.for_model(gemma)
    fe.revert(gemma)


FP8 = {"attention": "full", "kv": "fp8"}


@pytest.mark.parametrize(
    ("name", "before", "after", "match"),
    [
        ("llama", {"default": SMALL, 1: "full"}, {1: WIDE}, "kv='tc-2bit', but its"),
        ("bloom", {"default": SMALL, 0: "full"}, {0: FP8}, "0.* adds ALiBi biases"),
        ("gemma2", {"default": "full", 1: FP8}, {1: "full"}, "would have nothing left to do"),
        ("gemma2", {"default": "full", 1: FP8}, {1: "full", 0: FP8}, "would have nothing left"),
    ],
)
def test_what_a_prepared_model_cannot_be_changed_to_leaves_it_as_it_is(name, before, after, match):
    model = fe.prepare(build_language_model(name), before)
    state, parts = everything_of(model), dict(model.named_modules())
    with pytest.raises(ConfigError, match=match):
        fe.prepare(model, {**before, **after})
    assert everything_of(model) == state
    assert dict(model.named_modules()) == parts  # chunk rules' parameters are the same


def test_windows_that_are_told_kv_cost_nothing_that_was_learned(gemma):
    """A cache then says that they have no codes."""
    fe.prepare(gemma, {"default": SMALL, 0: "full"})
    parts = dict(gemma.named_modules())
    fe.prepare(gemma, {"default": SMALL, 0: FP8})
    assert dict(gemma.named_modules()) == parts
    with pytest.raises(ConfigError, match=r"layers\.0.*: kv='fp8', but it cannot be quantised"):
        fe.FlashEvaCache.for_model(gemma)
    fe.revert(gemma)


def test_windows_leave_a_growing_cache_room(gemma, tmp_path):
    """For what a user passes to generate, and in files."""
    fe.prepare(gemma, {"default": SMALL})
    ids, options = tokens(1, 30), {"do_sample": False, "max_new_tokens": 6}
    cache = fe.FlashEvaCache.for_model(gemma)
    expected = gemma.generate(ids, **options)
    assert torch.equal(gemma.generate(ids, past_key_values=cache, **options), expected)
    cache.save(gemma, tmp_path / "cache")
    loaded = fe.FlashEvaCache.load(gemma, tmp_path / "cache")
    with torch.no_grad():
        steps = [gemma(expected[:, -1:], past_key_values=x).logits for x in (cache, loaded)]
    assert torch.equal(*steps)
    fe.revert(gemma)


def test_models_without_flasheva_have_nothing_to_adapt():
    model, text = fe.prepare(build_language_model("llama"), {"default": FP8}), [tokens(1, 20)]
    with pytest.raises(ConfigError, match="all its attentions stay full"):
        fe.adapt(model, text, progress=False)
    with pytest.raises(ConfigError, match="all its attentions stay full"):
        fe.select_full_layers(model, text, 1)
