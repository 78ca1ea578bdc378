"""The retrieval tier on a GPU: against the formula, bit for bit again, under a CUDA graph."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import flasheva_compile as fe
from flasheva_compile.ops import flasheva_attention
from tests.attention_cases import AttentionCase
from tests.models.test_generate import SMALL, generate, llama, tokens
from tests.retrieval_cases import op_arguments, reference
from tests.tolerance import assert_as_accurate_as_pytorch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CASE = AttentionCase(queries=700, keys=700, head_dim=16, window_size=32, chunk_size=8)


def on_gpu(*args, parameters=(), **options):
    moved = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    cuda = [x.cuda() for x in args]
    out, lse = flasheva_attention(*cuda, parameters=[p.cuda() for p in parameters], **moved)
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize("mask", ["none", "left_padding", "segments_with_holes"])
@pytest.mark.parametrize(("chunks", "block"), [(3, 1), (3, 16), (1000, 1)])
def test_op_and_gradients_are_the_reference(mask, chunks, block):
    case = dataclasses.replace(CASE, mask=mask, softcap=5.0, alibi=True)
    options = {"retrieve_chunks": chunks, "retrieve_block": block}
    actual = case.run(on_gpu, torch.float64, **options)
    assert_as_accurate_as_pytorch(actual, reference(case, chunks, block), torch.float64)


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_and_backward_repeat_bit_for_bit(dtype, block):
    arguments, options = op_arguments(CASE, dtype, 3, block)
    first, second = [], []
    for results in (first, second):
        leaves = [x.detach().cuda().requires_grad_() for x in arguments[:6]]
        outputs = torch.ops.flasheva.retrieval_attention(*leaves, None, None, None, None, **options)
        results += [*outputs, *torch.autograd.grad(outputs[0].sum(), leaves)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("block", [1, 4])
def test_cuda_graph_of_a_step(block):
    config = {**SMALL, "retrieve_chunks": 2, "retrieve_block": block}
    model = fe.prepare(llama().cuda(), config)
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
