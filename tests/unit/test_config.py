"""Configuration: round trips, presets, and which key of `layers` wins."""

import json

import pytest

from flasheva_compile.config import EvaConfig, HybridConfig, LayerName, LayerRule, parse_options
from flasheva_compile.errors import ConfigError
from flasheva_compile.layer_names import compress_names, covers, name_layers

DECODER = name_layers([f"model.layers.{i}.self_attn" for i in range(12)], [])


def chunk_size(layers, path):
    """The chunk size that one layer of a 12-layer decoder gets, or "full"."""
    (layer,) = [layer for layer in DECODER if layer.path == path]
    config = HybridConfig.from_dict(layers).resolve(layer)
    return config if config == "full" else config.chunk_size


def test_defaults_and_presets():
    assert EvaConfig() == EvaConfig(
        window_size=256, chunk_size=16, sink_tokens=1, chunk_rule="tangent", window="sliding"
    )
    assert EvaConfig.paper() == EvaConfig(sink_tokens=0, chunk_rule="eva", window="block")
    assert EvaConfig.evabyte() == EvaConfig(
        window_size=2048, sink_tokens=0, chunk_rule="evabyte", window="block"
    )


@pytest.mark.parametrize(("tokens", "size"), [(0, 0), (1, 16), (16, 16), (17, 32)])
def test_sinks_are_whole_chunks(tokens, size):
    assert EvaConfig(sink_tokens=tokens).sink_size == size


@pytest.mark.parametrize("config", [EvaConfig(), EvaConfig.paper(), EvaConfig.evabyte()])
def test_eva_config_round_trips(config):
    assert EvaConfig.from_dict(config.to_dict()) == config
    assert EvaConfig.from_json(config.to_json()) == config
    assert config.to_dict()["version"] == 1
    assert hash(config) == hash(EvaConfig.from_dict(config.to_dict()))


HYBRIDS = [
    {},
    {"default": "full", 3: "eva"},
    {"default": {"window_size": 64}, 0: "full", -1: "full", "model.layers.1?.*": {"chunk_size": 8}},
    {"default": EvaConfig.paper(), "model.layers.3": EvaConfig.evabyte()},
]


@pytest.mark.parametrize("layers", HYBRIDS)
def test_hybrid_config_round_trips(layers):
    hybrid = HybridConfig.from_dict(layers)
    assert HybridConfig.from_dict(hybrid.to_dict()) == hybrid
    assert HybridConfig.from_json(hybrid.to_json()) == hybrid


def test_config_json_may_sort_the_keys():
    hybrid = HybridConfig.from_dict(HYBRIDS[2])
    stored = json.loads(json.dumps(hybrid.to_dict(), sort_keys=True))
    assert set(HybridConfig.from_dict(stored).rules) == set(hybrid.rules)


def test_replace_changes_a_copy():
    config = EvaConfig()
    assert config.replace(chunk_size=8).chunk_size == 8
    assert config.chunk_size == 16


PRECEDENCE = [
    # layers, path, expected
    ({}, "model.layers.3.self_attn", 16),
    ({"default": {"chunk_size": 8}}, "model.layers.3.self_attn", 8),
    ({"default": "full"}, "model.layers.3.self_attn", "full"),
    ({"default": "full", 3: "eva"}, "model.layers.3.self_attn", 16),
    ({"default": {"chunk_size": 8}, 3: "eva"}, "model.layers.3.self_attn", 8),
    ({"default": {"chunk_size": 8}, 3: {"window_size": 64}}, "model.layers.3.self_attn", 8),
    # an index beats a glob, whichever comes first
    ({3: "full", "model.*": {"chunk_size": 8}}, "model.layers.3.self_attn", "full"),
    ({"model.*": {"chunk_size": 8}, 3: "full"}, "model.layers.3.self_attn", "full"),
    # a path beats an index, whichever comes first
    ({3: "full", "model.layers.3": {"chunk_size": 8}}, "model.layers.3.self_attn", 8),
    ({"model.layers.3": {"chunk_size": 8}, 3: "full"}, "model.layers.3.self_attn", 8),
    # the deeper path wins, whichever comes first
    ({"model": "full", "model.layers.3": {"chunk_size": 8}}, "model.layers.3.self_attn", 8),
    ({"model.layers.3": {"chunk_size": 8}, "model": "full"}, "model.layers.3.self_attn", 8),
    ({"model": "full", "model.layers.3": "eva"}, "model.layers.4.self_attn", "full"),
    # the later glob wins
    ({"*": "full", "*.self_attn": {"chunk_size": 8}}, "model.layers.3.self_attn", 8),
    ({"*.self_attn": {"chunk_size": 8}, "*": "full"}, "model.layers.3.self_attn", "full"),
    # a path ends at a dot
    ({"model.layers.1": "full"}, "model.layers.11.self_attn", 16),
    ({"model.layers.1?": "full"}, "model.layers.11.self_attn", "full"),
    ({"model.layers.1?": "full"}, "model.layers.1.self_attn", 16),
    ({"model.layers.{2-4,9}": "full"}, "model.layers.9.self_attn", "full"),
    ({"model.layers.{2-4,9}": "full"}, "model.layers.5.self_attn", 16),
    # indices count from both ends; JSON writes them as digits
    ({-1: "full"}, "model.layers.11.self_attn", "full"),
    ({"-1": "full"}, "model.layers.11.self_attn", "full"),
    ({"3": "full"}, "model.layers.3.self_attn", "full"),
    # agreeing indices are no conflict
    ({11: "full", -1: "full"}, "model.layers.11.self_attn", "full"),
    # a conflict of indices that a path overrides does not matter, whichever comes first
    ({11: "full", -1: "eva", "model.layers.11": {"chunk_size": 8}}, "model.layers.11.self_attn", 8),
    ({"model.layers.11": {"chunk_size": 8}, 11: "full", -1: "eva"}, "model.layers.11.self_attn", 8),
]


@pytest.mark.parametrize(("layers", "path", "expected"), PRECEDENCE)
def test_precedence(layers, path, expected):
    assert chunk_size(layers, path) == expected


def test_an_index_counts_within_its_own_list():
    known = name_layers(
        [f"encoder.{i}.attn" for i in range(4)] + [f"decoder.{i}.attn" for i in range(2)], []
    )
    last = [layer.path for layer in known if covers(-1, layer)]
    assert last == ["encoder.3.attn", "decoder.1.attn"]


def test_lists_are_as_long_as_the_model_says():
    (only,) = name_layers(["h.0.attn"], ["h", "h.0", "h.0.attn", "h.1", "h.2"])
    assert only == LayerName("h.0.attn", 0, 3)


def test_an_attention_outside_of_lists_has_no_index():
    (layer,) = name_layers(["attn"], ["", "attn"])
    assert layer == LayerName("attn")
    assert not covers(0, layer)
    assert covers("attn", layer)


def test_names_compress_to_globs_that_name_them_again():
    paths = ["a.0.x", "a.1.x", "a.2.x", "a.4.x", "a.1.y", "b", "c.7.d.0", "c.7.d.1"]
    globs = compress_names(paths)
    assert globs == ["a.{0-2,4}.x", "a.1.y", "b", "c.7.d.{0-1}"]
    for path in paths:
        assert any(covers(glob, LayerName(path)) for glob in globs)


def test_check_accepts_a_module_whose_attention_was_not_found():
    hybrid = HybridConfig.from_dict({"vision": "full", 20: "full"})
    hybrid.check(DECODER, ["vision", "vision.blocks.20", "vision.blocks.20.attn"])
    with pytest.raises(ConfigError, match="vision"):
        hybrid.check(DECODER)


def test_options_defaults():
    options = parse_options(None)
    assert options.hybrid == HybridConfig()
    assert (options.strict, options.assume_mask) == (False, None)
    assert (options.inner_backend, options.inductor) == ("inductor", {})


def test_fields_at_the_top_level_change_the_default():
    options = parse_options({"window_size": 64, "layers": {0: "full", 1: {"chunk_size": 8}}})
    assert options.hybrid.default == EvaConfig(window_size=64)
    assert options.hybrid.rules == (
        LayerRule(0, "full"),
        LayerRule(1, EvaConfig(window_size=64, chunk_size=8)),
    )


def test_fields_and_default_combine_when_they_do_not_overlap():
    options = parse_options({"window_size": 64, "layers": {"default": {"chunk_size": 8}}})
    assert options.hybrid.default == EvaConfig(window_size=64, chunk_size=8)


@pytest.mark.parametrize("name", ["layers", "config"])
def test_layers_may_be_a_config_object(name):
    hybrid = HybridConfig.from_dict({0: "full"})
    assert parse_options({name: hybrid}).hybrid is hybrid
    assert parse_options({name: hybrid.to_dict()}).hybrid == hybrid
    assert parse_options({name: EvaConfig.paper()}).hybrid.default == EvaConfig.paper()
    assert parse_options({name: "full"}).hybrid == HybridConfig(default="full")


def test_a_stored_eva_config_is_an_options_dict():
    assert parse_options(EvaConfig.paper().to_dict()).hybrid.default == EvaConfig.paper()


def test_inductor_options_are_passed_on():
    options = parse_options(
        {"max-autotune": True, "strict": True, "assume_mask": "causal"},
        inductor_options={"max_autotune", "triton.cudagraphs"},
    )
    assert options.inductor == {"max_autotune": True}
    assert options.strict
    assert options.assume_mask == "causal"


# --- retrieval ------------------------------------------------------------------------------------


def test_retrieval_is_off_by_default_and_round_trips():
    assert (EvaConfig().retrieve_chunks, EvaConfig().retrieve_block) == (0, 1)
    config = EvaConfig(retrieve_chunks=8, retrieve_block=16)
    assert EvaConfig.from_dict(config.to_dict()) == config
    older = {name: x for name, x in config.to_dict().items() if not name.startswith("retrieve")}
    assert EvaConfig.from_dict(older) == EvaConfig()
    hybrid = parse_options({"retrieve_chunks": 8, "layers": {0: {"retrieve_chunks": 4}}}).hybrid
    assert hybrid.default.retrieve_chunks == 8
    assert hybrid.rules[0].config.retrieve_chunks == 4


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"retrieve_chunks": -1}, "retrieve_chunks"),
        ({"retrieve_chunks": 1.5}, "retrieve_chunks"),
        ({"retrieve_chunks": 1, "retrieve_block": 0}, "retrieve_block"),
        ({"retrieve_block": 4}, "without retrieve_chunks"),
    ],
)
def test_impossible_retrieval_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        EvaConfig(**fields)
