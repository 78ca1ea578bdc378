"""Generate text with a compressed cache: continue a prompt, or answer a question on a document.

    python examples/generate.py [--model PATH] [--prompt TEXT] [--document FILE]
        [--window-size 256] [--chunk-size 16] [--sink-tokens 16] [--keep-full 0,-1]

Without --model a small Llama with random weights reads bytes, by default of Python's language
reference: nothing is fetched, and what it says means nothing. With --document the file's text comes
first, the prompt last. Prints which attentions were converted and why, the text while it is made,
the speed, and what memory the cache takes beside that of full attention.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from pydoc_data import topics
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched from a hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

import flasheva_compile as fe

if TYPE_CHECKING:
    from torch import Tensor

PROMPT = "What is a cache? Explain it in three sentences."
RANDOM_DOCUMENT = 4096  # characters of Python's language reference: longer than the window
MIB = 1 << 20


class TimedStreamer(BaseStreamer):
    """Note when tokens come, and print them as text where there is a tokenizer.

    Args:
        tokenizer: The model's; None = print nothing.
    """

    def __init__(self, tokenizer: Any = None) -> None:  # noqa: ANN401 - a tokenizer
        self.times: list[float] = []
        self.text = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.prints = tokenizer is not None

    def put(self, value: Tensor) -> None:
        """Take the prompt, later one token at a time."""
        self.times.append(time.perf_counter())
        if self.prints:
            self.text.put(value)

    def end(self) -> None:
        """Print what is left of the text."""
        if self.prints:
            self.text.end()


def main() -> int:
    """Run the example; return the exit status."""
    arguments = parse_arguments()
    model, tokenizer = load(arguments)
    try:
        fe.prepare(model, layers_config(arguments))
    except fe.FlashEvaError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    print(fe.explain(model), "\n")

    inputs = encode(tokenizer, text_of(arguments), model)
    prompt_tokens = inputs["input_ids"].shape[1]
    room = prompt_tokens + arguments.max_new_tokens if arguments.preallocate else None
    # `generate` would build a growing one by itself; this one is asked for its size afterwards.
    cache = fe.FlashEvaCache.for_model(model, max_cache_len=room)
    streamer = TimedStreamer(tokenizer)
    options = {"past_key_values": cache, "streamer": streamer}
    output = model.generate(
        **inputs, **options, max_new_tokens=arguments.max_new_tokens, do_sample=False
    )

    new = output[0, prompt_tokens:]
    if tokenizer is None:
        print(f"random weights, so bytes without meaning: {bytes(new.tolist())!r}")
    print(f"\n{speed(prompt_tokens, streamer.times)}")
    print(memory(model, cache, output.shape[1] - 1))  # the last token is not in the cache
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, help="folder of a transformers model, or a GGUF file")
    add("--prompt", default=PROMPT, help="text to continue, or the question on the document")
    add("--document", type=Path, help="text file that comes before the prompt")
    add("--window-size", type=int, default=256)
    add("--chunk-size", type=int, default=16)
    add("--sink-tokens", type=int, default=16)
    add("--keep-full", default="", help="layers to leave full, as in --keep-full=0,-1")
    add("--max-new-tokens", type=int, default=64)
    add("--preallocate", action="store_true", help="a cache of fixed size, fit for CUDA graphs")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def layers_config(arguments: argparse.Namespace) -> dict[Any, Any]:
    """Return what ``prepare`` takes: a default, and the layers that stay full."""
    default = {
        "window_size": arguments.window_size,
        "chunk_size": arguments.chunk_size,
        "sink_tokens": arguments.sink_tokens,
    }
    full = [int(index) for index in arguments.keep_full.split(",") if index.strip()]
    return {"layers": {"default": default, **dict.fromkeys(full, "full")}}


# --- the model and the text


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Return the model and its tokenizer; a random model has none."""
    path: Path | None = arguments.model
    if path is None:
        torch.manual_seed(0)
        return LlamaForCausalLM(tiny_config()).to(arguments.device).eval(), None
    source: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.suffix == ".gguf":
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype="auto")
    return model.to(arguments.device).eval(), AutoTokenizer.from_pretrained(**source)


def tiny_config() -> LlamaConfig:
    """Return a small Llama that reads bytes."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1 << 20,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def text_of(arguments: argparse.Namespace) -> str:
    """Return the prompt, after the document if there is one; a random model reads any text."""
    if arguments.document is not None:
        return f"{arguments.document.read_text()}\n\n{arguments.prompt}"
    if arguments.model is not None:
        return arguments.prompt
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    return f"{text[:RANDOM_DOCUMENT]}\n\n{arguments.prompt}"


def encode(tokenizer: Any, text: str, model: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """Return the model's inputs: as a chat where the model has a template for it."""
    if tokenizer is None:
        ids = torch.tensor([list(text.encode())], device=model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(text, return_tensors="pt")
    names = ("input_ids", "attention_mask")
    return {name: inputs[name].to(model.device) for name in names}


# --- what it took


def speed(prompt_tokens: int, times: list[float]) -> str:
    """Say how fast it was: the streamer sees the prompt first, then token after token."""
    prefill = times[1] - times[0]
    text = f"prompt: {prompt_tokens} tokens in {prefill:.2f} s"
    decoded = len(times) - 2
    if not decoded:
        return text
    return f"{text}; then {decoded / (times[-1] - times[1]):.1f} tokens/s ({decoded} tokens)"


def memory(model: Any, cache: fe.FlashEvaCache, tokens: int) -> str:  # noqa: ANN401
    """Say what the cache takes beside keys and values of every token in every layer, all alike."""
    layers = fe.explain(model).layers
    shapes = [(x.kv_heads, x.head_dim, x.value_dim) for x in layers]
    numbers = [heads * (k + v) for heads, k, v in shapes if heads and k and v]
    full = sum(numbers) / len(numbers) * len(layers) * tokens * model.dtype.itemsize
    return (
        f"cache after {tokens} tokens: {cache.nbytes() / MIB:.2f} MiB, "
        f"full attention {full / MIB:.2f} MiB ({cache.nbytes() / full:.0%})"
    )


if __name__ == "__main__":
    sys.exit(main())
