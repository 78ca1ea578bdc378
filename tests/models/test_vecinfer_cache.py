"""Prepared models whose full layers are cached in few bits."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import flasheva_compile as fe
from flasheva_compile import vecinfer_ops
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.vecinfer_layer import VecInferLayer
from flasheva_compile.quantization.formats import KvStorage
from flasheva_compile.quantization.learn import LearningOptions
from tests.models.test_generate import SMALL, generate, gpt_neox, llama, perturb, tokens

LENGTHS = [None, 128]
# Codes begin early, so that short texts have many.
FEW = {"sink_tokens": 2, "exact_tokens": 3, "block_tokens": 4}
EVERYTHING = KvStorage(format="vq-1.5bit", **FEW)  # one code per head of 8 channels, of 4096
COARSE = KvStorage(format="vq-1bit", **FEW)
FLOAT8 = KvStorage(format="fp8", **FEW)
WORDS = KvStorage(format="tc-4bit", **FEW)
CODED = [pytest.param(COARSE, id="books"), pytest.param(WORDS, id="words")]


def hybrid(full=0, build=llama):
    model = fe.prepare(build(), {"default": SMALL, full: "full"})
    perturb(model)
    return model


def cache_of(model, storage, books=None, length=None):
    return fe.FlashEvaCache.for_model(
        model, max_cache_len=length, full_layers=storage, codebooks=books
    )


def learned(model, ids, storage, **inputs):
    return fe.calibrate_kv(model, [{"input_ids": ids, **inputs}], storage.format)


def close(a, b):
    return torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [0, 1])
@pytest.mark.parametrize("build", [llama, gpt_neox])
@pytest.mark.parametrize("length", LENGTHS)
def test_codewords_of_every_token_generate_what_exact_layers_do(build, full, length):
    model, ids = hybrid(full, build), tokens(1, 21)
    expected = generate(model, ids)
    books = learned(model, expected.sequences, EVERYTHING)
    result = generate(model, ids, past_key_values=cache_of(model, EVERYTHING, books, length))
    assert torch.equal(result.sequences, expected.sequences)
    close(torch.stack(result.logits), torch.stack(expected.logits))
    layer = result.past_key_values.layers[full]
    assert isinstance(layer, VecInferLayer)
    assert layer.get_seq_length() == 50


def test_coarse_codes_are_seen():
    """The test above compares something: few codewords give other logits."""
    model, ids = hybrid(), tokens(1, 21)
    expected = generate(model, ids)
    books = fe.calibrate_kv(
        model, [tokens(1, 40, seed=5)], "vq-1bit", options=LearningOptions(iterations=1)
    )
    result = generate(model, ids, past_key_values=cache_of(model, COARSE, books))
    assert torch.equal(result.logits[0], expected.logits[0])  # the prompt attends in full precision
    difference = torch.stack(result.logits)[1:8] - torch.stack(expected.logits)[1:8]
    assert difference.abs().max() > 1e-2


@pytest.fixture(scope="module")
def coarse():
    """A hybrid model and codebooks of text that it is not tested on."""
    model = hybrid()
    return model, learned(model, tokens(2, 60, seed=5), COARSE)


@pytest.fixture(scope="module")
def books_of(coarse):
    """What each storage of the model of ``coarse`` needs."""
    model, books = coarse
    words = learned(model, tokens(2, 60, seed=5), WORDS)
    return {COARSE.format: books, FLOAT8.format: None, WORDS.format: words}


@pytest.mark.parametrize("storage", [COARSE, FLOAT8, WORDS])
@pytest.mark.parametrize("length", LENGTHS)
def test_left_padded_rows_are_the_rows_alone(coarse, books_of, storage, length):
    model, books = coarse[0], books_of[storage.format]
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, :11] = 0
    cache = cache_of(model, storage, books, length)
    both = generate(model, ids, attention_mask=mask, past_key_values=cache)
    for row, columns in ((0, slice(0, None)), (1, slice(11, None))):
        cache = cache_of(model, storage, books, length)
        alone = generate(model, ids[row : row + 1, columns], past_key_values=cache)
        assert torch.equal(alone.sequences[0], both.sequences[row, columns])
        close(torch.stack(alone.logits)[:, 0], torch.stack(both.logits)[:, row])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("step", [1, 3, 17])
def test_tokens_may_come_in_any_pieces(coarse, length, step):
    model, books = coarse
    ids = tokens(2, 70)
    alone, together = (cache_of(model, COARSE, books, length) for _ in range(2))
    logits = {}
    for name, cache, size in (("alone", alone, 1), ("together", together, step)):
        parts = [ids[:, :19], *ids[:, 19:].split(size, 1)]
        with torch.no_grad():
            outs = [model(part, past_key_values=cache).logits for part in parts]
        logits[name] = torch.cat(outs, 1)
    close(logits["together"], logits["alone"])


def test_beams_are_those_of_exact_layers():
    model, ids = hybrid(), tokens(2, 21)
    options = {"num_beams": 3, "steps": 20}
    expected = generate(model, ids, **options)
    # Codewords of whatever the beams may hold: keys of this layer depend on token and position.
    every = torch.arange(97)[:, None].expand(-1, 41)
    options_of_learning = LearningOptions(per_head=True)  # 97 * 41 keys a head, of 4096
    books = fe.calibrate_kv(model, every.split(1), "vq-1.5bit", options=options_of_learning)
    storage = KvStorage(format="vq-1.5bit", **{**FEW, "exact_tokens": 8})
    result = generate(model, ids, past_key_values=cache_of(model, storage, books), **options)
    assert torch.equal(result.sequences, expected.sequences)


@pytest.mark.parametrize("storage", CODED)
def test_a_beam_has_the_score_that_its_tokens_have_one_by_one(coarse, books_of, storage):
    model, ids = coarse[0], tokens(2, 21)
    caches = [cache_of(model, storage, books_of[storage.format]) for _ in range(2)]
    options = {"num_beams": 3, "length_penalty": 0.0, "output_scores": True}
    result = generate(model, ids, past_key_values=caches[0], **options)
    text = result.sequences
    with torch.no_grad():
        parts = (text[:, :21], *text[:, 21:-1].split(1, 1))
        last = [model(part, past_key_values=caches[1]).logits[:, -1] for part in parts]
    found = torch.stack(last, 1).log_softmax(-1).gather(2, text[:, 21:, None])
    close(found.sum((1, 2)), result.sequences_scores)


@pytest.mark.parametrize("storage", CODED)
@pytest.mark.parametrize("length", LENGTHS)
def test_rows_are_reordered_repeated_and_selected(coarse, books_of, storage, length):
    model, books = coarse[0], books_of[storage.format]
    ids, more = tokens(2, 40), tokens(3, 5, seed=3)
    cache = cache_of(model, storage, books, length)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        changed = copy.deepcopy(cache)
        changed.batch_repeat_interleave(2)
        changed.batch_select_indices(torch.tensor([3, 0, 1]))
        changed.reorder_cache(torch.tensor([1, 0, 2]))
        together = model(more, past_key_values=changed).logits
        for row, source in enumerate([0, 1, 0]):
            alone = cache_of(model, storage, books, length)
            model(ids[source : source + 1], past_key_values=alone)
            close(model(more[row : row + 1], past_key_values=alone).logits[0], together[row])


@pytest.mark.parametrize("storage", CODED)
@pytest.mark.parametrize("length", LENGTHS)
def test_prompt_lookup_rolls_back(coarse, books_of, storage, length):
    model, books = coarse[0], books_of[storage.format]
    ids = tokens(1, 7).repeat(1, 5)
    plain = generate(model, ids, past_key_values=cache_of(model, storage, books, length))
    cache = cache_of(model, storage, books, length)
    cache.activate_past_recording()
    looked = generate(model, ids, past_key_values=cache, prompt_lookup_num_tokens=4)
    assert torch.equal(looked.sequences, plain.sequences)


@pytest.mark.parametrize("storage", CODED)
def test_a_rollback_into_codes_is_refused(coarse, books_of, storage):
    model, books = coarse[0], books_of[storage.format]
    cache = cache_of(model, storage, books)
    cache.activate_past_recording()
    layer = cache.layers[0]
    with torch.no_grad():
        model(tokens(1, 80), past_key_values=cache)
    with pytest.raises(ConfigError, match=r"crop\(-60\) of 80 tokens: what became codes"):
        layer.crop(-60)
    with pytest.raises(ConfigError, match=r"crop\(3\): a number of tokens to remove is negative"):
        layer.crop(3)
    layer.crop(-32)
    assert layer.get_seq_length() == 48


@pytest.mark.parametrize(("full", "removed"), [(0, -3), (1, -60)])
def test_a_rollback_that_the_second_layer_refuses_changes_none(full, removed):
    cache = cache_of(model := hybrid(full), FLOAT8)
    if full:
        cache.activate_past_recording()
    model(tokens(2, 90), past_key_values=cache)
    with pytest.raises(ConfigError, match="0 tokens recorded" if full == 0 else "became codes"):
        cache.crop(removed)
    assert [layer.get_seq_length() for layer in cache.layers] == [90, 90]


@pytest.mark.parametrize("storage", CODED)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_cache_that_was_reset_is_empty(coarse, books_of, storage, length):
    model, books = coarse[0], books_of[storage.format]
    cache = cache_of(model, storage, books, length)
    first = generate(model, tokens(1, 30), past_key_values=cache)
    cache.reset()
    again = generate(model, tokens(1, 30), past_key_values=cache)
    assert torch.equal(again.sequences, first.sequences)


def test_a_quantised_layer_is_smaller():
    model = hybrid()
    books = learned(model, tokens(2, 60), KvStorage(format="vq-2bit"))
    sizes = {}
    for storage in (None, "fp8", "vq-2bit"):
        given = None if storage in (None, "fp8") else books
        cache = cache_of(model, storage, given)
        with torch.no_grad():
            model(tokens(1, 2000), past_key_values=cache)
            assert cache.layers[1].state is not None
        own = cache.layers[0]
        tensors = [own.keys, own.values] if storage is None else own.state
        sizes[storage] = sum(x.numel() * x.element_size() for x in tensors)
        assert cache.nbytes() >= sizes[storage]
    exact = (16 + 128 + 128 + 32) * 2 * 2 * 8 * 4  # sinks and ring, two heads of 8 channels, fp32
    room = 2000 + 256 - 16
    assert sizes["fp8"] == exact + room * 2 * 2 * 9 + 16
    assert sizes["vq-2bit"] == exact + room * 2 * 2 * 2 + 16


def test_tables_give_the_tokens_that_decoding_does(coarse):
    model, books = coarse
    table = KvStorage(format="vq-1bit", lookup=True, **FEW)
    by_table, by_decoding = (
        generate(model, tokens(1, 30), past_key_values=cache_of(model, storage, books))
        for storage in (table, COARSE)
    )
    assert torch.equal(by_table.sequences, by_decoding.sequences)
    close(torch.stack(by_table.logits), torch.stack(by_decoding.logits))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_compiled_model_generates_the_same(coarse, length):
    model, books = coarse
    expected = generate(
        model, tokens(1, 30), past_key_values=cache_of(model, COARSE, books, length)
    )
    compiled = hybrid()
    compiled.compile(backend="flasheva", options={"inner_backend": "aot_eager"})
    cache = cache_of(compiled, COARSE, books, length)
    result = generate(compiled, tokens(1, 30), past_key_values=cache)
    close(torch.stack(result.logits), torch.stack(expected.logits))


# --- one step -------------------------------------------------------------------------------------

# What makes the host wait for a device, or a shape depend on numbers.
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")


class Calls(TorchDispatchMode):
    """Counts the ops that run, and refuses those that wait for the device."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(SYNCHRONISING), f"{func} waits for the device"
        self.names[name] += 1
        return func(*args, **(kwargs or {}))


def addresses(cache):
    layer = cache.layers[0]
    return [x.data_ptr() for x in (*layer.state, layer.recent, layer.columns, *layer.books)]


@pytest.mark.parametrize("storage", [COARSE, FLOAT8, WORDS])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_step_is_one_op_and_does_not_wait(coarse, books_of, storage, masked, count):
    model = coarse[0]
    cache = cache_of(model, storage, books_of[storage.format], 128)
    assert cache.is_compileable
    # Every column that there is room for, as generate has it; else transformers asks for lengths.
    inputs = {"past_key_values": cache}
    if masked:
        inputs["attention_mask"] = torch.ones(1, 128, dtype=torch.long)
        inputs["attention_mask"][:, :3] = 0
    with torch.no_grad():
        model(tokens(1, 30), position_ids=torch.arange(30)[None], **inputs)
        before = addresses(cache)
        for start in range(30, 60, count):
            place = torch.arange(start, start + count)[None]
            with Calls() as calls:
                model(tokens(1, count, seed=start), position_ids=place, **inputs)
            assert calls.names["vecinfer_decode"] == 1
    assert addresses(cache) == before
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("storage", [COARSE, FLOAT8, WORDS])
def test_prompt_and_steps_compile_to_one_graph_each(coarse, books_of, storage):
    model, books = coarse[0], books_of[storage.format]
    cache, alike = (cache_of(model, storage, books, 128) for _ in range(2))
    graphs = CompileCounter()
    torch._dynamo.reset()
    step = torch.compile(model.forward, backend=graphs, fullgraph=True)
    with torch.no_grad():
        for part in (tokens(1, 30), *tokens(1, 20, seed=4).split(1, 1)):
            got = step(part, past_key_values=cache).logits
            close(got, model(part, past_key_values=alike).logits)
    assert graphs.frame_count == 2


def test_codecs_are_made_once_and_go_with_their_books(coarse):
    model, books = coarse
    made = mock.Mock(side_effect=vecinfer_ops.codec_of)
    gc.collect()
    before = len(vecinfer_ops._codecs)
    own = copy.deepcopy(books)
    cache = cache_of(model, COARSE, own)
    with mock.patch.object(vecinfer_ops, "codec_of", made), torch.no_grad():
        for part in (tokens(1, 30), *tokens(1, 5).split(1, 1)):
            model(part, past_key_values=cache)
    assert made.call_count == 1
    assert len(vecinfer_ops._codecs) == before + 1
    del cache, own
    gc.collect()
    assert len(vecinfer_ops._codecs) == before


def test_books_that_share_a_scale_are_told_apart(coarse):
    _, books = coarse
    layer = books.layers[0]
    sizes, options = (layer.scale.shape[1],) * 2, {"lookup": False}
    options |= {"rotate_keys": layer.rotate_keys, "rotate_values": layer.rotate_values}
    form = fe.quantization.formats.kv_format("vq-1bit")
    first = [layer.scale, layer.keys, layer.values, layer.order, layer.offset]
    second = [layer.scale, layer.keys + 1, *first[2:]]
    codecs = [vecinfer_ops._codec(own, sizes, form, options) for own in (first, second, first)]
    assert codecs[0] is codecs[2]
    assert torch.equal(codecs[1].codebooks.keys, layer.keys + 1)


@pytest.mark.parametrize("storage", CODED)
@pytest.mark.parametrize("length", LENGTHS)
def test_what_was_rolled_back_never_was(coarse, books_of, storage, length):
    """With padding among the last columns, twice in a row, across the end of the ring."""
    model, books = coarse[0], books_of[storage.format]
    generator = torch.Generator().manual_seed(7)
    ids, mask = tokens(2, 110), torch.rand(2, 110, generator=generator) < 0.7
    mask[:, [0, -1]] = True

    def run(cache, part):
        columns = mask if length is None else torch.nn.functional.pad(mask, (0, length - 110))
        columns = columns[:, : part.stop] if length is None else columns
        places = (mask.cumsum(1) - 1).clamp_min(0)[:, part]
        given = {"attention_mask": columns.long(), "position_ids": places}
        with torch.no_grad():
            return model(ids[:, part], past_key_values=cache, **given).logits

    cache, plain = (cache_of(model, storage, books, length) for _ in range(2))
    cache.activate_past_recording()
    for c in (cache, plain):
        run(c, slice(0, 50))
    layer = cache.layers[0]
    for start, drafted, kept in ((50, 20, 3), (53, 25, 14), (67, 30, 20), (87, 6, 5)):
        run(cache, slice(start, start + drafted))
        cache.crop(-(drafted - kept))
        assert layer.get_seq_length() == start + kept
        for column in range(start, start + kept):
            run(plain, slice(column, column + 1))
    assert torch.equal(layer.state.length, plain.layers[0].state.length)
    seen = mask[:, 92:].any(1)  # a row without a token attends to nothing new
    close(run(cache, slice(92, 110))[seen], run(plain, slice(92, 110))[seen])
