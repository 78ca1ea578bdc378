"""Survey attention in the architectures of the installed transformers, and of PyTorch's modules.

``python -m tests.models.gallery`` writes ``docs/gallery.md``; names as arguments survey only those
and print them. Every model is built from its own configuration class, made tiny, with random
weights; one that does not build or run within the limits is listed as such.
"""

from __future__ import annotations

import collections
import copy
import json
import logging
import multiprocessing
import signal
import sys
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

import flasheva_compile as fe
from tests.models.oracle import assert_as_accurate

DOCUMENT = Path(__file__).parents[2] / "docs" / "gallery.md"
WHOLE = {"window_size": 8192, "chunk_size": 8, "inner_backend": "eager"}
SECONDS, PARAMETERS, LENGTH = 25, 40_000_000, 24
SMALL = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "embed_dim": 32,
    "encoder_hidden_size": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "d_ff": 64,
    "d_inner": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 99,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "num_mel_bins": 16,
}


@dataclass
class Entry:
    """What a survey of one architecture found."""

    name: str
    found: int = 0
    rewritten: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    not_seen: tuple[str, ...] = ()
    exact: str = ""
    failure: str = ""


class TooSlowError(Exception):
    """The time for one architecture is over."""


@contextmanager
def limited(seconds: int):
    def stop(*_: object) -> None:
        raise TooSlowError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def names() -> list[str]:
    """Architectures with a base model, then PyTorch's own modules."""
    return [*sorted(set(MODEL_MAPPING_NAMES) & set(CONFIG_MAPPING)), *MODULES]


def make_small(config: Any) -> None:
    """Shrink a configuration and those inside it, as far as it has the fields."""
    stages = any(isinstance(vars(config).get(n), list | tuple) for n in ("num_heads", "depths"))
    for name, value in ({} if stages else SMALL).items():
        present = name in config.attribute_map or name in vars(config)
        if present and isinstance(getattr(config, name, None), int):
            setattr(config, name, value)
    for name in ("layer_types", "mlp_layer_types", "block_types", "layers_block_type"):
        kinds = vars(config).get(name)
        if isinstance(kinds, list) and kinds:
            setattr(config, name, list(dict.fromkeys(kinds))[:2] * 2)
            setattr(config, name, getattr(config, name)[:2])
    for part in vars(config).values():
        if isinstance(part, transformers.PretrainedConfig):
            make_small(part)


def build(name: str) -> nn.Module:
    """Build a tiny random model in evaluation mode."""
    torch.manual_seed(0)
    if name in MODULES:
        return MODULES[name]().eval()
    config = CONFIG_MAPPING[name]()
    make_small(config)
    kind = AutoModelForCausalLM if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModel
    with torch.device("meta"):
        size = sum(p.numel() for p in kind.from_config(config).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters even when small")
    return kind.from_config(config).eval()


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Guess the inputs from what the model calls its main one."""
    generator = torch.Generator().manual_seed(1)
    if not hasattr(model, "config"):
        return {"x": torch.randn(2, LENGTH, 16, generator=generator)}
    main, config = model.main_input_name, model.config
    if main == "pixel_values":
        side = getattr(config, "image_size", 32)
        side = side if isinstance(side, int) else side[0]
        channels = getattr(config, "num_channels", 3)
        return {main: torch.randn(2, channels, side, side, generator=generator)}
    if main == "input_values":
        return {main: torch.randn(2, 4000, generator=generator)}
    if main == "input_features":
        bins = getattr(config, "num_mel_bins", 16)
        return {main: torch.randn(2, bins, 2 * LENGTH, generator=generator)}
    given = {"input_ids": torch.randint(3, 99, (2, LENGTH), generator=generator)}
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = given["input_ids"].flip(1)
    return given


def survey(name: str) -> Entry:
    """Explain one architecture, and compare it compiled with itself as it is."""
    entry = Entry(name)
    try:
        with limited(SECONDS), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _survey(entry, name)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        entry.failure = f"{type(error).__name__}: {lines[0][:90]}"
    return entry


def _survey(entry: Entry, name: str) -> None:
    model = build(name)
    given = inputs_of(model)
    plain = _tensors(model(**given))
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    compiled.compile(backend="flasheva", options=WHOLE)
    ours = _tensors(compiled(**given))
    report = fe.explain(compiled)
    entry.found, entry.rewritten = len(report.layers), len(report.rewritten)
    entry.refused = dict(collections.Counter(row.reason for row in report.left_full))
    entry.not_seen = report.warnings
    if entry.rewritten:
        entry.exact = _compared(model, given, ours, plain)
        if entry.exact.startswith("DIFFERS"):
            entry.exact = _as_dynamo_runs_it(model, given, ours) or entry.exact


def _compared(model: nn.Module, given: dict, ours: list, plain: list) -> str:
    try:
        truth = _tensors(
            copy.deepcopy(model).double()(
                **{n: x.double() if x.is_floating_point() else x for n, x in given.items()}
            )
        )
    except TooSlowError:
        raise
    except Exception:
        return "does not run in double precision"
    if not all(true.isfinite().all() for true in truth):
        return "not finite in double precision"
    try:
        for got, own, true in zip(ours, plain, truth, strict=True):
            assert_as_accurate(got, [own], true)
    except AssertionError as error:
        return f"DIFFERS: {error}"
    return "yes"


def _as_dynamo_runs_it(model: nn.Module, given: dict, ours: list) -> str:
    """Compare with the model under Dynamo alone: some models choose other masks there."""
    torch._dynamo.reset()
    traced = copy.deepcopy(model)
    traced.compile(backend="eager")
    for got, own in zip(ours, _tensors(traced(**given)), strict=True):
        error = (got - own).abs().max()
        if not error <= 64 * torch.finfo(own.dtype).eps * own.abs().max().clamp(min=1):
            return ""
    return "yes, as under Dynamo alone"


def _tensors(output: Any) -> list[torch.Tensor]:
    """The first tensor that a model returns."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    return [next(v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())]


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` of one sequence, weights not asked for or not used."""

    def __init__(self, need_weights: bool = False):
        super().__init__()
        self.need_weights = need_weights
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class Wrapped(nn.Module):
    """Dynamo does not look into a module of PyTorch's own that is compiled in place."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def _encoder() -> nn.Module:
    # The fused layer of evaluation would hide the attention.
    torch.backends.mha.set_fastpath_enabled(False)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return Wrapped(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def _attention(need_weights: bool) -> nn.Module:
    torch.backends.mha.set_fastpath_enabled(False)
    return SelfAttention(need_weights)


MODULES = {
    "torch.nn.MultiheadAttention": lambda: _attention(False),
    "torch.nn.MultiheadAttention, weights unused": lambda: _attention(True),
    "torch.nn.TransformerEncoder": _encoder,
}


def document(entries: list[Entry]) -> str:
    """Write the table."""
    ran = [e for e in entries if not e.failure]
    attending = [e for e in ran if e.found]
    found, rewritten = sum(e.found for e in ran), sum(e.rewritten for e in ran)
    reasons: collections.Counter[str] = collections.Counter()
    for entry in ran:
        reasons.update({_short(reason): n for reason, n in entry.refused.items()})
    exact = sum(e.exact.startswith("yes") for e in ran)
    lines = [
        "# Gallery",
        "",
        f"Attention in the architectures of transformers {transformers.__version__} and in modules",
        f"of torch {torch.__version__.split('+')[0]}, tiny, with random weights, in evaluation",
        "mode, without padding. Made by `make gallery`.",
        "",
        f"- {len(entries)} architectures; {len(ran)} build and run within {SECONDS} s as they are",
        f"  configured here, {len(attending)} of them attend.",
        f"- {found} attentions found, {rewritten} rewritten, {found - rewritten} left full, each",
        "  with a reason (equal rows of a report count once).",
        "- With a window over every token the compiled model equals the model to rounding in",
        f"  {exact} of {sum(bool(e.exact) for e in ran)} that were rewritten in part or entirely.",
        "",
        "| left full because | attentions |",
        "|---|--:|",
        *(f"| {reason} | {count} |" for reason, count in reasons.most_common()),
        "",
        "| architecture | found | rewritten | left full because | equal |",
        "|---|--:|--:|---|---|",
        *map(_row, attending),
        "",
        "No attention seen: " + ", ".join(e.name for e in ran if not e.found) + ".",
        "",
        "Not surveyed, since they do not build or run here:",
        "",
        *(f"- {e.name}: `{e.failure}`" for e in entries if e.failure),
    ]
    return "\n".join(lines) + "\n"


def _row(entry: Entry) -> str:
    reasons = "; ".join(f"{_short(reason)} ({n})" for reason, n in entry.refused.items())
    notes = "; ".join(note for note in entry.not_seen)
    text = "; ".join(filter(None, (reasons, notes)))
    return f"| {entry.name} | {entry.found} | {entry.rewritten} | {text} | {entry.exact} |"


def _short(reason: str) -> str:
    """The reason without what differs from model to model."""
    return reason.split(": ")[0].replace("|", "or").split(" for ")[0]


def _quiet() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)


def main(arguments: list[str]) -> None:
    """Survey everything and write the document, or print what was asked for."""
    entries = []
    # Fresh processes now and then: compiled code is kept as long as a process lives.
    pool = multiprocessing.get_context("spawn").Pool(2, _quiet, maxtasksperchild=40)
    with pool:
        for entry in pool.imap(survey, arguments or names()):
            entries.append(entry)
            print(json.dumps(asdict(entry)), flush=True)
    if not arguments:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(entries))


if __name__ == "__main__":
    main(sys.argv[1:])
