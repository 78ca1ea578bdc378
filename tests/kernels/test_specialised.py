"""Laws of ``forward`` by specialised warps, its source run by ``tests/gluon_interpreter.py``."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flasheva_compile.kernels.blocked.block import Operands
from flasheva_compile.lowering import fitting, launch
from flasheva_compile.lowering.emit.module import emit
from flasheva_compile.lowering.load import LoadedKernel
from flasheva_compile.lowering.pooled_chunks import PooledChunks
from flasheva_compile.lowering.rows import rows_of
from flasheva_compile.lowering.schedule import choose, choose_alike, known_target
from flasheva_compile.lowering.spec import BIAS_COLUMNS, KernelSpec, Schedule
from flasheva_compile.lowering.specialists import specialists_rejection
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests import gluon_interpreter
from tests.kernels.cases import KernelCase, reference_tokens
from tests.kernels.families import base
from tests.tolerance import assert_as_accurate_as_pytorch

HOPPER = known_target("sm_90")
EMIT = emit


@st.composite
def specialist_cases(draw, *, mask: str, causal: bool):
    chunk_size = draw(st.sampled_from([1, 4, 16]))
    blocks = draw(st.integers(1, 6))
    keys = draw(st.integers(1, 260))
    part = causal and draw(st.booleans())
    queries = draw(st.integers(1, keys)) if part else keys
    batch, kv_heads, group = draw(st.sampled_from([(1, 1, 1), (2, 1, 3), (1, 2, 2)]))
    return KernelCase(
        batch=batch,
        kv_heads=kv_heads,
        group=group,
        queries=queries,
        keys=keys,
        q_offset=draw(st.integers(0, keys - queries)),
        head_dim=16,
        value_dim=16,
        chunk_size=chunk_size,
        window_size=chunk_size * draw(st.sampled_from([1, 3, 8, 16 * blocks])),
        sink_tokens=draw(st.sampled_from([0, 4, 20, 80])),
        window=draw(st.sampled_from(["sliding", "block"])),
        causal=causal,
        rule=draw(st.sampled_from(["mean", "tangent"])),
        mask=mask,
        seed=draw(st.integers(0, 1000)),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])),
        layout=draw(st.sampled_from(["contiguous", "heads_last", "slice"])),
    )


@st.composite
def specialist_schedules(draw):
    consumers = draw(st.integers(1, 3))
    return Schedule(
        block_m=64 * consumers,
        block_n=draw(st.sampled_from([16, 64])),
        num_warps=4,
        num_stages=draw(st.integers(1, 3)) + 1,
        tma=True,
        product_bias=True,
        consumers=consumers,
        overlap=draw(st.booleans()),
        persistent=draw(st.booleans()),
    )


def attend(
    case: KernelCase,
    schedule: Schedule,
    *,
    programs: int = 3,
    hide: torch.Tensor | None = None,
    by: float = -torch.inf,
    bits: torch.Tensor | None = None,
    group: int = 0,
) -> list[torch.Tensor]:
    """Run the kernel on chunk tokens of the reference; return results and log-sum-exps.

    ``hide`` says which get the bias ``by``, ``bits`` which each ``group`` queries leave out.
    """
    q, k, v, _ = case.inputs()
    rows = rows_of(k, *case.masks.values(), chunk_size=case.chunk_size)
    tokens = reference_tokens(case, *(x.double() for x in (k, v)), case.parameters)
    rfa_k, rfa_v = (x.to(case.dtype) for x in tokens[:2])
    biases = tokens[2].float()
    biases = biases if hide is None else biases.masked_fill(hide, by)
    t = Operands(q=q, k=k, v=v, rfa_k=rfa_k, rfa_v=rfa_v, rfa_bias=biases)
    pooled = PooledChunks(rule="mean", parameters=()) if case.rule == "mean" else None
    spec = launch.attention_spec(t, case.settings, rows, pooled)
    spec = dataclasses.replace(spec, selection_group=group)
    how = dataclasses.replace(schedule, product_bias=not spec.whole_chunks)
    out = torch.full((*q.shape[:3], v.shape[3]), torch.nan, dtype=case.dtype)
    lse = torch.full(q.shape[:3], torch.nan)
    values = {**launch.call_values(t, rows, case.settings), "out_ptr": out, "lse_ptr": lse}
    values["bias_columns_ptr"] = bias_columns(biases / case.factor)
    values |= {} if bits is None else {"bits_ptr": bits, "words": bits.shape[2]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "choose", lambda *_: how)
        patch.setattr(launch, "load", interpreted)
        patch.setattr(launch, "resident_programs", lambda _: programs)
        launch.run(spec, launch.query_programs(t), values)
    return [out, lse]


def interpreted(spec: KernelSpec, schedule: Schedule) -> LoadedKernel:
    assert schedule.consumers
    generated = EMIT(spec, schedule)
    run = gluon_interpreter.interpreted(generated.source, spec.kind)
    return LoadedKernel(generated=generated, path=None, launch=run, function=None)


def bias_columns(bias: torch.Tensor) -> torch.Tensor:
    high = bias.clamp(torch.finfo(torch.bfloat16).min).where(bias.isfinite(), bias).bfloat16()
    rest = (bias - high.float()).where(bias.isfinite(), 0).clamp(-1e30)
    middle = rest.bfloat16()
    low = (rest - middle.float()).bfloat16()
    columns = torch.zeros(*bias.shape, BIAS_COLUMNS, dtype=torch.bfloat16)
    columns[..., :3] = torch.stack((high, middle, low), -1)
    return columns


def formula(case: KernelCase, dtype: torch.dtype) -> list[torch.Tensor]:
    from flasheva_compile.kernels.reference.attention import eva_attention_from_chunk_tokens

    q, k, v, _ = case.inputs()
    tokens = reference_tokens(case, *(x.double() for x in (k, v)), case.parameters)
    # Chunk tokens are inputs, rounded as the kernel gets them.
    rfa = [x.to(case.dtype).to(dtype) for x in tokens[:2]]
    names = ("window_size", "chunk_size", "sink_tokens", "window", "causal", "q_offset")
    options = {name: getattr(case, name) for name in names}
    moved = (x.to(dtype) for x in (q, k, v))
    biases = tokens[2].to(dtype)
    found = eva_attention_from_chunk_tokens(
        *(*moved, *rfa, biases), scale=case.factor, **options, **case.masks
    )
    return list(found)


@pytest.mark.parametrize(("causal", "count"), [(True, 36), (False, 24)])
@pytest.mark.parametrize("mask", ["none", "left_padding", "holes"])
def test_specialised_warps_attend_as_the_reference_does(mask, causal, count):
    """Each kind of rows on its own: drawn together, some would hardly be drawn."""

    @given(specialist_cases(mask=mask, causal=causal), specialist_schedules())
    @hypothesis_settings(deadline=None, max_examples=count // 3, derandomize=True, database=None)
    def holds(case, schedule):
        check(case, schedule)

    holds()


def check(case: KernelCase, schedule: Schedule) -> None:
    found = attend(case, schedule)
    wanted = {dtype: formula(case, dtype) for dtype in (torch.float64, case.dtype)}
    assert_as_accurate_as_pytorch(found, wanted.__getitem__, case.dtype)
    # Nothing but weights is rounded to 16 bits: masses show what a result's rounding hides.
    masses = wanted[torch.float64][1]
    torch.testing.assert_close(found[1].double(), masses, atol=1e-5, rtol=1e-5)


def test_programs_that_walk_over_all_blocks_leave_none_out():
    """Results must be NaN before they are stored, once each."""
    case = KernelCase(
        batch=2,
        keys=400,
        queries=400,
        head_dim=16,
        value_dim=16,
        window_size=64,
        chunk_size=16,
        dtype=torch.bfloat16,
        rule="tangent",
    )
    how = Schedule(
        block_m=64,
        block_n=64,
        num_warps=4,
        num_stages=2,
        tma=True,
        product_bias=True,
        consumers=1,
        persistent=True,
    )
    first = attend(case, how, programs=1)
    for programs in (2, 3, 5, 14):
        for one, other in zip(first, attend(case, how, programs=programs), strict=True):
            assert torch.equal(one, other)


def test_a_hidden_chunk_token_stays_hidden():
    """-inf hides it from all products, and the lowest float as well as."""
    case = KernelCase(
        keys=200,
        queries=200,
        head_dim=16,
        value_dim=16,
        rule="tangent",
        window_size=32,
        chunk_size=4,
        dtype=torch.bfloat16,
    )
    how = Schedule(
        block_m=64,
        block_n=16,
        num_warps=4,
        num_stages=2,
        tma=True,
        product_bias=True,
        consumers=1,
    )
    hidden = torch.arange(case.slots) % 3 == 0
    lowest = torch.finfo(torch.float32).min
    found = [attend(case, how, hide=hidden, by=by) for by in (-torch.inf, lowest)]
    for one, other in zip(*found, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)
    assert not torch.equal(found[0][0], attend(case, how)[0])


# --- when warps specialise ------------------------------------------------------------------------

SPECIAL = base("bf16", 128)
PADDED, BOTH = {"documents": "padded", "key_mask": True}, {"causal": False}
NOT_SPECIAL = {
    "softcap": True,
    "alibi": True,
    "dropout": True,
    "negative_scale": True,
    "dtype": "fp32",
    "head_dim": 96,
    "value_dim": 64,
    "key_mask": True,
    "documents": "packed",
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("layout", [{}, {"group": 4}, PADDED, BOTH, PADDED | BOTH])
def test_warps_specialise_on_hopper_alone(head_dim, layout):
    spec = base("fp16", head_dim, **layout)
    chosen = choose(spec, HOPPER)
    assert chosen.consumers
    assert chosen.product_bias
    assert not choose_alike(spec, HOPPER).consumers
    for arch in ("sm_80", "sm_100", "sm_120", "gfx942"):
        assert not choose(spec, known_target(arch)).consumers
    whole = choose(dataclasses.replace(spec, whole_chunks=True), HOPPER)
    assert whole.consumers
    assert not whole.product_bias
    left_out = choose(dataclasses.replace(spec, selection_group=16), HOPPER)
    assert bool(left_out.consumers) == spec.causal


@pytest.mark.parametrize(("name", "value"), NOT_SPECIAL.items())
def test_other_attentions_keep_their_kernel(name, value):
    spec = dataclasses.replace(SPECIAL, **{name: value})
    assert specialists_rejection(spec, HOPPER)
    assert not choose(spec, HOPPER).consumers


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("change", [{"q_offset": -1}, {"q_offset": 5}, {"scale": 1e-46}])
def test_queries_beside_the_keys_and_tiny_scales_keep_their_kernel(change, whole):
    values = {"q_offset": 0, "queries": 4, "columns": 8, "scale": 0.1, "bias_columns_ptr": None}
    spec = dataclasses.replace(SPECIAL, whole_chunks=whole)
    schedule = choose(spec, HOPPER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "current_target", lambda: HOPPER)
        assert fitting.with_what_is_there(schedule, spec, values) == schedule
        other = fitting.with_what_is_there(schedule, spec, {**values, **change})
    assert not other.consumers
    assert other == choose_alike(spec, HOPPER)


# --- the interpreter itself -----------------------------------------------------------------------


def broken(old: str, new: str):
    def emitted(spec, schedule):
        generated = emit(spec, schedule)
        if old not in generated.source:
            pytest.fail(f"no {old!r} to break")  # an AssertionError is what a mistake raises
        return dataclasses.replace(generated, source=generated.source.replace(old, new))

    return emitted


MISTAKES = {
    "causal": [
        ("for _ in range(own_tiles, tiles):", "for _ in range(own_tiles, own_tiles):"),
        ("mbarrier.arrive(v_empty.index(t % STAGES), count=1)\n", "pass\n"),
        ("hi = i + 1", "hi = i + 2"),
        ("phase ^ 1", "phase"),
    ],
    "padded": [
        ("offset = start + lo_first + ", "offset = lo_first + "),
        ("offset = start + tile * BLOCK_N", "offset = tile * BLOCK_N"),
        ("offset = first_slot + ", "offset = "),
        ("q_offset - start\n", "q_offset\n"),
        ("columns + start\n", "columns\n"),
        (" & valid[None, :]", ""),
        ("gl.where(valid[None, :], s, ", "gl.where(True, s, "),
        ("gl.maximum(own_last + 1 - lo_first, 1)", "gl.maximum(own_last + 1 - lo_first, 0)"),
        ("gl.maximum(own_first + 1 - lo_first, 0)", "(own_first + 1 - lo_first)"),
    ],
    "both": [
        ("offs_n[None, :] >= chunk_start[:, None]", "offs_n[None, :] >= 0"),
        ("chunk_start = gl.maximum(gl.cdiv(hi, 4), 18)", "chunk_start = gl.cdiv(hi, 4)"),
        ("range(tiles_behind - 1, all_behind", "range(tiles_behind - 1, all_behind + 1"),
        ("gl.cdiv(own_hi_last, 4)", "gl.cdiv(own_hi_first, 4)"),
        ("| (offs_n[None, :] >= hi[:, None])", "| False"),
        ("(offs_n < sink_stop)[None, :]", "True"),
    ],
    "padded both": [
        ("row_chunks = chunks - first_slot", "row_chunks = chunks"),
        ("offset = first_slot + behind + ", "offset = behind + "),
        ("gl.load(stop_ptr + b)", "gl.load(stop_ptr)"),
    ],
    "sinks behind": [("gl.cdiv(gl.minimum(keys, 72), BLOCK_N)", "gl.cdiv(lo_last, BLOCK_N)")],
    "sinks beyond": [("sink_stop = gl.minimum(keys, 80)", "sink_stop = 80")],
}


def whose_mistakes_show(kind: str) -> KernelCase:
    case = KernelCase(
        keys=260,
        queries=260,
        head_dim=16,
        value_dim=16,
        rule="tangent",
        window_size=64,
        chunk_size=16,
        dtype=torch.bfloat16,
    )
    if kind == "causal":
        return case
    case = dataclasses.replace(case, chunk_size=4, kv_heads=1, group=1)
    if kind == "both":  # some sinks are in front of windows, some behind
        return dataclasses.replace(case, causal=False, window_size=32, sink_tokens=72)
    if kind.startswith("sinks"):
        keys, window, sinks = (75, 32, 72) if kind == "sinks behind" else (30, 16, 80)
        sizes = {"keys": keys, "queries": keys, "window_size": window, "sink_tokens": sinks}
        return dataclasses.replace(case, causal=False, **sizes)
    columns = torch.arange(260)
    if kind == "padded both":  # rows that begin and end at different keys
        case = dataclasses.replace(case, causal=False, window_size=32, sink_tokens=8)
        first = (columns >= 70) & (columns % 7 > 0) & (columns < 250)
        valid = torch.stack([first, (columns >= 5) & (columns < 130)])
        vars(case)["masks"] = {"key_mask": valid, "segment_ids": None}
        return case
    case = dataclasses.replace(case, window_size=112, sink_tokens=20)
    # A row that begins behind some queries of a block and has holes, and one that holds nothing.
    valid = torch.stack([(columns >= 70) & (columns % 7 > 0), columns > 999])
    vars(case)["masks"] = {"key_mask": valid, "segment_ids": None}
    return case


WHERE_MISTAKES_SHOW = Schedule(
    block_m=128,
    block_n=16,
    num_warps=4,
    num_stages=2,
    tma=True,
    product_bias=True,
    consumers=2,
    overlap=True,
    persistent=True,
)


@pytest.mark.parametrize("kind", MISTAKES)
def test_without_mistakes_the_same_calls_are_right(kind):
    check(whose_mistakes_show(kind), WHERE_MISTAKES_SHOW)


@pytest.mark.parametrize(
    ("kind", "old", "new"), [(kind, *pair) for kind, found in MISTAKES.items() for pair in found]
)
def test_the_interpreter_finds_mistakes(kind, old, new):
    case = whose_mistakes_show(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gluon_interpreter, "LIMIT_S", 0.5)
        patch.setitem(globals(), "EMIT", broken(old, new))
        with pytest.raises(AssertionError):
            check(case, WHERE_MISTAKES_SHOW)
