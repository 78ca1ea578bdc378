"""Formats, transforms, codebooks and codes of quantised caches, one by one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flasheva_compile.errors import ConfigError
from flasheva_compile.quantization.codebook import learn_codebook, nearest
from flasheva_compile.quantization.formats import (
    FORMATS,
    CodeFormat,
    KvFormat,
    KvStorage,
    WordFormat,
    kv_format,
)
from flasheva_compile.quantization.learn import LearningOptions, Readers, learn_layer
from flasheva_compile.quantization.packing import pack, unpack
from flasheva_compile.quantization.transform import (
    balancing_scale,
    grouped_rotation,
    hadamard,
    reading_scale,
    smoothing_scale,
)
from flasheva_compile.quantization.vecinfer import VqCodec


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bits"),
    [("vq-4bit", 4), ("vq-2bit", 2), ("vq-1.5bit", 1.5), ("vq-1.25bit", 1.25), ("vq-1bit", 1)],
)
@pytest.mark.parametrize("size", [64, 80, 96, 128])
def test_a_format_stores_the_bits_in_its_name(name, bits, size):
    assert 8 * FORMATS[name].nbytes(size, size) == bits * 2 * size


def test_an_odd_number_of_12_bit_codes_is_padded():
    assert CodeFormat(8, 12).nbytes(24) == 6


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [64, 80, 128])
def test_a_format_of_words_stores_the_bits_in_its_name(bits, size):
    assert 8 * FORMATS[f"tc-{bits}bit"].nbytes(size, size) == bits * 2 * size


def test_every_format_is_tested():
    assert len(FORMATS) == 5 + 3


def test_a_head_that_is_no_multiple_of_two_words_is_refused():
    with pytest.raises(ConfigError, match="40 channels are no multiple of 16"):
        WordFormat(8).codes(40)


def test_words_of_other_numbers_of_channels_are_refused():
    with pytest.raises(ConfigError, match="w3: words have"):
        WordFormat(3)


def test_a_head_that_is_no_multiple_of_the_vector_is_refused():
    with pytest.raises(ConfigError, match="20 channels are no multiple of 8"):
        CodeFormat(8, 8).codes(20)


@pytest.mark.parametrize(("vector", "bits"), [(0, 8), (2, 0), (2, 13)])
def test_a_format_that_cannot_be_stored_is_refused(vector, bits):
    with pytest.raises(ConfigError, match="codes of 1 to 12 bits"):
        CodeFormat(vector, bits)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"format": "vq-3bit"}, "full_layers: 'vq-3bit' is not one of 'fp8', 'vq-4bit'"),
        ({"format": "vq-2bit", "sink_tokens": -1}, "sink_tokens: must be an integer of at least 0"),
        ({"format": "vq-2bit", "exact_tokens": 0}, "exact_tokens: must be an integer of at least"),
        ({"format": "vq-2bit", "block_tokens": True}, "block_tokens: must be an integer"),
        ({"format": "fp8", "lookup": True}, "lookup: fp8 has no codewords"),
        ({"format": "tc-2bit", "lookup": True}, "lookup: tc-2bit has no codewords"),
    ],
)
def test_wrong_storage_is_refused(values, match):
    with pytest.raises(ConfigError, match=match):
        KvStorage(**values)


def test_storage_is_read_from_a_name():
    assert KvStorage.of("fp8") == KvStorage(format="fp8")
    with pytest.raises(ConfigError, match="must be a format's name or a KvStorage, got 2"):
        KvStorage.of(2)


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 13))
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_codes_are_unpacked_as_they_were(bits, count):
    codes = torch.randint(0, 1 << bits, (3, 7, count), generator=seeded(bits))
    codes[0, 0], codes[0, 1] = 0, (1 << bits) - 1
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape[-1] == CodeFormat(2, bits).nbytes(2 * count)
    assert torch.equal(unpack(packed, bits, count), codes)


# --- transforms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 6, 8, 64, 80, 96, 112, 128])
def test_the_rotation_is_orthonormal_and_its_own_inverse(size):
    matrix = hadamard(size)
    rounding = 4 * size * torch.finfo(torch.float64).eps
    assert torch.equal(matrix, matrix.T)
    assert (matrix @ matrix - torch.eye(size)).abs().max() <= rounding


def test_a_power_of_two_mixes_all_channels_and_others_their_parts():
    assert (hadamard(64).abs() == 1 / 8).all()
    assert (hadamard(80) != 0).sum() == 64**2 + 16**2


@pytest.mark.parametrize(("size", "vector"), [(8, 4), (64, 4), (80, 8), (96, 2), (6, 6), (5, 1)])
def test_a_grouped_rotation_is_orthonormal_and_mixes_channels_of_alike_size(size, vector):
    order = torch.randperm(size, generator=seeded())
    rotation = grouped_rotation(order, vector)
    rounding = 4 * size * torch.finfo(torch.float64).eps
    assert (rotation @ rotation.T - torch.eye(size)).abs().max() <= rounding
    codes = size // vector
    for group in range(vector):
        own = rotation[order[group * codes : (group + 1) * codes]]
        assert set(own.abs().sum(0).nonzero()[:, 0].tolist()) == set(range(group, size, vector))


def test_a_balancing_scale_gives_the_smallest_errors_of_scores():
    keys, queries = torch.rand(2, 3, 16, generator=seeded()) + 0.01

    def error(scale):
        return (keys / scale**2).sum(1) * (queries * scale**2).sum(1)

    best = error(balancing_scale(keys, queries))
    torch.testing.assert_close(best, (keys * queries).sqrt().sum(1) ** 2)  # Cauchy-Schwarz
    assert (best < error(smoothing_scale(keys.sqrt()))).all()
    assert (best < error(torch.ones_like(keys))).all()
    zero = torch.zeros(1, 2)
    assert torch.isfinite(1 / balancing_scale(zero, zero)).all()


def test_a_reading_scale_makes_the_squares_of_errors_those_of_scores():
    queries = torch.randn(3, 4096, 16, generator=seeded(), dtype=torch.float64)
    queries *= torch.rand(3, 1, 16, generator=seeded(1), dtype=torch.float64) + 0.1
    error = torch.randn(3, 16, generator=seeded(2), dtype=torch.float64)
    power = queries.square().mean(1)
    of_scores = (power * error.square()).sum(1)  # of queries whose channels are independent
    torch.testing.assert_close((error / reading_scale(power)).square().sum(1), of_scores)
    assert torch.isfinite(reading_scale(torch.zeros(1, 2))).all()


def test_codes_scaled_by_queries_change_scores_least():
    """Channels read alike in size but unlike in weight: codes are to serve what is read."""
    keys = torch.randn(4096, 1, 16, generator=seeded())
    queries = torch.randn(256, 16, generator=seeded(1)) * torch.logspace(-1, 1, 16)
    readers = Readers(torch.zeros(4096, 1), queries.square().mean(0)[None])
    form = kv_format("vq-2bit")

    def error(smooth):
        options = LearningOptions(smooth=smooth, centre=False, weigh=0.0, iterations=8)
        books = learn_layer(keys, keys, keys.abs().amax(0), form, options, readers)
        codec = VqCodec(books, form, 16, 16)
        k = keys.transpose(0, 1)[None]
        coded = codec.restore_keys(codec.decode_keys(codec.encode_keys(k), torch.float32))
        return ((coded - k)[0, 0] @ queries.T).square().mean()

    assert error("queries") < 0.9 * error("balance")


def test_scales_are_roots_and_never_zero():
    assert smoothing_scale(torch.tensor([4.0, 0.0])).tolist() == pytest.approx([2, 1e-4])


# --- codebooks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [5, 256, 4096])
def test_the_nearest_codeword_is_found(entries):
    """More vectors than one block holds, and none."""
    generator = seeded()
    vectors, codebook = (torch.randn(n, 3, generator=generator) for n in (1500, entries))
    index = nearest(vectors.double(), codebook.double())
    distance = (vectors[:, None].double() - codebook.double()).square().sum(-1)
    assert torch.equal(distance.gather(1, index[:, None])[:, 0], distance.amin(1))
    assert nearest(vectors[:0], codebook).shape == (0,)


def test_of_equally_near_codewords_the_first_is_taken():
    codebook = torch.tensor([[9.0], [1], [-1], [1], [-1]]).repeat(60, 1)
    assert nearest(torch.tensor([[0.0], [1], [-1], [9]]), codebook).tolist() == [1, 1, 2, 0]


def test_a_code_depends_on_nothing_but_its_vector():
    vectors, codebook = (torch.randn(n, 8, generator=seeded(n)) for n in (300, 256))
    alone = torch.cat([nearest(x[None], codebook) for x in vectors])
    assert torch.equal(nearest(vectors, codebook), alone)


def learn(vectors, entries, iterations=30, seed=0):
    return learn_codebook(vectors, entries, iterations=iterations, generator=seeded(seed))


def test_few_vectors_are_the_codebook():
    vectors = torch.tensor([[1.0, 2], [3, 4], [1, 2]])
    codebook = learn(vectors, 4)
    assert codebook.shape == (4, 2)
    assert torch.equal(codebook[nearest(vectors, codebook)], vectors)


def test_clusters_are_found():
    centres = torch.tensor([[0.0, 0], [0, 10], [10, 0], [10, 10]])
    noise = torch.randn(4, 100, 2, generator=seeded())
    vectors = (centres[:, None] + 0.1 * noise).flatten(0, 1)
    # Even from codewords of one cluster alone: empty clusters begin again far away.
    codebook = learn(vectors, 8)
    error = (vectors - codebook[nearest(vectors, codebook)]).square().sum(-1)
    assert error.max() < 1


def test_iterations_do_not_make_it_worse():
    vectors = torch.randn(2000, 2, generator=seeded())
    errors = []
    for iterations in (0, 1, 5, 30):
        codebook = learn(vectors, 16, iterations)
        errors.append((vectors - codebook[nearest(vectors, codebook)]).square().mean())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


def test_a_cluster_without_vectors_begins_again_at_the_farthest():
    # From these first codewords the third never gets a vector.
    vectors = torch.cat([torch.zeros(50, 1), torch.ones(50, 1), torch.tensor([[2.0], [100]])])
    for seed in range(8):
        codebook = learn(vectors, 3, seed=seed)
        assert len(set(nearest(vectors, codebook).tolist())) == 3


def test_what_weighs_more_is_nearer_to_a_codeword():
    vectors = torch.randn(2000, 2, generator=seeded())
    right = vectors[:, 0] > 0
    weights = torch.where(right, 50.0, 1.0)
    errors = {}
    for name, given in (("alike", None), ("weighed", weights)):
        codebook = learn_codebook(vectors, 16, iterations=20, generator=seeded(), weights=given)
        distance = (vectors - codebook[nearest(vectors, codebook)]).square().sum(1)
        errors[name] = distance[right].mean(), (distance * weights).mean()
    assert errors["weighed"][0] < 0.8 * errors["alike"][0]
    assert errors["weighed"][1] < errors["alike"][1]


def test_a_weight_is_a_number_of_copies():
    """Of one cluster: the mean of vectors, each as often as it weighs."""
    vectors = torch.tensor([[0.0], [1], [4], [9]])
    weights = torch.tensor([1.0, 2, 3, 4])
    options = {"iterations": 3, "generator": seeded()}
    codebook = learn_codebook(vectors, 1, weights=weights, **options)
    assert float(codebook) == pytest.approx((0 + 2 + 12 + 36) / 10)


def test_the_seed_decides():
    vectors = torch.randn(500, 2, generator=seeded())
    assert torch.equal(learn(vectors, 16), learn(vectors, 16))
    assert not torch.equal(learn(vectors, 16), learn(vectors, 16, seed=1))


# --- layers ---------------------------------------------------------------------------------------

PLAIN = LearningOptions.paper()
SMALL = KvFormat(CodeFormat(2, 6), CodeFormat(4, 5))


def tokens(count=200, heads=2, size=8, seed=0):
    keys, values = torch.randn(2, count, heads, size, generator=seeded(seed))
    return keys * torch.linspace(0.1, 10, size), values


def error(k, v, books, form=SMALL):
    """Return the squared errors of keys and values ``[T, Hkv, D]``."""
    codec = VqCodec(books, form, k.shape[-1], v.shape[-1])
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    k_back = codec.restore_keys(codec.decode_keys(codec.encode_keys(k), torch.float32))
    v_back = codec.restore_values(codec.decode_values(codec.encode_values(v), torch.float32))
    return float((k_back - k).square().mean()), float((v_back - v).square().mean())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_head": True},
        {"rotate_values": True},
        {"smooth": "largest"},
        {"smooth": "none"},
        {"rotate": "hadamard"},
        {"rotate": "none"},
        {"smooth": "none", "rotate": "none"},
        {"centre": False},
        {"weigh": 0},
    ],
)
def test_learned_codebooks_keep_most_of_a_layer(options):
    k, v = tokens()
    options = LearningOptions(**options)
    books = learn_layer(k, v, k.abs().amax(0), SMALL, options)
    assert books.keys.shape == (2 if options.per_head else 1, 64, 2)
    assert books.values.shape == (2 if options.per_head else 1, 32, 4)
    key_error, value_error = error(k, v, books)
    assert key_error < 0.3 * k.square().mean()
    assert value_error < 0.5 * v.square().mean()
    again = learn_layer(k, v, k.abs().amax(0), SMALL, options)
    assert torch.equal(books.keys, again.keys)


def test_a_codebook_per_head_is_read_by_its_head():
    k, v = tokens(count=64, heads=2)
    k[:, 1] += 50  # what one head's codewords cannot say
    books = learn_layer(k, v, k.abs().amax(0), SMALL, dataclasses.replace(PLAIN, per_head=True))
    swapped = dataclasses.replace(books, keys=books.keys.flip(0))
    assert error(k, v, books)[0] < 0.1 * error(k, v, swapped)[0]


def test_the_default_reads_scores_better_than_the_paper():
    """Where it should: a mean, channels of different sizes, few tokens that get all attention."""
    generator = seeded()
    k, v = tokens(count=600, size=16)
    k = k * torch.linspace(0.2, 3, 16) + 4
    read = torch.rand(600, 2, generator=generator) < 0.1
    k, v = k.where(~read[..., None], 2 * k), v.where(~read[..., None], 0.3 * v)
    queries = torch.linspace(3, 0.2, 16).square().expand(2, -1)
    readers = Readers(read.float(), queries)
    errors = {}
    for name, options in (("ours", LearningOptions()), ("paper", LearningOptions.paper())):
        books = learn_layer(k, v, k.abs().amax(0), SMALL, options, readers)
        codec = VqCodec(books, SMALL, 16, 16)
        stored = codec.restore_keys(
            codec.decode_keys(codec.encode_keys(k.transpose(0, 1)[None]), torch.float32)
        )
        wrong = (stored[0].transpose(0, 1) - k).square() * queries
        errors[name] = float(wrong.sum(-1)[read].mean())
    assert errors["ours"] < 0.5 * errors["paper"]


def test_what_is_not_finite_is_refused():
    k, v = tokens()
    v[3, 1, 2] = torch.nan
    with pytest.raises(ConfigError, match="keys, values or queries are not finite"):
        learn_layer(k, v, k.abs().amax(0), SMALL, LearningOptions())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"smooth": "max"}, 'smooth: must be one of "queries", "balance", "largest", "none"'),
        ({"rotate": True}, 'rotate: must be one of "grouped", "hadamard", "none", got True'),
        ({"weigh": 1}, "weigh: must be at least 0 and below 1, got 1"),
        ({"vectors": 0}, "vectors: must be an integer of at least 1, got 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        LearningOptions(**options)


@pytest.mark.parametrize("name", ["iterations", "seed"])
def test_wrong_learning_options_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name}: must be an integer of at least 0, got -1"):
        LearningOptions(**{name: -1})
