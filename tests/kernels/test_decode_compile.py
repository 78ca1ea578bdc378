"""Kernels of generation with default schedules compile for every target, within its limits.

``FLASHEVA_COMPILE=full`` compiles all of ``test_decode_source.py`` for all targets.
"""

from __future__ import annotations

import os
import re

import pytest
from flasheva_compile.lowering.emit.module import emit
from flasheva_compile.lowering.offline import TARGETS, compile_for, resources
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
    "fp8-bf16-d128": spec_of(head_dim=128, **_EVABYTE, fp8_chunks=True),
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
    "fp8-eva-fp16-d80": spec_of("fp16", 80, group=12, **EVA, fp8_chunks=True),
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


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("kind", ["decode", "extend"])
def test_fp8_is_converted_by_instructions_where_there_are_any(target, kind):
    of_kind = spec_of(head_dim=128, fp8_chunks=True).of_kind(kind)
    chosen = choose(of_kind, known_target(target))
    assert chosen.e4m3 == (target in ("sm_89", "sm_90", "sm_100"))
    source = emit(of_kind, chosen).source
    assert ("e4m3x2" in source) == ("float8e4nv" in source) == chosen.e4m3
    plain = choose(spec_of(head_dim=128).of_kind(kind), known_target(target))
    assert not plain.e4m3


def test_a_number_costs_half_an_instruction_and_no_byte_is_loaded_alone():
    """The loop over chunk tokens of fp8 is as lean as the other one."""
    found = {}
    for fp8 in (False, True):
        spec = spec_of(head_dim=128, fp8_chunks=fp8)
        chosen = choose(spec, known_target("sm_90"))
        text = _first_loop(compile_for(emit(spec, chosen), "sm_90").asm["ptx"])
        found[fp8] = len(text) / chosen.block_n
        if fp8:
            count = {name: sum(name in line for line in text) for name in _TELLING}
            elements = 2 * 128 * chosen.block_n // (32 * chosen.num_warps)  # of a thread
            wanted = (elements // 2, elements // 16, 0, 0)
            assert count == dict(zip(_TELLING, wanted, strict=True))
    assert found[True] < 1.5 * found[False]


_TELLING = ("cvt.rn.f16x2.e4m3x2", "cp.async.cg", "ld.shared.b8", "ld.shared.u8")


def _first_loop(ptx: str) -> list[str]:
    """Return the instructions of the first loop, which a branch to what is before closes."""
    lines = [line.strip() for line in ptx.splitlines()]
    labels = {line.split(":")[0]: at for at, line in enumerate(lines) if line.startswith("$L__BB")}
    for at, line in enumerate(lines):
        target = re.search(r"bra(?:\.uni)?\s+(\$L__BB\w+);", line)
        if target and labels.get(target[1], at) < at:
            text = "\n".join(x for x in lines[labels[target[1]] : at] if not x.startswith("//"))
            pieces = (x.strip(" \t\n{}") for x in text.split(";"))
            return [x for x in pieces if x and not x.startswith(".reg")]
    raise AssertionError("no loop")


_MEMORY = re.compile(r"\b(ld|st|atom|red|cp\.async)\b[.\w]*\.global|cp\.async")


@pytest.mark.parametrize("kind", ["decode_combine", "extend_append", "extend_combine"])
def test_what_follows_waits_before_it_touches_memory(kind):
    """A kernel that is launched early and reads early computes from what is not there yet."""
    spec = spec_of().of_kind(kind)
    generated = emit(spec, choose(spec, known_target("sm_90")))
    assert "launch_pdl=True" in generated.source
    text = compile_for(generated, "sm_90").asm["ptx"]
    assert text.count("griddepcontrol.wait") == 1
    assert text.index("griddepcontrol.wait") < _MEMORY.search(text).start()


def test_only_what_waits_is_launched_early():
    for target in ("sm_80", "sm_90", "gfx942"):
        for kind in ("decode", "decode_combine", "extend", "extend_append", "extend_combine"):
            spec = spec_of().of_kind(kind)
            source = emit(spec, choose(spec, known_target(target))).source
            assert ("launch_pdl" in source) == ("gdc_wait()" in source), (target, kind)
            assert ("gdc" in source) == (target == "sm_90"), (target, kind)
