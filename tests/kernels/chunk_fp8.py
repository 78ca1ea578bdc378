"""What kernels over a cache in fp8 must do: store the codec's bytes, attend to what these mean."""

from __future__ import annotations

from typing import TYPE_CHECKING
from unittest import mock

import torch
from flasheva_compile.kernels.blocked import cache as blocked
from flasheva_compile.kernels.blocked import fp8
from flasheva_compile.kernels.blocked.cache_state import CacheState

from flasheva_compile import cache_ops
from tests.tolerance import assert_as_accurate_as_pytorch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from tests.kernels.decode_cases import DecodeCase

    Calls = Callable[[torch.dtype], Iterable[tuple[Tensor, Tensor, Tensor, Tensor | None]]]


def encoded(plain: CacheState) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes and exponents of chunk tokens that are not stored in fp8."""
    (k, of_k), (v, of_v) = fp8.encode(plain.rfa_k), fp8.encode(plain.rfa_v)
    return k, v, torch.cat([of_k, of_v], -1)


def assert_codes(got: list[CacheState], plain: list[CacheState], chunk_size: int) -> int:
    """Compare with what other kernels stored as it is; return how many vectors were compared."""
    compared = 0
    for call, (state, other) in enumerate(zip(got, plain, strict=True)):
        whole = (state.length - state.start) // chunk_size
        exists = torch.arange(state.rfa_k.shape[2]) < whole[:, None]
        exists = exists[:, None].expand(-1, state.rfa_k.shape[1], -1)
        stored = (state.rfa_k, state.rfa_v, state.rfa_exponents)
        for x, want in zip(stored, encoded(other), strict=True):
            assert torch.equal(x[exists], want[exists]), f"after call {call}"
        for name in ("exact_k", "exact_v", "rfa_bias", "chunk_mean", "open_q", "start", "length"):
            same = torch.equal(getattr(state, name), getattr(other, name))
            assert same, f"{name} after call {call}"
        compared += int(exists.sum())
    return compared


def assert_attended(
    sequence: DecodeCase, calls: Calls, result: tuple[Tensor, Tensor], states: list[CacheState]
) -> None:
    """Compare with plain PyTorch over the numbers that the stored bytes mean.

    Args:
        sequence: Settings and precision.
        calls: Yields the inputs of each call in a dtype.
        result: ``out`` and ``lse`` of all calls.
        states: Before the first call and after each.
    """

    def formula(dtype: torch.dtype) -> list[Tensor]:
        found = []
        for before, after, (q, k, v, mask) in zip(states, states[1:], calls(dtype), strict=False):
            plain = as_numbers(before, after, dtype)
            new = (cache_ops._group_mean(q, k), k, v)
            with mock.patch.object(blocked, "_pool_complete"):  # they are there already
                given = (mask, plain, None, sequence.settings, sequence.slopes)
                found.append(blocked.decode(q, new, *given))
        return [torch.cat(x, 2) for x in zip(*found, strict=True)]

    assert_as_accurate_as_pytorch(result, formula, sequence.dtype)


def as_numbers(before: CacheState, after: CacheState, dtype: torch.dtype) -> CacheState:
    """Return the state before a call, with the numbers of the chunk tokens after it."""
    of_k, of_v = after.rfa_exponents.split(1, -1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return CacheState(*(x.clone() for x in before))._replace(
        exact_k=before.exact_k.to(dtype, copy=True),
        exact_v=before.exact_v.to(dtype, copy=True),
        rfa_k=fp8.decode(after.rfa_k, of_k, dtype),
        rfa_v=fp8.decode(after.rfa_v, of_v, dtype),
        rfa_bias=after.rfa_bias.to(wide),
        chunk_mean=after.chunk_mean.to(wide),
        open_q=before.open_q.to(dtype, copy=True),
    )
