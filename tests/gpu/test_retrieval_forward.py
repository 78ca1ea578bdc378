"""Kernels of the retrieval tier's forward pass on a GPU at real sizes: blocked code, ties, bits."""

from __future__ import annotations

import pytest
import torch
from flasheva_compile.kernels.blocked.block import Operands
from flasheva_compile.kernels.blocked.chunk_bounds import chunk_bounds, selecting_by_bounds
from flasheva_compile.kernels.blocked.geometry import AttentionSettings, attention_geometry
from flasheva_compile.kernels.blocked.retrieval import retrieval_forward
from flasheva_compile.kernels.blocked.retrieval_select import Retrieval, select_chunks
from flasheva_compile.lowering import launch_retrieval
from flasheva_compile.lowering.rows import rows_of

from flasheva_compile import implementations
from flasheva_compile.op_checks import OP_VERSION
from tests.tolerance import assert_as_accurate_as_pytorch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """Poison what kernels must write."""
    plain = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        fresh = plain(self, *size, **options)
        return fresh.fill_(float("nan") if fresh.is_floating_point() else -2)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def settings(chunk=16, window=256, kind="sliding", size=64, **changes):
    fields = {"sink_tokens": chunk, "causal": True, "q_offset": 0, "scale": size**-0.5, **changes}
    return AttentionSettings(window_size=window, chunk_size=chunk, window=kind, **fields)


def operands(s, length, dtype, *, group=4, kv_heads=2, size=64, batch=1, integers=False):
    generator = torch.Generator("cuda").manual_seed(length + size)

    def normal(heads, rows, *dims):
        x = torch.randn(batch, heads, rows, *dims, device="cuda", generator=generator)
        return x.round().clamp(-2, 2) if integers else x

    chunks = -(-length // s.chunk_size)
    shapes = [(group * kv_heads, length)] + [(kv_heads, n) for n in (length, length)]
    tokens = [(kv_heads, chunks, size)] * 2
    q, k, v = (normal(*shape, size).to(dtype) for shape in shapes)
    rfa_k, rfa_v = (normal(*shape).to(dtype) for shape in tokens)
    rfa_bias = normal(kv_heads, chunks) / 2
    return Operands(q=q, k=k, v=v, rfa_k=rfa_k, rfa_v=rfa_v, rfa_bias=rfa_bias)


def kernels(t, s, retrieval, key_mask=None):
    rows = rows_of(t.k, key_mask, None, chunk_size=s.chunk_size)
    assert launch_retrieval.covers(t, rows, s, retrieval)
    return launch_retrieval.retrieval_forward(t, rows, s, retrieval)


def blocked(t, s, retrieval, selected, key_mask=None):
    """Return the blocked code's result for a selection, in any dtype."""
    sizes = (t.q.shape[2], t.k.shape[2])
    geometry = attention_geometry(*sizes, s, key_mask, None, t.q.device)

    def formula(dtype):
        names = ("q", "k", "v", "rfa_k", "rfa_v")
        cast = {name: getattr(t, name).to(dtype) for name in names}
        bias = t.rfa_bias.to(torch.promote_types(dtype, torch.float32))
        same = Operands(**cast, rfa_bias=bias)
        return retrieval_forward(same, geometry, s, retrieval, selected)

    return formula, geometry


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 16, 64])
@pytest.mark.parametrize(("size", "chunks", "chunk"), [(64, 8, 16), (128, 16, 32), (80, 32, 16)])
def test_forward_is_the_blocked_code(size, chunks, chunk, block, dtype):
    s, retrieval = settings(chunk, size=size), Retrieval(chunks=chunks, block=block)
    t = operands(s, 4096 + 37, dtype, size=size)
    out, lse, selected = kernels(t, s, retrieval)
    formula, _ = blocked(t, s, retrieval, selected)
    assert_as_accurate_as_pytorch([out, lse], formula, dtype)


@pytest.mark.parametrize("kind", ["sliding", "block"])
@pytest.mark.parametrize("group", [1, 2, 8])
def test_long_rows_and_other_groups(group, kind):
    s, retrieval = settings(16, kind=kind, softcap=20.0), Retrieval(chunks=8)
    t = operands(s, 16384, torch.bfloat16, group=group)
    out, lse, selected = kernels(t, s, retrieval)
    formula, _ = blocked(t, s, retrieval, selected)
    assert_as_accurate_as_pytorch([out, lse], formula, torch.bfloat16)


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("mask", ["left_padding", "holes"])
def test_padded_rows(mask, block):
    s, retrieval = settings(), Retrieval(chunks=8, block=block)
    t = operands(s, 3000, torch.bfloat16, batch=2)
    column = torch.arange(3000, device="cuda")
    padding = torch.tensor([[0], [777]], device="cuda")
    key_mask = column >= padding if mask == "left_padding" else (column * 7919) % 5 > padding % 2
    out, lse, selected = kernels(t, s, retrieval, key_mask)
    formula, _ = blocked(t, s, retrieval, selected, key_mask)
    assert_as_accurate_as_pytorch([out, lse], formula, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("block", "chunks"), [(1, 8), (1, 32), (16, 16), (48, 5)])
def test_selection_is_that_of_the_blocked_code_ties_included(chunks, block, dtype):
    """On small integers, whose scores are exact and often equal."""
    s, retrieval = settings(scale=0.25), Retrieval(chunks=chunks, block=block)
    t = operands(s, 16384, dtype, integers=True)
    selected = kernels(t, s, retrieval)[2]
    _, geometry = blocked(t, s, retrieval, selected)
    assert torch.equal(selected, select_chunks(t, geometry, s, retrieval))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize(("group", "block", "chunks"), [(4, 1, 8), (1, 1, 32), (8, 16, 16)])
def test_selection_by_bounds_is_that_of_the_blocked_code(group, block, chunks, size, dtype):
    """On small integers again; bounds of 16 of them are exact, too."""
    s = settings(scale=0.25, size=size)
    retrieval = Retrieval(chunks=chunks, block=block, by="bounds")
    t = operands(s, 8192, dtype, size=size, group=group, integers=True)
    selected = kernels(t, s, retrieval)[2]
    _, geometry = blocked(t, s, retrieval, selected)
    by_bounds = selecting_by_bounds(t, chunk_bounds(t.k, None, None, s.chunk_size))
    assert torch.equal(selected, select_chunks(by_bounds, geometry, s, retrieval))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["left_padding", "holes"])
@pytest.mark.parametrize("size", [64, 128])
def test_bounds_of_padded_rows_are_the_blocked_code(size, mask, dtype):
    s, retrieval = settings(size=size, softcap=20.0), Retrieval(chunks=8, by="bounds")
    t = operands(s, 3000, dtype, batch=2, size=size)
    column = torch.arange(3000, device="cuda")
    padding = torch.tensor([[0], [777]], device="cuda")
    key_mask = column >= padding if mask == "left_padding" else (column * 7919) % 5 > padding % 2
    rows = rows_of(t.k, key_mask, None, chunk_size=s.chunk_size)
    values = launch_retrieval._values(t, rows, s, retrieval)
    launch_retrieval._steps(values, t, rows, s, retrieval)["chunk_bounds"]()
    bounds = values["bounds_ptr"]
    filled = chunk_bounds(torch.ones_like(t.k), key_mask, None, s.chunk_size) != 0
    filled = filled.any(-1, keepdim=True)  # a slot that no chunk fills is never visible

    def formula(precision):
        return [chunk_bounds(t.k.to(precision), key_mask, None, s.chunk_size) * filled]

    assert_as_accurate_as_pytorch([bounds * filled], formula, dtype)
    out, lse, selected = kernels(t, s, retrieval, key_mask)
    formula, _ = blocked(t, s, retrieval, selected, key_mask)
    assert_as_accurate_as_pytorch([out, lse], formula, dtype)


def test_selection_takes_the_largest_scores():
    """On random numbers, as far as fp32 can tell them apart."""
    s, retrieval = settings(), Retrieval(chunks=8)
    t = operands(s, 4096, torch.bfloat16)
    selected = kernels(t, s, retrieval)[2]
    q = t.q.double().unflatten(1, (2, 4)) * s.scale
    scores = (q @ t.rfa_k.double().mT[:, :, None]).amax(2) + t.rfa_bias.double()[:, :, None]
    position = torch.arange(4096, device="cuda")
    stop = (position - s.window_size + 1).clamp(min=0) // s.chunk_size
    slot = torch.arange(scores.shape[-1], device="cuda")
    visible = (slot >= s.sink_tokens // s.chunk_size) & (slot < stop[:, None])
    scores = scores.masked_fill(~visible, -torch.inf)
    count = visible.sum(-1).clamp(max=8)
    assert bool(((selected >= 0).sum(-1) == count).all())
    chosen = scores.gather(-1, selected.clamp(min=0).long()).masked_fill(selected < 0, torch.inf)
    bound = scores.topk(8).values.gather(-1, (count - 1).clamp(min=0).expand(1, 2, -1)[..., None])
    slack = 64 * torch.finfo(torch.float32).eps * scores.masked_fill(~visible, 0).abs().amax()
    some = count > 0
    assert bool((chosen.amin(-1) >= bound[..., 0] - slack)[..., some].all())


@pytest.mark.parametrize("by", ["token", "bounds"])
@pytest.mark.parametrize("block", [1, 16])
def test_bits_repeat(block, by):
    s, retrieval = settings(size=128), Retrieval(chunks=16, block=block, by=by)
    t = operands(s, 8192, torch.bfloat16, size=128)
    first = kernels(t, s, retrieval)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, kernels(t, s, retrieval), strict=True))


@pytest.mark.parametrize("by", ["token", "bounds"])
def test_the_op_runs_these_kernels(by, monkeypatch):
    called = []
    plain = launch_retrieval.retrieval_forward
    monkeypatch.setattr(
        launch_retrieval, "retrieval_forward", lambda *a: called.append(1) or plain(*a)
    )
    s = settings()
    t = operands(s, 2048, torch.bfloat16)
    options = {"window_size": 256, "chunk_size": 16, "sink_tokens": 16, "window": "sliding"}
    options |= {"causal": True, "q_offset": 0, "scale": 0.125, "softcap": 0.0, "dropout_p": 0.0}
    options |= {"retrieve_chunks": 8, "retrieve_block": 1, "retrieve_by": by}
    options |= {"version": OP_VERSION}
    tensors = [t.q, t.k, t.v, t.rfa_k, t.rfa_v, t.rfa_bias]
    leaves = [x.detach().requires_grad_() for x in tensors]
    masks = [None] * 4
    out, lse, selected = torch.ops.flasheva.retrieval_attention(*leaves, *masks, **options)
    assert called
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    monkeypatch.setattr(implementations.launch_retrieval, "covers", lambda *_: False)
    formula, _ = blocked(t, s, Retrieval(chunks=8), selected)
    assert_as_accurate_as_pytorch([out.detach(), lse.detach()], formula, torch.bfloat16)
    assert all(bool(g.isfinite().all()) for g in grads)
