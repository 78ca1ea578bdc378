"""Launches that repeat go past Triton's search, and nowhere else than Triton would send them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

from flasheva_compile.lowering import direct_launch, first_calls, load  # noqa: E402
from triton.runtime.jit import JITFunction, native_specialize_impl  # noqa: E402

from flasheva_compile.ops import flasheva_attention  # noqa: E402
from tests.stand_in_device import stand_in_device  # noqa: E402


@pytest.fixture(autouse=True)
def _generated(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHEVA_CACHE_DIR", str(tmp_path))


@pytest.fixture(name="launches")
def _launches(monkeypatch):
    monkeypatch.setattr(first_calls, "_compile_all", lambda _: None)  # Triton launches what is new
    with stand_in_device() as launches:
        yield launches


def step(length=64, dtype=torch.bfloat16, shift=0):
    """Run one layer forward and backward; return its gradients."""
    n = 2 * length * 16
    q, k, v = (
        torch.zeros(n + shift, dtype=dtype)[shift:].view(1, 2, length, 16).requires_grad_()
        for _ in range(3)
    )
    phi = torch.zeros(2, 16, requires_grad=True)
    options = {"window_size": 32, "chunk_size": 8, "sink_tokens": 8}
    out, _ = flasheva_attention(q, k, v, parameters=[phi], **options)
    return torch.autograd.grad(out, (q, k, v, phi), torch.zeros_like(out))


def searches(run):
    """Return how many launches of ``run`` went through Triton."""
    with mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as seen:
        run()
    return seen.call_count


KERNELS = ["chunk_tokens", "forward", "dq", "dchunk", "dsink", "dkv"]


def test_a_layer_that_repeats_is_launched_without_triton(launches):
    assert searches(step) == len(KERNELS)
    first = list(launches)
    launches.clear()
    assert searches(step) == 0
    assert [name for name, *_ in launches] == KERNELS
    for direct, searched in zip(launches, first, strict=True):
        assert direct[1:5] == searched[1:5]  # grid and stream
        numbers = [[x for x in call if isinstance(x, int | float)] for call in (direct, searched)]
        # Addresses differ, and what of them reaches the driver as a number here does, too.
        assert numbers[0][-4:] == numbers[1][-4:]


def test_what_triton_would_compile_again_goes_through_triton(launches):
    step()
    assert searches(lambda: step(length=72)) <= len(KERNELS)
    assert searches(lambda: step(length=72)) == 0
    assert searches(lambda: step(dtype=torch.float16)) == len(KERNELS)
    assert searches(lambda: step(shift=1)) > 0  # no longer aligned to 16 bytes
    assert searches(lambda: step(shift=1)) == 0
    assert launches


def test_a_profiler_hears_of_every_launch(launches):
    step()
    runtime = triton.knobs.runtime
    chain = type(runtime.launch_enter_hook)()
    chain.add(lambda *_: None)
    with mock.patch.object(runtime, "launch_enter_hook", chain):
        assert searches(step) == len(KERNELS)
    assert searches(step) == 0
    assert launches


def test_no_gradient_of_what_has_none_is_filled_with_zeros(launches):
    """Autograd would allocate and fill one for each of six results that nobody differentiates."""
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    q = torch.zeros(1, 2, 64, 16, dtype=torch.bfloat16, requires_grad=True)
    out = flasheva_attention(q, q, q, window_size=32, chunk_size=8)[0]
    dout = torch.zeros_like(out)
    with torch.profiler.profile(activities=activities) as profile:
        torch.autograd.grad(out, q, dout)
    names = [event.name for event in profile.events()]
    assert "flasheva::eva_attention_backward" in names
    before = names[: names.index("flasheva::eva_attention_backward")]
    assert not {"aten::zeros", "aten::zero_", "aten::fill_"} & set(before)
    assert launches


@given(*[st.one_of(st.integers(-40, 40), st.integers(-(2**65), 2**65))] * 2)
def test_integers_of_one_kind_are_one_to_triton(x, y):
    x, y = (max(-(2**63), min(n, 2**64 - 1)) for n in (x, y))
    backend = triton.backends.backends["nvidia"].compiler

    def specialised(n):
        return native_specialize_impl(backend, n, False, True, True)

    if direct_launch._int_kind(x) == direct_launch._int_kind(y):
        assert specialised(x) == specialised(y)


def test_kernels_that_triton_interprets_or_amd_runs_are_launched_by_triton():
    function = JITFunction.__new__(JITFunction)
    assert isinstance(direct_launch.direct(print, function), direct_launch.DirectLaunch)
    assert direct_launch.direct(print, object()) is print
    with mock.patch.object(torch.version, "hip", "7.0"):
        assert direct_launch.direct(print, function) is print
    assert load.load is not None


def test_all_that_a_binary_depends_on_is_in_the_key():
    x = torch.zeros(64)
    base = (x, 5, 0.5)
    key, _ = direct_launch._kinds(0, base)
    assert direct_launch._kinds(0, (torch.zeros(64), 7, 1.5))[0] == key  # values are not
    others = [
        (1, base),
        (0, (x[1:], 5, 0.5)),  # no longer aligned
        (0, (x.half(), 5, 0.5)),
        (0, (x, 1, 0.5)),
        (0, (x, 16, 0.5)),
        (0, (x, 2**31 + 1, 0.5)),
    ]
    keys = [direct_launch._kinds(device, arguments)[0] for device, arguments in others]
    assert len({key, *keys}) == len(others) + 1
