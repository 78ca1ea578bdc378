"""The pretrained model and tokenizer of the adaptation benchmarks, as the quickstart loads them."""

from __future__ import annotations

import copy
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


def load_model(gguf: Path | None, dtype: torch.dtype = torch.float32) -> Any:  # noqa: ANN401
    """Return the model; None = its architecture with random weights.

    Its rotary frequencies stay fp32, which ``model.to(dtype)`` would round.
    """
    if gguf is None:
        torch.manual_seed(0)
        return _cast(transformers.LlamaForCausalLM(smollm2_config()), dtype)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers refuses to save what it holds for quantised, and these weights no longer are.
    config = copy.deepcopy(loaded.config)
    config.__dict__.pop("quantization_config", None)
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    return _cast(plain, dtype)


def _cast(model: Any, dtype: torch.dtype) -> Any:  # noqa: ANN401
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
