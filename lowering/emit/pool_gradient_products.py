"""Gradient of pooling by products: a tile of keys against the few chunks that it touches.

What ``pool_gradient`` computes key by key needs as many rows of chunks as there are keys, four
tiles of registers that wide heads do not have. A tile of keys touches few chunks, so their rows
are one side of a product, and which chunk a key belongs to is a matrix with one weight a row.
Factors that are not bf16 are two bf16 numbers that add up to them: 16 bits of their 24.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit.scores import LOG2E

if TYPE_CHECKING:
    from flasheva_compile.lowering.emit.source import Dim
    from flasheva_compile.lowering.spec import KernelSpec, Schedule

HALVES_FUNCTION = '''\
@triton.jit
def halves(x):
    """Split into two bf16 numbers that add up to ``x``, but for its last bits."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)
'''


def value_part(spec: KernelSpec, schedule: Schedule, d: Dim, e: Dim) -> list[str]:
    """Define each key's weight ``w`` in its chunk; add to ``dv`` of the keys at ``offs_n``.

    The gradient of values first, and alone: once it is stored its registers are free.
    """
    tangent = spec.chunk_rule == "tangent"
    return [
        "# Pooling: each key adds to the gradient of its chunk token.",
        *_touched_chunks(spec, schedule),
        *(_tangent_weights(d) if tangent else _mean_weights()),
        *_halves("w"),
        *_chunk_rows(e, "gv", "drfa_v_ptr"),
        *_halves(*(f"gv{n}" for n in e.indices)),
        *(_deviation("v", "mv", "gv", "rfa_v_ptr", e) if tangent else []),
        *_weighted("dv", "w", "gv", e),
    ]


def key_part(spec: KernelSpec, d: Dim) -> list[str]:
    """Add to ``dk`` of the same keys what goes through keys and weights."""
    if spec.chunk_rule == "mean":
        lines = [*_chunk_rows(d, "gk", "drfa_k_ptr"), *_halves(*(f"gk{n}" for n in d.indices))]
        return lines + _weighted("dk", "w", "gk", d)
    return [
        *_chunk_rows(d, "gk", "drfa_k_ptr"),
        _per_chunk("gb", "drfa_bias_ptr"),
        # bias = log-mass - s phi.rfa_k: the second term adds to the gradient of rfa_k.
        *(f"gk{n} -= (scale * gb)[:, None] * phi{n}" for n in d.indices),
        *_halves(*(f"gk{n}" for n in d.indices)),
        *_deviation("k", "mk", "gk", "rfa_k_ptr", d, more=True),
        *_weighted("dk", "w", "gk", d),
        "moved = scale * w * (inner + (gb - pooled)[None, :])",
        "dlogit = tl.sum(moved, 1)",
        *(f"dk{n} += dlogit[:, None] * phi{n}" for n in d.indices),
    ]


def parameter_part(spec: KernelSpec, schedule: Schedule, d: Dim) -> list[str]:
    """Store what the tile's keys add to the gradient of the rule's vector."""
    if spec.chunk_rule == "mean":
        return []
    lines = [
        "dcentre = tl.sum(moved - w * (scale * gb)[None, :], 1)",
        f"dcentre_rows = bias_rows(dcentre, {schedule.block_n})",
    ]
    for n in d.indices:
        bound = d.bound(n)
        guard = f", mask={bound}" if bound else ""
        place = f"dphi_ptr + (bhk64 * tiles_n + tile_n) * {d.size} + offs_d{n}[None, :]"
        dphi = f"tl.sum(tl.dot(dcentre_rows, k{n}), 0)[None, :]"
        lines += [f"dphi{n} = {dphi}", f"tl.store({place}, dphi{n}{guard})"]
    return lines


def _touched(spec: KernelSpec, schedule: Schedule) -> int:
    """Return the chunks that a tile of keys touches at most, as rows of a product."""
    most = (schedule.block_n - 1) // spec.chunk_size + 2
    return max(16, 1 << (most - 1).bit_length())


def _touched_chunks(spec: KernelSpec, schedule: Schedule) -> list[str]:
    """Define the rows of the chunks that the tile touches, and which key is in which."""
    c = spec.chunk_size
    slot = " + first_slot" if spec.documents == "padded" else ""
    valid = " & valid" if spec.key_mask else ""
    return [
        f"first_chunk = tl.maximum(offset, 0) // {c}",
        f"BLOCK_C: tl.constexpr = {_touched(spec, schedule)}",
        "offs_c = tl.arange(0, BLOCK_C)",
        f"slots = first_chunk{slot} + offs_c",
        # Other chunks' numbers, should they be infinite, are not to come near these keys.
        f"held = (slots < chunks) & (first_chunk + offs_c <= tl.maximum(last, 0) // {c})",
        "chunk_rows = bhk64 * chunks + slots",
        f"own = (offs_n // {c} - first_chunk)[:, None] == offs_c[None, :]",
        f"own &= (exists{valid})[:, None]",
    ]


def _chunk_rows(dim: Dim, tile: str, pointer: str) -> list[str]:
    """Load the rows of the touched chunks, in fp32."""
    rows = str(dim.size)
    return dim.load(tile, pointer, "chunk_rows", rows, "held", cast=".to(tl.float32)")


def _per_chunk(name: str, pointer: str) -> str:
    return f"{name} = tl.load({pointer} + chunk_rows, mask=held, other=0.0)"


def _halves(*names: str) -> list[str]:
    return [f"{name}_high, {name}_low = halves({name})" for name in names]


def _weighted(result: str, weights: str, rows: str, dim: Dim) -> list[str]:
    """Add ``weights @ rows`` to ``result``; what both low halves give is too little to count."""
    pairs = (("high", "high"), ("low", "high"), ("high", "low"))
    return [
        f"{result}{n} = tl.dot({weights}_{left}, {rows}{n}_{right}, {result}{n})"
        for n in dim.indices
        for left, right in pairs
    ]


def _times_rows(result: str, tile: str, rows: str, dim: Dim, *, more: bool = False) -> list[str]:
    """Define ``result = tile @ rows.T``, or add to it with ``more``."""
    terms = [f"{tile}{n}, tl.trans({rows}{n}_{x})" for n in dim.indices for x in ("high", "low")]
    return [
        f"{result} = tl.dot({term}{f', {result}' if place or more else ''})"
        for place, term in enumerate(terms)
    ]


def _mean_weights() -> list[str]:
    return [
        _per_chunk("log_count", "rfa_bias_ptr"),
        f"w = tl.where(own, tl.exp2(-log_count * {LOG2E})[None, :], 0.0)",
    ]


def _tangent_weights(d: Dim) -> list[str]:
    return [
        *d.load_row("phi", f"phi_ptr + hk * {d.size}", cast=".to(tl.float32)"),
        _per_chunk("mass", "mass_k_ptr"),
        # The centre as a row for each chunk: its product with keys is as wide as their weights.
        *(f"centre{n} = tl.broadcast_to(phi{n}, (BLOCK_C, {d.parts[n][1]}))" for n in d.indices),
        *_halves(*(f"centre{n}" for n in d.indices)),
        *_times_rows("key_dot", "k", "centre", d),
        f"logits = (scale * key_dot - mass[None, :]) * {LOG2E}",
        "w = tl.where(own, tl.exp2(logits), 0.0)",
    ]


def _deviation(
    tile: str, pooled: str, gradient: str, pointer: str, dim: Dim, *, more: bool = False
) -> list[str]:
    """Multiply rows by their chunk's gradient, to ``inner``, and chunks' means, to ``pooled``.

    Both by the same numbers, those of the halves: what the two differ by is what counts.
    """
    high, low = (f"{gradient}{{0}}_{half}.to(tl.float32)" for half in ("high", "low"))
    return [
        *_times_rows("inner", tile, gradient, dim, more=more),
        *(f"{gradient}{n} = {high.format(n)} + {low.format(n)}" for n in dim.indices),
        *_chunk_rows(dim, pooled, pointer),
        f"pooled {'+' if more else ''}= {dim.row_sum(pooled, gradient)}",
    ]
