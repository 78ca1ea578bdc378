"""Kernels over a cache of codes on a GPU: against PyTorch, bit for bit again, in a CUDA graph."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import flasheva_compile as fe
from flasheva_compile import vecinfer_ops
from flasheva_compile.generation.vecinfer_layer import VecInferLayer
from flasheva_compile.quantization.formats import FORMATS, KvStorage, WordKvFormat
from flasheva_compile.quantization.state import QuantizedState
from tests.kernels.vecinfer_agreement import assert_states_agree
from tests.kernels.vecinfer_cases import (
    VecInferCase,
    run_kernels,
    run_pytorch,
    steps_of,
)
from tests.models.test_generate import SMALL, generate, tokens
from tests.tolerance import assert_as_accurate_as_pytorch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BASE = VecInferCase(
    device="cuda",
    batch=2,
    kv_heads=2,
    head_dim=128,
    value_dim=128,
    key=(4, 8),
    value=(4, 8),
    scale=128**-0.5,
    prefix=1500,
    steps=4,
    sinks=16,
    exact=128,
    block=128,
)
CASES = {
    **{
        name: {"words": (form.key.vector, form.value.vector)}
        if isinstance(form, WordKvFormat)
        else {
            "key": (form.key.vector, form.key.bits),
            "value": (form.value.vector, form.value.bits),
        }
        for name, form in FORMATS.items()
    },
    "d64": {"head_dim": 64, "value_dim": 64},
    "d80": {"head_dim": 80, "value_dim": 80},
    "d256": {"head_dim": 256, "value_dim": 256},
    "values": {"head_dim": 64, "value_dim": 96},
    "one head": {"group": 1},
    "group of 7": {"group": 7},
    "several tokens": {"new_tokens": 3},
    "many queries": {"new_tokens": 16, "group": 5},
    "padding": {"mask": "holes"},
    "padding of several tokens": {"mask": "holes", "new_tokens": 4},
    "softcap": {"softcap": 20.0},
    "per head": {"per_head": True},
    "grouped": {"grouped": True},
    "no rotation": {"rotate_keys": False},
    "rotated values": {"rotate_values": True},
    "no sinks, odd blocks": {"sinks": 0, "exact": 33, "block": 7},
    "nothing coded yet": {"prefix": 40},
}
WORDS = {"words": (8, 8)}
FORMS = {"codes": {}, "fp8": {"fp8": True}, "words": WORDS}
_NOT_OF_FP8 = (*FORMATS, "per head", "grouped", "no rotation", "rotated values")
CASES |= {
    "fp8": {"fp8": True},
    "fp8, any sizes": {"fp8": True, "sizes": 10},
    "fp8, odd heads": {"fp8": True, "head_dim": 20, "value_dim": 12},
    **{f"fp8, {name}": {"fp8": True, **CASES[name]} for name in CASES if name not in _NOT_OF_FP8},
    **{f"words, {name}": {**WORDS, **CASES[name]} for name in CASES if name not in _NOT_OF_FP8},
    "one bit": {"words": (16, 16)},
}


def case_of(**fields) -> VecInferCase:
    return dataclasses.replace(BASE, **fields)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_equal_pytorch(fields, dtype):
    case = case_of(dtype=dtype, **fields)
    out, lse, states = run_kernels(case, own_schedule=True)
    *_, wanted = run_pytorch(case, dtype, states)
    assert_states_agree(case, states, wanted)

    def formula(precision):
        return [x.cpu() for x in run_pytorch(case, precision, states)[:2]]

    assert_as_accurate_as_pytorch([out.cpu(), lse.cpu()], formula, dtype)


@pytest.mark.parametrize("form", FORMS)
def test_at_64k(form):
    case = case_of(prefix=65536, dtype=torch.bfloat16, steps=2, **FORMS[form])
    out, lse, states = run_kernels(case, own_schedule=True)

    def formula(precision):
        return [x.cpu() for x in run_pytorch(case, precision, states)[:2]]

    assert_as_accurate_as_pytorch([out.cpu(), lse.cpu()], formula, case.dtype)


def call(case: VecInferCase, qkv, mask, state, books):
    options = vecinfer_ops.vecinfer_options(case.codec, case.storage, case.scale, case.softcap)
    return torch.ops.flasheva.vecinfer_decode(*qkv, mask, books, *state, **options)


@pytest.mark.parametrize("form", FORMS)
def test_the_op_runs_the_kernels_and_repeats_bit_for_bit(form):
    case, results = case_of(steps=6, dtype=torch.bfloat16, **FORMS[form]), []
    books = vecinfer_ops.op_books(case.codec, case.dtype)
    for _ in range(2):
        state = case.filled_state(case.dtype)
        for qkv, _ in steps_of(case, case.dtype):
            with mock.patch.object(
                vecinfer_ops, "append_and_attend", side_effect=AssertionError("PyTorch code")
            ):
                results += call(case, qkv, None, state, books)
        results += state
    half = len(results) // 2
    for first, second in zip(results[:half], results[half:], strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", ["none", "holes"])
def test_a_captured_call_goes_on_by_itself(mask, form):
    """One graph, over every phase of a block, equals calls that are launched one by one."""
    case = case_of(steps=150, prefix=300, mask=mask, dtype=torch.bfloat16, **FORMS[form])
    books = vecinfer_ops.op_books(case.codec, case.dtype)
    state, want = case.filled_state(case.dtype), []
    for qkv, valid in steps_of(case, case.dtype):
        want += call(case, qkv, None if mask == "none" else valid, state, books)
    expected = QuantizedState(*(x.clone() for x in state))

    state = case.filled_state(case.dtype)
    before = [x.clone() for x in state]
    qkv, valid = next(steps_of(case, case.dtype))
    static, flags = [x.clone() for x in qkv], valid.clone()
    given = None if mask == "none" else flags
    call(case, static, given, state, books)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call(case, static, given, state, books)
    for x, old in zip(state, before, strict=True):
        x.copy_(old)
    found = []
    for qkv, valid in steps_of(case, case.dtype):
        for x, fresh in zip(static, qkv, strict=True):
            x.copy_(fresh)
        flags.copy_(valid)
        graph.replay()
        found += [out.clone(), lse.clone()]
    for got, wanted in zip([*found, *state], [*want, *expected], strict=True):
        assert torch.equal(got, wanted)


def test_another_stream_and_a_view_of_a_larger_tensor():
    case = case_of(layout="slice", dtype=torch.bfloat16)
    want = run_kernels(case_of(dtype=torch.bfloat16), own_schedule=True)[:2]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = run_kernels(case, own_schedule=True)[:2]
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- a layer of the cache -------------------------------------------------------------------------


def layer_of(case: VecInferCase) -> VecInferLayer:
    """Return a preallocated layer that holds the prefix."""
    layer = VecInferLayer("layer", case.codec, case.storage, case.tokens, case.dtype)
    _, k, v = (x[:, :, : case.prefix].to(case.dtype) for x in case.qkv)
    layer.append(k, v, None)
    return layer


@pytest.fixture(name="_pytorch_code")
def _only_pytorch_code(monkeypatch):
    monkeypatch.setattr(vecinfer_ops, "runs_kernels", lambda *_: False)
    vecinfer_ops._known.clear()
    yield
    vecinfer_ops._known.clear()


@pytest.mark.usefixtures("_pytorch_code")
def test_a_captured_step_of_pytorch_code_is_the_step():
    assert_a_captured_step_of_a_layer_is_the_step("fp8", masked=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_captured_step_of_a_layer_is_the_step(form, masked):
    with no_pytorch_code():
        assert_a_captured_step_of_a_layer_is_the_step(form, masked=masked)


def assert_a_captured_step_of_a_layer_is_the_step(form, *, masked):
    """No step waits for the device; one graph, over every phase of a block, equals the steps."""
    case = case_of(steps=150, prefix=300, dtype=torch.bfloat16, **FORMS[form])
    columns = torch.ones(case.batch, case.tokens, dtype=torch.bool, device="cuda")
    if masked:
        columns[1, 310::7] = False
    mask = columns if masked else None
    steps = [[x.clone() for x in qkv] for qkv, _ in steps_of(case, case.dtype)]
    layer = layer_of(case)
    want = [x.clone() for x in layer.attend(steps[0], mask, case.scale, 0.0)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for qkv in steps[1:]:
            want += layer.attend(qkv, mask, case.scale, 0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    captured = layer_of(case)
    static = [x.clone() for x in steps[0]]
    found = list(captured.attend(static, mask, case.scale, 0.0))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = captured.attend(static, mask, case.scale, 0.0)
    for qkv in steps[1:]:
        for x, fresh in zip(static, qkv, strict=True):
            x.copy_(fresh)
        graph.replay()
        found += [out.clone(), lse.clone()]
    for got, wanted in zip([*found, *captured.state], [*want, *layer.state], strict=True):
        assert torch.equal(got, wanted)
    assert int(captured.get_seq_length()) == case.tokens
    graph.replay()  # beyond the room of the first row, which has no padding
    assert out[0].isnan().all()


# --- models ---------------------------------------------------------------------------------------


def hybrid() -> torch.nn.Module:
    """Return a small model whose first layer stays full, with heads that the kernels take."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval().cuda()
    return fe.prepare(model, {"default": SMALL, 0: "full"})


def cache_of_every_vector(model, text, length, places=None):
    """Return a cache whose codewords are all vectors of a text: codes change nothing.

    4096 codewords of 8 channels, 2 heads of 4 codes: enough for 512 tokens.
    """
    places = torch.arange(text["input_ids"].shape[1])[None] if places is None else places
    given = {**text, "position_ids": places.cuda().expand_as(text["input_ids"])}
    books = fe.calibrate_kv(model, [given], "vq-1.5bit")
    storage = KvStorage(format="vq-1.5bit", sink_tokens=2, exact_tokens=3, block_tokens=4)
    return fe.FlashEvaCache.for_model(
        model, max_cache_len=length, full_layers=storage, codebooks=books
    )


def no_pytorch_code():
    return mock.patch.object(
        vecinfer_ops, "append_and_attend", side_effect=AssertionError("PyTorch code")
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [None, 64])
def test_a_model_generates_from_codes_what_exact_layers_do(padded, length):
    model, ids = hybrid(), tokens(2, 21).cuda()
    mask = torch.ones(2, 21, dtype=torch.long, device="cuda")
    mask[1, : 5 * padded] = 0
    exact = generate(model, ids, attention_mask=mask).sequences
    valid = torch.nn.functional.pad(mask, (0, 30), value=1)
    text = {"input_ids": exact, "attention_mask": valid}
    places = (valid.cumsum(1) - 1).clamp_min(0)
    cache = cache_of_every_vector(model, text, length, places)
    assert cache.is_compileable == (length is not None)
    with no_pytorch_code():  # a preallocated cache lets generate compile CUDA graphs by itself
        found = generate(model, ids, attention_mask=mask, past_key_values=cache).sequences
    assert torch.equal(found, exact)


def test_cuda_graph_of_a_step_of_a_model():
    model, ids = hybrid(), tokens(1, 120).cuda()
    cache = cache_of_every_vector(model, {"input_ids": ids}, 128)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad(), no_pytorch_code():
        want = model(ids, use_cache=False).logits[:, 40:]
        model(ids[:, :40], past_key_values=cache)
        found = [
            step(part.clone(), past_key_values=cache, use_cache=True).logits.clone()
            for part in ids[:, 40:].split(1, 1)
        ]
    torch.testing.assert_close(torch.cat(found, 1), want, rtol=1e-3, atol=1e-3)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize("length", [None, 128])
def test_a_model_attends_to_fp8_as_pytorch_code_does(monkeypatch, length):
    """The full layer is the first one, so that both runs store the same tokens."""
    model, ids = hybrid(), tokens(2, 60).cuda()
    storage = KvStorage(format="fp8", sink_tokens=2, exact_tokens=3, block_tokens=4)

    def logits():
        vecinfer_ops._known.clear()
        cache = fe.FlashEvaCache.for_model(model, max_cache_len=length, full_layers=storage)
        with torch.no_grad():
            model(ids[:, :20], past_key_values=cache)
            steps = [model(part, past_key_values=cache).logits for part in ids[:, 20:].split(5, 1)]
        return torch.cat(steps, 1), cache.layers[0].state

    with no_pytorch_code():
        found, state = logits()
    monkeypatch.setattr(vecinfer_ops, "runs_kernels", lambda *_: False)
    want, wanted = logits()
    vecinfer_ops._known.clear()
    torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)
    for got, expected in zip(state, wanted, strict=True):
        assert torch.equal(got, expected)


def test_cuda_graph_of_a_step_of_a_model_over_fp8():
    """Against the same compiled code without a graph: other code rounds other numbers to fp8."""
    model, ids = hybrid(), tokens(1, 120).cuda()
    storage = KvStorage(format="fp8", sink_tokens=2, exact_tokens=3, block_tokens=4)
    found = []
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        forward = torch.compile(model.forward, mode=mode, fullgraph=True)
        cache = fe.FlashEvaCache.for_model(model, max_cache_len=128, full_layers=storage)
        with torch.no_grad(), no_pytorch_code():
            model(ids[:, :40], past_key_values=cache)
            steps = [
                forward(part.clone(), past_key_values=cache, use_cache=True).logits.clone()
                for part in ids[:, 40:].split(1, 1)
            ]
        found.append(torch.cat(steps, 1))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
