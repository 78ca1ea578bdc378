"""Schedules of the kernels over a cache of codes: closed rules, no table yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.spec import Schedule, padded
from flasheva_compile.lowering.spec_vecinfer import ROWS

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec_vecinfer import VecInferSpec

VECINFER_KINDS = ("vecinfer_append", "vecinfer_decode", "vecinfer_combine")

_WIDE = 128  # channels of which one warp holds the sums
_TILE = 64  # tokens
_BYTE = 8


def vecinfer_schedule(spec: VecInferSpec) -> Schedule:
    """Return how a kernel is tiled.

    A program of ``vecinfer_decode`` is one warp where registers allow: then scores, weights and
    codewords never leave its registers, and nothing waits at barriers.
    """
    if spec.kind == "vecinfer_append":
        warps = 1 if spec.is_fp8 else 2 if spec.is_words else 8  # nothing is searched
        return Schedule(block_m=ROWS, block_n=16, num_warps=warps, num_stages=1)
    widest = max(padded(spec.head_dim), padded(spec.value_dim))
    if spec.kind == "vecinfer_combine":
        parts = 64 if widest <= _WIDE else 32
        return Schedule(block_m=ROWS, block_n=parts, num_warps=8, num_stages=1)
    if spec.dtype == "fp32":
        return Schedule(block_m=ROWS, block_n=16, num_warps=4, num_stages=1)
    if widest > _WIDE:
        return Schedule(block_m=ROWS, block_n=32, num_warps=2, num_stages=1)
    if spec.is_words:
        narrow = max(spec.keys.padded, spec.values.padded) <= _WIDE // 2
        n = 2 * _TILE if narrow else _TILE
        n = n // 2 if spec.block_tokens % n else n  # bounds within tiles need registers, too
        return Schedule(block_m=ROWS, block_n=n, num_warps=1, num_stages=1)
    # What needs more registers than a warp has, with larger tiles.
    ragged = spec.block_tokens % _TILE != 0
    crowded = spec.per_head or ragged or max(spec.keys.bits, spec.values.bits) > _BYTE
    crowded |= spec.is_fp8 and widest > _WIDE // 2  # a tile's keys and values are loaded together
    n = _TILE // 2 if crowded else _TILE
    return Schedule(block_m=ROWS, block_n=n, num_warps=1, num_stages=1)
