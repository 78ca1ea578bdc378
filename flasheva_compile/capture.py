"""Turn Dynamo's graph into a CapturedGraph: a pre-dispatch ATen shadow that knows its origins."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import fx
from torch.utils._pytree import tree_map_only

from flasheva_compile import _torch_compat as compat
from flasheva_compile.elementwise import (
    NotElementwiseError,
    along,
    call,
    elementwise_nodes,
    name_of,
    taken_out,
)
from flasheva_compile.errors import CaptureError
from flasheva_compile.flex import NotSpelledOutError, read_call, spelled_out, trust_blocks
from flasheva_compile.hidden import hidden_attentions
from flasheva_compile.op_registration import fakes, implements
from flasheva_compile.site import CapturedGraph, Origin

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flasheva_compile.site import Premise

_T = TypeVar("_T")
_Record: TypeAlias = tuple[fx.Node, Origin]  # node of the trace, node of Dynamo's graph


@dataclass(slots=True)
class _Notes:
    """What is written down during a trace.

    Attributes:
        data: The real tensor of each input, where there is one.
        broadcast: ``vmap`` is computed by broadcasting where that may be possible.
        record: Traced nodes with the nodes of Dynamo's graph.
        premises, opaque: See `CapturedGraph`, by node of the trace.
        checked: Premises that were looked at already.
    """

    data: Sequence[torch.Tensor | None]
    broadcast: bool = True
    record: list[_Record] = field(default_factory=list)
    premises: dict[fx.Node, Premise] = field(default_factory=dict)
    opaque: dict[fx.Node, str] = field(default_factory=dict)
    checked: dict[object, bool] = field(default_factory=dict)


@implements("hook_or_higher_order_op", "(Tensor(a) x) -> Tensor(a)")
def _hook_or_higher_order_op(x: torch.Tensor) -> torch.Tensor:
    """Stand, in a shadow, for what a higher-order op returns.

    What such an op runs inside is in the shadow too, but its gradient need not be what that says: a
    hook on a tensor, or an ``autograd.Function``, has one of its own. So nothing may look through.
    """
    return torch.ops.aten.alias.default(x)


fakes("hook_or_higher_order_op")(_hook_or_higher_order_op)


class _RecordingInterpreter(fx.Interpreter):
    """Runs a graph under a trace and remembers which traced node holds each node's value.

    Bodies of gradient checkpoints and nested_compile_regions run inline: the shadow is flat,
    whatever the original nests. So do functions of scalars under ``vmap``, and flex_attention.
    """

    def __init__(self, graph: fx.GraphModule, path: str, notes: _Notes) -> None:
        super().__init__(graph)
        self.path, self.notes = path, notes
        self.broadcast = elementwise_nodes(graph.graph) if notes.broadcast else set()
        self.depth = 0
        self.body_paths = {
            id(getattr(graph, n.target)): f"{path}.{n.target}".lstrip(".")
            for n in graph.graph.find_nodes(op="get_attr")
            if isinstance(getattr(graph, str(n.target), None), fx.GraphModule)
        }

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
        value = self._broadcast(n) if n in self.broadcast else super().run_node(n)
        if isinstance(value, torch.Tensor):
            # At once: a later no-op such as k.contiguous() takes the tensor over.
            traced = compat.traced_node(value)
            if traced is not None:
                self.notes.record.append((traced, Origin(self.path, n.name)))
        return value

    def _broadcast(self, n: fx.Node) -> Any:  # noqa: ANN401
        """Compute a node inside a ``vmap`` for all elements at once."""
        name, (args, kwargs) = name_of(n), self.fetch_args_kwargs_from_env(n)
        with compat.node_of_stack(n):
            if name.endswith("_nesting"):
                self.depth += 1 if name.endswith("increment_nesting") else -1
                return self.depth
            if name == "_add_batch_dim":
                return along(args[0], self.depth - 1)
            if name == "_remove_batch_dim":
                return taken_out(args[0], self.depth, args[2])
            if n.op in {"get_attr", "placeholder"} or name == "lazy_load_decompositions":
                return super().run_node(n)
            return call(n, args, kwargs, self.depth)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
        if (inline := compat.body_and_operands(target, args)) is not None:
            body, operands = inline
            inner = _RecordingInterpreter(body, self.body_paths[id(body)], self.notes)
            return inner.run(*operands)
        if compat.is_flex_call(target):
            return self._flex(target, args, kwargs)
        # A trace only records these two; their effect is needed for the dtypes to be right.
        match compat.autocast_switch(target):
            case "enter":
                region = torch.amp.autocast(*args, **kwargs)
                region.__enter__()
                return region
            case "exit":
                return args[0].__exit__(None, None, None)
        result = super().call_function(target, args, kwargs)
        if compat.is_higher_order(target):
            return tree_map_only(torch.Tensor, torch.ops.flasheva.hook_or_higher_order_op, result)
        return result

    def _flex(self, target: Any, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
        """Spell a call of flex_attention out, if its blocks can be trusted."""
        try:
            attention = read_call(args)
            premise = trust_blocks(attention)
            if premise is not None:
                self._expect(premise)
            results = spelled_out(attention)
        except NotSpelledOutError as error:
            results = super().call_function(target, args, kwargs)
            traced = compat.traced_node(results[0])
            if traced is not None:
                self.notes.opaque[traced.all_input_nodes[0]] = str(error)
            return results
        if premise is not None:
            self.notes.premises[compat.traced_node(results[0])] = premise  # type: ignore[index]
        return results

    def _expect(self, premise: Premise) -> None:
        """Look whether a premise is true of the inputs that there are."""
        data = [self.notes.data[n] for n in premise.positions]
        if any(tensor is None for tensor in data):
            raise NotSpelledOutError("a block mask that the graph is given, without its data")
        key = (premise.positions, premise.text, premise.holds.key)  # type: ignore[attr-defined]
        if key not in self.notes.checked:
            with compat.plain_execution():
                self.notes.checked[key] = premise.holds(*data)
        if not self.notes.checked[key]:
            raise NotSpelledOutError("the blocks of a block mask do not follow its mask_mod")


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
    try:
        notes = _Notes([x if compat.is_real_tensor(x) else None for x in inputs])
        try:
            shadow = _traced(graph, inputs, notes)
        except NotElementwiseError:
            notes = _Notes(notes.data, broadcast=False)
            shadow = _traced(graph, inputs, notes)
    except Exception as error:
        raise CaptureError(
            f"tracing to ATen failed: {type(error).__name__}: {error}",
            hint="attention in this graph is left as it is",
        ) from error
    shadow.graph.eliminate_dead_code()
    placeholders = shadow.graph.find_nodes(op="placeholder")
    data = {
        node: value
        for node, value in zip(placeholders, notes.data, strict=True)
        if value is not None
    }
    return CapturedGraph(
        dynamo=graph,
        shadow=shadow,
        origins=_origins(shadow, notes.record),
        data=data,
        premises=_by_name(shadow, notes.premises),
        opaque=_by_name(shadow, notes.opaque),
        hidden=hidden_attentions(graph),
    )


def _traced(graph: fx.GraphModule, inputs: Sequence[Any], notes: _Notes) -> fx.GraphModule:
    def run(*args: Any) -> Any:  # noqa: ANN401
        return _RecordingInterpreter(graph, "", notes).run(*args)

    return compat.trace_pre_dispatch(run, inputs)


def _by_name(shadow: fx.GraphModule, notes: Mapping[fx.Node, _T]) -> dict[fx.Node, _T]:
    """Carry notes about nodes of a trace over to its copy, the shadow."""
    by_name = {node.name: note for node, note in notes.items()}
    return {node: by_name[node.name] for node in shadow.graph.nodes if node.name in by_name}


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
