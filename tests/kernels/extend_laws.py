"""Laws of the kernels of several new tokens; see ``test_interpreted.py``."""

from __future__ import annotations

import dataclasses

import pytest

import tests.triton_interpreter  # noqa: F401 isort: skip - before anything that imports Triton

import torch
from flasheva_compile.kernels.blocked.cache_state import CacheState
from hypothesis import given

from tests.kernels import decode_cases
from tests.kernels.chunk_fp8 import assert_attended, assert_codes
from tests.kernels.decode_cases import DecodeCase
from tests.kernels.decode_laws import (
    COPIED,
    OVERFULL,
    POOLED,
    WHOLE,
    computed,
    poisoned_buffers,
)
from tests.kernels.extend_cases import (
    ExtendCase,
    extend_cases,
    portions_of,
    run_blocked,
    run_kernels,
)
from tests.kernels.interpreted_laws import examples
from tests.tolerance import assert_as_accurate_as_pytorch


def check(case: ExtendCase) -> None:
    """Compare results and the state after each call."""
    sequence = case.sequence
    with poisoned_buffers():
        out, lse, states = run_kernels(case)
    for call, (got, want) in enumerate(
        zip(states, run_blocked(case, sequence.dtype)[2], strict=True)
    ):
        for name in COPIED:
            same = torch.equal(getattr(got, name), getattr(want, name))
            assert same, f"{name} after call {call}"

    def formula(dtype):
        out, lse, states = run_blocked(case, dtype)
        return [out, lse, *(getattr(state, name) for state in states for name in names)]

    names = computed(sequence)
    pooled = [getattr(state, name) for state in states for name in names]
    assert_as_accurate_as_pytorch([out, lse, *pooled], formula, sequence.dtype)


@given(extend_cases())
@examples(5)
def test_calls_are_the_blocked_code(case):
    check(case)
    if case.sequence.spare_chunks >= 0:
        reference = decode_cases.run_reference
        out, lse, _ = run_kernels(case)
        assert_as_accurate_as_pytorch(
            [out, lse], lambda d: reference(case.sequence, d), case.sequence.dtype
        )


@given(extend_cases(batch=1, kv_heads=1, group=3))
@examples(2)
def test_tiles_and_parts_never_change_a_result_beyond_rounding(case):
    for block_m, block_n, splits in ((16, 16, 1), (64, 16, 5), (32, 64, 2), (16, 32, 11)):
        sequence = dataclasses.replace(case.sequence, block_n=block_n, splits=splits)
        check(dataclasses.replace(case, sequence=sequence, block_m=block_m))


@pytest.mark.parametrize("window", ["sliding", "block"])
@pytest.mark.parametrize("mask", ["none", "holes", "left_padding"])
def test_calls_longer_than_window_and_ring(window, mask):
    """Later tokens of a call see as chunk tokens what earlier ones completed."""
    rule = {"rule": "tangent", "parameter_count": 1, "alibi": True, "seed": 3}
    sequence = DecodeCase(window=window, mask=mask, prefix=5, steps=75, splits=2, group=2, **rule)
    check(ExtendCase(sequence=sequence, portions=(30, 45)))
    empty = dataclasses.replace(sequence, prefix=0, steps=45, splits=1)
    check(ExtendCase(sequence=empty, portions=(45,)))


def test_rows_start_in_different_calls():
    """One of them never: it sees nothing, and nothing of it is kept."""
    sequence = DecodeCase(batch=3, steps=12, mask="left_padding", splits=2)
    starts = torch.tensor([[0], [7], [99]])
    vars(sequence)["key_mask"] = torch.arange(sequence.tokens) >= starts
    case = ExtendCase(sequence=sequence, portions=(4, 5, 3))
    check(case)
    out, lse, states = run_kernels(case)
    assert (out[2] == 0).all()
    assert (lse[2] == -torch.inf).all()
    assert (states[-1].exact_k[2] == 0).all()
    assert states[-1].start.tolist() == [0, 7, 12]


@pytest.mark.parametrize("splits", [1, 3])
def test_a_cache_that_was_too_small_gives_nan(splits):
    sequence = DecodeCase(prefix=20, steps=12, spare_chunks=-4, splits=splits)
    case = ExtendCase(sequence=sequence, portions=(8, 4))
    with poisoned_buffers():
        out, _, _ = run_kernels(case)
    want, _, _ = run_blocked(case, sequence.dtype)
    assert torch.equal(out.isnan(), want.isnan())
    assert 0 < out.isnan().sum() < out.numel()


@given(extend_cases(**WHOLE, spare_chunks=0))
@examples(4)
def test_calls_on_a_cache_of_everything_are_the_blocked_code(case):
    assert case.sequence.chunks == 0
    check(case)


@pytest.mark.parametrize("splits", [1, 3])
def test_more_than_everything_gives_nan(splits):
    sequence = DecodeCase(**OVERFULL, steps=12, splits=splits, batch=2, mask="padded_prefix")
    case = ExtendCase(sequence=sequence, portions=(8, 4))
    assert sequence.chunks == 0
    with poisoned_buffers():
        out, _, _ = run_kernels(case)
    want, _, _ = run_blocked(case, sequence.dtype)
    assert torch.equal(out.isnan(), want.isnan())
    assert 0 < out.isnan().sum() < out.numel()


@given(extend_cases())
@examples(2)
def test_appending_alone_leaves_the_same_state(case):
    _, _, attended = run_kernels(case)
    _, _, appended = run_kernels(case, attend=False)
    for got, want in zip(appended, attended, strict=True):
        for name in CacheState._fields:
            assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize("mask", ["none", "holes", "left_padding"])
@pytest.mark.parametrize(("portions", "parameters"), [((1, 1, 1), 8), ((5, 9), 0), ((2, 40, 3), 8)])
def test_mean_queries_of_the_eva_rule_go_from_call_to_call(mask, portions, parameters):
    """Chunks whose queries came in several calls, and in calls of several chunks."""
    rule = {"rule": "eva", "parameter_count": parameters}
    sizes = {"chunk_size": 12, "window_size": 12, "sink_tokens": 12, "group": 2, "batch": 2}
    steps = {"prefix": 14, "steps": sum(portions), "splits": 2, "seed": 1}
    sequence = DecodeCase(mask=mask, **rule, **sizes, **steps)
    check(ExtendCase(sequence=sequence, portions=portions))


@given(extend_cases(prefix=0, kv_heads=1, batch=1, mask="none"))
@examples(2)
def test_what_no_token_was_written_to_is_never_read(case):
    out, lse, _ = run_kernels(case)
    state = case.sequence.new_state(case.sequence.dtype)
    for name in (*POOLED, "exact_k", "exact_v", "open_q"):
        getattr(state, name).fill_(torch.nan)
    state.exact_mask.fill_(True)
    poisoned = run_kernels(case, CacheState(*state))
    assert torch.equal(out, poisoned[0])
    assert torch.equal(lse, poisoned[1])


# --- chunk tokens in fp8 --------------------------------------------------------------------------


@given(extend_cases(fp8_chunks=True))
@examples(2)
def test_calls_over_fp8_chunk_tokens_are_the_codec_and_the_blocked_code(case):
    check_fp8(case)


@pytest.mark.parametrize("e4m3", [False, True])
def test_calls_that_complete_many_fp8_chunk_tokens(e4m3):
    given = {"rule": "tangent", "parameter_count": 1, "fp8_chunks": True, "e4m3": e4m3}
    sequence = DecodeCase(prefix=5, steps=45, splits=2, group=2, head_dim=24, value_dim=40, **given)
    assert check_fp8(ExtendCase(sequence=sequence, portions=(20, 25))) > 10


def check_fp8(case: ExtendCase) -> int:
    """Compare results and the state after each call; return how many vectors were compared."""
    sequence = case.sequence
    before = sequence.filled_state(sequence.dtype)
    with poisoned_buffers():
        out, lse, states = run_kernels(case)
    plain = dataclasses.replace(sequence, fp8_chunks=False)
    others = run_kernels(dataclasses.replace(case, sequence=plain))[2]
    assert_attended(sequence, lambda d: portions_of(case, d), (out, lse), [before, *states])
    return assert_codes(states, others, sequence.chunk_size)
