"""fp8 codes: rounding at any size, and what is no number."""

from __future__ import annotations

import pytest
import torch

from flasheva_compile.quantization.fp8 import Fp8Codec


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 447.0, 448.0, 1e4, 1e30])
def test_fp8_rounds_to_a_sixteenth_at_any_size(size):
    x = size * torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    codec = Fp8Codec(16, 16)
    packed = codec.encode_keys(x)
    assert packed.shape == (2, 3, 5, 17)
    back = codec.decode_keys(packed, torch.float32)
    # 3 bits of mantissa; beneath the smallest normal number, a fixed step.
    largest = x.abs().amax(-1, keepdim=True)
    assert ((back - x).abs() <= x.abs() / 16 + largest * 2**-17).all()


def test_fp8_of_nothing_is_nothing():
    codec = Fp8Codec(4, 4)
    zero = torch.zeros(1, 1, 1, 4)
    packed = codec.encode_values(zero)
    assert torch.equal(codec.decode_values(packed, torch.float32), zero)
    # The least exponent: kernels round weights relative to the largest power.
    assert packed.view(torch.int8).flatten().tolist() == [0, 0, 0, 0, -126]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fp8_of_a_token_that_is_not_finite_is_nan(bad, dtype):
    codec = Fp8Codec(4, 4)
    x = torch.ones(1, 1, 3, 4, dtype=dtype)
    x[0, 0, 1, 2] = bad
    packed = codec.encode_keys(x)
    assert packed[0, 0, 1].tolist() == [127, 127, 127, 127, 128]
    back = codec.decode_keys(packed, torch.float32)
    assert back[0, 0, 1].isnan().all()
    assert (back[0, 0, ::2] == 1).all()


def test_fp8_of_what_rounded_up_to_the_largest_number_is_itself():
    codec = Fp8Codec(2, 2)
    x = torch.tensor([447.9, 2**-9]).view(1, 1, 1, 2)  # the second is the smallest number
    once = codec.decode_keys(codec.encode_keys(x), torch.float32)
    assert once.flatten().tolist() == [448, 2**-9]
    assert torch.equal(codec.decode_keys(codec.encode_keys(once), torch.float32), once)
