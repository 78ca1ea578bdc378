"""Kernels of generation with default schedules compile for every target, within its limits.

``FLASHEVA_COMPILE=full`` compiles all of ``test_decode_source.py`` for all targets.
"""

from __future__ import annotations

import os

import pytest
from flasheva_compile.lowering.emit.module import emit
from flasheva_compile.lowering.offline import TARGETS, resources
from flasheva_compile.lowering.schedule import choose, known_target

from tests.kernels.test_decode_source import EVA, spec_of, specs, whole_spec

FULL = os.environ.get("FLASHEVA_COMPILE") == "full"
_EVABYTE = {"chunk_rule": "evabyte", "parameters": 3, "key_mask": True, "softcap": True}
EVERYWHERE = {
    "bf16-d64": spec_of(),
    "bf16-d128": spec_of(head_dim=128, **_EVABYTE),
    "eva-bf16-d64": spec_of(**EVA),
    "eva-bf16-d128": spec_of(head_dim=128, **EVA, key_mask=True, softcap=True),
    "combine-bf16-d64": spec_of().of_kind("decode_combine"),
}
SPECS = {
    **EVERYWHERE,
    "block-mean-bf16-d64": spec_of(
        window="block", sink_size=0, group=1, chunk_rule="mean", parameters=0
    ),
    "whole-bf16-d64": whole_spec(),
    "whole-bf16-d128": whole_spec(head_dim=128, key_mask=True, softcap=True),
    "whole-bf16-d256": whole_spec(head_dim=256),
    "eva-fp16-d80": spec_of("fp16", 80, group=12, chunk_rule="eva", parameters=0),
    "eva-bf16-d256": spec_of(head_dim=256, **EVA, key_mask=True, softcap=True),
    "eva-fp32-d64": spec_of("fp32", **EVA),
    "fp16-d80": spec_of("fp16", 80, group=12),
    "bf16-d192-e128": spec_of(head_dim=192, value_dim=128),
    "bf16-d256": spec_of(head_dim=256, **_EVABYTE),
    "fp32-d64": spec_of("fp32"),
    "fp32-d128": spec_of("fp32", 128),
    "fp8-bf16-d64": spec_of(fp8_chunks=True),
    "fp8-bf16-d128": spec_of(head_dim=128, **_EVABYTE, fp8_chunks=True),
    "fp8-fp32-d128": spec_of("fp32", 128, fp8_chunks=True),
    "alibi-bf16-d128": spec_of(head_dim=128, **_EVABYTE, alibi=True),
    "alibi-whole-bf16-d128": whole_spec(head_dim=128, key_mask=True, alibi=True),
    "combine-fp32-d256": spec_of("fp32", 256).of_kind("decode_combine"),
}
ALL = {**SPECS, **(specs() if FULL else {})}
MATRIX = {
    "sm_90": list(ALL),
    **{target: list(ALL if FULL else EVERYWHERE) for target in ("sm_80", "sm_100", "gfx942")},
}


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("TRITON_INTERPRET=1: kernels would be interpreted, not compiled")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FLASHEVA_CACHE_DIR", "TRITON_CACHE_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(
    ("target", "name"), [(target, name) for target, names in MATRIX.items() for name in names]
)
def test_compiles_without_spills(target, name):
    spec = ALL[name]
    used = resources(emit(spec, choose(spec, known_target(target))), target)
    assert used.shared <= TARGETS[target].shared_limit
    assert used.stack == 0
    if spec.kind == "decode" and spec.dtype != "fp32":
        # Sixteen query heads are too few for the newest instructions of NVIDIA.
        wanted = {"gfx942": "mfma"}.get(target, "mma")
        assert used.matrix == wanted or spec.group > 32
