"""Scales and codebooks of one layer from keys and values of its own."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from flasheva_compile.errors import ConfigError
from flasheva_compile.quantization.codebook import learn_codebook
from flasheva_compile.quantization.formats import WordKvFormat
from flasheva_compile.quantization.learn_transforms import learn_transforms
from flasheva_compile.quantization.transform import (
    balancing_scale,
    compute_dtype,
    reading_scale,
    rotated,
    smoothing_scale,
)
from flasheva_compile.quantization.vecinfer import LayerCodebooks, VqCodec
from flasheva_compile.validation import expect_choice

if TYPE_CHECKING:
    from flasheva_compile.quantization.formats import CodeFormat, KvFormat
    from flasheva_compile.quantization.transform_coding import LayerTransforms

Smoothing: TypeAlias = Literal["queries", "balance", "largest", "none"]
Rotation: TypeAlias = Literal["grouped", "hadamard", "none"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LearningOptions:
    """How codebooks, or the words of transform coding, are learned.

    Transform coding reads ``smooth``, ``weigh``, ``vectors`` and ``seed`` alone, and ``centre``
    where ``"balance"`` or ``"largest"`` measure the size of keys: its rotation, what it subtracts
    and what belongs to a head are its own.

    Attributes:
        smooth: Divide keys by a scale of each channel: with ``"queries"`` equal errors of all
            channels count alike in scores, ``"balance"`` is best where all channels are mixed,
            ``"largest"`` is ``sqrt(max |k|)``.
        rotate: Rotate keys: ``"grouped"`` mixes channels of alike size (``grouped_rotation``),
            ``"hadamard"`` all.
        centre: Quantise how keys differ from their mean instead of the keys.
        weigh: Share of a token's weight that is the attention it gets; the rest is the same for
            all. From 0 to below 1; None = 0.7 for codebooks, which have codewords to spare for rare
            tokens, and 0.95 for transform coding, which has not.
        rotate_values: Rotate values by Hadamard's matrix.
        per_head: One codebook per kv head instead of one for all.
        iterations: Of k-means, at most.
        vectors: What k-means is given for each codeword, where there are as many; transform coding
            is given 32 times as many tokens.
        seed: Of k-means, and of what it is given.
    """

    smooth: Smoothing = "queries"
    rotate: Rotation = "grouped"
    centre: bool = True
    weigh: float | None = None
    rotate_values: bool = False
    per_head: bool = False
    iterations: int = 30
    vectors: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        expect_choice("smooth", self.smooth, get_args(Smoothing))
        expect_choice("rotate", self.rotate, get_args(Rotation))
        for name, least in (("iterations", 0), ("seed", 0), ("vectors", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                message = f"must be an integer of at least {least}, got {value!r}"
                raise ConfigError(message, subject=name)
        if self.weigh is not None and not 0 <= self.weigh < 1:
            message = f"must be at least 0 and below 1, got {self.weigh!r}"
            raise ConfigError(message, subject="weigh")

    @classmethod
    def paper(cls) -> LearningOptions:
        """Return what VecInfer does (arXiv 2510.06175)."""
        return cls(smooth="largest", rotate="hadamard", centre=False, weigh=0.0, vectors=256)


_WEIGH_OF_CODES, _WEIGH_OF_WORDS = 0.7, 0.95  # see ``LearningOptions.weigh``


class Readers(NamedTuple):
    """Who reads the tokens that a layer is learned from.

    Attributes:
        attention: What each token gets of the attention of queries that would read it as a code,
            summed over them, ``[T, Hkv]``.
        queries: Mean square of each channel of the queries, ``[Hkv, D]``.
    """

    attention: Tensor
    queries: Tensor


def learn_layer(
    keys: Tensor,
    values: Tensor,
    largest: Tensor,
    form: KvFormat | WordKvFormat,
    options: LearningOptions,
    readers: Readers | None = None,
) -> LayerCodebooks | LayerTransforms:
    """Learn one layer's scales and codebooks, or its transforms.

    Args:
        keys: Keys as they are cached, after the rotary embedding, ``[T, Hkv, D]``.
        values: ``[T, Hkv, Dv]``.
        largest: ``max |k|`` over at least these tokens, ``[Hkv, D]``.
        form: Of the codes.
        options: How.
        readers: Of these tokens; None = all alike.

    Raises:
        ConfigError: The head dimension does not fit the format, or something is not finite.
    """
    form.key.codes(keys.shape[2])
    form.value.codes(values.shape[2])
    if readers is None:
        readers = Readers(torch.zeros_like(keys[..., 0]), torch.ones_like(largest))
    dtype = compute_dtype(keys.dtype)
    keys, values, largest = (x.to(dtype) for x in (keys, values, largest))
    readers = Readers(*(x.to(dtype) for x in readers))
    if not all(bool(x.isfinite().all()) for x in (keys, values, largest, *readers)):
        raise ConfigError("keys, values or queries are not finite", subject="calibrate_kv")
    usual = _WEIGH_OF_WORDS if isinstance(form, WordKvFormat) else _WEIGH_OF_CODES
    share = usual if options.weigh is None else options.weigh
    weights = _weights(readers.attention, share)
    if isinstance(form, WordKvFormat):
        scale, _ = _smoothing(keys, largest, weights, readers.queries, options)
        return learn_transforms(keys, values, scale, weights, (form.key.vector, form.value.vector))
    books = _codebook_transforms(keys, largest, weights, readers.queries, form, options)
    codec = VqCodec(books, form, keys.shape[2], values.shape[2])
    coded = codec.transform_keys(keys.transpose(0, 1)[None])
    coded = coded if books.offset is None else coded - books.offset[:, None]
    values = rotated(values) if options.rotate_values else values
    return dataclasses.replace(
        books,
        keys=_codebooks(coded[0].transpose(0, 1), weights, form.key, options),
        values=_codebooks(values, weights, form.value, options),
    )


def _weights(attention: Tensor, share: float) -> Tensor:
    """Return how much each token counts, ``[T, Hkv]``: 1 on average."""
    mean = attention.mean(0)
    relative = (attention / mean).where(mean > 0, 1.0)
    return share * relative + (1 - share)


def _smoothing(
    keys: Tensor, largest: Tensor, weights: Tensor, queries: Tensor, options: LearningOptions
) -> tuple[Tensor, Tensor]:
    """Return what keys are divided by and their power around what is their origin, ``[Hkv, D]``."""
    centred = keys - _mean(keys, weights, options)
    power = (centred.square() * weights[..., None]).mean(0)
    if options.smooth == "queries":
        return reading_scale(queries), power
    if options.smooth == "balance":
        return balancing_scale(power, queries), power
    if options.smooth == "largest":
        return smoothing_scale(centred.abs().amax(0) if options.centre else largest), power
    return torch.ones_like(largest), power


def _mean(keys: Tensor, weights: Tensor, options: LearningOptions) -> Tensor:
    mean = (keys * weights[..., None]).mean(0)
    return mean if options.centre else torch.zeros_like(mean)


def _codebook_transforms(
    keys: Tensor,
    largest: Tensor,
    weights: Tensor,
    queries: Tensor,
    form: KvFormat,
    options: LearningOptions,
) -> LayerCodebooks:
    """Return what happens to keys before they are quantised; codebooks are to follow."""
    scale, power = _smoothing(keys, largest, weights, queries, options)
    mean = _mean(keys, weights, options)
    order = (power * queries).argsort(dim=-1, descending=True, stable=True)  # smoothing keeps it
    nothing = keys.new_zeros(1, form.key.entries, form.key.vector)
    books = LayerCodebooks(
        scale=scale,
        keys=nothing,
        values=nothing,
        rotate_keys=options.rotate != "none",
        rotate_values=options.rotate_values,
        order=order if options.rotate == "grouped" else None,
    )
    if not options.centre:
        return books
    codec = VqCodec(books, form, keys.shape[2], keys.shape[2])
    offset = codec.transform_keys(mean[None, :, None])[0, :, 0]
    return dataclasses.replace(books, offset=offset)


def _codebooks(x: Tensor, weights: Tensor, form: CodeFormat, options: LearningOptions) -> Tensor:
    """Learn one codebook of all sub-vectors of ``[T, Hkv, D]``, or one of those of each head."""
    generator = torch.Generator().manual_seed(options.seed)
    codes = form.codes(x.shape[2])
    pairs = zip(x.split(1, 1), weights.split(1, 1), strict=True)
    books = []
    for group, weight in pairs if options.per_head else ((x, weights),):
        vectors = group.reshape(-1, form.vector)
        repeated = weight[..., None].expand(-1, -1, codes).reshape(-1)
        most = options.vectors * form.entries
        if vectors.shape[0] > most:
            chosen = torch.randperm(vectors.shape[0], generator=generator)[:most].to(x.device)
            vectors, repeated = vectors[chosen], repeated[chosen]
        books.append(
            learn_codebook(
                vectors,
                form.entries,
                iterations=options.iterations,
                generator=generator,
                weights=repeated,
            )
        )
    return torch.stack(books)
