"""The ops over a cache of codes: their schemas, their room, and that nothing waits for a device."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from flasheva_compile.lowering.schedule_cost import Target

from flasheva_compile import vecinfer_ops
from flasheva_compile.errors import ConfigError
from flasheva_compile.quantization.attention import append_and_attend
from flasheva_compile.quantization.formats import (
    CodeFormat,
    KvFormat,
    KvStorage,
    WordFormat,
    WordKvFormat,
)
from flasheva_compile.quantization.fp8 import Fp8Codec
from flasheva_compile.quantization.state import append, new_state
from flasheva_compile.quantization.transform_coding import LayerTransforms, TransformCodec
from flasheva_compile.quantization.vecinfer import LayerCodebooks, VqCodec


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


STORAGE = KvStorage(format="fp8", sink_tokens=2, exact_tokens=3, block_tokens=4)


def random_books(size=16, heads=2):
    def normal(stream, *shape):
        return torch.randn(shape, generator=seeded(stream))

    return LayerCodebooks(
        scale=normal(1, heads, size).abs() + 0.5,
        keys=normal(2, 1, 16, 4),
        values=normal(3, heads, 16, 4),
        order=normal(4, heads, size).argsort(),
        offset=normal(5, heads, size),
    )


def random_transforms(size=16, heads=2):
    def normal(stream, *shape):
        return torch.randn(shape, generator=seeded(stream))

    fields = {"key_widths": (5, 4, 4, 3), "value_widths": (5, 3, 2, 2, 2, 1, 1, 0)}
    return LayerTransforms(
        key_scale=normal(1, heads, size).abs() + 0.5,
        key_rotation=torch.linalg.qr(normal(2, heads, size, size)).Q,
        key_offset=normal(3, heads, size),
        key_step=normal(4, heads, size).abs() + 0.1,
        value_order=normal(5, heads, size).argsort(),
        value_offset=normal(6, heads, size),
        value_step=normal(7, heads, size).abs() + 0.1,
        **{name: torch.tensor([widths] * heads) for name, widths in fields.items()},
    )


def codec_of(kind, size=16):
    if kind == "tc":
        form = WordKvFormat(WordFormat(4), WordFormat(8))
        return TransformCodec(random_transforms(size), form, size, size)
    form = KvFormat(CodeFormat(4, 4), CodeFormat(4, 4))
    return Fp8Codec(size, size) if kind == "fp8" else VqCodec(random_books(size), form, size, size)


def new_tokens(count, size=16, heads=2):
    shape = (2, heads, count, size)
    k, v = (torch.randn(shape, generator=seeded(stream)) for stream in (6, 7))
    q = torch.randn(2, 2 * heads, count, size, generator=seeded(8))
    return q, k, v


@pytest.mark.parametrize("kind", ["vq", "fp8", "tc"])
@pytest.mark.parametrize("op", ["vecinfer_append", "vecinfer_decode"])
@pytest.mark.parametrize("masked", [False, True])
def test_ops_pass_opcheck(kind, op, masked):
    codec, (q, k, v) = codec_of(kind), new_tokens(3)
    mask = torch.rand(2, 3, generator=seeded()) < 0.5 if masked else None
    state = new_state(k, v, codec, STORAGE, 20)
    books = vecinfer_ops.op_books(codec, torch.float32)
    tensors = (k, v) if op == "vecinfer_append" else (q, k, v)
    options = vecinfer_ops.vecinfer_options(codec, STORAGE, 0.3)
    torch.library.opcheck(getattr(torch.ops.flasheva, op), (*tensors, mask, books, *state), options)


@pytest.mark.parametrize("kind", ["vq", "fp8", "tc"])
@pytest.mark.parametrize("count", [1, 5])
def test_on_a_device_nothing_waits(kind, count):
    """Tensors without numbers: what asks for one, or for a shape that depends on one, raises."""
    codec, tensors = codec_of(kind), [x.to("meta") for x in new_tokens(count)]
    if isinstance(codec, TransformCodec):
        codec = TransformCodec(codec.transforms.to("meta"), codec.form, 16, 16)
    if isinstance(codec, VqCodec):
        codec = VqCodec(codec.codebooks.to("meta"), codec.form, 16, 16)
        rotation = torch.empty(2, 16, 16, device="meta")
        codec._rotations[torch.float32] = rotation  # made at the first call, on the host
    state = new_state(*tensors[1:], codec, STORAGE, 20)
    valid = torch.ones(2, count, dtype=torch.bool, device="meta")
    with pytest.raises(RuntimeError):
        bool(valid.any())
    out, lse = append_and_attend(tuple(tensors), valid, state, codec, STORAGE, 0.3, 0.0)
    assert out.shape == tensors[0].shape
    assert lse.shape == out.shape[:3]


GIVEN = {
    "a token of codes": ("vq", 16, 1),
    "many of codes": ("vq", 16, 17),
    "a token of words": ("tc", 16, 1),
    "many of words": ("tc", 16, 17),
    "a token of fp8": ("fp8", 20, 1),
    "several of fp8": ("fp8", 16, 16),
    "many of fp8": ("fp8", 16, 17),
    "no words of fp8": ("fp8", 6, 1),  # it is read four bytes at a time
}


@pytest.mark.parametrize(("kind", "size", "count"), GIVEN.values(), ids=GIVEN)
def test_on_a_gpu_few_tokens_are_three_launches(kind, size, count, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from tests.stand_in_device import stand_in_device

    monkeypatch.setenv("FLASHEVA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(vecinfer_ops, "runs_kernels", lambda *_: True)
    monkeypatch.setattr(vecinfer_ops, "_known", {})
    code = mock.Mock(side_effect=append_and_attend)
    monkeypatch.setattr(vecinfer_ops, "append_and_attend", code)
    codec, tensors = codec_of(kind, size), new_tokens(count, size)
    state, covered = new_state(*tensors[1:], codec, STORAGE, 40), count <= 16 and size % 4 == 0
    books = vecinfer_ops.op_books(codec, torch.float32)
    options = vecinfer_ops.vecinfer_options(codec, STORAGE, 0.3)
    with stand_in_device() as launches:
        out, lse = torch.ops.flasheva.vecinfer_decode(*tensors, None, books, *state, **options)
    expected = ["vecinfer_append", "vecinfer_decode", "vecinfer_combine"] if covered else []
    assert [name for name, *_ in launches] == expected
    assert code.called != covered
    assert (out.shape, lse.shape) == (tensors[0].shape, tensors[0].shape[:3])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942", "gfx950", "gfx90a", "gfx1100"])
def test_digits_are_multiplied_where_subnormal_numbers_are(arch, monkeypatch):
    """Matrix products of MI200 (gfx90a) take them for zeros: all keys and values would be alike."""
    launch = vecinfer_ops.launch_vecinfer
    monkeypatch.setattr(launch, "current_target", lambda: Target(arch=arch, shared_limit=65536))
    q, _, v = new_tokens(1)
    forms = codec_of("tc").form, codec_of("vq").form
    covered = [launch.covers(q, v, form) for form in forms]
    assert covered == [arch not in ("gfx90a", "gfx1100"), True]


@pytest.mark.parametrize("room", [0, 3, 18, 19, 40])
def test_tokens_are_stored_or_refused_whatever_the_room(room):
    """Against room for many: in one call, with padding that may not write anywhere."""
    codec, (_, k, v) = codec_of("vq"), new_tokens(30)
    valid = torch.zeros(2, 30, dtype=torch.bool)
    valid[0, 5:25] = True  # 20 tokens: 2 sinks, 18 codes
    valid[1, ::3] = True
    small, large = (new_state(k, v, codec, STORAGE, n) for n in (room, 100))
    append(large, codec, STORAGE, (k, v), valid)
    if room < 18:
        with pytest.raises(ConfigError, match=f"20 tokens in a cache of {2 + room}"):
            append(small, codec, STORAGE, (k, v), valid)
        assert not any(x.any() for x in small), "nothing is changed before an error"
        return
    append(small, codec, STORAGE, (k, v), valid)
    for got, want in zip(small, large, strict=True):
        coded = got.dtype == torch.uint8
        assert torch.equal(got, want[:, :, :room] if coded else want)
        assert not coded or not want[:, :, room:].any()
