"""Carry out a plan on Dynamo's graph: the only code that edits it."""

from __future__ import annotations

import operator
from collections import Counter
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import fx

from flasheva_compile import _torch_compat as compat
from flasheva_compile import ops
from flasheva_compile.errors import RewriteError
from flasheva_compile.masks.emit import NotEmitted, emit_head_tensor, emit_key_tensor
from flasheva_compile.masks.predicate import opaque_names
from flasheva_compile.mutation import Mutations
from flasheva_compile.site import AttentionSite, Keep, Replace, RewritePlan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import sympy

    from flasheva_compile.site import CapturedGraph, Decision, Layout, Operand, Origin

_DIFFERENT_RULES = "layers of one nested_compile_region are to be treated differently"
_REPLACES = "flasheva_replaces"  # metadata of a result: name of the node that stood there
_LONGEST_REPEATED = 16  # operations: slopes made of a range of heads have 5
_Masks: TypeAlias = tuple[fx.Node | None, fx.Node | None]  # key mask, segment ids
_CARRIED_META = ("nn_module_stack", "source_fn_stack", "stack_trace")
_INPLACE_FUNCTIONS = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "setitem", "iand", "ior"}
)
_FRESH_FUNCTIONS = frozenset(
    {"matmul", "bmm", "baddbmm", "softmax", "mul", "truediv", "add", "div"}
)


def rewrite(captured: CapturedGraph, plan: RewritePlan) -> RewritePlan:
    """Replace every planned attention in ``captured.dynamo``, in place.

    A mask that cannot be rebuilt as a key mask turns its decision into a ``Keep``.

    Returns:
        The plan as it was carried out.

    Raises:
        RewriteError: The edited graph is malformed; a bug.
    """
    shared: dict[tuple[object, ...], fx.Node] = {}
    done = tuple(_carried_out(captured, plan, shared))
    for module in _graphs(captured).values():
        try:
            module.graph.lint()
        except RuntimeError as error:
            raise RewriteError(f"the rewritten graph is malformed: {error}") from error
        module.recompile()
    return RewritePlan(decisions=done)


def _graphs(captured: CapturedGraph) -> Mapping[str, fx.GraphModule]:
    return {
        name: module
        for name, module in captured.dynamo.named_modules()
        if isinstance(module, fx.GraphModule)
    }


def _carried_out(
    captured: CapturedGraph, plan: RewritePlan, shared: dict[tuple[object, ...], fx.Node]
) -> Iterator[Decision]:
    """Carry out each decision; layers that share one body of a region are edited together."""
    alike: dict[Origin, list[Decision]] = {}
    for decision in plan.decisions:
        if isinstance(decision.site, AttentionSite):
            alike.setdefault(decision.site.output, []).append(decision)
    runs = Counter(origin for found in captured.origins.values() for origin in found)
    written = Mutations(captured.shadow.graph)
    reasons: dict[Origin, str] = {}
    for decision in plan.decisions:
        if isinstance(decision, Keep):
            yield decision
            continue
        origin = decision.site.output
        if origin not in reasons:
            # A run of a shared body that is not among them was recognised and not understood.
            one = len(set(map(_edit_of, alike[origin]))) == 1 and runs[origin] == len(alike[origin])
            editor = _Editor(captured, decision, shared)
            # For its backward pass the op keeps the result, which must not be written to then.
            copied = written.written_after(decision.site.result)
            reasons[origin] = editor.replace(copied=copied) or "" if one else _DIFFERENT_RULES
        yield _kept(decision, reasons[origin]) if reasons[origin] else decision


def _edit_of(decision: Decision) -> object:
    """Return what has to be equal for one edit to serve several layers."""
    return (decision.op, decision.mask, decision.slope) if isinstance(decision, Replace) else None


def _kept(decision: Replace, reason: str) -> Keep:
    return Keep(
        site=decision.site, layer=decision.layer, reason=reason, mask_text=decision.mask_text
    )


class _Editor:
    """Builds the replacement of one attention in front of the node that it replaces."""

    def __init__(
        self,
        captured: CapturedGraph,
        decision: Replace,
        shared: dict[tuple[object, ...], fx.Node],
    ) -> None:
        self.captured, self.decision, self.shared = captured, decision, shared
        self.path = decision.site.output.graph
        self.graph = _graphs(captured)[self.path].graph
        # An operand may be the result of an attention that is replaced by now.
        self.nodes = {node.meta.get(_REPLACES, node.name): node for node in self.graph.nodes}
        self.output = self.nodes[decision.site.output.node]

    def replace(self, *, copied: bool) -> str | None:
        """Replace the attention; return a reason instead if its mask cannot be rebuilt."""
        site, op = self.decision.site, self.decision.op
        with self.graph.inserting_before(self.output):
            query, key, value = (self._operand(o) for o in (site.query, site.key, site.value))
            masks = self._masks(key)
            if isinstance(masks, NotEmitted):
                return f"mask cannot be rebuilt: {masks.reason}"
            slopes = self._slopes()
            if isinstance(slopes, NotEmitted):
                return f"slopes cannot be rebuilt: {slopes.reason}"
            parameters = self._parameters(query, key, masks)
            seed = self._seed(query) if op.dropout_p else None
            optional = (*masks, slopes, seed)
            results = self._attention((query, key, value), parameters, optional)
            result = self._laid_out(self._call(operator.getitem, (results, 0)), site.result_layout)
            if copied or site.dtype != site.result_dtype:
                result = self._call(torch.Tensor.to, (result, site.result_dtype), copy=True)
            result.meta = {**self.output.meta, _REPLACES: self.output.name}
        self.output.replace_all_uses_with(result)
        _erase_dead(self.graph, self.output)
        return None

    def _attention(
        self,
        qkv: tuple[fx.Node, fx.Node, fx.Node],
        parameters: list[fx.Node],
        optional: tuple[fx.Node | None, ...],
    ) -> fx.Node:
        """Call the op that the plan wants; its first result is the attention's.

        Args:
            qkv: The operands.
            parameters: What the chunk rule takes besides.
            optional: Key mask, segment ids, slopes, seed.
        """
        op, (query, key, value) = self.decision.op, qkv
        options = {
            "window_size": op.window_size,
            "chunk_size": op.chunk_size,
            "sink_tokens": op.sink_size,
            "window": op.window,
            "causal": op.causal,
            "q_offset": self._offset(query, key),
            "scale": op.scale,
            "softcap": op.softcap,
            "dropout_p": op.dropout_p,
            "version": ops.OP_VERSION,
        }
        if not op.retrieve_chunks:
            target = torch.ops.flasheva.eva_attention.default
            return self._call(target, (*qkv, parameters, *optional), rule=op.chunk_rule, **options)
        masks = (optional[0], optional[1])
        tokens = self._pool(key, value, parameters, masks, op.chunk_rule)
        names = ("retrieve_chunks", "retrieve_block", "retrieve_by")
        retrieve = {name: getattr(op, name) for name in names}
        target = torch.ops.flasheva.retrieval_attention.default
        return self._call(target, (*qkv, *tokens, *optional), **retrieve, **options)

    def _call(self, target: object, args: tuple, **kwargs: object) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
        for name in _CARRIED_META:
            if name in self.output.meta:
                node.meta[name] = self.output.meta[name]
        return node

    def _operand(self, operand: Operand) -> fx.Node:
        node = self.nodes[operand.origin.node]
        node = self._laid_out(node, operand.layout)
        if operand.dtype != self.decision.site.dtype:
            # Products cast their operands under autocast; the op computes in what it is given.
            node = self._call(torch.Tensor.to, (node, self.decision.site.dtype))
        return node

    def _laid_out(self, node: fx.Node, layout: Layout) -> fx.Node:
        for name, arguments in layout:
            node = self._call(getattr(torch, name), (node, *arguments))
        return node

    def _offset(self, query: fx.Node, key: fx.Node) -> fx.Node | int:
        """Column of the first query: queries end at the last key."""
        site = self.decision.site
        if site.lengths_equal:
            return 0
        if site.query.length is not None and site.key.length is not None:
            return site.key.length - site.query.length
        sizes = [self._call(torch.Tensor.size, (node, 2)) for node in (key, query)]
        return self._call(operator.sub, tuple(sizes))

    def _slopes(self) -> fx.Node | NotEmitted | None:
        """Build the slopes of ALiBi, ``[H]``."""
        formula, heads = self.decision.slope, self.decision.site.query.heads
        if formula is None:
            return None
        sources = self._opaque_nodes(formula)
        if isinstance(sources, NotEmitted):
            return sources
        return emit_head_tensor(self.graph, formula, sources, heads)

    def _seed(self, query: fx.Node) -> fx.Node:
        device = self._call(getattr, (query, "device"))
        return self._call(torch.randint, (0, 2**62, (1,)), dtype=torch.int64, device=device)

    def _parameters(self, query: fx.Node, key: fx.Node, masks: _Masks) -> list[fx.Node]:
        """Return what the chunk rule takes besides keys and values."""
        op = self.decision.op
        if op.chunk_rule != "eva":
            return []
        # Without parameters the feature maps of EVA are the identity: rfa_k is the mean key and
        # omega the mean query of the chunk and group plus the mean key.
        grouped = self._call(torch.unflatten, (query, 1, (op.kv_heads, -1)))
        mean_query = self._call(torch.mean, (grouped, 2))
        mean_k, mean_q, _ = self._pool(key, mean_query, [], masks, "mean")
        return [mean_k, self._call(torch.add, (mean_k, mean_q))]

    def _pool(
        self,
        key: fx.Node,
        value: fx.Node,
        parameters: list[fx.Node],
        masks: _Masks,
        rule: str,
    ) -> tuple[fx.Node, fx.Node, fx.Node]:
        op = self.decision.op
        triple = self._call(
            torch.ops.flasheva.chunk_tokens.default,
            (key, value, parameters, *masks),
            rule=rule,
            chunk_size=op.chunk_size,
            scale=op.scale,
            version=ops.OP_VERSION,
        )
        k, v, bias = (self._call(operator.getitem, (triple, i)) for i in range(3))
        return k, v, bias

    def _masks(self, key: fx.Node) -> _Masks | NotEmitted:
        """Build key mask and segment ids, each where the op takes one."""
        op, mask = self.decision.op, self.decision.mask
        built: list[fx.Node | None] = []
        for wanted, formula in (
            (op.has_key_mask, mask and mask.key_mask),
            (op.has_segments, mask and mask.segments),
        ):
            tensor = self._key_tensor(formula, key) if wanted and formula is not None else None
            if isinstance(tensor, NotEmitted):
                return tensor
            built.append(tensor)
        return built[0], built[1]

    def _key_tensor(self, formula: sympy.Basic, key: fx.Node) -> fx.Node | NotEmitted:
        """Build a ``[B, S]`` tensor once per graph and formula."""
        place = (self.path, formula, *map(str, self.decision.site.score_shape[::3]))
        # Built for a result further down the graph, it does not exist here yet.
        if place not in self.shared or not self.shared[place] < self.output:
            sources = self._opaque_nodes(formula)
            if isinstance(sources, NotEmitted):
                return sources
            sizes = {axis: self._size(axis, key) for axis in (0, 3)}
            sources |= self._symbols(sizes)
            built = emit_key_tensor(self.graph, formula, sources, sizes[0], sizes[3])
            if isinstance(built, NotEmitted):
                return built
            self.shared[place] = built
        return self.shared[place]

    def _size(self, axis: int, key: fx.Node) -> fx.Node | int:
        """Batch size (axis 0) or key length (axis 3) of the scores."""
        size = self.decision.site.score_shape[axis]
        if isinstance(size, int):
            return size
        return self._call(torch.Tensor.size, (key, {0: 0, 3: 2}[axis]))

    def _symbols(self, nodes: Mapping[int, fx.Node | int]) -> dict[str, fx.Node]:
        """Map the symbols of symbolic sizes to nodes that hold them."""
        sizes = self.decision.site.score_shape
        return {
            str(size.node.expr): node
            for axis, node in nodes.items()
            if isinstance(size := sizes[axis], torch.SymInt) and isinstance(node, fx.Node)
        }

    def _opaque_nodes(self, formula: sympy.Basic) -> dict[str, fx.Node] | NotEmitted:
        """Map the formula's opaque tensors to nodes of this graph."""
        mask, found = self.decision.mask, {}
        shadows = {} if mask is None else {name: mask.nodes[name] for name in opaque_names(formula)}
        for name, shadow in sorted(shadows.items()):
            node = _brought_in(self.captured, shadow, self.path) or self._computed_anew(shadow)
            if node is None:
                return NotEmitted(f"this graph does not hold {shadow.name}, on which it depends")
            found[name] = node
        return found

    def _computed_anew(self, shadow: fx.Node) -> fx.Node | None:
        """Repeat a short computation on constants that Dynamo's graph has inside of one node."""
        stack, needed = [shadow], set()
        while stack:
            node = stack.pop()
            if node in needed:
                continue
            needed.add(node)
            pure = isinstance(node.target, torch._ops.OpOverload) and not _is_inplace(node)
            if not pure or len(needed) > _LONGEST_REPEATED:
                return None
            stack.extend(node.all_input_nodes)
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.captured.shadow.graph.nodes:
            if node in needed:
                copies[node] = self.graph.node_copy(node, copies.__getitem__)
                copies[node].meta = {"example_value": node.meta["val"]}
        return copies[shadow]


def _brought_in(captured: CapturedGraph, shadow: fx.Node, path: str) -> fx.Node | None:
    """Return the node of a graph that holds a value, handing it to checkpointed bodies.

    transformers builds its masks outside of the checkpointed layers, and passes the finished mask:
    what it was made from has to come in as one more operand, of every call of the body.
    """
    graphs = _graphs(captured)
    origin = captured.origin(shadow, path)
    if origin is not None:
        return next((n for n in graphs[path].graph.nodes if n.name == origin.node), None)
    outer, _, name = path.rpartition(".")
    if not path or (source := _brought_in(captured, shadow, outer)) is None:
        return None
    bodies = [n for n in graphs[outer].graph.find_nodes(op="get_attr") if n.target == name]
    calls = [user for body in bodies for user in body.users]
    given = [(compat.body_and_operands(c.target, c.args) or (None, ()))[1] for c in calls]
    inside = graphs[path].graph.find_nodes(op="placeholder")
    if not calls or not all(
        source < c and len(g) == len(inside) for c, g in zip(calls, given, strict=True)
    ):
        return None
    for n, operand in enumerate(inside):
        if all(operands[n] is source for operands in given):
            return operand
    for call in calls:
        call.args = (*call.args, source)
    with graphs[path].graph.inserting_after(inside[-1]):
        operand = graphs[path].graph.placeholder(f"{source.name}_of_mask")
    operand.meta["example_value"] = source.meta.get("example_value")
    return operand


def _erase_dead(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that lost its last user, then what only it used."""
    stack = [node]
    while stack:
        current = stack.pop()
        if current.users or current._erased or not _is_erasable(current):
            continue
        stack.extend(current.all_input_nodes)
        graph.erase_node(current)


def _is_erasable(node: fx.Node) -> bool:
    """Return whether nobody can tell that a node without users is gone."""
    if node.op == "get_attr":
        return True
    if node.op not in {"call_function", "call_method"}:
        return False
    if not _is_inplace(node):
        return True
    # Writes to a value that nobody else holds are lost with it.
    base = node.args[0]
    alone = isinstance(base, fx.Node) and set(base.users) == {node} and _function_name(base)
    return alone in _FRESH_FUNCTIONS


def _is_inplace(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = _function_name(node)
    return name in _INPLACE_FUNCTIONS or (name.endswith("_") and not name.endswith("__"))


def _function_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
