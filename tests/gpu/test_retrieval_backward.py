"""Kernels of the retrieval tier's backward pass on a GPU at real sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flasheva_compile.kernels.blocked.block import Operands
from flasheva_compile.kernels.blocked.geometry import attention_geometry
from flasheva_compile.kernels.blocked.retrieval import retrieval_forward
from flasheva_compile.kernels.blocked.retrieval_backward import retrieval_backward
from flasheva_compile.kernels.blocked.retrieval_select import Retrieval
from flasheva_compile.lowering import launch_retrieval, launch_retrieval_backward
from flasheva_compile.lowering.rows import rows_of

from flasheva_compile.op_checks import OP_VERSION
from tests.gpu.test_retrieval_forward import DTYPES, operands, poisoned_buffers, settings
from tests.tolerance import assert_as_accurate_as_pytorch

__all__ = ["poisoned_buffers"]  # a fixture: every test here runs with it
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def gradient(t):
    """Return what arrives at the output."""
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (*t.q.shape[:3], t.v.shape[3])
    return torch.randn(shape, device="cuda", generator=generator).to(t.q.dtype)


def kernels(t, s, retrieval, key_mask=None, selected=None):
    """Return ``dout``, the selection and the gradients by both passes' kernels."""
    rows = rows_of(t.k, key_mask, None, chunk_size=s.chunk_size)
    if selected is None:
        result = launch_retrieval.retrieval_forward(t, rows, s, retrieval)
    else:
        geometry = attention_geometry(t.q.shape[2], t.k.shape[2], s, key_mask, None, t.q.device)
        result = (*retrieval_forward(t, geometry, s, retrieval, selected), selected)
    call = (t, rows, s, retrieval)
    assert launch_retrieval_backward.covers(*call, result[2])
    dout = gradient(t)
    return dout, result[2], launch_retrieval_backward.retrieval_backward(dout, result, *call)


def blocked(t, s, retrieval, selected, dout, key_mask=None):
    """Return the blocked code's gradients for a selection, in any dtype."""
    geometry = attention_geometry(t.q.shape[2], t.k.shape[2], s, key_mask, None, t.q.device)

    def formula(dtype):
        names = ("q", "k", "v", "rfa_k", "rfa_v")
        cast = {name: getattr(t, name).to(dtype) for name in names}
        bias = t.rfa_bias.to(torch.promote_types(dtype, torch.float32))
        same = Operands(**cast, rfa_bias=bias)
        call = (same, geometry, s, retrieval, selected)
        out, lse = retrieval_forward(*call)
        return tuple(retrieval_backward(dout.to(dtype), out, lse, *call))

    return formula


def check(t, s, retrieval, dtype, key_mask=None, selected=None):
    dout, selected, grads = kernels(t, s, retrieval, key_mask, selected)
    formula = blocked(t, s, retrieval, selected, dout, key_mask)
    assert_as_accurate_as_pytorch(grads, formula, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 16, 64])
@pytest.mark.parametrize(("size", "chunks", "chunk"), [(64, 8, 16), (128, 16, 32), (80, 32, 16)])
def test_backward_is_the_blocked_code(size, chunks, chunk, block, dtype):
    s, retrieval = settings(chunk, size=size), Retrieval(chunks=chunks, block=block)
    check(operands(s, 4096 + 37, dtype, size=size), s, retrieval, dtype)


@pytest.mark.parametrize("kind", ["sliding", "block"])
@pytest.mark.parametrize("group", [1, 2, 8])
def test_long_rows_and_other_groups(group, kind):
    s, retrieval = settings(16, kind=kind, softcap=20.0), Retrieval(chunks=8)
    check(operands(s, 16384, torch.bfloat16, group=group), s, retrieval, torch.bfloat16)


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("mask", ["left_padding", "holes"])
def test_padded_rows(mask, block):
    s, retrieval = settings(), Retrieval(chunks=8, block=block)
    t = operands(s, 3000, torch.bfloat16, batch=2)
    column = torch.arange(3000, device="cuda")
    padding = torch.tensor([[0], [777]], device="cuda")
    key_mask = column >= padding if mask == "left_padding" else (column * 7919) % 5 > padding % 2
    check(t, s, retrieval, torch.bfloat16, key_mask)


@pytest.mark.parametrize("chunk", [4, 48, 128])
def test_chunks_of_other_sizes(chunk):
    s, retrieval = settings(chunk, window=384), Retrieval(chunks=4)
    check(operands(s, 4096, torch.bfloat16), s, retrieval, torch.bfloat16)


def test_a_chunk_that_every_query_selects():
    """Its list is cut into pieces; without sinks, so that the first chunk can be selected."""
    s, retrieval = dataclasses.replace(settings(), sink_tokens=0), Retrieval(chunks=2)
    t = operands(s, 16384, torch.bfloat16)
    position = torch.arange(16384, dtype=torch.int32, device="cuda")
    last = (position - s.window_size + 1).clamp(min=0) // s.chunk_size - 1
    both = torch.stack((last.clamp(max=0), torch.where(last > 0, last, -1)), -1)
    selected = both.expand(1, 2, -1, -1).contiguous()
    check(t, s, retrieval, torch.bfloat16, selected=selected)


@pytest.mark.parametrize("block", [1, 16])
def test_bits_repeat(block):
    s, retrieval = settings(size=128), Retrieval(chunks=16, block=block)
    t = operands(s, 8192, torch.bfloat16, size=128)
    first = kernels(t, s, retrieval)[2]
    for _ in range(3):
        again = kernels(t, s, retrieval)[2]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def call_op(t, s, **changes):
    """Return the op on leaves that ask for gradients, and the leaves."""
    names = ("window_size", "chunk_size", "sink_tokens", "window", "causal", "q_offset", "scale")
    options = {name: getattr(s, name) for name in (*names, "softcap", "dropout_p")}
    options |= {"retrieve_chunks": 8, "retrieve_block": 1, "retrieve_by": "token"}
    options |= {"version": OP_VERSION, **changes}
    tensors = (t.q, t.k, t.v, t.rfa_k, t.rfa_v, t.rfa_bias)
    leaves = [x.detach().requires_grad_() for x in tensors]
    return torch.ops.flasheva.retrieval_attention(*leaves, *[None] * 4, **options), leaves


def test_the_op_runs_these_kernels(monkeypatch):
    called = []
    plain = launch_retrieval_backward.retrieval_backward
    monkeypatch.setattr(
        launch_retrieval_backward, "retrieval_backward", lambda *a: called.append(1) or plain(*a)
    )
    s = settings()
    t = operands(s, 2048, torch.bfloat16)
    dout = gradient(t)
    (out, _, selected), leaves = call_op(t, s)
    grads = torch.autograd.grad(out, leaves, dout)
    assert called
    formula = blocked(t, s, Retrieval(chunks=8), selected, dout)
    assert_as_accurate_as_pytorch(grads, formula, torch.bfloat16)


@pytest.mark.parametrize("by", ["token", "bounds"])
def test_a_cuda_graph_holds_both_passes(by):
    s = settings()
    t = operands(s, 2048, torch.bfloat16)
    dout = gradient(t)
    stream = torch.cuda.Stream()

    def step():
        (out, *_), leaves = call_op(t, s, retrieve_by=by)
        return torch.autograd.grad(out, leaves, dout)

    with torch.cuda.stream(stream):
        wanted = step()
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for x in captured:
        x.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))
