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
