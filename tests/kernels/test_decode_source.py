"""Generated text of the kernels of generation: the demands of ``test_source.py``, and its own."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from flasheva_compile.kernels.blocked.geometry import AttentionSettings
from flasheva_compile.lowering import inspect, launch_decode, schedule
from flasheva_compile.lowering.emit.module import emit
from flasheva_compile.lowering.schedule_cost import candidates, rejection
from flasheva_compile.lowering.spec import KernelSpec, digest

from tests.kernels import test_source

RULES = (
    *(("mean", 0), ("tangent", 1), ("evabyte", 0), ("evabyte", 2), ("evabyte", 3)),
    *(("eva", 0), ("eva", 8)),
)
EVA = {"chunk_rule": "eva", "parameters": 8}
SIZES = ((16, 16), (40, 40), (64, 64), (72, 96), (128, 128), (192, 128), (256, 256))
DIGEST = """
from flasheva_compile.lowering.spec import digest
from tests.kernels.test_decode_source import generated
print(digest("".join(kernel.source for kernel in generated().values())))
"""


def spec_of(dtype="bf16", head_dim=64, value_dim=None, **changes) -> KernelSpec:
    fields = {"chunk_size": 16, "window_size": 256, "sink_size": 16, "group": 4}
    return KernelSpec(
        kind="decode",
        dtype=dtype,
        head_dim=head_dim,
        value_dim=value_dim or head_dim,
        **{**fields, "chunk_rule": "tangent", "parameters": 1, **changes},
    )


def whole_spec(*sizes, **changes) -> KernelSpec:
    """Return the spec of a cache of every token."""
    return launch_decode.whole(spec_of(*sizes, sink_size=0, window="block", **changes))


def specs() -> dict[str, KernelSpec]:
    found = {}
    for dtype, (d, e) in itertools.product(("bf16", "fp16", "fp32"), SIZES):
        found[f"{dtype}-{d}-{e}"] = spec_of(dtype, d, e)
        combine = found[f"{dtype}-{d}-{e}"].of_kind("decode_combine")
        found[f"combine-{dtype}-{e}"] = combine
    for (rule, count), window, sinks, mask in itertools.product(
        RULES, ("sliding", "block"), (0, 16), (False, True)
    ):
        fields = {"window": window, "sink_size": sinks, "key_mask": mask}
        name = f"{rule}{count}-{window}-sinks{sinks}-mask{mask}"
        found[name] = spec_of(chunk_rule=rule, parameters=count, **fields)
    for chunk_size, group in itertools.product((1, 3, 64), (1, 3, 16, 40)):
        sizes = {"chunk_size": chunk_size, "window_size": 192, "sink_size": 0}
        found[f"c{chunk_size}-g{group}"] = spec_of(group=group, softcap=True, **sizes)
    for (d, e), dtype in itertools.product(SIZES, ("bf16", "fp32")):
        found[f"eva-{dtype}-{d}-{e}"] = spec_of(dtype, d, e, **EVA)
    for dtype, rule in itertools.product(("bf16", "fp16", "fp32"), RULES[1::5]):
        rule = dict(zip(("chunk_rule", "parameters"), rule, strict=True))
        found[f"fp8-{dtype}-{rule['chunk_rule']}"] = spec_of(dtype, 72, 96, **rule, fp8_chunks=True)
    for window, (rule, count) in itertools.product(("sliding", "block"), RULES[::6]):
        fields = {"window": window, "chunk_rule": rule, "parameters": count, "key_mask": True}
        found[f"alibi-{window}-{rule}"] = spec_of(**fields, alibi=True)
    found["alibi-whole"] = whole_spec(alibi=True, group=3)
    for (d, e), mask in itertools.product(SIZES, (False, True)):
        found[f"whole-{d}-{e}-mask{mask}"] = whole_spec("bf16", d, e, key_mask=mask)
    return found


def generated():
    return {name: emit(spec, schedule.choose(spec)) for name, spec in specs().items()}


@pytest.fixture(scope="module", name="kernels")
def _kernels():
    return generated()


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


def test_text_does_not_depend_on_the_process(kernels):
    other = subprocess.run(
        [sys.executable, "-c", DIGEST],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == digest("".join(kernel.source for kernel in kernels.values()))


def test_a_switched_off_feature_leaves_no_trace(kernels):
    plain = kernels["mean0-sliding-sinks0-maskFalse"].source
    words = ("key_mask_ptr", "is_valid", "phi", "square", "softcap", "m_k", "oldest = tl", "slope")
    for word in (*words, "query_position", "chunk_mean"):
        assert word not in plain, word
    assert "atomic" not in plain
    assert "softcap" in kernels["c3-g3"].source


def step_of(rows=8, tokens=65536, chunks=0, **changes):
    """Return shape and settings of a step over a cache of every token."""
    c = {"window_size": tokens, "chunk_size": tokens, "sink_tokens": 0, "window": "block"}
    settings = AttentionSettings(
        **{**c, **changes}, causal=True, q_offset=0, scale=0.125, softcap=0.0
    )
    q, v = torch.Size((rows // 8, 32, 1, 64)), torch.Size((rows // 8, 8, 1, 64))
    made_of = (torch.bfloat16, torch.device("cpu"), "mean", 0, False)
    return launch_decode.StepShape(q, v, chunks, *made_of), settings


def test_a_cache_of_every_token_has_one_kernel_without_chunk_tokens():
    spec = launch_decode.decode_spec(*step_of())
    assert spec == launch_decode.decode_spec(*step_of(tokens=100, chunk_size=10))
    source = emit(spec, schedule.choose(spec)).source
    for word in ("rfa", "chunks", "low ", "low,", "last", "bias", "65536"):
        assert word not in source, word
    for changes in ({"chunks": 1}, {"window": "sliding"}, {"sink_tokens": 65536}):
        other = launch_decode.decode_spec(*step_of(**changes))
        assert (other.window, other.window_size) != ("whole", 0)


@pytest.mark.parametrize("room", [1024, 65536, 131072])
@pytest.mark.parametrize("rows", [1, 8, 24, 64, 133, 144, 256, 272, 512, 800])
@pytest.mark.parametrize("held", [(2,), (3, 4)])
def test_parts_keep_a_device_busy_to_the_end(rows, room, held):
    """Of 132 multiprocessors with so many programs each, while parts stay long."""
    spec = whole_spec()
    tiles = schedule.choose(spec, schedule.known_target("sm_90"))
    parts = launch_decode.parts_of(tiles, rows, 0, room, held)
    most = room // tiles.block_n
    assert 1 <= parts <= min(most, 128)
    waves = [rows * parts / (programs * 132) for programs in held]
    if room >= 65536 and rows >= 24:
        assert max(n / math.ceil(n) for n in waves) >= 0.9
        # What parts leave behind is little beside what they read.
        left, read = parts * 4 * (64 + 2) * 4, room * 64 * 2 * 2
        assert left < read / 200
    elif rows * most <= held[0] * 132:
        assert parts == most  # a tile each
    else:
        assert parts == 1 or waves[-1] <= 1


def test_narrow_heads_get_three_programs_a_multiprocessor():
    """Of 16 bits, whose chunk tokens are no bytes; others have no registers for them."""
    held = launch_decode._held
    assert held(spec_of()) == held(spec_of("fp16", 40)) == (3, 4)
    for spec in (spec_of("fp32"), spec_of(head_dim=128), spec_of(fp8_chunks=True)):
        assert held(spec) == (2,)
    shape, s = step_of(64)
    programs = launch_decode._plan(shape, s).programs
    assert 2 * 132 < programs <= 3 * 132


def test_parts_are_no_more_than_their_longest_one_asks_for():
    """Parts that do not shorten the longest one have to be added up, and nothing else."""
    tiles = schedule.choose(spec_of(), schedule.known_target("sm_90"))
    for rows, room in itertools.product((8, 16, 32), (10240, 65536, 131072)):
        chunks, slots = room // 16, 288
        parts = launch_decode.parts_of(tiles, rows, chunks, slots, (3, 4))
        read = -(-chunks // tiles.block_n) - (-slots // tiles.block_n)
        assert -(-read // parts) < -(-read // (parts - 1))


def test_steps_of_many_rows_launch_one_kernel_behind_the_other(monkeypatch):
    """There programs that wait for the end of others take time from them (measured)."""
    seen = {}

    def load(spec, chosen):
        seen[spec.kind] = chosen.dependent
        return SimpleNamespace(launch=None, generated=SimpleNamespace(arguments=()))

    monkeypatch.setattr(launch_decode, "load", load)
    for rows, early in ((8, True), (64, True), (72, False)):
        launch_decode._plan.cache_clear()
        launch_decode._plan(*step_of(rows))
        assert seen["decode_combine"] == early
    launch_decode._plan.cache_clear()


def test_one_kernel_combines_for_all_layers_with_the_same_values():
    one = spec_of().of_kind("decode_combine")
    other = spec_of(head_dim=128, value_dim=64, chunk_size=8, window="block", key_mask=True)
    assert other.of_kind("decode_combine") == one
    assert emit(one, schedule.choose(one)).arguments == (
        *("out_ptr", "lse_ptr", "length_ptr", "partial_ptr", "splits"),
    )


def test_what_decode_ignores_is_dropped_from_its_spec():
    full = KernelSpec(
        **{name: getattr(spec_of(), name) for name in ("dtype", "head_dim", "value_dim")},
        kind="forward",
        chunk_size=16,
        documents="padded",
        dropout=True,
        tf32=True,
        whole_chunks=True,
    )
    plain = KernelSpec(kind="decode", dtype="bf16", head_dim=64, value_dim=64, chunk_size=16)
    assert full.of_kind("decode") == plain


# --- schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_choices_pass_the_static_rules(arch):
    target = schedule.known_target(arch)
    for spec in specs().values():
        chosen = schedule.choose(spec, target)
        assert rejection(spec, chosen, target) is None, (spec, chosen)
        assert chosen in candidates(spec, target) or schedule.shipped(spec, target)


def test_the_shipped_table_has_every_head_size():
    for kinds in schedule.shipped_decode_table().values():
        assert set(kinds) == {"decode", "decode_combine"}
        for dtypes in kinds.values():
            assert set(dtypes) == {"16-bit", "fp32"}
            assert all(set(sizes) == {"64", "128", "256"} for sizes in dtypes.values())


def test_tensor_descriptors_are_refused_with_a_reason():
    spec, target = spec_of(), schedule.known_target("sm_90")
    chosen = schedule.choose(spec, target)
    tried = type(chosen)(block_m=16, block_n=64, num_warps=4, num_stages=2, tma=True)
    assert "through pointers" in (rejection(spec, tried, target) or "")


def test_inspect_prints_the_kernel(capsys, tmp_path, monkeypatch):
    for name in ("FLASHEVA_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    command = "--kind decode --group 4 --chunk-rule tangent --parameters 1 --sink-size 16"
    assert inspect.main(command.split()) == 0
    text = capsys.readouterr().out
    assert "def decode(" in text
    assert ", no spills, " in text.splitlines()[-1]
