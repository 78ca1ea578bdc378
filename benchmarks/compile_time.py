"""Measure what FlashEVA's passes add to the compilation of a 30-layer model.

Writes ``results/compile_time.json``: seconds of each of our stages, and of the whole first call
with every attention left full (Inductor's own work) and rewritten. Compile caches are off.
"""

from __future__ import annotations

import os

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import argparse
import datetime
import json
import platform
import time
from pathlib import Path

import torch
from attention_cpu import device_name
from transformers import LlamaConfig, LlamaForCausalLM

import flasheva_compile as fe

RESULTS = Path(__file__).parent / "results" / "compile_time.json"
LENGTH = 512


def build(layers: int) -> LlamaForCausalLM:
    """Return a randomly initialised model with the shape of SmolLM2-135M."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=4096,
    )
    return LlamaForCausalLM(config)


def first_call(options: dict, layers: int, *, training: bool) -> tuple[float, fe.CompileReport]:
    """Compile anew; return seconds of the first call less a warm one, and the report."""
    torch.compiler.reset()
    model = build(layers).train(training)
    model.compile(backend="flasheva", options=options)
    ids = torch.randint(3, 4096, (1, LENGTH))

    def step() -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(training):
            loss = model(input_ids=ids, labels=ids).loss
        if training:
            loss.backward()
        return time.perf_counter() - start

    cold = step()
    return cold - min(step() for _ in range(2)), fe.explain(model)


def measure(layers: int, *, training: bool) -> dict:
    """Measure one kind of graph."""
    full, _ = first_call({"layers": "full"}, layers, training=training)
    rewritten, report = first_call({}, layers, training=training)
    ours = sum(report.seconds.values())
    return {
        "graph": "forward + backward" if training else "forward",
        "rewritten": len(report.rewritten),
        "compile_s_all_full": full,
        "compile_s_rewritten": rewritten,
        "our_stages_s": dict(report.seconds),
        "our_total_s": ours,
        "share_of_compile": ours / rewritten,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    first_call({}, 1, training=False)  # imports and one-time set-up are nobody's compile time
    result = {
        "what": f"{arguments.layers}-layer Llama, fp32, N={LENGTH}, Inductor on CPU, caches off",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "rows": [measure(arguments.layers, training=training) for training in (False, True)],
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
