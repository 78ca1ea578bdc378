"""Pooling over a cache by the ``eva`` rule: mean queries, feature maps, then weights around both.

The cache keeps a mean query for each key of the chunk that is open. A complete chunk is read twice:
once for its means, once around what the feature maps make of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit.chunk_fp8 import store_chunk_token
from flasheva_compile.lowering.emit.scores import LOG2E

if TYPE_CHECKING:
    from flasheva_compile.lowering.emit.source import Dim, Source
    from flasheva_compile.lowering.spec import KernelSpec

MEMBERS = 8
"""Keys of the chunk per tile: what pooling keeps in registers must not limit attention."""

FEATURE_FUNCTION = '''\
@triton.jit
def feature_map(
    x, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr,
    size: tl.constexpr, padded: tl.constexpr,
):
    """LayerNorm of a linear layer of one row, [1, padded]: zeros beyond ``size``."""
    offs_out = tl.arange(0, padded)
    is_column = offs_out < size
    parts = x.reshape(padded // 16, 16)
    total = tl.zeros([16, padded], tl.float32)
    for n in range(padded // 16):
        is_part = (tl.arange(0, padded // 16) == n)[:, None]
        offs_in = n * 16 + tl.arange(0, 16)
        weight = tl.load(
            weight_ptr + offs_out[None, :] * size + offs_in[:, None],
            mask=is_column[None, :] & (offs_in < size)[:, None],
            other=0.0,
        )
        total += tl.sum(tl.where(is_part, parts, 0.0), 0)[:, None] * weight.to(tl.float32)
    y = tl.sum(total, 0) + tl.load(bias_ptr + offs_out, mask=is_column, other=0.0).to(tl.float32)
    y = tl.where(is_column, y - tl.sum(y, 0) / size, 0.0)
    y *= 1.0 / tl.sqrt(tl.sum(y * y, 0) / size + 1e-5)
    y *= tl.load(norm_weight_ptr + offs_out, mask=is_column, other=0.0).to(tl.float32)
    y += tl.load(norm_bias_ptr + offs_out, mask=is_column, other=0.0).to(tl.float32)
    return y[None, :]
'''


def keeps_queries(spec: KernelSpec) -> bool:
    """Whether the cache keeps mean queries of the chunk that is not complete."""
    return spec.chunk_rule == "eva"


def open_queries(spec: KernelSpec) -> str:
    """Move the pointer of the mean queries to row ``b`` and key head ``hk``."""
    return f"open_q_ptr += bh64 * {spec.chunk_size * spec.head_dim}"


def store_query(spec: KernelSpec, d: Dim) -> list[str]:
    """Keep the mean of the query heads in ``q``, ``[BLOCK_G, D]``, as ``new_mq``."""
    kept = ".to(open_q_ptr.dtype.element_ty)"
    means = (f"(tl.sum(q{n}.to(tl.float32), 0) / {spec.group})[None, :]" for n in d.indices)
    return [
        open_queries(spec),
        *(f"new_mq{n} = {mean}{kept}" for n, mean in zip(d.indices, means, strict=True)),
        *d.store_row("new_mq", f"open_q_ptr + position % {spec.chunk_size} * {d.size}"),
    ]


def new_queries(spec: KernelSpec, d: Dim, token: str, bound: str) -> list[str]:
    """Load mean queries of ``MEMBERS`` new tokens as the cache keeps them, ``new_mq0``, ...

    Args:
        spec: What the kernel computes.
        d: The columns of queries.
        token: Which tokens.
        bound: Which of them exist.
    """
    heads = f"q_ptr + (hk * {spec.group} + g) * tl.cast(stride_qh, tl.int64)"
    load = d.load("q_of_head", "head_ptr", token, "tl.cast(stride_qm, tl.int64)", bound)
    return [
        *d.zeros("new_mq", str(MEMBERS)),
        f"for g in range({spec.group}):",
        f"    head_ptr = {heads}",
        *(f"    {line}" for line in load),
        *(f"    new_mq{n} += q_of_head{n}.to(tl.float32)" for n in d.indices),
        *(f"new_mq{n} = (new_mq{n} / {spec.group}).to(q_ptr.dtype.element_ty)" for n in d.indices),
    ]


def query_pointer() -> str:
    """Move the pointer of the new queries to row ``b``."""
    return "q_ptr += b64 * stride_qb"


def pool_by_features(
    out: Source, spec: KernelSpec, d: Dim, e: Dim, seen: list[str], loads: dict[str, list[str]]
) -> None:
    """Store the chunk token ``chunk``.

    Args:
        out: Where the lines go.
        spec: What the kernel computes.
        d: The columns of keys and queries.
        e: The columns of values.
        seen: Defines ``seen``, which of the keys from ``member`` on exist.
        loads: Loads their rows in fp32, by name: ``"mq"``, mean queries; ``"k"``; ``"v"``.
    """
    members = f"for member in range(0, {spec.chunk_size}, {MEMBERS}):"
    out.lines("l_n = tl.zeros([1], tl.float32)", *d.zeros("smq", "1"), *d.zeros("sk", "1"))
    out.lines(*place_start(spec))
    with out.block(members):
        out.lines(*seen, "w_n = seen.to(tl.float32)", "l_n += tl.sum(w_n, 0)")
        out.lines(*place_members(spec))
        out.lines(*loads["mq"], *_add("mq", "n", d), *loads["k"], *_add("k", "n", d))
    out.lines("filled = l_n > 0.0", "l_n = tl.where(filled, l_n, 1.0)", *_features(spec, d))
    out.lines(
        "m_v = tl.full([1], -3.4028234663852886e38, tl.float32)",
        "l_v = tl.zeros([1], tl.float32)",
        *e.zeros("sv", "1"),
    )
    with out.block(members):
        out.lines(*seen, *loads["k"], *_value_weights(d), *e.scale("sv", "a_v[:, None]"))
        out.lines(*loads["v"], *_add("v", "v", e))
    out.lines(
        "l_v = tl.where(filled, l_v, 1.0)",
        *e.scale("sv", "(1.0 / l_v)[:, None]"),
        "chunk64 = chunk.to(tl.int64)",
        *store_chunk_token(spec, d, e),
        'pooled_bias = tl.where(filled, 0.0, float("-inf"))',
        "tl.store(rfa_bias_ptr + chunk64 + tl.arange(0, 1), pooled_bias)",
        *place_result(spec),
    )


# --- where a chunk stands, for ALiBi --------------------------------------------------------------


def place_start(spec: KernelSpec) -> list[str]:
    """Start the sum of the places of a chunk's valid tokens within it."""
    return ["l_at = tl.zeros([1], tl.float32)"] if spec.alibi else []


def place_members(spec: KernelSpec) -> list[str]:
    """Add those at ``at`` that are ``seen``."""
    return ["l_at += tl.sum(w_n * at.to(tl.float32), 0)"] if spec.alibi else []


def place_result(spec: KernelSpec) -> list[str]:
    """Store the mean position of the chunk ``chunk``, the same for every head."""
    if not spec.alibi:
        return []
    return [
        f"mean = (chunk * {spec.chunk_size}).to(tl.float32) + l_at / tl.maximum(l_n, 1.0)",
        "mean = tl.where(filled, mean, 0.0)",
        "tl.store(chunk_mean_ptr + chunk64 + tl.arange(0, 1), mean, mask=hk == 0)",
    ]


# --- the parts of pooling -------------------------------------------------------------------------


def _add(name: str, weight: str, dim: Dim) -> list[str]:
    return [
        f"s{name}{n} += tl.sum(w_{weight}[:, None] * {name}{n}, 0)[None, :]" for n in dim.indices
    ]


def _features(spec: KernelSpec, d: Dim) -> list[str]:
    """Define ``sk``, the chunk token's key, and ``omega``, what values are weighed around."""
    ((_, padded),) = d.parts  # of one part: a feature map mixes all columns
    lines = [*d.scale("smq", "(1.0 / l_n)[:, None]"), *d.scale("sk", "(1.0 / l_n)[:, None]")]
    for side, mean in (("q", "smq0"), ("k", "sk0")) if spec.parameters else ():
        names = ("weight", "bias", "norm_weight", "norm_bias")
        pointers = ", ".join(f"{side}_{name}_ptr" for name in names)
        lines.append(f"{mean} = feature_map({mean}, {pointers}, {d.size}, {padded})")
    return [
        *lines,
        "omega0 = smq0 + sk0",
        "sk0 = tl.where(filled[:, None], sk0, 0.0)",
    ]


def _value_weights(d: Dim) -> list[str]:
    return [
        f"square = {d.row_sum('k', 'k')}",
        f"x = scale * ({d.row_sum('k', 'omega')} - 0.5 * square)",
        'x = tl.where(seen, x, float("-inf"))',
        "m_new = tl.maximum(m_v, tl.max(x, 0))",
        f"a_v = tl.exp2((m_v - m_new) * {LOG2E})",
        f"w_v = tl.exp2((x - m_new) * {LOG2E})",
        "l_v = l_v * a_v + tl.sum(w_v, 0)",
        "m_v = m_new",
    ]
