"""Several new tokens at once over a cache, on a GPU: kernels against the blocked code."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from flasheva_compile.kernels.blocked import cache as blocked

import flasheva_compile as fe
from flasheva_compile import cache_ops
from flasheva_compile.cache_ops import cache_options, new_state
from flasheva_compile.config import EvaConfig
from tests.gpu.test_generation import CASES, one_pass, parameters_of, perturb_on_cpu
from tests.models.test_generate import GREEDY, SMALL, generate, llama, tokens
from tests.tolerance import assert_as_accurate_as_pytorch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PORTIONS = {
    "drafts": (2, 5, 1, 16, 3, 8),
    "tails": (61, 130),
    "steps and drafts": (1, 1, 6, 40),
    "portions longer than the window": (300, 513),
}


def run(dtype, portions, *, rule="tangent", window="sliding", sinks=16, chunk=16, size=64,
        values=None, group=4, padding=False, softcap=0.0, window_size=128, maps=True):  # fmt: skip
    """Fill a cache by one call of 300 tokens, then go on in portions; return results and state."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, prompt = 3, 2, 300

    def normal(*shape):
        return torch.randn(shape, generator=generator).bfloat16().to("cuda", dtype)

    total = prompt + sum(portions)
    q = normal(batch, heads * group, total, size)
    k = normal(batch, heads, total, size)
    v = normal(batch, heads, total, values or size)
    parameters = parameters_of(rule, heads, size, lambda shape: normal(*shape), maps)
    mask = None
    if padding:
        mask = torch.rand(batch, total, generator=generator) > 0.2
        mask[1, :250] = False
        mask[2, : prompt + 5] = False
        mask = mask.cuda()
    config = EvaConfig(
        window_size=window_size,
        chunk_size=chunk,
        sink_tokens=sinks,
        window=window,
        chunk_rule=rule,
    )
    options = cache_options(config, size**-0.5, softcap)
    state = new_state(k, v, total // chunk, options)
    results, begin = [], 0
    for tokens_ in (prompt, *portions):
        part = slice(begin, begin + tokens_)
        begin += tokens_
        new = None if mask is None else mask[:, part]
        inputs = (*(x[:, :, part] for x in (q, k, v)), parameters, new, *state)
        if part.start == 0:
            torch.ops.flasheva.cache_append(*inputs, **options)
        else:
            results.append(torch.ops.flasheva.decode(*inputs, **options))
    outs, lses = zip(*results, strict=True)
    kept = [state.exact_k, state.rfa_k, state.rfa_v, state.start, state.length]
    return [x.cpu() for x in (torch.cat(outs, 2), torch.cat(lses, 2), *kept)]


def compare(dtype, portions, **case):
    def formula(precision):
        with mock.patch.object(cache_ops, "runs_kernels", return_value=False):
            return run(precision, portions, **case)

    refused = {"side_effect": AssertionError("no kernel")}
    with (
        mock.patch.object(blocked, "decode", **refused),
        mock.patch.object(cache_ops, "pool_chunks", **refused),
    ):
        got = run(dtype, portions, **case)
    assert_as_accurate_as_pytorch(got, formula, dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_equal_the_blocked_code(case, dtype):
    compare(dtype, PORTIONS["drafts"], **case)


@pytest.mark.parametrize("portions", PORTIONS.values(), ids=PORTIONS)
@pytest.mark.parametrize(
    "case",
    [
        *({}, {"window": "block"}, {"padding": True}),
        *({"rule": "eva"}, {"rule": "eva", "padding": True}, {"rule": "eva", "maps": False}),
    ],
    ids=str,
)
def test_portions_of_any_length(portions, case):
    compare(torch.bfloat16, portions, **case)


@pytest.mark.parametrize("rule", ["tangent", "eva"])
def test_equal_calls_give_equal_bits(rule):
    first = run(torch.bfloat16, PORTIONS["drafts"], rule=rule)
    for _ in range(20):
        for x, y in zip(first, run(torch.bfloat16, PORTIONS["drafts"], rule=rule), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("rule", ["tangent", "eva"])
def test_a_captured_call_goes_on_by_itself(rule):
    """The same graph appends four tokens at any length."""
    config = EvaConfig(window_size=64, chunk_size=16, sink_tokens=16, chunk_rule=rule)
    options = cache_options(config, 0.125)
    q = torch.randn(2, 8, 4, 64, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 2, 4, 64, device="cuda", dtype=torch.bfloat16)
    states = [new_state(k, v, 64, options) for _ in range(2)]

    def call(state):
        return torch.ops.flasheva.decode(q, k, v, [], None, *state, **options)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(states[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = call(states[0])
    call(states[1])
    for _ in range(60):
        graph.replay()
        want, _ = call(states[1])
        assert torch.equal(out, want)
    assert states[0].length.item() == 61 * 4


@pytest.mark.parametrize("rule", ["tangent", "eva"])
def test_no_call_waits_for_the_device(rule):
    config = EvaConfig(window_size=64, chunk_size=16, sink_tokens=16, chunk_rule=rule)
    options = cache_options(config, 0.125)
    q = torch.randn(2, 8, 5, 64, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 2, 5, 64, device="cuda", dtype=torch.bfloat16)
    state = new_state(k, v, 64, options)
    mask = torch.ones(2, 5, dtype=torch.bool, device="cuda")
    for given in (None, mask):
        torch.ops.flasheva.decode(q, k, v, [], given, *state, **options)
        torch.ops.flasheva.cache_append(q, k, v, [], given, *state, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for given in (None, mask):
            torch.ops.flasheva.decode(q, k, v, [], given, *state, **options)
            torch.ops.flasheva.cache_append(q, k, v, [], given, *state, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_prompt_lookup_and_chunked_prefill_generate_the_same():
    model = llama().cuda().float()
    fe.prepare(model, SMALL)
    perturb_on_cpu(model)
    ids = tokens(1, 21).cuda()
    plain = generate(model, ids).sequences
    for options in ({"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 7}):
        made = model.generate(ids, max_new_tokens=30, **GREEDY, **options)
        assert torch.equal(getattr(made, "sequences", made), plain), options
    with torch.no_grad():
        cache = fe.FlashEvaCache.for_model(model)
        parts = [model(x, past_key_values=cache).logits for x in plain.split((9, 2, 16, 24), 1)]
    whole = one_pass(model, plain, torch.ones_like(plain))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-3)
