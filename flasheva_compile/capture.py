"""Turn Dynamo's graph into a CapturedGraph: a pre-dispatch ATen shadow that knows its origins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from flasheva_compile import _torch_compat as compat
from flasheva_compile.errors import CaptureError
from flasheva_compile.site import CapturedGraph, Origin

if TYPE_CHECKING:
    from collections.abc import Sequence

_TRACED = (torch.Tensor, torch.SymInt, torch.SymFloat)


class _RecordingInterpreter(fx.Interpreter):
    """Runs a graph and remembers which value every node had.

    Bodies of gradient checkpoints run inline: the shadow is flat, whatever the original nests.
    """

    def __init__(self, graph: fx.GraphModule, path: str, record: list[tuple[Origin, Any]]) -> None:
        super().__init__(graph)
        self.path, self.record = path, record
        self.body_paths = {
            id(getattr(graph, n.target)): f"{path}.{n.target}".lstrip(".")
            for n in graph.graph.find_nodes(op="get_attr")
            if isinstance(getattr(graph, str(n.target), None), fx.GraphModule)
        }

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
        value = super().run_node(n)
        if isinstance(value, _TRACED):
            self.record.append((Origin(self.path, n.name), value))
        return value

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
        if compat.is_checkpoint_body_call(target):
            body, *operands = args
            inner = _RecordingInterpreter(body, self.body_paths[id(body)], self.record)
            return inner.run(*operands)
        return super().call_function(target, args, kwargs)


def capture(graph: fx.GraphModule, inputs: Sequence[Any]) -> CapturedGraph:
    """Trace the shadow of Dynamo's graph.

    Args:
        graph: Dynamo's graph; not changed.
        inputs: What Dynamo passes to a backend: tensors (real or fake) and symbolic integers.

    Returns:
        The graph, its shadow without dead code, and the map between the two.

    Raises:
        CaptureError: The graph cannot be traced to ATen.
    """
    origins_seen: list[Origin] = []

    def run(*args: Any) -> tuple[Any, list[Any]]:  # noqa: ANN401
        record: list[tuple[Origin, Any]] = []
        result = _RecordingInterpreter(graph, "", record).run(*args)
        origins_seen[:] = [origin for origin, _ in record]
        return result, [value for _, value in record]

    try:
        shadow = compat.trace_pre_dispatch(run, inputs)
    except Exception as error:
        raise CaptureError(
            f"tracing to ATen failed: {type(error).__name__}: {error}",
            hint="attention in this graph is left as it is",
        ) from error
    origins = _detach_record(shadow, origins_seen)
    placeholders = shadow.graph.find_nodes(op="placeholder")
    data = {
        node: value
        for node, value in zip(placeholders, inputs, strict=True)
        if compat.is_real_tensor(value)
    }
    return CapturedGraph(
        dynamo=graph, shadow=shadow, origins=origins, data=data, warnings=_unseen_bodies(graph)
    )


def _detach_record(shadow: fx.GraphModule, seen: list[Origin]) -> dict[fx.Node, tuple[Origin, ...]]:
    """Read the recorded values off the shadow's output, restore the output, drop dead code."""
    (output,) = shadow.graph.find_nodes(op="output")
    result, recorded = output.args[0]
    origins: dict[fx.Node, dict[str, Origin]] = {}
    for node, origin in zip(recorded, seen, strict=True):
        if isinstance(node, fx.Node):
            # A value that an in-place op overwrote stands for its last writer: later wins.
            origins.setdefault(node, {})[origin.graph] = origin
    output.args = (result,)
    shadow.graph.eliminate_dead_code()
    alive = set(shadow.graph.nodes)
    return {node: tuple(of.values()) for node, of in origins.items() if node in alive}


def _unseen_bodies(graph: fx.GraphModule) -> tuple[str, ...]:
    return tuple(
        f"attention inside {node.target} ({node.name}) was not looked for"
        for node in graph.graph.nodes
        if node.op == "call_function"
        and compat.is_higher_order_call(node)
        and not compat.is_checkpoint_body_call(node.target)
    )
