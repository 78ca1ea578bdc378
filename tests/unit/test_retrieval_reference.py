"""The reference of the retrieval tier against loops over single positions, and its own laws."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from flasheva_compile.kernels.reference.attention import eva_attention
from flasheva_compile.kernels.reference.positions import chunks_of, key_positions
from flasheva_compile.kernels.reference.retrieval import (
    retrieval_attention,
    retrieved_visibility,
    select_chunks,
)
from flasheva_compile.kernels.reference.visibility import visibility

from tests.attention_cases import AttentionCase
from tests.tolerance import assert_as_accurate_as_pytorch
from tests.unit.test_reference import documents_of, seen_by, softmax, token, weighted

TINY = AttentionCase(
    queries=17, keys=17, head_dim=3, value_dim=2, window_size=4, chunk_size=2, sink_tokens=1
)
ALL = 100  # chunks, more than any case has


def score(case: AttentionCase, b: int, head: int, row: int, item) -> float:
    """The logit of a key or chunk token ``(key, value, bias, column)`` for one query head."""
    key, _, bias, at = item
    x = float(case.qkv[0][b, head, row] @ key) * case.head_dim**-0.5
    x = case.softcap * math.tanh(x / case.softcap) if case.softcap else x
    slope = float(case._normal(7, case.qkv[0].shape[1])[head] / 8) if case.alibi else 0.0
    return x + bias + slope * (at - row - case.q_offset)


def chunk_item(case: AttentionCase, b: int, h: int, members: list[int]):
    return *token(case, b, h, members), sum(members) / len(members)


def selected_by(case: AttentionCase, b: int, h: int, row: int, count: int, block: int):
    """Return the chunks (tuples of columns) that the query's block attends exactly."""
    column = row + case.q_offset
    start = next((c[0] for c, _ in documents_of(case, b) if column in c), column)
    first = row - (column - start) % block
    _, chunks = seen_by(case, b, first + case.q_offset)
    heads = range(h * case.group, (h + 1) * case.group)

    def best(members):
        item = chunk_item(case, b, h, members)
        return np.float32(max(score(case, b, head, first, item) for head in heads))

    ranked = sorted(chunks, key=best, reverse=True)  # stable: equal ones by index
    return {tuple(members) for members in ranked[:count]}


def attention_by_loops(case: AttentionCase, count: int, block: int):
    q, k, v = case.qkv
    out = torch.zeros(*q.shape[:3], case.value_dim, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for b, head, row in itertools.product(*map(range, q.shape[:3])):
        h = head // case.group
        exact, chunks = seen_by(case, b, row + case.q_offset)
        selected = selected_by(case, b, h, row, count, block) if chunks else set()
        exact = exact + [m for members in chunks if tuple(members) in selected for m in members]
        items = [(k[b, h, m], v[b, h, m], 0.0, m) for m in exact]
        items += [chunk_item(case, b, h, m) for m in chunks if tuple(m) not in selected]
        if items:
            scores = [score(case, b, head, row, item) for item in items]
            out[b, head, row] = weighted(softmax(scores), [item[1] for item in items])
            lse[b, head, row] = math.log(sum(math.exp(x) for x in scores))
    return out, lse


@pytest.mark.parametrize(
    "change",
    [
        {"rule": "mean"},
        {"rule": "tangent", "softcap": 1.5},
        {"rule": "evabyte", "alibi": True},
        {"rule": "eva"},
        {"mask": "left_padding", "batch": 3},
        {"mask": "holes", "window": "block"},
        {"mask": "segments_with_holes", "sink_tokens": 0},
        {"queries": 5, "q_offset": 12},
    ],
    ids=str,
)
@pytest.mark.parametrize(("count", "block"), [(1, 1), (2, 3)])
def test_reference_agrees_with_loops(change, count, block):
    case = dataclasses.replace(TINY, **change)
    block = 1 if case.q_offset else block

    def formula(dtype):
        options = {"retrieve_chunks": count, "retrieve_block": block}
        return case.run(lambda *a, **o: retrieval_attention(*a, **o, **options), dtype)[:2]

    assert_as_accurate_as_pytorch(attention_by_loops(case, count, block), formula, torch.float64)


@pytest.mark.parametrize("mask", ["none", "left_padding", "segments_with_holes"])
def test_all_chunks_retrieved_is_softmax_attention(mask):
    case = dataclasses.replace(TINY, mask=mask, softcap=2.0, alibi=True)

    def retrieving(*args, **options):
        return retrieval_attention(*args, **options, retrieve_chunks=ALL)

    def full(dtype):
        whole = dataclasses.replace(case, window_size=32)
        return whole.run(eva_attention, dtype)

    assert_as_accurate_as_pytorch(case.run(retrieving, torch.float64), full, torch.float64)


@pytest.mark.parametrize("mask", ["none", "left_padding", "segments_with_holes"])
def test_a_retrieving_query_still_sees_everything_once(mask):
    case = dataclasses.replace(TINY, mask=mask)
    keys = key_positions(case.qkv[1], **case.masks)
    chunks = chunks_of(keys, case.chunk_size)
    names = ("q_offset", "window_size", "chunk_size", "sink_tokens", "window", "causal")
    options = {name: getattr(case, name) for name in names}
    exact, chunk = visibility(keys, chunks, length=case.queries, **options)
    selected = select_chunks(case._normal(9, 2, 2, 17, chunk.shape[-1]), chunk, 2)
    fewer, more = retrieved_visibility(exact, chunk, chunks, selected)
    members = chunks.members[:, None, None].long()
    before = exact.long() + (chunk[..., None] * members[:, 0]).sum(2)
    after = more.long() + (fewer[..., None] * members).sum(3)
    assert torch.equal(after, before[:, None].expand_as(after))
    assert torch.equal(selected.sum(-1), chunk.sum(-1).clamp(max=2)[:, None].expand(-1, 2, -1))


def test_equal_scores_go_to_the_lower_index():
    visible = torch.tensor([[[False, True, True, True, True]]])
    scores = torch.tensor([[[[9.0, 1.0, 2.0, 1.0, 1.0]]]])
    chosen = select_chunks(scores, visible, 3)
    assert chosen[0, 0, 0].tolist() == [False, True, True, True, False]
    nearly = scores.double() + torch.tensor([0, 0, 0, 0, 1e-12])  # no difference in fp32
    assert torch.equal(select_chunks(nearly, visible, 3), chosen)


def test_a_block_never_looks_at_its_later_queries():
    case = dataclasses.replace(TINY, queries=24, keys=24, rule="mean")
    q, k, v = case.qkv
    options = {**case.options, "retrieve_chunks": 1, "retrieve_block": 4}
    out, _ = retrieval_attention(q, k, v, **options)
    for last in range(1, 24):
        changed = q.clone()
        changed[:, :, last:] *= -3
        again, _ = retrieval_attention(changed, k, v, **options)
        assert torch.equal(again[:, :, :last], out[:, :, :last])


def test_what_becomes_visible_within_a_block_stays_compressed():
    """With one block over everything, its first query sees no chunk, so none is retrieved."""
    case = dataclasses.replace(TINY, rule="mean")

    def retrieving(*args, **options):
        return retrieval_attention(*args, **options, retrieve_chunks=ALL, retrieve_block=32)

    assert_as_accurate_as_pytorch(
        case.run(retrieving, torch.float64), case.reference, torch.float64
    )
