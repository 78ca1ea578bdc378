"""Kernels with default schedules compile for every target, within its limits; no GPU needed.

``FLASHEVA_COMPILE=full`` compiles many more specs for all targets: half an hour on a core.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from flasheva_compile.lowering.emit.module import emit
from flasheva_compile.lowering.launch import fuses_pooling
from flasheva_compile.lowering.offline import TARGETS, Resources, launch_options, resources
from flasheva_compile.lowering.schedule import choose, known_target

from tests.kernels import families, test_retrieval_forward
from tests.kernels.compile_exceptions import FOUND, VERSIONS, allowed

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec

FULL = os.environ.get("FLASHEVA_COMPILE") == "full"
EVERYWHERE = families.specs(families.EVERYWHERE)


def specs_for(target: str) -> dict[str, KernelSpec]:
    everything = families.all_specs(target) if FULL else {}
    mine = families.FAMILIES if FULL or target == "sm_90" else families.EVERYWHERE
    return {**families.specs(mine, target), **everything}


MATRIX = {target: specs_for(target) for target in ("sm_90", "sm_80", "sm_100", "gfx942")}
"""Target to the kernels that are compiled for it."""

FASTEST = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("TRITON_INTERPRET=1: kernels would be interpreted, not compiled")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FLASHEVA_CACHE_DIR", "TRITON_CACHE_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp("cache")))
        yield


def used_by(name: str, target: str) -> Resources:
    spec = MATRIX[target][name]
    return resources(emit(spec, choose(spec, known_target(target))), target)


def fastest(spec: KernelSpec, target: str) -> str:
    """Return the matrix instruction that a kernel has to use; \"\" = any, or none."""
    if spec.kind in ("chunk_tokens", "dpool", "domega") or spec.dtype == "fp32":
        return ""
    if spec.kind == "dsink" and spec.sink_size <= 16:
        # The newer instructions multiply 64 rows at a time: 48 of them would be no sinks.
        return FASTEST[target] if FASTEST[target] == "mfma" else "mma"
    return FASTEST[target]


@pytest.mark.parametrize(
    ("target", "name"), [(target, name) for target, names in MATRIX.items() for name in names]
)
def test_compiles_within_the_limits_of_the_target(target, name):
    spec, used = MATRIX[target][name], used_by(name, target)
    assert used.shared <= TARGETS[target].shared_limit
    least, most, reason = allowed(target, name)
    line = f'"{name}": ({used.stack}, "why"),  # {target}'
    assert used.stack <= most, f"spills; tune it or list in compile_exceptions.py: {line}"
    assert used.stack >= least, f"remove from compile_exceptions.py: {name}"
    assert not most or reason
    if wanted := fastest(spec, target):
        assert (used.matrix, used.matrix_count > 0) == (wanted, True)


def test_columns_of_biases_leave_room_for_two_programs_that_pool():
    """Of eight warps each; a few registers more and there is one."""
    assert used_by("columns-bf16-d128-chunk_tokens", "sm_90").registers <= 128


def test_every_exception_is_compiled():
    """An entry for a kernel that nothing compiles would never be found to be stale."""
    retrieving = {f"retrieval-{name}" for name in test_retrieval_forward.SPECS}
    everything = {*families.specs(), *families.all_specs(), *retrieving}
    for target, spills in FOUND.items():
        assert set(spills) <= set(MATRIX[target]) | set(everything), target
        assert not {"", "unexplained"} & {reason for _, reason in spills.values()}
        assert all(spilt and set(spilt) <= set(VERSIONS) for spilt, _ in spills.values())


def test_options_are_those_of_the_launcher():
    spec = EVERYWHERE["causal-bf16-d64-forward"]
    schedule = choose(spec, known_target("sm_90"))
    options = launch_options(emit(spec, schedule))
    assert options["num_warps"] == schedule.num_warps
    assert options["num_stages"] == schedule.num_stages


def test_problems_are_named():
    fits = Resources(
        target="gfx942", registers=100, shared=65536, stack=0, matrix="mfma", matrix_count=1
    )
    assert fits.problems() == ()
    too_much = Resources(
        target="gfx942", registers=100, shared=65537, stack=8, matrix="mfma", matrix_count=1
    )
    assert too_much.problems() == ("stack", "shared")


def test_pooling_by_products_is_fused_where_that_was_measured():
    spec = families.base("bf16", 128, chunk_rule="tangent", parameters=1).of_kind("dkv")
    fused = {target for target in TARGETS if fuses_pooling(spec, known_target(target))}
    assert fused == {"sm_90"}
    wider = families.base("bf16", 256, chunk_rule="tangent", parameters=1).of_kind("dkv")
    assert not fuses_pooling(wider, known_target("sm_90"))
