"""What weights of the bounds that ``calibrate`` learns do for selection, by length of the texts.

    python benchmarks/retrieval_selector_weights.py --model MODEL.gguf --text FOLDER

As ``retrieval_selectors.py``, for bounds whose weights were learned on training text, in documents
of several lengths, as many tokens of each; measured on held-out text, near and far in it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from adaptation_model import load_model
from flasheva_compile.kernels.blocked.geometry import AttentionSettings
from records import Results, header
from retrieval_selectors import WINDOW, Recorder, clusters, measure, run, tangent_tokens
from transformers import AttentionInterface, AttentionMaskInterface

from flasheva_compile.adaptation.selector import learn_selector_weight, selector_sample

if TYPE_CHECKING:
    from torch import Tensor

RESULT = Path(__file__).parent / "results" / "retrieval_selector_weights.json"
SOURCES = ("austen", "faq", "linux", "postgres")
PARTS = ((1024, 2048), (2048, 4096), (4096, 8192))  # positions of measured queries
SETTINGS = ((16, 8), (16, 32), (32, 8), (32, 16))  # chunk size, chunks


def main() -> None:
    """Learn, measure, print and store."""
    a = parse_arguments()
    torch.set_num_threads(1)
    described = {**header(torch.device("cpu"), a.commit), "model": a.model.name}
    described |= {name: getattr(a, name) for name in ("learned", "tokens", "queries", "layers")}
    described["worst_layer"] = "largest ratio of a layer's squared error to that of plain bounds"
    names = ("text", "positions", "c", "k", "selector")
    results = Results(path=a.out, identity=names, header=described)
    model: Any = load_model(a.model, torch.bfloat16).eval()
    recorder = Recorder(a.layers)
    AttentionInterface.register("recorder", recorder)
    AttentionMaskInterface.register("recorder", lambda *_, **__: None)
    model.config._attn_implementation = "recorder"
    text = dict(np.load(a.text / "tokens.npz"))
    rows = torch.from_numpy(text["train"].astype(np.int64))
    run(model, recorder, rows[-1, :2048], None)
    phis = {layer: clusters(q, 1) for layer, (q, _, _) in recorder.kept.items()}
    weights = learned(a, model, recorder, rows, phis)
    for source in SOURCES:
        ids = torch.from_numpy(text[f"test_{source}"][:8192].astype(np.int64))
        run(model, recorder, ids, None)
        for first, end in PARTS:
            chance = torch.Generator().manual_seed(0)
            positions = torch.randperm(end - first, generator=chance)[: a.queries] + first
            where = (source, f"{first}-{end}")
            add_rows(results, where, recorder, positions.sort().values, phis, weights)


def learned(
    a: argparse.Namespace,
    model: Any,  # noqa: ANN401
    recorder: Recorder,
    rows: Tensor,
    phis: dict[int, Tensor],
) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Return weights by layer and chunk size, and by the length of what they were learned from."""
    weights: dict[tuple[int, int], dict[str, Tensor]] = {}
    for length in a.learned:
        samples: dict[tuple[int, int], list[Any]] = {}
        for row in rows[: a.tokens // length, :length]:
            run(model, recorder, row, None)
            for layer, (q, k, v) in recorder.kept.items():
                for c in {c for c, _ in SETTINGS}:
                    s = AttentionSettings(
                        window_size=WINDOW,
                        chunk_size=c,
                        sink_tokens=c,
                        window="sliding",
                        causal=True,
                        q_offset=0,
                        scale=q.shape[-1] ** -0.5,
                    )
                    keys, values = (x[:, : len(row) // c * c].unflatten(1, (-1, c)) for x in (k, v))
                    pooled, bias, shares = tangent_tokens(keys, phis[layer][:, 0], s.scale)
                    tokens = (pooled, torch.einsum("hcm,hcmd->hcd", shares, values), bias)
                    sample = selector_sample((q.flatten(0, 1), k, v), tokens, s, 8)
                    samples.setdefault((layer, c), []).append(sample)
        for at, of_layer in samples.items():
            name = f"bounds, weights of {length} tokens"
            weights.setdefault(at, {})[name] = learn_selector_weight(of_layer)
    return weights


def add_rows(
    results: Results,
    where: tuple[str, str],
    recorder: Recorder,
    positions: Tensor,
    phis: dict[int, Tensor],
    weights: dict[tuple[int, int], dict[str, Tensor]],
) -> None:
    """Add one row per selector, chunk size and count: means over layers, and the worst layer."""
    for c in sorted({c for c, _ in SETTINGS}):
        counts = [k for of, k in SETTINGS if of == c]
        found = [
            measure((q[:, :, positions], k, v), positions, phis[layer], c, counts, None, of_layer)
            for layer, (q, k, v) in recorder.kept.items()
            for of_layer in (weights[layer, c],)
        ]
        for name, k in found[0]:
            sums = torch.tensor([row[name, k] for row in found], dtype=torch.float64)
            plain = torch.tensor([row["bounds (mean and Quest)", k] for row in found])
            mass, of_all = sums.sum(0).tolist()[:2]
            worst = (sums[:, 2] / plain[:, 2].clamp(min=1e-30)).max()
            row = dict(zip(("text", "positions"), where, strict=True))
            row |= {"c": c, "k": k, "selector": name, "recall": round(mass / of_all, 4)}
            row["output_error"] = round(float((sums[:, 2] / sums[:, 3]).mean()), 5)
            row["worst_layer"] = round(float(worst), 3)
            results.add(row)
    print(json.dumps(results.rows[-1]), flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a GGUF file")
    add("--text", type=Path, required=True, help="what adaptation_text.py wrote")
    add("--learned", type=int, nargs="+", default=[2048, 8192], help="lengths [tokens]")
    add("--tokens", type=int, default=16384, help="to learn from, of each length")
    add("--queries", type=int, default=24, help="per text and part")
    add("--layers", type=int, nargs="+", default=[2, 6, 10, 14, 18, 22, 26])
    add("--out", type=Path, default=RESULT)
    add("--commit", help="recorded where git cannot say it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
