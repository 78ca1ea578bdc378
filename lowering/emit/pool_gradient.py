"""Gradient of pooling, row by row: what each key and value adds through its chunk token.

Every key looks its chunk up, so no tile has to be aligned with chunks and any chunk size works. The
weights come back from the log-masses that the forward pass kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flasheva_compile.lowering.emit.scores import LOG2E

if TYPE_CHECKING:
    from flasheva_compile.lowering.emit.source import Dim
    from flasheva_compile.lowering.spec import KernelSpec


def pool_gradient(spec: KernelSpec, d: Dim, e: Dim) -> list[str]:
    """Add to ``dk``, ``dv`` of the keys at ``offs_n`` and store partial sums of parameters."""
    lines = ["# Pooling: each key adds to the gradient of its chunk token.", *_chunk_of_key(spec)]
    return lines + {"mean": _mean, "tangent": _tangent, "evabyte": _evabyte, "eva": _eva}[
        spec.chunk_rule or "mean"
    ](d, e)


def _chunk_of_key(spec: KernelSpec) -> list[str]:
    """Define ``chunk``, the slot of each key, and ``member``, whether it is pooled."""
    c = spec.chunk_size
    valid = " & valid" if spec.key_mask else ""
    if spec.documents == "packed":
        return [
            "position = offs_n - begin_n",
            f"chunk_begin = offs_n - position % {c}",
            f"chunk = chunk_begin // {c}",
            f"member = exists & (position >= 0){valid}",
            "member &= tl.load(chunk_first_ptr + b64 * chunks + chunk, mask=member, other=-1)"
            " == chunk_begin",
        ]
    if spec.documents == "padded":
        return [f"chunk = offs_n // {c} + first_slot", f"member = exists{valid}"]
    return [f"chunk = offs_n // {c}", f"member = exists{valid}"]


def gather(dim: Dim, tile: str, pointer: str) -> list[str]:
    """Load the row of each key's chunk, in fp32."""
    return [
        f"{tile}{n} = tl.load({pointer} + bhk64 * chunks * {dim.size} + ("
        f"chunk[:, None] * {dim.size} + offs_{dim.letter}{n}[None, :]), "
        f"mask={dim.mask(n, 'member')}, other=0.0).to(tl.float32)"
        for n in dim.indices
    ]


def _per_chunk(name: str, pointer: str) -> str:
    """Load a number of each key's chunk."""
    return f"{name} = tl.load({pointer} + bhk64 * chunks + chunk, mask=member, other=0.0)"


def _weights(name: str, logits: str, mass: str) -> list[str]:
    return [
        _per_chunk("mass", mass),
        f"logits = {logits}",
        f"{name} = tl.where(member, tl.exp2((logits - mass) * {LOG2E}), 0.0)",
    ]


def _spread(tile: str, weights: str, gradient: str, dim: Dim) -> list[str]:
    return [f"{tile}{n} += {weights}[:, None] * {gradient}{n}" for n in dim.indices]


def _vector(name: str, pointer: str, dim: Dim) -> list[str]:
    """Load one of the head's parameter vectors, in fp32."""
    lines = []
    for n in dim.indices:
        bound = dim.bound(n)
        guard = f", mask=offs_d{n} < {dim.size}, other=0.0" if bound else ""
        lines.append(
            f"{name}{n} = tl.load({pointer} + hk * {dim.size} + offs_d{n}{guard}).to(tl.float32)"
        )
    return lines


def _dot(tile: str, vector: str, dim: Dim) -> str:
    return " + ".join(f"tl.sum({tile}{n} * {vector}{n}[None, :], 1)" for n in dim.indices)


def _partial(pointer: str, terms: str, dim: Dim) -> list[str]:
    """Store this program's part of a parameter vector's gradient."""
    lines = []
    for n in dim.indices:
        guard = f", mask=offs_d{n} < {dim.size}" if dim.bound(n) else ""
        value = terms.replace("#", str(n))
        lines.append(
            f"tl.store({pointer} + (bhk64 * tiles_n + tile_n) * {dim.size} + offs_d{n}, "
            f"tl.sum({value}, 0){guard})"
        )
    return lines


def _mean(d: Dim, e: Dim) -> list[str]:
    return [
        _per_chunk("log_count", "rfa_bias_ptr"),
        f"w = tl.where(member, tl.exp2(-log_count * {LOG2E}), 0.0)",
        *gather(d, "gk", "drfa_k_ptr"),
        *_spread("dk", "w", "gk", d),
        *gather(e, "gv", "drfa_v_ptr"),
        *_spread("dv", "w", "gv", e),
    ]


def _inner(name: str, tile: str, pooled: str, gradient: str, dim: Dim) -> list[str]:
    """Define ``name``: how much more a key moves its chunk's loss than the chunk's mean does.

    ``sum_x (tile - pooled) * gradient`` is ``dw - sum_m w_m dw_m`` of a softmax's backward.
    """
    terms = (
        f"tl.sum(({tile}{n}.to(tl.float32) - {pooled}{n}) * {gradient}{n}, 1)" for n in dim.indices
    )
    return [f"{name} = {' + '.join(terms)}"]


def _tangent(d: Dim, e: Dim) -> list[str]:
    # One pair of tiles at a time: more of them at once would spill.
    return [
        *_vector("phi", "phi_ptr", d),
        f"key_dot = {_dot('k', 'phi', d)}",
        *_weights("w", "scale * key_dot", "mass_k_ptr"),
        _per_chunk("gb", "drfa_bias_ptr"),
        *gather(d, "gk", "drfa_k_ptr"),
        # bias = log-mass - s phi.rfa_k: the second term adds to the gradient of rfa_k.
        *(f"gk{n} -= scale * gb[:, None] * phi{n}[None, :]" for n in d.indices),
        *gather(d, "mk", "rfa_k_ptr"),
        *_inner("inner_k", "k", "mk", "gk", d),
        *_spread("dk", "w", "gk", d),
        *gather(e, "gv", "drfa_v_ptr"),
        *gather(e, "mv", "rfa_v_ptr"),
        *_inner("inner_v", "v", "mv", "gv", e),
        *_spread("dv", "w", "gv", e),
        "dlogit = scale * w * (inner_k + inner_v + gb)",
        *(f"dk{n} += dlogit[:, None] * phi{n}[None, :]" for n in d.indices),
        "dcentre = dlogit - scale * gb * w",
        *_partial("dphi_ptr", "dcentre[:, None] * k#.to(tl.float32)", d),
    ]


def _value_logits(d: Dim, e: Dim, dot: str) -> list[str]:
    """Weigh values around a centre, add their gradients, and define that of their logits."""
    square = " + ".join(f"tl.sum(k{n}.to(tl.float32) * k{n}, 1)" for n in d.indices)
    return [
        f"square = {square}",
        f"centre_dot = {dot}",
        *_weights("wv", "scale * (centre_dot - 0.5 * square)", "mass_v_ptr"),
        *gather(e, "gv", "drfa_v_ptr"),
        *gather(e, "mv", "rfa_v_ptr"),
        *_inner("inner_v", "v", "mv", "gv", e),
        *_spread("dv", "wv", "gv", e),
        "dvalue = scale * wv * inner_v",
    ]


def _evabyte(d: Dim, e: Dim) -> list[str]:
    return [
        *_vector("phi", "phi_ptr", d),
        f"key_dot = {_dot('k', 'phi', d)}",
        *_weights("w", "key_dot", "mass_k_ptr"),
        *gather(d, "gk", "drfa_k_ptr"),
        *gather(d, "mk", "rfa_k_ptr"),
        *_inner("inner_k", "k", "mk", "gk", d),
        *_spread("dk", "w", "gk", d),
        "dkey = w * inner_k",
        *(f"dk{n} += dkey[:, None] * phi{n}[None, :]" for n in d.indices),
        *_partial("dphi_ptr", "dkey[:, None] * k#.to(tl.float32)", d),
        *_vector("pv", "p_ptr", d),
        *_value_logits(d, e, _dot("k", "pv", d)),
        *(f"dk{n} += dvalue[:, None] * (pv{n}[None, :] - k{n})" for n in d.indices),
        *_partial("dp_ptr", "dvalue[:, None] * k#.to(tl.float32)", d),
    ]


def _eva(d: Dim, e: Dim) -> list[str]:
    centre = " + ".join(f"tl.sum(k{n} * centre{n}, 1)" for n in d.indices)
    return [
        *gather(d, "centre", "omega_ptr"),
        *_value_logits(d, e, centre),
        *(f"dk{n} += dvalue[:, None] * (centre{n} - k{n})" for n in d.indices),
    ]
