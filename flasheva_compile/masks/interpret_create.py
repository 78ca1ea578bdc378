"""Meanings of ATen ops that create tensors or copy them with another dtype."""

from __future__ import annotations

import torch

from flasheva_compile.masks.interpret import Call, interprets
from flasheva_compile.masks.symbolic import SymbolicTensor, broadcast, constant
from flasheva_compile.masks.values import NotInterpretedError, as_number, literal


@interprets("arange", "iota")
def arange(call: Call) -> SymbolicTensor:
    """``start + step * i``."""
    start, step = call.scalar("start"), call.scalar("step", 1)
    if call.dtype == torch.bool:
        raise NotInterpretedError("arange of bool")
    return SymbolicTensor(call.shape, None, lambda i: start + step * i[0])


@interprets("ones", "new_ones", "ones_like")
def ones(call: Call) -> SymbolicTensor:
    """One everywhere."""
    return constant(literal(1), call.shape)


@interprets("zeros", "new_zeros", "zeros_like", "zero")
def zeros(call: Call) -> SymbolicTensor:
    """Zero everywhere."""
    return constant(literal(0), call.shape)


@interprets("full", "new_full", "full_like")
def full(call: Call) -> SymbolicTensor:
    """The fill value everywhere."""
    return constant(as_number(call.interpreter.scalar(call.get("fill_value"))), call.shape)


@interprets("scalar_tensor")
def scalar_tensor(call: Call) -> SymbolicTensor:
    """A number as a tensor without dimensions."""
    return constant(as_number(call.interpreter.scalar(call.get("s"))))


@interprets("fill")
def fill(call: Call) -> SymbolicTensor:
    """``fill_``: the value everywhere, in the tensor's own dtype."""
    return broadcast(call.tensor("value"), call.shape)


@interprets("copy")
def copy(call: Call) -> SymbolicTensor:
    """``copy_``: the source, in the destination's shape and dtype."""
    return broadcast(call.tensor("src"), call.shape)


@interprets(
    "to",
    "_to_copy",
    "type_as",
    "clone",
    "contiguous",
    "detach",
    "alias",
    "lift_fresh",
    "lift_fresh_copy",
    "convert_element_type",
)
def converted(call: Call) -> SymbolicTensor:
    """The same elements, converted to the result's dtype by the interpreter."""
    return call.tensor("self" if "self" in call.arguments else "a")
