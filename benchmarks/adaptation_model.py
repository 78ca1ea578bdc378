"""The pretrained model and tokenizer of the adaptation benchmarks, as the quickstart loads them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched from a hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from quickstart import smollm2_config, with_split_digits


def load_tokenizer(gguf: Path) -> Any:  # noqa: ANN401
    """Return the tokenizer of a GGUF file of SmolLM2."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    return with_split_digits(transformers.AutoTokenizer.from_pretrained(**source))


def load_model(gguf: Path | None) -> Any:  # noqa: ANN401
    """Return the model in fp32; None = its architecture with random weights."""
    if gguf is None:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(smollm2_config())
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    return transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
