"""The reference against loops over single positions that share no code with it."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from flasheva_compile.kernels.reference.attention import eva_attention
from flasheva_compile.kernels.reference.positions import chunks_of, key_positions
from flasheva_compile.kernels.reference.visibility import visibility

from tests.attention_cases import RULES, AttentionCase
from tests.tolerance import assert_as_accurate_as_pytorch

TINY = AttentionCase(
    queries=11, keys=11, head_dim=3, value_dim=2, window_size=4, chunk_size=2, sink_tokens=1
)


def documents_of(case: AttentionCase, b: int) -> list[tuple[list[int], list[int]]]:
    """Return the documents of a row as (columns from its first valid one, valid columns)."""
    mask, ids = case.masks["key_mask"], case.masks["segment_ids"]
    runs = [list(range(case.keys))]
    if ids is not None:
        runs = [
            list(run) for _, run in itertools.groupby(range(case.keys), lambda m: int(ids[b, m]))
        ]
    documents = []
    for run in runs:
        valid = [m for m in run if mask is None or bool(mask[b, m])]
        documents.append(([m for m in run if valid and m >= valid[0]], valid))
    return documents


def chunk_lists(case: AttentionCase, columns: list[int], valid: list[int]) -> list[list[int]]:
    """Return the valid columns of each chunk of a document."""
    c = case.chunk_size
    pieces = [columns[at : at + c] for at in range(0, len(columns), c)]
    return [[m for m in piece if m in valid] for piece in pieces]


def window_of(case: AttentionCase, i: int, n_doc: int) -> tuple[int, int]:
    """The spec's window, with Python's own floor and ceil."""
    w, c = case.window_size, case.chunk_size
    if case.causal:
        if case.window == "block":
            return w * math.floor(i / w), i + 1
        return c * math.floor(max(0, i - w + 1) / c), i + 1
    if case.window == "block":
        lo = w * math.floor(i / w)
        return lo, min(n_doc, lo + w)
    first = max(0, min(i - w // 2, max(0, n_doc - w)))
    return c * math.floor(first / c), min(n_doc, c * math.ceil((first + w) / c))


def seen_by(case: AttentionCase, b: int, column: int):
    """Return the exact columns of a query and the chunks (lists of columns) it sees as tokens."""
    for columns, valid in documents_of(case, b):
        if not columns or (case.causal and column not in columns):
            continue
        start, c = columns[0], case.chunk_size
        i = column - start
        if not case.causal:
            # Full attention has no position, so a query in the padding sees every valid key too.
            i = min(max(i, 0), valid[-1] - start)
        sinks = math.ceil(case.sink_tokens / c) * c
        lo, hi = window_of(case, i, valid[-1] + 1 - start)
        visible = [m for m in valid if not case.causal or m <= column]
        exact = [m for m in visible if lo <= m - start < hi or m - start < sinks]
        tokens = []
        for j, members in enumerate(chunk_lists(case, columns, valid)):
            outside = (j + 1) * c <= lo or (not case.causal and j * c >= hi)
            if members and j * c >= sinks and outside:
                tokens.append(members)
        return exact, tokens
    return [], []


def softmax(logits: list[torch.Tensor]) -> list[torch.Tensor]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def weighted(weights, vectors):
    return sum(w * x for w, x in zip(weights, vectors, strict=True))


def layer_norm_linear(x, parameters):
    weight, bias, norm_weight, norm_bias = parameters
    y = weight @ x + bias
    centred = y - y.mean()
    return centred / torch.sqrt(centred.square().mean() + 1e-5) * norm_weight + norm_bias


def token(case: AttentionCase, b: int, h: int, members: list[int]):
    """Return (rfa_k, rfa_v, rfa_bias) of one chunk by its rule, one key at a time."""
    q, k, v = case.qkv
    keys, values = [k[b, h, m] for m in members], [v[b, h, m] for m in members]
    n, s, p = len(members), case.head_dim**-0.5, case.parameters
    mean_k = sum(keys) / n
    proposal = lambda centre: softmax([float(s * (centre @ x - x @ x / 2)) for x in keys])  # noqa: E731
    if case.rule == "eva":
        group = range(h * case.group, (h + 1) * case.group)
        mean_q = sum(q[b, head, m] for head in group for m in members) / (n * case.group)
        f_q, f_k = (
            (layer_norm_linear(mean_q, p[:4]), layer_norm_linear(mean_k, p[4:]))
            if p
            else (
                mean_q,
                mean_k,
            )
        )
        return f_k, weighted(proposal(f_q + f_k), values), 0.0
    if case.rule == "evabyte":
        a, feature, bias = (x[h] for x in p) if p else (0 * mean_k, 0 * mean_k, 0.0)
        weights = softmax([float(a @ x) for x in keys])
        return weighted(weights, keys), weighted(proposal(feature), values), float(bias)
    if case.rule == "mean" or not p:
        return mean_k, sum(values) / n, math.log(n)
    logits = [float(s * p[0][h] @ x) for x in keys]
    rfa_k = weighted(softmax(logits), keys)
    bias = math.log(sum(math.exp(x) for x in logits)) - float(s * p[0][h] @ rfa_k)
    return rfa_k, weighted(softmax(logits), values), bias


def attention_by_loops(case: AttentionCase) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = case.qkv
    out = torch.zeros(*q.shape[:3], case.value_dim, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    slopes = case._normal(7, q.shape[1]) / 8
    for b, h, row in itertools.product(*map(range, q.shape[:3])):
        head, column = h // case.group, row + case.q_offset
        exact, chunks = seen_by(case, b, column)
        items = [(k[b, head, m], v[b, head, m], 0.0, m) for m in exact]
        items += [
            (*token(case, b, head, members), sum(members) / len(members)) for members in chunks
        ]
        if not items:
            continue
        scores = []
        for key, _, bias, at in items:
            x = float(q[b, h, row] @ key) * case.head_dim**-0.5
            x = case.softcap * math.tanh(x / case.softcap) if case.softcap else x
            scores.append(x + bias + (float(slopes[h]) * (at - column) if case.alibi else 0.0))
        out[b, h, row] = weighted(softmax(scores), [value for _, value, _, _ in items])
        lse[b, h, row] = math.log(sum(math.exp(x) for x in scores))
    return out, lse


def check(case: AttentionCase) -> None:
    def formula(dtype):
        return case.reference(dtype)[:2]

    assert_as_accurate_as_pytorch(attention_by_loops(case), formula, torch.float64)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("with_parameters", [False, True])
def test_rules_agree_with_loops(rule, with_parameters):
    check(dataclasses.replace(TINY, rule=rule, with_parameters=with_parameters))


@pytest.mark.parametrize("mask", ["left_padding", "holes", "segments", "segments_with_holes"])
@pytest.mark.parametrize("window", ["sliding", "block"])
@pytest.mark.parametrize("seed", [0, 1])
def test_masks_agree_with_loops(mask, window, seed):
    check(dataclasses.replace(TINY, mask=mask, window=window, seed=seed, batch=3))


@pytest.mark.parametrize("mask", ["none", "left_padding", "holes"])
@pytest.mark.parametrize("window", ["sliding", "block"])
@pytest.mark.parametrize("sink_tokens", [0, 3])
def test_bidirectional_agrees_with_loops(mask, window, sink_tokens):
    check(
        dataclasses.replace(
            TINY, mask=mask, window=window, causal=False, sink_tokens=sink_tokens, rule="evabyte"
        )
    )


@pytest.mark.parametrize("change", [{"softcap": 1.5}, {"alibi": True}, {"chunk_size": 1}])
@pytest.mark.parametrize("causal", [False, True])
def test_score_changes_agree_with_loops(change, causal):
    check(dataclasses.replace(TINY, causal=causal, **change))


def test_queries_at_an_offset_agree_with_loops():
    check(dataclasses.replace(TINY, queries=4, q_offset=7, sink_tokens=0))


def exact_sets(**options) -> list[tuple[list[int], list[int]]]:
    """Exact columns and chunk slots of each query, for ten unmasked keys."""
    keys = key_positions(torch.zeros(1, 1, 10, 1), None, None)
    chunks = chunks_of(keys, options["chunk_size"])
    exact, chunk = visibility(keys, chunks, length=10, q_offset=0, **options)
    return [
        (e.nonzero().flatten().tolist(), c.nonzero().flatten().tolist())
        for e, c in zip(exact[0], chunk[0], strict=True)
    ]


def test_sliding_window_written_out():
    sets = exact_sets(window_size=4, chunk_size=2, sink_tokens=1, window="sliding", causal=True)
    assert sets[0] == ([0], [])
    assert sets[4] == ([0, 1, 2, 3, 4], [])
    assert sets[7] == ([0, 1, 4, 5, 6, 7], [1])
    assert sets[8] == ([0, 1, 4, 5, 6, 7, 8], [1])
    assert sets[9] == ([0, 1, 6, 7, 8, 9], [1, 2])


def test_block_window_written_out():
    sets = exact_sets(window_size=4, chunk_size=2, sink_tokens=0, window="block", causal=True)
    assert sets[3] == ([0, 1, 2, 3], [])
    assert sets[4] == ([4], [0, 1])
    assert sets[9] == ([8, 9], [0, 1, 2, 3])


def test_bidirectional_window_written_out():
    sets = exact_sets(window_size=4, chunk_size=2, sink_tokens=0, window="sliding", causal=False)
    assert sets[0] == ([0, 1, 2, 3], [2, 3, 4])
    assert sets[5] == ([2, 3, 4, 5, 6, 7], [0, 4])
    assert sets[9] == ([6, 7, 8, 9], [0, 1, 2])


def test_chunk_slots_follow_the_padding():
    mask = torch.tensor([[False, True, True, True, True, True, True]])
    chunks = chunks_of(key_positions(torch.zeros(1, 1, 7, 1), mask, None), 2)
    members = [m.nonzero().flatten().tolist() for m in chunks.members[0]]
    assert members == [[1, 2], [3, 4], [5, 6], []]


def test_packed_partial_chunks_have_no_slot():
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    chunks = chunks_of(key_positions(torch.zeros(1, 1, 7, 1), None, ids), 2)
    members = [m.nonzero().flatten().tolist() for m in chunks.members[0]]
    assert members == [[0, 1], [3, 4], [5, 6], []]


def test_tangent_never_overestimates_a_chunk_and_is_exact_at_phi():
    case = dataclasses.replace(TINY, queries=8, keys=8, window_size=4, chunk_size=4, sink_tokens=0)
    q, k, v = case.qkv
    options = {"window_size": 4, "chunk_size": 4, "q_offset": 7}
    phi = q[0, ::2, 0]
    at_phi = phi[None, :, None].expand(2, -1, -1, -1).repeat_interleave(2, 1)
    for queries, exact in ((at_phi, True), (q[:, :, :1], False)):
        _, approximate = eva_attention(queries, k, v, parameters=[phi], **options)
        _, truth = eva_attention(queries, k, v, **{**options, "window_size": 8})
        epsilon = torch.finfo(torch.float64).eps * 8 * truth.abs().max()
        assert (approximate <= truth + epsilon).all()
        assert bool(((truth - approximate).abs() <= epsilon).all()) == exact
