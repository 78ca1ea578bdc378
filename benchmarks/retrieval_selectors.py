"""What selects chunks best: recall of softmax mass and error of the output, on a real model.

    python benchmarks/retrieval_selectors.py --model MODEL.gguf --text FOLDER

One pass of full attention over held-out text and pass-key prompts keeps queries, keys and values of
some layers. For sampled queries each selector then chooses ``k`` of the visible chunks per kv head:
how much of the softmax mass outside of window and sinks they hold, and how far the layer's output
is from full attention's (other chunks as ``tangent`` tokens). For pass keys also the share of the
key's sentence that is selected, where a head gives it a tenth of its attention or more.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from adaptation_model import load_model
from records import Results, header
from transformers import AttentionInterface, AttentionMaskInterface

from flasheva_compile.evaluation.passkey import make_prompt
from flasheva_compile.evaluation.prompt_tokens import encode

if TYPE_CHECKING:
    from torch import Tensor

RESULT = Path(__file__).parent / "results" / "retrieval_selectors.json"
WINDOW = 256
SOURCES = ("austen", "faq", "linux")
ORACLE = "largest true mass"
COMPARED = ("bounds (mean and Quest)", "keys in 2 bits", ORACLE)  # with weights that were learned
LEAST_MASS = 0.1  # of a head's attention: then it looks for the key's sentence
NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."


class Recorder:
    """An attention function of transformers: full attention that keeps what it is given.

    Attributes:
        layers: Which layers keep their tensors.
        kept: ``(q [Hkv, G, P, D], k [Hkv, N, D], v)`` in fp32 by layer.
        positions: Of the kept queries; None = all.
    """

    def __init__(self, layers: range) -> None:
        self.layers, self.positions = layers, None
        self.kept: dict[int, tuple[Tensor, ...]] = {}

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:  # noqa: ANN401
        """Attend as a layer's attention; transformers calls it."""
        attend = torch.nn.functional.scaled_dot_product_attention
        out = attend(q, k, v, is_causal=True, enable_gqa=True)
        if module.layer_idx in self.layers:
            part = q[0] if self.positions is None else q[0, :, self.positions]
            grouped = part.unflatten(0, (k.shape[1], -1))
            self.kept[module.layer_idx] = tuple(x.float() for x in (grouped, k[0], v[0]))
        return out.transpose(1, 2), None


# --- selectors ------------------------------------------------------------------------------------


def logits_of(q: Tensor, keys: Tensor, phis: Tensor) -> dict[str, Tensor]:
    """Return chunk scores ``[Hkv, G, P, C]`` by selector; ``keys [Hkv, C, c, D]``.

    ``phis [Hkv, 1 + r, D]``: the mean query, then the centres of clusters of queries.
    """
    scale, c = q.shape[-1] ** -0.5, keys.shape[2]
    q = q * scale
    mean, (low, high) = keys.mean(2), torch.aminmax(keys, dim=2)
    deviation = keys - mean[:, :, None]
    variance = deviation.square().mean(2)
    by_mean = times(q, mean)
    most = times(q, (low + high) / 2) + times(q.abs(), (high - low) / 2)
    spread = times(q.square(), variance)
    tangents = [tangent(q, keys, phis[:, n], scale) for n in range(phis.shape[1])]
    halves = keys.unflatten(2, (2, c // 2)).unbind(2)
    return {
        "mean key": by_mean,
        "tangent": tangents[0],
        f"tangent, {len(tangents) - 1} phi": torch.stack(tangents[1:]).amax(0),
        "Quest's bounds": most,
        "mean + variance / 2": by_mean + spread / 2,
        "mean + 2 deviations": by_mean + 2 * spread.sqrt(),
        "bounds (mean and Quest)": (by_mean + most) / 2,
        "bounds of both halves": torch.stack([halfway(q, x) for x in halves]).amax(0),
        "keys in 1 bit": members(q, mean, deviation.sign() * deviation.abs().mean(2, True)),
        "keys in 2 bits": members(q, mean, two_bits(deviation)),
        "all keys": members(q, mean, deviation),
    }


def times(q: Tensor, vectors: Tensor) -> Tensor:
    """Return products ``[Hkv, G, P, C]`` of queries and vectors ``[Hkv, C, D]``."""
    return q @ vectors[:, None].mT


def halfway(q: Tensor, keys: Tensor) -> Tensor:
    """Score as ``retrieve_by="bounds"`` does; ``q`` times the scale."""
    low, high = torch.aminmax(keys, dim=2)
    centre, spread = keys.mean(2) / 2 + (low + high) / 4, (high - low) / 4
    return times(q, centre) + times(q.abs(), spread)


def weighted(q: Tensor, keys: Tensor, weight: Tensor) -> Tensor:
    """Score by bounds with weights ``[Hkv, 3, D]`` of mean, middle and half the range."""
    low, high = torch.aminmax(keys, dim=2)
    of_mean, of_middle, of_range = weight[:, :, None].unbind(1)
    centre = of_mean * keys.mean(2) + of_middle * (low + high) / 2
    return times(q, centre) + times(q.abs(), of_range * (high - low) / 2)


def tangent(q: Tensor, keys: Tensor, phi: Tensor, scale: float) -> Tensor:
    """Return chunk logits of the ``tangent`` rule; ``q`` times the scale."""
    pooled, bias, _ = tangent_tokens(keys, phi, scale)
    return times(q, pooled) + bias[:, None, None]


def tangent_tokens(keys: Tensor, phi: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return pooled keys ``[Hkv, C, D]``, biases ``[Hkv, C]`` and weights ``[Hkv, C, c]``."""
    logits = scale * torch.einsum("hd,hcmd->hcm", phi, keys)
    weights = logits.softmax(-1)
    pooled = torch.einsum("hcm,hcmd->hcd", weights, keys)
    bias = logits.logsumexp(-1) - scale * torch.einsum("hd,hcd->hc", phi, pooled)
    return pooled, bias, weights


def members(q: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Return the log-mass of chunks whose keys are ``mean + deviation``."""
    keys = (mean[:, :, None] + deviation).flatten(1, 2)
    return times(q, keys).unflatten(-1, deviation.shape[1:3]).logsumexp(-1)


def two_bits(deviation: Tensor) -> Tensor:
    """Round deviations to four levels per channel and chunk."""
    largest = deviation.abs().amax(2, keepdim=True).clamp(min=1e-6)
    level = ((deviation / largest + 1) * 1.5).round().clamp(0, 3) / 1.5 - 1
    return 0.8 * level * largest


def over_heads(found: dict[str, Tensor], visible: Tensor) -> dict[str, Tensor]:
    """Combine query heads, ``[Hkv, P, C]``: their maximum; for some also otherwise."""
    scores = {name: x.amax(1) for name, x in found.items()}
    for name in ("tangent", "bounds (mean and Quest)", "all keys"):
        shares = found[name].masked_fill(~visible, -torch.inf).softmax(-1)
        scores[f"{name}; sum of exp"] = found[name].logsumexp(1)
        scores[f"{name}; sum of shares"] = shares.nan_to_num().sum(1)
    return scores


# --- measuring ------------------------------------------------------------------------------------


def measure(
    kept: tuple[Tensor, ...],
    positions: Tensor,
    phis: Tensor,
    c: int,
    counts: list[int],
    needle: slice | None,
    weights_of_bounds: dict[str, Tensor] | None = None,
) -> dict[tuple[str, int], list[float]]:
    """Return sums for each selector and count: mass, all mass, squared error, size, needle, all.

    With ``weights_of_bounds``, ``[Hkv, 3, D]`` by name, of bounds so weighted and of few others.
    """
    q, k, v = kept
    scale, chunks = q.shape[-1] ** -0.5, k.shape[1] // c
    n = chunks * c
    scores = (scale * times(q, k)).masked_fill(
        torch.arange(k.shape[1]) > positions[:, None], -torch.inf
    )
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp()
    full = weights @ v[:, None]
    start = (positions - WINDOW + 1).clamp(min=0) // c * c
    slot = torch.arange(chunks)
    visible = (slot >= 1) & ((slot + 1) * c <= start[:, None])
    mass = weights[..., :n].unflatten(-1, (chunks, c)).sum(-1)
    keys, values = (x[:, :n].unflatten(1, (chunks, c)) for x in (k, v))
    pooled, bias, shares = tangent_tokens(keys, phis[:, 0], scale)
    tokens = (scale * times(q, pooled) + bias[:, None, None] - lse).exp()
    token_values = torch.einsum("hcm,hcmd->hcd", shares, values)
    selectors = over_heads(logits_of(q, keys, phis), visible) | {ORACLE: mass.sum(1)}
    if weights_of_bounds is not None:
        selectors = {name: selectors[name] for name in COMPARED}
        for name, w in weights_of_bounds.items():
            selectors[name] = weighted(q * scale, keys, w).amax(1)
    sums: dict[tuple[str, int], list[float]] = {}
    for name, score in selectors.items():
        order = score.masked_fill(~visible, -torch.inf).topk(max(counts), -1).indices
        for count in counts:
            chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, order[..., :count], 1)
            chosen = (chosen & visible)[:, None]
            left = visible & ~chosen
            exact = weights.clone()
            exact[..., :n] *= ~left.repeat_interleave(c, -1)
            rest = tokens * left
            total = exact.sum(-1, keepdim=True) + rest.sum(-1, keepdim=True)
            out = (exact @ v[:, None] + rest @ token_values[:, None]) / total
            found = [(mass * chosen).sum(), (mass * visible).sum()]
            found += [(out - full).square().sum(), full.square().sum()]
            sums[name, count] = [*map(float, found), *of_needle(mass, chosen, needle, c)]
    return sums


def of_needle(mass: Tensor, chosen: Tensor, needle: slice | None, c: int) -> list[float]:
    """Return how much of the attention to a pass key's sentence is to selected chunks, and all."""
    if needle is None:
        return [0.0, 0.0]
    part = slice(needle.start // c, (needle.stop - 1) // c + 1)
    on_it = mass[..., part].sum(-1)
    looks = on_it >= LEAST_MASS
    return [float(((mass * chosen)[..., part].sum(-1) * looks).sum()), float((on_it * looks).sum())]


def clusters(q: Tensor, count: int) -> Tensor:
    """Return ``[Hkv, 1 + n, D]``: mean and ``count`` centres of k-means of ``q [Hkv, G, P, D]``."""
    flat = q.flatten(1, 2)
    chance = torch.Generator().manual_seed(0)
    centres = flat[:, torch.randperm(flat.shape[1], generator=chance)[:count]]
    for _ in range(12):
        nearest = (flat @ centres.mT - centres.square().sum(-1)[:, None] / 2).argmax(-1)
        member = torch.nn.functional.one_hot(nearest, count).float()
        sizes = member.sum(1)[..., None]
        centres = torch.where(sizes > 0, member.mT @ flat / sizes.clamp(min=1), centres)
    return torch.cat([flat.mean(1, keepdim=True), centres], 1)


# --- the model and its texts ----------------------------------------------------------------------


def main() -> None:
    """Measure, print and store."""
    a = parse_arguments()
    torch.set_num_threads(a.threads)
    names = ("tokens", "queries", "phis", "chunk_sizes", "counts")
    described = {**header(torch.device("cpu"), a.commit), "model": a.model.name}
    described |= {name: getattr(a, name) for name in names}
    described["mass"] = "of the softmax outside of window (256) and one chunk of sinks"
    results = Results(path=a.out, identity=("text", "c", "k", "selector"), header=described)
    model: Any = load_model(a.model, torch.bfloat16).eval()
    layers = range(a.first_layer, model.config.num_hidden_layers, a.layer_step)
    results.header["layers"] = list(layers)
    recorder = Recorder(layers)
    AttentionInterface.register("recorder", recorder)
    AttentionMaskInterface.register("recorder", lambda *_, **__: None)
    model.config._attn_implementation = "recorder"
    text = dict(np.load(a.text / "tokens.npz"))
    phis = calibrated(
        a, model, recorder, torch.from_numpy(text["train"][-1, :2048].astype(np.int64))
    )
    streams = {
        source: torch.from_numpy(text[f"test_{source}"][: a.tokens].astype(np.int64))
        for source in a.sources
    }
    for source, ids in streams.items():
        chance = torch.Generator().manual_seed(0)
        positions = torch.randperm(len(ids) - 1024, generator=chance)[: a.queries] + 1024
        run(model, recorder, ids, positions.sort().values)
        add_rows(a, results, source, {source: sums_of(a, recorder, phis, None)})
    tokenizer = transformers.AutoTokenizer.from_pretrained(a.text)
    found = {}
    for sample in range(a.passkeys):
        ids, needle, answer = prompt(tokenizer, a.passkey_length, sample)
        run(model, recorder, ids, torch.arange(len(ids) - answer - 1, len(ids) - 1))
        found[sample] = sums_of(a, recorder, phis, needle)
    if found:
        add_rows(a, results, f"pass keys {a.passkey_length}", found)


def run(model: Any, recorder: Recorder, ids: Tensor, positions: Tensor | None) -> None:  # noqa: ANN401
    """Let the recorder see a text."""
    recorder.positions = positions
    with torch.no_grad():
        model.model(ids[None], use_cache=False)


def calibrated(a: argparse.Namespace, model: Any, recorder: Recorder, ids: Tensor) -> dict:  # noqa: ANN401
    """Return each layer's mean query and clusters of queries."""
    run(model, recorder, ids, None)
    return {layer: clusters(q, a.phis) for layer, (q, _, _) in recorder.kept.items()}


def prompt(tokenizer: Any, length: int, sample: int) -> tuple[Tensor, slice, int]:  # noqa: ANN401
    """Return a prompt with its answer, where the key's sentence stands, and the answer's length."""
    tokens, key, _ = make_prompt(tokenizer, length, f"0/{length}/{sample}")
    answer = encode(tokenizer, f" {key}")
    sentence = encode(tokenizer, NEEDLE.format(key=key))
    spans = (n for n in range(length) if tokens[n : n + len(sentence)] == sentence)
    start = next(spans)
    return torch.tensor(tokens + answer), slice(start, start + len(sentence)), len(answer)


def sums_of(
    a: argparse.Namespace, recorder: Recorder, phis: dict, needle: slice | None
) -> list[dict[tuple[str, int, int], list[float]]]:
    """Return :func:`measure` of every kept layer, by selector, chunk size and count."""
    positions: Any = recorder.positions
    found = []
    for layer, kept in recorder.kept.items():
        row = {}
        for c in a.chunk_sizes:
            part = measure(kept, positions, phis[layer], c, a.counts, needle)
            row |= {(name, c, count): sums for (name, count), sums in part.items()}
        found.append(row)
    return found


def add_rows(a: argparse.Namespace, results: Results, text: str, found: dict) -> None:
    """Add one row per selector, chunk size and count: means over layers and prompts."""
    runs = [row for rows in found.values() for row in rows]
    for name, c, count in runs[0]:
        sums = torch.tensor([row[name, c, count] for row in runs], dtype=torch.float64)
        mass, of_all, _, _, needle, of_needle_ = sums.sum(0).tolist()
        error = float((sums[:, 2] / sums[:, 3]).mean())
        row = {"text": text, "c": c, "k": count, "selector": name}
        row |= {"recall": round(mass / of_all, 4), "output_error": round(error, 5)}
        if of_needle_:
            row["needle"] = round(needle / of_needle_, 4)
        results.add(row)
        print(json.dumps(row), flush=True)
    assert all(math.isfinite(row["output_error"]) for row in results.rows)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a GGUF file")
    add("--text", type=Path, required=True, help="what adaptation_text.py wrote")
    add("--sources", nargs="+", default=list(SOURCES))
    add("--tokens", type=int, default=8192)
    add("--queries", type=int, default=64, help="per text")
    add("--chunk-sizes", type=int, nargs="+", default=[16, 32])
    add("--counts", type=int, nargs="+", default=[8, 16, 32])
    add("--phis", type=int, default=4, help="clusters of queries")
    add("--first-layer", type=int, default=2)
    add("--layer-step", type=int, default=4)
    add("--passkeys", type=int, default=4, help="prompts")
    add("--passkey-length", type=int, default=7600)
    add("--threads", type=int, default=1)
    add("--out", type=Path, default=RESULT)
    add("--commit", help="recorded where git cannot say it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
