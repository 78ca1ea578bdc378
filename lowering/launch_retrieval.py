"""Launches of the retrieval tier's forward pass: select, attend to the rest, then to the selected.

Three launches, with bounds a fourth before them; no atomics: every run gives the same bits.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from flasheva_compile.kernels.blocked.retrieval_select import group_size
from flasheva_compile.lowering import launch
from flasheva_compile.lowering.attention_spec import attention_spec
from flasheva_compile.lowering.direct_launch import on_device
from flasheva_compile.lowering.emit.retrieval_forward_attend import group_queries
from flasheva_compile.lowering.emit.selection_bits import WORD
from flasheva_compile.lowering.schedule import current_target
from flasheva_compile.lowering.schedule_retrieval import MOST_HEADS, smallest_fits

if TYPE_CHECKING:
    from collections.abc import Callable

    from flasheva_compile.kernels.blocked.block import Operands
    from flasheva_compile.kernels.blocked.geometry import AttentionSettings
    from flasheva_compile.kernels.blocked.retrieval_select import Retrieval
    from flasheva_compile.lowering.rows import Rows
    from flasheva_compile.lowering.spec import KernelSpec, Schedule
    from torch import Tensor

_MOST_CHUNKS = 32  # a longer list does not fit beside the scores
_SPARE_WORDS = 4  # the last tile may reach beyond the last chunk


def covers(t: Operands, rows: Rows, s: AttentionSettings, retrieval: Retrieval) -> bool:
    """Whether kernels compute this call; the blocked code computes the others."""
    group = t.q.shape[1] // t.k.shape[1]
    plain = rows.documents != "packed" and s.dropout_p == 0
    few = 0 < retrieval.chunks <= _MOST_CHUNKS and group <= MOST_HEADS
    return few and plain and 0 not in t.q.shape and _fits(t, group, retrieval)


def _fits(t: Operands, group: int, retrieval: Retrieval) -> bool:
    """Whether wide heads leave ``select`` room for queries, and their magnitudes with bounds."""
    row_bytes = t.q.shape[3] * t.q.element_size() * (2 if retrieval.by == "bounds" else 1)
    with on_device(t.q.device):
        return smallest_fits(group, row_bytes, current_target())


def retrieval_forward(
    t: Operands, rows: Rows, s: AttentionSettings, retrieval: Retrieval
) -> tuple[Tensor, Tensor, Tensor]:
    """Select and attend; see ``kernels/blocked/retrieval.py``.

    Args:
        t: The tensors of the call.
        rows: Their layout.
        s: Window, chunks, scale and so on.
        retrieval: How many chunks, for how many queries at once, and by what.

    Returns:
        ``out [B, Hq, L, Dv]``, fp32 ``lse [B, Hq, L]`` and the int32 slots of the selected chunks,
        ``[B, Hkv, groups, min(chunks, C)]``, ascending, then -1.

    Source:
        Ours; the formula is ``kernels/reference/retrieval.py``.
    """
    values = _values(t, rows, s, retrieval)
    for step in _steps(values, t, rows, s, retrieval).values():
        step()
    return values["out_ptr"], values["lse_ptr"], values["selected_ptr"]


def steps(
    t: Operands, rows: Rows, s: AttentionSettings, retrieval: Retrieval
) -> dict[str, Callable[[], None]]:
    """Return the launches by kind, to be timed: each needs those before it."""
    return _steps(_values(t, rows, s, retrieval), t, rows, s, retrieval)


def _steps(
    values: dict[str, Any], t: Operands, rows: Rows, s: AttentionSettings, retrieval: Retrieval
) -> dict[str, Callable[[], None]]:
    of = specs(t, rows, s, retrieval)
    (batch, heads, length, _), kv_rows = t.q.shape, t.q.shape[0] * t.k.shape[1]
    groups = values["selected_ptr"].shape[2]
    # ``select`` computes in natural units.
    natural = values | {"softcap": s.softcap}
    natural |= {} if s.softcap else {"score_scale": s.scale}
    of_keys = values | {"heads": t.k.shape[1]}

    def parts(how: Schedule) -> int:
        return -(-group_queries(of["retrieve"]) // how.block_m)

    def programs_of_bounds(how: Schedule) -> int:
        return kv_rows * -(-t.rfa_bias.shape[2] // how.block_n)

    def programs_of_select(how: Schedule) -> int:
        return kv_rows * -(-groups // how.block_m)

    def programs_of_forward(how: Schedule) -> int:
        return batch * heads * -(-length // how.block_m)

    def programs_of_retrieve(how: Schedule) -> int:
        return kv_rows * groups * parts(how)

    launched = {
        "chunk_bounds": (programs_of_bounds, of_keys),
        "select": (programs_of_select, natural),
        "forward": (programs_of_forward, values),
        "retrieve": (programs_of_retrieve, values),
    }

    def step(kind: str) -> None:
        programs, read = launched[kind]
        launch.run(of[kind], programs, launch.with_bias_columns(of[kind], read))

    return {kind: partial(step, kind) for kind in of}


def specs(
    t: Operands, rows: Rows, s: AttentionSettings, retrieval: Retrieval
) -> dict[str, KernelSpec]:
    """Return the specs of the kernels, by their kinds, in the order of their launches."""
    group = group_size(retrieval.block, uniform=rows.documents == "dense")
    forward = attention_spec(t, s, rows, None)
    forward = dataclasses.replace(forward, selection_group=group)
    select = dataclasses.replace(
        forward,
        kind="select",
        retrieve_chunks=retrieval.chunks,
        retrieve_block=retrieval.block,
        value_dim=forward.head_dim,  # it reads no values, nor which keys are valid
        key_mask=False,
        by_bounds=retrieval.by == "bounds",
    )
    retrieve = dataclasses.replace(
        forward, kind="retrieve", window_size=0, sink_size=0, window="sliding", whole_chunks=False
    )
    found = [select, forward, retrieve]
    if select.by_bounds:
        own = {"value_dim": forward.head_dim, "selection_group": 0}
        own["weighted_bounds"] = retrieval.weight is not None
        found.insert(0, dataclasses.replace(forward.of_kind("chunk_bounds"), **own))
    return {spec.kind: spec for spec in found}


def _values(t: Operands, rows: Rows, s: AttentionSettings, retrieval: Retrieval) -> dict[str, Any]:
    """Return what the launches read, results allocated."""
    batch, heads, length, _ = t.q.shape
    kv_heads, slots = t.rfa_bias.shape[1:]
    group = group_size(retrieval.block, uniform=rows.documents == "dense")
    groups, picks, words = -(-length // group), min(retrieval.chunks, slots), -(-slots // WORD)
    words += _SPARE_WORDS

    def integers(*shape: int) -> Tensor:
        return t.q.new_empty(batch, kv_heads, *shape, dtype=torch.int32)

    bounded = slots if retrieval.by == "bounds" else 0
    weight = {} if retrieval.weight is None else {"selector_weight_ptr": retrieval.weight}
    return {
        **launch.call_values(t, rows, s),
        "out_ptr": t.q.new_empty(batch, heads, length, t.v.shape[3]),
        "lse_ptr": t.q.new_empty((batch, heads, length), dtype=torch.float32),
        "bounds_ptr": t.k.new_empty(batch, kv_heads, bounded, 2 * t.k.shape[3]),
        "selected_ptr": integers(groups, picks),
        "bits_ptr": integers(words, groups),
        "picks": picks,
        "words": words,
        **weight,
    }
