"""Closed forms, in the sequence length ``N``, for what an attention costs.

Pairs are (query, key or chunk token) pairs of one head and one row without padding: exact counts.
FLOPs are those of the matrix products (a multiply-add is 2); softmax, masks and dropout are left
out. Bytes are those of the keys and values that decoding has to keep; a bidirectional attention
keeps nothing.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import sympy

from flasheva_compile.quantization.formats import FP8, KvStorage, kv_format

if TYPE_CHECKING:
    from flasheva_compile.lowering.op import EvaOp

N = sympy.Symbol("N", integer=True, nonnegative=True)
_BIAS_BYTES = 4  # rfa_bias is fp32


def evaluate(expression: sympy.Expr, length: int) -> int:
    """Return the value of a closed form at one sequence length."""
    return int(expression.subs(N, length))


def full_pairs(*, causal: bool) -> sympy.Expr:
    """Count the pairs of softmax attention."""
    return N * (N + 1) / 2 if causal else N**2


def exact_pairs(op: EvaOp) -> sympy.Expr:
    """Count the pairs of a query with an exact key.

    The exact keys and the keys behind the visible chunk tokens partition what full attention sees,
    and every chunk but the last of a bidirectional attention has ``chunk_size`` keys.
    """
    missing = -N % op.chunk_size * _queries_that_see_the_last_chunk(op)
    return full_pairs(causal=op.causal) - op.chunk_size * chunk_pairs(op) + missing


def chunk_pairs(op: EvaOp) -> sympy.Expr:
    """Count the pairs of a query with a chunk token that it sees, retrieved ones included."""
    before = _sliding_before(op) if op.window == "sliding" else _block_before(op)
    if op.causal:
        return before
    after = _sliding_after(op) if op.window == "sliding" else _block_after(op)
    return before + after


def retrieved_pairs(op: EvaOp) -> sympy.Expr:
    """Count the pairs of a query with a chunk that it retrieves: ``min(k, visible)`` each.

    What is beyond the ``k`` chunks is what ``k`` more chunks of sinks would leave. Queries that
    share a selection count as if each had its own, which is slightly more.
    """
    if not op.retrieve_chunks:
        return sympy.Integer(0)
    sinks = op.sink_size + op.retrieve_chunks * op.chunk_size
    return chunk_pairs(op) - chunk_pairs(dataclasses.replace(op, sink_size=sinks))


def full_flops(*, causal: bool, heads: int, head_dim: int, value_dim: int) -> sympy.Expr:
    """Count the FLOPs of softmax attention's forward pass, one row."""
    return full_pairs(causal=causal) * 2 * (head_dim + value_dim) * heads


def eva_flops(op: EvaOp) -> sympy.Expr:
    """Count the FLOPs of FlashEVA's forward pass, chunk tokens included, one row.

    A retrieved chunk is ``chunk_size`` keys instead of one token; selecting costs the products of
    queries with all chunk tokens once more. The pooling of queries that the ``eva`` rule adds is
    left out.
    """
    pairs = exact_pairs(op) + chunk_pairs(op) + (op.chunk_size - 1) * retrieved_pairs(op)
    dims = op.head_dim + op.value_dim
    selecting = chunk_pairs(op) * 2 * op.head_dim * op.heads if op.retrieve_chunks else 0
    pooling = N * (2 * dims + _weight_flops(op)) * op.kv_heads
    return pairs * 2 * dims * op.heads + pooling + selecting


def full_cache_bytes(*, kv_heads: int, head_dim: int, value_dim: int, itemsize: int) -> sympy.Expr:
    """Count the bytes that softmax attention keeps for decoding, one row."""
    return N * (head_dim + value_dim) * itemsize * kv_heads


def stored_cache_bytes(
    kv: str, *, kv_heads: int, head_dim: int, value_dim: int, itemsize: int
) -> sympy.Expr:
    """Count the bytes that softmax attention keeps in a format of few bits, one row.

    First and last tokens are exact; codebooks are not counted.
    """
    storage, exact = KvStorage(format=kv), (head_dim + value_dim) * itemsize
    coded = head_dim + value_dim + 2  # of fp8, a power of two for each key and each value
    if kv != FP8:
        coded = kv_format(kv).nbytes(head_dim, value_dim)
    beyond = sympy.Max(0, N - storage.sink_tokens - storage.exact_tokens)
    tokens = _floor(beyond, storage.block_tokens) * storage.block_tokens
    return kv_heads * ((N - tokens) * exact + tokens * coded)


def eva_cache_bytes(op: EvaOp, *, itemsize: int) -> sympy.Expr:
    """Count the bytes that FlashEVA keeps for decoding, one row: what the last query sees.

    With retrieval every key may be selected, so all are kept exactly, beside the chunk tokens.
    """
    if not op.causal:
        return sympy.Integer(0)
    last = sympy.Max(0, N - 1)
    if op.window == "sliding":
        past = _floor(sympy.Max(0, last - op.window_size + 1), op.chunk_size) * op.chunk_size
    else:
        past = _floor(last, op.window_size) * op.window_size
    chunks = sympy.Max(0, past - op.sink_size) / op.chunk_size
    token = (op.head_dim + op.value_dim) * itemsize
    exact = N if op.retrieve_chunks else N - chunks * op.chunk_size
    bounds = 2 * op.head_dim * itemsize if op.retrieve_by == "bounds" else 0
    return op.kv_heads * (exact * token + chunks * (token + _BIAS_BYTES + bounds))


def _weight_flops(op: EvaOp) -> sympy.Expr:
    """Count the FLOPs per key of the weights inside a chunk."""
    dim = sympy.Integer(op.head_dim)
    match op.chunk_rule:
        case "mean":
            return sympy.Integer(0)
        case "tangent":  # phi.k
            return 2 * dim
        case "evabyte":  # a.k, p.k, |k|^2
            return 6 * dim
        case "eva":  # omega.k, |k|^2, and two Linear(D, D) per chunk
            return 4 * dim + 4 * dim**2 / op.chunk_size


def _floor(numerator: sympy.Expr, denominator: int) -> sympy.Expr:
    return sympy.floor(numerator / denominator)


def _sum_of_floors(terms: sympy.Expr, step: int) -> sympy.Expr:
    """Return ``sum(u // step for u in range(terms))``, 0 for a negative number of terms."""
    terms = sympy.Max(0, terms)
    whole = _floor(terms, step)
    return step * whole * (whole - 1) / 2 + (terms - step * whole) * whole


def _sliding_before(op: EvaOp) -> sympy.Expr:
    """Count chunk pairs to the left of a sliding window.

    A window starts in chunk ``u // c``, one query each for ``u = 0 .. N - w``; two-sided windows
    slide inward at the end, where ``w - w // 2`` queries share the last one.
    """
    sinks = op.sink_size // op.chunk_size
    if op.causal:
        return _sum_of_floors(N - op.window_size + 1 - op.sink_size, op.chunk_size)
    starts = N - op.window_size
    at_end = sympy.Max(0, _floor(starts, op.chunk_size) - sinks)
    shared = op.window_size - op.window_size // 2
    return shared * at_end + _sum_of_floors(starts - op.sink_size, op.chunk_size)


def _sliding_after(op: EvaOp) -> sympy.Expr:
    """Count chunk pairs to the right of a two-sided sliding window.

    With ``k = ceil((N - w) / c)`` chunks beyond the first window, the one that starts at ``u``
    leaves ``k - ceil(u / c)`` of them, of which at most ``allowed`` are no sinks.
    """
    beyond = sympy.Max(0, sympy.ceiling((N - op.window_size) / sympy.Integer(op.chunk_size)))
    allowed = sympy.Max(0, sympy.ceiling((N - op.sink_size) / sympy.Integer(op.chunk_size)))
    at_start = (op.window_size // 2 + 1) * sympy.Min(allowed, beyond)
    capped = op.chunk_size * (beyond - allowed)
    whole = _sum_of_floors(op.chunk_size * beyond, op.chunk_size)
    return at_start + whole - _sum_of_floors(capped, op.chunk_size)


def _block_before(op: EvaOp) -> sympy.Expr:
    """Count chunk pairs to the left of a query's block."""
    first = -(-op.sink_size // op.window_size)  # the first block with any chunk between the sinks
    queries = sympy.Max(0, N - op.window_size * first)
    keys = op.window_size * _sum_of_floors(queries, op.window_size)
    return (keys + queries * (op.window_size * first - op.sink_size)) / op.chunk_size


def _block_after(op: EvaOp) -> sympy.Expr:
    """Count chunk pairs to the right of a query's block; the last block has none."""
    chunks = sympy.ceiling(N / sympy.Integer(op.chunk_size))
    sinks, per_block = op.sink_size // op.chunk_size, op.window_size // op.chunk_size
    blocks = sympy.Max(0, sympy.ceiling(N / sympy.Integer(op.window_size)) - 1)
    in_sinks = sympy.Min(sinks // per_block, blocks)  # blocks that end inside the sinks
    open_chunks = (blocks - in_sinks) * chunks - per_block * (
        blocks * (blocks + 1) - in_sinks * (in_sinks + 1)
    ) / 2
    return op.window_size * (in_sinks * sympy.Max(0, chunks - sinks) + open_chunks)


def _queries_that_see_the_last_chunk(op: EvaOp) -> sympy.Expr:
    """Count the queries of a bidirectional attention that see its last chunk as a chunk token."""
    if op.causal:
        return sympy.Integer(0)
    if op.window == "block":
        seeing = op.window_size * sympy.Max(0, sympy.ceiling(N / sympy.Integer(op.window_size)) - 1)
    else:
        starts = N - op.window_size
        beyond = sympy.ceiling(starts / sympy.Integer(op.chunk_size))
        last_windows = starts - op.chunk_size * (beyond - 1)
        shared = op.window_size - op.window_size // 2
        seeing = sympy.Piecewise((N - (last_windows - 1 + shared), starts > 0), (0, True))
    return sympy.Piecewise((seeing, op.sink_size < N), (0, True))
