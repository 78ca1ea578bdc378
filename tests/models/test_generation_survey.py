"""A representative part of the generation survey; ``make survey`` runs all of it."""

from __future__ import annotations

import pytest
import torch

from tests.models.generation_survey import EQUAL, REFUSED, survey

WINDOW = "it has a window or chunks of 8 tokens already"
ENTIRELY = ("llama", "gpt_neox", "qwen3", "phi3", "olmo2", "bert")
PARTLY = {  # why layers stay full
    "gemma2": {WINDOW},
    "gemma3": {WINDOW},
    "gpt_oss": {WINDOW},
    "gemma3n_text": {
        WINDOW,
        "model.layers.4.self_attn reads its keys and values, too",
        "it reads the keys and values of model.layers.0.self_attn",
        "it reads the keys and values of model.layers.2.self_attn",
    },
    "qwen3_next": set(),  # its linear attention does not attend
}
NOT_AT_ALL = {
    "deepseek_v3": "what it attends to is computed from what it caches, not cached itself",
    "falcon_h1": "its cache is a LinearAttentionAndFullAttentionLayer",
    "inkling_text": "it is called with position_bias",
    "falcon_mamba": "no attention goes through transformers' AttentionInterface",
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ENTIRELY)
def test_every_layer_is_converted_and_equal(name):
    entry = survey(name)
    assert entry.outcome == EQUAL, entry
    assert len(entry.converted) == 2
    assert not entry.kept


@pytest.mark.parametrize("name", PARTLY)
def test_layers_that_stay_full_have_their_reason(name):
    entry = survey(name)
    assert entry.outcome == EQUAL, entry
    assert len(entry.converted) == 1
    assert set(entry.kept.values()) == PARTLY[name]


@pytest.mark.parametrize("name", NOT_AT_ALL)
def test_model_is_refused_with_its_reason(name):
    entry = survey(name)
    assert entry.outcome == REFUSED, entry
    assert NOT_AT_ALL[name] in entry.reason
    assert not entry.converted


def test_model_of_sliding_windows_alone_is_converted_without_them():
    entry = survey("mistral")
    assert entry.outcome == EQUAL, entry
    assert entry.windows_off
    assert len(entry.converted) == 2
