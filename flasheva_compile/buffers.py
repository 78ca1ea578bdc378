"""Causal masks kept in buffers: recognised by their data, checked again whenever they may change.

nanoGPT and its kin mask with a registered ``tril`` buffer. To a compiler it is just an input, so
its elements are read. Dynamo does not guard them: that they stay is a premise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from flasheva_compile import _torch_compat as compat
from flasheva_compile.site import Premise

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flasheva_compile.site import CapturedGraph


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

    @property
    def premise(self) -> Premise:
        """That the buffer keeps its mask."""
        return Premise(
            positions=(self.position,),
            holds=lambda tensor: _form_of(tensor) == self.form,
            text=f"buffer {self.name} holds a causal mask",
        )


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
