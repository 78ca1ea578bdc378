"""Closed forms of cost against counting, position by position."""

import itertools

import pytest
from flasheva_compile.lowering import cost
from flasheva_compile.lowering.op import EvaOp

GEOMETRIES = [
    (w, c, t) for c in (1, 2, 3, 4) for w in (c, 2 * c, 3 * c) for t in (0, c, 2 * c, 5 * c)
]
LENGTHS = [*range(14), 17, 23, 24, 25, 31]


def make_op(window_size=8, chunk_size=4, sink_size=4, *, window="sliding", causal=True, **changes):
    shape = {"heads": 6, "kv_heads": 2, "head_dim": 16, "value_dim": 8}
    return EvaOp(
        window_size=window_size,
        chunk_size=chunk_size,
        sink_size=sink_size,
        window=window,
        causal=causal,
        **{"chunk_rule": "tangent", "scale": 0.25} | shape | changes,
    )


def window_of(op, n, i):
    """The local window [lo, hi) of query i, as the formula defines it."""
    w, c = op.window_size, op.chunk_size
    if op.causal:
        lo = c * (max(0, i - w + 1) // c) if op.window == "sliding" else w * (i // w)
        return lo, i + 1
    if op.window == "block":
        return w * (i // w), min(n, w * (i // w) + w)
    first = min(max(0, i - w // 2), max(0, n - w))
    return c * (first // c), min(n, c * -(-(first + w) // c))


def count(op, n):
    """Exact pairs, chunk pairs, and what the last query sees."""
    exact = chunks = 0
    last = (0, 0)
    for i in range(n):
        lo, hi = window_of(op, n, i)
        seen = i + 1 if op.causal else n
        sinks = set(range(min(op.sink_size, seen)))
        keys = len(sinks | set(range(lo, hi)))
        starts = range(op.sink_size, n, op.chunk_size)
        tokens = sum(x + op.chunk_size <= lo or (not op.causal and x >= hi) for x in starts)
        exact, chunks, last = exact + keys, chunks + tokens, (keys, tokens)
    return exact, chunks, last


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", ["sliding", "block"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pairs_are_what_counting_gives(geometry, window, causal):
    op = make_op(*geometry, window=window, causal=causal)
    forms = cost.exact_pairs(op), cost.chunk_pairs(op)
    for n in LENGTHS:
        counted = count(op, n)[:2]
        assert tuple(cost.evaluate(form, n) for form in forms) == counted, (op, n)


@pytest.mark.parametrize("window", ["sliding", "block"])
def test_cache_holds_what_the_last_query_sees(window):
    for (w, c, t), n in itertools.product(GEOMETRIES, (0, 1, 7, 24, 31)):
        op = make_op(w, c, t, window=window)
        keys, tokens = count(op, n)[2]
        expected = op.kv_heads * (keys * (16 + 8) * 2 + tokens * ((16 + 8) * 2 + 4))
        assert cost.evaluate(cost.eva_cache_bytes(op, itemsize=2), n) == expected


def test_a_window_over_everything_is_full_attention():
    for causal in (True, False):
        op = make_op(64, 4, 0, causal=causal)
        assert cost.evaluate(cost.chunk_pairs(op), 64) == 0
        full = cost.evaluate(cost.full_pairs(causal=causal), 64)
        assert cost.evaluate(cost.exact_pairs(op), 64) == full


def test_flops_are_those_of_the_two_products():
    full = cost.full_flops(causal=False, heads=6, head_dim=16, value_dim=8)
    assert cost.evaluate(full, 10) == 6 * 10 * 10 * (2 * 16 + 2 * 8)
    op = make_op(chunk_rule="mean")
    exact, chunks, _ = count(op, 31)
    pooling = 31 * 2 * (16 + 8) * op.kv_heads
    products = (exact + chunks) * 2 * (16 + 8) * op.heads
    assert cost.evaluate(cost.eva_flops(op), 31) == products + pooling


@pytest.mark.parametrize("rule", ["tangent", "evabyte", "eva"])
def test_weights_of_a_chunk_cost_more_than_the_mean(rule):
    mean, weighted = (
        cost.evaluate(cost.eva_flops(make_op(chunk_rule=name)), 64) for name in ("mean", rule)
    )
    assert mean < weighted < 2 * mean


def test_cost_grows_linearly_beyond_the_window_but_for_chunk_tokens():
    op = make_op(256, 16, 16, heads=9, kv_heads=3, head_dim=64, value_dim=64)
    full = cost.full_flops(causal=True, heads=9, head_dim=64, value_dim=64)
    assert cost.evaluate(full, 16384) > 10 * cost.evaluate(cost.eva_flops(op), 16384)
    kept = cost.full_cache_bytes(kv_heads=3, head_dim=64, value_dim=64, itemsize=2)
    assert cost.evaluate(kept, 16384) > 10 * cost.evaluate(
        cost.eva_cache_bytes(op, itemsize=2), 16384
    )


def test_bidirectional_attention_keeps_nothing_for_decoding():
    op = make_op(causal=False)
    assert cost.evaluate(cost.eva_cache_bytes(op, itemsize=2), 100) == 0


# --- retrieval ------------------------------------------------------------------------------------


def visible_chunks(op, n):
    """Chunks that each query sees."""
    starts = range(op.sink_size, n, op.chunk_size)
    return [sum(x + op.chunk_size <= window_of(op, n, i)[0] for x in starts) for i in range(n)]


@pytest.mark.parametrize("window", ["sliding", "block"])
@pytest.mark.parametrize("chunks", [0, 1, 3, 50])
def test_retrieved_pairs_are_counted(window, chunks):
    for (w, c, t), n in itertools.product(GEOMETRIES, LENGTHS):
        op = make_op(w, c, t, window=window, retrieve_chunks=chunks)
        wanted = sum(min(chunks, seen) for seen in visible_chunks(op, n))
        assert cost.evaluate(cost.retrieved_pairs(op), n) == wanted


def test_retrieval_costs_its_keys_and_its_selection():
    plain, retrieving = make_op(chunk_rule="mean"), make_op(chunk_rule="mean", retrieve_chunks=2)
    seen = visible_chunks(plain, 31)
    keys = sum(min(2, x) for x in seen) * (plain.chunk_size - 1) * 2 * (16 + 8)
    selecting = sum(seen) * 2 * 16
    more = cost.evaluate(cost.eva_flops(retrieving), 31) - cost.evaluate(cost.eva_flops(plain), 31)
    assert more == (keys + selecting) * plain.heads


def test_retrieval_keeps_every_key_and_the_chunk_tokens():
    op = make_op(retrieve_chunks=2)
    tokens = count(op, 31)[2][1]
    wanted = op.kv_heads * (31 * (16 + 8) * 2 + tokens * ((16 + 8) * 2 + 4))
    assert cost.evaluate(cost.eva_cache_bytes(op, itemsize=2), 31) == wanted
