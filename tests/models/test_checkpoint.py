"""Prepared models and their caches survive a round trip through files, and nothing else passes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

import flasheva_compile as fe
from flasheva_compile.errors import ConfigError
from tests.models.test_generate import (
    HYBRIDS,
    KINDS,
    RETRIEVING,
    SMALL,
    generate,
    llama,
    perturb,
    tokens,
)

LOAD = """
import sys, torch
import flasheva_compile as fe
model = fe.from_pretrained(sys.argv[1])
ids = torch.load(sys.argv[2])
torch.save(model(ids).logits, sys.argv[3])
"""


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_a_saved_model_is_the_model_in_a_fresh_process(tmp_path, shards):
    model = fe.prepare(llama(), HYBRIDS["hybrid"])
    perturb(model)
    model.save_pretrained(tmp_path / "model", max_shard_size=shards)
    torch.save(tokens(1, 40), tmp_path / "ids")
    paths = [str(tmp_path / name) for name in ("model", "ids", "logits")]
    subprocess.run([sys.executable, "-c", LOAD, *paths], check=True)
    logits = torch.load(tmp_path / "logits")
    assert torch.equal(logits, model(tokens(1, 40)).logits)


def test_parameters_are_not_lost_by_another_way_of_loading(tmp_path):
    model = fe.prepare(llama(), SMALL)
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    with pytest.raises(ConfigError, match="without its chunk rules' parameters"):
        fe.prepare(loaded)
    assert not any("flasheva" in name for name, _ in loaded.named_parameters())
    assert fe.explain(fe.prepare(loaded, SMALL)).rewritten


def test_a_plain_checkpoint_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no FlashEVA configuration"):
        fe.from_pretrained(tmp_path)


def test_a_reverted_model_saves_a_plain_checkpoint(tmp_path):
    fe.revert(fe.prepare(llama(), SMALL)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no FlashEVA configuration"):
        fe.from_pretrained(tmp_path)


@pytest.mark.parametrize("length", [None, 96])
@pytest.mark.parametrize("config", [SMALL, HYBRIDS["hybrid"], RETRIEVING], ids=KINDS)
def test_a_saved_cache_goes_on(tmp_path, length, config):
    model = fe.prepare(llama(), config)
    cache = fe.FlashEvaCache.for_model(model, max_cache_len=length)
    first = generate(model, tokens(1, 26), past_key_values=cache, steps=5).sequences
    cache.save(model, tmp_path / "cache.safetensors")
    again = fe.FlashEvaCache.load(model, tmp_path / "cache.safetensors")
    longer = torch.cat([first, tokens(1, 7, seed=4)], 1)
    want = generate(model, longer, past_key_values=cache, steps=20)
    got = generate(model, longer, past_key_values=again, steps=20)
    assert torch.equal(torch.stack(want.logits), torch.stack(got.logits))


def test_the_cache_of_other_weights_or_rules_is_refused(tmp_path):
    model = fe.prepare(llama(), SMALL)
    cache = fe.FlashEvaCache.for_model(model)
    generate(model, tokens(1, 26), past_key_values=cache, steps=5)
    cache.save(model, tmp_path / "cache")
    with pytest.raises(ConfigError, match="another configuration"):
        fe.FlashEvaCache.load(fe.prepare(llama(), {"window_size": 16}), tmp_path / "cache")
    perturb(model)
    with pytest.raises(ConfigError, match="other weights"):
        fe.FlashEvaCache.load(model, tmp_path / "cache")
