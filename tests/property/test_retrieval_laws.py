"""Laws of the retrieval tier: what must hold for every shape, mask, rule and selection."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from flasheva_compile.ops import flasheva_attention
from tests.attention_cases import MASKS, attention_cases
from tests.property.test_attention_laws import full_mask, softmax_attention
from tests.retrieval_cases import ALL, reference, selection
from tests.tolerance import assert_as_accurate_as_pytorch

FP64 = torch.float64
laws = settings(deadline=None, derandomize=True, max_examples=100, database=None)
many = settings(deadline=None, derandomize=True, max_examples=400, database=None)
counts = st.sampled_from([1, 2, 3, 7, ALL])
blocks = st.sampled_from([1, 2, 3, 8])


def on(case, chunks: int, block: int = 1):
    """Return a function that attends with retrieval."""
    retrieve = {"retrieve_chunks": chunks, "retrieve_block": block}
    return lambda *args, **options: flasheva_attention(*args, **options, **retrieve)


@given(attention_cases(causal=True), counts, blocks)
@many
def test_op_and_its_gradients_are_the_reference(case, chunks, block):
    block = 1 if case.q_offset else block
    actual = case.run(on(case, chunks, block), FP64)
    assert_as_accurate_as_pytorch(actual, reference(case, chunks, block), FP64)


@given(attention_cases(causal=True, max_keys=24))
@laws
def test_all_chunks_retrieved_is_softmax(case):
    attend = softmax_attention(case, full_mask(case))
    actual = case.run(on(case, ALL), FP64)
    assert_as_accurate_as_pytorch(actual, lambda dtype: case.run(attend, dtype), FP64)


@given(attention_cases(causal=True, queries=40, keys=40), counts, blocks)
@laws
def test_no_query_selects_more_than_asked_nor_what_it_does_not_see(case, chunks, block):
    case = dataclasses.replace(case, q_offset=0)
    chosen = selection(case, FP64, chunks, block)
    assert bool((chosen.sum(-1) <= chunks).all())
    column = torch.arange(40)[:, None]
    first = torch.arange(chosen.shape[-1]) * case.chunk_size
    ended = first + case.chunk_size <= column + 1  # a slot's chunk starts at its column or later
    assert not bool((chosen & ~ended).any())


@given(
    attention_cases(masks=("none",), causal=True, queries=30, keys=30),
    st.integers(1, 20),
    counts,
    blocks,
)
@laws
def test_left_padding_changes_nothing(case, padding, chunks, block):
    case = dataclasses.replace(case, q_offset=0)
    q, k, v = (functional.pad(x, (0, 0, padding, 0), value=3.0) for x in case.qkv)
    key_mask = (torch.arange(30 + padding) >= padding).expand(case.batch, -1)
    options = {**case.options, "key_mask": key_mask, "parameters": case.parameters}
    slopes = case._normal(7, case.kv_heads * case.group) / 8 if case.alibi else None
    out, lse = on(case, chunks, block)(q, k, v, alibi_slopes=slopes, **options)
    padded = [out[:, :, padding:], lse[:, :, padding:]]
    assert not out[:, :, :padding].any()
    formula = reference(case, chunks, block)
    assert_as_accurate_as_pytorch(padded, lambda dtype: formula(dtype)[:2], FP64)


@given(attention_cases(batch=3, causal=True, queries=25, keys=25), counts, blocks)
@laws
def test_rows_of_a_batch_do_not_see_each_other(case, chunks, block):
    case = dataclasses.replace(case, q_offset=0)
    whole = case.run(on(case, chunks, block), FP64)[0]
    for b in range(3):
        masks = {name: x if x is None else x[b : b + 1] for name, x in case.masks.items()}

        def row(dtype, b=b, masks=masks):
            def one_row(q, k, v, **options):
                q, k, v = (x[b : b + 1] for x in (q, k, v))
                return on(case, chunks, block)(q, k, v, **{**options, **masks})

            return case.run(one_row, dtype)[:1]

        assert_as_accurate_as_pytorch([whole[b : b + 1]], row, FP64)


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    attention_cases(masks=("none",), causal=True, batch=1, queries=1, keys=1),
    counts,
    blocks,
)
@laws
def test_packed_documents_are_each_document_alone(lengths, case, chunks, block):
    total = sum(lengths)
    case = dataclasses.replace(case, queries=total, keys=total, q_offset=0)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    attend = on(case, chunks, block)

    def alone(q, k, v, **options):
        parts = [x.split(lengths, 2) for x in (q, k, v)]
        results = [attend(*part, **options) for part in zip(*parts, strict=True)]
        return tuple(torch.cat(part, 2) for part in zip(*results, strict=True))

    packed = case.run(lambda *a, **o: attend(*a, **{**o, "segment_ids": ids}), FP64)
    assert_as_accurate_as_pytorch(packed, lambda dtype: case.run(alone, dtype), FP64)


@given(
    attention_cases(
        rules=("mean", "tangent", "evabyte"), masks=MASKS, causal=True, queries=40, keys=40
    ),
    st.integers(0, 40),
    counts,
)
@laws
def test_few_queries_with_an_offset_are_the_last_rows(case, queries, chunks):
    """What decoding rests on: a query's result does not depend on which came with it."""
    case = dataclasses.replace(case, q_offset=0)
    q, k, v = case.qkv
    options = {**case.options, "q_offset": 40 - queries, "parameters": case.parameters}
    slopes = case._normal(7, case.kv_heads * case.group) / 8 if case.alibi else None
    last = on(case, chunks)(q[:, :, 40 - queries :], k, v, alibi_slopes=slopes, **options)
    formula = reference(case, chunks)

    def rows(dtype):
        return [x[:, :, 40 - queries :] for x in formula(dtype)[:2]]

    assert_as_accurate_as_pytorch(last, rows, FP64)
