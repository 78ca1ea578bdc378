"""Transform coding: where fields stand in words, what is learned, and what words stand for."""

from __future__ import annotations

import pytest
import torch

from flasheva_compile.quantization.formats import WordFormat, WordKvFormat
from flasheva_compile.quantization.learn import LearningOptions, Readers, learn_layer
from flasheva_compile.quantization.learn_transforms import _allocations, learn_transforms
from flasheva_compile.quantization.transform_coding import (
    LayerTransforms,
    TransformCodec,
    field_positions,
    low_fields,
)

TWO_BITS = WordKvFormat(WordFormat(8), WordFormat(8))
FP64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    return torch.randn(shape, generator=seeded(seed), dtype=FP64)


def learned(keys, values, form=TWO_BITS, weights=None):
    """Learn from ``[T, Hkv, D]`` without a scale."""
    ones = torch.ones_like(keys[0])
    weights = torch.ones_like(keys[..., 0]) if weights is None else weights
    found = learn_transforms(keys, values, ones, weights, (form.key.vector, form.value.vector))
    return TransformCodec(found, form, keys.shape[2], values.shape[2])


def stored(codec, keys, values):
    """Return what is left of ``[T, Hkv, D]`` in words."""
    k, v = (x.transpose(0, 1)[None] for x in (keys, values))
    k = codec.restore_keys(codec.decode_keys(codec.encode_keys(k), FP64))
    v = codec.restore_values(codec.decode_values(codec.encode_values(v), FP64))
    return (x[0].transpose(0, 1) for x in (k, v))


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 8, 16])
def test_fields_fill_a_word_and_each_lies_within_ten_bits(count):
    """Kernels read the lower group where it stands, the upper one six bits lower."""
    low = low_fields(count)
    for widths in _allocations(count):
        positions = field_positions(torch.tensor(widths)).tolist()
        bits = [p + n for p, width in zip(positions, widths, strict=True) for n in range(width)]
        assert sorted(bits) == list(range(16)), widths
        for field, (position, width) in enumerate(zip(positions, widths, strict=True)):
            place = position - (0 if low[field] else 6)
            assert not width or 0 <= place <= 10 - width, (widths, field)


@pytest.mark.parametrize(("count", "number"), [(4, 5), (8, 63), (16, 101)])
def test_bits_are_given_in_every_way_that_falls(count, number):
    """Partitions of 16 into at most ``count`` parts of at most five."""
    ways = _allocations(count)
    assert len(set(ways)) == len(ways) == number
    assert all(sum(way) == 16 and max(way) <= 5 for way in ways)
    assert all(list(way) == sorted(way, reverse=True) for way in ways)


def by_hand(widths):
    """Return transforms of one head whose steps are one and whose axes are the channels."""
    size, one = 16, torch.tensor([widths])
    return LayerTransforms(
        key_scale=torch.ones(1, size),
        key_rotation=torch.eye(size)[None],
        key_offset=torch.zeros(1, size),
        key_step=torch.ones(1, size),
        key_widths=one,
        value_order=torch.arange(size)[None],
        value_offset=torch.zeros(1, size),
        value_step=torch.ones(1, size),
        value_widths=one,
    )


def test_a_word_by_hand():
    """Fields 0, 3, 4, 7 from bit 0: 5, 2, 2, 0 bits; then 1, 2, 5, 6: 3, 2, 1, 1 bits."""
    codec = TransformCodec(by_hand((5, 3, 2, 2, 2, 1, 1, 0)), TWO_BITS, 16, 16)
    digits = torch.tensor([17, 5, 3, 2, 1, 1, 0, 0])
    x = torch.stack([digits, torch.zeros_like(digits)], 1).flatten()  # word 0, word 1
    packed = codec.encode_keys(x.float()[None, None, None])
    word = 17 | 2 << 5 | 1 << 7 | 5 << 9 | 3 << 12 | 1 << 14
    assert packed[0, 0, 0].tolist() == [word & 255, word >> 8, 0, 0]
    assert torch.equal(codec.decode_keys(packed, torch.float32)[0, 0, 0], x.float())


def test_what_lies_outside_takes_the_nearest_digit_and_what_is_no_number_any():
    codec = TransformCodec(by_hand((2,) * 8), TWO_BITS, 16, 16)
    x = torch.full((1, 1, 1, 16), 7.0)
    x[..., :4] = torch.tensor([-torch.inf, torch.inf, torch.nan, -3.0])
    back = codec.decode_values(codec.encode_values(x), torch.float32)[0, 0, 0]
    assert back[:2].tolist() == [0, 3]
    assert 0 <= back[2] <= 3
    assert back[3:].tolist() == [0, *[3] * 12]


# --- learning -------------------------------------------------------------------------------------


def test_numbers_at_equal_steps_are_kept_exactly():
    """Every channel of every head in steps of its own."""
    digits = torch.randint(0, 4, (4000, 2, 16), generator=seeded(), dtype=FP64)
    values = (digits + 0.3) * normal(2, 2, 16)
    _, v = stored(learned(values, values), values, values)
    torch.testing.assert_close(v, values, rtol=0, atol=1e-9)


def test_axes_that_matter_get_more_bits():
    sizes = torch.logspace(0, -2, 16).to(FP64)
    rotation = torch.linalg.qr(normal(3, 16, 16)).Q
    keys = (normal(4, 6000, 1, 16) * sizes) @ rotation
    codec = learned(keys, keys)
    widths = codec.transforms.key_widths[0].tolist()
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]
    k, v = stored(codec, keys, keys)
    assert (k - keys).square().sum() < 0.2 * (v - keys).square().sum()  # values are not rotated


def test_tokens_that_count_more_are_kept_better():
    keys = normal(5, 4000, 1, 16)
    few = torch.arange(4000) % 50 == 0
    keys[few] = keys[few] * 0.1 + 3
    heavy = torch.where(few, 40.0, 0.2).to(FP64)[:, None]
    errors = []
    for weights in (None, heavy):
        k, v = stored(learned(keys, keys, weights=weights), keys, keys)
        errors.append([float((x - keys)[few].square().mean()) for x in (k, v)])
    assert errors[1][0] < 0.5 * errors[0][0]
    assert errors[1][1] < 0.5 * errors[0][1]


def test_channels_that_never_change_cost_nothing():
    keys = normal(6, 500, 1, 16)
    keys[..., 3:] = 2.5
    k, v = stored(learned(keys, keys), keys, keys)
    assert (k - keys).abs().max() < 0.5
    torch.testing.assert_close(v[..., 3:], keys[..., 3:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [1e-6, 1e5])
def test_steps_grow_with_what_they_are_learned_from(size):
    """Also those of no bits, and of channels that do not vary: kernels scale queries by all."""
    keys = normal(9, 500, 2, 16)
    keys[..., 5] = 1.5
    one, other = (learned(keys * n, keys * n).transforms for n in (1, size))
    for name in ("key_step", "value_step"):
        got, want = getattr(other, name), getattr(one, name) * size
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert torch.equal(one.key_widths, other.key_widths)


def test_learning_is_repeatable_and_reads_its_options():
    keys, values = normal(7, 600, 2, 16), normal(8, 600, 2, 16)
    largest = keys.abs().amax(0)
    attention = torch.rand(600, 2, generator=seeded(), dtype=FP64)
    readers = Readers(attention, torch.rand(2, 16, generator=seeded(1), dtype=FP64))

    def learn(**options):
        given = (keys, values, largest, TWO_BITS, LearningOptions(**options), readers)
        return learn_layer(*given).tensors()

    first = learn()
    assert all(torch.equal(first[name], x) for name, x in learn(weigh=0.95).items())
    for options in ({"weigh": 0.0}, {"smooth": "none"}):
        assert not torch.equal(first["key_step"], learn(**options)["key_step"])
    assert (learn(smooth="none")["key_scale"] == 1).all()
