"""What a pass of a new kind launches is compiled first, side by side, and only then launched."""

from __future__ import annotations

import threading
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from flasheva_compile.lowering import direct_launch, first_calls, launch
from triton.runtime.jit import JITFunction

from flasheva_compile.op_checks import OP_VERSION
from flasheva_compile.ops import flasheva_attention
from tests.stand_in_device import stand_in_device

FORWARD = ["chunk_tokens", "forward"]
BACKWARD = ["dq", "dchunk", "dsink", "dkv"]


@pytest.fixture(name="launches", autouse=True)
def _launches(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHEVA_CACHE_DIR", str(tmp_path))
    with stand_in_device() as launches:
        yield launches


def step(length=64, *, phi=True, masked=False, dtype=torch.bfloat16):
    q, k, v = (torch.zeros(1, 2, length, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    parameters = [torch.zeros(2, 16, requires_grad=True)] if phi else []
    mask = torch.ones(1, length, dtype=torch.bool) if masked else None
    options = {"window_size": 32, "chunk_size": 8, "sink_tokens": 8}
    out, _ = flasheva_attention(q, k, v, key_mask=mask, parameters=parameters, **options)
    torch.autograd.grad(out, (q, k, v, *parameters), torch.zeros_like(out))


def compiled_ahead(run, launches):
    """Return the kernels that ``run`` compiled without launching them."""
    launches.clear()
    run()
    return [name for name, programs, *_ in launches if programs == 0]


def test_kernels_of_a_pass_are_compiled_before_any_is_launched(launches):
    threads, own = [], first_calls._compile

    def noted(*args):
        threads.append(threading.get_ident())
        own(*args)

    with mock.patch.object(first_calls, "_compile", noted):
        step()
    calls = [(name, bool(programs)) for name, programs, *_ in launches]
    forward, backward = calls[: 2 * len(FORWARD)], calls[2 * len(FORWARD) :]
    for kernels, seen in ((FORWARD, forward), (BACKWARD, backward)):
        ahead, made = seen[: len(kernels)], seen[len(kernels) :]
        assert sorted(ahead) == sorted((name, False) for name in kernels)
        assert made == [(name, True) for name in kernels]
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("call", [{}, {"masked": True}, {"phi": False, "masked": True}], ids=str)
def test_pooling_writes_the_columns_that_attention_reads(call):
    """One launch less; means of whole chunks have one bias, which no kernel reads."""
    pooling, attending = forward_specs(**call)
    assert (pooling.kind, attending.kind) == ("chunk_tokens", "forward")
    assert pooling.bias_columns
    pooling, attending = forward_specs(phi=False)
    assert attending.whole_chunks
    assert not pooling.bias_columns


def forward_specs(**call):
    """Return the specs that a step launches up to the first of its backward pass."""
    with mock.patch.object(launch, "load", side_effect=launch.load) as loads:
        step(**call)
    specs = list(dict.fromkeys(call.args[0] for call in loads.call_args_list))
    return specs[: [spec.kind for spec in specs].index("dq")]


def test_columns_of_chunk_tokens_that_are_there_have_a_launch_of_their_own(launches):
    x, tokens = torch.zeros(1, 2, 64, 16).bfloat16(), torch.zeros(1, 2, 8, 16).bfloat16()
    operands = (x, x, x, tokens, tokens, torch.zeros(1, 2, 8), None, None, None, None)
    sizes = {"window_size": 32, "chunk_size": 8, "sink_tokens": 8, "window": "sliding"}
    options = {"causal": True, "q_offset": 0, "scale": 0.25, "softcap": 0.0, "dropout_p": 0.0}
    torch.ops.flasheva.attention(*operands, **sizes, **options, version=OP_VERSION)
    assert [name for name, *_ in launches] == ["bias_columns", "forward"]


def test_what_was_compiled_ahead_is_launched_directly():
    with mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as seen:
        step()
    assert [call.kwargs["grid"] for call in seen.call_args_list] == [(0,)] * len(FORWARD + BACKWARD)


def test_nothing_is_compiled_ahead_twice(launches):
    assert len(compiled_ahead(lambda: step(128), launches)) == len(FORWARD + BACKWARD)
    assert not compiled_ahead(lambda: step(128), launches)
    assert not compiled_ahead(lambda: step(256), launches)


@pytest.mark.parametrize(
    "other", [{"length": 72}, {"masked": True}, {"phi": False}, {"dtype": torch.float16}], ids=str
)
def test_other_binaries_are_compiled_ahead_too(other, launches):
    step()
    assert {*FORWARD, *BACKWARD} <= set(compiled_ahead(lambda: step(**other), launches))


def test_a_compilation_that_fails_ahead_is_left_to_the_launch(launches):
    with mock.patch.object(first_calls, "_compile", side_effect=RuntimeError):
        assert not compiled_ahead(step, launches)
    assert [name for name, *_ in launches] == [*FORWARD, *BACKWARD]


def test_a_pass_that_fails_leaves_nothing_behind(launches):
    with pytest.raises(ZeroDivisionError):
        first_calls.side_by_side(lambda: 1 / 0)
    assert direct_launch.may_compile.get()
    with pytest.raises(ZeroDivisionError):
        first_calls._launches_of(lambda: 1 / 0)
    assert not first_calls.collect(torch.device("cpu"), print, ())
    step()
    assert [name for name, programs, *_ in launches if programs] == [*FORWARD, *BACKWARD]


def test_no_other_thread_works_during_a_capture(launches):
    with mock.patch.object(first_calls, "_is_capturing", return_value=True):
        assert not compiled_ahead(step, launches)
    assert [name for name, *_ in launches] == [*FORWARD, *BACKWARD]


@pytest.mark.parametrize("by", ["token", "bounds"])
def test_retrieval(by, launches):
    def retrieving():
        q, k, v = (torch.zeros(1, 2, 128, 16, requires_grad=True) for _ in range(3))
        sizes = {"window_size": 32, "chunk_size": 8, "sink_tokens": 8}
        retrieval = {"retrieve_chunks": 2, "retrieve_by": by}
        out, _ = flasheva_attention(q, k, v, **sizes, **retrieval)
        torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))

    # Nothing selects here: what selections are left in must be chunks.
    with mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros):
        ahead, again = (compiled_ahead(retrieving, launches) for _ in range(2))
    forward = ["select", "forward", "retrieve"]
    backward = ["selection_bits", "dq", "retrieved_dq", "retrieved_dkv", "dchunk", "dsink", "dkv"]
    assert set(ahead) >= {*forward, *backward}
    assert not again
