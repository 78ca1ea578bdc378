"""The op ``flasheva::retrieval_attention``: exact attention inside the chunks that matter.

Its inputs are those of ``flasheva::attention``; its result is defined by
``kernels/reference/retrieval.py``. The third output is the selection, which has no gradient.
"""

# ruff: noqa: ANN401 - the op's functions are typed by their schemas
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flasheva_compile.implementations import Masks, retrieve, retrieve_backward, selection_shape
from flasheva_compile.op_checks import check_retrieval, require
from flasheva_compile.op_registration import differentiates, fakes, implements

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor rfa_k, Tensor rfa_v, Tensor rfa_bias"
_OPTIONAL = "Tensor? key_mask, Tensor? segment_ids, Tensor? alibi_slopes, Tensor? dropout_seed"
_OPTIONS = (
    "int retrieve_chunks, int retrieve_block, str retrieve_by, int window_size, int chunk_size, "
    "int sink_tokens, str window, bool causal, SymInt q_offset, float scale, float softcap, "
    "float dropout_p, str version"
)
_WEIGHT = "Tensor? selector_weight=None"  # by name, without gradient: ``differentiates`` skips it


@implements(
    "retrieval_attention",
    f"({_TENSORS}, {_OPTIONAL}, *, {_OPTIONS}, {_WEIGHT}) -> (Tensor, Tensor, Tensor)",
)
def _retrieval(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_retrieval(args[:6], args[6:], options)
    return retrieve(args[:3], args[3:6], Masks(*args[6:]), options)


@fakes("retrieval_attention")
def _(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_retrieval(args[:6], args[6:], options)
    q, _, v, *_ = args
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:3], dtype=accumulator)
    shape = selection_shape(q, args[3:6], Masks(*args[6:]), options)
    return q.new_empty(*q.shape[:3], v.shape[3]), lse, q.new_empty(shape, dtype=torch.int32)


@implements(
    "retrieval_attention_backward",
    f"(Tensor dout, Tensor out, Tensor lse, Tensor selected, {_TENSORS}, {_OPTIONAL}, *, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _retrieval_backward(
    dout: Tensor, out: Tensor, lse: Tensor, selected: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, ...]:
    result, masks = (out, lse, selected), Masks(*args[6:])
    return retrieve_backward(dout, result, args[:3], args[3:6], masks, options)


@fakes("retrieval_attention_backward")
def _(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in args[4:10])


def _context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    message = "alibi_slopes has no gradient"
    require(not ctx.needs_input_grad[8], message, "flasheva::retrieval_attention", "detach them")
    # The selection is given to the backward pass: what made it is not needed.
    ctx.options = {n: x for n, x in keyword_only_inputs.items() if n != "selector_weight"}
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output, *inputs)


def _gradient(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Any, ...]:
    backward = torch.ops.flasheva.retrieval_attention_backward
    grads = backward(dout, *ctx.saved_tensors, **ctx.options)
    return *grads, None, None, None, None


differentiates("retrieval_attention", _gradient, _context)
