"""``flex_attention`` spelled out for the shadow, where its blocks are proved to follow its mask.

A block mask says twice what may be attended: by its mask_mod, and by lists of blocks that kernels
look into at all. It is a mask that can be understood only if the lists follow the mask_mod. They do
if the graph computes them as ``create_block_mask`` does, or if lists that the graph is given agree
with the mask_mod element by element: a premise, checked again when they change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from flasheva_compile import _torch_compat as compat
from flasheva_compile.elementwise import Lifted, NotElementwiseError, along, compute
from flasheva_compile.mutation import Mutations
from flasheva_compile.site import Premise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

_HUGE_BLOCK = 1 << 30  # of the block mask that stands for none


class NotSpelledOutError(Exception):
    """Why an attention stays one opaque call in the shadow."""


@dataclass(frozen=True, slots=True)
class FlexCall:
    """The arguments of one call.

    Attributes:
        query, key, value: ``[B, H, N, D]``.
        score_mod, mask_mod: Graphs of scalars.
        lengths: Queries and keys that the block mask was made for.
        blocks: Number and indices of the listed blocks, ``[B, H, NQ]`` and ``[B, H, NQ, NK]``, then
            of those that are visible as a whole, where they are listed apart.
        block_sizes: Queries and keys of a block.
        scale: Factor of the scores.
        score_others, mask_others: What the two functions read besides their arguments.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    score_mod: fx.GraphModule
    mask_mod: fx.GraphModule
    lengths: tuple[Any, Any]
    blocks: tuple[Tensor | None, ...]
    block_sizes: tuple[int, int]
    scale: Any
    score_others: tuple[Any, ...]
    mask_others: tuple[Any, ...]


def read_call(args: tuple[Any, ...]) -> FlexCall:
    """Read the arguments of the higher-order op.

    Raises:
        NotSpelledOutError: They are not those of the versions that are known.
    """
    if len(args) != 9 or not isinstance(args[4], tuple) or len(args[4]) < 13:
        raise NotSpelledOutError("flex_attention with other arguments than are known")
    query, key, value, score_mod, mask, scale, _, score_others, mask_others = args
    graphs = (score_mod, mask[-1])
    if not all(isinstance(graph, fx.GraphModule) for graph in graphs):
        raise NotSpelledOutError("flex_attention whose mask_mod or score_mod is no graph")
    return FlexCall(
        query=query,
        key=key,
        value=value,
        score_mod=graphs[0],
        mask_mod=graphs[1],
        lengths=mask[:2],
        blocks=mask[2:6],
        block_sizes=mask[-3:-1],
        scale=scale,
        score_others=tuple(score_others),
        mask_others=tuple(mask_others),
    )


def spelled_out(call: FlexCall) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what flex_attention is defined to be: result, log-sum-exp and maximum, both base 2.

    Raises:
        NotSpelledOutError: A function does more than reading and computing scalars.
    """
    query, key, value = call.query, call.key, call.value
    if query.shape[0] != key.shape[0]:
        raise NotSpelledOutError("flex_attention with keys that are broadcast over the batch")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (query @ key.transpose(-2, -1)) * call.scale
    if query.dtype != torch.float64:
        scores = scores.to(torch.float32)
    indices = _indices(scores.shape, scores.device)
    try:
        scores = compute(call.score_mod, (Lifted(scores, 4), *indices), call.score_others)
        visible = compute(call.mask_mod, indices, call.mask_others)
    except NotElementwiseError as error:
        message = f"flex_attention with a mask_mod or score_mod that is not understood: {error}"
        raise NotSpelledOutError(message) from error
    scores = torch.where(visible, scores, -math.inf)
    weights = torch.ops.aten._safe_softmax.default(scores, -1)
    aside = (scores.logsumexp(-1), scores.amax(-1))
    out = weights.to(query.dtype) @ value
    return out, aside[0] / math.log(2), aside[1] / math.log(2)


def _indices(sizes: Sequence[Any], device: torch.device, first: int = 0) -> list[Lifted]:
    """Return batch, head, query (from ``first``) and key of every score."""
    starts = (0, 0, first, 0)
    ends = (*sizes[:2], first + sizes[2] if first else sizes[2], sizes[3])
    pairs = zip(starts, ends, strict=True)
    return [along(torch.arange(*pair, device=device), axis) for axis, pair in enumerate(pairs)]


def trust_blocks(call: FlexCall) -> Premise | None:
    """Say of an attention that is traced on what it rests that its blocks follow its mask_mod.

    Returns:
        The premise; None if they do whatever the graph is given.

    Raises:
        NotSpelledOutError: They do not, or it cannot be known.
    """
    given = [None if x is None else compat.traced_node(x) for x in call.blocks]
    nodes = [node for node in given if node is not None]
    if len(nodes) != sum(x is not None for x in call.blocks) or len(nodes) not in {2, 4}:
        raise NotSpelledOutError("a block mask whose blocks are made in a way that is not known")
    if _is_no_mask(call, nodes):
        return None
    if all(node.op == "placeholder" for node in nodes):
        inputs = nodes[0].graph.find_nodes(op="placeholder")
        premise = _premise(call, nodes, inputs)
        _expect_unwritten(inputs[position] for position in premise.positions)
        return premise
    made = [compat.traced_node(x) for x in _created_blocks(call)]
    known: dict[tuple[fx.Node, fx.Node], bool] = {}
    if not all(_same_computation(a, b, known) for a, b in zip(nodes, made, strict=True)):
        raise NotSpelledOutError("a block mask whose blocks are not made of its mask_mod alone")
    _expect_unwritten(node for pair in known for node in pair)
    return None


def _expect_unwritten(nodes: Iterable[fx.Node]) -> None:
    """Refuse blocks and mask_mods that do not read the same, since a tensor was written between."""
    written: Mutations | None = None
    for node in nodes:
        written = written or Mutations(node.graph)
        if any(written.written_after(n) for n in (node, *node.all_input_nodes)):
            raise NotSpelledOutError("a block mask made of a tensor that is written later")


def _is_no_mask(call: FlexCall, nodes: Sequence[fx.Node]) -> bool:
    """Return whether this is one block, listed, larger than any sequence."""
    names = [getattr(node.target, "_overloadpacket", None) for node in nodes]
    listed = names == [torch.ops.aten.ones, torch.ops.aten.zeros]
    return listed and min(call.block_sizes) >= _HUGE_BLOCK


def _created_blocks(call: FlexCall) -> list[Tensor]:
    """Compute the blocks anew, as ``create_block_mask`` does."""
    number = call.blocks[0]
    assert number is not None
    sizes = (*number.shape[:2], *call.lengths)
    indices = _indices(sizes, number.device)
    try:
        visible = compute(call.mask_mod, indices, call.mask_others)
    except NotElementwiseError as error:
        raise NotSpelledOutError(f"a mask_mod that is not understood: {error}") from error
    for axis in (3, 2, 1, 0):
        visible = visible.expand([sizes[i] if i == axis else -1 for i in range(4)])
    return compat.blocks_of_mask(visible, call.block_sizes, full=call.blocks[2] is not None)


def _same_computation(
    left: Any,  # noqa: ANN401
    right: Any,  # noqa: ANN401
    known: dict[tuple[fx.Node, fx.Node], bool],
) -> bool:
    """Return whether two nodes of a trace compute the same from the same inputs."""
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        if isinstance(left, list | tuple) and isinstance(right, list | tuple):
            pairs = zip(left, right, strict=False)
            return len(left) == len(right) and all(_same_computation(*p, known) for p in pairs)
        return type(left) is type(right) and bool(left == right)
    if left is right:
        return True
    if (left, right) not in known:
        known[left, right] = (
            left.op == right.op == "call_function"
            and left.target is right.target
            and not getattr(getattr(left.target, "_schema", None), "is_mutable", True)
            and left.kwargs.keys() == right.kwargs.keys()
            and _same_computation(left.args, right.args, known)
            and all(_same_computation(left.kwargs[n], right.kwargs[n], known) for n in left.kwargs)
        )
    return known[left, right]


def _premise(call: FlexCall, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node]) -> Premise:
    """Say which inputs have to agree, and how to see whether they do."""
    others: list[Any] = []
    for other in call.mask_others:
        node = compat.traced_node(other) if isinstance(other, torch.Tensor) else None
        if isinstance(other, torch.Tensor) and (node is None or node.op != "placeholder"):
            raise NotSpelledOutError("blocks are given, but their mask_mod reads what is computed")
        others.append(other if node is None else node)
    sizes = (call.query.shape[0], call.query.shape[1], call.query.shape[2], call.key.shape[2])
    if not all(isinstance(n, int) for n in (*sizes, *others) if not isinstance(n, fx.Node)):
        raise NotSpelledOutError("blocks are given, and sizes are dynamic")
    read = [*nodes, *(other for other in others if isinstance(other, fx.Node))]
    follow = _Agreement(call.mask_mod, sizes, call.block_sizes, tuple(others), len(nodes))
    return Premise(
        positions=tuple(inputs.index(node) for node in read),
        holds=follow,
        text="the blocks of a block mask follow its mask_mod",
    )


@dataclass(frozen=True, slots=True)
class _Agreement:
    """Checks lists of blocks against a mask_mod, one row of blocks at a time."""

    mask_mod: fx.GraphModule
    sizes: tuple[int, ...]
    block_sizes: tuple[int, int]
    others: tuple[Any, ...]
    lists: int

    @property
    def key(self) -> object:
        """What two checks that agree have in common."""
        return self.mask_mod.code, self.sizes, self.block_sizes, self.others

    def __call__(self, *tensors: Tensor) -> bool:
        blocks, rest = tensors[: self.lists], iter(tensors[self.lists :])
        others = [next(rest) if isinstance(other, fx.Node) else other for other in self.others]
        height, width = self.block_sizes
        count = -(-self.sizes[3] // width)
        if blocks[0].shape[2] * height < self.sizes[2] or blocks[1].shape[3] < count:
            return False
        listed = _listed(*blocks[:2])
        full = _listed(*blocks[2:]) if self.lists == 4 else torch.zeros_like(listed)
        for row in range(-(-self.sizes[2] // height)):
            some, every = self._row(row, count, blocks[0].device, others)
            looked_into = (listed | full)[:, :, row, :count]
            if bool((some & ~looked_into).any() | (full[:, :, row, :count] & ~every).any()):
                return False
        return True

    def _row(
        self, row: int, count: int, device: torch.device, others: Sequence[Any]
    ) -> tuple[Tensor, Tensor]:
        """Return which blocks of a row have some visible score, and which have only such."""
        height, width = self.block_sizes
        rows = min(height, self.sizes[2] - row * height)
        sizes = (*self.sizes[:2], rows, self.sizes[3])
        visible = compute(self.mask_mod, _indices(sizes, device, row * height), others)
        visible = visible.expand(-1, -1, rows, -1).expand(-1, -1, -1, self.sizes[3])
        reduced = []
        reductions: tuple[tuple[Callable[..., Tensor], bool], ...]
        reductions = ((torch.any, False), (torch.all, True))
        for reduce, fill in reductions:
            columns = reduce(visible, 2)
            missing = count * width - self.sizes[3]
            padded = torch.nn.functional.pad(columns, (0, missing), value=fill)
            reduced.append(reduce(padded.unflatten(-1, (count, width)), -1))
        return reduced[0], reduced[1]


def _listed(number: Tensor, indices: Tensor) -> Tensor:
    """Return, as ``[B, H, NQ, NK]`` of bool, which blocks a list names."""
    named = torch.arange(indices.shape[-1], device=indices.device) < number[..., None]
    found = torch.zeros(indices.shape, dtype=torch.int32, device=indices.device)
    return found.scatter_add(-1, indices.long(), named.int()).bool()
