"""The end of a step over a cache of codes: ``vecinfer_combine`` adds the parts up, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit.decode import LOWEST
from flasheva_compile.lowering.emit.scores import LOG2E
from flasheva_compile.lowering.emit.source import Dim, Source

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec_vecinfer import VecInferSpec


def emit_vecinfer_combine(spec: VecInferSpec) -> str:
    """Return the body of ``vecinfer_combine``: a program for each query.

    Where coded values are rotated, exact and coded sums are stored one behind the other.
    """
    out, e = Source(), Dim("e", spec.value_dim, split=False)
    names = ("acc", "coded") if spec.rotate_values else ("acc",)
    out.lines(
        "pid = tl.program_id(0)",
        "pid64 = pid.to(tl.int64)",
        "heads_out = tl.num_programs(0).to(tl.int64)",
        f"peak_ptr = partial_ptr + heads_out * splits * {e.size}",
        "mass_ptr = peak_ptr + heads_out * splits",
        *e.offsets(),
        "offs_t = tl.arange(0, BLOCK_N)",
        f"m_i = tl.full([1], {LOWEST}, tl.float32)",
        "l_i = tl.zeros([1], tl.float32)",
    )
    for name in names:
        out.lines(*e.zeros(name, "1"))
    with out.block("for offset in range(0, splits, BLOCK_N):"):
        out.lines(*_tile(spec, e))
    out.line("l_safe = tl.where(l_i == 0.0, 1.0, l_i)")
    for n, name in enumerate(names):
        start = f"(pid64 + heads_out) * {e.size}" if n else f"pid64 * {e.size}"
        out.lines(*e.scale(name, "(1.0 / l_safe)[:, None]"))
        out.lines(*e.store_row(name, f"out_ptr + {start}"))
    out.lines(
        f'lse = tl.where(l_i == 0.0, float("-inf"), (m_i + tl.log2(l_safe)) / {LOG2E})',
        "tl.store(lse_ptr + pid64 + tl.arange(0, 1), lse)",
        "",
        f"b = pid // (heads * {spec.queries})",
    )
    with out.block(f"if pid % (heads * {spec.queries}) == 0:"):
        out.line("# No other program reads it any more.")
        out.lines(*_move_on(spec))
    return out.text()


def _tile(spec: VecInferSpec, e: Dim) -> list[str]:
    """Add a tile of parts."""
    lines = [
        "inside = offset + offs_t < splits",
        "at = (offset + offs_t) * heads_out + pid",
        f"m = tl.load(peak_ptr + at, mask=inside, other={LOWEST})",
        "l_part = tl.load(mass_ptr + at, mask=inside, other=0.0)",
        *e.load("part", "partial_ptr", "at", str(e.size), "inside"),
        "m_new = tl.maximum(m_i, tl.max(m, 0))",
        "alpha = tl.exp2(m_i - m_new)",
        "w = tl.exp2(m - m_new)",
        "l_i = l_i * alpha + tl.sum(l_part * w, 0)",
        "m_i = m_new",
    ]
    if not spec.rotate_values:
        return [*lines, *_add(e, "acc", "w")]
    return [
        *lines,
        f"is_exact = offset + offs_t < {spec.exact_parts}",
        *_add(e, "acc", "tl.where(is_exact, w, 0.0)"),
        *_add(e, "coded", "tl.where(is_exact, 0.0, w)"),
    ]


def _add(e: Dim, name: str, weight: str) -> list[str]:
    return [
        f"{name}{n} = {name}{n} * alpha[:, None]"
        f" + tl.sum(part{n} * ({weight})[:, None], 0)[None, :]"
        for n in e.indices
    ]


def _move_on(spec: VecInferSpec) -> list[str]:
    """Count the new tokens of row ``b``."""
    count = spec.new_tokens
    if not spec.key_mask:
        new = [f"length = tl.load(length_ptr + b) + {count}"]
    else:
        new = [
            f"offs_l = tl.arange(0, {1 << (count - 1).bit_length()})",
            "flags = key_mask_ptr + b.to(tl.int64) * stride_mask + offs_l",
            f"is_new = tl.load(flags, mask=offs_l < {count}, other=0)",
            "length = tl.load(length_ptr + b) + tl.sum(is_new.to(tl.int64), 0)",
        ]
    return [
        *new,
        "tl.store(length_ptr + b, length)",
        "tl.store(written_ptr + b, tl.maximum(tl.load(written_ptr + b), length))",
    ]
