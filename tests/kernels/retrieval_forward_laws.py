"""Laws of the retrieval tier's kernels, in Triton's interpreter; see ``test_interpreted.py``."""

from __future__ import annotations

import dataclasses
import os
from functools import partial

import pytest

from tests import triton_interpreter  # isort: skip - before anything that imports Triton

import torch
from flasheva_compile.kernels.blocked.block import Operands
from flasheva_compile.kernels.blocked.chunk_bounds import selecting_by_bounds
from flasheva_compile.kernels.blocked.geometry import attention_geometry
from flasheva_compile.kernels.blocked.retrieval_select import Retrieval, group_size, select_chunks
from flasheva_compile.kernels.reference.attention import joint_scores, masked_attention
from flasheva_compile.kernels.reference.positions import chunks_of, key_positions
from flasheva_compile.kernels.reference.retrieval import chunk_bounds as reference_bounds
from flasheva_compile.kernels.reference.retrieval import retrieved_visibility
from flasheva_compile.kernels.reference.visibility import visibility
from flasheva_compile.lowering import launch, launch_retrieval
from flasheva_compile.lowering.rows import rows_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.kernels import cases
from tests.kernels.cases import KernelCase, kernel_cases
from tests.property.test_attention_laws import full_mask, softmax_attention
from tests.tolerance import assert_as_accurate_as_pytorch

triton_interpreter.install()

FUZZ = int(os.environ.get("FLASHEVA_FUZZ", "1"))
MASKS = ("none", "left_padding", "holes")
DIMS = ((16, 16), (40, 40), (64, 64), (80, 80), (128, 128), (24, 40))
counts = st.sampled_from([1, 2, 3, 8, 32])
blocks = st.sampled_from([1, 1, 2, 3, 16, 128])
selectors = st.sampled_from(["token", "bounds"])


def examples(count: int):
    phases = list(Phase) if FUZZ else [Phase.explicit, Phase.generate]
    return settings(
        deadline=None,
        database=None,
        derandomize=FUZZ <= 1,
        max_examples=count * max(1, FUZZ),
        phases=phases,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def retrievals(draw, by: str = "", **fixed):
    """Draw a causal case and what is retrieved, in the end ``by`` something given."""
    fixed = {"causal": True, "dropout_p": 0.0, "masks": MASKS, "max_keys": 70, **fixed}
    case = draw(kernel_cases(**fixed))
    head_dim, value_dim = draw(st.sampled_from(DIMS))
    shape = {"batch": 1, "group": draw(st.sampled_from([1, 2, 3, 4, 7, 8]))}
    if shape["group"] < 3 and draw(st.booleans()):
        shape["batch"] = 2
    block = draw(blocks)
    offset = {"q_offset": 0} if block > 1 else {}
    case = dataclasses.replace(case, head_dim=head_dim, value_dim=value_dim, **shape, **offset)
    by, weight = by or draw(selectors), None
    if by == "bounds" and draw(st.booleans()):
        weight = case._normal(46, case.kv_heads, 3, head_dim).float()
    return case, Retrieval(chunks=draw(counts), block=block, by=by, weight=weight)


def tokens(case: KernelCase, dtype: torch.dtype):
    _, k, v = (x.to(dtype) for x in case.qkv)
    return cases.reference_tokens(case, k, v, [p.to(dtype) for p in case.parameters])


def operands(case: KernelCase, chunk_tokens=None):
    """Return the operands as kernels get them, chunk tokens computed in fp64."""
    rfa_k, rfa_v, rfa_bias = chunk_tokens or tokens(case, torch.float64)
    q, k, v, _ = case.inputs()
    slopes = None if case.slopes is None else cases.strided(case.slopes.float())
    return Operands(
        q=q,
        k=k,
        v=v,
        rfa_k=rfa_k.to(case.dtype),
        rfa_v=rfa_v.to(case.dtype),
        rfa_bias=rfa_bias.float(),
        alibi_slopes=slopes,
    )


def run(case: KernelCase, retrieval: Retrieval, t: Operands | None = None, see_bounds=None):
    """Run the kernels; the schedule's descriptors are ``forward``'s alone.

    ``see_bounds`` gets the bounds of chunks before they select, and may change them.
    """
    t = operands(case) if t is None else t
    rows = rows_of(t.k, *case.masks.values(), chunk_size=case.chunk_size, alibi=case.alibi)
    assert launch_retrieval.covers(t, rows, case.settings, retrieval) or not t.q.numel()
    with cases.as_scheduled(case), pytest.MonkeyPatch.context() as patch:
        choose = launch.choose

        def without_descriptors(spec, *rest):
            plain = {} if spec.kind == "forward" else {"tma": False, "split_window": False}
            return dataclasses.replace(choose(spec, *rest), **plain)

        plain_run = launch.run

        def showing(spec, programs, values):
            plain_run(spec, programs, values)
            if spec.kind == "chunk_bounds" and see_bounds is not None:
                see_bounds(values["bounds_ptr"])

        patch.setattr(launch, "run", showing)
        patch.setattr(launch, "choose", without_descriptors)
        with triton_interpreter.poisoned_buffers():
            return launch_retrieval.retrieval_forward(t, rows, case.settings, retrieval)


def by_query(case: KernelCase, selected: torch.Tensor, retrieval: Retrieval) -> torch.Tensor:
    """Return a selection as ``[B, Hkv, L, C]`` bool; check its order."""
    assert selected.dtype == torch.int32
    assert bool(((selected >= -1) & (selected < case.slots)).all())
    ordered = torch.where(selected < 0, case.slots, selected)
    rising = (ordered[..., 1:] > ordered[..., :-1]) | (ordered[..., 1:] == case.slots)
    assert bool(rising.all()), "slots must ascend, -1 last"
    shape = (*selected.shape[:3], case.slots + 1)
    taken = torch.zeros(shape, dtype=torch.bool).scatter_(3, ordered.long(), True)
    group = group_size(retrieval.block, uniform=case.mask == "none")
    return taken[..., : case.slots].repeat_interleave(group, 2)[:, :, : case.queries]


def formula(case: KernelCase, chosen: torch.Tensor, dtype: torch.dtype):
    """Return ``out`` and ``lse`` of the reference for a given selection, and its scores."""
    q, k, v = (x.to(dtype) for x in case.qkv)
    rfa_k, rfa_v, rfa_bias = tokens(case, dtype)
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
    assert not bool((chosen & ~chunk[:, None]).any()), "an invisible chunk was selected"
    seen = torch.cat(retrieved_visibility(exact, chunk, chunks, chosen), -1)
    values = torch.cat([rfa_v, v], 2).repeat_interleave(case.group, 1)
    return masked_attention(scores, seen.repeat_interleave(case.group, 1), values)


def check(case: KernelCase, retrieval: Retrieval) -> None:
    out, lse, selected = run(case, retrieval)
    chosen = by_query(case, selected, retrieval)
    reference = partial(formula, case, chosen)
    assert_as_accurate_as_pytorch([out, lse], reference, case.dtype)


@given(retrievals())
@examples(40)
def test_attention_is_the_reference_for_what_was_selected(drawn):
    check(*drawn)


@given(retrievals(alibi=False, softcap=0.0, scale=0.25, rules=("mean",)), st.integers(1, 3))
@examples(40)
def test_selection_is_that_of_the_blocked_code_ties_included(drawn, largest):
    """On small integers, whose scores are exact and often equal."""
    case, retrieval = drawn

    def integers(stream: int, *shape: int) -> torch.Tensor:
        return (case._normal(stream, *shape) * largest).round().clamp(-largest, largest)

    q = integers(41, *case.qkv[0].shape)
    shape = (case.batch, case.kv_heads, case.slots)
    rfa_k, bias = integers(42, *shape, case.head_dim), integers(43, *shape) / 2
    empty = ~chunks_of(key_positions(case.qkv[1], **case.masks), case.chunk_size).members.any(-1)
    bias = bias.masked_fill(empty[:, None], -torch.inf)
    t = operands(case, (rfa_k, integers(44, *shape, case.value_dim), bias))
    t = dataclasses.replace(t, q=case.lay_out(q))
    bounds = integers(45, *shape, 2 * case.head_dim).to(case.dtype)
    selected = run(case, retrieval, t, lambda made: made.copy_(bounds))[2]
    sizes, masks = (case.queries, case.keys, case.settings), tuple(case.masks.values())
    geometry = attention_geometry(*sizes, *masks, torch.device("cpu"))
    if retrieval.by == "bounds":
        t = selecting_by_bounds(t, bounds)
    wanted = select_chunks(t, geometry, case.settings, retrieval)
    assert torch.equal(selected, wanted)


@given(retrievals(by="bounds"))
@examples(16)
def test_bounds_are_the_reference_and_the_largest_scores_by_them_are_selected(drawn):
    case, retrieval = drawn
    retrieval, made = dataclasses.replace(retrieval, block=1), []
    out, lse, selected = run(case, retrieval, see_bounds=lambda bounds: made.append(bounds.clone()))
    chosen = by_query(case, selected, retrieval)
    assert_as_accurate_as_pytorch([out, lse], partial(formula, case, chosen), case.dtype)
    members = chunks_of(key_positions(case.qkv[1], **case.masks), case.chunk_size).members
    filled = members.any(-1)[:, None, :, None]
    for bounds in made:  # none where there are no queries

        def reference(dtype):
            return [reference_bounds(case.qkv[1].to(dtype), members, retrieval.weight) * filled]

        assert_as_accurate_as_pytorch([bounds * filled], reference, case.dtype)
        scores, error, visible = scores_by_bounds(case, bounds.double() * filled)
        assert torch.equal(chosen.sum(-1), visible.sum(-1).clamp(max=retrieval.chunks))
        least = (scores + error).masked_fill(~chosen, torch.inf).amin(-1)
        most = (scores - error).masked_fill(chosen | ~visible, -torch.inf).amax(-1)
        assert bool((least >= most).all())


def scores_by_bounds(case: KernelCase, bounds: torch.Tensor):
    """Score chunks in fp64: scores, how far off fp32 may be, and who sees: ``[B, Hkv, L, C]``."""
    q, k = (x.double() for x in case.qkv[:2])
    keys = key_positions(k, **case.masks)
    chunks = chunks_of(keys, case.chunk_size)
    names = ("q_offset", "window_size", "chunk_size", "sink_tokens", "window", "causal")
    geometry = {name: getattr(case, name) for name in names}
    exact, chunk = visibility(keys, chunks, length=case.queries, **geometry)
    slopes = None if case.slopes is None else case.slopes.double()

    def grouped(q, bounds, seen, slopes, scale, softcap):
        options = {"seen": seen, "scale": scale, "softcap": softcap, "alibi_slopes": slopes}
        wide, none = torch.cat([k, k], -1), bounds.new_zeros(bounds.shape[:3])
        called = (torch.cat([q, q.abs()], -1), wide, bounds, none, chunks.members)
        scores = joint_scores(*called, q_offset=case.q_offset, **options)[..., : case.slots]
        return scores.unflatten(1, (case.kv_heads, case.group)).amax(2)

    everyone = torch.cat([chunk, exact], -1)[:, None]
    scores = grouped(q, bounds, everyone, slopes, case.factor, case.softcap)
    far = 0.0 if slopes is None else slopes.abs().max() * (case.keys + case.queries + 100)
    sizes = grouped(q.abs(), bounds.abs(), everyone, None, abs(case.factor), 0.0)
    error = (sizes + case.softcap + far) * 2 * case.head_dim * torch.finfo(torch.float32).eps
    return scores, error, (chunk[:, None] & chunks.members.any(-1)[:, None, None]).expand_as(scores)


@given(retrievals(rules=("mean",), scale=None, with_parameters=False, max_keys=60))
@examples(10)
def test_all_chunks_retrieved_is_softmax(drawn):
    case, _ = drawn
    chunk_size = max(4, case.chunk_size)
    sizes = {"chunk_size": chunk_size, "window_size": 2 * chunk_size}
    case = dataclasses.replace(case, **sizes, sink_tokens=0)
    out, lse, _ = run(case, Retrieval(chunks=32))
    attend = softmax_attention(case, full_mask(case))
    assert_as_accurate_as_pytorch([out, lse], lambda dtype: case.run(attend, dtype)[:2], case.dtype)


LONG = KernelCase(
    batch=1,
    kv_heads=1,
    queries=60,
    keys=60,
    chunk_size=4,
    window_size=8,
    sink_tokens=4,
    rule="mean",
)


@pytest.mark.parametrize("mask", ["none", "left_padding"])
def test_queries_behind_fewer_keys_than_sinks(mask):
    case = dataclasses.replace(LONG, queries=5, keys=3, q_offset=36, sink_tokens=8, mask=mask)
    check(case, Retrieval(chunks=2))


@pytest.mark.parametrize("block", [1, 16])
def test_laws_notice_chunks_that_count_twice(block, monkeypatch):
    """Selected chunks that stay chunk tokens, and chunk tokens that nobody attends."""
    retrieval = Retrieval(chunks=3, block=block, by="token" if block > 1 else "bounds")
    check(LONG, retrieval)
    plain = launch.run
    for wrong in (0, -1):

        def damaged(spec, programs, values, wrong=wrong):
            if spec.kind == "forward":
                values["bits_ptr"].fill_(wrong)
            plain(spec, programs, values)

        monkeypatch.setattr(launch, "run", damaged)
        with pytest.raises(AssertionError, match="error"):
            check(LONG, retrieval)


def test_rows_alone_have_the_bits_that_they_have_in_a_batch():
    case = dataclasses.replace(LONG, batch=3, mask="holes", dtype=torch.bfloat16)
    retrieval = Retrieval(chunks=3, by="bounds")
    whole = run(case, retrieval)
    for b in range(3):
        alone = run(cases.one_row(case, b), retrieval)
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, whole, strict=True))


@given(retrievals(max_keys=60))
@examples(3)
def test_a_schedule_changes_no_selection(drawn):
    case, retrieval = drawn
    found = []
    for block_m, block_n in ((16, 16), (16, 64), (64, 32), (32, 128)):
        schedule = dataclasses.replace(case.schedule, block_m=block_m, block_n=block_n)
        found.append(run(dataclasses.replace(case, schedule=schedule), retrieval)[2])
    assert all(torch.equal(found[0], other) for other in found[1:])
