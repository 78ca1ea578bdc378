"""Causal masks kept in buffers: recognised by their data, checked again whenever they may change.

nanoGPT and its kin mask with a registered ``tril`` buffer. To a compiler it is just an input, so
its elements are read. Dynamo does not guard them: the compiled callable checks, before each call,
that the tensor is the same and was not written to, and otherwise runs the graph as it was.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from flasheva_compile import _torch_compat as compat

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flasheva_compile.site import CapturedGraph

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MaskBuffer:
    """A buffer that holds a causal mask.

    Attributes:
        position: Its place among the graph's inputs.
        name: Its placeholder.
        meaning: A node of an auxiliary graph that computes the same elements.
        form: Which of the known forms it has.
    """

    position: int
    name: str
    meaning: fx.Node
    form: str


_FORMS: dict[str, Callable[[int, torch.dtype], torch.Tensor]] = {
    "tril of ones": lambda n, dtype: torch.ones(n, n).tril().to(dtype),
    "triu of ones above the diagonal": lambda n, dtype: torch.ones(n, n).triu(1).to(dtype),
}


def mask_buffers(captured: CapturedGraph) -> Mapping[fx.Node, MaskBuffer]:
    """Find the inputs that are buffers holding a causal mask, by shadow placeholder."""
    found: dict[fx.Node, MaskBuffer] = {}
    shadow = captured.shadow.graph.find_nodes(op="placeholder")
    dynamo = captured.dynamo.graph.find_nodes(op="placeholder")
    for position, (node, source) in enumerate(zip(shadow, dynamo, strict=True)):
        data = captured.data.get(node)
        if data is None or isinstance(data, nn.Parameter):
            continue
        # A mask that the caller passes in may be another one next time.
        form = _form_of(data) if compat.is_module_state(source) else None
        if form is not None:
            found[node] = MaskBuffer(position, source.name, _meaning(form, data), form)
    return found


def guarded(
    compiled: Callable[..., Any],
    original: fx.GraphModule,
    buffers: Mapping[fx.Node, MaskBuffer],
    inputs: tuple[Any, ...],
) -> Callable[..., Any]:
    """Wrap a compiled graph so that it runs only while its mask buffers hold their masks.

    Writes through ``tensor.data`` escape PyTorch's version counter, and this check with it.
    """
    seen = {b.position: _stamp(inputs[b.position]) for b in buffers.values()}

    def run(*args: Any) -> Any:  # noqa: ANN401
        for buffer in buffers.values():
            tensor = args[buffer.position]
            stamp = _stamp(tensor)
            if stamp == seen[buffer.position]:
                continue
            if _form_of(tensor) != buffer.form:
                log.warning(
                    "buffer %s no longer holds a causal mask: running the graph with full "
                    "attention, uncompiled",
                    buffer.name,
                )
                return original(*args)
            seen[buffer.position] = stamp
        return compiled(*args)

    return run


def untouched_copy(graph: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph before it is edited."""
    copied = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for name, body in graph.named_children():
        if isinstance(body, fx.GraphModule):
            setattr(copied, name, untouched_copy(body))
    return copied


def _stamp(tensor: torch.Tensor) -> tuple[int, int, int]:
    version = -1 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version


def _form_of(tensor: torch.Tensor) -> str | None:
    if tensor.dim() < 2 or tensor.shape[-1] != tensor.shape[-2] or tensor.shape[-1] < 2:
        return None
    size = tensor.shape[-1]
    if tensor.numel() != size * size or tensor.is_complex():
        return None
    square = tensor.detach().reshape(size, size)
    for form, make in _FORMS.items():
        if torch.equal(square, make(size, tensor.dtype).to(tensor.device)):
            return form
    return None


def _meaning(form: str, data: torch.Tensor) -> fx.Node:
    """Build the buffer's elements from ops that the mask prover understands."""
    graph = fx.Graph()
    ones = graph.call_function(torch.ops.aten.ones.default, (list(data.shape),))
    cut = torch.ops.aten.tril.default if form.startswith("tril") else torch.ops.aten.triu.default
    result = graph.call_function(cut, (ones, 0 if form.startswith("tril") else 1))
    for node in (ones, result):
        node.meta["val"] = torch.empty(data.shape, dtype=data.dtype, device="meta")
    return result
