"""Seconds of an untuned attention's first call, forward and backward, on a GPU.

Each case is a new process with empty caches of its own; ``triton_s`` is what Triton itself takes
for its first kernel ever (it compiles its driver), before ours are timed::

    PYTHONPATH=. python benchmarks/first_call.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from records import header

from flasheva_compile.ops import flasheva_attention

RESULT = Path(__file__).parent / "results" / "first_call.json"
LENGTH, HEADS = 4096, 8
PLAIN = {"window_size": 256, "chunk_size": 16, "causal": True}
RETRIEVING = {**PLAIN, "sink_tokens": 16, "retrieve_chunks": 8}
CASES: dict[str, dict[str, Any]] = {
    "sliding, sinks, D=64": {"head_dim": 64, **PLAIN, "sink_tokens": 16},
    "block, D=128": {"head_dim": 128, **PLAIN, "window": "block"},
    "4 query heads a key head, padded, softcap, D=96": {
        "head_dim": 96,
        "kv_heads": 2,
        "padding": 100,
        "softcap": 30.0,
        **PLAIN,
        "window_size": 192,
        "chunk_size": 32,
        "sink_tokens": 4,
    },
    "bidirectional, D=80": {"head_dim": 80, **PLAIN, "window_size": 128, "causal": False},
    "retrieval, D=64": {"head_dim": 64, "kv_heads": 2, **RETRIEVING},
    "retrieval by bounds, D=128": {
        "head_dim": 128,
        "kv_heads": 2,
        "retrieve_by": "bounds",
        **RETRIEVING,
        "chunk_size": 32,
    },
    "fp32, D=256": {"head_dim": 256, "dtype": "float32", **PLAIN},
}


@triton.jit
def _increment(x_ptr, n, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202, N803 - Triton's
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs) + n)


def seconds(start: float) -> float:
    """Return the time since ``start`` once the GPU has done everything."""
    torch.cuda.synchronize()
    return round(time.monotonic() - start, 3)


def measure(
    *,
    head_dim: int,
    kv_heads: int = HEADS,
    padding: int = 0,
    dtype: str = "bfloat16",
    **options: Any,  # noqa: ANN401 - of the op
) -> dict[str, float]:
    """Time the first calls of one attention in this process."""

    def normal(heads: int) -> torch.Tensor:
        shape = (1, heads, LENGTH, head_dim)
        return torch.randn(shape, device="cuda", dtype=getattr(torch, dtype), requires_grad=True)

    q, k, v = normal(HEADS), normal(kv_heads), normal(kv_heads)
    mask = torch.arange(LENGTH, device="cuda")[None] >= padding if padding else None
    start = time.monotonic()
    _increment[(1,)](torch.zeros(64, device="cuda"), 1, 64)
    found = {"triton_s": seconds(start)}
    start = time.monotonic()
    out, _ = flasheva_attention(q, k, v, key_mask=mask, **options)
    found["forward_s"] = seconds(start)
    dout = torch.ones_like(out)
    start = time.monotonic()
    out.backward(dout)
    return {**found, "backward_s": seconds(start)}


def main() -> None:
    """Measure every case, each in a process of its own, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--commit", help="recorded where git cannot say it")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(**CASES[arguments.case])))
        return
    rows = []
    for name in CASES:
        with tempfile.TemporaryDirectory() as caches:
            own = {"TRITON_CACHE_DIR": f"{caches}/triton", "FLASHEVA_CACHE_DIR": f"{caches}/ours"}
            command = [sys.executable, __file__, "--case", name]
            done = subprocess.run(
                command, env={**os.environ, **own}, check=True, capture_output=True, text=True
            )
        rows.append({"case": name, **json.loads(done.stdout.splitlines()[-1])})
        print(json.dumps(rows[-1]), flush=True)
    described = header(torch.device("cuda"), arguments.commit)
    described |= {"length": LENGTH, "heads": HEADS, "cores": os.cpu_count()}
    arguments.out.write_text(json.dumps({"header": described, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
