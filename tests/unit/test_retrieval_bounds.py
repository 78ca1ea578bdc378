"""Selection by bounds: the score's laws, the op against the reference, what differs from tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flasheva_compile.kernels.blocked.chunk_bounds import chunk_bounds, with_magnitudes
from flasheva_compile.kernels.reference.positions import chunks_of, key_positions
from flasheva_compile.kernels.reference.retrieval import chunk_bounds as reference_bounds
from torch.library import opcheck

from flasheva_compile.errors import LoweringError
from flasheva_compile.ops import flasheva_attention
from tests.attention_cases import MASKS, RULES, AttentionCase
from tests.retrieval_cases import ALL, op_arguments, reference, selection, selector
from tests.tolerance import assert_as_accurate_as_pytorch

CASE = AttentionCase(queries=45, keys=45)
LONG = dataclasses.replace(CASE, queries=200, keys=200, head_dim=32, window_size=32)
FP64 = torch.float64


def op(case: AttentionCase, chunks: int, block: int = 1, dtype=FP64, by: str = "bounds"):
    retrieve = {"retrieve_chunks": chunks, "retrieve_block": block}
    return case.op(dtype, **retrieve, **selector(case, by))


@pytest.mark.parametrize("by", ["bounds", "weighted"])
@pytest.mark.parametrize("mask", MASKS)
def test_bounds_are_the_reference(mask, by):
    case = dataclasses.replace(CASE, mask=mask, batch=3)
    k, masks = case.qkv[1].double(), tuple(case.masks.values())
    members = chunks_of(key_positions(k, *masks), case.chunk_size).members
    # A slot that no chunk fills is never visible; its bounds are not compared.
    filled = members.any(-1)[:, None, :, None]
    weight = selector(case, by).get("selector_weight")
    ours = chunk_bounds(k, *masks, case.chunk_size, weight)
    formula = lambda dtype: [reference_bounds(k.to(dtype), members, weight) * filled]  # noqa: E731
    assert_as_accurate_as_pytorch([ours * filled], formula, FP64)


def test_no_key_scores_more_than_twice_the_score_less_the_mean():
    """The score is halfway from the mean score to a bound of every key's."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 50, 8, generator=generator, dtype=FP64)
    k = torch.randn(1, 1, 64, 8, generator=generator, dtype=FP64)
    score = with_magnitudes(q) @ chunk_bounds(k, None, None, 4).mT
    keys = (q @ k.mT).unflatten(-1, (16, 4))
    bound = 2 * score - keys.mean(-1)
    assert bool((keys <= bound[..., None] + torch.finfo(FP64).eps * 100).all())
    assert bool((score >= keys.mean(-1)).all())


def test_a_chunk_of_one_key_scores_as_its_key():
    q, k, _ = (x.double() for x in CASE.qkv)
    score = with_magnitudes(q) @ chunk_bounds(k, None, None, 1).repeat_interleave(2, 1).mT
    formula = lambda dtype: [(q.to(dtype) @ k.to(dtype).repeat_interleave(2, 1).mT)]  # noqa: E731
    assert_as_accurate_as_pytorch([score], formula, FP64)


@pytest.mark.parametrize("by", ["bounds", "weighted"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("chunks", "block"), [(2, 1), (3, 4)])
def test_op_and_gradients_are_the_reference(rule, mask, chunks, block, by):
    case = dataclasses.replace(CASE, rule=rule, mask=mask, softcap=2.0, alibi=True)
    formula = reference(case, chunks, block, by=by)
    assert_as_accurate_as_pytorch(op(case, chunks, block, by=by), formula, FP64)


@pytest.mark.parametrize("by", ["bounds", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 16])
def test_low_precision_loses_no_more_than_pytorch(dtype, block, by):
    formula = reference(LONG, 3, block, own=dtype, by=by)
    assert_as_accurate_as_pytorch(op(LONG, 3, block, dtype, by), formula, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_a_half_are_no_weights(dtype):
    k = LONG.qkv[1].to(dtype)
    halves = torch.full((LONG.kv_heads, 3, LONG.head_dim), 0.5)
    plain = chunk_bounds(k, None, None, LONG.chunk_size)
    assert torch.equal(chunk_bounds(k, None, None, LONG.chunk_size, halves), plain)


def test_weights_pass_opcheck():
    arguments, options = op_arguments(CASE, FP64, 2, 1, **selector(CASE, "weighted"))
    tensors = [x.detach().requires_grad_() for x in arguments[:6]]
    opcheck(torch.ops.flasheva.retrieval_attention.default, (*tensors, *arguments[6:]), options)


def test_weights_that_do_not_fit_are_refused():
    weight = selector(CASE, "weighted")["selector_weight"]
    options = {**CASE.options, "retrieve_chunks": 2, "retrieve_by": "bounds"}
    for wrong, complaint in (
        (weight[:, :2], "selector_weight is"),
        (weight.long(), "selector_weight is torch.int64"),
        (weight.to("meta"), "selector_weight is on meta"),
        (weight.clone().requires_grad_(), "no gradient"),
    ):
        with pytest.raises(LoweringError, match=complaint):
            flasheva_attention(*CASE.qkv, selector_weight=wrong, **options)
    for other in ({"retrieve_by": "token"}, {"retrieve_chunks": 0}):
        with pytest.raises(LoweringError, match="selector_weight with"):
            flasheva_attention(*CASE.qkv, selector_weight=weight, **{**options, **other})


def test_all_chunks_are_all_chunks_whatever_selects():
    assert_as_accurate_as_pytorch(op(CASE, ALL), reference(CASE, ALL), FP64)


def test_it_selects_a_chunk_whose_mean_hides_its_key():
    """One key answers the query, the other three of its chunk point away: the mean is 0."""
    n, c = 40, 4
    q, k = torch.zeros(1, 1, n, 4), torch.zeros(1, 1, n, 4)
    q[..., 0] = 4.0
    k[0, 0, 8, 0], k[0, 0, 9:12, 0] = 6.0, -2.0  # chunk 2
    k[0, 0, 4:8, 0] = 1.0  # chunk 1: a better mean
    options = {"window_size": 8, "chunk_size": c, "chunk_rule": "mean", "retrieve_chunks": 1}
    v = torch.zeros(1, 1, n, 1)
    v[0, 0, 8] = 1.0
    by_token = flasheva_attention(q, k, v, **options)[0][0, 0, -1]
    by_bounds = flasheva_attention(q, k, v, **options, retrieve_by="bounds")[0][0, 0, -1]
    assert by_bounds.item() > 2 * by_token.item()


def test_the_selectors_differ():
    token, bounds, weighted = (
        selection(LONG, FP64, 2, by=by) for by in ("token", "bounds", "weighted")
    )
    assert not torch.equal(token, bounds)
    assert not torch.equal(bounds, weighted)


def test_an_unknown_selector_is_refused():
    options = {**CASE.options, "retrieve_chunks": 2, "retrieve_by": "luck"}
    with pytest.raises(LoweringError, match="retrieve_by='luck'"):
        flasheva_attention(*CASE.qkv, **options)
