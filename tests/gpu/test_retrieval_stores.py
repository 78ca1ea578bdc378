"""Options of retrieval on a GPU: exact keys in pinned host memory, selection by bounds."""

from __future__ import annotations

import dataclasses

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

CASE = AttentionCase(queries=300, keys=300, head_dim=16, window_size=32, chunk_size=8)


@pytest.mark.parametrize("by", ["token", "bounds"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_pinned_store_computes_what_one_on_the_device_does(by, dtype):
    config = {**SMALL, "retrieve_chunks": 2, "retrieve_by": by}
    model, ids = fe.prepare(llama(), config).to("cuda", dtype), tokens(2, 75).cuda()
    here, _ = logits(model, ids)
    there, cache = logits(model, ids, store="offloaded")
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)
    store = cache.layers[0].store
    assert store.keys.is_pinned()
    assert store.keys.device.type == "cpu"


@pytest.mark.parametrize("mask", ["none", "left_padding"])
@pytest.mark.parametrize("block", [1, 16])
def test_selection_by_bounds_and_its_gradients_are_the_reference(mask, block):
    case = dataclasses.replace(CASE, mask=mask)
    options = {"retrieve_chunks": 3, "retrieve_block": block, "retrieve_by": "bounds"}
    actual = case.run(on_gpu, torch.float64, **options)
    assert_as_accurate_as_pytorch(actual, reference(case, 3, block, by="bounds"), torch.float64)
