"""Finds reads of an FX graph that come after an in-place write to what the node computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_METADATA_ONLY = ("detach_", "requires_grad_", "squeeze_", "unsqueeze_", "transpose_", "t_")


class Mutations:
    """In-place writes of one graph, by storage, found from the schemas of its ATen ops."""

    def __init__(self, graph: fx.Graph) -> None:
        self._position: dict[fx.Node, int] = {}
        self._parent: dict[fx.Node, fx.Node] = {}
        self._writes: dict[fx.Node, list[int]] = {}
        written: list[tuple[fx.Node, int]] = []
        for position, node in enumerate(graph.nodes):
            self._position[node] = position
            for source, writes in _aliased_inputs(node):
                self._parent[self._root(node)] = self._root(source)
                if writes:
                    written.append((source, position))
        for source, position in written:
            self._writes.setdefault(self._root(source), []).append(position)

    def stale(self, node: fx.Node, reader: fx.Node) -> bool:
        """Whether ``reader`` sees ``node`` after a write by a third node."""
        return self._written_between(node, self._position[reader])

    def written_after(self, node: fx.Node) -> bool:
        """Whether the storage of ``node`` is written anywhere after the node itself."""
        return self._written_between(node, len(self._position))

    def stale_within(self, result: fx.Node, given: Collection[fx.Node]) -> bool:
        """Whether anything on the way from ``given`` to ``result`` is read after another's write.

        Such a write goes through a view: what is computed from the nodes alone leaves it out.
        """
        stack, seen = [result], {*given, result}
        while stack:
            reader = stack.pop()
            for node in reader.all_input_nodes:
                if not isinstance(node.meta.get("val"), torch.Tensor | list | tuple):
                    continue
                if self.stale(node, reader):
                    return True
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
        return False

    def _written_between(self, node: fx.Node, end: int) -> bool:
        begin = self._position[node]
        return any(begin < p < end for p in self._writes.get(self._root(node), ()))

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self._parent and self._parent[node] is not node:
            node = self._parent[node]
        return node


def _aliased_inputs(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """Inputs whose storage the node shares or writes, with whether it writes."""
    if node.op != "call_function" or not node.args:
        return
    if not isinstance(node.target, torch._ops.OpOverload):
        if getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[0], fx.Node):
            yield node.args[0], False  # one result of split, chunk, unbind
        return
    schema = node.target._schema
    metadata_only = schema.name.split("::")[-1] in _METADATA_ONLY
    for argument, value in _bound(schema, node):
        if argument.alias_info is not None and isinstance(value, fx.Node):
            yield value, argument.alias_info.is_write and not metadata_only


def _bound(schema: torch.FunctionSchema, node: fx.Node) -> Iterator[tuple[torch.Argument, object]]:
    for n, argument in enumerate(schema.arguments):
        if n < len(node.args):
            yield argument, node.args[n]
        elif argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]
