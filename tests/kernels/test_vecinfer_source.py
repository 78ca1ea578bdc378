"""Generated text of the kernels over a cache of codes, their choices of tiles, compiling.

``FLASHEVA_COMPILE=full`` compiles everything for all targets.
"""

from __future__ import annotations

import os
import re

import pytest
from flasheva_compile.lowering import launch_vecinfer, offline, schedule
from flasheva_compile.lowering.emit import vecinfer_codes, vecinfer_fp8_tiles
from flasheva_compile.lowering.emit.module import emit
from flasheva_compile.lowering.offline import TARGETS, resources
from flasheva_compile.lowering.spec_vecinfer import VecInferSpec, code_layout

from flasheva_compile.quantization.formats import FORMATS
from tests.kernels import test_source

FULL = os.environ.get("FLASHEVA_COMPILE") == "full"
KINDS = ("vecinfer_append", "vecinfer_decode", "vecinfer_combine")


def spec_of(kind="vecinfer_decode", dtype="bf16", head_dim=128, value_dim=None, **changes):
    fields = {"sink_size": 16, "group": 4, "key_code": "d4b8", "value_code": "d4b8"}
    fields |= {"new_tokens": 1, "exact_tokens": 128, "block_tokens": 128, "ring": 288}
    whole = VecInferSpec(
        kind="vecinfer_append",
        dtype=dtype,
        head_dim=head_dim,
        value_dim=value_dim or head_dim,
        chunk_size=1,
        **{**fields, **changes},
    )
    return whole.of_kind(kind)


SIZES = {
    **{
        name: {"key_code": str(form.key), "value_code": str(form.value)}
        for name, form in FORMATS.items()
    },
    "fp8": {"key_code": "fp8", "value_code": "fp8", "rotate_keys": False},
    "fp8-d80-masked": {"key_code": "fp8", "value_code": "fp8", "head_dim": 80, "new_tokens": 4}
    | {"key_mask": True, "sink_size": 0, "block_tokens": 7, "softcap": True},
    "fp8-d256": {"key_code": "fp8", "value_code": "fp8", "head_dim": 256},
    "fp8-fp32": {"key_code": "fp8", "value_code": "fp8", "dtype": "fp32", "head_dim": 64},
    **{
        f"{name}-d64": {"key_code": str(FORMATS[name].key), "value_code": str(FORMATS[name].value)}
        | {"head_dim": 64}
        for name in ("tc-2bit", "tc-3bit", "tc-4bit")
    },
    "fp16-d64": {"dtype": "fp16", "head_dim": 64, "group": 1},
    "d80-masked": {"head_dim": 80, "new_tokens": 4, "key_mask": True},
    "d256": {"head_dim": 256},
    "d192-e128": {"head_dim": 192, "value_dim": 128},
    "fp32": {"dtype": "fp32", "head_dim": 64},
    "per-head": {"per_head": True, "softcap": True},
    "odd": {"sink_size": 0, "block_tokens": 7, "rotate_keys": False, "rotate_values": True},
    "many": {"new_tokens": 16, "group": 8, "key_mask": True},
}
SPECS = {f"{kind}-{n}": spec_of(kind, **size) for n, size in SIZES.items() for kind in KINDS}


@pytest.fixture(scope="module", name="kernels")
def _kernels():
    return {name: emit(spec, schedule.choose(spec)) for name, spec in SPECS.items()}


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
    plain, fp8 = (kernels[f"vecinfer_decode-{name}"].source for name in ("vq-2bit", "fp8"))
    for word in ("key_mask_ptr", "softcap", "sees", "key_stride", "key_shift", "visible = is_past"):
        assert word not in plain, word
    assert "exponents" not in plain
    assert not {"book", "coded_q"} & set(re.findall(r"book|coded_q", fp8))
    for text in (plain, fp8):
        assert "inside" not in text.split("else:")[1]  # whole blocks of tokens become codes
    assert not any("atomic" in kernel.source for kernel in kernels.values())


@pytest.mark.parametrize("code", ["d4b8", "d2b8", "d8b12", "d8b8", "d1b4"])
@pytest.mark.parametrize("size", [16, 40, 64, 80, 128, 256])
@pytest.mark.parametrize("warps", [1, 2, 4])
def test_columns_of_a_tile_are_all_channels(code, size, warps):
    layout = code_layout(code, size)
    for text in (layout.channel("n", warps), vecinfer_codes.key_channel(layout, "n")):
        found = [eval(text, {"n": n}) for n in range(layout.padded)]
        assert sorted(found) == list(range(layout.padded))


@pytest.mark.parametrize("size", [4, 20, 32, 64, 80, 128, 256])
@pytest.mark.parametrize("warps", [1, 2, 4])
def test_columns_of_a_tile_of_fp8_are_all_channels(size, warps):
    layout, tiles = code_layout("fp8", size), vecinfer_fp8_tiles
    for text in (tiles.value_channel(layout, "n", warps), tiles.key_channel(layout, "n")):
        found = [eval(text, {"n": n}) for n in range(layout.padded)]
        assert sorted(found) == list(range(layout.padded))


@pytest.mark.parametrize("room", [0, 100, 16384, 200_000])
@pytest.mark.parametrize("rows", [1, 8, 32, 256, 1000, 5000])
def test_parts_keep_the_device_busy(rows, room):
    chosen = schedule.choose(spec_of())
    parts = launch_vecinfer.parts_of(chosen, rows, room)
    assert 1 <= parts <= max(1, room // chosen.block_n)
    if room == 200_000 and rows >= 8:
        slots = 8 * 132
        assert rows * parts / (-(-rows * parts // slots) * slots) > 0.8


# --- compiling ------------------------------------------------------------------------------------

COMBINED = ("vecinfer_combine-vq-2bit", "vecinfer_combine-d256", "vecinfer_combine-odd")
COMPILED = [name for name in SPECS if "combine" not in name or name in COMBINED]
_CHOSEN = ("vecinfer_decode-vq-2bit", "vecinfer_decode-fp8", "vecinfer_append-fp8")
EVERYWHERE = [name for name in COMPILED if FULL or name in _CHOSEN]
MATRIX = {
    "sm_90": [x for x in COMPILED if FULL or "decode" in x or x.endswith(("vq-2bit", "fp8"))],
    **dict.fromkeys(("sm_80", "sm_100", "gfx942"), EVERYWHERE),
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
    spec = SPECS[name]
    used = resources(emit(spec, schedule.choose(spec, schedule.known_target(target))), target)
    assert used.shared <= TARGETS[target].shared_limit
    assert used.stack == 0
    if spec.kind == "vecinfer_decode" and spec.dtype != "fp32":
        assert used.matrix == {"gfx942": "mfma"}.get(target, "mma")


def _loop_over_codes(text):
    """Return the body of the loop that loads most: the other one walks over exact tokens."""
    loops = list(re.finditer(r"(?m)^(\$L__BB\d+_\d+):(.*?)bra\s+\1;", text, re.DOTALL))
    return max((m.group(2) for m in loops), key=lambda loop: loop.count(".f16.f16.f32"))


@pytest.mark.usefixtures("_caches")
@pytest.mark.parametrize("form", ["vq-4bit", "vq-2bit", "vq-1bit"])
def test_codewords_go_straight_to_registers(form):
    """Of what Triton lays out, nothing in the loop over codes goes through shared memory."""
    spec = SPECS[f"vecinfer_decode-{form}"]
    kernel = offline.compile_for(emit(spec, schedule.choose(spec)), "sm_90")
    body = _loop_over_codes(kernel.asm["ptx"])
    assert body.count("mma.sync") > 0
    assert "st.shared" not in body
    assert "stmatrix" not in body


@pytest.mark.usefixtures("_caches")
@pytest.mark.parametrize("form", ["tc-2bit", "tc-4bit", "tc-2bit-d64", "tc-3bit-d64"])
def test_words_go_straight_to_registers(form):
    """No thread loads words for another: neither of keys nor of values."""
    spec = SPECS[f"vecinfer_decode-{form}"]
    kernel = offline.compile_for(emit(spec, schedule.choose(spec)), "sm_90")
    loop = re.findall(r"(?s)scf\.for.*?\n    +} ", kernel.asm["ttgir"])[-1]
    operands = re.findall(r"tt\.dot %\S+ (%\w+),", loop)
    assert len(operands) == 2
    for name in operands:
        made = re.search(rf"{name} = (\S+)", loop)
        assert made
        assert made.group(1) in ("tt.reshape", "ttg.convert_layout"), made.group(0)


@pytest.mark.usefixtures("_caches")
def test_numbers_of_fp8_go_straight_to_registers():
    """Sixteen bytes at a time; shared memory sees the exponents of the tokens alone."""
    spec = SPECS["vecinfer_decode-fp8"]
    chosen = schedule.choose(spec)
    body = _loop_over_codes(offline.compile_for(emit(spec, chosen), "sm_90").asm["ptx"])
    assert body.count("mma.sync") > 0
    assert re.findall(r"st\.shared\S*|stmatrix|shfl\.sync\.idx", body) == ["st.shared.b16"]
    wanted = chosen.block_n * (spec.head_dim + spec.value_dim) // (16 * 32 * chosen.num_warps)
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", body)) == wanted
