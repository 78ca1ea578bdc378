"""Laws of the retrieving cache: any portions compute what one call over everything does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flasheva_compile.errors import LoweringError
from flasheva_compile.retrieval_cache_ops import new_retrieval_state, retrieval_options
from tests.attention_cases import AttentionCase
from tests.property.test_decode_laws import FP64, cached_calls, eva_config
from tests.retrieval_cases import ALL, reference, selector
from tests.tolerance import assert_as_accurate_as_pytorch

laws = settings(deadline=None, derandomize=True, max_examples=150, database=None)
RULES = ("mean", "tangent", "evabyte")
calls = cached_calls(rules=RULES, alibi=False)  # which layers that retrieve refuse
counts = st.sampled_from([1, 2, 3, ALL])
blocks = st.sampled_from([1, 2, 3, 8])
selectors = st.sampled_from(["token", "bounds", "weighted"])


def in_portions(
    case,
    sizes,
    dtype,
    chunks,
    block,
    *,
    append_first=False,
    rows=slice(None),
    room=0,
    by="token",
    store="device",
):
    """Run the ops; the first portion may be appended without attending."""
    q, k, v = (x.to(dtype)[rows] for x in case.qkv)
    parameters = [p.to(dtype) for p in case.parameters]
    key_mask = case.masks["key_mask"]
    config = eva_config(case)
    chosen = selector(case, by)
    kind = chosen.pop("retrieve_by")
    config = config.replace(retrieve_chunks=chunks, retrieve_block=block, retrieve_by=kind)
    options = retrieval_options(config, case.head_dim**-0.5, case.softcap) | chosen
    state = new_retrieval_state(k, v, room or case.keys, options, store=store)
    outs, lses, lo = [], [], 0
    for size in sizes:
        part = [x[:, :, lo : lo + size] for x in (q, k, v)]
        mask = None if key_mask is None else key_mask[rows, lo : lo + size]
        inputs = (*part, parameters, mask, *state)
        if append_first and lo == 0:
            torch.ops.flasheva.retrieval_append(*inputs, **options)
        else:
            out, lse = torch.ops.flasheva.retrieval_decode(*inputs, **options)
            outs.append(out)
            lses.append(lse)
        lo += size
    skipped = sizes[0] if append_first else 0
    empty = q.new_zeros(*q.shape[:2], 0, v.shape[3])
    return [torch.cat([empty, *outs], 2), torch.cat([empty[..., 0], *lses], 2)], skipped, state


@given(calls, counts, blocks, selectors)
@settings(laws, max_examples=200)
def test_any_portions_are_one_call(call, chunks, block, by):
    case, sizes, append_first = call
    actual, skipped, state = in_portions(
        case, sizes, FP64, chunks, block, append_first=append_first, by=by
    )
    assert int(state.length) == case.keys
    formula = reference(case, chunks, block, by=by)
    assert_as_accurate_as_pytorch(
        actual, lambda dtype: [x[:, :, skipped:] for x in formula(dtype)[:2]], FP64
    )


@given(cached_calls(rules=RULES, alibi=False, batch=3), counts, blocks)
@settings(laws, max_examples=40)
def test_rows_do_not_see_each_other(call, chunks, block):
    case, sizes, _ = call
    together = in_portions(case, sizes, FP64, chunks, block)[0]
    alone = in_portions(case, sizes, FP64, chunks, block, rows=slice(1, 2))[0]
    formula = lambda dtype: [x[1:2].to(dtype) for x in together]  # noqa: E731
    assert_as_accurate_as_pytorch(alone, formula, FP64)


@pytest.mark.parametrize("by", ["token", "bounds", "weighted"])
@pytest.mark.parametrize("block", [1, 4])
def test_low_precision_is_as_accurate_as_pytorch(block, by):
    case = AttentionCase(queries=45, keys=45, rule="tangent")
    actual = in_portions(case, [30, *[1] * 15], torch.bfloat16, 2, block, by=by)[0]
    formula = reference(case, 2, block, own=torch.bfloat16, by=by)
    assert_as_accurate_as_pytorch(actual, lambda dtype: formula(dtype)[:2], torch.bfloat16)


@pytest.mark.parametrize("store", ["device", "fp8"])
@pytest.mark.parametrize("sizes", [[45], [20, *[1] * 25]])
def test_what_padding_holds_is_not_read(store, sizes):
    case = AttentionCase(queries=45, keys=45, mask="left_padding", chunk_size=4, window_size=8)
    valid = case.masks["key_mask"]
    assert not valid.all()
    clean, dirty = (dataclasses.replace(case) for _ in range(2))
    hidden = ~valid[:, None, :, None]
    for x, filler in ((clean, 0.0), (dirty, torch.nan)):
        q, k, v = case.qkv
        vars(x).update(qkv=(q, k.masked_fill(hidden, filler), v.masked_fill(hidden, filler)))
    wanted, got = (in_portions(x, sizes, FP64, 2, 1, store=store)[0][0] for x in (clean, dirty))
    real = valid[:, None].expand(wanted.shape[:3])
    assert torch.equal(got[real], wanted[real])


def test_a_full_cache_answers_nan_instead_of_forgetting():
    case = AttentionCase(keys=40, queries=40, batch=1)
    out = in_portions(case, [20, *[1] * 20], FP64, 2, 1, room=38)[0][0]
    assert out.isnan().all(-1)[0, 0].tolist() == [False] * 38 + [True] * 2


def test_what_does_not_fit_is_refused():
    case = AttentionCase()
    _, _, state = in_portions(case, [case.keys], FP64, 2, 1)
    config = eva_config(case).replace(retrieve_chunks=2)
    options = retrieval_options(config, 1.0)
    q, k, v = (x[:1, :, :1] for x in case.qkv)
    with pytest.raises(LoweringError, match="the cache holds"):
        torch.ops.flasheva.retrieval_decode(q, k, v, list(case.parameters), None, *state, **options)
    q, k, v = (x[:, :, :1] for x in case.qkv)
    options["rule"] = "eva"
    with pytest.raises(LoweringError, match="rule 'eva' with retrieve_chunks in a cache"):
        torch.ops.flasheva.retrieval_decode(q, k, v, [], None, *state, **options)


@pytest.mark.parametrize("store", ["device", "fp8"])
@pytest.mark.parametrize("op", ["retrieval_decode", "retrieval_append"])
def test_ops_pass_opcheck(op, store):
    case = dataclasses.replace(AttentionCase(), mask="holes", keys=21, queries=21)
    config = eva_config(case).replace(retrieve_chunks=2, retrieve_block=4)
    options = retrieval_options(config, 0.5)
    state = new_retrieval_state(*case.qkv[1:], 24, options, store=store)
    inputs = (*case.qkv, list(case.parameters), case.masks["key_mask"], *state)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.flasheva, op), inputs, options, test_utils=checks)
