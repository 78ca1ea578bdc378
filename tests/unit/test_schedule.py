"""Choice of schedules: the shipped table, static rules, ranking, and what comes before what."""

import dataclasses
import json
from typing import get_args

import pytest
import torch
from flasheva_compile.lowering import launch, schedule, schedule_cost
from flasheva_compile.lowering.launch import chunk_splits
from flasheva_compile.lowering.schedule import (
    Target,
    choose,
    choose_alike,
    known_target,
    shipped,
    shipped_table,
    specialised,
)
from flasheva_compile.lowering.schedule_cost import candidates, rejection, shared_bytes
from flasheva_compile.lowering.spec import STATE_BLOCK, KernelKind, KernelSpec, Schedule

KINDS = get_args(KernelKind)
H100, A100, MI300 = (known_target(arch) for arch in ("sm_90", "sm_80", "gfx942"))
TILE = Schedule(block_m=64, block_n=64, num_warps=4, num_stages=2)


def untuned(spec: KernelSpec, target: Target) -> Schedule | None:
    return specialised(spec, target) or shipped(spec, target)


def spec_of(kind="forward", dtype="bf16", head_dim=64, value_dim=None, **changes):
    shape = {"chunk_size": 16, "window_size": 256, "sink_size": 16}
    spec = KernelSpec(
        kind="forward",
        dtype=dtype,
        head_dim=head_dim,
        value_dim=value_dim or head_dim,
        **{**shape, **changes},
    )
    return spec.of_kind(kind)


def tile(**changes):
    return dataclasses.replace(TILE, **changes)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHEVA_CACHE_DIR", str(tmp_path))
    schedule.forget()
    yield
    schedule.forget()


def keep_tuned(spec, chosen, target):
    path = schedule.tuned_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = dataclasses.asdict(chosen) if isinstance(chosen, Schedule) else chosen
    path.write_text(json.dumps({target.device: {schedule.spec_key(spec): fields}}))
    schedule.forget()


# --- the shipped table ----------------------------------------------------------------------------

ENTRIES = [
    (family, kind, dtype, int(size), entry)
    for family, kinds in shipped_table().items()
    for kind, dtypes in kinds.items()
    for dtype, sizes in dtypes.items()
    for size, entry in sizes.items()
]


def test_the_table_has_every_kernel_and_head_size():
    assert set(shipped_table()) == {"sm_80", "sm_90"}
    for kinds in shipped_table().values():
        assert set(kinds) == set(KINDS) - {"bias_columns"}
        for dtypes in kinds.values():
            assert {"16-bit", "fp32"} <= set(dtypes)
            assert all(set(sizes) == {"64", "128", "256"} for sizes in dtypes.values())


@pytest.mark.parametrize(("family", "kind", "dtype", "size", "entry"), ENTRIES)
def test_every_entry_passes_the_static_rules(family, kind, dtype, size, entry):
    target, tf32 = known_target(family), dtype == "tf32"
    for head_dim in (size, size // 2 + 16):
        spec = spec_of(kind, "bf16" if dtype == "16-bit" else "fp32", head_dim, sink_size=128)
        spec = dataclasses.replace(spec, tf32=tf32)
        assert rejection(spec, entry, target) is None


@pytest.mark.parametrize("layout", [{}, {"documents": "padded", "key_mask": True}])
def test_measured_choices_on_an_h100(layout):
    plain = tile(tma=True, split_window=True)
    assert choose_alike(spec_of("forward", whole_chunks=True, **layout), H100) == plain
    assert choose_alike(spec_of("forward", softcap=True, **layout), H100) == plain
    with_biases = dataclasses.replace(plain, product_bias=True)
    assert choose_alike(spec_of("forward", **layout), H100) == with_biases
    assert choose_alike(spec_of("forward", head_dim=128, **layout), H100) == tile(
        num_stages=3, tma=True
    )
    most = 0 if layout else 168  # without spills only where rows are dense
    with_biases = tile(num_stages=3, tma=True, product_bias=True, max_registers=most)
    assert choose_alike(spec_of("dq", **layout), H100) == with_biases
    chunk = tile(block_m=32, num_stages=3, tma=True)
    assert choose_alike(spec_of("dchunk", head_dim=80, **layout), H100) == chunk


def test_few_sinks_make_a_small_tile():
    assert choose(spec_of("dsink", sink_size=16), H100).block_n == 16
    assert choose(spec_of("dsink", sink_size=48), H100).block_n == 64


def test_pooling_with_softmaxes_gets_more_threads_for_a_chunk():
    def tiles(**fields):
        chosen = choose(spec_of("chunk_tokens", **fields), H100)
        return chosen.block_n, chosen.num_warps

    found = {rule: tiles(chunk_rule=rule) for rule in ("mean", "tangent", "evabyte", "eva")}
    assert found == {"mean": (32, 4), "tangent": (8, 2), "evabyte": (32, 8), "eva": (32, 4)}
    # As many numbers a thread in narrower heads; only what was measured.
    assert tiles(chunk_rule="tangent", head_dim=32) == (16, 2)
    assert tiles(chunk_rule="tangent", head_dim=128) == (16, 8)
    assert tiles(chunk_rule="tangent", dtype="fp32") == (32, 8)


def test_tensor_descriptors_are_dropped_where_rows_do_not_allow_them():
    assert choose(spec_of(head_dim=40), H100).tma
    assert choose(spec_of(head_dim=36, value_dim=40), H100) == tile(split_window=True)


# --- precedence -----------------------------------------------------------------------------------


def test_tuned_choices_come_first_and_only_for_their_device_and_spec():
    mine = dataclasses.replace(H100, device="NVIDIA H100")
    spec, tuned = spec_of(), tile(block_m=128, num_stages=4)
    keep_tuned(spec, tuned, mine)
    assert choose(spec, mine) == tuned
    assert choose(spec, H100) == untuned(spec, H100)
    masked = dataclasses.replace(spec, key_mask=True)
    assert choose(masked, mine) == shipped(masked, mine) == shipped(spec, mine)


@pytest.mark.parametrize(
    "broken", [{"block_m": 24, "block_n": 64, "num_warps": 4, "num_stages": 2}, {"tiles": 3}, {}]
)
def test_unusable_tuned_choices_are_passed_over(broken):
    keep_tuned(spec_of(), broken, H100)
    assert choose(spec_of(), H100) == untuned(spec_of(), H100)


@pytest.mark.parametrize("text", ["{", "[]", '{"": 3}'])
def test_a_broken_file_is_reported_and_passed_over(text):
    path = schedule.tuned_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert choose(spec_of(), H100) == untuned(spec_of(), H100)


def test_forced_choices_come_before_all_and_end():
    spec, tried = spec_of(), tile(num_warps=8)
    with schedule.forced({spec: tried}):
        assert choose(spec, H100) == tried
        assert choose(spec_of("dq"), H100) != tried
    assert choose(spec, H100) == untuned(spec, H100)


@pytest.mark.parametrize(("arch", "family"), [("sm_100", "sm_90"), ("sm_89", "sm_80")])
def test_devices_without_a_section_use_that_of_a_relative(arch, family):
    spec, target = spec_of(), known_target(arch)
    relative = choose_alike(spec, known_target(family))
    # Biases in products were measured on sm_90 alone.
    assert choose(spec, target) == dataclasses.replace(relative, product_bias=False)


def test_unknown_devices_fall_back_to_candidates():
    small = Target(arch="sm_90", shared_limit=30000)
    spec = spec_of()
    assert rejection(spec, shipped(spec, small), small)
    assert choose(spec, small) == candidates(spec, small)[0]
    assert shipped(spec, Target(arch="gfx1100", shared_limit=65536)) is None
    assert shipped(spec_of(head_dim=512), H100) is None


def test_choose_never_fails():
    hopeless = Target(arch="sm_75", shared_limit=1024)
    chosen = choose(spec_of(head_dim=256), hopeless)
    assert not candidates(spec_of(head_dim=256), hopeless)
    assert (chosen.block_m, chosen.block_n, chosen.tma) == (16, 16, False)


def test_without_a_device_an_h100_is_meant(monkeypatch):
    schedule._has_device.cache_clear()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert schedule.current_target() == H100
    assert choose(spec_of()) == choose(spec_of(), H100)
    schedule._has_device.cache_clear()


@pytest.mark.parametrize("target", [H100, A100, MI300, known_target("sm_120")])
@pytest.mark.parametrize("kind", KINDS)
def test_choices_are_deterministic_and_fit(kind, target):
    extras = {"softcap": True, "alibi": True, "dropout": True, "documents": "packed", "group": 4}
    for head_dim, dtype in [(64, "bf16"), (80, "fp16"), (128, "bf16"), (256, "bf16"), (64, "fp32")]:
        spec = spec_of(kind, dtype, head_dim, **extras)
        first = choose(spec, target)
        schedule.forget()
        assert choose(spec, target) == first
        assert first.block_m <= STATE_BLOCK
        assert shared_bytes(spec, first, target) <= target.shared_limit
        assert first.num_stages == 1 or not target.is_amd


# --- static rules ---------------------------------------------------------------------------------

REJECTED = [
    ({}, {"block_m": 24}, H100, "block_m=24 is no power of two"),
    ({}, {"block_n": 8}, H100, "block_n=8 is no power of two of at least 16"),
    ({}, {"block_m": 256}, H100, "block_m=256 exceeds the 128 of query states"),
    ({}, {"num_warps": 3}, H100, "num_warps=3"),
    ({}, {"num_stages": 0}, H100, "num_stages=0"),
    ({}, {"num_stages": 2}, MI300, "num_stages=2 is not possible on gfx942"),
    ({}, {"tma": True}, A100, "tma: sm_80 has no tensor descriptors"),
    ({"dtype": "fp32"}, {"tma": True}, H100, "tma: fp32"),
    ({"head_dim": 36}, {"tma": True}, H100, "tma: rows of 16-byte multiples"),
    ({"kind": "chunk_tokens"}, {"tma": True}, H100, "tma: chunk_tokens reads no tiles"),
    ({"kind": "dkv"}, {"split_window": True}, H100, "split_window: dkv walks over no window"),
    ({}, {"block_m": 32}, H100, "block_m=32: wgmma needs 64 rows"),
    ({"kind": "dchunk"}, {"block_n": 32}, H100, "block_n=32: wgmma needs 64 rows"),
    ({"kind": "dkv"}, {"num_warps": 8}, H100, "block_n=64: 8 warps need 64 rows per warpgroup"),
    ({"head_dim": 256}, {"num_stages": 4, "num_warps": 8}, H100, "bytes of shared memory"),
    ({"head_dim": 128}, {"block_m": 128, "block_n": 128}, H100, "registers of accumulators"),
    ({}, {"block_m": 128, "max_registers": 64}, H100, "registers of accumulators"),
]


@pytest.mark.parametrize(("spec", "changes", "target", "reason"), REJECTED)
def test_rejections_say_why(spec, changes, target, reason):
    assert reason in (rejection(spec_of(**spec), tile(**changes), target) or "")


ACCEPTED = [
    ({}, {}, H100),
    ({}, {"block_m": 32}, A100),
    ({"kind": "dsink"}, {"block_n": 16}, H100),
    ({"kind": "dkv"}, {"block_m": 16, "tma": True}, H100),
    ({"head_dim": 256}, {"block_n": 32, "num_warps": 8}, H100),
    ({"dtype": "fp32"}, {"block_m": 32, "block_n": 32, "num_stages": 1, "num_warps": 8}, H100),
    ({}, {"num_stages": 1}, MI300),
]


@pytest.mark.parametrize(("spec", "changes", "target"), ACCEPTED)
def test_good_tiles_are_not_rejected(spec, changes, target):
    assert rejection(spec_of(**spec), tile(**changes), target) is None


MEASURED = [  # bytes of shared memory of compiled kernels, Triton 3.6
    ("sm_90", "dq", "bf16", 256, (64, 32, 8, 2), 131104),
    ("sm_90", "dchunk", "bf16", 256, (32, 64, 8, 2), 131360),
    ("sm_90", "forward", "bf16", 256, (64, 64, 8, 2), 164864),
    ("sm_80", "dkv", "bf16", 128, (64, 64, 8, 2), 74240),
    ("sm_80", "forward", "bf16", 64, (64, 64, 4, 2), 24576),
    ("sm_90", "dq", "fp32", 256, (16, 16, 8, 1), 65536),
    ("sm_80", "dchunk", "bf16", 256, (32, 32, 8, 1), 81920),
]


@pytest.mark.parametrize(("arch", "kind", "dtype", "head_dim", "tiles", "measured"), MEASURED)
def test_the_form_of_shared_memory_bounds_what_was_measured(
    arch, kind, dtype, head_dim, tiles, measured
):
    names = ("block_m", "block_n", "num_warps", "num_stages")
    tried = Schedule(**dict(zip(names, tiles, strict=True)))
    form = shared_bytes(spec_of(kind, dtype, head_dim), tried, known_target(arch))
    assert measured <= form <= 1.8 * measured


# --- ranking --------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [H100, A100, MI300])
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_pass_the_rules_and_are_ranked(kind, target):
    spec = spec_of(kind, head_dim=128)
    found = candidates(spec, target)
    assert found == candidates(spec, target)
    assert len(set(found)) == len(found) > 3
    assert not any(rejection(spec, s, target) for s in found)
    costs = [schedule_cost.cost(spec, s, target) for s in found]
    assert costs == sorted(costs)


@pytest.mark.parametrize("kind", ["forward", "dq", "dchunk", "dkv"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_model_ranks_what_was_measured_to_be_fastest_among_the_first(kind, head_dim):
    """In tiles and warps: the model knows too little to tell depths of the pipeline apart."""
    spec = spec_of(kind, head_dim=head_dim)
    tiles = [(s.block_m, s.block_n, s.num_warps) for s in candidates(spec, H100)]
    best = choose_alike(spec, H100)  # it knows nothing of warps that specialise
    first = list(dict.fromkeys(tiles))[:5]
    assert (best.block_m, best.block_n, best.num_warps) in first


def test_pipelining_and_descriptors_help():
    spec = spec_of(head_dim=128)
    deep, shallow = tile(num_stages=2, tma=True), tile(num_stages=1, tma=True)
    cost = schedule_cost.cost
    assert cost(spec, deep, H100) < cost(spec, shallow, H100)
    assert cost(spec, deep, H100) < cost(spec, tile(num_stages=2), H100)


@pytest.mark.parametrize(("kv_heads", "group"), [(2, 8), (8, 4), (32, 1), (1, 1)])
@pytest.mark.parametrize("length", [1024, 4096, 16384])
def test_partial_sums_take_no_more_than_the_gradient_of_queries(kv_heads, group, length):
    """Splits may not follow the batch, so that what they write grows with it."""
    spec = spec_of("dchunk", head_dim=128, group=group, chunk_size=16)
    chunks = length // 16
    splits = chunk_splits(spec, -(-chunks // 64) * kv_heads)
    bytes_of_sums = splits * chunks * (2 * 128 + 4) * 4
    assert bytes_of_sums <= 1.02 * group * length * 128 * 2
    assert splits > 1 or length * kv_heads > 2**17


def test_splits_do_not_follow_the_batch(monkeypatch):
    """They change the order of sums, and a row alone has the bits that it has in a batch."""
    seen = []
    how = Schedule(block_m=64, block_n=64, num_warps=4, num_stages=2)
    monkeypatch.setattr(launch, "_schedule", lambda *_: how)
    monkeypatch.setattr(launch, "run", lambda _, __, values: seen.append(values["splits"]))
    values = {"chunks": 256, "lse_ptr": torch.zeros(1), "heads": 32}
    for batch in (1, 3, 8):
        launch.chunk_gradients(spec_of("dchunk"), values, 32 * batch)
    assert seen == [4, 4, 4]
