"""A consumer of a specialised ``forward``: a warpgroup that attends from 64 queries."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit import scores
from flasheva_compile.lowering.emit.loops import Either
from flasheva_compile.lowering.emit.selection_bits import own_bits, unselected_by_specialists
from flasheva_compile.lowering.emit.source import Source
from flasheva_compile.lowering.emit.specialised_names import items_loop, layout, unpacked
from flasheva_compile.lowering.emit.specialised_walks import (
    HI,
    LO,
    consumer_walks,
    own_bounds,
    row_lines,
    walk_bounds,
)
from flasheva_compile.lowering.spec import BIAS_COLUMNS

if TYPE_CHECKING:
    from flasheva_compile.lowering.emit.loops import Mask
    from flasheva_compile.lowering.emit.specialised_walks import Walk
    from flasheva_compile.lowering.spec import KernelSpec, Schedule

_FIRST = "every query's own key is in it, or in front of it."
_FIRST_BOTH = "whatever comes next is scored while its values are added."

_SOFTMAX = '''\
@gluon.jit
def softmax(s, m_i, l_i, score_scale, shift):
    """Go on with the softmax; return weights, maxima, masses and the factor of sums so far."""
    m_new = gl.maximum(m_i, gl.max(s, 1) * score_scale + shift)
    p = gl.exp2(s * score_scale - (m_new - shift)[:, None])
    alpha = gl.exp2(m_i - m_new)
    return p, m_new, l_i * alpha + gl.sum(p, 1), alpha
'''

_SCORE = '''\
@gluon.jit
def {name}({arguments}, t):
    """{purpose}."""
    slot, phase = ring(t, STAGES)
    mbarrier.wait(k_full.index(slot), phase)
    s = gl.zeros([OWN, BLOCK_N], gl.float32, SCORES)
{products}
'''

_PRODUCT = """\
    k = ks.index(slot).reshape([BLOCK_N, {d}]).permute((1, 0))
    {to} warpgroup_mma(q, k, s, use_acc={more}, is_async=True)"""

_BIASES = """\
    biases = bs.index(slot).reshape([BLOCK_N, {columns}]).permute((1, 0))
    s = warpgroup_mma(ones, biases, s, use_acc=False, is_async=True)
"""

_FINISHED = """
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(slot), count=1)
    return s"""

_SKIP = '''\
@gluon.jit
def skip_tile(k_full, k_empty, v_full, v_empty, t):
    """Leave a tile to the other consumers."""
    slot, phase = ring(t, STAGES)
    mbarrier.wait(k_full.index(slot), phase)
    mbarrier.arrive(k_empty.index(slot), count=1)
    mbarrier.wait(v_full.index(slot), phase)
    mbarrier.arrive(v_empty.index(slot), count=1)
'''

_ADD_VALUES = '''\
@gluon.jit
def add_values(p, alpha, acc, vs, v_full, v_empty, t):
    """Add the values of a tile."""
    slot, phase = ring(t, STAGES)
    p = gl.convert_layout(p.to(vs.dtype), WEIGHTS)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None]
    mbarrier.wait(v_full.index(slot), phase)
    v = vs.index(slot).reshape([BLOCK_N, {e}])
    acc = warpgroup_mma(p, v, acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_empty.index(slot), count=1)
    return acc
'''

_OVERLAP = '''\
@gluon.jit
def end_scores(s, k_empty, t):
    """Wait for the scores of a tile; the values of the one before may still be added."""
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(t % STAGES), count=1)
    return s


@gluon.jit
def begin_values(p, acc, vs, v_full, t):
    """Begin to add the values of a tile."""
    slot, phase = ring(t, STAGES)
    mbarrier.wait(v_full.index(slot), phase)
    return warpgroup_mma(p, vs.index(slot).reshape([BLOCK_N, {e}]), acc, is_async=True)


@gluon.jit
def end_values(acc, p, v_empty, t):
    """Wait until the values of a tile are added."""
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_empty.index(t % STAGES), count=1)
    return acc


@gluon.jit
def rescaled(acc, alpha, p, dtype: gl.constexpr):
    """Return sums as of the new maxima, and weights as an operand."""
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None]
    return acc, gl.convert_layout(p.to(dtype), WEIGHTS)
'''


def emit_steps(spec: KernelSpec, schedule: Schedule) -> list[str]:
    """Return the functions that consumers call."""
    d, overlap = spec.head_dim, schedule.overlap
    product = {more: partial(_PRODUCT.format, d=d, more=more) for more in (False, True)}
    finished = product[False](to="s =") + _FINISHED
    found = [
        _SKIP,
        _score("scores", "q, ks, k_full, k_empty", "Score the keys of a tile", finished),
    ]
    if overlap:
        begun = product[False](to="return")
        found.append(_score("begin_scores", "q, ks, k_full", "Begin to score them", begun))
    if schedule.product_bias:
        biased = _BIASES.format(columns=BIAS_COLUMNS)
        purpose = "core chunk tokens: their biases, each in three pieces, then products"
        if overlap:
            text = biased + product[True](to="return")
            called = ("begin_chunk_scores", "q, ones, ks, bs, k_full", f"Begin to s{purpose}")
        else:
            text = biased + product[True](to="s =") + _FINISHED
            called = ("chunk_scores", "q, ones, ks, bs, k_full, k_empty", f"S{purpose}")
        found.append(_score(*called, text))
    values = (_OVERLAP if overlap else _ADD_VALUES).format(e=spec.value_dim)
    return [*found, _SOFTMAX, values]


def _score(name: str, arguments: str, purpose: str, products: str) -> str:
    return _SCORE.format(name=name, arguments=arguments, purpose=purpose, products=products)


def emit_consumer(spec: KernelSpec, schedule: Schedule) -> str:
    """Return the function of a consumer."""
    out = Source()
    handed = "slots, barriers, lengths" + ", layout" * bool(layout(spec))
    called = f"c: gl.constexpr, {handed}, score_scale, out_ptr, lse_ptr"
    with out.block(f"@gluon.jit\ndef consumer({called}):"):
        out.lines(
            '"""Attend from the c-th 64 queries of one block after the other."""',
            *unpacked(spec, schedule),
            "blocks = gl.cdiv(queries, BLOCK_M)",
            "own = gl.arange(0, OWN, ROWS)",
            "offs_t = gl.arange(0, BLOCK_N, COLUMNS)",
        )
        if schedule.product_bias:
            out.lines(
                f"offs_p = gl.arange(0, {BIAS_COLUMNS}, gl.SliceLayout(0, ONES))",
                f"ones = gl.full([OWN, {BIAS_COLUMNS}], 1.0, gl.float32, ONES)",
                "ones = gl.where(offs_p[None, :] < 3, ones, 0.0).to(gl.bfloat16)",
            )
        out.line("t = 0")
        with out.block(items_loop(schedule)):
            out.lines(
                "bh, block = block_of(item, items, blocks)",
                "row = block * BLOCK_M",
                *_own_row(spec),
                *walk_bounds(spec),
                *own_bounds(spec, schedule),
            )
            _attend(out, spec, schedule)
            out.lines(*_store(spec))
    return out.text()


def _attend(out: Source, spec: KernelSpec, schedule: Schedule) -> None:
    out.lines("# Tiles that only later queries see.")
    with out.block("for _ in range(own_tiles, tiles):"):
        out.lines("skip_tile(k_full, k_empty, v_full, v_empty, t)", "t += 1")
    out.lines(
        "# The lowest finite maximum: a row that has seen nothing yet makes no NaN.",
        "m_i = gl.full([OWN], -3.4028234663852886e38, gl.float32, ROWS)",
        "l_i = gl.zeros([OWN], gl.float32, ROWS)",
        f"acc = gl.zeros([OWN, {spec.value_dim}], gl.float32, SUMS)",
    )
    if schedule.overlap:
        offset = "lo_first + (own_tiles - 1) * BLOCK_N"
        before, hidden = _masked(spec, schedule, "key", (LO, HI), offset)
        out.lines(
            "",
            f"# The first tile: {_FIRST if spec.causal else _FIRST_BOTH}",
            *before,
            "s = scores(q, ks, k_full, k_empty, t)",
            *hidden,
            "p, m_i, l_i, alpha = softmax(s, m_i, l_i, score_scale, 0.0)",
            "acc, p = rescaled(acc, alpha, p, vs.dtype)",
            "t += 1",
        )
    for walk in consumer_walks(spec, schedule):
        out.lines("", f"# {walk.purpose}")
        with out.block(walk.header("tile" if any(_hide(spec, schedule, walk)) else "_")):
            out.lines(*_tile(spec, schedule, walk), "t += 1")
    if schedule.overlap:
        out.lines(
            "",
            "# The values of the last tile",
            "acc = begin_values(p, acc, vs, v_full, t - 1)",
            "acc = end_values(acc, p, v_empty, t - 1)",
        )
    out.line("mbarrier.arrive(q_empty.index(at), count=1)")


def _own_row(spec: KernelSpec) -> list[str]:
    """Define where the row of a block begins, its flags, and bits of what was selected."""
    bits = own_bits(spec) if spec.selection_group else []
    row = ["b = bh // heads"] if bits or spec.documents == "padded" else []
    flags = ["flags = valid_ptr + gl.cast(b, gl.int64) * columns + start"]
    return [*row, *row_lines(spec), *(flags if spec.documents == "padded" else []), *bits]


def _masked(
    spec: KernelSpec, schedule: Schedule, source: scores.KeySource, mask: Mask, offset: str
) -> tuple[list[str], list[str]]:
    """Return how to hide what may not be attended: before a tile is scored, and after."""
    has_flags = spec.documents == "padded" and source == "key"
    terms = [part.text(keys_first=False) for part in mask] + ["valid[None, :]"] * has_flags
    if source == "chunk" and spec.selection_group:
        loads, is_left = unselected_by_specialists(spec, schedule.block_n)
        places = [f"offs_n = {offset} + offs_t"] if terms else []
        text = " & ".join([*terms, is_left])
        return [*loads, *places], [f's = gl.where({text}, s, float("-inf"))']
    if not terms:
        return [], []
    places, text, lines = [f"offs_n = {offset} + offs_t"], " & ".join(terms), []
    if any(isinstance(part, Either) for part in mask):  # too much for a line
        lines = [f"visible = {terms[0]}", *(f"visible = visible & {x}" for x in terms[1:])]
        text = "visible"
    hidden = [*lines, f's = gl.where({text}, s, float("-inf"))']
    if not has_flags:
        return [], places + hidden
    # They arrive while the tile does. What all own queries see ends before the row does.
    bound = "" if mask in ((), (LO,)) else f", mask=offs_t < keys - ({offset}), other=0"
    return [*places, f"valid = gl.load(flags + ({offset}) + offs_t{bound}) != 0"], hidden


def _hide(spec: KernelSpec, schedule: Schedule, walk: Walk) -> tuple[list[str], list[str]]:
    return _masked(spec, schedule, walk.source, walk.mask, walk.offset)


def _tile(spec: KernelSpec, schedule: Schedule, walk: Walk) -> list[str]:
    chunk = walk.source == "chunk"
    biased = chunk and schedule.product_bias
    operands = "q, ones, ks, bs, k_full" if biased else "q, ks, k_full"
    name = "chunk_scores" if biased else "scores"
    shift = math.log2(spec.chunk_size) if chunk and spec.whole_chunks else 0.0
    before, hidden = _hide(spec, schedule, walk)
    weights = f"softmax(s, m_i, l_i, score_scale, {shift})"
    if not schedule.overlap:
        return [
            *before,
            f"s = {name}({operands}, k_empty, t)",
            *hidden,
            f"p, m_i, l_i, alpha = {weights}",
            "acc = add_values(p, alpha, acc, vs, v_full, v_empty, t)",
        ]
    return [
        *before,
        f"s = begin_{name}({operands}, t)",
        "acc = begin_values(p, acc, vs, v_full, t - 1)",
        "s = end_scores(s, k_empty, t)",
        *hidden,
        f"weights, m_i, l_i, alpha = {weights}",
        "acc = end_values(acc, p, v_empty, t - 1)",
        "acc, p = rescaled(acc, alpha, weights, vs.dtype)",
    ]


def _store(spec: KernelSpec) -> list[str]:
    e = spec.value_dim
    return [
        "",
        "l_safe = gl.where(l_i == 0.0, 1.0, l_i)",
        "inverse = gl.convert_layout(1.0 / l_safe, gl.SliceLayout(1, SUMS))",
        "acc = acc * inverse[:, None]",
        "result = gl.convert_layout(acc.to(vs.dtype), RESULTS)",
        "own_row = row + c * OWN",
        "rows = gl.arange(0, OWN, gl.SliceLayout(1, RESULTS))",
        f"offs_e = gl.arange(0, {e}, gl.SliceLayout(0, RESULTS))",
        "state_row = gl.cast(bh, gl.int64) * queries + own_row",
        f"places = out_ptr + state_row * {e} + (rows * {e})[:, None] + offs_e[None, :]",
        "gl.store(places, result, mask=(own_row + rows < queries)[:, None])",
        f'lse = gl.where(l_i == 0.0, float("-inf"), (m_i + gl.log2(l_safe)) / {scores.LOG2E})',
        "gl.store(lse_ptr + state_row + own, lse, mask=own_row + own < queries)",
    ]
