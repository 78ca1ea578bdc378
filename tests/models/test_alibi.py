"""Prepared models that add ALiBi biases: what they compute with a cache, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM
from transformers.models.falcon import modeling_falcon

import flasheva_compile as fe
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation import cache_layer
from tests.models.generation_models import build_language_model
from tests.models.test_attention_routes import expect_close, falcon
from tests.models.test_exact_layers import feed
from tests.models.test_generate import SMALL, expect_same_logits, generate, perturb, tokens

COVERING = {"window_size": 128, "chunk_size": 4}
PIECES = (21, 1, 1, 7, 2, 30, 1)  # a prompt, tokens one by one, several over a filled cache
FALCONS = {
    "one kv head": {},
    "eager": {"attn_implementation": "eager"},
    "heads of their own": {"multi_query": False},
    "repeated kv heads": {"new_decoder_architecture": True, "num_kv_heads": 2},
}
LAYERS = {
    "block": {**SMALL, "window": "block"},
    "mean": {**SMALL, "chunk_rule": "mean", "sink_tokens": 0},
    "evabyte": {**SMALL, "chunk_rule": "evabyte"},
    "eva": {**SMALL, "chunk_rule": "eva"},
    "hybrid": {"default": SMALL, 0: "full"},
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name):
    return falcon(alibi=True) if name == "falcon" else build_language_model(name)


def padded(rows=2, length=63):
    """Return tokens and a mask; the first row has padding that is no whole number of chunks."""
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.bool)
    mask[0, :10] = False
    return ids, mask


def one_pass(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits


# --- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("given", FALCONS.values(), ids=FALCONS)
def test_windows_over_everything_are_falcon_as_it_was(given):
    """Converted or left full; eager code adds the biases twice, and so do we then."""
    model = falcon(alibi=True, **given)
    ids, mask = padded(length=100)
    want = one_pass(model, ids, mask)[mask]
    for config in (COVERING, {"default": COVERING, 0: "full"}):
        fe.prepare(model, config)
        expect_close(one_pass(model, ids, mask)[mask], want)
    assert torch.equal(one_pass(fe.revert(model), ids, mask)[mask], want)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_biases_that_falcon_rounds_to_bf16_are_not_rounded_here(implementation, monkeypatch):
    """Slopes of twelve heads are no powers of two."""
    sizes = {"num_attention_heads": 12, "hidden_size": 48, "attn_implementation": implementation}
    model, (ids, mask) = falcon(alibi=True, **sizes), padded()
    rounded = one_pass(model, ids, mask)[mask]

    def unrounded(attention_mask, heads, dtype):
        slopes = modeling_falcon.own(torch.ones(1, 2), heads, torch.float32).diff(dim=-1)
        places = (attention_mask.long().cumsum(-1) - 1) * attention_mask
        return (slopes.view(1, heads, 1) * places[:, None]).flatten(0, 1)[:, None].to(dtype)

    monkeypatch.setattr(modeling_falcon, "own", modeling_falcon.build_alibi_tensor, raising=False)
    got = one_pass(fe.prepare(model, COVERING), ids, mask)[mask]
    monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", unrounded)
    expect_close(got, one_pass(fe.revert(model), ids, mask)[mask])
    assert (got - rounded).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_slopes_of_a_number_of_heads_that_is_no_power_of_two(name):
    config = type(build_language_model(name).config)
    heads = {"n_heads": 6} if name == "mpt" else {"n_head": 6}
    sizes = {"vocab_size": 97, "hidden_size": 48, "initializer_range": 0.4, **heads}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**sizes, num_hidden_layers=2)).eval()
    ids, mask = padded()
    want = one_pass(model, ids, mask)[mask]
    expect_close(one_pass(fe.prepare(model, COVERING), ids, mask)[mask], want)


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("room", [None, 80])
def test_any_portions_of_padded_rows_are_one_pass(layers, room, monkeypatch):
    """Growing and preallocated; the grouped heads of a Falcon, BLOOM's of their own."""
    monkeypatch.setattr(cache_layer, "FIRST_CHUNKS", 1)  # grow soon
    ids, mask = padded()
    for name in ("bloom", "falcon"):
        model = fe.prepare(build(name), layers)
        perturb(model)
        cache = fe.FlashEvaCache.for_model(model, max_cache_len=room)
        got = feed(model, cache, ids, PIECES, mask)
        expect_close(got[mask], one_pass(model, ids, mask)[mask])


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_the_compiled_model_is_the_prepared_one(name):
    """The graph entrance knows ALiBi by itself, but for Falcon's, which is rounded."""
    model, ids = build(name), tokens(2, 40)
    compiled = torch.compile(model, backend="flasheva", options={**SMALL, "inner_backend": "eager"})
    with torch.no_grad():
        want = compiled(input_ids=ids, use_cache=False).logits
    expect_close(one_pass(fe.prepare(model, SMALL), ids), want)


def test_rows_go_on_come_back_and_are_copied(tmp_path):
    """Beams, a rollback, a file, a second turn with a row that had ended."""
    model = fe.prepare(build("bloom"), {"default": SMALL, 1: {**SMALL, "window": "block"}})
    perturb(model)
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 25, "eos_token_id": None}
    beams = model.generate(tokens(2, 15), **options)
    assert torch.equal(beams, model.generate(tokens(2, 15), use_cache=False, **options))
    ids, mask = padded()
    mask[0, 30:35] = False  # the end of its first turn
    whole = one_pass(model, ids, mask)
    cache = fe.FlashEvaCache.for_model(model)
    feed(model, cache, ids[:, :40], (38, 2), mask[:, :40])
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache, attention_mask=torch.ones(2, 49))
    cache.crop(-9)
    cache.save(model, tmp_path / "cache")
    loaded = fe.FlashEvaCache.load(model, tmp_path / "cache")
    for start in range(40, 63):
        with torch.no_grad():
            part, told = ids[:, start : start + 1], mask[:, : start + 1]
            got = model(part, past_key_values=loaded, attention_mask=told.long()).logits
        expect_close(got[:, 0], whole[:, start])


def test_chunk_tokens_in_fp8_are_close():
    model, ids = fe.prepare(build("falcon"), SMALL), tokens(1, 63)
    cache = fe.FlashEvaCache.for_model(model, chunk_tokens="fp8")
    error = (feed(model, cache, ids, PIECES) - one_pass(model, ids)).abs().max()
    assert 0 < error < 0.1 * one_pass(model, ids).abs().max()


def test_slopes_are_not_cast_with_the_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 48, "n_layer": 2, "n_head": 6}
    model = BloomForCausalLM(BloomConfig(**sizes)).eval()
    fe.prepare(model, {"default": SMALL, 0: "full"})
    keys = set(model.state_dict())
    before = [x.clone() for n, x in model.named_buffers() if "slopes" in n]
    model.bfloat16().to("meta").to_empty(device="cpu")
    after = [x for n, x in model.named_buffers() if "slopes" in n]
    assert len(before) == 2
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert not any("slopes" in key for key in keys)
    fe.revert(model)
    assert not any("flasheva" in n for n, _ in model.named_modules())


def test_low_precision_decodes():
    model = fe.prepare(build("bloom"), {"default": SMALL, 0: "full"}).bfloat16()
    result = generate(model, tokens(1, 21), steps=20, cache_implementation="static")
    cached, whole = torch.stack(result.logits, 1), one_pass(model, result.sequences)[:, 20:-1]
    assert (cached - whole).abs().max() < 0.1 * whole.abs().max()


def test_assisted_generation():
    model = fe.prepare(build("mpt"), SMALL)
    result = generate(model, tokens(1, 21).repeat(1, 2), prompt_lookup_num_tokens=3)
    expect_same_logits(result, model, 42)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**SMALL, "retrieve_chunks": 2}, "retrieve_chunks: .* scores chunks without them"),
        ({"default": SMALL, 0: {"attention": "full", "kv": "fp8"}}, "kv: .* attention to codes"),
    ],
)
def test_what_has_no_place_for_biases_is_refused_before_anything_changes(config, message):
    model = build("bloom")
    before = one_pass(model, tokens(1, 30))
    with pytest.raises(ConfigError, match=message):
        fe.prepare(model, config)
    assert torch.equal(one_pass(model, tokens(1, 30)), before)
    assert not any("forward" in vars(m) for m in model.modules())


def test_full_layers_are_not_quantised():
    model = fe.prepare(build("bloom"), {"default": SMALL, 0: "full"})
    with pytest.raises(ConfigError, match="no full attention of the model can be quantised"):
        fe.FlashEvaCache.for_model(model, full_layers="fp8")
    for layers in (None, [0]):
        with pytest.raises(ConfigError, match=r"can be quantised|no place for"):
            fe.calibrate_kv(model, [tokens(1, 40)], "vq-2bit", layers=layers)


@pytest.mark.parametrize("full", [0, 1])
def test_calls_that_say_otherwise_than_the_trial_run(full):
    model = fe.prepare(build("falcon"), {"default": SMALL, full: "full"})
    attention, hidden = model.transformer.h[0].self_attention, torch.randn(1, 6, 32)
    angles = (torch.ones(1, 6, 8), torch.zeros(1, 6, 8))
    with pytest.raises(ConfigError, match="prepared with ALiBi biases, and called the other way"):
        attention(hidden, alibi=None, attention_mask=None, position_embeddings=angles)
