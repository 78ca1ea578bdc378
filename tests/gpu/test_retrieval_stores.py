"""Options of retrieval on a GPU: exact keys in pinned host memory, selection by bounds."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch

import flasheva_compile as fe
from tests.attention_cases import AttentionCase
from tests.gpu.test_retrieval import on_gpu
from tests.models.test_generate import SMALL, llama, tokens
from tests.models.test_retrieval_stores import logits
from tests.retrieval_cases import reference
from tests.tolerance import assert_as_accurate_as_pytorch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

RETRIEVING = {**SMALL, "retrieve_chunks": 2}
CASE = AttentionCase(queries=300, keys=300, head_dim=16, window_size=32, chunk_size=8)


@pytest.mark.parametrize("by", ["token", "bounds"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_pinned_store_computes_what_one_on_the_device_does(by, dtype):
    config = {**SMALL, "retrieve_chunks": 2, "retrieve_by": by}
    model, ids = fe.prepare(llama(), config).to("cuda", dtype), tokens(2, 75).cuda()
    here, _ = logits(model, ids)
    there, _ = logits(model, ids, store="offloaded")
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)


def test_the_exact_store_takes_no_memory_of_the_gpu():
    model = fe.prepare(llama(), RETRIEVING).cuda()
    sizes = {"max_batch_size": 1, "max_cache_len": 1 << 20}
    for store in ("device", "offloaded"):
        gc.collect()
        before = torch.cuda.memory_allocated()
        cache = fe.FlashEvaCache.for_model(model, store=store, **sizes)
        taken = torch.cuda.memory_allocated() - before
        assert cache.nbytes() <= taken < cache.nbytes() + (1 << 20)
        assert (cache.host_nbytes() > cache.nbytes()) == (store == "offloaded")
        del cache


def test_steps_over_a_store_on_the_host_are_captured_in_a_graph():
    model, ids = fe.prepare(llama(), RETRIEVING).to("cuda"), tokens(2, 75).cuda()
    found = {}
    for store in ("device", "offloaded"):
        cache = fe.FlashEvaCache.for_model(model, store=store, max_batch_size=2, max_cache_len=128)
        found[store] = captured_steps(model, cache, ids)
    # Chunks from the host have a loop of their own: sums in another order.
    torch.testing.assert_close(found["offloaded"], found["device"], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def captured_steps(model, cache, ids):
    """Return the logits of tokens that a captured graph decodes."""
    model(ids[:, :50], past_key_values=cache)
    stream, token = torch.cuda.Stream(), ids[:, 50:51].clone()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for n in (50, 51):  # warms up
            token.copy_(ids[:, n : n + 1])
            model(token, past_key_values=cache)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            logits = model(token, past_key_values=cache).logits[:, -1]
    torch.cuda.synchronize()
    made = []
    for n in range(52, 75):
        token.copy_(ids[:, n : n + 1])
        graph.replay()
        made.append(logits.clone())
    return torch.stack(made)


def test_rows_of_a_store_on_the_host_are_reordered_there():
    model, ids = fe.prepare(llama(), RETRIEVING).cuda(), tokens(2, 60).cuda()
    options = {"max_new_tokens": 12, "num_beams": 2, "do_sample": False}
    here = model.generate(ids, **options)
    cache = fe.FlashEvaCache.for_model(model, store="offloaded")
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), here)


@pytest.mark.parametrize("mask", ["none", "left_padding"])
@pytest.mark.parametrize("block", [1, 16])
def test_selection_by_bounds_and_its_gradients_are_the_reference(mask, block):
    case = dataclasses.replace(CASE, mask=mask)
    options = {"retrieve_chunks": 3, "retrieve_block": block, "retrieve_by": "bounds"}
    actual = case.run(on_gpu, torch.float64, **options)
    assert_as_accurate_as_pytorch(actual, reference(case, 3, block, by="bounds"), torch.float64)
