"""Ask a question about a long document: full attention, FlashEVA, FlashEVA with retrieval.

    python examples/long_document.py [--model PATH] [--document FILE] [--question TEXT]
        [--length 4096] [--prefill exact] [--store fp8]

Each answers the same question with the same weights; prints answer, seconds for the prompt,
tokens/s after it, and what the cache takes. Without --document the text is Python's language
reference with one sentence hidden in its middle, which the question asks for. Without --model a
small Llama with random weights reads bytes: nothing is fetched, and what it says means nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched from a hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from generate import MIB, TimedStreamer, encode, load
from transformers import DynamicCache

import flasheva_compile as fe

if TYPE_CHECKING:
    from torch import Tensor

FACT = "The pass phrase of the northern archive is copper lantern."
QUESTION = "According to the text, what is the pass phrase of the northern archive?"
HEADER = ("attention", "prompt [s]", "tokens/s", "cache [MiB]", "on the host", "answer")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one arm said, and what it took.

    Attributes:
        name: Of the arm.
        text: The answer.
        prompt_seconds: Reading the document and question.
        rate: Tokens per second after that.
        cache_bytes: Of the cache, on the model's device.
        host_bytes: Of exact keys in host memory.
    """

    name: str
    text: str
    prompt_seconds: float
    rate: float
    cache_bytes: int
    host_bytes: int = 0

    def cells(self) -> tuple[str, ...]:
        """Return a row of the table."""
        sizes = [f"{size / MIB:.2f}" for size in (self.cache_bytes, self.host_bytes)]
        answer = " ".join(self.text.split())
        return (self.name, f"{self.prompt_seconds:.2f}", f"{self.rate:.1f}", *sizes, answer)


def main() -> int:
    """Run the example; return the exit status."""
    a = parse_arguments()
    if a.max_new_tokens < 2:
        print("FAILED: --max-new-tokens must be at least 2, to have a speed", file=sys.stderr)
        return 1
    model, tokenizer = load(a)
    inputs = encode(tokenizer, prompt_of(a, tokenizer), model)
    print(f"{inputs['input_ids'].shape[1]} tokens of document and question\n")
    window = {"window_size": a.window_size, "chunk_size": a.chunk_size, "sink_tokens": a.chunk_size}
    retrieval = {**window, "retrieve_chunks": a.retrieve_chunks, "retrieve_by": a.retrieve_by}
    answers = [ask(a, model, tokenizer, inputs, "full", None)]
    for name, config in (("FlashEVA", window), ("FlashEVA + retrieval", retrieval)):
        try:
            fe.prepare(model, config)
            fe.calibrate(model, [inputs["input_ids"][:, : a.calibrate]])
            options = {"store": a.store} if config is retrieval else {}
            cache = fe.FlashEvaCache.for_model(model, prefill=a.prefill, **options)
        except fe.FlashEvaError as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
        answers.append(ask(a, model, tokenizer, inputs, name, cache))
        fe.revert(model)
    print_table([HEADER, *(answer.cells() for answer in answers)])
    if a.prefill == "exact":
        print("\nThe prompt was read by full attention: it differs from the formula's.")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, help="folder of a transformers model, or a GGUF file")
    add("--document", type=Path, help="text file; none = Python's language reference and a fact")
    add("--question", default=QUESTION)
    add("--length", type=int, default=4096, help="of the document, cut there [tokens]")
    add("--window-size", type=int, default=256)
    add("--chunk-size", type=int, default=16)
    add("--retrieve-chunks", type=int, default=16)
    add("--retrieve-by", choices=("token", "bounds"), default="bounds")
    add("--prefill", choices=("formula", "exact"), default="formula", help="how prompts are read")
    add("--store", choices=("device", "offloaded", "fp8"), default="device", help="of keys")
    add("--calibrate", type=int, default=2048, help="tokens of the document to calibrate on")
    add("--max-new-tokens", type=int, default=24)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def prompt_of(a: argparse.Namespace, tokenizer: Any) -> str:  # noqa: ANN401
    """Return document and question; a document of ours gets the fact in its middle."""
    if a.document is not None:
        document = cut(tokenizer, a.document.read_text(), a.length)
    else:
        text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
        half = cut(tokenizer, text, a.length // 2)
        rest = cut(tokenizer, text[len(half) :], a.length // 2)
        document = f"{half}\n\n{FACT}\n\n{rest}"
    return f"{document}\n\n{a.question}"


def cut(tokenizer: Any, text: str, tokens: int) -> str:  # noqa: ANN401
    """Return the first ``tokens`` tokens of a text; bytes where there is no tokenizer."""
    if tokenizer is None:
        return text[:tokens]
    text = text[: 16 * tokens]  # more than enough, and quicker to encode
    spans = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    return text[: spans[min(tokens, len(spans)) - 1][1]]


def ask(
    a: argparse.Namespace,
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    inputs: dict[str, Tensor],
    name: str,
    cache: fe.FlashEvaCache | None,
) -> Answer:
    """Let the model answer with one kind of cache; None = transformers' own."""
    kept: Any = DynamicCache() if cache is None else cache
    streamer = TimedStreamer()
    options = {"past_key_values": kept, "streamer": streamer, "do_sample": False}
    output = model.generate(**inputs, **options, max_new_tokens=a.max_new_tokens)
    new = output[0, inputs["input_ids"].shape[1] :].tolist()
    text = (
        repr(bytes(new)) if tokenizer is None else tokenizer.decode(new, skip_special_tokens=True)
    )
    times = streamer.times
    return Answer(
        name=name,
        text=text,
        prompt_seconds=times[1] - times[0],
        rate=(len(times) - 2) / max(times[-1] - times[1], 1e-9),
        cache_bytes=bytes_of(kept) if cache is None else cache.nbytes(),
        host_bytes=0 if cache is None else cache.host_nbytes(),
    )


def bytes_of(cache: DynamicCache) -> int:
    """Return the bytes of transformers' cache."""
    layers: Any = cache.layers
    return sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values))


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
