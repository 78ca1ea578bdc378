"""What a rewritten graph rests on beside its code: facts about data, checked at each call.

Dynamo guards shapes and objects, not what tensors hold. Before each call, tensors that are not the
same or were written to since are looked at again; where a premise fails, the graph runs as it was.
"""

from __future__ import annotations

import copy
import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from flasheva_compile import _torch_compat as compat
from flasheva_compile.masks.predicate import opaque_names
from flasheva_compile.masks.prove import MASK_VALUE
from flasheva_compile.site import Premise, Replace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from flasheva_compile.buffers import MaskBuffer
    from flasheva_compile.masks.predicate import MaskPredicate
    from flasheva_compile.site import CapturedGraph, RewritePlan

log = logging.getLogger(__name__)


def sorted_inputs(captured: CapturedGraph) -> frozenset[fx.Node]:
    """Return the inputs of integers that never decrease along their last axis: ids of documents."""
    return frozenset(node for node, data in captured.data.items() if _is_sorted(data))


def position_biases(
    captured: CapturedGraph, masks: Iterable[MaskPredicate | None]
) -> frozenset[fx.Node]:
    """Return the buffers that are added to scores and hold other numbers than a mask does."""
    added = _added_buffers(captured, masks)
    return frozenset(node for node in added if not _only_hides(captured.data[node]))


def _added_buffers(
    captured: CapturedGraph, masks: Iterable[MaskPredicate | None]
) -> dict[fx.Node, str]:
    """Return the modules' tensors that are added to scores as they are, with their names."""
    given = captured.dynamo.graph.find_nodes(op="placeholder")
    inputs = zip(captured.shadow.graph.find_nodes(op="placeholder"), given, strict=True)
    held = {node: source.name for node, source in inputs if compat.is_module_state(source)}
    added = {
        mask.nodes[name]: None
        for mask in masks
        if mask is not None
        for name in sorted(opaque_names(mask.bias))
    }
    return {node: held[node] for node in added if node in held and node in captured.data}


def premises_of(
    captured: CapturedGraph, plan: RewritePlan, buffers: Mapping[fx.Node, MaskBuffer]
) -> tuple[Premise, ...]:
    """Collect what the replacements of a plan rest on."""
    replaced = [d for d in plan.decisions if isinstance(d, Replace)]
    if not replaced:
        return ()
    inputs = captured.shadow.graph.find_nodes(op="placeholder")
    found = [buffer.premise for buffer in buffers.values()]
    for decision in replaced:
        if decision.site.result in captured.premises:
            found.append(captured.premises[decision.site.result])
        mask = decision.mask
        if decision.assumed:
            found += [
                Premise(
                    positions=(inputs.index(node),),
                    holds=_only_hides,
                    text=f"buffer {name} holds a mask: zeros and very negative numbers",
                )
                for node, name in _added_buffers(captured, [mask]).items()
            ]
        if mask is None or not decision.op.has_segments:
            continue
        nodes = [mask.nodes[name] for name in sorted(opaque_names(mask.segments))]
        found += [
            Premise(
                positions=(inputs.index(node),),
                holds=_is_sorted,
                text=f"the document ids in {node.name} never decrease",
            )
            for node in nodes
            if node in captured.data
        ]
    return tuple({(p.positions, p.text): p for p in found}.values())


def guarded(
    compiled: Callable[..., Any],
    original: fx.GraphModule,
    premises: Sequence[Premise],
    inputs: tuple[Any, ...],
) -> Callable[..., Any]:
    """Wrap a compiled graph so that it runs only while its premises hold.

    Writes through ``tensor.data`` escape PyTorch's version counter, and this check with it.
    """
    seen = [[_Stamp(inputs[n]) for n in premise.positions] for premise in premises]

    def run(*args: Any) -> Any:  # noqa: ANN401
        for premise, stamps in zip(premises, seen, strict=True):
            tensors = [args[n] for n in premise.positions]
            if all(stamp.fits(x) for stamp, x in zip(stamps, tensors, strict=True)):
                continue
            if not premise.holds(*tensors):
                log.warning(
                    "no longer true: %s. Running the graph with full attention, uncompiled",
                    premise.text,
                )
                return original(*args)
            stamps[:] = map(_Stamp, tensors)
        return compiled(*args)

    return run


def untouched_copy(graph: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph before it is edited."""
    copied = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for name, body in graph.named_children():
        if isinstance(body, fx.GraphModule):
            setattr(copied, name, untouched_copy(body))
    return copied


class _Stamp:
    """Knows a tensor that was looked at; another one in its memory is not taken for it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = weakref.ref(tensor)
        # Tensors of inference mode do not count their writes: they are looked at every time.
        self.version = None if tensor.is_inference() else tensor._version

    def fits(self, tensor: torch.Tensor) -> bool:
        """Return whether this is the tensor, as it was."""
        same = self.tensor() is tensor and self.version is not None
        return same and tensor._version == self.version


def _is_sorted(data: torch.Tensor) -> bool:
    """Return whether a tensor of integers never decreases along its last axis."""
    if data.is_floating_point() or data.is_complex() or data.dtype == torch.bool:
        return False
    if data.dim() == 0 or data.shape[-1] < 2:
        return False
    return bool((data[..., 1:] >= data[..., :-1]).all())


def _only_hides(data: torch.Tensor) -> bool:
    """Return whether a tensor that is added to scores does nothing to them but hide some."""
    data = data if data.is_floating_point() else data.long()  # which has this number
    hidden = data <= data.new_tensor(MASK_VALUE)  # what the dtype has of it
    return bool((hidden | (data == 0)).all())
