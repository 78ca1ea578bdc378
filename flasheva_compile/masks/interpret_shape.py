"""Meanings of ATen ops that move elements without changing them."""

# sympy's annotations say Basic where they mean Expr or Boolean
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import sympy as sp
import torch
from torch import fx

from flasheva_compile.masks import symbolic
from flasheva_compile.masks.interpret import Call, interprets
from flasheva_compile.masks.ranges import index_at_least_zero, provably_nonnegative
from flasheva_compile.masks.symbolic import ZERO, SymbolicTensor
from flasheva_compile.masks.values import NotInterpretedError, as_number


@interprets("expand", "expand_as", "broadcast_to")
def expand(call: Call) -> SymbolicTensor:
    """Repeat dimensions of size 1."""
    return symbolic.broadcast(call.tensor("self"), call.shape)


@interprets("unsqueeze")
def unsqueeze(call: Call) -> SymbolicTensor:
    """Insert a dimension of size 1."""
    return symbolic.unsqueeze(call.tensor("self"), call.integer("dim"))


@interprets(
    "view", "reshape", "_unsafe_view", "squeeze", "flatten", "unflatten", "view_as", "reshape_as"
)
def reshape(call: Call) -> SymbolicTensor:
    """The same elements in order, in another shape."""
    if call.get("dtype") is not None:
        raise NotInterpretedError("view of another dtype")
    return symbolic.reshape(call.tensor("self"), call.shape)


@interprets("transpose", "swapaxes", "swapdims")
def transpose(call: Call) -> SymbolicTensor:
    """Swap two dimensions."""
    first, second = ("dim0", "dim1") if "dim0" in call.arguments else ("axis0", "axis1")
    return symbolic.transpose(call.tensor("self"), call.integer(first), call.integer(second))


@interprets("t", "mT")
def matrix_transpose(call: Call) -> SymbolicTensor:
    """Swap the last two dimensions."""
    tensor = call.tensor("self")
    return symbolic.transpose(tensor, -2, -1) if tensor.ndim > 1 else tensor


@interprets("permute")
def permute(call: Call) -> SymbolicTensor:
    """Reorder dimensions."""
    return symbolic.permute(call.tensor("self"), call.get("dims"))


@interprets("slice")
def slice_(call: Call) -> SymbolicTensor:
    """``x[start:end:step]`` of one dimension."""
    return _slice(call, call.scalar("start"), call.scalar("step", 1))


@interprets("narrow")
def narrow(call: Call) -> SymbolicTensor:
    """``length`` elements from ``start``."""
    if isinstance(call.get("start"), fx.Node) and not _is_size(call.get("start")):
        raise NotInterpretedError("narrow from a tensor position")
    return _slice(call, call.scalar("start"), sp.Integer(1))


def _is_size(argument: fx.Node) -> bool:
    return isinstance(argument.meta.get("val"), (int, torch.SymInt))


def _slice(call: Call, start: sp.Expr, step: sp.Expr) -> SymbolicTensor:
    tensor, dim = call.tensor("self"), call.integer("dim")
    size = tensor.shape[dim]
    if start.is_negative:
        # torch clamps x[-5:] of 3 elements to x[0:]
        start = sp.Max(ZERO, size + start) if size.is_number else size + start
    if not provably_nonnegative(start):
        raise NotInterpretedError("a slice from a position of unknown sign")
    return symbolic.slice_from(tensor, dim, start, step, call.shape)


@interprets("select")
def select(call: Call) -> SymbolicTensor:
    """One position of a dimension."""
    return symbolic.select(call.tensor("self"), call.integer("dim"), call.scalar("index"))


@interprets("index")
def index(call: Call) -> SymbolicTensor:
    """``x[i, j, ...]`` with one integer tensor for each dimension."""
    positions = call.get("indices")
    if any(p is None or p.meta["val"].dtype in (torch.bool, torch.uint8) for p in positions):
        raise NotInterpretedError("indexing by None or by a boolean mask")
    domain = call.interpreter.domain
    return symbolic.gather_at(
        call.tensor("self"),
        call.tensors("indices"),
        call.shape,
        lambda position: index_at_least_zero(position, domain),
    )


@interprets("cat", "concat", "concatenate")
def cat(call: Call) -> SymbolicTensor:
    """Join along one dimension."""
    tensors = call.tensors("tensors")
    if len({t.dtype for t in tensors}) != 1:
        raise NotInterpretedError("cat of several dtypes")
    return symbolic.concatenate(tensors, call.integer("dim"))


@interprets("stack")
def stack(call: Call) -> SymbolicTensor:
    """Join along a new dimension."""
    tensors = call.tensors("tensors")
    if len({t.dtype for t in tensors}) != 1:
        raise NotInterpretedError("stack of several dtypes")
    dim = call.integer("dim")
    return symbolic.concatenate([symbolic.unsqueeze(t, dim) for t in tensors], dim)


@interprets("constant_pad_nd", "pad")
def pad(call: Call) -> SymbolicTensor:
    """Constant padding of the last dimension."""
    amounts = call.get("pad")
    if len(amounts) != 2 or call.get("mode") not in (None, "constant"):
        raise NotInterpretedError("only constant padding of the last dimension is modelled")
    value = call.get("value")
    fill = as_number(call.interpreter.scalar(0 if value is None else value))
    left = call.interpreter.scalar(amounts[0])
    return symbolic.pad_last(call.tensor("self"), sp.sympify(left), fill, call.shape)


@interprets("repeat", "tile")
def repeat(call: Call) -> SymbolicTensor:
    """Repeat whole dimensions."""
    return symbolic.repeat(call.tensor("self"), call.shape)


@interprets("flip")
def flip(call: Call) -> SymbolicTensor:
    """Reverse dimensions."""
    return symbolic.flip(call.tensor("self"), call.get("dims"))


@interprets("tril")
def tril(call: Call) -> SymbolicTensor:
    """Keep columns up to ``row + diagonal``."""
    diagonal = call.scalar("diagonal")
    return symbolic.triangle(call.tensor("self"), lambda distance: distance <= diagonal)


@interprets("triu")
def triu(call: Call) -> SymbolicTensor:
    """Keep columns from ``row + diagonal``."""
    diagonal = call.scalar("diagonal")
    return symbolic.triangle(call.tensor("self"), lambda distance: distance >= diagonal)
