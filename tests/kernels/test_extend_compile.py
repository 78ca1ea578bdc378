"""Kernels of several new tokens: text like all others, compiled for every target without spills.

``FLASHEVA_COMPILE=full`` compiles all specs for all targets.
"""

from __future__ import annotations

import os

import pytest
from flasheva_compile.lowering import schedule
from flasheva_compile.lowering.emit.module import emit
from flasheva_compile.lowering.offline import TARGETS, resources
from flasheva_compile.lowering.schedule import choose, known_target
from flasheva_compile.lowering.schedule_extend import fitted

from tests.kernels import test_source
from tests.kernels.test_decode_source import EVA, spec_of, specs, whole_spec

FULL = os.environ.get("FLASHEVA_COMPILE") == "full"
KINDS = ("extend_pool", "extend", "extend_append", "extend_combine")
MASKED = {"chunk_rule": "evabyte", "parameters": 3, "key_mask": True, "softcap": True}
BLOCK = {"window": "block", "sink_size": 0, "group": 1, "chunk_rule": "mean", "parameters": 0}
CHOSEN = {
    "bf16-d64": spec_of(),
    "block-bf16-d128": spec_of(head_dim=128, **BLOCK),
    "masked-bf16-d128": spec_of(head_dim=128, **MASKED),
    "whole-bf16-d128": whole_spec(head_dim=128, key_mask=True),
    "eva-bf16-d64": spec_of(**EVA),
    "eva-masked-bf16-d128": spec_of(head_dim=128, key_mask=True, **EVA),
    "eva-fp32-d256": spec_of("fp32", 256, key_mask=True, **EVA),
    "fp8-bf16-d64": spec_of(fp8_chunks=True),
    "fp8-fp32-d128": spec_of("fp32", 128, fp8_chunks=True),
    "alibi-bf16-d128": spec_of(head_dim=128, **MASKED, alibi=True),
    "alibi-whole-bf16-d64": whole_spec(alibi=True),
    "fp16-d80-g12": spec_of("fp16", 80, group=12),
    "bf16-d256": spec_of(head_dim=256, **MASKED),
    "fp32-d64": spec_of("fp32"),
    "fp32-d128": spec_of("fp32", 128),
}
_POOLING = {name: ("extend_pool", "extend_append") for name in CHOSEN if name.startswith("eva")}
COMPILED = {
    "sm_90": {
        **dict.fromkeys(CHOSEN, ("extend",)),
        "masked-bf16-d128": KINDS[:3],
        "whole-bf16-d128": KINDS[:3],
        "fp8-bf16-d64": KINDS[:2],
        "alibi-bf16-d128": KINDS[:2],
        **_POOLING,
    },
    **{target: {"bf16-d64": KINDS[:2], **_POOLING} for target in ("sm_80", "sm_100", "gfx942")},
}
if FULL:
    plain = {name: spec for name, spec in specs().items() if spec.kind == "decode"}
    CHOSEN |= plain
    COMPILED = {target: dict.fromkeys(CHOSEN, KINDS) for target in COMPILED}
TOKENS = (2, 4096)  # a few rows of queries per tile, and as many as fit


@pytest.fixture(scope="module", name="kernels")
def _kernels():
    found = {}
    for name, spec in CHOSEN.items():
        for kind in KINDS:
            of_kind = spec.of_kind(kind)
            found[f"{name}-{kind}"] = emit(of_kind, choose(of_kind))
    return found


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


def test_tokens_without_mask_sinks_or_softcap_leave_no_trace():
    spec = spec_of(head_dim=128, **BLOCK)
    for kind in KINDS:
        source = emit(spec.of_kind(kind), choose(spec.of_kind(kind))).source
        for word in ("flags_ptr", "key_mask", "tanh", "waits", "atomic", "slope", "chunk_mean"):
            assert word not in source, (kind, word)


@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 4096])
@pytest.mark.parametrize("group", [1, 3, 4, 40])
def test_tiles_hold_whole_groups_and_no_more_tokens_than_there_are(group, tokens):
    spec = spec_of(group=group).of_kind("extend")
    chosen = schedule.choose(spec)
    tiles = fitted(chosen, spec, tokens)
    assert tiles.block_m >= max(16, group)
    assert tiles.block_m <= max(chosen.block_m, 64)
    assert tiles.block_m // 2 < max(16, group * tokens)


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("TRITON_INTERPRET=1: kernels would be interpreted, not compiled")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FLASHEVA_CACHE_DIR", "TRITON_CACHE_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(
    ("target", "name", "kind"),
    [(t, name, kind) for t, names in COMPILED.items() for name in names for kind in names[name]],
)
def test_compiles_without_spills(target, name, kind):
    spec = CHOSEN[name].of_kind(kind)
    tiles = choose(spec, known_target(target))
    for how in {fitted(tiles, spec, n) for n in TOKENS} if kind == "extend" else {tiles}:
        used = resources(emit(spec, how), target)
        assert used.shared <= TARGETS[target].shared_limit, how
        assert used.stack == 0, how
