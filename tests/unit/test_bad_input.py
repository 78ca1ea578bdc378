"""Every mistake in a configuration gives an error that names it, what is valid, and the way out."""

import pytest

from flasheva_compile.config import EvaConfig, HybridConfig, parse_options
from flasheva_compile.errors import ConfigError
from flasheva_compile.layer_names import name_layers

FIELDS = (
    "window_size, chunk_size, sink_tokens, chunk_rule, window, "
    "retrieve_chunks, retrieve_block, retrieve_by"
)
OPTIONS = f"layers, config, strict, assume_mask, inner_backend, validate, {FIELDS}"
DECODER = name_layers([f"model.layers.{i}.self_attn" for i in range(30)], [])
KNOWN = "matches no attention; known: model.layers.{0-29}.self_attn"
LAYER_VALUES = 'must be "full", "eva", an EvaConfig or a dict of its fields'

MISTAKES = {
    # one attention
    "window too small": (
        lambda: EvaConfig(window_size=0),
        "window_size: must be an integer >= 1, got 0",
    ),
    "window of a wrong type": (
        lambda: EvaConfig(window_size="256"),
        "window_size: must be an integer >= 1, got '256'",
    ),
    "bool for an integer": (
        lambda: EvaConfig(chunk_size=True),
        "chunk_size: must be an integer >= 1, got True",
    ),
    "negative sinks": (
        lambda: EvaConfig(sink_tokens=-1),
        "sink_tokens: must be an integer >= 0, got -1",
    ),
    "window of broken chunks": (
        lambda: EvaConfig(window_size=100, chunk_size=16),
        "window_size: must be a multiple of chunk_size=16, got 100. Hint: use 96 or 112",
    ),
    "window below one chunk": (
        lambda: EvaConfig(window_size=8),
        "window_size: must be a multiple of chunk_size=16, got 8. Hint: use 16",
    ),
    "misspelled rule": (
        lambda: EvaConfig(chunk_rule="tangnt"),
        'chunk_rule: must be one of "mean", "tangent", "evabyte", "eva", got \'tangnt\'. '
        'Hint: did you mean "tangent"?',
    ),
    "unknown window kind": (
        lambda: EvaConfig(window=7),
        'window: must be one of "sliding", "block", got 7',
    ),
    "misspelled field": (
        lambda: EvaConfig.from_dict({"windowsize": 64}),
        f'windowsize: unknown field; known: {FIELDS}. Hint: did you mean "window_size"?',
    ),
    "misspelled change": (
        lambda: EvaConfig().replace(chunks=8),
        f'chunks: unknown field; known: {FIELDS}. Hint: did you mean "chunk_size"?',
    ),
    "newer file": (
        lambda: EvaConfig.from_dict({"version": 2}),
        "version: must be 1, got 2. Hint: a newer version of flasheva-compile may have written it",
    ),
    "no dict": (lambda: EvaConfig.from_dict([64]), "EvaConfig: must be a dict, got [64]"),
    "no JSON": (
        lambda: HybridConfig.from_json("{"),
        "text: is not JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)",
    ),
    # layers
    "index out of range": (
        lambda: HybridConfig.from_dict({40: "full"}).check(DECODER),
        f"layers[40]: {KNOWN}. Hint: indices run from -30 to 29",
    ),
    "path of no layer": (
        lambda: HybridConfig.from_dict({"model.layers.40": "full"}).check(DECODER),
        f'layers["model.layers.40"]: {KNOWN}. Hint: did you mean "model.layers.4"?',
    ),
    "path from the middle": (
        lambda: HybridConfig.from_dict({"layers.3": "full"}).check(DECODER),
        f'layers["layers.3"]: {KNOWN}. Hint: did you mean "model.layers.3"?',
    ),
    "glob from the middle": (
        lambda: HybridConfig.from_dict({"layers.*": "full"}).check(DECODER),
        f'layers["layers.*"]: {KNOWN}. Hint: did you mean "*.layers.*"?',
    ),
    "nothing to match": (
        lambda: HybridConfig.from_dict({0: "full"}).check([]),
        "layers[0]: matches no attention; known: none",
    ),
    "two indices in conflict": (
        lambda: HybridConfig.from_dict({29: "full", -1: "eva"}).check(DECODER),
        "layers[-1]: conflicts with layers[29]: both name layer 29 of 30 "
        "(model.layers.29.self_attn), with different values. Hint: keep one of the two",
    ),
    "one index written twice": (
        lambda: HybridConfig.from_dict({3: "full", "3": "eva"}),
        "layers[3]: is given twice, with different values",
    ),
    "field among the layers": (
        lambda: HybridConfig.from_dict({"chunk_size": 8}),
        'layers["chunk_size"]: is a field of EvaConfig, not a layer. '
        'Hint: put it into the dict of a layer or of "default"',
    ),
    "key of a wrong type": (
        lambda: HybridConfig.from_dict({1.5: "full"}),
        'layers[1.5]: must be a layer index, a module path, a glob or "default"',
    ),
    "bool for an index": (
        lambda: HybridConfig.from_dict({True: "full"}),
        'layers[True]: must be a layer index, a module path, a glob or "default"',
    ),
    "value of a wrong type": (
        lambda: HybridConfig.from_dict({3: 64}),
        f"layers[3]: {LAYER_VALUES}, got 64",
    ),
    "misspelled value": (
        lambda: HybridConfig.from_dict({"default": "fll"}),
        f"layers[\"default\"]: {LAYER_VALUES}, got 'fll'",
    ),
    "misspelled field of a layer": (
        lambda: HybridConfig.from_dict({3: {"chunksize": 8}}),
        f'layers[3].chunksize: unknown field; known: {FIELDS}. Hint: did you mean "chunk_size"?',
    ),
    "field of a layer against the default": (
        lambda: HybridConfig.from_dict({"default": {"window_size": 64}, 3: {"chunk_size": 48}}),
        "layers[3].window_size: must be a multiple of chunk_size=48, got 64. Hint: use 48 or 96",
    ),
    # options
    "misspelled option": (
        lambda: parse_options({"layrs": {}}),
        f'layrs: unknown option; known: {OPTIONS}. Hint: did you mean "layers"?',
    ),
    "misspelled Inductor option": (
        lambda: parse_options({"max_autotun": True}, inductor_options=["max_autotune"]),
        f'max_autotun: unknown option; known: {OPTIONS}. Hint: did you mean "max_autotune"?',
    ),
    "index as an option": (
        lambda: parse_options({0: "full"}),
        f"0: unknown option; known: {OPTIONS}",
    ),
    "options of a wrong type": (
        lambda: parse_options("layers"),
        "options: must be a dict, got 'layers'",
    ),
    "strict of a wrong type": (
        lambda: parse_options({"strict": 1}),
        "strict: must be True or False, got 1",
    ),
    "unknown mask": (
        lambda: parse_options({"assume_mask": "casual"}),
        'assume_mask: must be one of "causal", "bidirectional", got \'casual\'. '
        'Hint: did you mean "causal"?',
    ),
    "unknown inner backend": (
        lambda: parse_options({"inner_backend": "triton"}),
        'inner_backend: must be one of "inductor", "aot_eager", "eager", got \'triton\'',
    ),
    "Inductor option without Inductor": (
        lambda: parse_options(
            {"inner_backend": "eager", "max_autotune": True}, inductor_options=["max_autotune"]
        ),
        "max_autotune: is an option of Inductor, but inner_backend='eager'",
    ),
    "layers of a wrong type": (
        lambda: parse_options({"layers": [0, 1]}),
        'layers: must be a dict, an EvaConfig, a HybridConfig or "full", got [0, 1]',
    ),
    "layers and config": (
        lambda: parse_options({"layers": {}, "config": {}}),
        "config: conflicts with layers: both choose the layers",
    ),
    "field set twice": (
        lambda: parse_options({"chunk_size": 8, "layers": {"default": {"chunk_size": 16}}}),
        'chunk_size: conflicts with layers["default"]: both set it',
    ),
    "field beside a complete config": (
        lambda: parse_options({"chunk_size": 8, "config": EvaConfig()}),
        "chunk_size: conflicts with config, which is complete without it",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake):
    act, message = MISTAKES[mistake]
    with pytest.raises(ConfigError) as caught:
        act()
    assert str(caught.value) == message


def test_errors_carry_their_parts():
    with pytest.raises(ConfigError) as caught:
        EvaConfig(window_size=8)
    error = caught.value
    assert (error.subject, error.hint) == ("window_size", "use 16")
    assert isinstance(error, ValueError)
