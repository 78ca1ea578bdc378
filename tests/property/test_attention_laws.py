"""Laws of the op pair: what must hold for every shape, mask, rule and schedule."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flasheva_compile.kernels.blocked import block
from flasheva_compile.kernels.blocked.attention import attention_forward
from flasheva_compile.kernels.blocked.attention_backward import attention_backward
from flasheva_compile.kernels.blocked.geometry import AttentionSettings, attention_geometry
from flasheva_compile.kernels.reference.attention import eva_attention_from_chunk_tokens
from flasheva_compile.kernels.reference.chunk_rules import chunk_tokens
from flasheva_compile.kernels.reference.positions import chunks_of, key_positions
from flasheva_compile.kernels.reference.visibility import visibility
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from flasheva_compile.ops import OP_VERSION, flasheva_attention
from tests.attention_cases import AttentionCase, attention_cases
from tests.tolerance import assert_as_accurate_as_pytorch

FP64 = torch.float64
laws = settings(deadline=None, derandomize=True, max_examples=100, database=None)
many = settings(deadline=None, derandomize=True, max_examples=400, database=None)


def full_mask(case: AttentionCase) -> torch.Tensor:
    """What full attention sees, ``[B, L, S]``, written column by column."""
    seen = torch.zeros(case.batch, case.queries, case.keys, dtype=torch.bool)
    key_mask, segment_ids = case.masks["key_mask"], case.masks["segment_ids"]
    for b in range(case.batch):
        for i in range(case.queries):
            column = i + case.q_offset
            for m in range(case.keys):
                causal = not case.causal or m <= column
                valid = key_mask is None or bool(key_mask[b, m])
                same = segment_ids is None or segment_ids[b, m] == segment_ids[b, column]
                seen[b, i, m] = causal and valid and bool(same)
    return seen


def softmax_attention(case: AttentionCase, mask: torch.Tensor):
    """Full attention with the case's softcap and ALiBi, in plain PyTorch."""

    def attend(q, k, v, *, alibi_slopes, **_):
        k, v = (x.repeat_interleave(case.group, 1) for x in (k, v))
        scores = q @ k.mT * case.head_dim**-0.5
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        if alibi_slopes is not None:
            column = case.q_offset + torch.arange(case.queries)[:, None]
            distance = (torch.arange(case.keys) - column).to(scores.dtype)
            scores = scores + alibi_slopes[:, None, None] * distance
        nothing = ~mask.any(-1)[:, None, :, None]
        scores = scores.masked_fill(~mask[:, None], -torch.inf).masked_fill(nothing, 0)
        out = scores.softmax(-1).masked_fill(nothing, 0) @ v
        return out, scores.logsumexp(-1).masked_fill(nothing[..., 0], -torch.inf)

    return attend


@given(attention_cases())
@many
def test_op_and_its_gradients_are_the_reference(case):
    assert_as_accurate_as_pytorch(case.op(FP64), case.reference, FP64)


@given(attention_cases(causal=True))
@laws
def test_chunk_tokens_and_their_gradients_are_the_reference(case):
    _, k, v = case.qkv
    slots = -(-case.keys // case.chunk_size)
    parameters = case.parameters
    if case.rule == "eva":  # the op takes the features, not the maps
        shape = (*k.shape[:2], slots, case.head_dim)
        parameters = tuple(case._normal(stream, *shape) for stream in (20, 21))
    scale = case.head_dim**-0.5
    # The last gradient also reaches empty slots, where it must be dropped.
    sizes = ((slots, case.head_dim), (slots, case.value_dim), (slots,))
    douts = [case._normal(30 + i, *k.shape[:2], *size) for i, size in enumerate(sizes)]

    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (k, v, *parameters)]
        out = function(*leaves[:2], leaves[2:])
        # The reference's biases are constants under some rules; the op cannot know.
        pairs = [(x, d.to(dtype)) for x, d in zip(out, douts, strict=True) if x.requires_grad]
        outputs, gradients = zip(*pairs, strict=True)
        grads = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
        zeros = [
            torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)
        ]
        return [x.detach() for x in (*out, *zeros)]

    def op(k, v, parameters):
        options = {"rule": case.rule, "chunk_size": case.chunk_size, "scale": scale}
        masks = case.masks.values()
        call = torch.ops.flasheva.chunk_tokens
        return call(k, v, parameters, *masks, **options, version=OP_VERSION)

    def reference(k, v, parameters):
        members = chunks_of(key_positions(k, **case.masks), case.chunk_size).members
        return chunk_tokens(k, v, members, rule=case.rule, parameters=parameters, scale=scale)

    assert_as_accurate_as_pytorch(run(op, FP64), lambda dtype: run(reference, dtype), FP64)


@given(attention_cases(), st.sampled_from([1, 2, 5, 16, 64]), st.sampled_from([1, 1 << 21]))
@laws
def test_schedule_never_changes_a_result(case, block_size, row_budget):
    if case.keys == 0:
        return
    q, k, v = case.qkv
    slots = -(-case.keys // case.chunk_size)
    rfa = (case._normal(20, *k.shape[:2], slots, x.shape[-1]) for x in (k, v))
    tensors = (q, k, v, *rfa, case._normal(22, *k.shape[:2], slots))
    dout = case._normal(23, *q.shape[:3], v.shape[-1])
    names = ("window_size", "chunk_size", "window", "causal", "q_offset", "softcap")
    options = {name: getattr(case, name) for name in names}

    def formula(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        out, lse = eva_attention_from_chunk_tokens(
            *leaves, sink_tokens=case.sink_tokens, **options, **case.masks
        )
        grads = torch.autograd.grad(out, leaves, dout.to(dtype), allow_unused=True)
        zeros = [
            torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)
        ]
        return [out.detach(), lse.detach(), *zeros]

    sinks = -(-case.sink_tokens // case.chunk_size) * case.chunk_size
    s = AttentionSettings(sink_tokens=sinks, scale=case.head_dim**-0.5, **options)
    geometry = attention_geometry(case.queries, case.keys, s, *case.masks.values(), q.device)
    names = ("q", "k", "v", "rfa_k", "rfa_v", "rfa_bias")
    t = block.Operands(**dict(zip(names, tensors, strict=True)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "_ROW_BUDGET", row_budget)
        out, lse = attention_forward(t, geometry, s, block_size=block_size)
        grads = attention_backward(dout, out, lse, t, geometry, s, block_size=block_size)
    assert_as_accurate_as_pytorch([out, lse, *grads], formula, FP64)


@given(attention_cases(max_keys=24))
@laws
def test_exact_keys_and_chunks_partition_what_full_attention_sees(case):
    _, k, _ = case.qkv
    keys = key_positions(k, **case.masks)
    chunks = chunks_of(keys, case.chunk_size)
    names = ("q_offset", "window_size", "chunk_size", "sink_tokens", "window", "causal")
    options = {name: getattr(case, name) for name in names}
    exact, chunk = visibility(keys, chunks, length=case.queries, **options)
    times_seen = exact.long() + (chunk[..., None] & chunks.members[:, None]).sum(2)
    assert torch.equal(times_seen, full_mask(case).long())


@given(attention_cases(max_keys=24, window_size=24))
@laws
def test_window_over_everything_is_softmax(case):
    case = dataclasses.replace(case, window_size=24 * case.chunk_size)
    attend = softmax_attention(case, full_mask(case))
    assert_as_accurate_as_pytorch(case.op(FP64), lambda dtype: case.run(attend, dtype), FP64)


@given(attention_cases(max_keys=24, chunk_size=1, with_parameters=False))
@laws
def test_chunks_of_one_key_are_softmax(case):
    attend = softmax_attention(case, full_mask(case))
    out, lse = (case.op(FP64)[i] for i in (0, 1))
    assert_as_accurate_as_pytorch([out, lse], lambda dtype: case.run(attend, dtype)[:2], FP64)


@given(attention_cases(masks=("none",), rules=("tangent", "mean"), max_keys=24, chunk_size=1))
@laws
def test_tangent_chunks_of_one_key_are_softmax_for_every_phi(case):
    attend = softmax_attention(case, full_mask(case))
    out = case.op(FP64)[0]
    assert_as_accurate_as_pytorch([out], lambda dtype: case.run(attend, dtype)[:1], FP64)


@given(attention_cases(masks=("none",), queries=30, keys=30), st.integers(1, 20))
@laws
def test_left_padding_changes_nothing(case, padding):
    case = dataclasses.replace(case, q_offset=0)
    q, k, v = (functional.pad(x, (0, 0, padding, 0), value=3.0) for x in case.qkv)
    key_mask = (torch.arange(30 + padding) >= padding).expand(case.batch, -1)
    options = {**case.options, "key_mask": key_mask, "parameters": case.parameters}
    slopes = case._normal(7, case.kv_heads * case.group) / 8 if case.alibi else None
    out, lse = flasheva_attention(q, k, v, alibi_slopes=slopes, **options)
    padded = [out[:, :, padding:], lse[:, :, padding:]]
    assert_as_accurate_as_pytorch(padded, lambda dtype: case.reference(dtype)[:2], FP64)
    if case.causal:
        assert not out[:, :, :padding].any()


@given(attention_cases(batch=3, queries=25, keys=25))
@laws
def test_rows_of_a_batch_do_not_see_each_other(case):
    case = dataclasses.replace(case, q_offset=0)
    whole = case.op(FP64)[0]
    for b in range(3):
        masks = {name: x if x is None else x[b : b + 1] for name, x in case.masks.items()}

        def row(dtype, b=b, masks=masks):
            def one_row(q, k, v, **options):
                q, k, v = (x[b : b + 1] for x in (q, k, v))
                return flasheva_attention(q, k, v, **{**options, **masks})

            return case.run(one_row, dtype)[:1]

        assert_as_accurate_as_pytorch([whole[b : b + 1]], row, FP64)


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    attention_cases(masks=("none",), causal=True, batch=1, queries=1, keys=1),
)
@laws
def test_packed_documents_are_each_document_alone(lengths, case):
    total = sum(lengths)
    case = dataclasses.replace(case, queries=total, keys=total, q_offset=0)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]

    def alone(q, k, v, **options):
        parts = [x.split(lengths, 2) for x in (q, k, v)]
        results = [flasheva_attention(*part, **options) for part in zip(*parts, strict=True)]
        return tuple(torch.cat(part, 2) for part in zip(*results, strict=True))

    packed = case.op(FP64, segment_ids=ids)
    assert_as_accurate_as_pytorch(packed, lambda dtype: case.run(alone, dtype), FP64)


@given(
    attention_cases(rules=("mean", "tangent", "evabyte"), causal=True, queries=40, keys=40),
    st.integers(0, 40),
)
@laws
def test_few_queries_with_an_offset_are_the_last_rows(case, queries):
    case = dataclasses.replace(case, q_offset=0)
    q, k, v = case.qkv
    options = {**case.options, "q_offset": 40 - queries, "parameters": case.parameters}
    slopes = case._normal(7, case.kv_heads * case.group) / 8 if case.alibi else None
    last = flasheva_attention(q[:, :, 40 - queries :], k, v, alibi_slopes=slopes, **options)

    def rows(dtype):
        return [x[:, :, 40 - queries :] for x in case.reference(dtype)[:2]]

    assert_as_accurate_as_pytorch(last, rows, FP64)
