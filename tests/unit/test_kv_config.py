"""``kv`` of a layer: how it is written, what it means, and what is refused."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from flasheva_compile.config import EvaConfig, FullConfig, HybridConfig, parse_options
from flasheva_compile.errors import ConfigError
from flasheva_compile.layer_config import KvFormatName, is_full, kv_of
from flasheva_compile.layer_names import LayerName
from flasheva_compile.quantization.formats import EXACT, FORMATS, FP8, misfit_of_heads

LAYER = LayerName("model.layers.3", 3, 12)


def resolved(value, default=None):
    layers = {"default": default or {}, 3: value}
    return HybridConfig.from_dict(layers).resolve(LAYER)


def test_every_format_can_be_written():
    assert get_args(KvFormatName) == (EXACT, FP8, *FORMATS)


SIZES = [(128, 128), (80, 64), (64, 40), (12, 16), (10, 8), (7, 8)]


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_heads_fit_a_format_whose_codes_they_have(form):
    for sizes in SIZES:
        try:
            fits = form.nbytes(*sizes) > 0
        except ConfigError as error:
            fits, size = False, int(error.message.split()[0])
            part = "keys" if size == sizes[0] else "values"
            assert misfit_of_heads(form, *sizes).startswith(f"{part} have {size} channels, no mul")
        assert (misfit_of_heads(form, *sizes) == "") == fits


@pytest.mark.parametrize("name", get_args(KvFormatName))
def test_a_full_layer_says_how_it_is_stored(name):
    config = resolved({"attention": "full", "kv": name})
    assert is_full(config)
    assert kv_of(config) == name
    assert config == resolved(FullConfig(kv=name))


def test_exactly_is_what_full_means():
    for value in ("full", {"attention": "full"}, {"attention": "full", "kv": "exact"}):
        assert resolved(value) == "full"
    assert kv_of("full") == "exact"


def test_the_default_may_be_stored_in_few_bits():
    layers = {"default": {"attention": "full", "kv": "fp8"}, 3: {"chunk_size": 8}}
    hybrid = HybridConfig.from_dict(layers)
    assert hybrid.resolve(LAYER) == EvaConfig(chunk_size=8)
    assert kv_of(hybrid.default) == "fp8"


def test_eva_may_be_spelled_out():
    config = resolved({"attention": "eva", "chunk_size": 8}, {"window_size": 64})
    assert config == EvaConfig(window_size=64, chunk_size=8)
    assert resolved({"attention": "eva"}, {"window_size": 64}) == EvaConfig(window_size=64)


def test_json_brings_it_back():
    layers = {"default": {}, "*.1": FullConfig(kv="fp8"), 3: {"attention": "full", "kv": "vq-2bit"}}
    hybrid = HybridConfig.from_dict(layers)
    assert HybridConfig.from_dict(json.loads(hybrid.to_json())) == hybrid
    assert hybrid.to_dict()["3"] == {"attention": "full", "kv": "vq-2bit"}


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"attention": "full", "kv": "vq-3bit"}, r"\[3\]\.kv: must be one of \"exact\", \"fp8\""),
        ({"attention": "full", "kvs": "fp8"}, r"\[3\]\.kvs: unknown field; known: attention, kv"),
        ({"attention": "full", "chunk_size": 8}, r"\[3\]\.chunk_size: unknown field"),
        ({"attention": "half"}, r"\[3\]\.attention: must be one of \"full\", \"eva\""),
        ({"kv": "fp8"}, r"\[3\]\.kv: is for attentions that stay full"),
        ({"attention": "eva", "kv": "fp8"}, r"\[3\]\.kv: is for attentions that stay full"),
    ],
)
def test_what_means_nothing_is_refused(value, match):
    with pytest.raises(ConfigError, match=match):
        resolved(value)


def test_two_indices_of_one_layer_must_agree_on_it():
    layers = {11: "full", -1: {"attention": "full", "kv": "fp8"}}
    with pytest.raises(ConfigError, match="both name layer 11"):
        HybridConfig.from_dict(layers).resolve(LayerName("model.layers.11", 11, 12))


def test_a_graph_has_no_cache():
    for layers in ({0: FullConfig(kv="fp8")}, {"default": FullConfig(kv="fp8")}):
        with pytest.raises(ConfigError, match="kv: 'fp8' is how a cache stores keys"):
            parse_options({"layers": layers})
    assert parse_options({"layers": {0: FullConfig()}}).hybrid.rules[0].config == "full"
