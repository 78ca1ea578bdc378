"""What a compressed cache refuses, because it would have computed something else silently."""

from __future__ import annotations

import pickle

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicSlidingWindowLayer

import flasheva_compile as fe
from flasheva_compile.errors import ConfigError
from tests.models.generation_models import build_language_model
from tests.models.test_generate import GREEDY, HYBRIDS, SMALL, llama, tokens

FP8 = {"default": SMALL, 0: {"attention": "full", "kv": "fp8"}}
CONFIGS = {
    **{name: HYBRIDS[name] for name in ("pure", "block", "hybrid", "retrieval")},
    "full behind": {"default": SMALL, 1: "full"},
    "fp8": FP8,
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS, name="model")
def _model(request):
    return fe.prepare(llama(), request.param)


@pytest.fixture(params=(None, 64), ids=("growing", "preallocated"), name="room")
def _room(request):
    return request.param


def cache_of(model, room=None):
    return fe.FlashEvaCache.for_model(model, max_cache_len=room)


# --- room -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_more_tokens_than_there_is_room_for(model, masked):
    """Also those that a window has long let go: the host counts what the device would lose."""
    cache, ids = cache_of(model, 32), tokens(1, 40)
    for start, stop in ((0, 30), (30, 31), (31, 32)):
        mask = torch.ones(1, stop, dtype=torch.long) if masked else None
        model(ids[:, start:stop], attention_mask=mask, past_key_values=cache)
    for refused in (cache, cache_of(model, 32)):
        held = refused.get_seq_length()
        with pytest.raises(ConfigError, match=r"\d+ tokens in a cache of 32"):
            model(ids[:, : 33 - int(held)], past_key_values=refused)
        assert refused.get_seq_length() == held


@pytest.mark.parametrize("config", [SMALL, HYBRIDS["retrieval"]], ids=("pure", "retrieval"))
def test_a_rollback_after_more_tokens_than_there_was_room_for(config):
    """A captured graph goes on beyond the room; what it overwrote does not come back."""
    model = fe.prepare(llama(), config)
    cache, ids = cache_of(model, 20), tokens(1, 24)
    step = torch.compile(model.forward, backend="eager")
    with torch.no_grad():
        model(ids[:, :16], past_key_values=cache)
        cache.activate_past_recording()
        for column in range(16, 23):
            step(ids[:, column : column + 1], past_key_values=cache)
    with pytest.raises(ConfigError, match="after more tokens than the 20"):
        cache.crop(-4)


@pytest.mark.parametrize("count", [2, 10])
def test_candidates_need_room(count):
    """Refused before generation, or generated to the end: candidates are longer than the text."""
    model = fe.prepare(llama(), HYBRIDS["hybrid"])
    ids = torch.zeros(1, 18, dtype=torch.long)  # what follows a match is found at once
    options = {**GREEDY, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4}
    want = model.generate(ids, **options)
    options["prompt_lookup_num_tokens"] = count
    needed = 22 + count - 2
    with pytest.raises(ConfigError, match=f"holds {needed - 1} tokens, generate may need {needed}"):
        model.generate(ids, past_key_values=cache_of(model, needed - 1), **options)
    got = model.generate(ids, past_key_values=cache_of(model, needed), **options)
    assert torch.equal(got, want)


# --- calls that fail ------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 12])
def test_a_cache_that_a_call_left_half_way(model, room, before):
    """Its first layer holds tokens that the others do not: they would be there twice."""
    cache, ids = cache_of(model, room), tokens(1, 16)
    if before:
        model(ids[:, :before], past_key_values=cache)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].self_attn.q_proj.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, before:16], past_key_values=cache)
    handle.remove()
    for _ in range(2):
        with pytest.raises(ConfigError, match="a call has failed half-way"):
            model(ids[:, before:16], past_key_values=cache)
    cache.reset()
    again = model(ids[:, :16], past_key_values=cache).logits
    assert torch.equal(again, model(ids[:, :16], past_key_values=cache_of(model, room)).logits)


def test_a_layer_that_is_compiled_by_itself_is_not_taken_for_a_failure(model, room):
    """A graph counts nothing on the host for a preallocated layer: what it holds is not known."""

    def logits():
        cache, parts = cache_of(model, room), tokens(1, 24).split((16, 4, 4), 1)
        return [model(x, past_key_values=cache).logits for x in parts]

    with torch.no_grad():
        want = logits()
        torch._dynamo.reset()
        model.model.layers[0].compile(backend="eager")
        got = logits()
    assert all(map(torch.equal, got, want))


def test_a_rollback_that_a_window_of_transformers_refuses_changes_no_layer():
    config = build_language_model("gemma2").config
    config.layer_types = ["full_attention", "sliding_attention"]
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    cache = fe.FlashEvaCache.for_model(model, SMALL)
    assert type(cache.layers[1]) is DynamicSlidingWindowLayer
    model(tokens(1, 20), past_key_values=cache)
    cache.layers[0].activate_past_recording()
    model(tokens(1, 6), past_key_values=cache)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [26, 26]


# --- masks ----------------------------------------------------------------------------------------


def test_a_mask_of_the_new_tokens_alone(model):
    """Of a growing cache: its columns would be taken for the first ones."""
    cache, ids = cache_of(model), tokens(1, 30)
    model(ids[:, :20], past_key_values=cache)
    with pytest.raises(ConfigError, match="10 columns for 30 tokens, 20 of which are in the cache"):
        model(ids[:, 20:], attention_mask=torch.ones(1, 10).long(), past_key_values=cache)
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("saved", [False, True], ids=("filled by calls", "from a file"))
@pytest.mark.parametrize("config", ["pure", "hybrid", "retrieval"])
def test_another_mask_of_tokens_that_generate_has_not_seen(config, room, saved, tmp_path):
    model, ids = fe.prepare(llama(), CONFIGS[config]), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    cache = cache_of(model, room)
    places = (mask[:, :12].cumsum(1) - 1).clamp_min(0)
    first = {"attention_mask": mask[:, :12], "position_ids": places}
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache, **first)
    if saved:
        cache.save(model, tmp_path / "cache")
        cache = fe.FlashEvaCache.load(model, tmp_path / "cache")

    def generate(mask):
        options = {**GREEDY, "attention_mask": mask, "max_new_tokens": 4}
        return model.generate(ids, past_key_values=cache, **options)

    less = mask.clone()
    less[1, 0] = 0
    for other in (torch.ones_like(mask), less):
        with pytest.raises(ConfigError, match="says of stored tokens of row"):
            generate(other)
    assert torch.equal(
        generate(mask), model.generate(ids, attention_mask=mask, max_new_tokens=4, **GREEDY)
    )


def test_what_was_told_is_saved(room, tmp_path):
    """Of tokens between others nothing else is known."""
    model, ids = fe.prepare(llama(), SMALL), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 7] = 0
    cache = cache_of(model, room)
    options = {**GREEDY, "max_new_tokens": 3}
    model.generate(ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache, **options)
    cache.save(model, tmp_path / "cache")
    cache = fe.FlashEvaCache.load(model, tmp_path / "cache")
    with pytest.raises(ConfigError, match="says of stored tokens of row 1"):
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
    model.generate(ids, attention_mask=mask, past_key_values=cache, **options)


# --- training and pickling ------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, HYBRIDS["retrieval"]], ids=("pure", "retrieval"))
def test_dropout_through_a_cache(config):
    model = fe.prepare(llama(), config).train()
    model(tokens(1, 12), past_key_values=cache_of(model))  # it has none
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(ConfigError, match="has no dropout"):
        model.generate(tokens(1, 12), max_new_tokens=2, **GREEDY)
    model.eval().generate(tokens(1, 12), max_new_tokens=2, **GREEDY)


def test_pickling_a_prepared_model():
    """Its own methods would come back in place of ours."""
    model = fe.prepare(llama(), SMALL)
    with pytest.raises(ConfigError, match="cannot be pickled"):
        pickle.dumps(model)
    pickle.dumps(fe.revert(model))
