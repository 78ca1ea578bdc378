"""Axes, bits and steps of one layer's transform coding from keys and values of its own."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from flasheva_compile.quantization.transform_coding import MOST_BITS, WORD_BITS, LayerTransforms

if TYPE_CHECKING:
    from collections.abc import Iterator

_SPANS = (0.9, 1.3, 1.8, 2.4, 3.2)  # standard deviations to each side that trials begin with
_ROUNDS = 10
_ROUNDING = 16  # units of the largest number in the last place


def learn_transforms(
    keys: Tensor, values: Tensor, scale: Tensor, weights: Tensor, fields: tuple[int, int]
) -> LayerTransforms:
    """Learn how a layer's keys and values become words.

    Keys are rotated to their principal axes: then most of what tells them apart lies in few axes,
    which get more bits. Channels of values keep their directions and are sorted.

    Args:
        keys: ``[T, Hkv, D]``, fp32 or fp64.
        values: ``[T, Hkv, Dv]``.
        scale: What keys are divided by, ``[Hkv, D]``.
        weights: How much each token's squared error counts, ``[T, Hkv]``, 1 on average.
        fields: Fields of a word, of keys and of values.
    """
    rotation = _principal_axes(keys / scale, weights)
    axes = torch.einsum("thd,hde->the", keys / scale, rotation)
    key_steps = _steps(axes, weights, fields[0])
    power = _mean((values - _mean(values, weights)).square(), weights)
    order = power.argsort(dim=-1, descending=True, stable=True)
    value_steps = _steps(values.gather(2, order.expand_as(values)), weights, fields[1])
    return LayerTransforms(
        key_scale=scale,
        key_rotation=rotation,
        key_offset=key_steps[0],
        key_step=key_steps[1],
        key_widths=key_steps[2],
        value_order=order,
        value_offset=value_steps[0],
        value_step=value_steps[1],
        value_widths=value_steps[2],
    )


def _principal_axes(x: Tensor, weights: Tensor) -> Tensor:
    """Return the orthonormal axes of ``[T, Hkv, D]``, the largest first, ``[Hkv, D, D]``."""
    exact = x.double()
    centred = exact - _mean(exact, weights.double())
    covariance = torch.einsum("thd,the,th->hde", centred, centred, weights.double())
    axes = torch.linalg.eigh(covariance).eigenvectors.flip(2)
    # Of an axis and its opposite always the same one: where the largest element is positive.
    sign = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return (axes * sign).to(x)


def _mean(x: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of ``[T, Hkv, D]``, ``[Hkv, D]``."""
    return (x * weights[..., None]).sum(0) / weights.sum(0)[:, None]


class _Fit(NamedTuple):
    """Equal steps of some bits: offset, step and mean squared error, ``[Hkv, D]`` each."""

    offset: Tensor
    step: Tensor
    error: Tensor


def _steps(x: Tensor, weights: Tensor, fields: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return offsets and steps ``[Hkv, D]`` and widths ``[Hkv, F]``: of the smallest error."""
    offsets, steps, errors = (
        torch.stack(parts)
        for parts in zip(*(_fit(x, weights, n) for n in range(MOST_BITS + 1)), strict=True)
    )
    ways = torch.tensor(_allocations(fields), device=x.device)
    of_fields = errors.unflatten(2, (fields, -1)).sum(3)  # [bits, Hkv, F]
    total = of_fields[ways, :, torch.arange(fields, device=x.device)].sum(1)  # [ways, Hkv]
    widths = ways[total.argmin(0)]
    chosen = widths.repeat_interleave(x.shape[2] // fields, 1)[None]
    return offsets.gather(0, chosen)[0], steps.gather(0, chosen)[0], widths


@cache
def _allocations(fields: int) -> list[tuple[int, ...]]:
    """Return all ways to give 16 bits to fields, none wider than the one before it."""

    def ways(left: int, widest: int, places: int) -> Iterator[tuple[int, ...]]:
        if not places:
            yield from [()] if not left else []
            return
        for width in range(min(widest, left), -1, -1):
            if width * places >= left:
                yield from ((width, *rest) for rest in ways(left - width, width, places - 1))

    return list(ways(WORD_BITS, MOST_BITS, fields))


def _fit(x: Tensor, weights: Tensor, bits: int) -> _Fit:
    """Return the best equal steps of each channel of ``[T, Hkv, D]`` that were found.

    From several spans, numbers are rounded to the steps so far and the steps fitted to the rounded
    numbers, in turn. What differs by rounding alone is one number.
    """
    mean, largest = _mean(x, weights), (1 << bits) - 1
    power = _mean((x - mean).square(), weights)
    # Of what does not vary any step would do; one of the head's size keeps products within fp16.
    usual = power.mean(1, keepdim=True).sqrt()
    usual = usual.where(usual > 0, 1.0).expand_as(power)
    best = _Fit(mean, usual, power)
    if not bits:
        return best
    rounding = _ROUNDING * torch.finfo(x.dtype).eps * x.abs().amax((0, 2))[:, None]
    varies = power > rounding.square()
    for span in _SPANS:
        reach = (span * power.sqrt()).where(varies, usual)
        offset, step = mean - reach, 2 * reach / largest
        for _ in range(_ROUNDS):
            digits = _digits(x, offset, step, largest)
            middle = _mean(digits, weights)
            apart = digits - middle
            spread = _mean(apart.square(), weights)
            fitted = _mean(apart * (x - mean), weights) / spread
            usable = (spread > 0) & (fitted > 0)
            step = fitted.where(usable, step)
            offset = (mean - step * middle).where(usable, offset)
        error = _mean((x - offset - step * _digits(x, offset, step, largest)).square(), weights)
        better = varies & (error < best.error)
        new = _Fit(offset, step, error)
        best = _Fit(*(a.where(better, b) for a, b in zip(new, best, strict=True)))
    return best


def _digits(x: Tensor, offset: Tensor, step: Tensor, largest: int) -> Tensor:
    return ((x - offset) / step + 0.5).floor_().clamp_(0, largest)
