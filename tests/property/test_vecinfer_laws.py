"""Laws of quantised caches: what must hold for every shape, mask, format and way to call."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flasheva_compile.quantization import attention
from flasheva_compile.quantization.coding import codec_of
from flasheva_compile.quantization.formats import (
    CodeFormat,
    KvFormat,
    KvStorage,
    WordFormat,
    WordKvFormat,
)
from flasheva_compile.quantization.fp8 import Fp8Codec
from flasheva_compile.quantization.learn import LearningOptions, Readers, learn_layer
from flasheva_compile.quantization.state import append, coded_until, crop, new_state
from tests.tolerance import assert_as_accurate_as_pytorch

FP64 = torch.float64
laws = settings(deadline=None, derandomize=True, max_examples=60, database=None)
many = settings(deadline=None, derandomize=True, max_examples=200, database=None)
COARSE = KvFormat(CodeFormat(2, 3), CodeFormat(1, 2))
PACKED = KvFormat(CodeFormat(2, 9), CodeFormat(2, 4))
EVERYTHING = KvFormat(CodeFormat(2, 12), CodeFormat(1, 12))
WORDS = WordKvFormat(WordFormat(4), WordFormat(8))


@dataclass(frozen=True)
class Case:
    """Tokens of a few rows, which of them are valid, and how they are stored."""

    rows: int
    heads: int
    group: int
    size: int
    count: int
    storage: KvStorage
    options: LearningOptions
    softcap: float
    padding: tuple[int, ...]
    holes: bool
    calls: tuple[int, ...]

    def tensors(self, dtype=FP64):
        """Return queries, keys, values ``[B, H, N, D]`` and validity ``[B, N]``."""
        generator = torch.Generator().manual_seed(self.count * 131 + self.size)
        shapes = ((self.heads * self.group, 1.0), (self.heads, 3.0), (self.heads, 1.0))
        qkv = [
            scale * torch.randn(self.rows, h, self.count, self.size, generator=generator)
            for h, scale in shapes
        ]
        qkv[1] = qkv[1] * torch.linspace(0.3, 2, self.size)
        column = torch.arange(self.count)
        valid = column >= torch.tensor(self.padding)[:, None]
        if self.holes:
            valid &= torch.rand(self.rows, self.count, generator=generator) < 0.8
        return [x.to(dtype) for x in qkv], valid

    def of(self, form: KvFormat | WordKvFormat | None):
        """Return the case with heads that a format takes."""
        return dataclasses.replace(self, size=16) if form is WORDS else self

    def codec(self, form: KvFormat | WordKvFormat | None, *, lookup: bool = False):
        """Learn a codec from the case's own tokens; None = fp8."""
        if form is None:
            return Fp8Codec(self.size, self.size)
        (_, k, v), _ = self.tensors()
        k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))
        generator = torch.Generator().manual_seed(self.count)
        attention = torch.rand(k.shape[:2], generator=generator, dtype=k.dtype)
        queries = torch.rand(k.shape[1:], generator=generator, dtype=k.dtype)
        readers = Readers(attention, queries)
        books = learn_layer(k, v, k.abs().amax(0), form, self.options, readers)
        return codec_of(books, form, (self.size, self.size), lookup=lookup)

    def run(self, codec, dtype=FP64, calls=None):
        """Attend to the case's tokens in several calls."""
        (q, k, v), valid = self.tensors(dtype)
        state = new_state(k, v, codec, self.storage, self.count)
        outs, start = [], 0
        for length in calls or self.calls:
            now = slice(start, start + length)
            qkv = (q[:, :, now], k[:, :, now], v[:, :, now])
            outs.append(attend(self, qkv, valid[:, now], state, codec))
            start += length
        assert start == self.count
        return [torch.cat(parts, 2) for parts in zip(*outs, strict=True)]


def attend(case, qkv, valid, state, codec):
    scale = case.size**-0.5
    with mock.patch.object(attention, "_BLOCK", 7):  # short texts have several blocks
        return attention.append_and_attend(
            qkv, valid, state, codec, case.storage, scale, case.softcap
        )


@st.composite
def cases(draw, most=60):
    rows = draw(st.integers(1, 2))
    count = draw(st.integers(1, most))
    calls, left = [], count
    while left:
        calls.append(draw(st.integers(1, left)) if draw(st.booleans()) else 1)
        left -= calls[-1]
    storage = KvStorage(
        format="fp8",
        sink_tokens=draw(st.integers(0, 3)),
        exact_tokens=draw(st.integers(1, 5)),
        block_tokens=draw(st.integers(1, 4)),
    )
    flag = st.booleans()
    return Case(
        rows=rows,
        heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 2)),
        size=draw(st.sampled_from([2, 4, 6, 12])),
        count=count,
        storage=storage,
        options=LearningOptions(
            smooth=draw(st.sampled_from(["queries", "balance", "largest", "none"])),
            rotate=draw(st.sampled_from(["grouped", "hadamard", "none"])),
            centre=draw(flag),
            weigh=draw(st.sampled_from([0.0, 0.7])),
            rotate_values=draw(flag),
            per_head=draw(flag),
            iterations=2,
        ),
        softcap=draw(st.sampled_from([0.0, 5.0])),
        padding=tuple(draw(st.integers(0, count)) for _ in range(rows)),
        holes=draw(flag),
        calls=tuple(calls),
    )


def formula(case, codec):
    """The rule itself, query by query: which keys are seen, and which of them as codes."""

    def compute(dtype):
        (q, k, v), valid = case.tensors(dtype)
        k_coded = codec.restore_keys(codec.decode_keys(codec.encode_keys(k), dtype)) if codec else k
        v_coded = (
            codec.restore_values(codec.decode_values(codec.encode_values(v), dtype)) if codec else v
        )
        outs = torch.zeros_like(q)
        lses = torch.full(q.shape[:3], -torch.inf, dtype=dtype)
        for b in range(case.rows):
            for i in range(case.count):
                seen = valid[b, : i + 1].nonzero()[:, 0]
                if not len(seen):
                    continue
                place = torch.arange(len(seen))
                until = coded_until(torch.tensor(len(seen)), case.storage)
                exact = ((place < case.storage.sink_tokens) | (place >= until))[:, None]
                keys = torch.where(exact, k[b, :, seen], k_coded[b, :, seen])
                values = torch.where(exact, v[b, :, seen], v_coded[b, :, seen])
                keys, values = (x.repeat_interleave(case.group, 0) for x in (keys, values))
                scores = (keys @ q[b, :, i, :, None])[..., 0] * case.size**-0.5
                scores = case.softcap * (scores / case.softcap).tanh() if case.softcap else scores
                lses[b, :, i] = scores.logsumexp(-1)
                outs[b, :, i] = (scores.softmax(-1)[:, None] @ values)[:, 0]
        return outs, lses

    return compute


@given(cases(), st.sampled_from([COARSE, PACKED, WORDS, None]), st.booleans())
@laws
def test_attention_is_that_to_exact_and_decoded_keys(case, form, lookup):
    """However the tokens come, with padding anywhere, by either form of the scores."""
    case = case.of(form)
    codec = case.codec(form, lookup=lookup and isinstance(form, KvFormat))
    assert_as_accurate_as_pytorch(case.run(codec), formula(case, codec), FP64)


@given(cases(most=40), st.booleans())
@laws
def test_codewords_of_every_vector_are_softmax_attention(case, lookup):
    codec = case.codec(EVERYTHING, lookup=lookup)
    assert_as_accurate_as_pytorch(case.run(codec), formula(case, None), FP64)


@given(cases())
@laws
def test_transforms_leave_scores_as_they_are(case):
    codec = case.codec(COARSE)
    (q, k, _), _ = case.tensors()
    grouped = q.unflatten(1, (case.heads, case.group))
    scores = codec.transform_queries(grouped) @ codec.transform_keys(k)[:, :, None].mT

    def products(dtype):
        q, k = case.tensors(dtype)[0][:2]
        return [q @ k.repeat_interleave(case.group, 1).mT]

    assert_as_accurate_as_pytorch([scores.flatten(1, 2)], products, FP64)


@given(cases())
@laws
def test_principal_axes_leave_scores_as_they_are(case):
    """Unlike Hadamard's matrix they are rounded themselves."""
    case = case.of(WORDS)
    codec = case.codec(WORDS)
    (q, k, _), _ = case.tensors()
    coded_q = codec.transform_queries(q.unflatten(1, (case.heads, case.group)))
    coded_k = codec.transform_keys(k)[:, :, None]
    scores = (coded_q @ coded_k.mT).flatten(1, 2)
    sizes = (coded_q.norm(dim=-1)[..., None] * coded_k.norm(dim=-1)[..., None, :]).flatten(1, 2)
    error = (scores - q @ k.repeat_interleave(case.group, 1).mT).abs()
    assert (error <= 4 * case.size * torch.finfo(FP64).eps * sizes).all()


@given(cases(), st.sampled_from([COARSE, PACKED, EVERYTHING]))
@laws
def test_codes_of_codewords_are_their_own(case, form):
    """Quantising twice changes nothing, to the bit: distances to codewords are exact."""
    # Where nothing is transformed; elsewhere the way back rounds.
    plain = LearningOptions(smooth="none", rotate="none", centre=False, iterations=2)
    codec = dataclasses.replace(case, options=plain).codec(form)
    _, k, v = case.tensors()[0]
    keys = codec.decode_keys(codec.encode_keys(k), FP64)
    values = codec.decode_values(codec.encode_values(v), FP64)
    assert torch.equal(codec.decode_keys(codec.encode_keys(keys), FP64), keys)
    assert torch.equal(codec.decode_values(codec.encode_values(values), FP64), values)


@given(cases(), st.sampled_from([COARSE, PACKED, WORDS]))
@laws
def test_codes_of_decoded_tokens_are_their_own(case, form):
    """Through the transforms and back, too, as long as codewords differ by more than rounding."""
    case = case.of(form)
    codec = case.codec(form)
    _, k, v = case.tensors()[0]
    keys, values = codec.encode_keys(k), codec.encode_values(v)
    k = codec.restore_keys(codec.decode_keys(keys, FP64))
    v = codec.restore_values(codec.decode_values(values, FP64))
    assert torch.equal(codec.decode_keys(codec.encode_keys(k), FP64), codec.decode_keys(keys, FP64))
    again = codec.decode_values(codec.encode_values(v), FP64)
    assert torch.equal(again, codec.decode_values(values, FP64))


@given(cases())
@laws
def test_fp8_twice_is_fp8_once(case):
    codec = case.codec(None)
    k = case.tensors()[0][1]
    once = codec.decode_keys(codec.encode_keys(k), FP64)
    assert torch.equal(codec.decode_keys(codec.encode_keys(once), FP64), once)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(finite, min_size=1, max_size=9))
@many
def test_fp8_is_the_nearest_number_by_the_least_power(numbers):
    x, codec = torch.tensor(numbers), Fp8Codec(len(numbers), 1)
    packed = codec.encode_keys(x[None, None, None])[0, 0, 0]
    exponent = int(packed.view(torch.int8)[-1])
    scaled = x.double() * 2.0**-exponent
    assert scaled.abs().amax() <= 448
    assert exponent == -126 or scaled.abs().amax() > 224
    known = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    known = torch.cat([known, -known])
    coded = packed[:-1].view(torch.float8_e4m3fn).double()
    least = (scaled[:, None] - known).abs().amin(1)
    assert torch.equal((scaled - coded).abs(), least)
    if x.abs().amax() < 1e38:  # what is rounded up may leave fp32
        back = codec.decode_keys(packed[None, None, None], torch.float64)[0, 0, 0]
        assert torch.equal(back, coded * 2.0**exponent)


@given(cases(), st.sampled_from([COARSE, PACKED, WORDS, None]))
@laws
def test_codes_do_not_depend_on_the_rows_beside_them(case, form):
    case = case.of(form)
    codec = case.codec(form)
    (_, k, v), _ = case.tensors()
    whole = codec.encode_keys(k), codec.encode_values(v)
    alone = [
        torch.cat([encode(x[:1, :, i : i + 1]) for i in range(case.count)], 2)
        for encode, x in ((codec.encode_keys, k), (codec.encode_values, v))
    ]
    for codes, expected in zip(whole, alone, strict=True):
        assert torch.equal(codes[:1], expected)


@given(cases(), st.integers(1, 60), st.sampled_from([COARSE, WORDS, None]))
@many
def test_what_is_cropped_never_was(case, removed, form):
    """A rollback that is granted leaves the results of a cache that never saw the tokens."""
    case = case.of(form)
    codec = case.codec(form)
    (q, k, v), valid = case.tensors()
    valid[:, -1] = True  # something is attended
    other = [x.flip(2) for x in (k, v)]

    def stored():
        state = new_state(k, v, codec, case.storage, 2 * case.count + removed)
        append(state, codec, case.storage, (k, v), valid)
        return state

    state = stored()
    for start in range(0, removed, case.count):
        draft = torch.ones(case.rows, min(case.count, removed - start), dtype=torch.bool)
        tokens = tuple(x[:, :, : draft.shape[1]] for x in other)
        append(state, codec, case.storage, tokens, draft)
    granted = crop(state, case.storage, torch.full((case.rows,), removed))
    assert granted or removed > 32, "32 tokens can always be forgotten"
    if granted:
        last = (q[:, :, -1:], k[:, :, :1], v[:, :, :1])
        now = torch.ones(case.rows, 1, dtype=torch.bool)
        expected = attend(case, last, now, stored(), codec)
        for got, want in zip(attend(case, last, now, state, codec), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
