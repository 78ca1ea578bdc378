"""Several new tokens at once over a filled cache: portions of the sequence of a decode case."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from flasheva_compile.kernels.blocked import cache as blocked
from flasheva_compile.kernels.blocked.cache_state import CacheState
from flasheva_compile.lowering import launch_extend, offline
from flasheva_compile.lowering.launch_extend import Pooling
from flasheva_compile.lowering.pooled_chunks import kernel_rule
from flasheva_compile.lowering.spec import Schedule, group_rows
from hypothesis import strategies as st
from torch import Tensor

from flasheva_compile.cache_ops import _group_mean
from tests.kernels.cases import POINTER_TYPES
from tests.kernels.decode_cases import DecodeCase, decode_cases

States = list[CacheState]


@dataclass(frozen=True, kw_only=True)
class ExtendCase:
    """The tokens behind the prefix of a decode case, in portions.

    Attributes:
        sequence: Tokens, settings, cache.
        portions: How many tokens each call appends; their sum is ``sequence.steps``.
        block_m: Rows of a tile of queries, at most.
    """

    sequence: DecodeCase
    portions: tuple[int, ...]
    block_m: int = 16


def portions_of(case: ExtendCase, dtype: torch.dtype):
    """Yield ``q, k, v, key_mask`` of each call, as views of the whole sequence."""
    sequence = case.sequence
    q, k, v = (sequence.lay_out(x.to(dtype)) for x in sequence.qkv)
    begin = sequence.prefix
    for tokens in case.portions:
        part = slice(begin, begin + tokens)
        yield q[:, :, part], k[:, :, part], v[:, :, part], sequence.mask_of(part)
        begin += tokens


def run_blocked(case: ExtendCase, dtype: torch.dtype) -> tuple[Tensor, Tensor, States]:
    """Return ``out`` and ``lse`` of all tokens and the state after each call, in PyTorch."""
    sequence = case.sequence
    state, found, states = sequence.filled_state(dtype), [], []
    for q, k, v, mask in portions_of(case, dtype):
        new = (_group_mean(q, k), k, v)
        given = (mask, state, sequence.pool(dtype), sequence.settings, sequence.slopes)
        found.append(blocked.decode(q, new, *given))
        states.append(CacheState(*(x.clone() for x in state)))
    return *(torch.cat(x, 2) for x in zip(*found, strict=True)), states


def run_kernels(
    case: ExtendCase, state: CacheState | None = None, *, attend: bool = True
) -> tuple[Tensor, Tensor, States]:
    """Do the same on the generated kernels, or append alone."""
    sequence = case.sequence
    dtype, settings = sequence.dtype, sequence.settings
    state = state or sequence.filled_state(dtype)
    parameters = tuple(sequence.parameters_in(dtype))
    pooling = Pooling(kernel_rule(sequence.rule, parameters), parameters)
    found, states = [], []
    with as_scheduled(case):
        for q, k, v, mask in portions_of(case, dtype):
            if attend:
                given = (mask, state, settings, pooling, sequence.strided_slopes)
                found.append(launch_extend.decode(q, (k, v), *given))
            else:
                launch_extend.cache_append(q, (k, v), mask, state, settings, pooling)
                found.append((q[..., :1], q[..., 0]))
            states.append(CacheState(*(x.clone() for x in state)))
    return *(torch.cat(x, 2) for x in zip(*found, strict=True)), states


@contextmanager
def as_scheduled(case: ExtendCase):
    """Launch with the case's tiles and parts; check argument types against offline compiles."""
    sequence = case.sequence
    rows = max(case.block_m, group_rows(sequence.group))
    types = {**POINTER_TYPES, torch.bool: "*i1"}

    def choose(spec):
        m = rows if spec.kind == "extend" else 16
        tiles = {"block_m": m, "block_n": sequence.block_n, "num_warps": 4, "num_stages": 1}
        return Schedule(**tiles, e4m3=sequence.e4m3, dependent=True)

    def load(spec, schedule):
        kernel = loaded(spec, schedule)

        def launch(programs, *arguments):
            for name, value in zip(kernel.generated.arguments, arguments, strict=True):
                if isinstance(value, Tensor):
                    declared = offline.argument_type(name, spec, schedule)
                    assert declared == types[value.dtype], f"{name}: {declared}"
            kernel.launch(programs, *arguments)

        return type(kernel)(
            generated=kernel.generated, path=kernel.path, launch=launch, function=kernel.function
        )

    loaded = launch_extend.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_extend, "choose", choose)
        patch.setattr(launch_extend, "load", load)
        patch.setattr(launch_extend, "parts_of", lambda *_: sequence.splits)
        launch_extend._plan.cache_clear()
        try:
            yield
        finally:
            launch_extend._plan.cache_clear()


@st.composite
def extend_cases(draw, **fixed):
    """Draw cases; keyword arguments fix fields of the sequence."""
    portions = tuple(draw(st.lists(st.sampled_from([2, 3, 5, 1, 16, 33]), min_size=1, max_size=3)))
    sequence = draw(decode_cases(steps=sum(portions), **fixed))
    block_m = draw(st.sampled_from([16, 32, 64]))
    return ExtendCase(sequence=sequence, portions=portions, block_m=block_m)
