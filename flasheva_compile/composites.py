"""Take functions of PyTorch apart that Dynamo leaves whole and that hide an attention.

``nn.MultiheadAttention`` is one call in Dynamo's graph. It is replaced by the very operations that
it runs; inner compilers do the same, so nothing is computed differently, whether or not the
attention inside is rewritten afterwards.
"""

from __future__ import annotations

import logging
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.nn import functional

from flasheva_compile import _torch_compat as compat

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

_COMPOSITES = (functional.multi_head_attention_forward,)
_CARRIED_META = ("nn_module_stack", "source_fn_stack", "stack_trace")


def take_apart(graph: fx.GraphModule) -> None:
    """Inline every composite of Dynamo's graph and of the bodies in it, in place."""
    for module in graph.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        changed = [_inlined(node) for node in list(module.graph.nodes) if _is_composite(node)]
        if any(changed):
            module.graph.lint()
            module.recompile()


def _is_composite(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _COMPOSITES


def _inlined(node: fx.Node) -> bool:
    """Replace one call by what it runs; leave it if that cannot be traced."""
    inputs = list(node.all_input_nodes)
    examples = [n.meta.get("example_value") for n in inputs]
    reads = [user for user in node.users if user.target is operator.getitem]
    if len(reads) != len(node.users) or any(example is None for example in examples):
        return False
    try:
        traced = compat.trace_pre_dispatch(lambda *values: _called(node, inputs, values), examples)
    except Exception:
        log.debug("%s cannot be taken apart", node.name, exc_info=True)
        return False
    traced.graph.eliminate_dead_code()
    if traced.graph.find_nodes(op="get_attr"):
        return False
    results = _copied(traced.graph, node, inputs)
    for user in reads:
        result = results[int(user.args[1])]  # type: ignore[arg-type]
        if result is not None:
            user.replace_all_uses_with(result)
        if not user.users:
            node.graph.erase_node(user)
    if not node.users:
        node.graph.erase_node(node)
    return True


def _called(node: fx.Node, inputs: Sequence[fx.Node], values: Sequence[Any]) -> Any:  # noqa: ANN401
    given = dict(zip(inputs, values, strict=True))

    def value(argument: Any) -> Any:  # noqa: ANN401
        return given[argument] if isinstance(argument, fx.Node) else argument

    target: Any = node.target
    return target(*map_aggregate(node.args, value), **map_aggregate(node.kwargs, value))  # type: ignore[arg-type]


def _copied(traced: fx.Graph, node: fx.Node, inputs: Sequence[fx.Node]) -> Sequence[Any]:
    """Copy a traced graph in front of a node; return what it outputs."""
    env = dict(zip(traced.find_nodes(op="placeholder"), inputs, strict=True))
    with node.graph.inserting_before(node):
        for source in traced.nodes:
            if source.op in {"placeholder", "output"}:
                continue
            new = node.graph.node_copy(source, env.__getitem__)
            new.meta = {name: node.meta[name] for name in _CARRIED_META if name in node.meta}
            if isinstance(value := source.meta.get("val"), torch.Tensor | torch.SymInt):
                new.meta["example_value"] = value
            if new.target is torch.ops.aten.view.default:
                # Traced where the attention's result was laid out so that this was a view: the
                # replacement's may not be, and what made it contiguous left no node.
                new.target = torch.ops.aten.reshape.default
            env[source] = new
    outputs = traced.output_node().args[0]
    return [env[o] if isinstance(o, fx.Node) else None for o in outputs]  # type: ignore[union-attr]
