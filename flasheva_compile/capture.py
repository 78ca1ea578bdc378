"""Turn Dynamo's graph into a CapturedGraph: a pre-dispatch ATen shadow that knows its origins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx

from flasheva_compile import _torch_compat as compat
from flasheva_compile.errors import CaptureError
from flasheva_compile.site import CapturedGraph, Origin

if TYPE_CHECKING:
    from collections.abc import Sequence

_Record: TypeAlias = tuple[fx.Node, Origin]  # node of the trace, node of Dynamo's graph


class _RecordingInterpreter(fx.Interpreter):
    """Runs a graph under a trace and remembers which traced node holds each node's value.

    Bodies of gradient checkpoints run inline: the shadow is flat, whatever the original nests.
    """

    def __init__(self, graph: fx.GraphModule, path: str, record: list[_Record]) -> None:
        super().__init__(graph)
        self.path, self.record = path, record
        self.body_paths = {
            id(getattr(graph, n.target)): f"{path}.{n.target}".lstrip(".")
            for n in graph.graph.find_nodes(op="get_attr")
            if isinstance(getattr(graph, str(n.target), None), fx.GraphModule)
        }

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            # At once: a later no-op such as k.contiguous() takes the tensor over.
            traced = compat.traced_node(value)
            if traced is not None:
                self.record.append((traced, Origin(self.path, n.name)))
        return value

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
        if compat.is_checkpoint_body_call(target):
            body, *operands = args
            inner = _RecordingInterpreter(body, self.body_paths[id(body)], self.record)
            return inner.run(*operands)
        # A trace only records these two; their effect is needed for the dtypes to be right.
        match compat.autocast_switch(target):
            case "enter":
                region = torch.amp.autocast(*args, **kwargs)
                region.__enter__()
                return region
            case "exit":
                return args[0].__exit__(None, None, None)
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
    record: list[_Record] = []

    def run(*args: Any) -> Any:  # noqa: ANN401
        record.clear()
        return _RecordingInterpreter(graph, "", record).run(*args)

    try:
        shadow = compat.trace_pre_dispatch(run, inputs)
    except Exception as error:
        raise CaptureError(
            f"tracing to ATen failed: {type(error).__name__}: {error}",
            hint="attention in this graph is left as it is",
        ) from error
    shadow.graph.eliminate_dead_code()
    placeholders = shadow.graph.find_nodes(op="placeholder")
    data = {
        node: value
        for node, value in zip(placeholders, inputs, strict=True)
        if compat.is_real_tensor(value)
    }
    return CapturedGraph(
        dynamo=graph,
        shadow=shadow,
        origins=_origins(shadow, record),
        data=data,
        warnings=_unseen_bodies(graph),
    )


def _origins(shadow: fx.GraphModule, record: list[_Record]) -> dict[fx.Node, tuple[Origin, ...]]:
    """Collect the Dynamo nodes of every living shadow node, by name: tracing copies the graph."""
    by_name: dict[str, dict[str, Origin]] = {}
    for traced, origin in record:
        # Two nodes of one graph with one value (a view without effect): both are right, and the
        # first is defined wherever the other is.
        by_name.setdefault(traced.name, {}).setdefault(origin.graph, origin)
    return {
        node: tuple(by_name[node.name].values())
        for node in shadow.graph.nodes
        if node.name in by_name
    }


def _unseen_bodies(graph: fx.GraphModule) -> tuple[str, ...]:
    return tuple(
        f"attention inside {node.target} ({node.name}) was not looked for"
        for node in graph.graph.nodes
        if node.op == "call_function"
        and compat.is_higher_order_call(node)
        and not compat.is_checkpoint_body_call(node.target)
    )
