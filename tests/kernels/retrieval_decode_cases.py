"""Sequences of generation with retrieval as values; see ``decode_cases.py``."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from flasheva_compile.kernels.blocked import retrieval_cache as blocked
from flasheva_compile.kernels.blocked.cache_state import first_exact
from flasheva_compile.kernels.blocked.retrieval_select import Retrieval
from flasheva_compile.kernels.blocked.retrieval_state import RetrievalState
from flasheva_compile.lowering import launch_retrieval_decode, offline
from flasheva_compile.lowering.pooled_chunks import kernel_rule
from flasheva_compile.lowering.spec import Schedule
from hypothesis import strategies as st
from torch import Tensor

from flasheva_compile.retrieval_cache_ops import new_retrieval_state
from tests.kernels.cases import POINTER_TYPES
from tests.kernels.decode_cases import DecodeCase, decode_cases, steps_of


@dataclass(frozen=True, kw_only=True)
class RetrievalDecodeCase(DecodeCase):
    """``room``: columns of the cache beyond the tokens. ``ties``: scores that are often equal.

    ``weighted``: bounds have weights. ``outliers``: some channels are 2^12 times as large, one is
    the largest number of fp16.
    """

    retrieve_chunks: int = 2
    retrieve_by: str = "token"
    room: int = 0
    ties: bool = False
    store: str = "device"
    outliers: bool = False
    weighted: bool = False

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = vars(DecodeCase)["qkv"].func(self)
        if self.outliers:  # scores stay what they were
            q, k, v = q.clone(), k.clone(), v.clone()
            q[..., 3] /= 4096
            k[..., 3] *= 4096
            v[..., 5] *= 4096
            v[..., 6] = torch.finfo(torch.float16).max
        return (q.sign(), k.sign() * (k.abs() > 1), v) if self.ties else (q, k, v)

    @property
    def retrieval(self) -> Retrieval:
        return Retrieval(chunks=self.retrieve_chunks, weight=self.weight)

    @property
    def weight(self) -> Tensor | None:
        return self._normal(46, self.kv_heads, 3, self.head_dim).float() if self.weighted else None

    def new_state(self, dtype: torch.dtype) -> RetrievalState:
        _, k, v = self.qkv
        options = {**self.options, "retrieve_chunks": self.retrieve_chunks, "retrieve_block": 1}
        options["retrieve_by"] = self.retrieve_by
        room = self.tokens + self.room
        return new_retrieval_state(k.to(dtype), v.to(dtype), room, options, store=self.store)

    def filled_state(self, dtype: torch.dtype) -> RetrievalState:
        state = self.new_state(dtype)
        if self.prefix:
            part = slice(0, self.prefix)
            q, k, v = (x[:, :, part].to(dtype) for x in self.qkv)
            self.append(q, k, v, self.mask_of(part), state, dtype)
        return state

    def append(self, q, k, v, mask, state: RetrievalState, dtype: torch.dtype) -> None:
        rest = (state, self.pool(dtype), self.settings, self.retrieval)
        blocked.retrieval_append(q, (k, v), mask, *rest)


def run_blocked(
    case: RetrievalDecodeCase, dtype: torch.dtype, selected: Tensor | None = None
) -> tuple[Tensor, Tensor, list[RetrievalState]]:
    """Return ``out`` and ``lse`` of all steps and the state after each, in plain PyTorch.

    ``selected [B, Hkv, steps, n]`` overrides what the formula selects: in low precision rounding
    may choose another chunk.
    """
    state, found, states = case.filled_state(dtype), [], []
    for step, (q, k, v, mask) in enumerate(steps_of(case, dtype)):
        position, exact = blocked.write(
            (k, v), mask, state, case.pool(dtype), case.settings, case.weight
        )
        given = None if selected is None else selected[:, :, step : step + 1]
        found.append(
            blocked.attend(q, position, exact, state, case.settings, case.retrieval, given)
        )
        states.append(RetrievalState(*(x.clone() for x in state)))
    return *(torch.cat(x, 2) for x in zip(*found, strict=True)), states


def run_kernels(
    case: RetrievalDecodeCase, state: RetrievalState | None = None
) -> tuple[Tensor, Tensor, Tensor, list[RetrievalState]]:
    """Do the same on the generated kernels; the selection ``[B, Hkv, steps, n]`` comes third."""
    state = state or case.filled_state(case.dtype)
    parameters = tuple(p.to(case.dtype) for p in case.parameters)
    rule, found, states = kernel_rule(case.rule, parameters), [], []
    with as_scheduled(case):
        for q, k, v, mask in steps_of(case, case.dtype):
            out, lse, selected = launch_retrieval_decode.retrieval_decode(
                *(q, k, v, mask, parameters, state, case.settings, rule, case.retrieve_chunks),
                case.weight,
            )
            found.append((out, lse, selected[:, :, None]))
            states.append(RetrievalState(*(x.clone() for x in state)))
    return *(torch.cat(x, 2) for x in zip(*found, strict=True)), states


def selector_scores(
    case: RetrievalDecodeCase, step: int, state: RetrievalState
) -> tuple[Tensor, Tensor, Tensor]:
    """Score the chunks of a state in fp64.

    Returns:
        Scores and how far fp32 may be from them, ``[B, Hkv, C]``, and ``[B, C]``, who is visible.
    """
    q = case.qkv[0][:, :, case.prefix + step].unflatten(1, (case.kv_heads, -1))
    tokens, bias = state.rfa_k.double(), state.rfa_bias.double()
    if case.retrieve_by == "bounds":
        q, tokens = torch.cat([q, q.abs()], -1), state.bounds.double()
        bias = torch.zeros_like(bias).masked_fill(bias.isinf(), -torch.inf)
    q = q * case.scale
    scores, sizes = q @ tokens.mT, q.abs() @ tokens.abs().mT
    if case.softcap:
        scores = case.softcap * (scores / case.softcap).tanh()
    scores = (scores + bias[:, :, None]).amax(2)
    sizes = sizes.amax(2) + bias.masked_fill(bias.isinf(), 0).abs() + case.softcap
    position = (state.length - 1 - state.start)[:, None]
    slot, c = torch.arange(tokens.shape[2]), case.chunk_size
    visible = slot * c >= case.sink_tokens
    visible = visible & ((slot + 1) * c <= first_exact(position, case.settings))
    return scores, sizes * q.shape[-1] * torch.finfo(torch.float32).eps, visible


@contextmanager
def as_scheduled(case: RetrievalDecodeCase):
    """Launch with the case's tiles and parts; check argument types against offline compiles."""
    tiles = {"block_m": 16, "block_n": case.block_n, "num_warps": 4, "num_stages": 1}
    schedule = Schedule(**tiles, e4m3=case.e4m3)
    types = {**POINTER_TYPES, torch.bool: "*i1"}

    def checking(kernel):
        def launch(programs, *arguments):
            for name, value in zip(kernel.generated.arguments, arguments, strict=True):
                if isinstance(value, Tensor):
                    declared = offline.argument_type(name, kernel.generated.spec, schedule)
                    assert declared == types[value.dtype], f"{name}: {declared}"
            kernel.launch(programs, *arguments)

        return launch

    def load(spec, chosen):
        kernel = loaded(spec, chosen)
        return dataclasses.replace(kernel, launch=checking(kernel))

    module, loaded = launch_retrieval_decode, launch_retrieval_decode.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "choose", lambda *_: schedule)
        patch.setattr(module, "load", load)
        patch.setattr(module, "parts_of", lambda *_: case.splits)
        module._plan.cache_clear()
        try:
            yield
        finally:
            module._plan.cache_clear()


@st.composite
def retrieval_decode_cases(draw, **fixed):
    """Draw cases that the op accepts; keyword arguments fix fields."""
    # Chunks of `eva` need mean queries, which no state keeps: the cache refuses them.
    case = draw(decode_cases(alibi=False).filter(lambda case: case.rule != "eva"))
    drawn = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    drawn |= {
        "retrieve_chunks": draw(st.sampled_from([2, 1, 3, 5, 17, 64])),
        "retrieve_by": draw(st.sampled_from(["token", "bounds"])),
        "room": draw(st.sampled_from([0, 0, 7])),
        "store": draw(st.sampled_from(["device", "offloaded", "fp8"])),
        "weighted": draw(st.booleans()),
        "e4m3": draw(st.booleans()),
    }
    return RetrievalDecodeCase(**{**drawn, **fixed})
