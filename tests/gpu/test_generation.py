"""Generation on a GPU: kernels against the blocked code, CUDA graphs, prepared models."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from flasheva_compile.kernels.blocked.cache_state import CacheState

import flasheva_compile as fe
from flasheva_compile import cache_ops
from flasheva_compile.cache_ops import cache_options, new_state
from flasheva_compile.config import EvaConfig
from flasheva_compile.generation.exact_layer import ExactCacheLayer
from flasheva_compile.op_checks import OP_VERSION
from tests.kernels.chunk_fp8 import assert_attended, assert_codes
from tests.kernels.decode_cases import DecodeCase
from tests.kernels.extend_cases import ExtendCase, portions_of
from tests.models.test_generate import GREEDY, HYBRIDS, SMALL, generate, llama, perturb, tokens
from tests.tolerance import assert_as_accurate_as_pytorch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# One block that holds every token, and no room for chunk tokens behind it.
WHOLE = {"window": "block", "window_size": 400, "chunk": 400, "sinks": 0, "rule": "mean"}
CASES = {
    "whole": WHOLE,
    "whole, padding": {**WHOLE, "padding": True},
    "whole, d128": {**WHOLE, "size": 128, "group": 1},
    "whole, softcap": {**WHOLE, "values": 96, "group": 7, "softcap": 20.0},
    "sliding": {},
    "block": {"window": "block"},
    "mean": {"rule": "mean"},
    "eva": {"rule": "eva"},
    "eva, padding": {"rule": "eva", "padding": True},
    "eva, d80, no feature maps": {"rule": "eva", "size": 80, "group": 1, "maps": False},
    "eva, d128": {"rule": "eva", "size": 128, "chunk": 8, "window": "block"},
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


CONFIGS = {
    "pure": SMALL,
    "hybrid": HYBRIDS["hybrid"],
    "eva": {**SMALL, "chunk_rule": "eva"},
}


def parameters_of(rule, heads, size, normal, maps):
    """Return a rule's parameters; feature maps are in fp32, as modules keep them."""
    if rule == "eva":
        shapes = ((size, size), (size,), (size,), (size,)) * (2 * maps)
        return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in map(normal, shapes)]
    count = {"tangent": 1, "evabyte": 2, "mean": 0}[rule]
    return [normal((heads, size)) for _ in range(count)]


def run(dtype, steps=40, *, rule="tangent", window="sliding", sinks=16, chunk=16, size=64,
        values=None, group=4, padding=False, softcap=0.0, window_size=128, maps=True):  # fmt: skip
    """Fill a cache by one call of 300 tokens, then decode; return every step's result and state."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, prompt = 3, 2, 300

    def normal(*shape):
        return torch.randn(shape, generator=generator).bfloat16().to("cuda", dtype)

    total = prompt + steps
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
    kept = [state.rfa_k.cpu(), state.rfa_v.cpu()]
    return [torch.cat(outs, 2).cpu(), torch.cat(lses, 2).cpu(), *kept]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_equal_the_blocked_code(case, dtype):
    def formula(precision):
        with mock.patch.object(cache_ops, "runs_kernels", return_value=False):
            return run(precision, **case)

    assert_as_accurate_as_pytorch(run(dtype, **case), formula, dtype)


FP8 = {
    "d64": {"head_dim": 64, "value_dim": 64},
    "d128, padding": {"head_dim": 128, "value_dim": 128, "mask": "left_padding", "softcap": 20.0},
    "d80, e96": {"head_dim": 80, "value_dim": 96, "group": 7, "window": "block"},
    "eva": {"head_dim": 64, "value_dim": 64, "rule": "eva", "parameter_count": 8},
    "ALiBi": {"head_dim": 64, "value_dim": 64, "mask": "left_padding", "alibi": True},
}


@pytest.mark.parametrize("portion", [1, 20])
@pytest.mark.parametrize("case", FP8.values(), ids=FP8)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_chunk_tokens_are_the_codec_and_the_blocked_code(dtype, case, portion):
    sizes = {"batch": 2, "kv_heads": 2, "group": 4, "window_size": 128, "chunk_size": 16}
    rule = {"rule": "tangent", "parameter_count": 1, "scale": 0.125, "sink_tokens": 16}
    case = DecodeCase(**{**sizes, **rule, **case}, dtype=dtype, prefix=400, steps=60)
    portions = (portion,) * (case.steps // portion)

    def run_on_device(fp8_chunks):
        sequence = dataclasses.replace(case, fp8_chunks=fp8_chunks)
        before = sequence.filled_state(dtype)
        state = CacheState(*(x.cuda() for x in before))
        parameters = [p.cuda() for p in sequence.parameters_in(dtype)]
        options = {**sequence.options, "version": OP_VERSION}
        found, states = [], [before]
        for *qkv, mask in portions_of(ExtendCase(sequence=sequence, portions=portions), dtype):
            new = (*(x.cuda() for x in qkv), parameters, None if mask is None else mask.cuda())
            slopes = None if case.slopes is None else case.slopes.cuda()
            out = torch.ops.flasheva.decode(*new, *state, **options, alibi_slopes=slopes)
            found.append(out)
            states.append(CacheState(*(x.cpu() for x in state)))
        return [torch.cat(x, 2).cpu() for x in zip(*found, strict=True)], states

    result, states = run_on_device(True)
    _, plain = run_on_device(False)
    calls = ExtendCase(sequence=case, portions=portions)
    assert assert_codes(states, plain, case.chunk_size) > 100
    assert_attended(case, lambda d: portions_of(calls, d), result, states)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_model_generates_the_same_in_every_way(config):
    model = llama().cuda().float()
    fe.prepare(model, config)
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


@pytest.mark.parametrize("chunk_tokens", [None, "fp8"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_cuda_graph_of_a_step(config, chunk_tokens):
    model = fe.prepare(llama().cuda(), config)
    grown = fe.FlashEvaCache.for_model(model, chunk_tokens=chunk_tokens)
    want = generate(model, tokens(1, 21).cuda(), past_key_values=grown).sequences
    room = {"max_batch_size": 1, "max_cache_len": 64}
    cache = fe.FlashEvaCache.for_model(model, chunk_tokens=chunk_tokens, **room)
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


# --- full layers of preallocated caches -----------------------------------------------------------


def long_layer(rows, room, context, dtype=torch.bfloat16):
    """Return a layer of 8 kv heads of 128 channels that holds ``context`` tokens, and those."""
    generator = torch.Generator("cuda").manual_seed(0)
    k, v = (
        torch.randn(rows, 8, context, 128, device="cuda", dtype=dtype, generator=generator)
        for _ in "kv"
    )
    layer = ExactCacheLayer("layer", room)
    layer.append(k, v, None)
    return layer, k, v


@pytest.mark.parametrize(("rows", "context"), [(1, 65500), (2, 20000), (18, 9000), (34, 4100)])
@pytest.mark.parametrize("count", [1, 4])
def test_a_full_layer_with_room_for_64k_is_attention(rows, context, count):
    """Against SDPA over what there is; the room beyond holds NaN that nobody may read."""
    layer, k, v = long_layer(rows, 65536, context)
    for x in (layer.state.exact_k, layer.state.exact_v):
        x[:, :, context:].fill_(torch.nan)
    q = torch.randn(rows, 32, count, 128, device="cuda", dtype=torch.bfloat16)
    new = torch.randn(2, rows, 8, count, 128, device="cuda", dtype=torch.bfloat16)
    out, _ = layer.attend((q, *new), None, 128**-0.5, 0.0)
    keys, values = (torch.cat(x, 2) for x in zip((k, v), new, strict=True))
    place = torch.arange(context + count, device="cuda")
    mask = place[None] <= context + torch.arange(count, device="cuda")[:, None]

    def attention(dtype):
        parts = []
        for row in range(rows):  # a row at a time: fp64 of all would not fit
            own = (x[row : row + 1].to(dtype) for x in (q, keys, values))
            parts.append(
                torch.nn.functional.scaled_dot_product_attention(
                    *own, attn_mask=mask, enable_gqa=True
                )
            )
        return [torch.cat(parts)]

    assert_as_accurate_as_pytorch([out], attention, torch.bfloat16)
    assert torch.equal(layer.state.exact_k[:, :, context : context + count], new[0])
    assert layer.get_seq_length().item() == context + count


def test_a_captured_full_layer_goes_on_until_there_is_no_room():
    layer, _, _ = long_layer(2, 300, 280)
    other, _, _ = long_layer(2, 300, 280)
    q = torch.randn(2, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    new = torch.randn(2, 2, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(2, 300, device="cuda", dtype=torch.bool)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        layer.attend((q, *new), mask, 0.1, 0.0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = layer.attend((q, *new), mask, 0.1, 0.0)
    other.attend((q, *new), mask, 0.1, 0.0)
    for _ in range(19):
        graph.replay()
        want, _ = other.attend((q, *new), mask, 0.1, 0.0)
        assert torch.equal(out, want)
        assert out.isfinite().all()
    for _ in range(3):
        graph.replay()
        assert out.isnan().all()


def test_no_step_of_a_full_layer_waits_for_the_device():
    layer, _, _ = long_layer(2, 300, 200)
    q = torch.randn(2, 32, 5, 128, device="cuda", dtype=torch.bfloat16)
    new = torch.randn(2, 2, 8, 5, 128, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(2, 300, device="cuda", dtype=torch.bool)

    def steps():
        for given in (None, mask):
            layer.attend((q, *new), given, 0.1, 0.0)
            layer.attend((q[:, :, :1], *new[:, :, :, :1]), given, 0.1, 0.0)

    steps()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")
