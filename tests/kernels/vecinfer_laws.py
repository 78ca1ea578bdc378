"""Laws of the kernels over a cache of codes; see ``test_interpreted.py``."""

from __future__ import annotations

import dataclasses

import pytest

from tests import triton_interpreter  # isort: skip - before anything that imports Triton

import torch
from flasheva_compile.lowering.emit import module
from flasheva_compile.lowering.load import load
from hypothesis import given

from flasheva_compile.quantization.state import QuantizedState
from tests.kernels.interpreted_laws import examples
from tests.kernels.vecinfer_agreement import assert_states_agree
from tests.kernels.vecinfer_cases import (
    VecInferCase,
    run_kernels,
    run_pytorch,
    vecinfer_cases,
)
from tests.tolerance import assert_as_accurate_as_pytorch


def check(case: VecInferCase) -> None:
    """Compare results and the state after each call."""
    with triton_interpreter.poisoned_buffers():
        out, lse, states = run_kernels(case)
    *_, wanted = run_pytorch(case, case.dtype, states)
    assert_states_agree(case, states, wanted)

    def formula(dtype):
        return run_pytorch(case, dtype, states)[:2]

    assert_as_accurate_as_pytorch([out, lse], formula, case.dtype)


@given(vecinfer_cases(fp8=False))
@examples(4)
def test_calls_are_those_of_pytorch(case):
    check(case)


@given(vecinfer_cases(fp8=True))
@examples(8)
def test_calls_over_fp8_are_those_of_pytorch(case):
    check(case)


@given(vecinfer_cases(fp8=False, words=True))
@examples(8)
def test_calls_over_words_are_those_of_pytorch(case):
    check(case)


FORMS = {
    "words": {"words": (8, 8), "head_dim": 128, "value_dim": 128},
    "wide words": {"words": (4, 16)},
    "packed": {"key": (8, 9), "value": (8, 9)},
    "bytes": {"key": (4, 8), "value": (4, 8)},
    "fp8": {"fp8": True, "head_dim": 128},  # a thread loads from two places
}


@pytest.mark.parametrize("form", FORMS)
def test_tiles_warps_and_parts_change_no_result_beyond_rounding(form):
    fields = {"head_dim": 64, "value_dim": 64, "prefix": 150, "steps": 1, **FORMS[form]}
    case = VecInferCase(**fields)
    for block_n, warps, splits in ((16, 2, 1), (64, 1, 5), (32, 4, 3)):
        check(dataclasses.replace(case, block_n=block_n, warps=warps, splits=splits))


@pytest.mark.parametrize("fp8", [False, True])
def test_every_phase_of_a_block_from_an_empty_cache(fp8):
    case = VecInferCase(prefix=0, steps=45, batch=2, mask="holes", dtype=torch.bfloat16, fp8=fp8)
    check(case)


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("fp8", [False, True])
def test_what_no_token_was_written_to_is_never_read(fp8, block):
    case = VecInferCase(prefix=0, steps=30, room=9, block=block, fp8=fp8)
    out, lse, _ = run_kernels(case)
    state = case.filled_state(case.dtype)
    for x in (state.sink_k, state.sink_v, state.tail_k, state.tail_v):
        x.fill_(torch.nan)
    for x in (state.key_codes, state.value_codes):
        x.fill_(255)  # beyond the codebook: the interpreter refuses to read there; of fp8, NaN
    state.exponents.fill_(128)
    poisoned = run_kernels(case, QuantizedState(*state))
    assert torch.equal(out, poisoned[0])
    assert torch.equal(lse, poisoned[1])


@pytest.mark.parametrize("fp8", [False, True])
def test_a_full_cache_gives_nan(fp8):
    case = VecInferCase(prefix=20, steps=6, room=-4, fp8=fp8)
    with triton_interpreter.poisoned_buffers():
        out, _, states = run_kernels(case)
    assert out.isnan().all(-1)[0, 0].tolist() == [False, False, True, True, True, True]
    assert not out[:, :, :2].isnan().any()
    assert states[-1].length.tolist() == [26]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [30, 100])
def test_tokens_of_any_size_are_attended_in_fp8(dtype, sizes):
    """Weights with powers of two far beyond fp16, of which few are large."""
    for seed in range(3):
        case = VecInferCase(fp8=True, sizes=sizes, dtype=dtype, prefix=90, seed=seed)
        check(case)


def awkward(shape, dtype, generator):
    """Return numbers of fp8 and midpoints of two, or next to them, at any power; fp64."""
    drawn = {"generator": generator, "dtype": torch.float64}
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = torch.cat([numbers, numbers[:-1] + numbers.diff() / 2])
    x = numbers[torch.randint(len(numbers), shape, generator=generator)]
    x[..., 0] = torch.tensor([448.0, 447.0, 241.0, 240.0, 449.0, 0.0]).double()[
        torch.randint(6, shape[:-1], generator=generator)
    ]
    near = torch.rand(shape, **drawn).mul(3).floor() - 1
    x = x * torch.randn(shape, **drawn).sign() * (1 + near * torch.finfo(dtype).eps)
    low, high = (-24, 6) if dtype == torch.float16 else (-140, 119)
    x *= 2.0 ** torch.randint(low, high, (*shape[:-1], 1), generator=generator).double()
    return x * (torch.rand(*shape[:-1], 1, **drawn) > 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_of_fp8_are_those_of_the_codec(dtype):
    """Ties, ends of ranges, numbers below the normal ones of fp8 and of the model."""
    case = VecInferCase(
        fp8=True, kv_heads=4, prefix=0, steps=3, new_tokens=16, sinks=0, dtype=dtype, head_dim=128
    )
    generator = torch.Generator().manual_seed(0)
    for x in case.qkv[1:]:
        x.copy_(awkward(x.shape, dtype, generator))
    with triton_interpreter.poisoned_buffers():
        *_, states = run_kernels(case)
    *_, wanted = run_pytorch(case, dtype, states)
    assert_states_agree(case, states, wanted)
    assert len(states[-1].exponents.unique()) > (20 if dtype == torch.float16 else 100)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("tensor", ["k", "v"])
def test_a_token_in_fp8_that_is_not_finite_is_nan(tensor, bad):
    case = VecInferCase(fp8=True, prefix=0, steps=30, kv_heads=2)
    x = case.qkv["qkv".index(tensor)]
    x[:, 1, 4, 7] = bad
    with triton_interpreter.poisoned_buffers():
        out, lse, states = run_kernels(case)
    want, want_lse, wanted = run_pytorch(case, case.dtype, states)
    assert_states_agree(case, states, wanted)
    coded = slice(24, None)  # the others see it exactly
    assert out[:, 4:, coded].isnan().all()
    assert not out[:, :4].isnan().any()
    for got, expected in ((out, want), (lse, want_lse)):
        assert torch.equal(got[:, :, coded].isnan(), expected[:, :, coded].isnan())


WRONG_WORDS = {"words": (8, 8), "head_dim": 128, "value_dim": 128}
WRONG = {  # what the emitters write, and what they might have
    "codes": ({}, ".permute(2, 0, 3, 1)", ".permute(0, 2, 3, 1)"),
    "fp8": (
        {"fp8": True, "head_dim": 128},
        ".permute(3, 2, 0, 4, 5, 1)",
        ".permute(3, 2, 0, 5, 4, 1)",
    ),
    "sign": ({"fp8": True}, "| ((key_words << 8) & -0x7FFF8000)", ""),
    "key's power": ({"fp8": True}, "tl.exp2(key_power)[None, :] *", ""),
    "words of keys": (WRONG_WORDS, ".permute(4, 2, 1, 3, 5, 0)", ".permute(4, 2, 1, 5, 3, 0)"),
    "words of values": (
        WRONG_WORDS,
        ".permute(3, 0, 4, 7, 2, 5, 6, 1)",
        ".permute(3, 4, 0, 7, 2, 5, 6, 1)",
    ),
    "upper fields": (WRONG_WORDS, "high = key_tile >> 6", "high = key_tile >> 5"),
    "values' offset": (WRONG_WORDS, "+ offset_v[None, :] * l_i[:, None]", ""),
    "value's power": ({"fp8": True}, "- value_power[None, :]", "- 0.0 * value_power[None, :]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_noticed(monkeypatch, wrong):
    fields, right, other = WRONG[wrong]
    case = VecInferCase(steps=1, **fields)
    check(case)
    emit = module._TILED_BODIES["vecinfer_decode"]

    def misplaced(*arguments):
        body = emit(*arguments)
        assert right in body
        return body.replace(right, other)

    monkeypatch.setitem(module._TILED_BODIES, "vecinfer_decode", misplaced)
    load.cache_clear()
    try:
        with pytest.raises(AssertionError, match="allowed"):
            check(case)
    finally:
        load.cache_clear()
