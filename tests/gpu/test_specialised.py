"""``forward`` by specialised warps on a GPU: the other kernel's numbers, the reference, bits."""

from __future__ import annotations

import os

import pytest
import torch
from flasheva_compile.lowering import launch
from flasheva_compile.lowering.schedule import choose, choose_alike, current_target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flasheva_compile.ops import flasheva_attention
from tests.attention_cases import AttentionCase
from tests.gpu.test_kernels import inputs, on_device
from tests.tolerance import assert_as_accurate_as_pytorch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="warps specialise on Hopper",
    ),
]
EXAMPLES = int(os.environ.get("FLASHEVA_GPU_EXAMPLES", "60"))
REPEATS = 1000


@st.composite
def specialist_cases(draw):
    chunk = draw(st.sampled_from([1, 4, 16, 24]))
    keys = draw(st.integers(1, 1500))
    causal = draw(st.sampled_from([True, True, False]))
    queries = draw(st.integers(1, keys)) if causal and draw(st.booleans()) else keys
    head_dim = draw(st.sampled_from([64, 128]))
    return AttentionCase(
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 3, 4])),
        queries=queries,
        keys=keys,
        q_offset=draw(st.integers(0, keys - queries)),
        head_dim=head_dim,
        value_dim=head_dim,
        window_size=chunk * draw(st.integers(1, 24)),
        chunk_size=chunk,
        sink_tokens=draw(st.sampled_from([0, 1, 16, 100])),
        window=draw(st.sampled_from(["sliding", "block"])),
        causal=causal,
        mask=draw(st.sampled_from(["none", "left_padding", "holes"])),
        rule=draw(st.sampled_from(["mean", "tangent", "evabyte"])),
        with_parameters=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )


LAYOUTS = ("causal", "padded", "both", "padded both")


def row_options(layout: str, batch: int, length: int) -> dict[str, object]:
    """Return causality and mask; of padded rows the first is short, the second holds nothing."""
    options: dict[str, object] = {"causal": "both" not in layout}
    if "padded" in layout:
        first = torch.tensor([length * 2 // 3, length, 5, 0, 1])[:batch, None]
        columns = torch.arange(length)
        options["key_mask"] = ((columns >= first) & (columns % 301 != 300)).cuda()
    return options


@pytest.fixture
def specialised(monkeypatch):
    """Collect whether the warps of forward kernels specialised; first calls ask twice."""
    found = set()
    load = launch.load

    def noted(spec, schedule):
        if spec.kind == "forward":
            found.add(schedule.consumers > 0)
        return load(spec, schedule)

    monkeypatch.setattr(launch, "load", noted)
    return found


@given(case=specialist_cases(), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
def test_they_attend_as_the_reference_does(case, dtype):
    case = on_device(case)
    assert_as_accurate_as_pytorch(case.op(dtype), case.reference, dtype)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("window", ["sliding", "block"])
@pytest.mark.parametrize(("batch", "heads", "length"), [(1, 4, 20000), (3, 8, 2049), (2, 40, 777)])
@pytest.mark.parametrize("rule", ["mean", "tangent"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_attend_as_the_other_kernel_does(
    specialised, monkeypatch, size, window, batch, heads, length, rule, layout
):
    qkv = [x.detach() for x in inputs(batch, heads, heads // 4, length, size)]
    options = {"window_size": 256, "chunk_size": 16, "sink_tokens": 16, "window": window}
    options |= row_options(layout, batch, length)
    found = flasheva_attention(*qkv, chunk_rule=rule, **options)
    assert specialised == {True}
    specialised.clear()

    def alike(spec, *_):
        return choose_alike(spec, current_target()) if spec.kind == "forward" else choose(spec)

    monkeypatch.setattr(launch, "choose", alike)
    wanted = flasheva_attention(*qkv, chunk_rule=rule, **options)
    assert specialised == {False}
    torch.testing.assert_close(found[0], wanted[0], atol=2**-7, rtol=2**-6)
    torch.testing.assert_close(found[1], wanted[1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("window", ["sliding", "block"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_repeat(specialised, size, window, layout):
    """Whatever warps wait for, and in whatever order they go."""
    qkv = [x.detach() for x in inputs(2, 8, 2, 5000, size)]
    options = {"window_size": 256, "chunk_size": 16, "sink_tokens": 16, "window": window}
    options |= row_options(layout, 2, 5000)
    first = flasheva_attention(*qkv, chunk_rule="tangent", **options)
    for _ in range(REPEATS):
        again = flasheva_attention(*qkv, chunk_rule="tangent", **options)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    assert specialised == {True}


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_alone_has_the_bits_that_it_has_in_a_batch(size, layout):
    qkv = [x.detach() for x in inputs(5, 6, 2, 3000, size)]
    options = {"window_size": 256, "chunk_size": 16, "chunk_rule": "tangent"}
    options |= row_options(layout, 5, 3000)
    together = flasheva_attention(*qkv, **options)
    for row in (0, 1, 3):
        own = {n: x[row : row + 1] if n == "key_mask" else x for n, x in options.items()}
        alone = flasheva_attention(*(x[row : row + 1] for x in qkv), **own)
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_a_padded_row_has_the_numbers_of_the_row_without_padding(specialised, size, causal):
    """Tiles then begin at odd keys; queries in front of causal rows see nothing."""
    qkv = [x.detach() for x in inputs(1, 4, 2, 2000, size)]
    options = {"window_size": 256, "chunk_size": 16, "sink_tokens": 16, "causal": causal}
    plain = flasheva_attention(*qkv, chunk_rule="tangent", **options)
    front = 77
    wide = [torch.cat((torch.full_like(x[:, :, :front], 9.0), x), 2) for x in qkv]
    mask = torch.arange(2000 + front, device="cuda")[None] >= front
    found = flasheva_attention(*wide, chunk_rule="tangent", key_mask=mask, **options)
    assert specialised == {True}
    torch.testing.assert_close(found[0][:, :, front:], plain[0], atol=2**-7, rtol=2**-6)
    torch.testing.assert_close(found[1][:, :, front:], plain[1], atol=1e-4, rtol=1e-5)
    if causal:
        assert (found[0][:, :, :front] == 0).all()
        assert (found[1][:, :, :front] == -torch.inf).all()
