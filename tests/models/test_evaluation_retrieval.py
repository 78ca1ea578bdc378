"""Retrieval tasks: a model that copies scores 100 %, one that ignores what it read scores 0 %."""

from __future__ import annotations

import json
import re

import pytest
import torch

from flasheva_compile.errors import ConfigError
from flasheva_compile.evaluation.extractive import (
    ExtractiveItem,
    extractive,
    extractive_batches,
    read_items,
)
from flasheva_compile.evaluation.passkey import make_prompt, passkey, passkey_batches
from flasheva_compile.evaluation.recall import associative_recall
from tests.models.evaluation_models import Oracle, byte_llama, byte_tokenizer

TOKENIZER = byte_tokenizer()


def said_after(text, mark, whole):
    """What is left to say of ``whole`` after the last ``mark``."""
    said = text.rpartition(mark)[2]
    return whole[len(said) :] if whole.startswith(said) and said != whole else "."


def find_key(text):
    key = re.search(r"The pass key is (\d{5})", text)
    return said_after(text, "The pass key is", f" {key[1]}") if key else "."


def find_first_key_only_near(text):
    """Sees the last 300 bytes."""
    return find_key(text[-300:])


def recall_number(text):
    *_, name = re.findall(r"\n([a-z]+):", text) or ["?"]
    number = re.search(rf"\n{name}:( \d+)\n", text)
    return said_after(text, f"\n{name}:", number[1]) if number else "."


# --- passkey --------------------------------------------------------------------------------------


def test_prompts_have_their_length_and_one_key():
    for length in (230, 231, 500):
        depths = []
        for sample in range(20):
            tokens, key, depth = make_prompt(TOKENIZER, length, str(sample))
            text = TOKENIZER.decode(tokens)
            assert len(tokens) == length
            assert text.startswith("<s>There is important")
            assert text.count(f"The pass key is {key}. Remember it. {key} is the pass key.") == 1
            assert text.endswith("What is the pass key? The pass key is")
            before = text.index(f" The pass key is {key}")
            assert text[before - 1] == "."  # never inside a sentence
            depths.append(depth)
        assert 0 <= min(depths) < max(depths) <= 1


def test_a_model_that_copies_finds_every_key():
    report = passkey(Oracle(find_key, TOKENIZER), TOKENIZER, (300, 400), samples=3, batch_size=2)
    assert report.accuracy == 1.0
    assert report.by_length == {300: 1.0, 400: 1.0}
    assert [(row.length, row.sample) for row in report.rows] == [
        (length, sample) for length in (300, 400) for sample in range(3)
    ]
    assert all(row.answer == f" {row.key}.." for row in report.rows)


def test_a_model_that_ignores_the_key_finds_none():
    model = Oracle(lambda _: "12345", TOKENIZER)
    assert passkey(model, TOKENIZER, (300,), samples=4).accuracy == 0.0


def test_a_model_that_sees_the_end_finds_keys_there():
    model = Oracle(find_first_key_only_near, TOKENIZER)
    report = passkey(model, TOKENIZER, (1000,), samples=12)
    assert 0 < report.accuracy < 1
    # The end of the prompt, from the key on, has at most 300 bytes; filler has about 800.
    for row in report.rows:
        from_key = (1 - row.depth) * (1000 - 196)
        assert row.found == (from_key < 200) or abs(from_key - 200) < 5
    near, far = report.by_depth(1000)[-1], report.by_depth(1000)[0]
    assert far in (0.0, None)
    assert near not in (0.0, None)


def test_prompts_depend_on_the_seed_alone():
    model = Oracle(lambda _: ".", TOKENIZER)
    one = passkey(model, TOKENIZER, (300,), samples=3, batch_size=1)
    assert one == passkey(model, TOKENIZER, (300,), samples=3, batch_size=8)
    assert one.rows[:2] == passkey(model, TOKENIZER, (300,), samples=2).rows
    assert one != passkey(model, TOKENIZER, (300,), samples=3, seed=1)


def test_a_prompt_that_is_too_short_is_refused():
    with pytest.raises(ConfigError, match="50 tokens are too short for a pass key's prompt of"):
        passkey(byte_llama(), TOKENIZER, (50,))


# --- recall ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [None, 400])
def test_a_model_that_looks_up_recalls_every_number(length):
    model = Oracle(recall_number, TOKENIZER)
    report = associative_recall(
        model, TOKENIZER, pairs=(2, 8), length=length, samples=4, batch_size=3
    )
    assert {pairs for pairs, _ in report.found} == {2, 8}
    assert set(report.found.values()) == set(report.ranked.values()) == {1.0}
    assert all(row.length == length for row in report.rows if length)
    assert len({row.place for row in report.rows if row.pairs == 8}) > 1


def test_a_model_that_says_any_number_is_at_chance():
    """The likeliest of equal numbers is the first: right where that was asked for."""
    model = Oracle(lambda _: ".", TOKENIZER)
    report = associative_recall(model, TOKENIZER, pairs=(4,), samples=12)
    assert not any(row.found for row in report.rows)
    assert [row.ranked for row in report.rows] == [row.place == 0 for row in report.rows]


def test_weak_models_give_a_signal():
    """It knows the first digit, not the rest: the number is likeliest, yet never said."""

    def first_digit(text):
        number = recall_number(text)
        return number if number.startswith(" ") or text.endswith(": ") else "."

    model = Oracle(first_digit, TOKENIZER)
    report = associative_recall(model, TOKENIZER, pairs=(2,), samples=8)
    assert report.found == {(2, report.rows[0].length): 0.0}
    assert next(iter(report.ranked.values())) > 0.5


def test_lists_that_do_not_fit_are_refused():
    model = byte_llama()
    with pytest.raises(ConfigError, match="too short for a list of 8 pairs"):
        associative_recall(model, TOKENIZER, pairs=(8,), length=60)
    with pytest.raises(ConfigError, match="at most"):
        associative_recall(model, TOKENIZER, pairs=(10_000,))
    with pytest.raises(ConfigError, match="at least one"):
        associative_recall(model, TOKENIZER, pairs=())


# --- extractive -----------------------------------------------------------------------------------


def lines(path, *items):
    path.write_text("\n".join(json.dumps(item) for item in items))
    return path


def test_answers_that_the_continuation_contains_are_found(tmp_path):
    asked = [
        {"context": "The device is RED.", "question": "Which colour?", "answer": "red"},
        {"context": "Maker: Acme. Name:", "prompt": "Maker:", "answer": "Bolt"},
    ]
    items = read_items(lines(tmp_path / "items.jsonl", *asked))
    assert items[0].prompt == "The device is RED.\nQuestion: Which colour?\nAnswer:"
    assert items[1].prompt == "Maker: Acme. Name:\nMaker:"

    def rule(text):
        mark = "\nAnswer:" if "\nAnswer:" in text else "\nMaker:"
        return said_after(text, mark, " red" if "RED" in text else " Acme")

    report = extractive(Oracle(rule, TOKENIZER), TOKENIZER, items, new_tokens=6)
    assert [row.found for row in report.rows] == [True, False]
    assert report.accuracy == 0.5
    assert report.rows[0].nll < 1e-3 < 5 < report.rows[1].nll
    answers = [row.nll * row.answer_tokens for row in report.rows]
    assert report.nll == pytest.approx(sum(answers) / (4 + 5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no item"),
        ("{", ":1: is not JSON"),
        ('{"context": "a", "answer": "b"}', 'either "question" or "prompt"'),
        ('{"context": "a", "question": "b", "prompt": "c", "answer": "d"}', "either"),
        ('{"context": "a", "question": "b", "answer": 3}', "answer must be a text"),
        ('{"context": "a", "question": "b", "answer": " "}', "answer must be a text"),
        ("[]", 'must have "context"'),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, text, message):
    path = tmp_path / "items.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_items(path)


def test_missing_files_and_items_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_items(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="items: is empty"):
        extractive(byte_llama(), TOKENIZER, [])


def test_token_ids_beyond_the_vocabulary_are_refused():
    """A GPU would say that an assertion has failed."""
    model = byte_llama(layers=1)
    model.resize_token_embeddings(100)
    item = ExtractiveItem(prompt="a", answer="b")
    for run in (
        lambda: passkey(model, TOKENIZER, (300,), samples=1),
        lambda: associative_recall(model, TOKENIZER, pairs=(2,), samples=1),
        lambda: extractive(model, TOKENIZER, [item] * 2),
    ):
        with pytest.raises(ConfigError, match="but the model has 100 tokens"):
            run()


def test_answers_of_pass_key_batches_are_their_labels():
    tokenizer = byte_tokenizer()
    batches = passkey_batches(tokenizer, [300, 400], samples=2, seed=3)
    assert len(batches) == 4
    for batch, length in zip(batches, (300, 300, 400, 400), strict=True):
        ids, labels = batch["input_ids"], batch["labels"]
        assert ids.shape == labels.shape
        assert (labels[:, :length] == -100).all()
        assert torch.equal(labels[:, length:], ids[:, length:])
        answer = tokenizer.decode(labels[0, length:])
        assert len(answer.strip()) == 5
        assert tokenizer.decode(ids[0, :length]).count(answer.strip()) == 2
    again = passkey_batches(tokenizer, [300], samples=1, seed=3)
    assert torch.equal(again[0]["input_ids"], batches[0]["input_ids"])


def test_answers_of_question_batches_are_their_labels():
    """What is asked and answered is what ``extractive`` asks and scores."""
    items = [ExtractiveItem(prompt=f"{n} is {name}. {n} is", answer=name) for n, name in PAIRS]
    model, batches = byte_llama(), extractive_batches(TOKENIZER, items)
    report = extractive(model, TOKENIZER, items, new_tokens=1)
    for batch, row in zip(batches, report.rows, strict=True):
        with torch.no_grad():
            loss = model(**batch).loss.item()
        assert int((batch["labels"] != -100).sum()) == row.answer_tokens
        assert loss == pytest.approx(row.nll, rel=1e-4)
    with pytest.raises(ConfigError, match="items: is empty"):
        extractive_batches(TOKENIZER, [])


PAIRS = (("Ada", "red"), ("Bo", "green"))
