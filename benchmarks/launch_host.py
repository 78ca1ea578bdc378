"""Time of the host per layer: a training step's launches and a decode step, without a device.

A stand-in device (``tests/stand_in_device.py``) takes the launches, so that what is timed is Python
and PyTorch's dispatch alone; processor time, best of many, one thread::

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/launch_host.py

The ops are called as a compiled graph calls them (``ops``), and through autograd (``eager``).
"""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.cache_ops import cache_options, new_state
from flasheva_compile.config import EvaConfig
from flasheva_compile.op_checks import OP_VERSION
from flasheva_compile.ops import flasheva_attention
from tests.stand_in_device import stand_in_device

if TYPE_CHECKING:
    from collections.abc import Callable

_SIZES = {"window_size": 256, "chunk_size": 16, "sink_tokens": 16}


def best(run: Callable[[], Any], calls: int = 10, rounds: int = 100) -> float:
    """Return the processor time of one call, the least of many rounds [microseconds]."""
    for _ in range(calls):
        run()
    least = float("inf")
    for _ in range(rounds):
        begin = time.process_time()
        for _ in range(calls):
            run()
        least = min(least, time.process_time() - begin)
    return round(least / calls * 1e6, 1)


def training(length: int) -> dict[str, float]:
    """Time the forward and the backward pass of one attention."""
    q, k, v = (torch.zeros(1, 1, length, 64, dtype=torch.bfloat16) for _ in range(3))
    phi = torch.zeros(1, 64)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, phi)]
    dout = torch.zeros_like(q)
    numbers = {"window": "sliding", "causal": True, "q_offset": 0, "scale": 0.125}
    options = {**_SIZES, **numbers, "softcap": 0.0, "dropout_p": 0.0, "version": OP_VERSION}
    ops, masks = torch.ops.flasheva, (None,) * 4

    def forward() -> object:
        return ops.eva_attention(q, k, v, [phi], *masks, rule="tangent", **options)

    out: Any = forward()

    def backward() -> object:
        inputs = (q, k, v, [phi], *masks)
        return ops.eva_attention_backward(dout, *out, *inputs, rule="tangent", **options)

    def step() -> object:
        out, _ = flasheva_attention(*leaves[:3], parameters=leaves[3:], **_SIZES)
        return torch.autograd.grad(out, leaves, dout)

    with torch.no_grad():
        found = {"ops forward": best(forward), "ops backward": best(backward)}
    return {**found, "eager forward and backward": best(step)}


def decoding(tokens: int) -> dict[str, float]:
    """Time the op of one layer of a decode step, of ``tokens`` tokens."""
    q = torch.zeros(1, 8, tokens, 64, dtype=torch.bfloat16)
    k, v = (torch.zeros(1, 2, tokens, 64, dtype=torch.bfloat16) for _ in range(2))
    phi = torch.zeros(2, 64)
    options = cache_options(EvaConfig(**_SIZES), 0.125)
    state = new_state(k, v, 64, options)

    def step() -> object:
        return torch.ops.flasheva.decode(q, k, v, [phi], None, *state, **options)

    with torch.no_grad():
        return {f"ops decode, {tokens} tokens": best(step)}


def main() -> None:
    """Print one JSON object: what ran to microseconds of the host."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=64, help="tokens of the training step")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with stand_in_device():
        found = {**training(arguments.length), **decoding(1), **decoding(4)}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
