"""Text of bounds: centre and spread of a chunk's keys, and scores of chunks by them.

The formulas are those of ``kernels/blocked/chunk_bounds.py``: of ``[centre | spread]``,
``[B, Hkv, C, 2 D]``, the score is ``s (q.centre + |q|.spread)``, two products in one. Weights that
were learned go into what is stored, so that scoring never sees them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flasheva_compile.lowering.emit.source import Dim
    from flasheva_compile.lowering.spec import KernelSpec

# --- bounds ---------------------------------------------------------------------------------------


def bounds_start(d: Dim, rows: str) -> list[str]:
    """Define sums, least and largest numbers of no key at all."""
    lines = d.zeros("total", rows)
    for name, value in (("low", "inf"), ("high", "-inf")):
        lines += [
            f'{name}{n} = tl.full([{rows}, {size}], float("{value}"), tl.float32)'
            for n, (_, size) in enumerate(d.parts)
        ]
    return lines


def bounds_members(d: Dim) -> list[str]:
    """Add a tile of keys of one chunk, ``k0``, ..., of which those ``seen`` exist."""
    lines = []
    for n in d.indices:
        for name, reduce, other in (
            ("total", "sum", "0.0"),
            ("low", "min", 'float("inf")'),
            ("high", "max", 'float("-inf")'),
        ):
            own = f"tl.{reduce}(tl.where(seen[:, None], k{n}, {other}), 0)[None, :]"
            both = f"{name}{n} + {own}" if name == "total" else f"tl.{reduce}imum({name}{n}, {own})"
            lines.append(f"{name}{n} = {both}")
    return lines


def bounds_results(spec: KernelSpec, d: Dim) -> list[str]:
    """Store the bounds of chunk ``chunk64``, which has ``count`` keys."""
    row = f"bounds_ptr + chunk64 * {2 * d.size}"
    return [
        *centre_and_spread(spec, d),
        *d.store_row("centre", row),
        *d.store_row("spread", f"{row} + {d.size}"),
    ]


def centre_and_spread(spec: KernelSpec, d: Dim) -> list[str]:
    """Compute both from ``count``, sums, least and largest numbers; 0 for a chunk without keys.

    With weights, those of head ``hk``.
    """
    lines = ["some = (count > 0.0)[:, None]", "keys_in = tl.maximum(count, 1.0)[:, None]"]
    for n in d.indices:
        lines += [
            f"low{n} = tl.where(some, low{n}, 0.0)",
            f"high{n} = tl.where(some, high{n}, 0.0)",
        ]
        if not spec.weighted_bounds:
            lines += [
                f"centre{n} = total{n} / keys_in * 0.5 + (low{n} + high{n}) * 0.25",
                f"spread{n} = (high{n} - low{n}) * 0.25",
            ]
    return lines + (_weighted(d) if spec.weighted_bounds else [])


def _weighted(d: Dim) -> list[str]:
    """Compute both with the weights of mean, middle and half the range, ``[Hkv, 3, D]``."""
    lines = [f"weight_row = selector_weight_ptr + hk * {3 * d.size}"]
    for place, name in enumerate(("of_mean", "of_middle", "of_range")):
        own = f"weight_row + {place * d.size}" if place else "weight_row"
        lines += d.load_row(name, own, cast=".to(tl.float32)")
    for n in d.indices:
        lines += [
            f"centre{n} = total{n} / keys_in * of_mean{n}",
            f"centre{n} += (low{n} + high{n}) * 0.5 * of_middle{n}",
            f"spread{n} = (high{n} - low{n}) * 0.5 * of_range{n}",
        ]
    return lines


# --- scores ---------------------------------------------------------------------------------------


def magnitudes(d: Dim, tile: str, name: str) -> list[str]:
    """Define ``|q|`` of a tile of queries: exact in any dtype."""
    return [
        f"{name}{n} = tl.abs({tile}{n}.to(tl.float32)).to(q_ptr.dtype.element_ty)"
        for n in d.indices
    ]


def load_bounds(d: Dim, bound: str) -> list[str]:
    """Load a tile of bounds from ``offset`` on, ``centres0``, ... and ``spreads0``, ..."""
    width = str(2 * d.size)
    return [
        f"bounds_tile = bounds_ptr + offset * tl.cast({width}, tl.int64)",
        *d.load("centres", "bounds_tile", "offs_t", width, bound),
        *d.load("spreads", f"bounds_tile + {d.size}", "offs_t", width, bound),
    ]


def bounds_product(d: Dim, result: str, tiles: tuple[str, str], precision: str) -> list[str]:
    """Compute ``q.centre + |q|.spread`` of two tiles, queries and their magnitudes."""
    q, magnitude = tiles
    return [
        *d.contract(result, q, "centres", precision),
        *d.contract(result, magnitude, "spreads", precision, more=True),
    ]


def without_bias() -> str:
    """Leave of the biases of chunk tokens that chunks without a key are never selected."""
    return 'bias = tl.where(bias == float("-inf"), bias, 0.0)'
