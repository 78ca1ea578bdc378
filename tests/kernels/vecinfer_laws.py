"""Laws of the kernels over a cache of codes; see ``test_cache_laws_interpreted.py``."""

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
from tests.kernels.vecinfer_cases import (
    COPIED,
    VecInferCase,
    assert_codes_are_nearest,
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
    for step, (got, want) in enumerate(zip(states[1:], wanted, strict=True)):
        for name in COPIED:
            same = torch.equal(getattr(got, name), getattr(want, name))
            assert same, f"{name} after call {step}"
    assert_codes_are_nearest(case, states[-1])

    def formula(dtype):
        return run_pytorch(case, dtype, states)[:2]

    assert_as_accurate_as_pytorch([out, lse], formula, case.dtype)


@given(vecinfer_cases())
@examples(4)
def test_calls_are_those_of_pytorch(case):
    check(case)


@pytest.mark.parametrize("key", [(4, 8), (8, 9)])
def test_tiles_warps_and_parts_change_no_result_beyond_rounding(key):
    case = VecInferCase(head_dim=64, value_dim=64, key=key, value=key, prefix=150, steps=1)
    for block_n, warps, splits in ((16, 2, 1), (64, 1, 5), (32, 4, 3)):
        check(dataclasses.replace(case, block_n=block_n, warps=warps, splits=splits))


def test_every_phase_of_a_block_from_an_empty_cache():
    check(VecInferCase(prefix=0, steps=45, batch=2, mask="holes", dtype=torch.bfloat16))


def test_what_no_token_was_written_to_is_never_read():
    case = VecInferCase(prefix=0, steps=30, room=9, block=8)
    out, lse, _ = run_kernels(case)
    state = case.filled_state(case.dtype)
    for x in (state.sink_k, state.sink_v, state.tail_k, state.tail_v):
        x.fill_(torch.nan)
    for x in (state.key_codes, state.value_codes):
        x.fill_(255)  # beyond the codebook: the interpreter refuses to read there
    poisoned = run_kernels(case, QuantizedState(*state))
    assert torch.equal(out, poisoned[0])
    assert torch.equal(lse, poisoned[1])


def test_a_full_cache_gives_nan():
    case = VecInferCase(prefix=20, steps=6, room=-4)
    with triton_interpreter.poisoned_buffers():
        out, _, states = run_kernels(case)
    assert out.isnan().all(-1)[0, 0].tolist() == [False, False, True, True, True, True]
    assert not out[:, :, :2].isnan().any()
    assert states[-1].length.tolist() == [26]


def test_a_channel_in_the_wrong_place_is_noticed(monkeypatch):
    case = VecInferCase(steps=1)
    check(case)
    emit = module._TILED_BODIES["vecinfer_decode"]

    def misplaced(*arguments):
        body = emit(*arguments)
        assert body.count(".permute(2, 0, 3, 1)") == 1
        return body.replace(".permute(2, 0, 3, 1)", ".permute(0, 2, 3, 1)")

    monkeypatch.setitem(module._TILED_BODIES, "vecinfer_decode", misplaced)
    load.cache_clear()
    try:
        with pytest.raises(AssertionError, match="allowed"):
            check(case)
    finally:
        load.cache_clear()
