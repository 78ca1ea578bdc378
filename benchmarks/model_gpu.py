"""GPU time and memory of a whole language model, attention rewritten or not, as JSON.

Run ``PYTHONPATH=. python benchmarks/model_gpu.py``. A GPT-NeoX with 410M random parameters reads
one sequence (prefill, last logits only) and makes training steps (forward and backward of the loss
over all tokens, without an optimizer), compiled with

- ``flasheva``: ``model.compile(backend="flasheva")``, pooling included;
- ``sdpa``: ``torch.compile`` of the model as transformers ships it;
- ``sdpa_is_causal``: the same, with a mask function that leaves causality to SDPA's ``is_causal``,
  so that its flash kernel runs whichever mask transformers would have built.

The loss is computed in chunks of tokens outside of the compiled model, alike for all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attention_gpu import power_of_two_or_k
from records import OUT_OF_TIME, Results, Row, header, restart
from timing import DeviceLostError, Effort, describe, measure, release, side_stream
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.masking_utils import AttentionMaskInterface

import flasheva_compile as fe

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

RESULT = Path(__file__).parent / "results" / "model_gpu.json"
CONTESTANTS = ("flasheva", "sdpa_is_causal", "sdpa")
PASSES = ("prefill", "train")
CAUSAL = "is_causal_only"  # transformers takes any name with "flash" in it for FlashAttention
IDENTITY = ("contestant", "pass", "length", "layers", "hidden", "checkpointing", "cudagraphs")


def attend_causally(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Call SDPA as transformers does where it passes no mask."""
    options = {"is_causal": True, "scale": scaling}
    out = functional.scaled_dot_product_attention(query, key, value, **options)
    return out.transpose(1, 2).contiguous(), None


def no_mask(*_: object, **__: object) -> None:
    """Build no mask."""


AttentionInterface.register(CAUSAL, attend_causally)
AttentionMaskInterface.register(CAUSAL, no_mask)


def build_model(a: argparse.Namespace, contestant: str, length: int) -> GPTNeoXForCausalLM:
    """Return a randomly initialised model, the same weights for every contestant."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=a.vocab,
        hidden_size=a.hidden,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        intermediate_size=4 * a.hidden,
        max_position_embeddings=length,
        use_cache=False,
    )
    with torch.device(a.device):
        model = GPTNeoXForCausalLM(config).to(getattr(torch, a.dtype))
    model.set_attn_implementation(CAUSAL if contestant == "sdpa_is_causal" else "sdpa")
    if a.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def compile_model(a: argparse.Namespace, model: torch.nn.Module, contestant: str) -> None:
    """Compile in place."""
    if a.no_compile and contestant != "flasheva":
        return
    inductor = {"triton.cudagraphs": True} if a.cudagraphs else {}
    if contestant != "flasheva":
        model.compile(dynamic=False, options=inductor)
        return
    sizes = {"window_size": a.window_size, "chunk_size": a.chunk_size, "window": a.window}
    layers = {"default": {**sizes, "sink_tokens": a.sink_tokens}}
    options: dict[str, Any] = {"layers": layers, **inductor}
    if a.no_compile:
        options["inner_backend"] = "eager"
    model.compile(backend="flasheva", dynamic=False, options=options)


def chunked_loss(head: torch.nn.Module, hidden: Tensor, ids: Tensor, size: int) -> Tensor:
    """Return the mean next-token loss; logits exist for one chunk of tokens at a time."""

    def of_chunk(states: Tensor, targets: Tensor) -> Tensor:
        logits = head(states).flatten(0, 1).float()
        return functional.cross_entropy(logits, targets.flatten(), reduction="sum")

    states, targets = hidden[:, :-1].split(size, 1), ids[:, 1:].split(size, 1)
    parts = [
        checkpoint(of_chunk, s, t, use_reentrant=False)
        for s, t in zip(states, targets, strict=True)
    ]
    return torch.stack(parts).sum() / ids[:, 1:].numel()


def step_function(
    a: argparse.Namespace, contestant: str, length: int, step: str
) -> tuple[Callable[[], object], torch.nn.Module]:
    """Return what is timed, and the compiled module."""
    model = build_model(a, contestant, length)
    generator = torch.Generator(a.device).manual_seed(1)
    ids = torch.randint(3, a.vocab, (1, length), device=a.device, generator=generator)
    if step == "prefill":
        model.eval()
        compile_model(a, model, contestant)
        run = torch.no_grad()(lambda: model(ids, use_cache=False, logits_to_keep=1).logits)
        return run, model
    model.train()
    body, head = model.base_model, model.get_output_embeddings()
    compile_model(a, body, contestant)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def train() -> object:
        torch.compiler.cudagraph_mark_step_begin()
        hidden = body(ids, use_cache=False).last_hidden_state
        loss = chunked_loss(head, hidden, ids, a.loss_chunk)
        return torch.autograd.grad(loss, parameters)

    return train, body


def attentions(module: torch.nn.Module) -> Row:
    """Count the attentions that were rewritten; fewer than all is no measurement of FlashEVA."""
    report = fe.explain(module)
    row: Row = {"attentions_rewritten": len(report.rewritten)}
    row["attentions_left_full"] = len(report.left_full)
    reasons = dict.fromkeys(layer.reason for layer in report.unexpected)
    return row | ({"left_full_because": list(reasons)} if reasons else {})


def measure_row(a: argparse.Namespace, row: Row, effort: Effort) -> Row:
    """Measure one contestant in one pass at one length."""
    torch.compiler.reset()
    contestant, length = row["contestant"], row["length"]
    try:
        function, module = step_function(a, contestant, length, row["pass"])
        measured = measure([function], torch.device(a.device), effort)
        layers = attentions(module) if contestant == "flasheva" else {}
    except Exception as error:  # noqa: BLE001, RUF100 - the run goes on, the row says why
        return {**row, "error": describe(error)}
    return {**row, **measured.fields(), **layers, "tokens_per_s": round(length / measured.ms * 1e3)}


def add_ratios(rows: list[Row]) -> None:
    """Add, to rows of FlashEVA, how many times longer each other model takes."""
    same = IDENTITY[1:]
    for row, peer in itertools.product(rows, rows):
        if row["contestant"] != "flasheva" or peer["contestant"] == "flasheva":
            continue
        if "ms" in row and "ms" in peer and all(row[f] == peer[f] for f in same):
            row[f"vs_{peer['contestant']}"] = round(peer["ms"] / row["ms"], 3)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add, size = parser.add_argument, power_of_two_or_k
    add("--lengths", type=size, nargs="+", default=[16384, 65536], help="tokens; 64k = 65536")
    add("--passes", choices=PASSES, nargs="+", default=list(PASSES))
    add("--contestants", choices=CONTESTANTS, nargs="+", default=list(CONTESTANTS))
    add("--layers", type=int, default=24)
    add("--hidden", type=int, default=1024)
    add("--heads", type=int, default=16)
    add("--vocab", type=int, default=50304)
    add("--window-size", type=int, default=256)
    add("--chunk-size", type=int, default=16)
    add("--window", choices=("sliding", "block"), default="sliding")
    add("--sink-tokens", type=int, default=16)
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--loss-chunk", type=int, default=4096, help="tokens whose logits exist at a time")
    add("--checkpointing", action="store_true", help="recompute every layer in the backward")
    add("--cudagraphs", action="store_true", help="let Inductor capture CUDA graphs, for all alike")
    add("--no-compile", action="store_true", help="rewrite, but compile nothing: a trial")
    add("--budget-s", type=float, default=math.inf, help="start nothing new after that")
    add("--measure-ms", type=float, default=2000.0)
    add("--device", default="cuda:0")
    add("--out", type=Path, default=RESULT)
    add("--resume", action="store_true", help="keep the rows that --out has")
    add("--commit", help="recorded where git cannot say it")
    add("--dry-run", action="store_true", help="one sample each: does everything run?")
    return parser.parse_args()


def run(a: argparse.Namespace, results: Results, deadline: float) -> None:
    """Measure what is not there yet, one row after the other."""
    effort = Effort(measure_ms=a.measure_ms, min_samples=3, graphs=False)
    if a.dry_run:
        effort = Effort(measure_ms=0.0, warmup_ms=0.0, min_samples=1, graphs=False)
    shape = {name: getattr(a, name) for name in IDENTITY[3:]}
    for length, step, name in itertools.product(a.lengths, a.passes, a.contestants):
        row: Row = {"contestant": name, "pass": step, "length": length, **shape}
        if results.has(row):
            continue
        if time.monotonic() > deadline:
            results.add({**row, "skipped": OUT_OF_TIME})
            continue
        results.add(measure_row(a, row, effort))
        add_ratios(results.rows)
        print(json.dumps(results.rows[-1]), flush=True)
        release(torch.device(a.device))


def main() -> None:
    """Measure, print and store."""
    a = parse_arguments()
    device, deadline = torch.device(a.device), time.monotonic() + a.budget_s
    names = (
        "vocab",
        "heads",
        "dtype",
        "window",
        "window_size",
        "chunk_size",
        "sink_tokens",
        "loss_chunk",
    )
    described = {**header(device, a.commit), **{name: getattr(a, name) for name in names}}
    results = Results(path=a.out, identity=IDENTITY, header=described)
    if a.resume:
        results.resume()
    try:
        with side_stream(device):
            run(a, results, deadline)
    except DeviceLostError as error:
        results.header["device_lost"] = str(error)
        left = deadline - time.monotonic()
        results.write()
        if left < 1:
            sys.exit(str(error))
        restart(a.out, min(left, 1e6))
    add_ratios(results.rows)
    results.write()


if __name__ == "__main__":
    main()
