"""The op of the retrieval tier: registration, precisions, edges, compile, dropout, complaints."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from flasheva_compile.kernels.blocked import retrieval, retrieval_select
from torch.library import opcheck

from flasheva_compile.errors import LoweringError
from flasheva_compile.ops import flasheva_attention
from tests.attention_cases import MASKS, RULES, AttentionCase
from tests.retrieval_cases import ALL, op_arguments, reference, selection
from tests.tolerance import assert_as_accurate_as_pytorch

CASE = AttentionCase(queries=45, keys=45)
LONG = dataclasses.replace(CASE, queries=200, keys=200, head_dim=32, window_size=32)
FP64 = torch.float64


def op(case: AttentionCase, chunks: int, block: int = 1, dtype=FP64, **options):
    return case.op(dtype, retrieve_chunks=chunks, retrieve_block=block, **options)


@pytest.mark.parametrize("mask", ["none", "segments_with_holes"])
@pytest.mark.parametrize(("block", "dropout_p"), [(1, 0.25), (4, 0.0)])
def test_passes_opcheck(mask, block, dropout_p):
    case = dataclasses.replace(CASE, mask=mask, softcap=2.0, alibi=True)
    arguments, options = op_arguments(case, FP64, 2, block, dropout_p=dropout_p)
    tensors = [x.detach().requires_grad_() for x in arguments[:6]]
    optional = (*arguments[6:9], torch.tensor([5]))
    opcheck(torch.ops.flasheva.retrieval_attention.default, (*tensors, *optional), options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("chunks", "block"), [(2, 1), (3, 4)])
def test_op_and_gradients_are_the_reference(rule, mask, chunks, block):
    case = dataclasses.replace(CASE, rule=rule, mask=mask, softcap=2.0, alibi=True)
    formula = reference(case, chunks, block)
    assert_as_accurate_as_pytorch(op(case, chunks, block), formula, FP64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["mean", "tangent", "evabyte"])
@pytest.mark.parametrize("block", [1, 16])
def test_low_precision_loses_no_more_than_pytorch(dtype, rule, block):
    case = dataclasses.replace(LONG, rule=rule)
    actual = op(case, 3, block, dtype)
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.float32
    assert_as_accurate_as_pytorch(actual, reference(case, 3, block, own=dtype), dtype)


@pytest.mark.parametrize(
    ("queries", "keys"), [(0, 5), (0, 0), (3, 0), (1, 1), (3, 3), (5, 45), (70, 20), (200, 200)]
)
def test_edge_shapes(queries, keys):
    offset = keys - queries if queries < keys else 0
    case = dataclasses.replace(CASE, queries=queries, keys=keys, q_offset=offset)
    assert_as_accurate_as_pytorch(op(case, 2), reference(case, 2), FP64)


@pytest.mark.parametrize("mask", ["none", "left_padding"])
@pytest.mark.parametrize("keys", [1, 3, 6, 45])
def test_queries_behind_all_keys_retrieve_the_last_chunk_whole_or_not(keys, mask):
    case = dataclasses.replace(CASE, queries=3, keys=keys, q_offset=keys + 40, mask=mask)
    for chunks in (1, ALL):
        assert_as_accurate_as_pytorch(op(case, chunks), reference(case, chunks), FP64)


@pytest.mark.parametrize("block", [2, 7, 24, 64, 100])
@pytest.mark.parametrize("mask", ["none", "left_padding"])
def test_blocks_of_any_size(block, mask):
    case = dataclasses.replace(LONG, mask=mask)
    assert_as_accurate_as_pytorch(op(case, 2, block), reference(case, 2, block), FP64)


@pytest.mark.parametrize("mask", ["none", "segments_with_holes"])
@pytest.mark.parametrize("block", [1, 16])
def test_schedule_never_changes_a_result(monkeypatch, mask, block):
    case = dataclasses.replace(LONG, mask=mask, batch=3)
    formula = reference(case, 3, block)
    monkeypatch.setattr(retrieval_select, "_CPU_BUDGET", 1)
    monkeypatch.setattr(retrieval, "_CPU_BUDGET", 1)
    assert_as_accurate_as_pytorch(op(case, 3, block), formula, FP64)
    monkeypatch.setattr(retrieval_select, "_CPU_BUDGET", 1 << 30)
    monkeypatch.setattr(retrieval, "_CPU_BUDGET", 1 << 30)
    monkeypatch.setattr(retrieval, "_CPU_LONGEST", 128)
    assert_as_accurate_as_pytorch(op(case, 3, block), formula, FP64)


def test_equal_scores_go_to_the_lower_index():
    case = dataclasses.replace(CASE, rule="mean", sink_tokens=0, batch=1, kv_heads=1)
    case.__dict__["qkv"] = (torch.zeros_like(case.qkv[0]), *case.qkv[1:])
    chosen = selection(case, FP64, 3)
    assert chosen[0, 0, -1].nonzero().flatten().tolist() == [0, 1, 2]
    assert chosen[0, 0, 15].nonzero().flatten().tolist() == [0, 1]  # sees two


def test_selection_is_per_kv_head():
    chosen = selection(CASE, FP64, 1)
    assert not torch.equal(chosen[:, 0], chosen[:, 1])


def test_results_repeat_bit_for_bit():
    case = dataclasses.replace(LONG, mask="left_padding")
    first, second = op(case, 3, dtype=torch.float32), op(case, 3, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_need_not_be_contiguous_and_are_left_alone():
    before = [x.clone() for x in CASE.qkv]

    def transposed(q, k, v, **options):
        strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        return flasheva_attention(*strided, **options, retrieve_chunks=2)

    assert_as_accurate_as_pytorch(CASE.run(transposed, FP64), reference(CASE, 2), FP64)
    assert all(torch.equal(a, b) for a, b in zip(before, CASE.qkv, strict=True))


def test_memory_is_linear():
    """Four times the length takes four times the memory, not sixteen times."""
    peaks = []
    for n in (4096, 16384):
        q = torch.randn(1, 1, n, 4)
        options = {"window_size": 64, "chunk_size": 2, "retrieve_chunks": 2}
        with torch.profiler.profile(profile_memory=True) as profile:
            flasheva_attention(q, q, q, **options)
        held = [
            e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
        ]
        peaks.append(max(itertools.accumulate(held)))
    assert peaks[1] < 5 * peaks[0]


def test_compiles_without_graph_breaks_for_any_length():
    torch.compiler.reset()
    graphs = []

    def count(gm, _):
        graphs.append(gm)
        return gm

    for backend in (count, "aot_eager"):
        compiled = torch.compile(flasheva_attention, fullgraph=True, dynamic=True, backend=backend)
        for length in (45, 52, 75):
            case = dataclasses.replace(CASE, queries=length, keys=length)
            actual = case.run(compiled, FP64, retrieve_chunks=2, retrieve_block=4)
            assert_as_accurate_as_pytorch(actual, reference(case, 2, 4), FP64)
    assert len(graphs) == 1


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "left_padding"])
def test_dropout_drops_retrieved_keys_as_it_does_exact_ones(mask):
    """All chunks retrieved, or a window over everything: the same keys, the same mask."""
    case = dataclasses.replace(CASE, mask=mask)
    dropout = {"dropout_p": 0.4, "dropout_seed": torch.tensor([3])}

    def window(dtype):
        return dataclasses.replace(case, window_size=48).op(dtype, **dropout)

    assert_as_accurate_as_pytorch(op(case, ALL, **dropout), window, FP64)
    assert not torch.equal(op(case, ALL, **dropout)[0], op(case, ALL)[0])


def test_dropout_gradients_are_those_of_the_forward():
    case = AttentionCase(batch=1, kv_heads=1, queries=16, keys=16, window_size=4, chunk_size=2)
    options = {**case.options, "dropout_p": 0.4, "dropout_seed": torch.tensor([3])}

    def dropped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flasheva_attention(q, k, v, **options, retrieve_chunks=2, retrieve_block=2)[0]

    assert torch.autograd.gradcheck(dropped, tuple(x.requires_grad_() for x in case.qkv))


# --- complaints -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"retrieve_chunks": -1}, "retrieve_chunks=-1"),
        ({"retrieve_block": 0}, "retrieve_block=0"),
        ({"causal": False}, "retrieve_chunks with bidirectional attention"),
        ({"retrieve_block": 2, "q_offset": 1}, "q_offset == 0"),
        ({"alibi_slopes": torch.ones(4).requires_grad_()}, "alibi_slopes has no gradient"),
        ({"window_size": 6}, "multiple of chunk_size"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    q, k, v = (x.clone().requires_grad_() for x in CASE.qkv)
    with pytest.raises(LoweringError, match=words):
        flasheva_attention(q, k, v, **{**CASE.options, "retrieve_chunks": 2, **change})
