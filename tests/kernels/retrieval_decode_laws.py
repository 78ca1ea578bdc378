"""Laws of the kernels of generation with retrieval, interpreted.

``test_interpreted.py`` starts them.
"""

from __future__ import annotations

import dataclasses

import pytest

from tests import triton_interpreter  # isort: skip - before anything that imports Triton

import torch
from flasheva_compile.kernels.blocked.retrieval_select import largest_scores
from flasheva_compile.kernels.blocked.retrieval_state import RetrievalState
from flasheva_compile.lowering.emit import module
from flasheva_compile.lowering.load import load
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.kernels.interpreted_laws import examples
from tests.kernels.retrieval_decode_cases import (
    RetrievalDecodeCase,
    retrieval_decode_cases,
    run_blocked,
    run_kernels,
    selector_scores,
)
from tests.tolerance import assert_as_accurate_as_pytorch

POOLED = ("rfa_k", "rfa_v", "rfa_bias", "bounds")
Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[RetrievalState]]
COPIED = ("keys", "values", "mask", "near_k", "near_v", "exponents", "start", "length")


def check(case: RetrievalDecodeCase) -> Found:
    """Compare the state after each step, the selection, and results given the selection."""
    with triton_interpreter.poisoned_buffers():
        out, lse, selected, states = run_kernels(case)
    for step, (got, want) in enumerate(zip(states, run_blocked(case, case.dtype)[2], strict=True)):
        for name in COPIED:
            same = torch.equal(getattr(got, name), getattr(want, name))
            assert same, f"{name} after step {step}"
        check_selection(case, step, got, selected[:, :, step])

    def formula(dtype):
        out, lse, states = run_blocked(case, dtype, selected)
        return [out, lse, *(getattr(state, name) for state in states for name in POOLED)]

    pooled = [getattr(state, name) for state in states for name in POOLED]
    assert_as_accurate_as_pytorch([out, lse, *pooled], formula, case.dtype)
    return out, lse, selected, states


def check_selection(
    case: RetrievalDecodeCase, step: int, state: RetrievalState, selected: torch.Tensor
) -> None:
    """Assert that a selection holds the best visible chunks, as far as fp32 can tell."""
    scores, error, visible = selector_scores(case, step, state)
    assert selected.shape[-1] == min(case.retrieve_chunks, state.rfa_k.shape[2])
    for at in torch.cartesian_prod(*map(torch.arange, selected.shape[:2])).tolist():
        seen, score, wrong = visible[at[0]], scores[tuple(at)], error[tuple(at)]
        found = selected[tuple(at)].long()
        count = min(case.retrieve_chunks, int(seen.sum()))
        assert (found[count:] == -1).all()
        found = found[:count]
        assert (found.diff() > 0).all()
        assert seen[found].all()
        left = seen.clone()
        left[found] = False
        if count and left.any():
            least = (score + wrong)[found].min()
            assert least >= (score - wrong)[left].max()


@given(retrieval_decode_cases())
@examples(24)
def test_steps_are_the_blocked_code(case):
    check(case)


@given(retrieval_decode_cases(retrieve_by="bounds"))
@examples(4)
def test_steps_that_select_by_bounds_are_the_blocked_code(case):
    check(case)


@given(retrieval_decode_cases(batch=1, kv_heads=1, group=2, steps=2, prefix=60))
@examples(2)
def test_tiles_and_parts_never_change_a_result_beyond_rounding(case):
    for block_n, splits in ((16, 1), (16, 5), (64, 2), (32, 11)):
        check(dataclasses.replace(case, block_n=block_n, splits=splits))


TIES = {"ties": True, "rule": "mean", "parameter_count": 0, "scale": 0.25, "softcap": 0.0}


@given(
    retrieval_decode_cases(**TIES, chunk_size=2, window_size=4, sink_tokens=2, prefix=64),
    st.sampled_from(["token", "bounds"]),
)
@examples(4)
def test_equal_scores_are_resolved_by_index(case, by):
    """All scores are exact, so that the blocked code must select the same."""
    case = dataclasses.replace(case, retrieve_by=by, weighted=False)
    _, _, selected, states = check(case)
    tied = False
    for step, state in enumerate(states):
        scores, _, visible = selector_scores(case, step, state)
        count = selected.shape[-1]
        want = largest_scores(scores, visible[:, None], count)
        assert torch.equal(selected[:, :, step], want)
        seen = scores.masked_fill(~visible[:, None], torch.nan)
        tied |= bool((seen[..., :, None] == seen[..., None, :]).sum() > seen.numel())
    assume(tied)  # a row may be padding but for its window


@pytest.mark.parametrize("window", ["sliding", "block"])
@pytest.mark.parametrize(
    ("mask", "by", "store"), [("none", "token", "fp8"), ("holes", "bounds", "offloaded")]
)
def test_long_sequences_from_an_empty_cache(window, mask, by, store):
    shared = {"rule": "tangent", "parameter_count": 1, "retrieve_by": by, "store": store}
    check(RetrievalDecodeCase(window=window, mask=mask, steps=32, splits=2, group=2, **shared))


def test_rows_start_at_different_steps():
    """One of them never: it sees nothing."""
    case = RetrievalDecodeCase(batch=3, steps=20, mask="left_padding", splits=2)
    starts = torch.tensor([[0], [4], [99]])
    vars(case)["key_mask"] = torch.arange(case.tokens) >= starts
    out, lse, selected, states = check(case)
    assert (out[2] == 0).all()
    assert (lse[2] == -torch.inf).all()
    assert (selected[2] == -1).all()
    assert (selected[0, 0, -1] >= 0).all()
    assert states[-1].start.tolist() == [0, 4, 20]


@pytest.mark.parametrize("splits", [1, 3])
def test_a_full_cache_gives_nan(splits):
    case = RetrievalDecodeCase(prefix=20, steps=8, room=-4, splits=splits)
    with triton_interpreter.poisoned_buffers():
        out, _, _, states = run_kernels(case)
    want, _, _ = run_blocked(case, case.dtype)
    assert torch.equal(out.isnan(), want.isnan())
    assert out.isnan().all(-1)[0, 0].tolist() == [False] * 4 + [True] * 4
    assert int(states[-1].length) == 28


@given(retrieval_decode_cases(prefix=0, kv_heads=1, batch=1, room=7))
@examples(2)
def test_what_no_token_was_written_to_is_never_read(case):
    case = dataclasses.replace(case, steps=2 * case.chunk_size + case.window_size + 2)
    out, lse, selected, _ = run_kernels(case)
    state = case.new_state(case.dtype)
    for name in ("keys", "values", "near_k", "near_v", *POOLED):
        stored = getattr(state, name)
        stored.fill_(torch.nan if stored.is_floating_point() else 127)  # fp8's own
    state.mask.fill_(True)
    poisoned = run_kernels(case, RetrievalState(*state))
    assert torch.equal(out, poisoned[0])
    assert torch.equal(lse, poisoned[1])
    assert torch.equal(selected, poisoned[2])


def test_a_selected_chunk_that_stays_compressed_too_is_noticed(monkeypatch):
    case = RetrievalDecodeCase(prefix=40, steps=2, chunk_size=4, window_size=8)
    check(case)
    emit = module._TILED_BODIES["retrieval_select"]

    def counting_twice(*arguments):
        body = emit(*arguments)
        kept = [line for line in body.splitlines() if not line.startswith("tl.store(taken")]
        assert len(kept) == len(body.splitlines()) - 1
        return "\n".join(kept) + "\n"

    monkeypatch.setitem(module._TILED_BODIES, "retrieval_select", counting_twice)
    load.cache_clear()
    try:
        with pytest.raises(AssertionError, match="allowed"):
            check(case)
    finally:
        load.cache_clear()


@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_over_fp8_with_large_channels_are_the_blocked_code(dtype, e4m3):
    case = {"prefix": 40, "steps": 3, "value_dim": 40, "dtype": dtype, "e4m3": e4m3}
    check(RetrievalDecodeCase(**case, store="fp8", outliers=True))


@pytest.mark.parametrize("e4m3", [False, True])
def test_a_token_that_fp8_has_no_numbers_of_is_nan_where_it_is_selected(e4m3):
    given = {"retrieve_chunks": 64, "value_dim": 24, "e4m3": e4m3}
    case = RetrievalDecodeCase(prefix=40, steps=1, store="fp8", **given)
    for name in ("keys", "values"):
        out = {}
        for at in (20, 39):  # behind the window, and in it, where copies are read
            state = case.filled_state(case.dtype)
            which = int(name == "values")
            getattr(state, name)[:, :, at] = 127
            state.exponents[:, :, at, which] = 128
            out[at] = run_kernels(case, state)[0]
        assert out[20].isnan().all()
        assert out[39].isfinite().all()
