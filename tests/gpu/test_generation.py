"""Generation on a GPU: kernels against the blocked code, CUDA graphs, prepared models."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import flasheva_compile as fe
from flasheva_compile import cache_ops
from flasheva_compile.cache_ops import cache_options, new_state
from flasheva_compile.config import EvaConfig
from tests.models.test_generate import GREEDY, SMALL, generate, llama, perturb, tokens
from tests.tolerance import assert_as_accurate_as_pytorch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CASES = {
    "sliding": {},
    "block": {"window": "block"},
    "mean": {"rule": "mean"},
    "evabyte": {"rule": "evabyte"},
    "sinks": {"sinks": 48},
    "d128": {"size": 128},
    "d80": {"size": 80},
    "values": {"size": 64, "values": 96},
    "group": {"group": 7},
    "chunk 8": {"chunk": 8},
    "padding": {"padding": True},
    "softcap": {"softcap": 20.0},
}


def run(dtype, steps=40, *, rule="tangent", window="sliding", sinks=16, chunk=16, size=64,
        values=None, group=4, padding=False, softcap=0.0):  # fmt: skip
    """Fill a cache by one call of 300 tokens, then decode; return every step's result and state."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, prompt = 3, 2, 300

    def normal(*shape):
        return torch.randn(shape, generator=generator).bfloat16().to("cuda", dtype)

    total = prompt + steps
    q = normal(batch, heads * group, total, size)
    k = normal(batch, heads, total, size)
    v = normal(batch, heads, total, values or size)
    given = {"tangent": 1, "evabyte": 2, "mean": 0}[rule]
    parameters = [normal(heads, size) for _ in range(given)]
    mask = None
    if padding:
        mask = torch.rand(batch, total, generator=generator) > 0.2
        mask[1, :250] = False
        mask[2, : prompt + 5] = False
        mask = mask.cuda()
    config = EvaConfig(
        window_size=128, chunk_size=chunk, sink_tokens=sinks, window=window, chunk_rule=rule
    )
    options = cache_options(config, size**-0.5, softcap)
    state = new_state(k, v, total // chunk, options)
    results = []
    for lo, hi in [(0, prompt), *((i, i + 1) for i in range(prompt, total))]:
        part = [x[:, :, lo:hi] for x in (q, k, v)]
        new = None if mask is None else mask[:, lo:hi]
        inputs = (*part, parameters, new, *state)
        if hi - lo > 1:
            torch.ops.flasheva.cache_append(*inputs, **options)
        else:
            results.append(torch.ops.flasheva.decode(*inputs, **options))
    outs, lses = zip(*results, strict=True)
    return [torch.cat(outs, 2).cpu(), torch.cat(lses, 2).cpu(), state.rfa_k.cpu()]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_equal_the_blocked_code(case, dtype):
    def formula(precision):
        with mock.patch.object(cache_ops, "runs_kernels", return_value=False):
            return run(precision, **case)

    assert_as_accurate_as_pytorch(run(dtype, **case), formula, dtype)


def test_a_model_generates_the_same_in_every_way():
    model = llama().cuda().float()
    fe.prepare(model, SMALL)
    perturb_on_cpu(model)
    ids, mask = tokens(3, 21).cuda(), torch.ones(3, 21, dtype=torch.long, device="cuda")
    mask[1, :5] = 0
    growing = generate(model, ids, attention_mask=mask)
    whole = one_pass(model, growing.sequences, torch.nn.functional.pad(mask, (0, 30), value=1))
    steps = torch.stack(growing.logits, 1)
    torch.testing.assert_close(steps, whole[:, 20:-1], rtol=1e-3, atol=1e-3)
    static = model.generate(
        ids, attention_mask=mask, max_new_tokens=30, cache_implementation="static", **GREEDY
    )  # generate compiles decoding with CUDA graphs by itself
    assert torch.equal(static, growing.sequences)


def one_pass(model, ids, mask):
    # generate counts positions from the first real token: phi sees rotated keys
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def perturb_on_cpu(model):
    model.cpu()
    perturb(model)
    model.cuda()


def test_cuda_graph_of_a_step():
    model = fe.prepare(llama().cuda(), SMALL)
    want = generate(model, tokens(1, 21).cuda()).sequences
    cache = fe.FlashEvaCache.for_model(model, max_batch_size=1, max_cache_len=64)
    with torch.no_grad():
        logits = model(want[:, :21], past_key_values=cache).logits
        token = logits[:, -1:].argmax(-1)
        step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        made = [token]
        for _ in range(29):
            logits = step(token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1).clone()
            made.append(token)
    assert torch.equal(torch.cat(made, 1), want[:, 21:])
