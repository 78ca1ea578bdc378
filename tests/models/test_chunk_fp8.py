"""Caches whose FlashEVA layers store their chunk tokens in fp8."""

from __future__ import annotations

import copy

import pytest
import torch
from flasheva_compile.kernels.blocked import fp8
from torch._dynamo.testing import CompileCounter

import flasheva_compile as fe
from flasheva_compile.cache_ops import cache_options, new_state
from flasheva_compile.errors import ConfigError
from tests.models.test_generate import GREEDY, SMALL, generate, llama, perturb, tokens

LENGTHS = [None, 96]
HYBRID = {"default": {**SMALL, "chunk_rule": "evabyte"}, 0: "full"}
STORED = ("rfa_k", "rfa_v", "rfa_bias", "rfa_exponents")


def options_of(**changes):
    return cache_options(fe.EvaConfig(**{**SMALL, "chunk_rule": "mean", **changes}), 0.3)


def appended(qkv, parameters, mask, portions, options, *, fp8_chunks=True):
    """Append in portions, the first one without attending; return all results and the state."""
    state = new_state(*qkv[1:], qkv[1].shape[2] // 4, options, fp8_chunks=fp8_chunks)
    found, lo = [], 0
    for size in portions:
        part = slice(lo, lo + size)
        new = [x[:, :, part] for x in qkv]
        mine = None if mask is None else mask[:, part]
        if lo == 0:
            torch.ops.flasheva.cache_append(*new, parameters, mine, *state, **options)
        else:
            found.append(torch.ops.flasheva.decode(*new, parameters, mine, *state, **options)[0])
        lo += size
    return torch.cat(found, 2) if found else None, state


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the ops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["mean", "tangent", "evabyte", "eva"])
def test_steps_store_the_bits_that_one_call_does(rule, dtype):
    q, k, v = (normal(2, heads, 60, 16, seed=heads).to(dtype) for heads in (4, 2, 2))
    count = {"tangent": 1, "evabyte": 2}.get(rule, 0)
    parameters = [normal(2, 16, seed=9 + n).to(dtype) for n in range(count)]
    mask = torch.arange(60) >= torch.tensor([[0], [7]])
    call = ((q, k, v), parameters, mask)
    states = [
        appended(*call, portions, options_of(chunk_rule=rule))[1]
        for portions in ((60,), (1,) * 60, (5, 30, 1, 24))
    ]
    assert states[0].rfa_k.dtype == torch.uint8
    whole = (torch.tensor([60, 53]) // 4)[:, None] > torch.arange(15)
    whole = whole[:, None].expand(-1, 2, -1)
    for other in states[1:]:
        for name in STORED:
            stored, same = getattr(other, name), getattr(states[0], name)
            assert torch.equal(stored[whole], same[whole]), name
    plain = appended(*call, (60,), options_of(chunk_rule=rule), fp8_chunks=False)[1]
    codes, exponents = fp8.encode(plain.rfa_v)
    assert torch.equal(states[0].rfa_v[whole], codes[whole])
    assert torch.equal(states[0].rfa_exponents[whole][:, 1:], exponents[whole])


def test_what_fp8_can_say_is_what_was_pooled():
    """Means of four small integers have three bits: results are the same bits."""
    qkv = [(normal(2, heads, 60, 16, seed=heads) * 2).round().clamp(-2, 2) for heads in (4, 2, 2)]
    call = (qkv, [], None, (20, *[1] * 10, 30), options_of())
    got, state = appended(*call)
    want, _ = appended(*call, fp8_chunks=False)
    assert state.rfa_k[:, :, :15].any()
    assert torch.equal(got, want)


def test_what_fp8_cannot_say_is_off_by_a_sixteenth():
    """A value by a sixteenth of itself, a weight by what a sixteenth of its key can do."""
    q, k, v = (normal(1, heads, 80, 16, seed=heads) for heads in (2, 1, 1))
    call = ((q, k, v), [], None, (60, 20), options_of())
    got, state = appended(*call)
    want, plain = appended(*call, fp8_chunks=False)
    error = (got - want).abs()
    largest = (plain.rfa_k.abs() / 16 + plain.rfa_k.abs().amax(-1, keepdim=True) * 2**-17)[0, 0]
    score = 0.3 * (q[0].abs() @ largest.mT).amax(-1)[:, 60:, None]
    values = torch.maximum(v.abs().amax(), plain.rfa_v.abs().amax())
    bound = values * (1 / 16 + 2**-17 + torch.expm1(2 * score))
    assert (error[0] <= bound).all()
    assert error.amax() > 1e-3
    assert state.rfa_k.element_size() == 1


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_chunk_token_that_is_not_finite_is_loud(bad):
    qkv = [normal(1, 1, 40, 8, seed=n) for n in range(3)]
    qkv[2][0, 0, 6, 2] = bad
    out, state = appended(qkv, [], None, (1,) * 40, options_of())
    assert state.rfa_exponents[0, 0, :3].tolist()[1][1] == -128
    assert out[0, 0, -1].isnan().all()


# --- the cache ------------------------------------------------------------------------------------


def cache_of(model, length=None, **options):
    return fe.FlashEvaCache.for_model(model, max_cache_len=length, chunk_tokens="fp8", **options)


def states_of(cache):
    return [layer.state for layer in cache.layers if hasattr(layer, "fp8_chunks")]


@pytest.fixture(name="model")
def _model():
    """Return a model in fp64: what rounds to another fp8 number is no accident of its products."""
    model = fe.prepare(llama(), HYBRID).double()
    perturb(model)
    return model


def test_generation_is_near_and_not_the_same(model):
    ids = tokens(2, 31)
    grown, roomy = (
        generate(model, ids, past_key_values=cache_of(model, length)) for length in LENGTHS
    )
    assert torch.equal(grown.sequences, roomy.sequences)
    plain = fe.FlashEvaCache.for_model(model)
    with torch.no_grad():
        exact = model(ids, past_key_values=plain).logits[:, -1]
        assert torch.equal(grown.logits[0], exact.float())  # a prompt reads what was pooled
        first = model(grown.sequences[:, 31:32], past_key_values=plain).logits[:, -1]
    error = (grown.logits[1] - first).abs().amax() / first.std()
    assert 1e-4 < error < 0.5
    torch.testing.assert_close(torch.stack(grown.logits), torch.stack(roomy.logits))


@pytest.mark.parametrize("length", LENGTHS)
def test_any_portions_of_tokens_are_the_same(model, length):
    """From the first call on that attends to the cache; a padded row is the row alone."""
    ids, mask = tokens(2, 90), torch.ones(2, 90, dtype=torch.long)
    mask[1, :6] = 0
    found = []
    for sizes in ((20, 70), (20, *[1] * 70), (20, 33, 1, 36)):
        cache, stop, logits = cache_of(model, length), 0, []
        for size in sizes:
            stop += size
            given = mask[:, :stop] if length is None else torch.ones(2, length, dtype=torch.long)
            given[:, : min(stop, 90)] = mask[:, :stop]
            part = slice(stop - size, stop)
            places = (mask.cumsum(1) - 1).clamp_min(0)[:, part]
            inputs = {"attention_mask": given, "position_ids": places}
            with torch.no_grad():
                logits.append(model(ids[:, part], past_key_values=cache, **inputs).logits)
        found.append(torch.cat(logits, 1)[:, 20:])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", LENGTHS)
def test_rows_copies_files_and_rollbacks(model, length, tmp_path):
    cache = cache_of(model, length)
    cache.activate_past_recording()
    with torch.no_grad():
        model(tokens(2, 30), past_key_values=cache)
    addresses = [x.data_ptr() for state in states_of(cache) for x in state]
    twin = copy.deepcopy(cache)
    cache.save(model, tmp_path / "cache")
    read = fe.FlashEvaCache.load(model, tmp_path / "cache")
    assert repr(read.layers[1]) == repr(cache.layers[1])
    assert "fp8 chunk tokens" in repr(read.layers[1])
    with torch.no_grad():
        drafted = model(tokens(2, 9, seed=4), past_key_values=cache).logits
        cache.crop(-9)
        results = [
            model(tokens(2, 20, seed=5), past_key_values=one).logits for one in (cache, twin, read)
        ]
        cache.reorder_cache(torch.tensor([1, 0]))
        twin.reorder_cache(torch.tensor([1, 0]))
        results += [model(tokens(2, 3), past_key_values=one).logits for one in (cache, twin)]
        read.batch_select_indices(torch.tensor([1, 0]))
        results.append(model(tokens(2, 3), past_key_values=read).logits)
    assert drafted.isfinite().all()
    for other in (*results[1:3],):
        torch.testing.assert_close(other, results[0])
    for other in results[4:]:
        torch.testing.assert_close(other, results[3])
    if length is not None:  # captured graphs know the tensors
        assert [x.data_ptr() for state in states_of(cache) for x in state] == addresses
    cache.reset()
    fresh = cache_of(model, length)
    with torch.no_grad():
        again = [model(tokens(2, 30), past_key_values=one) for one in (cache, fresh)]
        again = [model(tokens(2, 5), past_key_values=one).logits for one in (cache, fresh)]
    assert torch.equal(*again)


def test_a_cache_that_has_grown_is_one_that_had_room(model):
    parts, results = [tokens(1, count, seed=count) for count in (20, 330, 1)], []
    for length in (None, 400):
        cache = cache_of(model, length)
        with torch.no_grad():
            logits = [model(part, past_key_values=cache).logits for part in parts]
        results.append(torch.cat(logits, 1))
    torch.testing.assert_close(*results)


def test_beams_and_lookups_go_through(model):
    options = {**GREEDY, "num_beams": 3, "max_new_tokens": 25}
    beams = [
        model.generate(tokens(2, 15), past_key_values=cache_of(model, length), **options)
        for length in LENGTHS
    ]
    assert torch.equal(*beams)
    ids, looked = tokens(1, 7).repeat(1, 5), cache_of(model)
    looked.activate_past_recording()
    plain = generate(model, ids, past_key_values=cache_of(model))
    found = generate(model, ids, past_key_values=looked, prompt_lookup_num_tokens=4)
    assert torch.equal(found.sequences, plain.sequences)


def test_bytes_are_those_of_the_numbers_and_two_exponents():
    model, sizes = fe.prepare(llama(1).bfloat16(), SMALL), {}
    for chunk_tokens in (None, "fp8"):
        cache = fe.FlashEvaCache.for_model(
            model, max_cache_len=4000, max_batch_size=1, chunk_tokens=chunk_tokens
        )
        (state,) = states_of(cache)
        sizes[chunk_tokens] = cache.nbytes()
    chunks, vectors = state.rfa_k.shape[2], 2 * state.rfa_k.shape[2]  # of two heads
    assert chunks > 990
    assert sizes[None] - sizes["fp8"] == vectors * (2 * 8 - 2)


def test_prompt_and_steps_compile_to_one_graph_each(model):
    cache, alike = (cache_of(model, 96) for _ in range(2))
    graphs = CompileCounter()
    torch._dynamo.reset()
    step = torch.compile(model.forward, backend=graphs, fullgraph=True)
    with torch.no_grad():
        for part in (tokens(1, 30), *tokens(1, 20, seed=4).split(1, 1)):
            got = step(part, past_key_values=cache).logits
            want = model(part, past_key_values=alike).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert graphs.frame_count == 2


# --- wrong use ------------------------------------------------------------------------------------


def test_wrong_use_is_refused(model):
    with pytest.raises(ConfigError, match="chunk_tokens: must be one of \"fp8\", got 'int8'"):
        fe.FlashEvaCache.for_model(model, chunk_tokens="int8")
    retrieving = fe.prepare(llama(), {"default": SMALL, 1: {**SMALL, "retrieve_chunks": 2}})
    with pytest.raises(ConfigError, match=r"chunk_tokens: 'fp8', but .*\.1\..* retrieves"):
        cache_of(retrieving)
