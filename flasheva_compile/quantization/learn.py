"""Scales and codebooks of one layer from keys and values of its own."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flasheva_compile.errors import ConfigError
from flasheva_compile.quantization.codebook import learn_codebook
from flasheva_compile.quantization.transform import compute_dtype, rotated, smoothing_scale
from flasheva_compile.quantization.vecinfer import LayerCodebooks

if TYPE_CHECKING:
    from flasheva_compile.quantization.formats import CodeFormat, KvFormat


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LearningOptions:
    """How codebooks are learned.

    Attributes:
        smooth: Divide keys by ``sqrt(max |k|)`` of their channel.
        rotate_keys: Rotate keys by Hadamard's matrix.
        rotate_values: Rotate values, too.
        per_head: One codebook per kv head instead of one for all.
        iterations: Of k-means, at most.
        seed: Of k-means.
    """

    smooth: bool = True
    rotate_keys: bool = True
    rotate_values: bool = False
    per_head: bool = False
    iterations: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("iterations", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                message = f"must be an integer of at least {least}, got {value!r}"
                raise ConfigError(message, subject=name)


def learn_layer(
    keys: Tensor, values: Tensor, largest: Tensor, form: KvFormat, options: LearningOptions
) -> LayerCodebooks:
    """Learn one layer's scales and codebooks.

    Args:
        keys: Keys as they are cached, after the rotary embedding, ``[T, Hkv, D]``.
        values: ``[T, Hkv, Dv]``.
        largest: ``max |k|`` over at least these tokens, ``[Hkv, D]``.
        form: Of the codes.
        options: How.

    Raises:
        ConfigError: The head dimension does not fit the format, or something is not finite.
    """
    form.key.codes(keys.shape[2])
    form.value.codes(values.shape[2])
    dtype = compute_dtype(keys.dtype)
    keys, values, largest = (x.to(dtype) for x in (keys, values, largest))
    if not all(bool(x.isfinite().all()) for x in (keys, values, largest)):
        raise ConfigError("keys or values are not finite", subject="calibrate_kv")
    scale = smoothing_scale(largest) if options.smooth else torch.ones_like(largest)
    keys = keys / scale
    keys = rotated(keys) if options.rotate_keys else keys
    values = rotated(values) if options.rotate_values else values
    return LayerCodebooks(
        scale=scale,
        keys=_codebooks(keys, form.key, options),
        values=_codebooks(values, form.value, options),
        rotate_keys=options.rotate_keys,
        rotate_values=options.rotate_values,
    )


def _codebooks(x: Tensor, form: CodeFormat, options: LearningOptions) -> Tensor:
    """Learn one codebook of all sub-vectors of ``[T, Hkv, D]``, or one of those of each head."""
    groups = x.unbind(1) if options.per_head else (x,)
    generator = torch.Generator().manual_seed(options.seed)
    books = [
        learn_codebook(
            group.reshape(-1, form.vector),
            form.entries,
            iterations=options.iterations,
            generator=generator,
        )
        for group in groups
    ]
    return torch.stack(books)
