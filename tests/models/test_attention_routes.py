"""Attentions that ``prepare`` leads through the AttentionInterface itself: each class, each way."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    FalconConfig,
    GPTNeoConfig,
)
from transformers.masking_utils import eager_mask

import flasheva_compile as fe
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.routes import REFUSED, ROUTES
from tests.models.generation_models import build_language_model
from tests.models.generation_survey import EQUAL, ROUNDING, survey
from tests.models.generation_survey import REFUSED as SURVEY_REFUSED
from tests.models.test_generate import (
    SMALL,
    expect_same_logits,
    generate,
    llama,
    perturb,
    tokens,
)

METHODS = ("codegen", "gpt_neo", "gpt_neox_japanese", "gptj")
FORWARDS = ("bloom", "falcon", "mpt", "mvp", "trocr", "xglm")
NAMES = METHODS + FORWARDS
ENCODERS = ("megatron-bert", "rembert", "roformer")  # causal as decoders in some versions only
COVERING = {"window_size": 64, "chunk_size": 4, "sink_tokens": 1}
FALCON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.4,  # far from uniform: a wrong mask changes the tokens
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def expect_close(got, want):
    assert (got - want).abs().max() <= ROUNDING * want.abs().max()


def falcon(**given):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FalconConfig(**FALCON | given)).eval()


def attentions(model):
    return [m for m in model.modules() if type(m).__name__ in {n.split(".")[-1] for n in ROUTES}]


def additive(length):
    """The plain causal mask, as a model makes it for itself."""
    return torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)


def hybrid(name):
    """A configuration that converts one layer of two; a layer of GPT-Neo has a window anyway."""
    return SMALL if name == "gpt_neo" else {"default": SMALL, 0: "full"}


def causal(model):
    """Tell whether what follows a token leaves it as it is."""
    ids, other = tokens(1, 12), tokens(1, 12)
    other[0, -1] = ids[0, -1] + 1
    with torch.no_grad():
        return torch.equal(model(ids).logits[:, :-1], model(other).logits[:, :-1])


# --- every class ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_class_is_converted_and_equal(name):
    """With a cache, padding, windows over everything, and reverted: see the survey."""
    entry = survey(name)
    assert entry.outcome == EQUAL, entry
    windows = {"it has a window of 8 tokens already"} if name == "gpt_neo" else set()
    assert set(entry.kept.values()) == windows
    assert len(entry.converted) == 2 - len(windows)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_converted_where_they_are_causal(name):
    entry = survey(name)
    if causal(build_language_model(name)):
        assert entry.outcome == EQUAL, entry
        assert len(entry.converted) == 2
    else:
        assert entry.outcome == SURVEY_REFUSED, entry
        assert "it is not causal" in entry.reason


def test_every_route_is_tested():
    tested = {
        type(m).__name__ for n in NAMES + ENCODERS for m in attentions(build_language_model(n))
    }
    assert tested == {name.split(".")[-1] for name in ROUTES}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("partly", [False, True])
def test_reverting_leaves_nothing_behind(name, partly):
    model = build_language_model(name)
    before = model(tokens(1, 30)).logits
    own = {path: set(vars(m)) for path, m in model.named_modules()}
    keys, settings = list(model.state_dict()), model.config.to_dict()
    fe.prepare(model, hybrid(name) if partly else COVERING)
    replaced = ["forward" in vars(m) or "_attn" in vars(m) for m in attentions(model)]
    assert sum(replaced) == 2  # cross-attention is left alone
    fe.revert(model)
    assert torch.equal(model(tokens(1, 30)).logits, before)
    assert {path: set(vars(m)) for path, m in model.named_modules()} == own
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == settings
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", [*(n for n in NAMES if n != "bloom"), "llama"])
@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_mask_of_the_users_own_is_refused(name, partly, use_cache):
    """Even the plain causal one, for what a mask means is not looked up in its numbers.

    BLOOM itself has no place for one.
    """
    model = fe.prepare(build_language_model(name), hybrid(name) if partly else SMALL)
    with pytest.raises(ConfigError, match=r"a mask of shape \(1, 1, 12, 12\)"):
        model(tokens(1, 12), attention_mask=additive(12), use_cache=use_cache)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [None, 40])
def test_a_model_that_was_made_bidirectional_since_is_refused(name, length):
    """Attentions without a flag tell it by a mask that is not given."""
    model = fe.prepare(build_language_model(name), hybrid(name))
    cache = fe.FlashEvaCache.for_model(model, max_cache_len=length)
    model.config.is_causal = False
    for given in ({"use_cache": False}, {"past_key_values": cache}):
        with pytest.raises(ConfigError, match=r"a mask of shape|window from the last key"):
            model(tokens(1, 12), **given)


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_stay_full_are_as_they_were(name):
    """A layer that is kept attends as before, with padding, beside one that covers everything."""
    model = build_language_model(name)
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        want = model(ids, attention_mask=mask, use_cache=False).logits
        full = 1 if name == "gpt_neo" else 0
        fe.prepare(model, {"default": COVERING, full: "full"})
        got = model(ids, attention_mask=mask, use_cache=False).logits
    assert [row.decision for row in fe.explain(model).layers].count("full") == 1
    expect_close(got[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize("name", NAMES)
def test_hybrids_generate_as_one_pass(name):
    model = fe.prepare(build_language_model(name), hybrid(name))
    perturb(model)
    expect_same_logits(generate(model, tokens(1, 21)), model, 21)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "gpt_neo"])
def test_preallocated_caches_generate_the_same(name):
    model = fe.prepare(build_language_model(name), hybrid(name))
    want = generate(model, tokens(1, 21), steps=12)
    got = generate(model, tokens(1, 21), steps=12, cache_implementation="static")
    expect_close(torch.stack(got.logits), torch.stack(want.logits))


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_independent(name):
    model = fe.prepare(build_language_model(name), SMALL)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        want = model(tokens(1, 30)).logits
        fe.revert(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(tokens(1, 30)).logits, want)


@pytest.mark.parametrize("name", ["gptj", "falcon"])
def test_a_checkpoint_comes_back_prepared(name, tmp_path):
    model = fe.prepare(build_language_model(name), SMALL)
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = fe.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens(1, 30)).logits, model(tokens(1, 30)).logits)


@pytest.mark.parametrize("name", ["gptj", "gpt_neo", "falcon", "xglm"])
def test_gradients_are_those_of_full_attention(name):
    def gradients(model):
        model(tokens(2, 30), labels=tokens(2, 30), use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if ".flasheva." not in n}

    want = gradients(build_language_model(name))
    got = gradients(fe.prepare(build_language_model(name), COVERING))
    assert got.keys() == want.keys()
    largest = max(x.abs().max() for x in want.values() if x is not None)
    for path, gradient in want.items():
        assert (got[path] is None) == (gradient is None), path
        if gradient is not None:
            assert (got[path] - gradient).abs().max() <= ROUNDING * largest, path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("partly", [False, True])
def test_a_prepared_model_is_one_graph(name, partly):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    model = fe.prepare(build_language_model(name), hybrid(name) if partly else SMALL)
    step = torch.compile(model.forward, backend=count, fullgraph=True)
    with torch.no_grad():
        got = step(tokens(1, 30), use_cache=False).logits
        expect_close(got, model(tokens(1, 30), use_cache=False).logits)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["gptj", "falcon"])
def test_low_precision(name):
    model = build_language_model(name)
    want = fe.prepare(copy.deepcopy(model), SMALL)(tokens(1, 30), use_cache=False).logits
    fe.prepare(model.bfloat16(), SMALL)
    result = generate(model, tokens(1, 21), steps=5)
    assert result.sequences.shape == (1, 26)
    got = model(tokens(1, 30), use_cache=False).logits
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() < 0.2 * want.abs().max()


# --- what is peculiar to one ----------------------------------------------------------------------


def test_a_window_that_the_trial_run_cannot_see_stays():
    """Released GPT-Neo models have windows of 256 tokens, the trial run has nine."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=97,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["local", "global"], 1]],
        initializer_range=0.4,
    )
    model = fe.prepare(AutoModelForCausalLM.from_config(config).eval(), SMALL)
    rows = fe.explain(model).layers
    assert [row.decision for row in rows] == ["full", "eva"]
    assert rows[0].reason == "it has a window of 256 tokens already"


def test_windows_counted_from_the_last_key_refuse_preallocated_caches():
    model = fe.prepare(build_language_model("gpt_neo"), SMALL)
    with pytest.raises(ConfigError, match="counts its window from the last key"):
        generate(model, tokens(1, 21), cache_implementation="static")
    cache = fe.FlashEvaCache.for_model(model, max_cache_len=64)
    with pytest.raises(ConfigError, match="counts its window from the last key"):
        model(tokens(1, 21), past_key_values=cache)


@pytest.mark.parametrize(
    "given",
    [
        {"multi_query": False},
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"parallel_attn": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_kind_of_falcon(given, implementation):
    model = falcon(**given, attn_implementation=implementation)
    with torch.no_grad():
        want = model(tokens(1, 30)).logits
        fe.prepare(model, {"default": COVERING, 0: "full"})
        expect_close(model(tokens(1, 30)).logits, want)
        fe.prepare(model, hybrid("falcon"))
    expect_same_logits(generate(model, tokens(1, 21)), model, 21)


@pytest.mark.parametrize("name", ["git", "openai-gpt"])
def test_known_classes_without_a_route_say_why(name):
    model = build_language_model(name)
    with pytest.raises(ConfigError, match="can be converted: it") as caught:
        fe.prepare(model, SMALL)
    assert any(reason in str(caught.value) for reason in REFUSED.values())


@pytest.mark.parametrize("name", ["mvp", "trocr"])
def test_cross_attention_beside_it_needs_no_cache(name):
    model = build_language_model(name)
    seen = {"encoder_hidden_states": torch.randn(1, 7, 32), "input_ids": tokens(1, 20)}
    with torch.no_grad():
        want = model(**seen, use_cache=False).logits
        fe.prepare(model, COVERING)
        expect_close(model(**seen, use_cache=False).logits, want)
        with pytest.raises(ConfigError, match="cannot attend through a EncoderDecoderCache"):
            model(**seen, use_cache=True)


@pytest.mark.parametrize("name", ["mvp", "trocr", "xglm"])
def test_a_converted_attention_attends_to_its_own_sequence_alone(name):
    model = fe.prepare(build_language_model(name), SMALL)
    attention = attentions(model)[0]
    hidden = torch.randn(1, 6, 32)
    with pytest.raises(ConfigError, match="attends to another sequence"):
        attention(hidden, key_value_states=hidden)


def test_prompts_of_mvp_are_refused():
    model = fe.prepare(build_language_model("mvp"), SMALL)
    with pytest.raises(ConfigError, match="learned prompt"):
        attentions(model)[0](torch.randn(1, 6, 32), attn_prompt=torch.randn(2, 4, 3, 8))


# --- attention functions that are not the model's own ---------------------------------------------


def _few(module, query, key, value, mask, scaling=None, **_):
    """Attend to the nine keys with the largest scores: as many as the trial run has."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * scaling + mask
    least = scores.topk(min(9, scores.shape[-1])).values[..., -1:]
    weights = scores.masked_fill(scores < least, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2), None


def test_a_function_of_the_users_own_is_not_replaced():
    """The trial run calls the model's own code and cannot tell what the function does."""
    AttentionInterface.register("few", _few)
    AttentionMaskInterface.register("few", eager_mask)
    model, ids = llama(), tokens(1, 40)
    model.set_attn_implementation("few")
    before = model(ids).logits
    with pytest.raises(ConfigError, match="it runs the attention function 'few'"):
        fe.prepare(model, {"default": COVERING, 0: "full"})
    assert torch.equal(model(ids).logits, before)
    model.set_attn_implementation("sdpa")
    fe.prepare(model, {"default": COVERING, 0: "full"})


@pytest.mark.parametrize("length", [None, 48])
@pytest.mark.parametrize("full", [0, 1])
def test_another_function_over_our_cache_is_refused(full, length):
    """It would attend to the new tokens alone."""
    model, ids = fe.prepare(llama(), {"default": COVERING, full: "full"}), tokens(1, 21)
    cache = fe.FlashEvaCache.for_model(model, max_cache_len=length)
    model(ids, past_key_values=cache)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match="was set to 'sdpa' after the model was prepared"):
        model(ids[:, :1], past_key_values=cache)
