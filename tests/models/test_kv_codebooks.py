"""What codebooks are learned from, where they lie, and which layers they are for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from transformers.cache_utils import DynamicCache, DynamicLayer

import flasheva_compile as fe
from flasheva_compile.adaptation.kv_tokens import attention_received
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.prepare import report_of
from flasheva_compile.generation.vecinfer_layer import VecInferLayer
from flasheva_compile.quantization.codebooks import KvCodebooks
from flasheva_compile.quantization.formats import FORMATS, KvStorage
from flasheva_compile.quantization.learn import LearningOptions
from flasheva_compile.quantization.transform_coding import LayerTransforms
from tests.models.test_generate import SMALL, generate, llama, perturb, tokens
from tests.models.test_vecinfer_cache import COARSE, cache_of, close, hybrid, learned

# --- layers that say themselves how they are stored -----------------------------------------------


@pytest.mark.parametrize("kv", ["vq-2bit", "tc-4bit"])
def test_generation_stores_layers_as_their_configuration_says(tmp_path, kv):
    """With codebooks that lie beside the model, and without naming them again."""
    ids = tokens(1, 300)  # the first of them are read as codes
    asked = {"attention": "full", "kv": kv}
    model = fe.prepare(llama(), {"default": SMALL, 0: asked})
    perturb(model)
    with pytest.raises(ConfigError, match=f"codebooks: '{kv}' needs them"):
        generate(model, ids)
    books = fe.calibrate_kv(model, [ids])  # in the format that the layer asks for
    expected = generate(model, ids, past_key_values=cache_of(model, None, books))
    model.save_pretrained(tmp_path)
    books.save(tmp_path / "kv_codebooks.safetensors")
    loaded = fe.from_pretrained(tmp_path)
    growing = generate(loaded, ids)
    assert torch.equal(growing.sequences, expected.sequences)
    close(torch.stack(growing.logits), torch.stack(expected.logits))
    layer = growing.past_key_values.layers[0]
    assert isinstance(layer, VecInferLayer)
    assert layer.storage == KvStorage(format=kv)
    static = generate(loaded, ids, cache_implementation="static")
    assert torch.equal(static.sequences, growing.sequences)
    assert isinstance(static.past_key_values.layers[0], VecInferLayer)
    assert static.past_key_values.is_compileable
    exact = fe.FlashEvaCache.for_model(loaded, full_layers="exact").layers[0]
    assert not isinstance(exact, VecInferLayer)
    fp8 = fe.FlashEvaCache.for_model(loaded, full_layers="fp8").layers[0]
    assert fp8.storage.format == "fp8"


def test_codebooks_of_other_weights_beside_a_model_are_refused(tmp_path):
    model = fe.prepare(llama(), {"default": SMALL, 0: {"attention": "full", "kv": "vq-1bit"}})
    fe.calibrate_kv(model, [tokens(1, 60)], "vq-1bit").save(tmp_path / "kv_codebooks.safetensors")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="were learned from another model, or other weights"):
        fe.FlashEvaCache.for_model(fe.from_pretrained(tmp_path))


def test_layers_may_differ():
    fp8, codes = ({"attention": "full", "kv": kv} for kv in ("fp8", "vq-1bit"))
    model = llama(layers=4)
    fe.prepare(model, {"default": SMALL, 0: fp8, 1: "full", 2: codes})
    books = fe.calibrate_kv(model, [tokens(1, 60)], "vq-1bit", layers=[2])
    cache = fe.FlashEvaCache.for_model(model, codebooks=books)
    assert [getattr(getattr(x, "storage", None), "format", "") for x in cache.layers] == [
        "fp8",
        "",
        "vq-1bit",
        "",
    ]


MIXED = {0: "tc-4bit", 1: "fp8", 2: "vq-2bit"}


def test_layers_may_have_codes_of_different_formats(tmp_path):
    """Each layer's codebooks are those that it has where all layers have its format."""
    model = llama(layers=4)
    layers = {index: {"attention": "full", "kv": kv} for index, kv in MIXED.items()}
    fe.prepare(model, {"default": SMALL, **layers})
    books = fe.calibrate_kv(model, [tokens(1, 300)])
    assert books.formats == {0: "tc-4bit", 2: "vq-2bit"}
    assert "tc-4bit codebooks of 1 layers and vq-2bit codebooks of 1 layers, 300" in str(books)
    for index, name in books.formats.items():
        alone = fe.calibrate_kv(model, [tokens(1, 300)], name, layers=[index]).layers[index]
        for got, want in zip(
            books.layers[index].tensors().values(), alone.tensors().values(), strict=True
        ):
            assert torch.equal(got, want)
    books.save(tmp_path / "books.safetensors")
    cache = fe.FlashEvaCache.for_model(model, codebooks=tmp_path / "books.safetensors")
    got = [getattr(getattr(x, "storage", None), "format", "") for x in cache.layers]
    assert got == ["tc-4bit", "fp8", "vq-2bit", ""]
    ids = tokens(1, 200)
    whole = generate(model, ids, past_key_values=cache).sequences
    assert whole.shape[1] > 200
    swapped = {0: "vq-2bit", 2: "tc-4bit"}
    wrong = fe.calibrate_kv(model, [tokens(1, 60)], swapped)
    with pytest.raises(ConfigError, match="'vq-2bit', not 'tc-4bit', for layer 0 of the cache"):
        fe.FlashEvaCache.for_model(model, codebooks=wrong)


def test_all_layers_may_stay_full_if_some_are_stored_in_few_bits(tmp_path):
    """Nothing is approximated but old keys and values; with nothing to do there is an error."""
    model, ids = llama(), tokens(2, 200)
    with torch.no_grad():
        exact = model(ids).logits
    with pytest.raises(ConfigError, match="can be converted: the configuration leaves it full"):
        fe.prepare(model, {"default": "full"})
    fe.prepare(model, {"default": {"attention": "full", "kv": "tc-4bit"}, 1: "full"})
    assert "its cache in 'tc-4bit'" in str(report_of(model))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, exact)
    books = fe.calibrate_kv(model, [ids])
    assert list(books.layers) == [0]
    model.save_pretrained(tmp_path)
    books.save(tmp_path / "kv_codebooks.safetensors")
    loaded = fe.from_pretrained(tmp_path)
    growing = generate(loaded, ids)
    kinds = [type(layer) for layer in growing.past_key_values.layers]
    assert kinds == [VecInferLayer, DynamicLayer]
    static = generate(loaded, ids, cache_implementation="static")
    assert torch.equal(static.sequences, growing.sequences)
    with pytest.raises(ConfigError, match="output_attentions: a prepared model has none"):
        loaded(ids, output_attentions=True)
    with pytest.raises(ConfigError, match="all its attentions stay full"):
        fe.calibrate(loaded, [ids])
    with pytest.raises(ConfigError, match="chunk_tokens: no layer has chunk tokens"):
        fe.FlashEvaCache.for_model(loaded, chunk_tokens="fp8")
    fe.revert(loaded)
    assert isinstance(generate(loaded, ids).past_key_values.layers[0], DynamicLayer)


# --- calibration ----------------------------------------------------------------------------------


def test_calibration_sees_what_the_cache_holds():
    model, ids = hybrid(), tokens(1, 30)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    options = LearningOptions.paper()
    books = fe.calibrate_kv(model, [ids[:, :10], ids], "vq-1bit", options=options)
    assert list(books.layers) == [0]
    assert books.tokens == 40
    largest = cache.layers[0].keys[0].abs().amax(1)
    torch.testing.assert_close(books.layers[0].scale, largest.sqrt())


def test_tokens_count_by_the_attention_of_queries_far_behind_them():
    """Against weights that a whole matrix of scores gives, with padding and softcap."""
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(2, 2, 3, 200, 8, generator=generator),
        torch.randn(2, 2, 200, 8, generator=generator),
    )
    valid = torch.ones(2, 200, dtype=torch.bool)
    valid[1, :17] = False
    got = attention_received(q, k, valid, 0.7, 5.0)
    expected = torch.zeros(2, 2, 200)
    for row, first in ((0, 0), (1, 17)):
        scores = 5 * torch.tanh(0.7 * q[row, :, :, first:] @ k[row, :, None, first:].mT / 5)
        place = torch.arange(200 - first)
        weights = scores.masked_fill(place[:, None] < place, -torch.inf).softmax(-1)
        coded = (place[:, None] - place >= 128) & (place >= 16)
        expected[row, :, first:] = (weights * coded).sum((1, 2))
    torch.testing.assert_close(got, expected)
    assert (got[:, :, :16] == 0).all()
    assert got[0, :, 16:72].gt(0).all()


def test_padding_is_not_learned_from():
    model, ids = hybrid(), tokens(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[:, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = learned(model, ids, COARSE, attention_mask=mask, position_ids=positions)
    alone = learned(model, ids[:, 9:], COARSE)
    assert padded.tokens == alone.tokens == 42
    close(padded.layers[0].scale, alone.layers[0].scale)
    for name in ("keys", "values"):
        got, want = (getattr(books.layers[0], name) for books in (padded, alone))
        close(got.sort(1).values, want.sort(1).values)


def test_a_model_is_calibrated_before_or_after_it_is_prepared():
    model, ids = llama(), tokens(2, 40)
    before = fe.calibrate_kv(model, [ids], "vq-2bit")
    assert list(before.layers) == [0, 1]
    fe.prepare(model, {"default": SMALL, 0: "full"})
    after = fe.calibrate_kv(model, [ids], "vq-2bit")
    assert torch.equal(before.layers[0].keys, after.layers[0].keys)
    assert cache_of(model, "vq-2bit", before).layers[0].path == "model.layers.0.self_attn"


def test_calibration_is_repeatable_and_samples_all_batches():
    model, ids = llama(), tokens(40, 120)
    one, two = (fe.calibrate_kv(model, ids.split(8), "vq-1bit", layers=[1]) for _ in range(2))
    assert torch.equal(one.layers[1].keys, two.layers[1].keys)
    assert one.tokens == 4800
    head = fe.calibrate_kv(model, ids[:8].split(8), "vq-1bit", layers=[1])
    assert not torch.equal(one.layers[1].keys, head.layers[1].keys)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"format": "vq-3bit"}, "format: 'vq-3bit' is not one of 'vq-4bit'"),
        ({"format": {0: "vq-2bit", 1: "fp8"}}, "format: 'fp8' is not one of 'vq-4bit'"),
        ({"format": {}}, "format: names no layer"),
        ({"format": {0: "vq-2bit"}, "layers": [0, 1]}, "layers: layer 1 has no format"),
        ({"layers": [0, 7]}, "layers: layer 7 has no keys and values in its cache"),
        ({"batches": []}, "batches: is empty"),
        ({"batches": [{"input_ids": tokens(1, 9), "attention_mask": torch.zeros(1, 9)}]}, "valid"),
    ],
)
def test_wrong_calibration_is_refused(options, match):
    options = {"batches": [tokens(1, 9)], **options}
    with pytest.raises(ConfigError, match=match):
        fe.calibrate_kv(llama(), **options)


def test_heads_that_do_not_fit_are_refused_by_the_first_batch():
    seen = []
    batches = (seen.append(n) or tokens(1, 9) for n in range(3))
    with pytest.raises(ConfigError, match="8 channels are no multiple of 16"):
        fe.calibrate_kv(llama(), batches, "tc-2bit")
    assert seen == [0]


# --- codebooks on disk ----------------------------------------------------------------------------


VQ = [name for name in FORMATS if name.startswith("vq")]


@pytest.mark.parametrize("name", VQ)
def test_codebooks_are_loaded_as_they_were_saved(name, tmp_path):
    model, path = hybrid(), tmp_path / "books.safetensors"
    options = LearningOptions(rotate_values=True, per_head=True)
    books = fe.calibrate_kv(model, [tokens(1, 30)], name, options=options)
    books.save(path)
    loaded = KvCodebooks.load(path)
    assert (loaded.formats, loaded.model, loaded.tokens) == ({0: name}, books.model, 30)
    assert loaded.shapes == books.shapes
    expected = books.layers[0].tensors()
    assert list(expected) == ["scale", "keys", "values", "order", "offset"]
    for part, tensor in loaded.layers[0].tensors().items():
        assert torch.equal(tensor, expected.pop(part))
    assert not expected
    assert loaded.layers[0].rotate_values
    assert cache_of(model, name, path).layers[0].codec.codebooks.rotate_values


def test_transforms_are_loaded_as_they_were_saved(tmp_path):
    model, path = hybrid(), tmp_path / "books.safetensors"
    books = fe.calibrate_kv(model, [tokens(1, 30)], "tc-4bit")
    books.save(path)
    loaded = KvCodebooks.load(path)
    assert isinstance(loaded.layers[0], LayerTransforms)
    for got, want in zip(
        loaded.layers[0].tensors().values(), books.layers[0].tensors().values(), strict=True
    ):
        assert torch.equal(got, want)
    assert cache_of(model, "tc-4bit", path).layers[0].codec.transforms.key_widths.shape == (2, 4)


@pytest.mark.parametrize(("own", "other"), [("tc-4bit", "vq-4bit"), ("vq-4bit", "tc-4bit")])
def test_transforms_and_codebooks_are_told_apart(own, other):
    """Also where a file was given the wrong name of its format."""
    model = hybrid()
    books = fe.calibrate_kv(model, [tokens(1, 30)], own)
    with pytest.raises(ConfigError, match=f"are of format '{own}', not '{other}'"):
        cache_of(model, other, books)
    with pytest.raises(ConfigError, match=r"codebooks: 0\.tensors are of another sort"):
        cache_of(model, other, dataclasses.replace(books, formats={0: other}))


def test_widths_that_are_no_words_are_refused():
    model = hybrid()
    books = fe.calibrate_kv(model, [tokens(1, 30)], "tc-4bit")
    books.layers[0].key_widths[1, 0] += 1
    with pytest.raises(ConfigError, match=r"0\.key_widths are .*, not 16 bits of w4"):
        cache_of(model, "tc-4bit", books)


BAD_WORDS = {  # of a layer with 2 heads of 8 channels
    "shared scale": ("key_scale", lambda x: x[:1], r"is \(1, 8\), not \(2, 8\)"),
    "shared axes": ("key_rotation", lambda x: x[:1], r"is \(1, 8, 8\), not \(2, 8, 8\)"),
    "narrow steps": ("value_step", lambda x: x[:, :4], r"is \(2, 4\), not \(2, 8\)"),
    "shared widths": ("value_widths", lambda x: x[:1], "not 16 bits of w4"),
    "rising widths": ("key_widths", lambda x: x.new_tensor([[3, 3, 5, 5]] * 2), "not 16 bits"),
    "wide fields": ("key_widths", lambda x: x.new_tensor([[6, 6, 2, 2]] * 2), "not 16 bits"),
    "negative widths": ("key_widths", lambda x: x.new_tensor([[9, 9, 0, -2]] * 2), "not 16 bits"),
    "no whole widths": ("key_widths", torch.Tensor.double, "is torch.float64"),
    "short numbers": ("value_order", torch.Tensor.int, "is torch.int32"),
    "shared order": ("value_order", lambda x: x[:1], r"is \(1, 8\), not \(2, 8\)"),
    "no number": ("key_offset", lambda x: x * torch.nan, "that are not finite"),
    "no step": ("value_step", lambda x: x * 0, "that are not positive"),
    "channels that lack": ("value_order", lambda x: x * 0, "is no order of 8 channels"),
    "channels beyond": ("value_order", lambda x: x + 1, "is no order of 8 channels"),
}
BAD_BOOKS = {
    "shared scale": ("scale", lambda x: x[:1], r"is \(1, 8\), not \(2, 8\)"),
    "whole scale": ("scale", torch.Tensor.int, "is torch.int32"),
    "no scale": ("scale", lambda x: x * 0, "that are not positive"),
    "infinite scale": ("scale", lambda x: x / 0, "that are not positive"),
    "books of three heads": ("keys", lambda x: x.expand(3, -1, -1), r"not \(1, 256, 4\) or \(2, 2"),
    "few codewords": ("keys", lambda x: x[:, :128], r"is \(1, 128, 4\), not \(1, 256, 4\)"),
    "short codewords": ("values", lambda x: x[..., :2], r"is \(1, 256, 2\), not"),
    "whole codewords": ("values", torch.Tensor.long, "is torch.int64"),
    "no number": ("values", lambda x: x.where(x < x.max(), torch.nan), "that are not finite"),
    "shared order": ("order", lambda x: x[:1], r"is \(1, 8\), not \(2, 8\)"),
    "short numbers": ("order", torch.Tensor.int, "is torch.int32"),
    "channels that lack": ("order", lambda x: x // 2, "is no order of 8 channels"),
    "channels beyond": ("order", lambda x: x + 1, "is no order of 8 channels"),
    "shared offset": ("offset", lambda x: x[:1], r"is \(1, 8\), not \(2, 8\)"),
    "no offset": ("offset", lambda x: x * torch.inf, "that are not finite"),
}
BAD = {
    f"{form}, {name}": (form, *bad)
    for form, cases in (("tc-4bit", BAD_WORDS), ("vq-2bit", BAD_BOOKS))
    for name, bad in cases.items()
}


@pytest.mark.parametrize(("form", "name", "change", "match"), BAD.values(), ids=BAD)
def test_tensors_that_are_none_of_the_layer_are_refused(books_of, form, name, change, match):
    """Most of them would broadcast, or be read beyond their end."""
    model, books = books_of[form]
    layer = dataclasses.replace(books.layers[0], **{name: change(getattr(books.layers[0], name))})
    cache_of(model, form, books)
    with pytest.raises(ConfigError, match=rf"codebooks: 0\.{name} .*{match}"):
        cache_of(model, form, dataclasses.replace(books, layers={0: layer}))


@pytest.fixture(scope="module", name="books_of")
def _books_of():
    model, ids = hybrid(), tokens(1, 30)
    return {name: (model, fe.calibrate_kv(model, [ids], name)) for name in ("tc-4bit", "vq-2bit")}


@pytest.mark.parametrize("name", ["vq-2bit", "tc-4bit"])
def test_codebooks_fit_the_model_in_another_precision(name):
    model = hybrid()
    books = fe.calibrate_kv(model, [tokens(1, 30)], name)
    model.to(torch.bfloat16)
    result = generate(model, tokens(1, 30), past_key_values=cache_of(model, name, books))
    assert result.past_key_values.layers[0].state.tail_k.dtype == torch.bfloat16


def test_what_does_not_belong_together_is_refused(tmp_path):
    model = hybrid()
    books = fe.calibrate_kv(model, [tokens(1, 30)], "vq-2bit")
    other = hybrid()
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    every, pure = hybrid(full=1), fe.prepare(llama(), SMALL)
    nothing = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(1)}, nothing)
    refusals = [
        (other, "vq-2bit", books, "were learned from another model, or other weights"),
        (every, "vq-2bit", books, "have nothing for layer 1 of the cache, which has 2 kv heads"),
        (model, "vq-1bit", books, "are of format 'vq-2bit', not 'vq-1bit'"),
        (model, "vq-2bit", None, "codebooks: 'vq-2bit' needs them"),
        (model, "fp8", books, "codebooks: fp8 has none"),
        (model, None, books, "codebooks: no layer is stored as codes"),
        (model, "exact", books, "codebooks: no layer is stored as codes"),
        (model, "int4", None, "full_layers: 'int4' is not one of"),
        (pure, "fp8", None, "no full attention of the model can be quantised"),
        (model, "vq-2bit", nothing, "holds no codebooks of a cache"),
        (model, "vq-2bit", tmp_path / "none", "is no file"),
    ]
    for owner, storage, given, match in refusals:
        with pytest.raises(ConfigError, match=match):
            cache_of(owner, storage, given)


def test_codebooks_of_another_version_are_refused(tmp_path):
    path = tmp_path / "books.safetensors"
    save_file({}, path, {"kind": "flasheva kv codebooks", "version": "1"})
    with pytest.raises(ConfigError, match="is of version 1, not 3"):
        KvCodebooks.load(path)
    (tmp_path / "text").write_text("no safetensors")
    with pytest.raises(ConfigError, match="cannot be read"):
        KvCodebooks.load(tmp_path / "text")
