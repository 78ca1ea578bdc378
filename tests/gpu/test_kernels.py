"""Generated kernels on a GPU at real sizes: formula, gradients, bits, graphs, lengths.

``FLASHEVA_GPU_EXAMPLES`` sets how many random cases run (default 30).
"""

from __future__ import annotations

import os

import pytest
import torch
from flasheva_compile.lowering import launch
from flasheva_compile.lowering.load import load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flasheva_compile import implementations
from flasheva_compile.ops import flasheva_attention
from tests.attention_cases import MASKS, RULES, AttentionCase
from tests.tolerance import assert_as_accurate_as_pytorch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
EXAMPLES = int(os.environ.get("FLASHEVA_GPU_EXAMPLES", "30"))
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """Poison what kernels must write."""
    poison = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        fresh = poison(self, *size, **options)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@st.composite
def cases(draw):
    causal = draw(st.booleans())
    mask = draw(st.sampled_from([m for m in MASKS if causal or "segments" not in m]))
    chunk = draw(st.sampled_from([4, 8, 16, 24]))
    keys = draw(st.integers(1, 700))
    rule = draw(st.sampled_from(RULES))
    queries = keys
    if causal and rule != "eva" and draw(st.booleans()):
        queries = draw(st.integers(1, keys))
    head_dim = draw(st.sampled_from([16, 24, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256]))
    return AttentionCase(
        batch=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 3, 4])),
        queries=queries,
        keys=keys,
        q_offset=keys - queries,
        head_dim=head_dim,
        value_dim=draw(st.sampled_from([head_dim, 64, 40])),
        window_size=chunk * draw(st.integers(1, 12)),
        chunk_size=chunk,
        sink_tokens=draw(st.sampled_from([0, 1, 16, 100])),
        window=draw(st.sampled_from(["sliding", "block"])),
        causal=causal,
        softcap=draw(st.sampled_from([0.0, 0.0, 20.0])),
        alibi=draw(st.booleans()),
        mask=mask,
        rule=rule,
        with_parameters=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


def on_device(case):
    """Move a case's inputs to the device, once."""
    vars(case)["qkv"] = tuple(x.cuda() for x in case.qkv)
    vars(case)["parameters"] = tuple(x.cuda() for x in case.parameters)
    vars(case)["masks"] = {n: None if x is None else x.cuda() for n, x in case.masks.items()}
    plain = case._normal
    object.__setattr__(case, "_normal", lambda *args: plain(*args).cuda())
    return case


@given(case=cases(), dtype=st.sampled_from(DTYPES))
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
def test_kernels_equal_the_reference(case, dtype):
    case = on_device(case)
    assert implementations.runs_kernels(*(x.to(dtype) for x in case.qkv[1:]))
    assert_as_accurate_as_pytorch(case.op(dtype), case.reference, dtype)


def inputs(batch, heads, kv_heads, length, size, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((batch, length, heads), (batch, length, kv_heads), (batch, length, kv_heads))
    return [
        torch.randn(*shape, size, device="cuda", generator=generator)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for shape in shapes
    ]


WINDOW = {"window_size": 256, "chunk_size": 16, "sink_tokens": 16}


def gradients(qkv, **options):
    out = flasheva_attention(*qkv, **{**WINDOW, **options})[0]
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), qkv)]


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rule", ["tangent", "eva"])
def test_bits_repeat(size, causal, rule):
    qkv = inputs(1, 4, 2, 4096, size)
    first = gradients(qkv, causal=causal, chunk_rule=rule)
    for _ in range(100):
        again = gradients(qkv, causal=causal, chunk_rule=rule)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("rule", ["tangent", "eva"])
def test_a_row_alone_equals_the_row_in_a_batch(rule):
    qkv = inputs(3, 4, 2, 3000, 64)
    together = gradients(qkv, chunk_rule=rule)
    alone = gradients([x.detach()[1:2].requires_grad_() for x in qkv], chunk_rule=rule)
    assert all(torch.equal(a, b[1:2]) for a, b in zip(alone, together, strict=True))


def test_more_programs_than_a_grid_axis_holds():
    qkv = inputs(300, 256, 256, 16, 16)
    out = flasheva_attention(*qkv, window_size=16, chunk_size=16, sink_tokens=0)[0]

    def formula(dtype):  # a window over the whole row: softmax attention
        q, k, v = (x.detach().to(dtype) for x in qkv)
        hidden = torch.ones(16, 16, dtype=torch.bool, device="cuda").triu(1)
        return [(q @ k.mT / 4).masked_fill(hidden, -torch.inf).softmax(-1) @ v]

    assert_as_accurate_as_pytorch([out.detach()], formula, torch.bfloat16)


def test_tensors_of_more_than_two_to_the_31_elements():
    length, heads = 150_000, 128
    row = torch.randn(1, length, heads + 1, 128, device="cuda", dtype=torch.bfloat16)
    assert row.numel() > 2**31
    q = k = v = row[:, :, -2:].transpose(1, 2)  # the last heads lie behind 2 ** 31 elements
    far = flasheva_attention(q, k, v, **WINDOW)[0]
    near = flasheva_attention(*(x.contiguous() for x in (q, k, v)), **WINDOW)[0]
    assert torch.equal(far, near)


def test_a_new_length_compiles_nothing():
    gradients(inputs(1, 2, 2, 1024, 64))
    loaded = load.cache_info().misses
    compiled = [kernel_cache(length) for length in (1000, 2048, 777)]
    assert load.cache_info().misses == loaded
    assert len(set(compiled)) == 1


def kernel_cache(length):
    """Return how many binaries exist after a call of this length."""
    qkv = inputs(1, 2, 2, length, 64)
    gradients(qkv)
    seen = []
    plain = launch.load

    def recording(spec, schedule):
        kernel = plain(spec, schedule)
        seen.append(sum(len(caches[0]) for caches in kernel.function.device_caches.values()))
        return kernel

    launch.load = recording
    try:
        gradients(qkv)
    finally:
        launch.load = plain
    return tuple(seen)


def test_a_cuda_graph_replays_forward_and_backward():
    qkv = inputs(1, 4, 2, 1024, 64)
    want = gradients(qkv)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gradients(qkv)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = gradients(qkv)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_ops_compose_with_compile(mode):
    torch._dynamo.reset()
    qkv = inputs(2, 4, 2, 512, 64)
    key_mask = torch.ones(2, 512, dtype=torch.bool, device="cuda")
    key_mask[0, :100] = False
    function = torch.compile(
        lambda q, k, v: flasheva_attention(q * 1, k, v, key_mask=key_mask, **WINDOW)[0] + 1,
        fullgraph=True,
        mode=mode,
    )
    want = flasheva_attention(*qkv, key_mask=key_mask, **WINDOW)[0] + 1
    for _ in range(3):
        out = function(*qkv).clone()
        grads = torch.autograd.grad(out.float().sum(), qkv)
    assert torch.equal(out, want)
    assert all(g.isfinite().all() for g in grads)


def test_a_million_tokens():
    qkv = inputs(1, 16, 16, 2**20, 64)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = gradients(qkv)
    extra = torch.cuda.max_memory_allocated() - before
    assert all(g.isfinite().all() for g in grads)
    tensor = qkv[0].numel() * 2
    assert extra < 16 * tensor, f"{extra / tensor:.1f} times the queries"
