"""Generation of prepared models: with a compressed cache as without any cache."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

import flasheva_compile as fe
from flasheva_compile.errors import ConfigError

SMALL = {"window_size": 8, "chunk_size": 4, "sink_tokens": 1}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def llama(layers=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.4,  # far from uniform: a wrong mask changes the tokens
    )
    return LlamaForCausalLM(config).eval()


def gpt_neox():
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.4,
    )
    return GPTNeoXForCausalLM(config).eval()


def tokens(batch, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (batch, length), generator=generator)


def logits_without_cache(model, sequence, prompt, mask=None):
    """Logits that predicted the generated part, from one pass over everything."""
    if mask is not None:
        more = sequence.shape[1] - mask.shape[1]
        mask = torch.nn.functional.pad(mask, (0, more), value=1)
    with torch.no_grad():
        result = model(sequence, attention_mask=mask, use_cache=False)
    return result.logits[:, prompt - 1 : -1]


def expect_same_logits(result, model, prompt, mask=None):
    """A token's logits from the cache are those of one pass over the whole sequence."""
    cached = torch.stack(result.logits, 1)
    whole = logits_without_cache(model, result.sequences, prompt, mask)
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-4)
    assert isinstance(result.past_key_values, fe.FlashEvaCache)


def generate(model, ids, steps=30, **options):
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True, **options}
    return model.generate(ids, max_new_tokens=steps, **options)


HYBRIDS = {
    "pure": SMALL,
    "block": {**SMALL, "window": "block"},
    "evabyte": {**SMALL, "chunk_rule": "evabyte"},
    "eva": {**SMALL, "chunk_rule": "eva"},
    "hybrid": {"default": SMALL, 0: "full"},
    "two configurations": {"default": SMALL, 1: {"window_size": 4, "chunk_size": 2}},
    "retrieval": {**SMALL, "retrieve_chunks": 2},
    "retrieval in blocks": {**SMALL, "retrieve_chunks": 2, "retrieve_block": 4},
}
RETRIEVING = HYBRIDS["retrieval in blocks"]
KINDS = ["pure", "hybrid", "retrieval"]


@pytest.mark.parametrize("build", [llama, gpt_neox])
@pytest.mark.parametrize("config", HYBRIDS.values(), ids=HYBRIDS)
@pytest.mark.parametrize("implementation", [None, "static"])
def test_generate_equals_one_pass(build, config, implementation):
    model = fe.prepare(build(), config)
    perturb(model)
    result = generate(model, tokens(1, 21), cache_implementation=implementation)
    expect_same_logits(result, model, 21)


def perturb(model):
    """Move the chunk rules' parameters away from where rules agree."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".flasheva." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_the_result_is_not_full_attention():
    model = llama()
    full = model(tokens(1, 40)).logits
    fe.prepare(model, SMALL)
    ours = model(tokens(1, 40)).logits
    assert torch.allclose(ours[:, :9], full[:, :9], atol=1e-4)
    assert not torch.allclose(ours[:, -1], full[:, -1], atol=1e-2)


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("config", [SMALL, HYBRIDS["hybrid"], RETRIEVING], ids=KINDS)
def test_left_padded_rows_are_the_rows_alone(implementation, config):
    model = fe.prepare(llama(), config)
    ids, mask = tokens(3, 21), torch.ones(3, 21, dtype=torch.long)
    mask[1, :5] = 0
    mask[2, :13] = 0
    options = {"cache_implementation": implementation}
    together = generate(model, ids, attention_mask=mask, **options)
    expect_same_logits(together, model, 21, mask)
    for row, padding in enumerate([0, 5, 13]):
        alone = generate(model, ids[row : row + 1, padding:], **options)
        assert torch.equal(alone.sequences[0], together.sequences[row, padding:])


@pytest.mark.parametrize("config", [SMALL, RETRIEVING], ids=KINDS[::2])
def test_beams_equal_the_uncached_search(config):
    model = fe.prepare(llama(), config)
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 25}
    cached = model.generate(tokens(2, 15), **options)
    assert torch.equal(cached, model.generate(tokens(2, 15), use_cache=False, **options))
    static = model.generate(tokens(2, 15), cache_implementation="static", **options)
    assert torch.equal(cached, static)


def test_sampling_equals_the_uncached_one():
    model = fe.prepare(llama(), SMALL)
    options = {"do_sample": True, "top_k": 20, "max_new_tokens": 25, "pad_token_id": 0}
    made = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        made.append(model.generate(tokens(2, 15), use_cache=use_cache, **options))
    assert torch.equal(*made)


def test_offloading_leaves_a_layer_usable():
    """transformers offloads between ``update`` and the attention."""
    model = fe.prepare(llama(), SMALL)
    cache = fe.FlashEvaCache.for_model(model)
    model(tokens(1, 12), past_key_values=cache)
    state = cache.layers[0].state
    cache.offload(0)
    assert cache.layers[0].state is state


@pytest.mark.parametrize("config", [SMALL, RETRIEVING], ids=KINDS[::2])
def test_prefill_in_chunks(config):
    model = fe.prepare(llama(), config)
    result = generate(model, tokens(1, 45), prefill_chunk_size=7)
    expect_same_logits(result, model, 45)


@pytest.mark.parametrize("config", [SMALL, HYBRIDS["hybrid"], RETRIEVING], ids=KINDS)
def test_a_conversation_goes_on(config):
    model = fe.prepare(llama(), config)
    cache = fe.FlashEvaCache.for_model(model)
    first = model.generate(tokens(1, 18), past_key_values=cache, max_new_tokens=12, **GREEDY)
    longer = torch.cat([first, tokens(1, 11, seed=3)], 1)
    result = generate(model, longer, past_key_values=cache)
    expect_same_logits(result, model, 41)


@pytest.mark.parametrize("config", [SMALL, RETRIEVING], ids=KINDS[::2])
def test_a_prefix_is_reused_by_copies(config):
    model = fe.prepare(llama(), config)
    prefix = tokens(1, 26)
    cache = fe.FlashEvaCache.for_model(model)
    model(prefix, past_key_values=cache, use_cache=True)
    for seed in (5, 6):
        ids = torch.cat([prefix, tokens(1, 6, seed=seed)], 1)
        result = generate(model, ids, past_key_values=copy.deepcopy(cache))
        expect_same_logits(result, model, 32)
    assert cache.get_seq_length() == 26


@pytest.mark.parametrize("config", [SMALL, RETRIEVING], ids=KINDS[::2])
def test_rows_are_repeated_and_selected(config):
    model = fe.prepare(llama(), config)
    cache = fe.FlashEvaCache.for_model(model)
    ids = tokens(2, 26)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        step = tokens(2, 1, seed=9)
        ours = model(step, past_key_values=cache, use_cache=True).logits
        whole = model(torch.cat([ids[[1, 0]], step], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["prompt lookup", "itself", "another model"])
@pytest.mark.parametrize("config", [SMALL, RETRIEVING], ids=KINDS[::2])
def test_assisted_generation(how, config):
    model = fe.prepare(llama(), config)
    if how == "prompt lookup":
        options = {"prompt_lookup_num_tokens": 3}
    else:
        other = model if how == "itself" else fe.prepare(llama(1), SMALL)
        options = {"assistant_model": other}
    plain = generate(model, tokens(1, 21)).sequences
    assisted = model.generate(tokens(1, 21), max_new_tokens=30, **GREEDY, **options)
    assert torch.equal(plain, assisted)


def test_a_crop_without_recording_is_refused():
    model = fe.prepare(llama(), SMALL)
    cache = fe.FlashEvaCache.for_model(model)
    model(tokens(1, 30), past_key_values=cache)
    with pytest.raises(ConfigError, match="activate_past_recording"):
        cache.crop(-2)


@pytest.mark.parametrize("length", [None, 64])
@pytest.mark.parametrize("config", [SMALL, RETRIEVING], ids=KINDS[::2])
def test_a_rollback_leaves_no_trace(length, config):
    model = fe.prepare(llama(), config)
    ids, step = tokens(1, 30), tokens(1, 9, seed=4)
    with torch.no_grad():
        rolled, never = (fe.FlashEvaCache.for_model(model, max_cache_len=length) for _ in "ab")
        for cache in (rolled, never):
            model(ids, past_key_values=cache)
        rolled.activate_past_recording()
        model(tokens(1, 11, seed=7), past_key_values=rolled)
        model(tokens(1, 3, seed=8), past_key_values=rolled)
        rolled.crop(-14)
        ours = model(step, past_key_values=rolled).logits
        want = model(step, past_key_values=never).logits
    assert torch.equal(ours, want)


# --- caches of others -----------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, RETRIEVING], ids=KINDS[::2])
@pytest.mark.parametrize("unmasked", ["first", "last"])
def test_a_rollback_keeps_masks_that_not_every_call_had(config, unmasked):
    model, ids = fe.prepare(llama(), config), tokens(1, 30)
    mask = torch.ones_like(ids)
    mask[0, 22 if unmasked == "first" else 14] = 0
    places = mask.cumsum(1) - 1
    cache = fe.FlashEvaCache.for_model(model)
    cache.activate_past_recording()
    with torch.no_grad():
        for start, stop, has_none in ((0, 20, "first"), (20, 28, "last")):
            given = {"attention_mask": None if unmasked == has_none else mask[:, :stop]}
            part = {"position_ids": places[:, start:stop], **given}
            model(ids[:, start:stop], past_key_values=cache, **part)
        cache.crop(-2)
        last = {"attention_mask": mask, "position_ids": places[:, 26:]}
        ours = model(ids[:, 26:], past_key_values=cache, **last).logits
        whole = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    torch.testing.assert_close(ours, whole[:, 26:], rtol=1e-4, atol=1e-4)


def test_a_growing_cache_of_transformers_computes_the_same():
    model = fe.prepare(llama(), SMALL)
    cache = DynamicCache(config=model.config)
    result = generate(model, tokens(1, 21), past_key_values=cache)
    whole = logits_without_cache(model, result.sequences, 21)
    torch.testing.assert_close(torch.stack(result.logits, 1), whole, rtol=1e-4, atol=1e-4)


def test_a_preallocated_cache_of_transformers_is_refused():
    model = fe.prepare(llama(), SMALL)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ConfigError, match="FlashEvaCache"):
        model.generate(tokens(1, 21), past_key_values=cache, max_new_tokens=3, **GREEDY)


def test_a_quantized_cache_is_refused():
    model = fe.prepare(llama(), SMALL)
    with pytest.raises((ConfigError, ImportError), match=r"cache_implementation|quanto"):
        model.generate(tokens(1, 21), cache_implementation="quantized", max_new_tokens=3, **GREEDY)


def test_the_cache_of_another_model_is_refused():
    model, other = (fe.prepare(llama(), config) for config in (SMALL, {"window_size": 16}))
    cache = fe.FlashEvaCache.for_model(other)
    with pytest.raises(ConfigError, match="its cache was made for"):
        model(tokens(1, 21), past_key_values=cache)


def test_an_unprepared_model_refuses_the_cache():
    prepared, plain = fe.prepare(llama(), SMALL), llama()
    cache = fe.FlashEvaCache.for_model(prepared)
    with pytest.raises(ConfigError, match="outside of a prepared attention"):
        plain(tokens(1, 21), past_key_values=cache)
    with pytest.raises(ConfigError, match="not prepared"):
        fe.FlashEvaCache.for_model(plain)


def test_too_small_a_cache_is_refused_before_generation():
    model = fe.prepare(llama(), SMALL)
    cache = fe.FlashEvaCache.for_model(model, max_cache_len=32)
    with pytest.raises(ConfigError, match=r"holds 32 tokens, generate may need 50"):
        model.generate(tokens(1, 21), past_key_values=cache, max_new_tokens=30, **GREEDY)


def test_a_custom_mask_is_refused():
    model = fe.prepare(llama(), SMALL)
    with pytest.raises(ConfigError, match="2-D attention_mask"):
        model(tokens(1, 5), attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))


# --- sizes ----------------------------------------------------------------------------------------


def test_cache_bytes():
    """At (256, 16) and long context the cache is more than eleven times smaller."""
    model = fe.prepare(llama(), {"window_size": 256, "chunk_size": 16})
    tokens_held, heads, size, layers = 65536, 2, 8, 2
    cache = fe.FlashEvaCache.for_model(model, max_batch_size=1, max_cache_len=tokens_held)
    full = 2 * layers * tokens_held * heads * size * 4
    assert full / cache.nbytes() > 11
    assert cache.get_max_length() == tokens_held


@pytest.mark.parametrize("config", [SMALL, RETRIEVING], ids=KINDS[::2])
def test_a_reset_cache_is_an_empty_one(config):
    model = fe.prepare(llama(), config)
    for length in (None, 64):
        cache = fe.FlashEvaCache.for_model(model, max_cache_len=length)
        first = generate(model, tokens(1, 21), past_key_values=cache).sequences
        cache.reset()
        assert torch.equal(generate(model, tokens(1, 21), past_key_values=cache).sequences, first)


def test_no_gradient_goes_through_a_cache():
    model = fe.prepare(llama(), SMALL)
    cache = fe.FlashEvaCache.for_model(model)
    model(tokens(1, 21), past_key_values=cache)
    loss = model(tokens(1, 1), past_key_values=cache).logits.sum()
    with pytest.raises(ConfigError, match="has no gradient"):
        loss.backward()


@pytest.mark.parametrize("window", ["sliding", "block"])
def test_a_preallocated_cache_holds_exactly_its_length(window):
    model = fe.prepare(llama(), {**SMALL, "window": window})
    for length in (60, 61, 62, 63, 64):
        cache = fe.FlashEvaCache.for_model(model, max_cache_len=length)
        result = generate(model, tokens(1, 21), past_key_values=cache, steps=length - 20)
        expect_same_logits(result, model, 21)
        assert cache.get_seq_length() == length


@pytest.mark.parametrize("retrieval", [{}, {"retrieve_chunks": 3}], ids=KINDS[::2])
def test_a_growing_cache_forgets_nothing(retrieval):
    long = {"window_size": 64, "chunk_size": 2, "sink_tokens": 0}
    model = fe.prepare(llama(1), {**long, **retrieval})
    ids = tokens(1, 400)
    cache = fe.FlashEvaCache.for_model(model)
    with torch.no_grad():
        steps = [
            model(x, past_key_values=cache).logits for x in (ids[:, :9], *ids[:, 9:].split(1, 1))
        ]
        whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
