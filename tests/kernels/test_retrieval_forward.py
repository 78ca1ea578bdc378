"""Kernels of the retrieval tier's forward pass: source text and offline compiles.

Its laws are in ``retrieval_forward_laws.py``.
"""

from __future__ import annotations

import pytest
import torch
from flasheva_compile.kernels.blocked.block import Operands
from flasheva_compile.kernels.blocked.geometry import AttentionSettings
from flasheva_compile.kernels.blocked.retrieval_select import Retrieval
from flasheva_compile.lowering import launch_retrieval
from flasheva_compile.lowering.emit.module import emit
from flasheva_compile.lowering.offline import TARGETS, resources
from flasheva_compile.lowering.rows import Rows
from flasheva_compile.lowering.schedule import choose, known_target

from tests.kernels import test_source
from tests.kernels.compile_exceptions import allowed


def call(dtype=torch.bfloat16, size=64, group=4, length=96, **changes):
    """Return operands without data, and the settings of a call."""
    fields = {"sink_tokens": 16, "causal": True, "q_offset": 0, "scale": 0.1, "window": "sliding"}
    s = AttentionSettings(window_size=64, chunk_size=16, **{**fields, **changes})

    def meta(*shape, kind=dtype):
        return torch.empty(shape, dtype=kind, device="meta")

    k, rfa_k = meta(1, 2, length, size), meta(1, 2, -(-length // 16), size)
    bias = meta(1, 2, rfa_k.shape[2], kind=torch.float32)
    q = meta(1, 2 * group, length, size)
    return Operands(q=q, k=k, v=k, rfa_k=rfa_k, rfa_v=rfa_k, rfa_bias=bias), s


def specs():
    """Return specs by name: dtypes, head sizes, groups, blocks, as launches ask for them."""
    calls = {
        "bf16-d64-g4": (call(), (8, 1)),
        "bf16-d128-g4-block16": (call(size=128), (16, 16)),
        "bf16-d128-g8": (call(size=128, group=8), (32, 1)),
        "fp16-d80-softcap": (call(torch.float16, 80, 2, softcap=20.0), (8, 64)),
        "fp32-d64": (call(torch.float32, group=2), (8, 16)),
    }
    found = {}
    for name, ((t, s), (chunks, block)) in calls.items():
        for by in ("token", "bounds", "weighted"):
            weight = torch.empty(2, 3, t.k.shape[3], device="meta") if by == "weighted" else None
            kind = "token" if by == "token" else "bounds"
            retrieval = Retrieval(chunks=chunks, block=block, by=kind, weight=weight)
            of_call = launch_retrieval.specs(t, Rows(documents="dense"), s, retrieval)
            added = {f"{name}-{kind}": spec for kind, spec in of_call.items()}
            own = {f"{x}-{by}": spec for x, spec in added.items() if spec not in found.values()}
            found |= added if by == "token" else own
    return found


SPECS = specs()
EVERYWHERE = [name for name in SPECS if name.startswith(("bf16-d64", "bf16-d128-g4"))]
MATRIX = [("sm_90", name) for name in SPECS]
MATRIX += [(target, name) for target in ("sm_80", "sm_100", "gfx942") for name in EVERYWHERE]


@pytest.mark.parametrize(("target", "name"), MATRIX)
def test_compiles_within_the_limits_of_the_target(target, name, tmp_path, monkeypatch):
    for cache in ("FLASHEVA_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(cache, str(tmp_path))
    spec = SPECS[name]
    used = resources(emit(spec, choose(spec, known_target(target))), target)
    least, most, reason = allowed(target, f"retrieval-{name}")
    assert least <= used.stack <= most, used
    assert not most or reason
    assert used.shared <= TARGETS[target].shared_limit
    assert used.matrix or spec.dtype == "fp32" or spec.kind == "chunk_bounds"


def test_text_is_complete():
    kernels = {name: emit(spec, choose(spec)) for name, spec in SPECS.items()}
    test_source.test_arguments_are_those_that_the_body_reads(kernels)
    test_source.test_every_name_is_defined(kernels)


def test_forward_without_retrieval_has_no_trace_of_it():
    with_retrieval = SPECS["bf16-d64-g4-forward"]
    plain = with_retrieval.of_kind("forward")
    assert "bits" in emit(with_retrieval, choose(with_retrieval)).source
    without = type(plain)(
        **{name: getattr(plain, name) for name in plain.__slots__ if name != "selection_group"}
    )
    source = emit(without, choose(without)).source
    assert "bits" not in source
    assert "selection" not in source


def test_other_calls_run_the_blocked_code():
    retrieval = Retrieval(chunks=8)
    t, s = call()
    dense = Rows(documents="dense")
    assert launch_retrieval.covers(t, dense, s, retrieval)
    assert not launch_retrieval.covers(t, Rows(documents="packed"), s, retrieval)
    assert not launch_retrieval.covers(t, dense, call(dropout_p=0.1)[1], retrieval)
    assert not launch_retrieval.covers(t, dense, s, Retrieval(chunks=33))
    assert not launch_retrieval.covers(call(group=9)[0], dense, s, retrieval)
    by_bounds = Retrieval(chunks=8, by="bounds")
    assert launch_retrieval.covers(call(size=256, group=8)[0], dense, s, by_bounds)
    widest = call(torch.float32, size=256, group=8)[0]  # more than any GPU's shared memory
    assert launch_retrieval.covers(widest, dense, s, retrieval)
    assert not launch_retrieval.covers(widest, dense, s, by_bounds)
