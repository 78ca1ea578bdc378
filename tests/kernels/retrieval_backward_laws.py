"""Laws of the retrieval tier's backward kernels, interpreted; see ``test_interpreted.py``."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests import triton_interpreter  # isort: skip - before anything that imports Triton

import torch
from flasheva_compile.kernels.blocked.chunk_bounds import chunk_bounds, selecting_by_bounds
from flasheva_compile.kernels.blocked.geometry import attention_geometry
from flasheva_compile.kernels.blocked.retrieval import retrieval_forward
from flasheva_compile.kernels.blocked.retrieval_select import Retrieval, select_chunks
from flasheva_compile.kernels.reference.attention import joint_scores, masked_attention
from flasheva_compile.kernels.reference.positions import chunks_of, key_positions
from flasheva_compile.kernels.reference.retrieval import retrieved_visibility
from flasheva_compile.kernels.reference.visibility import visibility
from flasheva_compile.lowering import launch, launch_retrieval_backward
from flasheva_compile.lowering.rows import rows_of
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import cases
from tests.kernels.retrieval_forward_laws import (
    LONG,
    by_query,
    examples,
    operands,
    retrievals,
    tokens,
)
from tests.tolerance import assert_as_accurate_as_pytorch

if TYPE_CHECKING:
    from tests.kernels.cases import KernelCase

triton_interpreter.install()

PIECES = (1, 16, 40, 2048)
"""Rows that one program of a chunk walks over."""


def forward(case: KernelCase, retrieval: Retrieval, favourite: float = 0.0):
    """Return the operands, ``out``, ``lse`` and the selection, by blocked code.

    ``favourite`` is added to the bias of every third chunk while selecting: any selection of
    visible chunks has a gradient, also one that all queries agree on.
    """
    t = operands(case)
    sizes, masks = (case.queries, case.keys, case.settings), tuple(case.masks.values())
    geometry = attention_geometry(*sizes, *masks, torch.device("cpu"))
    bias = t.rfa_bias.clone()
    bias[..., ::3] += favourite
    biased = dataclasses.replace(t, rfa_bias=bias)
    if retrieval.by == "bounds":
        biased = selecting_by_bounds(t, chunk_bounds(t.k, *masks, case.chunk_size))
    selected = select_chunks(biased, geometry, case.settings, retrieval)
    out, lse = retrieval_forward(t, geometry, case.settings, retrieval, selected)
    return t, out, lse, selected


def run(case: KernelCase, retrieval: Retrieval, result, piece: int = 16):
    """Run the kernels on a forward result; descriptors are for the kernels of one attention."""
    t, out, lse, selected = result
    rows = rows_of(t.k, *case.masks.values(), chunk_size=case.chunk_size, alibi=case.alibi)
    covered = launch_retrieval_backward.covers(t, rows, case.settings, retrieval, selected)
    assert covered
    with cases.as_scheduled(case), pytest.MonkeyPatch.context() as patch:
        choose = launch.choose

        def without_descriptors(spec, *rest):
            by_index = spec.kind.startswith(("selection", "retrieved"))
            plain = {"tma": False, "split_window": False} if by_index else {}
            return dataclasses.replace(choose(spec, *rest), **plain)

        patch.setattr(launch, "choose", without_descriptors)
        patch.setattr(launch_retrieval_backward, "_ROWS_OF_A_PIECE", piece)
        with triton_interpreter.poisoned_buffers():
            given_back = (cases.strided(out), cases.strided(lse), selected)
            call = (t, rows, case.settings, retrieval)
            return launch_retrieval_backward.retrieval_backward(case.inputs()[3], given_back, *call)


def formula(case: KernelCase, chosen: torch.Tensor, dtype: torch.dtype):
    """Differentiate the reference for a given selection with respect to the six tensors."""
    made = tokens(case, dtype)
    leaves = [x.to(dtype).detach().requires_grad_() for x in (*case.qkv, *made)]
    q, k, v, rfa_k, rfa_v, rfa_bias = leaves
    keys = key_positions(k, **case.masks)
    chunks = chunks_of(keys, case.chunk_size)
    names = ("q_offset", "window_size", "chunk_size", "sink_tokens", "window", "causal")
    geometry = {name: getattr(case, name) for name in names}
    exact, chunk = visibility(keys, chunks, length=case.queries, **geometry)
    scores = joint_scores(
        q,
        k,
        rfa_k,
        rfa_bias,
        chunks.members,
        seen=torch.cat([chunk, exact], -1)[:, None],
        q_offset=case.q_offset,
        scale=case.factor,
        softcap=case.softcap,
        alibi_slopes=None if case.slopes is None else case.slopes.to(dtype),
    )
    seen = torch.cat(retrieved_visibility(exact, chunk, chunks, chosen), -1)
    values = torch.cat([rfa_v, v], 2).repeat_interleave(case.group, 1)
    out, _ = masked_attention(scores, seen.repeat_interleave(case.group, 1), values)
    return torch.autograd.grad(out, leaves, case.dout.to(dtype))


def check(case: KernelCase, retrieval: Retrieval, favourite: float = 0.0, piece: int = 16) -> None:
    result = forward(case, retrieval, favourite)
    grads = run(case, retrieval, result, piece)
    chosen = by_query(case, result[3], retrieval)
    assert_as_accurate_as_pytorch(grads, partial(formula, case, chosen), case.dtype)


@given(
    retrievals().filter(lambda drawn: drawn[0].queries),
    st.sampled_from([0.0, 9.0]),
    st.sampled_from(PIECES),
)
@examples(5)
def test_gradients_are_those_of_the_reference(drawn, favourite, piece):
    check(*drawn, favourite, piece)


DAMAGES = [("bits_ptr", "dq"), ("turned_ptr", "dchunk"), ("first_piece_ptr", "dkv")]


@pytest.mark.parametrize(("name", "kind"), [*DAMAGES, ("members_ptr", "retrieved_dkv")])
def test_laws_notice_what_is_damaged(name, kind, monkeypatch):
    """Selected chunk tokens that count too, and lists that lose a piece or name others."""
    retrieval = Retrieval(chunks=3, block=16)
    plain = launch.run

    def damaged(spec, programs, values):
        if spec.kind == kind:
            values[name].fill_(0)
        plain(spec, programs, values)

    monkeypatch.setattr(launch, "run", damaged)
    with pytest.raises(AssertionError, match="error"):
        check(LONG, retrieval, piece=64)


def test_rows_alone_have_the_bits_that_they_have_in_a_batch():
    short = {"queries": 33, "keys": 33}
    case = dataclasses.replace(LONG, **short, batch=2, mask="holes", dtype=torch.bfloat16)
    retrieval = Retrieval(chunks=3, by="bounds")
    result = forward(case, retrieval)
    whole = run(case, retrieval, result)
    alone = cases.one_row(case, 1)
    row = (operands(alone), *(x[1:2] for x in result[1:]))
    found = run(alone, retrieval, row)
    assert all(torch.equal(x[0], y[1]) for x, y in zip(found, whole, strict=True))
