"""What steps over a cache of codes leave behind: PyTorch's bits, and codes as near as any."""

from __future__ import annotations

import torch

from flasheva_compile.quantization.packing import unpack
from flasheva_compile.quantization.state import QuantizedState
from flasheva_compile.quantization.transform_coding import TransformCodec
from tests.kernels.vecinfer_cases import CODES, VecInferCase

_LAST = 64  # tokens, at least those of all calls
COPIED = tuple(name for name in QuantizedState._fields if name not in CODES)


def assert_states_agree(
    case: VecInferCase, states: list[QuantizedState], wanted: list[QuantizedState]
) -> None:
    """Assert that what calls left is PyTorch's bit for bit; codes, where there is no codebook."""
    for step, (got, want) in enumerate(zip(states[1:], wanted, strict=True)):
        for name in QuantizedState._fields if case.fp8 else COPIED:
            same = torch.equal(*(_bits(getattr(state, name)) for state in (got, want)))
            assert same, f"{name} after call {step}"
    if case.words[0]:
        _assert_digits_are_nearest(case, states[-1])
    elif not case.fp8:
        _assert_codes_are_nearest(case, states[-1])


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.is_floating_point() else x  # NaN is itself


def _assert_digits_are_nearest(case: VecInferCase, state: QuantizedState) -> None:
    """Assert that the last tokens are as near to what they stand for as any digits come."""
    _, k, v = case.qkv
    codec = case.codec
    assert isinstance(codec, TransformCodec)
    for exact, packed, encode, decode in (
        (codec.transform_keys(k), state.key_codes, codec.encode_keys(k), codec.decode_keys),
        (codec.transform_values(v), state.value_codes, codec.encode_values(v), codec.decode_values),
    ):
        best, got = decode(encode, torch.float64), decode(packed, torch.float64)
        for b, valid in enumerate(case.valid):
            stored = valid.nonzero()[:, 0][case.sinks : case.sinks + packed.shape[2]]
            own = stored[-_LAST:]
            x, chosen = exact[b, :, own], got[b, :, : len(stored)][:, -_LAST:]
            error = (
                8 * case.head_dim * torch.finfo(torch.float32).eps * (1 + float(exact.abs().amax()))
            )
            excess = (chosen - x).abs() - (best[b, :, own] - x).abs() - error
            assert (excess <= 0).all(), f"{excess.amax():.3g} too far, with {error:.3g}"


def _assert_codes_are_nearest(case: VecInferCase, state: QuantizedState) -> None:
    """Assert that the last tokens have codewords as near as any, as far as fp32 can tell."""
    _, k, v = case.qkv
    codec, form, offset = case.codec, case.form, case.books.offset

    def coded_keys(x):
        return codec.transform_keys(x) - (0 if offset is None else offset[:, None])

    for x, transform, books, packed, code in (
        (k, coded_keys, case.books.keys, state.key_codes, form.key),
        (v, codec.transform_values, case.books.values, state.value_codes, form.value),
    ):
        codes = unpack(packed, code.bits, code.codes(x.shape[3]))
        parts = transform(x).unflatten(-1, (-1, code.vector))
        for b, valid in enumerate(case.valid):
            stored = valid.nonzero()[:, 0][case.sinks : case.sinks + codes.shape[2]]
            for h in range(case.kv_heads):
                book = books[h if case.per_head else 0]
                vectors = parts[b, h, stored[-_LAST:]]
                distances = (vectors[..., None, :] - book).square().sum(-1)
                chosen = distances.gather(-1, codes[b, h, : len(stored)][-_LAST:, :, None])[..., 0]
                whole = vectors.square().sum((-1, -2))[:, None]  # rotation adds channels up
                size = whole + book.square().sum(-1).max()
                error = 8 * case.head_dim * torch.finfo(torch.float32).eps * size
                excess = chosen - distances.amin(-1) - error
                assert (excess <= 0).all(), f"{excess.amax():.3g} too far, with {error.amin():.3g}"
