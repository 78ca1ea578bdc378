"""Generated text of the kernels of generation with retrieval, their choices of tiles, compiling.

``FLASHEVA_COMPILE=full`` compiles everything for all targets.
"""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace

import pytest
import torch
from flasheva_compile.kernels.blocked.geometry import AttentionSettings
from flasheva_compile.lowering import inspect, launch_retrieval_decode, schedule
from flasheva_compile.lowering.emit.module import emit
from flasheva_compile.lowering.emit.retrieval_decode_select import network_size
from flasheva_compile.lowering.offline import TARGETS, resources
from flasheva_compile.lowering.schedule_cost import rejection
from flasheva_compile.lowering.schedule_retrieval_decode import fitted

from tests.kernels import test_decode_source, test_source

FULL = os.environ.get("FLASHEVA_COMPILE") == "full"
KINDS = ("retrieval_scores", "retrieval_select", "retrieval_decode")
FP8 = {"near_store": True, "fp8_store": True}
_EVABYTE = {"chunk_rule": "evabyte", "parameters": 3, "key_mask": True, "softcap": True}


def spec_of(kind, dtype="bf16", head_dim=64, value_dim=None, *, chunks=16, **changes):
    decode = test_decode_source.spec_of(dtype, head_dim, value_dim, **changes)
    whole = dataclasses.replace(decode, kind="retrieval_scores", retrieve_chunks=chunks)
    return whole.of_kind(kind)


def specs():
    found = {}
    for name, spec in test_decode_source.specs().items():
        if spec.kind == "decode" and spec.chunk_rule != "eva":  # which it refuses
            whole = dataclasses.replace(spec, kind="retrieval_scores", retrieve_chunks=16)
            found |= {f"{kind}-{name}": whole.of_kind(kind) for kind in KINDS}
    for chunks in (1, 3, 33, 64):
        found |= {f"{kind}-k{chunks}": spec_of(kind, chunks=chunks) for kind in KINDS}
    for rule in ({}, _EVABYTE):
        count = rule.get("parameters", 1)
        by_bounds = {kind: spec_of(kind, by_bounds=True, **rule) for kind in KINDS[:2]}
        found |= {f"{kind}-bounds-{count}": spec for kind, spec in by_bounds.items()}
        weighted = {"by_bounds": True, "weighted_bounds": True}
        found[f"weighted-{count}"] = spec_of(KINDS[0], **weighted, **rule)
    found |= {f"{kind}-near": spec_of(kind, near_store=True) for kind in KINDS}
    found |= {f"{kind}-fp8": spec_of(kind, **FP8) for kind in KINDS}
    return found


@pytest.fixture(scope="module", name="kernels")
def _kernels():
    return {name: emit(spec, schedule.choose(spec)) for name, spec in specs().items()}


@pytest.mark.parametrize(
    "demand",
    [
        test_source.test_names_identify_texts,
        test_source.test_arguments_are_those_that_the_body_reads,
        test_source.test_every_name_is_defined,
    ],
)
def test_text_is_what_is_demanded_of_all_kernels(kernels, demand):
    demand(kernels)


def test_ruff_finds_nothing(kernels, tmp_path):
    test_source.test_ruff_finds_nothing(kernels, tmp_path)


def test_a_switched_off_feature_leaves_no_trace(kernels):
    plain = kernels["retrieval_scores-mean0-sliding-sinks0-maskFalse"].source
    for word in (
        "key_mask_ptr",
        "is_valid",
        "phi",
        "square",
        "softcap",
        "m_k",
        "bounds",
        "abs_q",
        "near",
        "codes",
    ):
        assert word not in plain, word
    assert not any("atomic" in kernel.source for kernel in kernels.values())
    attending = kernels["retrieval_decode-mean0-sliding-sinks0-maskFalse"]
    assert "rfa_k_ptr" not in attending.arguments  # its scores are there already


def test_one_kernel_selects_for_all_layers_that_see_the_same_chunks():
    one = spec_of("retrieval_select")
    assert spec_of("retrieval_select", "fp16", 128, 96, key_mask=True) == one
    for other in ({"chunks": 8}, {"chunk_size": 8}, {"window": "block"}, {"by_bounds": True}):
        assert spec_of("retrieval_select", **other) != one


def test_one_kernel_attends_under_all_rules():
    weighted = {"by_bounds": True, "weighted_bounds": True}
    for other in ({**_EVABYTE, "softcap": False}, {"by_bounds": True}, weighted):
        assert spec_of("retrieval_decode", **other) == spec_of("retrieval_decode")


def test_combine_knows_nothing_of_retrieval():
    plain = test_decode_source.spec_of().of_kind("decode_combine")
    assert spec_of("retrieval_scores").of_kind("decode_combine") == plain


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_choices_pass_the_static_rules(arch):
    target = schedule.known_target(arch)
    for name, spec in specs().items():
        chosen = schedule.choose(spec, target)
        assert chosen.block_n >= 16
        assert chosen.block_n & (chosen.block_n - 1) == 0
        if spec.kind == "retrieval_decode":  # it needs what ``decode`` needs
            like = dataclasses.replace(spec, kind="decode", retrieve_chunks=0)
            assert rejection(like, chosen, target) is None, (name, chosen)


def test_nothing_of_its_chain_is_launched_early(monkeypatch):
    """What gathers is placed unevenly beside programs that wait (measured)."""
    chosen = {}

    def load(spec, how):
        chosen[spec.kind] = how.dependent
        return SimpleNamespace(launch=None, generated=SimpleNamespace(arguments=()))

    monkeypatch.setattr(launch_retrieval_decode, "load", load)
    q, v = torch.Size((1, 32, 1, 64)), torch.Size((1, 8, 1, 64))
    of_cache = (4096, 256, 8, False, False, False, False, torch.bfloat16, torch.device("cpu"))
    shape = launch_retrieval_decode._Shape(q, v, *of_cache, "mean", 0, False)
    sizes = {"window_size": 256, "chunk_size": 16, "sink_tokens": 16, "window": "sliding"}
    s = AttentionSettings(**sizes, causal=True, q_offset=0, scale=0.125)
    launch_retrieval_decode._plan.__wrapped__(shape, s)
    assert chosen == dict.fromkeys((*KINDS, "decode_combine"), False)


@pytest.mark.parametrize("runs", [1, 16, 17, 512, 100_000])
def test_the_network_is_no_larger_than_what_it_gets(runs):
    spec = spec_of("retrieval_select")
    most = schedule.choose(spec)
    chosen = fitted(most, runs)
    assert chosen.block_n == most.block_n or chosen.block_n >= runs > chosen.block_n // 2 - 8
    assert chosen.block_n >= network_size(spec)


def test_inspect_prints_the_kernel(capsys, tmp_path, monkeypatch):
    for name in ("FLASHEVA_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    command = "--kind retrieval_decode --group 4 --sink-size 16 --retrieve-chunks 8"
    assert inspect.main(command.split()) == 0
    text = capsys.readouterr().out
    assert "def retrieval_decode(" in text
    assert ", no spills, " in text.splitlines()[-1]


# --- compiling ------------------------------------------------------------------------------------

SIZES = {
    "bf16-d64": {},
    "bf16-d128": {"head_dim": 128, **_EVABYTE, "chunks": 64},
    "block-mean-bf16-d64": {
        "window": "block",
        "sink_size": 0,
        "group": 1,
        "chunk_rule": "mean",
        "parameters": 0,
        "chunks": 3,
    },
    "fp16-d80": {"dtype": "fp16", "head_dim": 80, "group": 12},
    "bf16-d192-e128": {"head_dim": 192, "value_dim": 128},
    "bf16-d256": {"head_dim": 256, **_EVABYTE},
    "fp32-d64": {"dtype": "fp32"},
    "fp32-d128": {"dtype": "fp32", "head_dim": 128},
    "bf16-d64-g40": {"group": 40},
}
COMPILED = {
    f"{kind}-{name}": spec_of(kind, **size)
    for name, size in SIZES.items()
    for kind in KINDS
    if kind != "retrieval_select" or name in ("bf16-d64", "bf16-d128")
}
BY_BOUNDS = ["bf16-d64", "bf16-d128", "fp16-d80", "bf16-d256", "fp32-d128", "bf16-d64-g40"]
for _size in BY_BOUNDS:
    _bounds = {**SIZES[_size], "by_bounds": True}
    COMPILED[f"bounds-{_size}"] = spec_of("retrieval_scores", **_bounds)
    COMPILED[f"weighted-{_size}"] = spec_of("retrieval_scores", **_bounds, weighted_bounds=True)
for _kind in KINDS[::2]:
    COMPILED[f"near-{_kind}"] = spec_of(_kind, **SIZES["bf16-d128"], near_store=True)
    COMPILED[f"fp8-{_kind}-bf16-d64"] = spec_of(_kind, **FP8)
for _size in ("fp16-d80", "bf16-d256", "fp32-d128"):
    COMPILED[f"fp8-retrieval_decode-{_size}"] = spec_of(KINDS[2], **SIZES[_size], **FP8)
COMPILED["bounds-select"] = spec_of("retrieval_select", by_bounds=True)
EVERYWHERE = [name for name in COMPILED if name.endswith(("bf16-d64", "bf16-d128"))]
EVERYWHERE = [name for name in EVERYWHERE if "block" not in name]
MATRIX = {
    "sm_90": list(COMPILED),
    **{t: list(COMPILED) if FULL else EVERYWHERE for t in ("sm_80", "sm_100", "gfx942")},
}


@pytest.fixture(name="_caches")
def _own_caches(tmp_path_factory, monkeypatch):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("TRITON_INTERPRET=1: kernels would be interpreted, not compiled")
    for name in ("FLASHEVA_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path_factory.mktemp("cache")))


@pytest.mark.usefixtures("_caches")
@pytest.mark.parametrize(
    ("target", "name"), [(target, name) for target, names in MATRIX.items() for name in names]
)
def test_compiles_without_spills(target, name):
    spec = COMPILED[name]
    used = resources(emit(spec, schedule.choose(spec, schedule.known_target(target))), target)
    assert used.shared <= TARGETS[target].shared_limit
    assert used.stack == 0
    if spec.kind != "retrieval_select" and spec.dtype != "fp32" and spec.group <= 32:
        assert used.matrix == {"gfx942": "mfma"}.get(target, "mma")
