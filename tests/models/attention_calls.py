"""Count the attentions that a model runs, without the matcher: weights that meet values.

What is counted: each call of SDPA, and each softmax over what comes from a batched product or from
distances (a linear layer's is none, one that mixes heads leaves scores what they are) whose result,
through views and element-wise operations of the same size, enters a matrix product. Calls from one
line of one module count once, as equal rows of a report do.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SOFTMAX = ("_softmax", "_safe_softmax", "softmax")
_BATCHED = ("bmm", "baddbmm", "_cdist_forward")
_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "matmul", "einsum")
_LAYERS = ("mm", "addmm", "linear", "convolution", "embedding")  # where scores end
_FUSED = "scaled_dot_product"
_SAME = (
    *("view", "_unsafe_view", "reshape", "clone", "_to_copy", "transpose", "permute", "expand"),
    *("slice", "squeeze", "unsqueeze", "native_dropout", "dropout", "alias", "t", "detach"),
    *("masked_fill", "masked_fill_", "where", "mul", "mul_", "nan_to_num", "as_strided", "copy_"),
)


class AttentionCalls(TorchDispatchMode):
    """Watch everything that runs inside; ``places`` are the attentions that were seen.

    A place is the module that runs it and the line of its code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[tuple[int, str, int], str] = {}
        # By identity; the tensors are kept, so that no other one gets the same.
        self._weights: dict[int, tuple[torch.Tensor, tuple[int, str, int]]] = {}
        self._scores: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if _FUSED in name:
            place, label = _place()
            self.places.setdefault(place, label)
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        # What the weights are multiplied with are values: a result of theirs is no score.
        weighed = name in _PRODUCTS and any(id(x) in self._weights for x in tensors)
        scores = [x for x in tensors if id(x) in self._scores]
        mixes = name in _LAYERS and any(x.numel() == _size(result) for x in scores)
        if not weighed and (name in _BATCHED or mixes or (scores and name not in _LAYERS)):
            self._scores |= {id(x): x for x in tree_leaves(result) if isinstance(x, torch.Tensor)}
        if name in _SOFTMAX and scores:
            self._weights[id(result)] = (result, _place()[0])
        else:
            self._follow(name, result, tensors)
        return result

    def _follow(self, name: str, result: Any, tensors: list[torch.Tensor]) -> None:
        known = [self._weights[id(x)] for x in tensors if id(x) in self._weights]
        if not known:
            return
        weights, place = known[0]
        if name in _PRODUCTS:
            self.places.setdefault(place, _place()[1])
        elif name in (*_SAME, "convolution"):
            first = result[0] if isinstance(result, tuple) else result
            if first.numel() == weights.numel() or name in ("slice", "expand"):
                self._weights[id(first)] = (first, place)


def _size(result: Any) -> int:
    return result.numel() if isinstance(result, torch.Tensor) else 0


def _place() -> tuple[tuple[int, str, int], str]:
    """Return the innermost module that is running, the line it is at, and its class and line."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            code = frame.f_code
            label = f"{type(module).__name__}.{code.co_name}:{frame.f_lineno}"
            return (id(module), code.co_filename, frame.f_lineno), label
        frame = frame.f_back
    return (0, "", 0), "?"


def attention_calls(model: nn.Module, given: dict[str, Any]) -> tuple[Any, list[str]]:
    """Run a model; return its output, and where it attends."""
    with AttentionCalls() as calls:
        output = model(**given)
    return output, list(calls.places.values())
