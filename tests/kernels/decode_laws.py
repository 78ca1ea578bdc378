"""Laws of the kernels of generation, interpreted; see ``test_interpreted.py``."""

from __future__ import annotations

import dataclasses
import math
from contextlib import contextmanager

import pytest

import tests.triton_interpreter  # noqa: F401 isort: skip - before anything that imports Triton

import torch
from flasheva_compile.kernels.blocked.cache_state import CacheState
from hypothesis import given

from tests.kernels.chunk_fp8 import assert_attended, assert_codes
from tests.kernels.decode_cases import (
    DecodeCase,
    decode_cases,
    run_blocked,
    run_kernels,
    run_reference,
    steps_of,
)
from tests.kernels.interpreted_laws import examples
from tests.tolerance import assert_as_accurate_as_pytorch


@contextmanager
def poisoned_buffers():
    """Fill every new buffer of numbers with NaN: what the parts leave, and the results."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*arguments, **options):
        x = new_empty(*arguments, **options)
        return x.fill_(torch.nan) if x.dtype.is_floating_point else x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        yield


POOLED = ("rfa_k", "rfa_v", "rfa_bias", "chunk_mean")
COPIED = ("exact_k", "exact_v", "exact_mask", "start", "length")


def computed(case: DecodeCase) -> tuple[str, ...]:
    """Return the fields of the state that are sums."""
    return (*POOLED, "open_q") if case.rule == "eva" else POOLED


def check(case: DecodeCase) -> None:
    """Compare results and the state after each step."""
    with poisoned_buffers():
        out, lse, states = run_kernels(case)
    for step, (got, want) in enumerate(zip(states, run_blocked(case, case.dtype)[2], strict=True)):
        for name in COPIED:
            same = torch.equal(getattr(got, name), getattr(want, name))
            assert same, f"{name} after step {step}"

    def formula(dtype):
        out, lse, states = run_blocked(case, dtype)
        return [out, lse, *(getattr(state, name) for state in states for name in computed(case))]

    pooled = [getattr(state, name) for state in states for name in computed(case)]
    assert_as_accurate_as_pytorch([out, lse, *pooled], formula, case.dtype)
    assert_as_accurate_as_pytorch([out, lse], lambda d: run_reference(case, d), case.dtype)


@given(decode_cases())
@examples(32)
def test_steps_are_the_blocked_code_and_the_reference(case):
    check(case)


@given(decode_cases(batch=1, kv_heads=1, group=2, steps=2))
@examples(2)
def test_tiles_and_parts_never_change_a_result_beyond_rounding(case):
    for block_n, splits in ((16, 1), (16, 5), (64, 2), (32, 11)):
        check(dataclasses.replace(case, block_n=block_n, splits=splits))


@pytest.mark.parametrize(
    ("window", "mask", "rule", "count"),
    [
        *(
            (window, mask, "tangent", 1)
            for window in ("sliding", "block")
            for mask in ("none", "holes")
        ),
        *(("sliding", "holes", "eva", 8), ("block", "none", "eva", 8)),
    ],
)
def test_long_sequences_from_an_empty_cache(window, mask, rule, count):
    """The ring goes round more than twice; the first steps see nothing but themselves."""
    given = {"rule": rule, "parameter_count": count, "alibi": rule == "tangent"}
    check(DecodeCase(window=window, mask=mask, steps=32, splits=2, group=2, **given))


def test_rows_start_at_different_steps():
    """One of them never: it sees nothing, and nothing of it is kept."""
    case = DecodeCase(batch=3, steps=10, mask="left_padding", splits=2)
    starts = torch.tensor([[0], [4], [99]])
    vars(case)["key_mask"] = torch.arange(case.tokens) >= starts
    check(case)
    out, lse, states = run_kernels(case)
    assert (out[2] == 0).all()
    assert (lse[2] == -torch.inf).all()
    assert (states[-1].exact_k[2] == 0).all()
    assert states[-1].start.tolist() == [0, 4, 10]


# A first block without room for chunk tokens: every token so far, whatever the block's size.
WHOLE = {"window": "block", "sink_tokens": 0, "chunk_size": 200, "window_size": 200}
OVERFULL = {**WHOLE, "chunk_size": 24, "window_size": 24, "prefix": 20, "spare_chunks": -1}


@given(decode_cases(**WHOLE, spare_chunks=0))
@examples(8)
def test_a_cache_of_everything_is_the_blocked_code_and_the_reference(case):
    assert case.chunks == 0
    check(case)
    with poisoned_buffers():
        out, lse, _ = run_kernels(case, unwritten_is_nan(case))
    assert_as_accurate_as_pytorch([out, lse], lambda d: run_reference(case, d), case.dtype)


def unwritten_is_nan(case):
    """Return the state after the prefix, whose other slots hold NaN and valid flags."""
    state = case.filled_state(case.dtype)
    held = (state.length - state.start)[:, None] > torch.arange(state.exact_mask.shape[1])
    for x in (state.exact_k, state.exact_v):
        x.masked_fill_(~held[:, None, :, None], torch.nan)
    state.exact_mask.masked_fill_(~held, True)
    return state


@pytest.mark.parametrize("splits", [1, 3])
def test_more_than_everything_gives_nan_and_is_not_written(splits):
    case = DecodeCase(**OVERFULL, steps=8, splits=splits, batch=2, mask="padded_prefix")
    assert case.chunks == 0
    with poisoned_buffers():
        out, _, states = run_kernels(case)
    want, _, _ = run_blocked(case, case.dtype)
    assert torch.equal(out.isnan(), want.isnan())
    assert 0 < out.isnan().sum() < out.numel()
    assert torch.equal(states[-1].exact_k[0], states[3].exact_k[0])


@pytest.mark.parametrize("splits", [1, 3])
def test_a_cache_that_was_too_small_gives_nan(splits):
    case = DecodeCase(prefix=20, steps=8, spare_chunks=-4, splits=splits)
    with poisoned_buffers():
        out, lse, _ = run_kernels(case)
    want, want_lse, _ = run_blocked(case, case.dtype)
    assert torch.equal(out.isnan(), want.isnan())
    assert 0 < out.isnan().sum() < out.numel()
    assert_as_accurate_as_pytorch([lse], lambda d: [run_blocked(case, d)[1]], case.dtype)
    assert torch.equal(lse.isnan(), want_lse.isnan())


@given(decode_cases(prefix=0, kv_heads=1, batch=1))
@examples(3)
def test_what_no_token_was_written_to_is_never_read(case):
    case = dataclasses.replace(case, steps=case.chunk_size + 2)
    out, lse, _ = run_kernels(case)
    state = case.new_state(case.dtype)
    for name in (*POOLED, "exact_k", "exact_v", "open_q"):
        getattr(state, name).fill_(torch.nan)
    state.exact_mask.fill_(True)
    poisoned = run_kernels(case, CacheState(*state))
    assert torch.equal(out, poisoned[0])
    assert torch.equal(lse, poisoned[1])


# --- chunk tokens in fp8 --------------------------------------------------------------------------


@given(decode_cases(fp8_chunks=True))
@examples(5)
def test_steps_over_fp8_chunk_tokens_are_the_codec_and_the_blocked_code(case):
    before = case.filled_state(case.dtype)
    with poisoned_buffers():
        out, lse, states = run_kernels(case)
    plain = run_kernels(dataclasses.replace(case, fp8_chunks=False))[2]
    assert_codes(states, plain, case.chunk_size)
    assert_attended(case, lambda d: steps_of(case, d), (out, lse), [before, *states])


@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize(("dtype", "rule"), [(torch.bfloat16, "mean"), (torch.float16, "eva")])
def test_a_chunk_token_that_is_not_finite_is_nan_in_fp8(dtype, rule, e4m3):
    given = {"fp8_chunks": True, "e4m3": e4m3, "value_dim": 24}
    case = DecodeCase(**given, dtype=dtype, rule=rule, prefix=6, steps=11)
    plain = dataclasses.replace(case, fp8_chunks=False)
    for x in (case, plain):
        x.qkv[2][0, 0, 5, 3] = torch.inf  # its value alone: the chunk is behind the sinks
    out, _, states = run_kernels(case)
    assert_codes(states, run_kernels(plain)[2], case.chunk_size)
    assert states[-1].rfa_exponents[0, 0, :4, 1].tolist().count(-128) == 1
    assert out[0, 0, -1].isnan().all()
    assert torch.equal(out.isnan(), run_blocked(case, dtype)[0].isnan())


WIDE = {"head_dim": 24, "value_dim": 40, "group": 3, "prefix": 160, "steps": 1}


@pytest.mark.parametrize("value_dim", [16, 40, 23])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_both_ways_from_bytes_to_numbers_give_the_same_bits(dtype, value_dim):
    given = {**WIDE, "value_dim": value_dim, "fp8_chunks": True, "dtype": dtype}
    found = []
    for e4m3 in (False, True):
        case = DecodeCase(**given, e4m3=e4m3)
        state = case.filled_state(dtype)
        every = torch.arange(state.rfa_k.numel(), dtype=torch.uint8).view_as(state.rfa_k)
        state.rfa_k.copy_(torch.where(every % 128 == 127, 126, every))  # with all tiny numbers
        every = torch.arange(state.rfa_v.numel(), dtype=torch.uint8).view_as(state.rfa_v)
        state.rfa_v.copy_(torch.where(every % 128 == 127, 254, every))
        state.rfa_exponents.fill_(-7)
        found.append(run_kernels(case, state))
    (out, lse, _), (other, other_lse, _) = found
    assert out.isfinite().all()
    assert torch.equal(out, other)
    assert torch.equal(lse, other_lse)


@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_of_very_different_size_keep_their_shares_in_fp8(dtype, e4m3):
    """Values from 1 to 2^90 whose shares in the sum are about equal, in any order."""
    case = DecodeCase(**WIDE, fp8_chunks=True, e4m3=e4m3, dtype=dtype, scale=1e-3)
    for order in ((0, 90), (90, 0)):
        before = case.filled_state(dtype)
        sizes = torch.linspace(*order, before.rfa_bias.shape[-1]).round()
        before.rfa_exponents[..., 1] = (sizes - 8).to(torch.int8)
        before.rfa_bias.copy_(sizes * -0.6931)
        check_attended(case, before)


@pytest.mark.parametrize("e4m3", [False, True])
@pytest.mark.parametrize("size", [1e36, 1e-30])
def test_queries_of_any_size_attend_to_fp8(size, e4m3):
    """Keys make up for it, but for one channel's that is far smaller than the others of its row."""
    case = DecodeCase(**WIDE, fp8_chunks=True, e4m3=e4m3, dtype=torch.bfloat16)
    case.qkv[0].mul_(size)
    case.qkv[0][..., 5].mul_(2.0**-12)
    case.qkv[1][:, :, -1].mul_(1 / size)
    before = case.filled_state(torch.bfloat16)
    before.exact_k.mul_(1 / size)
    moved = before.rfa_exponents[..., 0].int() - round(math.log2(size))
    before.rfa_exponents[..., 0] = moved.clamp(-126)
    check_attended(case, before)


def check_attended(case: DecodeCase, before: CacheState) -> None:
    """Compare the steps after a state in fp8 with plain PyTorch over what it means."""
    out, lse, states = run_kernels(case, CacheState(*(x.clone() for x in before)))
    assert out.isfinite().all()
    assert_attended(case, lambda d: steps_of(case, d), (out, lse), [before, *states])


@pytest.mark.parametrize("e4m3", [False, True])
def test_the_largest_values_of_fp16_stay_numbers_in_fp8(e4m3):
    case = DecodeCase(fp8_chunks=True, e4m3=e4m3, dtype=torch.float16, prefix=6, steps=11)
    case.qkv[2][0, 0, 4:8, 3] = 64000.0  # which e4m3 rounds up to 2^16
    out, _, states = run_kernels(case)
    wanted = run_blocked(case, torch.float16)[0]
    assert wanted.abs().max() > 10000
    assert states[-1].rfa_exponents.max() == 8
    torch.testing.assert_close(out, wanted, rtol=5e-3, atol=1e-2)
