"""Biases of chunk tokens that the matrix products add: three more columns of queries and keys.

A bias that is added to every score costs an instruction a score and the registers that hold it
beside the scores. Written as three bf16 numbers that add up to it, and multiplied by three ones
beside the queries, it costs one more step of the product, which has time to spare.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit.scores import LOG2E
from flasheva_compile.lowering.emit.source import Source
from flasheva_compile.lowering.spec import BIAS_COLUMNS

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec, Schedule

PIECES_FUNCTION = '''\
@triton.jit
def pieces(x):
    """Split into three bf16 numbers that add up to ``x``; -inf is itself and two zeros."""
    high = x.to(tl.bfloat16)
    most = high.to(tl.float32)
    rest = tl.where(most == float("-inf"), 0.0, x - most)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)
'''

ROWS_FUNCTION = '''\
@triton.jit
def bias_rows(bias, COUNT: tl.constexpr):
    """Return the pieces of ``COUNT`` biases as the first three of 16 rows."""
    high, middle, low = pieces(bias)
    row = tl.arange(0, 16)[:, None]
    zeros = tl.zeros([16, COUNT], tl.float32).to(tl.bfloat16)  # no bf16 in Triton's interpreter
    tile = tl.where(row == 2, low[None, :], zeros)
    return tl.where(row == 0, high[None, :], tl.where(row == 1, middle[None, :], tile))
'''


def bias_setup(spec: KernelSpec) -> list[str]:
    """Define the ones beside a block of queries, once for all tiles."""
    lines = [
        "# Biases are added by products: each is three bf16 numbers, times ones.",
        f"offs_p = tl.arange(0, {BIAS_COLUMNS})",
        f"ones = tl.full([BLOCK_M, {BIAS_COLUMNS}], 1.0, tl.float32)",
        "ones = tl.where(offs_p[None, :] < 3, ones, 0.0).to(tl.bfloat16)",
    ]
    # The product is scaled afterwards, its biases with it.
    return [*lines, f"bias_scale = {LOG2E} / score_scale"] if spec.kind == "dq" else lines


def bias_product(spec: KernelSpec, schedule: Schedule, at: str, bound: str | None) -> list[str]:
    """Begin ``s`` with the biases of a tile of chunk tokens.

    ``forward`` has no registers for them and reads what ``chunk_tokens`` or ``bias_columns`` made;
    ``dq``, whose loop waits for more, makes the pieces itself.

    Args:
        spec: Of the kernel.
        schedule: Its tiles.
        at: Where a tensor descriptor finds the tile.
        bound: Which of the chunk tokens exist; None = all.
    """
    if spec.kind == "dq":
        return ["s = tl.dot(ones, bias_rows(bias, BLOCK_N))"]
    columns = str(BIAS_COLUMNS)
    if schedule.tma:
        fetched = f"bias_columns_desc0.load([{at}, 0]).reshape(BLOCK_N, {columns})"
        return [f"bias_tile = {fetched}", "s = tl.dot(ones, tl.trans(bias_tile))"]
    guard = f", mask=({bound})[:, None], other=0.0" if bound else ""
    return [
        f"bias_tile = tl.load(bias_columns_ptr + offset * {columns}"
        f" + offs_t[:, None] * {columns} + offs_p[None, :]{guard})",
        "s = tl.dot(ones, tl.trans(bias_tile))",
    ]


def emit_bias_columns(_spec: KernelSpec) -> str:
    """Return the body of ``bias_columns``: the biases of all chunk tokens as columns of keys."""
    out = Source()
    out.lines(
        "offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)",
        "exists = offs_n < chunks",
        'bias = tl.load(rfa_bias_ptr + offs_n, mask=exists, other=float("-inf"))',
        *store_columns("bias_columns_ptr", "offs_n.to(tl.int64)"),
    )
    return out.text()


def store_columns(pointer: str, rows: str) -> list[str]:
    """Store ``bias`` as columns of keys, to those of rows ``rows`` of ``pointer`` that exist."""
    return [
        "tile = tl.trans(bias_rows(bias / scale, BLOCK_N))",
        f"offs_p = tl.arange(0, {BIAS_COLUMNS})",
        f"rows = {pointer} + {rows}[:, None] * {BIAS_COLUMNS}",
        "tl.store(rows + offs_p[None, :], tile, mask=exists[:, None])",
    ]
