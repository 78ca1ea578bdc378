"""Full layers of a preallocated cache: what they compute is what a growing cache computes."""

from __future__ import annotations

import copy
import dataclasses
from unittest import mock

import pytest
import torch
from torch.nn import functional
from transformers.cache_utils import DynamicLayer, StaticLayer, StaticSlidingWindowLayer

import flasheva_compile as fe
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.exact_layer import ExactCacheLayer
from tests.models.generation_models import build_language_model
from tests.models.test_generate import GREEDY, SMALL, generate, gpt_neox, llama, tokens
from tests.models.test_vecinfer_cache import Calls, close, hybrid
from tests.tolerance import assert_as_accurate_as_pytorch

ROOM = 96


def cache_of(model, length: int | None = ROOM, **options):
    return fe.FlashEvaCache.for_model(model, max_cache_len=length, **options)


def sharp(name):
    """Build a model with caps or sinks that matter, whose second layer is full in the hybrid."""
    model = build_language_model(name, windows_off=True)
    for layer in model.model.layers:
        if name == "gemma2":
            layer.self_attn.attn_logit_softcapping = 0.5
        else:
            layer.self_attn.sinks.data.fill_(2.0)
    return fe.prepare(model, {"default": SMALL, 1: "full"})


def feed(model, cache, ids, pieces, mask=None):
    """Return the logits of tokens that come in pieces; columns to come are no valid ones."""
    logits, start = [], 0
    for size in pieces:
        part = slice(start, start + size)
        given = {}
        if mask is not None:
            columns = mask[:, : part.stop]
            if cache.get_max_length() >= 0:
                columns = functional.pad(mask, (0, cache.get_max_length() - mask.shape[1]))
            places = (mask.cumsum(1) - 1).clamp_min(0)[:, part]
            given = {"attention_mask": columns.long(), "position_ids": places}
        with torch.no_grad():
            logits.append(model(ids[:, part], past_key_values=cache, **given).logits)
        start += size
    return torch.cat(logits, 1)


# --- which layers ---------------------------------------------------------------------------------


def test_plain_causal_layers_of_a_preallocated_cache_are_ours():
    model = hybrid()
    assert type(cache_of(model).layers[0]) is ExactCacheLayer
    assert type(cache_of(model, None).layers[0]) is DynamicLayer
    assert type(cache_of(model, offloading=True).layers[0]) is StaticLayer
    result = generate(model, tokens(1, 21), cache_implementation="static")
    assert type(result.past_key_values.layers[0]) is ExactCacheLayer
    assert "model.layers.0.self_attn: 50 tokens" in repr(result.past_key_values.layers[0])


def test_other_layers_stay_as_they_are():
    """A sliding window, and what the trial run took for no plain causal attention."""
    model = fe.prepare(build_language_model("gemma2"), {"default": SMALL, 0: "full"})
    assert type(cache_of(model).layers[0]) is StaticSlidingWindowLayer
    model = hybrid()
    full = model._flasheva_prepared.full
    full[0] = dataclasses.replace(full[0], reason="it computes something else")
    layer = cache_of(model).layers[0]
    assert type(layer) is StaticLayer
    expected = generate(model, tokens(2, 21))
    result = generate(model, tokens(2, 21), past_key_values=cache_of(model))
    assert torch.equal(result.sequences, expected.sequences)


def test_bytes_are_those_of_the_keys_and_values():
    model, rows, length = hybrid(), 3, 4096
    cache = cache_of(model, length, max_batch_size=rows)
    layer = cache.layers[0]
    held = sum(x.numel() * x.element_size() for x in layer.state)
    exact = 2 * rows * 2 * length * 8 * 4  # two heads of 8 channels, fp32
    assert exact <= held <= 1.02 * exact
    assert cache.nbytes() == held + sum(x.nbytes for x in cache.layers[1].state)


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [0, 1])
@pytest.mark.parametrize("build", [llama, gpt_neox])
def test_a_preallocated_cache_generates_what_a_growing_one_does(build, full):
    model, ids = hybrid(full, build), tokens(2, 21)
    expected = generate(model, ids, steps=40)
    result = generate(model, ids, steps=40, past_key_values=cache_of(model))
    assert torch.equal(result.sequences, expected.sequences)
    close(torch.stack(result.logits), torch.stack(expected.logits))
    assert type(result.past_key_values.layers[full]) is ExactCacheLayer
    assert result.past_key_values.layers[full].get_seq_length() == 60


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_capped_scores_and_sinks_in_the_softmax(name):
    model, ids = sharp(name), tokens(2, 60)
    layer = (cache := cache_of(model)).layers[1]
    assert type(layer) is ExactCacheLayer
    pieces = (21, 1, 1, 7, 30)
    close(feed(model, cache, ids, pieces), feed(model, cache_of(model, None), ids, pieces))


@pytest.mark.parametrize("masked", [None, "left", "gaps"])
@pytest.mark.parametrize("step", [1, 3, 17])
def test_tokens_may_come_in_any_pieces(step, masked):
    model, ids, mask = hybrid(), tokens(3, 72), None
    if masked:
        generator = torch.Generator().manual_seed(7)
        mask = torch.rand(3, 72, generator=generator) < (0.7 if masked == "gaps" else 2)
        mask[1, :13] = mask[2, :30] = False  # the last row begins after the prompt
        mask[0, 0] = True
    pieces = (21, *[step] * (51 // step))
    got, want = (feed(model, cache_of(model, n), ids, pieces, mask) for n in (ROOM, None))
    seen = torch.ones_like(got[..., 0], dtype=torch.bool) if mask is None else mask.cumsum(1) > 0
    close(got[seen], want[seen])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_that_of_the_models_own_attention(dtype):
    models = {d: hybrid().to(dtype).to(d) for d in (dtype, torch.float32, torch.float64)}
    ids, pieces = tokens(2, 60), (21, 1, 1, 7, *[1] * 30)
    got = feed(models[dtype], cache_of(models[dtype]), ids, pieces)
    assert_as_accurate_as_pytorch(
        [got], lambda d: [feed(models[d], cache_of(models[d], None), ids, pieces)], dtype
    )


def test_autocast_stores_what_the_attention_reads():
    model, ids, pieces = hybrid(build=gpt_neox), tokens(2, 40), (21, 1, 18)
    with torch.autocast("cpu", torch.bfloat16):
        got = feed(model, cache := cache_of(model), ids, pieces)
        want = feed(model, cache_of(model, None), ids, pieces)
    assert cache.layers[0].state.exact_k.dtype == torch.bfloat16
    exact = feed(model, cache_of(model, None), ids, pieces)
    assert (got - exact).abs().max() < 2 * (want - exact).abs().max()


def test_beams():
    model, ids = hybrid(), tokens(2, 15)
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 25}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)


def test_rows_are_reordered_repeated_and_selected():
    model, more, length = hybrid(), tokens(3, 5, seed=3), 26
    ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.bool)
    mask[1, :9] = False
    cache = cache_of(model)
    feed(model, cache, ids, [length], mask)
    changed = copy.deepcopy(cache)
    changed.batch_repeat_interleave(2)
    changed.batch_select_indices(torch.tensor([3, 0, 1]))
    before = [x.data_ptr() for x in changed.layers[0].state]
    changed.reorder_cache(torch.tensor([1, 0, 2]))
    assert [x.data_ptr() for x in changed.layers[0].state] == before
    rows = torch.tensor([0, 1, 0])
    both = functional.pad(mask, (0, 5), value=True)[rows]
    given = {
        "attention_mask": functional.pad(both, (0, ROOM - length - 5)).long(),
        "position_ids": (both.cumsum(1) - 1)[:, length:],
    }
    with torch.no_grad():
        got = model(more, past_key_values=changed, **given).logits
    want = feed(model, cache_of(model, None), torch.cat([ids[rows], more], 1), [length, 5], both)
    close(got, want[:, length:])


@pytest.mark.parametrize("how", ["prompt lookup", "itself", "chunks", "conversation", "copies"])
def test_ways_to_generate(how):
    model, ids = hybrid(), tokens(1, 7).repeat(1, 4)
    expected = generate(model, ids, steps=40).sequences
    cache = cache_of(model)
    if how == "conversation":
        first = model.generate(ids, past_key_values=cache, max_new_tokens=12, **GREEDY)
        assert torch.equal(first, expected[:, :40])
        result = model.generate(first, past_key_values=cache, max_new_tokens=28, **GREEDY)
    elif how == "copies":
        feed(model, cache, ids[:, :20], [20])
        for _ in "ab":
            result = generate(model, ids, steps=40, past_key_values=copy.deepcopy(cache)).sequences
        assert cache.get_seq_length() == 20
    else:
        cache.activate_past_recording()
        options = {
            "prompt lookup": {"prompt_lookup_num_tokens": 3},
            "itself": {"assistant_model": model},
            "chunks": {"prefill_chunk_size": 9},
        }[how]
        given = {"past_key_values": cache, "max_new_tokens": 40, **GREEDY, **options}
        result = model.generate(ids, **given)
    assert torch.equal(result, expected)


def test_what_was_rolled_back_never_was():
    """With padding in front and among the tokens that are forgotten."""
    model, ids = hybrid(), tokens(2, 80)
    mask = torch.rand(2, 80, generator=torch.Generator().manual_seed(7)) < 0.7
    mask[1, :33] = False  # begins among what is forgotten
    mask[:, 45:47] = True
    layer = (cache := cache_of(model)).layers[0]
    cache.activate_past_recording()
    feed(model, cache, ids, (30, 12, 3), mask)
    cache.crop(-13)
    assert layer.get_seq_length() == 32
    assert layer.state.start.tolist() == [0, 32]
    steps = tokens(2, 10, seed=9)
    valid = torch.ones(2, 42, dtype=torch.bool)
    valid[:, :32] = mask[:, :32]
    given = {
        "attention_mask": functional.pad(valid, (0, ROOM - 42)).long(),
        "position_ids": (valid.cumsum(1) - 1)[:, 32:],
    }
    with torch.no_grad():
        got = model(steps, past_key_values=cache, **given).logits
    whole = torch.cat([ids[:, :32], steps], 1)
    close(got, feed(model, cache_of(model, None), whole, (32, 10), valid)[:, 32:])
    cache.activate_past_recording()
    layer.crop(-42)
    assert layer.is_empty
    layer.crop(0)
    for count, what in ((-1, r"crop\(-1\) of 0 tokens"), (3, "is negative")):
        with pytest.raises(ConfigError, match=what):
            layer.crop(count)


def test_a_cache_that_was_reset_is_empty():
    model, ids = hybrid(), tokens(1, 21)
    cache = cache_of(model)
    first = generate(model, ids, past_key_values=cache)
    cache.reset()
    assert cache.layers[0].is_empty
    again = generate(model, ids, past_key_values=cache)
    assert torch.equal(again.sequences, first.sequences)


def test_a_saved_cache_keeps_its_kinds_of_layers(tmp_path):
    model = hybrid()
    cache = cache_of(model)
    generate(model, tokens(1, 21), past_key_values=cache, steps=5)
    cache.save(model, tmp_path / "ours")
    loaded = fe.FlashEvaCache.load(model, tmp_path / "ours").layers[0]
    assert type(loaded) is ExactCacheLayer
    assert (loaded.seen, loaded.is_empty, int(loaded.get_seq_length())) == (25, False, 25)
    own = cache_of(model, offloading=True)
    k = torch.randn(1, 2, 5, 8)
    own.layers[0].update(k, k)
    own.save(model, tmp_path / "own")
    again = fe.FlashEvaCache.load(model, tmp_path / "own")
    assert again.offloading
    assert type(again.layers[0]) is StaticLayer
    assert torch.equal(again.layers[0].keys, own.layers[0].keys)


# --- one step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_step_is_one_op_and_does_not_wait(masked, count):
    model = hybrid()
    cache = cache_of(model, max_batch_size=1)
    assert cache.is_compileable
    inputs = {"past_key_values": cache}
    if masked:
        inputs["attention_mask"] = torch.ones(1, ROOM, dtype=torch.long)
        inputs["attention_mask"][:, :3] = 0
    state = cache.layers[0].state
    before = [x.data_ptr() for x in state]
    with torch.no_grad():
        model(tokens(1, 30), position_ids=torch.arange(30)[None], **inputs)
        for start in range(30, 60, count):
            place = torch.arange(start, start + count)[None]
            with Calls() as calls:
                model(tokens(1, count, seed=start), position_ids=place, **inputs)
            assert calls.names["decode"] == 2
            assert not calls.names["_scaled_dot_product_flash_attention_for_cpu"]
    assert [x.data_ptr() for x in cache.layers[0].state] == before
    assert cache.get_seq_length() == 60


def test_prompt_and_steps_compile_to_one_graph_each():
    model = hybrid()
    cache, alike = (cache_of(model) for _ in range(2))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(model.forward, backend=backend, fullgraph=True)
    with torch.no_grad():
        for part in (tokens(1, 30), *tokens(1, 20, seed=4).split(1, 1)):
            got = step(part, past_key_values=cache).logits
            close(got, model(part, past_key_values=alike).logits)
    assert len(graphs) == 2


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_compiled_model_generates_the_same(inner):
    model = hybrid()
    expected = generate(model, tokens(2, 30), past_key_values=cache_of(model))
    compiled = hybrid()
    compiled.compile(backend="flasheva", options={"inner_backend": inner})
    result = generate(compiled, tokens(2, 30), past_key_values=cache_of(compiled))
    assert torch.equal(result.sequences, expected.sequences)
    close(torch.stack(result.logits), torch.stack(expected.logits))


# --- wrong use ------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [0, 1])
def test_more_tokens_than_there_is_room_for_are_refused(full):
    model = hybrid(full)
    cache = cache_of(model, 20)
    with pytest.raises(ConfigError, match="21 tokens in a cache of 20"):
        feed(model, cache, tokens(1, 21), [21])
    feed(model, cache, tokens(1, 18), [18])
    with pytest.raises(ConfigError, match="21 tokens in a cache of 20"):
        feed(model, cache, tokens(1, 3), [3])
    assert [layer.get_seq_length() for layer in cache.layers] == [18, 18]


def test_a_graph_that_goes_on_beyond_the_room_gives_nan():
    model, ids = hybrid(), tokens(2, 24)
    want = feed(model, cache_of(model, None), ids, (16, *[1] * 4))
    cache = cache_of(model, 20)
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        parts = [model(ids[:, :16], past_key_values=cache).logits]
        # The host does not see these steps.
        parts += [step(x, past_key_values=cache).logits for x in ids[:, 16:].split(1, 1)]
    got = torch.cat(parts, 1)
    close(got[:, :20], want)
    assert got[:, 20:].isnan().all()
    with pytest.raises(ConfigError, match=r"crop\(-3\) of 24 tokens in a cache of 20"):
        cache.layers[0].crop(-3)


@pytest.mark.parametrize("count", [1, 2])
def test_padding_takes_no_room(count):
    """Beyond the room the padded row goes on as it should until its own tokens need more."""
    mask, (q, k, v) = torch.ones(2, 28, dtype=torch.bool), torch.randn(3, 2, 2, 28, 8)
    mask[1, :3] = False
    layer = ExactCacheLayer("layer", 20)
    layer.append(k[:, :, :12], v[:, :, :12], mask)
    outs = []
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        for start in range(12, 28, count):
            new = tuple(x[:, :, start : start + count] for x in (q, k, v))
            outs.append(layer.attend(new, mask, 0.3, 0.0)[0])
    out = torch.cat(outs, 2)
    for row, (first, stop) in enumerate(((0, 20), (3, 23))):
        own = [x[row, :, first:stop] for x in (q, k, v)]
        want = functional.scaled_dot_product_attention(*own, scale=0.3, is_causal=True)
        close(out[row, :, : stop - 12], want[:, 12 - first :])
        assert out[row, :, stop - 12 :].isnan().all()


def test_wrong_use_is_refused():
    model = hybrid()
    k = torch.zeros(1, 2, 1, 8)
    with pytest.raises(ConfigError, match="updated outside of a prepared attention"):
        cache_of(model).layers[0].update(k, k)
    layer = cache_of(model).layers[0]
    with pytest.raises(ConfigError, match=f"a mask of 19 columns for a cache of {ROOM}"):
        layer.append(k, k, torch.ones(1, 19, dtype=torch.bool))
    with pytest.raises(ConfigError, match="packed documents"):
        layer.append(k, k, torch.ones(1, ROOM, dtype=torch.long))
    feed(model, cache := cache_of(model), tokens(1, 18), [18])
    logits = model(tokens(1, 2), past_key_values=cache).logits
    with pytest.raises(ConfigError, match="has no gradient"):
        logits.sum().backward()


def test_dropout_over_stored_tokens_is_refused():
    model = hybrid().train()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    cache = cache_of(model)
    model(tokens(1, 18), past_key_values=cache)
    with pytest.raises(ConfigError, match="no dropout"):
        model(tokens(1, 1), past_key_values=cache)
