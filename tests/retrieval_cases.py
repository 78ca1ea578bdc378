"""Runs of the retrieval tier on attention cases: the op, its selection, the reference."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from flasheva_compile.kernels.blocked.retrieval_select import group_size
from flasheva_compile.kernels.reference.retrieval import retrieval_attention

from flasheva_compile.op_checks import OP_VERSION
from flasheva_compile.ops import eva_features

if TYPE_CHECKING:
    from tests.attention_cases import AttentionCase

ALL = 1000  # chunks, more than any case has


def selector(case: AttentionCase, by: str) -> dict[str, object]:
    """Return the options of a selector: ``token``, ``bounds``, or ``weighted`` bounds."""
    if by != "weighted":
        return {"retrieve_by": by}
    weight = case._normal(9, case.kv_heads, 3, case.head_dim)
    return {"retrieve_by": "bounds", "selector_weight": weight}


def op_arguments(case: AttentionCase, dtype: torch.dtype, chunks: int, block: int, **changes):
    """Return the positional and keyword arguments of ``flasheva::retrieval_attention``."""
    q, k, v, *parameters = (x.to(dtype) for x in case.leaves)
    scale, masks = case.head_dim**-0.5, tuple(case.masks.values())
    shared = {"chunk_size": case.chunk_size, "scale": scale, "version": OP_VERSION}

    def tokens(rule, values, p):
        return torch.ops.flasheva.chunk_tokens(k, values, list(p), *masks, rule=rule, **shared)

    if case.rule == "eva":
        parameters = eva_features(q, k, tokens, parameters, None)
    slopes = case._normal(7, q.shape[1]).to(dtype) / 8 if case.alibi else None
    names = ("window_size", "sink_tokens", "window", "causal", "q_offset", "softcap")
    options = {name: getattr(case, name) for name in names} | shared
    options |= {"retrieve_chunks": chunks, "retrieve_block": block, "retrieve_by": "token"}
    options |= {"dropout_p": 0.0, **changes}
    return (q, k, v, *tokens(case.rule, v, parameters), *masks, slopes, None), options


def selection(
    case: AttentionCase, dtype: torch.dtype, chunks: int, block: int = 1, by: str = "token"
):
    """Return what the op selects, ``[B, Hkv, L, C]`` bool."""
    arguments, options = op_arguments(case, dtype, chunks, block, **selector(case, by))
    slots = torch.ops.flasheva.retrieval_attention(*arguments, **options)[2].long()
    count = arguments[5].shape[2]
    found = torch.zeros(*slots.shape[:3], count + 1, dtype=torch.bool)
    found.scatter_(3, torch.where(slots < 0, count, slots), True)
    group = group_size(block, uniform=case.mask == "none")
    return found[..., :count].repeat_interleave(group, 2)[:, :, : case.queries]


def reference(
    case: AttentionCase,
    chunks: int,
    block: int = 1,
    own: torch.dtype | None = None,
    by: str = "token",
):
    """Return the formula for ``assert_as_accurate_as_pytorch``.

    In fp64 it selects by itself, unless ``own`` is given: then the op's selection in that
    precision stands. Other precisions always get one, or rounding would choose other chunks.
    """
    chosen = selection(case, own or torch.float64, chunks, block, by)
    options = {"retrieve_chunks": chunks, "retrieve_block": block, **selector(case, by)}

    def formula(dtype: torch.dtype):
        given = None if dtype == torch.float64 and own is None else chosen
        attend = partial(retrieval_attention, selected=given, **options)
        return case.run(lambda *a, **o: attend(*a, **o), dtype)

    return formula
