"""Launches of the retrieval tier's backward pass, the selection given.

The kernels of one attention, which leave out the chunk tokens that were selected, and between them
two that read by index: queries their retrieved keys, and each chunk the queries that retrieved it.
No atomics: every run gives the same bits, and a row alone the same as in a batch.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from flasheva_compile.kernels.blocked.retrieval_select import group_size
from flasheva_compile.lowering import launch, launch_retrieval
from flasheva_compile.lowering.attention_spec import attention_spec
from flasheva_compile.lowering.emit.retrieval_backward_bits import GROUPS
from flasheva_compile.lowering.emit.retrieval_backward_keys import chunk_parts
from flasheva_compile.lowering.emit.retrieval_forward_attend import group_queries
from flasheva_compile.lowering.emit.selection_bits import WORD
from flasheva_compile.lowering.selection_lists import selection_lists

if TYPE_CHECKING:
    from collections.abc import Callable

    from flasheva_compile.kernels.blocked.block import Operands
    from flasheva_compile.kernels.blocked.geometry import AttentionSettings
    from flasheva_compile.kernels.blocked.retrieval_select import Retrieval
    from flasheva_compile.lowering.rows import Rows
    from flasheva_compile.lowering.spec import KernelSpec, Schedule
    from torch import Tensor

_ROWS_OF_A_PIECE = 2048  # queries times heads that one program of a chunk walks over
_SPARE_WORDS = 4  # the last tile may reach beyond the last chunk
_NUMBERS = 2**31  # that int32 can tell apart

GRADIENTS = ("dq_ptr", "dk_ptr", "dv_ptr", "drfa_k_ptr", "drfa_v_ptr", "drfa_bias_ptr")


def covers(
    t: Operands, rows: Rows, s: AttentionSettings, retrieval: Retrieval, selected: Tensor
) -> bool:
    """Whether kernels compute this call; the blocked code computes the others."""
    batch, kv_heads, slots = t.rfa_bias.shape
    few = max(selected.numel(), batch * kv_heads * (slots + 1)) < _NUMBERS
    return few and launch_retrieval.covers(t, rows, s, retrieval)


def retrieval_backward(
    dout: Tensor,
    result: tuple[Tensor, Tensor, Tensor],
    t: Operands,
    rows: Rows,
    s: AttentionSettings,
    retrieval: Retrieval,
) -> tuple[Tensor, ...]:
    """Differentiate :func:`flasheva_compile.lowering.launch_retrieval.retrieval_forward`.

    Args:
        dout: Gradient of ``out``, ``[B, Hq, L, Dv]``.
        result: ``out``, ``lse`` and the selection of the forward pass; the last two have no
            gradient.
        t: The tensors of the call.
        rows: Their layout.
        s: Window, chunks, scale and so on.
        retrieval: How many chunks, and for how many queries at once.

    Returns:
        ``dq, dk, dv`` in the dtypes of the inputs, then fp32 ``drfa_k, drfa_v, drfa_bias``.

    Source:
        Ours; the formula is the gradient of ``kernels/reference/retrieval.py``.
    """
    values = _values(dout, result, t, rows, s)
    for step in _steps(values, t, rows, s, retrieval).values():
        step()
    like = (t.q, t.k, t.v, t.rfa_k, t.rfa_v, t.rfa_bias)
    return tuple(values[name].view(x.shape) for name, x in zip(GRADIENTS, like, strict=True))


def steps(
    dout: Tensor,
    result: tuple[Tensor, Tensor, Tensor],
    t: Operands,
    rows: Rows,
    s: AttentionSettings,
    retrieval: Retrieval,
) -> dict[str, Callable[[], None]]:
    """Return the steps of :func:`retrieval_backward`, to be timed: each needs those before it."""
    return _steps(_values(dout, result, t, rows, s), t, rows, s, retrieval)


def specs(
    t: Operands, rows: Rows, s: AttentionSettings, retrieval: Retrieval
) -> dict[str, KernelSpec]:
    """Return the specs of the kernels, by their kinds, in the order of their launches."""
    group = group_size(retrieval.block, uniform=rows.documents == "dense")
    whole = dataclasses.replace(attention_spec(t, s, rows, None), selection_group=group)
    bits = dataclasses.replace(
        whole.of_kind("dq"),
        kind="selection_bits",
        dtype="fp32",  # it reads integers alone
        head_dim=1,
        value_dim=1,
        key_mask=False,
        softcap=False,
        alibi=False,
        negative_scale=False,
        tf32=False,
        retrieve_chunks=retrieval.chunks,
    )
    nowhere: dict[str, Any] = {"window_size": 0, "sink_size": 0, "window": "sliding"}
    queries = dataclasses.replace(whole, kind="retrieved_dq", **nowhere)
    keys = dataclasses.replace(whole, kind="retrieved_dkv", key_mask=False, **nowhere)
    found = [bits, whole.of_kind("dq"), queries, keys, whole.of_kind("dchunk")]
    if whole.sink_size:
        found.append(dataclasses.replace(whole.of_kind("dsink"), selection_group=0))
    return {spec.kind: spec for spec in (*found, whole.of_kind("dkv"))}


def _steps(
    values: dict[str, Any], t: Operands, rows: Rows, s: AttentionSettings, retrieval: Retrieval
) -> dict[str, Callable[[], None]]:
    of = specs(t, rows, s, retrieval)
    kv_rows = t.q.shape[0] * t.k.shape[1]
    groups = values["selected_ptr"].shape[2]

    def programs_of_bits(_: Schedule) -> int:
        return kv_rows * -(-groups // GROUPS)

    def programs_of_queries(how: Schedule) -> int:
        parts = -(-group_queries(of["retrieved_dq"]) // how.block_m)
        return kv_rows * groups * parts

    def programs_of_pieces(how: Schedule) -> int:
        return kv_rows * values["pieces"] * chunk_parts(of["retrieved_dkv"], how)

    def dchunk() -> None:
        grads = launch.chunk_gradients(of["dchunk"], values, kv_rows)
        values.update(zip(GRADIENTS[3:], grads, strict=True))

    def dkv() -> None:
        launch.run_over_keys(of["dkv"], values, kv_rows)

    found: dict[str, Callable[[], None]] = {
        "lists": lambda: values.update(_lists(values, t, of["retrieved_dkv"])),
        "selection_bits": lambda: launch.run(of["selection_bits"], programs_of_bits, values),
        "dq": lambda: launch.run(of["dq"], launch.query_programs(t), values),
        "retrieved_dq": lambda: launch.run(of["retrieved_dq"], programs_of_queries, values),
        "retrieved_dkv": lambda: launch.run(of["retrieved_dkv"], programs_of_pieces, values),
        "dchunk": dchunk,
    }
    if "dsink" in of:
        sinks = launch.sink_gradients
        found["dsink"] = lambda: values.update(sinks(of["dsink"], values, kv_rows))
    return found | {"dkv": dkv}


def _values(
    dout: Tensor,
    result: tuple[Tensor, Tensor, Tensor],
    t: Operands,
    rows: Rows,
    s: AttentionSettings,
) -> dict[str, Any]:
    """Return what the kernels read that needs no computing, results allocated."""
    out, lse, selected = result
    batch, kv_heads, groups, picks = selected.shape
    words, group_words = (-(-n // WORD) + _SPARE_WORDS for n in (t.rfa_bias.shape[2], groups))

    def integers(*shape: int) -> Tensor:
        return t.q.new_empty(batch, kv_heads, *shape, dtype=torch.int32)

    return {
        **launch.backward_values(dout, out, lse, t, rows, s),
        "selected_ptr": selected.contiguous(),
        "bits_ptr": integers(words, groups),
        "turned_ptr": integers(group_words, WORD * words),
        "dk_ptr": t.k.new_empty(t.k.shape),
        "dv_ptr": t.v.new_empty(t.v.shape),
        "picks": picks,
        "words": words,
        "group_words": group_words,
    }


def _lists(values: dict[str, Any], t: Operands, spec: KernelSpec) -> dict[str, Any]:
    """Turn the selection round; allocate a part of the gradients for each piece of a list."""
    chunks = t.rfa_bias.shape[2]
    piece_size = max(1, _ROWS_OF_A_PIECE // group_queries(spec))
    lists = selection_lists(values["selected_ptr"], chunks, piece_size)
    kv_rows, pieces = lists.piece_chunk.shape

    def part(dim: int) -> Tensor:
        shape = (kv_rows, pieces, spec.chunk_size, dim)
        return t.q.new_empty(shape, dtype=torch.float32)

    return {
        "members_ptr": lists.members,
        "first_member_ptr": lists.first_member,
        "first_piece_ptr": lists.first_piece,
        "piece_chunk_ptr": lists.piece_chunk,
        "pieces": pieces,
        "piece_size": piece_size,
        "dk_parts_ptr": part(spec.head_dim),
        "dv_parts_ptr": part(spec.value_dim),
    }
