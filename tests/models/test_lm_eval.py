"""lm-evaluation-harness on a prepared model: tasks whose data are local files."""

from __future__ import annotations

import json

import pytest
import torch

import flasheva_compile as fe
from flasheva_compile.evaluation.greedy import greedy
from flasheva_compile.evaluation.likelihood import candidate_losses
from tests.models.evaluation_models import byte_llama, byte_tokenizer
from tests.models.test_evaluation import EVA

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

TOKENIZER = byte_tokenizer()
CHOICES = ["apple", "river", "stone", "cloud"]
PROMPTS = [f"{n}: {'one two three four ' * (1 + n % 3)}is" for n in range(9)]
CHOOSE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
GENERATE = """
task: local_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["zzzz"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def model():
    model = fe.prepare(byte_llama(), {"default": EVA, 0: "full"})
    model.generation_config.eos_token_id = None
    return model


def score(model, folder, task, items):
    """Return a task's results, as a user of lm_eval gets them."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (folder / "task.yaml").write_text(task.format(file=folder / "items.jsonl"))
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    wrapped = HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=2, add_bos_token=True)
    name = task.split()[1]
    found = lm_eval.simple_evaluate(wrapped, tasks=[name], task_manager=tasks, bootstrap_iters=0)
    return found["results"][name], found["samples"][name]


@pytest.fixture(autouse=True)
def _local(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_likelihoods_are_ours(model, tmp_path):
    """Right padded batches of rows of different lengths."""
    items = [{"prompt": p, "choices": CHOICES, "label": n % 4} for n, p in enumerate(PROMPTS)]
    results, samples = score(model, tmp_path, CHOOSE, items)
    choices = torch.tensor(
        [TOKENIZER(f" {c}", add_special_tokens=False).input_ids for c in CHOICES]
    )
    right = []
    for item, sample in zip(items, samples, strict=True):
        ids = torch.tensor([TOKENIZER(item["prompt"]).input_ids])
        with torch.no_grad():
            want = -candidate_losses(model, ids, choices[None])[0]
        assert [found[0] for found in sample["filtered_resps"]] == pytest.approx(
            want.tolist(), rel=1e-5
        )
        right.append(int(want.argmax()) == item["label"])
    assert results["acc,none"] == pytest.approx(sum(right) / len(right))


def test_generation_with_the_compressed_cache_is_ours(model, tmp_path):
    """Left padded batches."""
    ids = [torch.tensor([TOKENIZER(prompt).input_ids]) for prompt in PROMPTS]
    answers = [TOKENIZER.decode(greedy(model, x, 6)[0]) for x in ids]
    items = [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, answers, strict=True)]
    results, _ = score(model, tmp_path, GENERATE, items)
    assert results["exact_match,none"] == 1.0
