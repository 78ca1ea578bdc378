"""Laws of the retrieving cache in fp8: what is rounded, by how much, and what never is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flasheva_compile.kernels.blocked import fp8
from hypothesis import given, settings

from flasheva_compile.errors import LoweringError
from flasheva_compile.retrieval_cache_ops import new_retrieval_state, retrieval_options
from tests.attention_cases import AttentionCase
from tests.property.test_decode_laws import FP64, eva_config
from tests.property.test_retrieval_decode_laws import (
    blocks,
    calls,
    counts,
    in_portions,
    laws,
    selectors,
)
from tests.retrieval_cases import ALL, reference
from tests.tolerance import assert_as_accurate_as_pytorch

STORED = ("keys", "values", "exponents", "mask", "near_k", "near_v", "start", "length")
POOLED = ("rfa_k", "rfa_v", "rfa_bias", "bounds")
CASE = AttentionCase(queries=45, keys=45)


def rounded(x):
    return fp8.decode(*fp8.encode(x), x.dtype)


def with_inputs(case, change):
    """Return the case with other keys and values."""
    q, k, v = case.qkv
    changed = dataclasses.replace(case)
    vars(changed)["qkv"] = (q, change(k), change(v))
    return changed


@given(calls, counts, blocks, selectors)
@settings(laws, max_examples=30)
def test_numbers_that_fp8_has_are_the_formula_in_any_portions(call, chunks, block, by):
    case, sizes, append_first = call
    case = with_inputs(case, rounded)
    options = {"append_first": append_first, "by": by}
    actual, skipped, _ = in_portions(case, sizes, FP64, chunks, block, store="fp8", **options)
    formula = reference(case, chunks, block, by=by)
    assert_as_accurate_as_pytorch(
        actual, lambda dtype: [x[:, :, skipped:] for x in formula(dtype)[:2]], FP64
    )


@given(calls, counts, blocks, selectors)
@settings(laws, max_examples=30)
def test_any_portions_store_the_same_bytes_and_attend_alike(call, chunks, block, by):
    case, sizes, append_first = call
    options = {"store": "fp8", "by": by}
    actual, skipped, state = in_portions(
        case, sizes, FP64, chunks, block, append_first=append_first, **options
    )
    whole, _, filled = in_portions(case, [case.keys], FP64, chunks, block, **options)
    for name in STORED:
        assert torch.equal(getattr(state, name), getattr(filled, name)), name
    formula = lambda dtype: [x[:, :, skipped:].to(dtype) for x in whole]  # noqa: E731
    assert_as_accurate_as_pytorch(actual, formula, FP64)
    # What is pooled was never rounded.
    exact = in_portions(case, sizes, FP64, chunks, block, append_first=append_first, by=by)[2]
    for name in POOLED:
        assert torch.equal(getattr(state, name), getattr(exact, name)), name


def test_sinks_and_window_are_exact():
    case = dataclasses.replace(CASE, window_size=48)
    steps = [20, *[1] * 25]
    exact, here = (
        in_portions(case, steps, FP64, ALL, 1, store=store)[0] for store in ("device", "fp8")
    )
    assert all(map(torch.equal, here, exact))


def score_bound(case):
    """Return how far fp8 may move a score of each query, ``[B, Hq, L]``: a sixteenth of products.

    Beneath a 2^15th of the largest number of a token steps are fixed.
    """
    q, k = case.qkv[0].abs(), case.qkv[1].abs()
    wrong = k / 16 + k.amax(-1, keepdim=True) * 2**-17
    grouped = q.unflatten(1, (k.shape[1], -1)) * case.head_dim**-0.5
    return (grouped @ wrong[:, :, None].mT).amax(-1).flatten(1, 2)


def both_stores(case, chunks, dtype=FP64, by="token"):
    steps = [20, *[1] * 25]
    return (
        in_portions(case, steps, dtype, chunks, 1, store=x, by=by)[0] for x in ("fp8", "device")
    )


@pytest.mark.parametrize("by", ["token", "bounds"])
@pytest.mark.parametrize("chunks", [2, ALL])
def test_rounding_is_bounded(chunks, by):
    (out, lse), (want, want_lse) = both_stores(CASE, chunks, by=by)
    assert (out - want).abs().max() > 1e-4, "nothing was rounded"
    score, v = score_bound(CASE), CASE.qkv[2].abs().amax()
    assert ((lse - want_lse).abs() <= score).all()
    # Weights that are off by e^(2 score) at most leave this much of a sum of values.
    assert ((out - want).abs() <= ((2 * score).expm1()[..., None] + 1 / 16 + 2**-17) * v).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_channels_neither_overflow_nor_hide_others(dtype):
    """A channel of 2^12, and the largest number of fp16, whose rounding fp16 does not have."""
    q, k, v = (x.clone() for x in CASE.qkv)
    q[..., 1] /= 2.0**12
    k[..., 1] *= 2.0**12
    v[..., 2] = torch.finfo(torch.float16).max
    case = dataclasses.replace(CASE)
    vars(case)["qkv"] = (q, k, v)
    (out, lse), (want, want_lse) = both_stores(case, ALL, dtype)
    assert out.isfinite().all()
    rounding = 64 * torch.finfo(dtype).eps
    assert ((lse - want_lse).abs() <= score_bound(case) + rounding).all()
    torch.testing.assert_close(out[..., 2], want[..., 2], rtol=1 / 16, atol=0)


def test_a_token_that_is_not_finite_is_nan_in_the_store():
    case, at = with_inputs(CASE, lambda x: x.index_fill(2, torch.tensor([6]), torch.inf)), 6
    state = in_portions(case, [45], FP64, ALL, 1, store="fp8")[2]
    assert (state.exponents[:, :, at] == 128).all()  # of a byte: -128
    assert (state.keys[:, :, at] == 127).all()
    assert (state.exponents[:, :, [*range(at), *range(at + 1, 45)]] != 128).all()


def test_other_sizes_than_the_cache_s_are_refused():
    config = eva_config(CASE).replace(retrieve_chunks=2)
    options = retrieval_options(config, 1.0)
    q, k, v = (x[:, :, :1] for x in CASE.qkv)
    state = new_retrieval_state(k.float(), v.float(), 24, options, store="fp8")
    with pytest.raises(LoweringError, match="the cache holds"):
        torch.ops.flasheva.retrieval_decode(q, k, v, list(CASE.parameters), None, *state, **options)
