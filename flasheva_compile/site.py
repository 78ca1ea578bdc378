"""The values that pass between the stages: captured graph, sites, misses, decisions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import sympy
    import torch
    from torch import fx

    from flasheva_compile.config import EvaConfig, LayerName
    from flasheva_compile.lowering.op import EvaOp
    from flasheva_compile.masks.predicate import MaskPredicate


MaskKind: TypeAlias = Literal["bool", "masked_out", "additive", "factor"]
# How a tensor is turned into another layout: functions of torch with what follows the tensor, such
# as ("transpose", (-2, -1)).
Layout: TypeAlias = tuple[tuple[str, tuple], ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """A node of Dynamo's graph: the path of its graph module ("" is the root) and its name."""

    graph: str
    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Premise:
    """What a rewritten graph rests on: true of the inputs that it was compiled for.

    Attributes:
        positions: The inputs of the graph that it is about.
        holds: Tells of these tensors whether it is true.
        text: The premise, for people.
    """

    positions: tuple[int, ...]
    holds: Callable[..., bool]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedGraph:
    """Dynamo's graph and its pre-dispatch ATen shadow, which is only read.

    Attributes:
        dynamo: The graph to be edited.
        shadow: The same computation in pre-dispatch ATen, bodies of checkpoints inlined.
        origins: Shadow node -> the Dynamo nodes with the same value, one per graph at most.
        data: Shadow placeholder -> its real tensor, where the backend was given one.
        premises: Shadow node -> what its meaning rests on.
        opaque: Shadow node of an attention that stays one call -> why.
        hidden: Attentions that are not in the shadow.
        warnings: Parts of the graph that could not be looked into.
    """

    dynamo: fx.GraphModule
    shadow: fx.GraphModule
    origins: Mapping[fx.Node, tuple[Origin, ...]]
    data: Mapping[fx.Node, torch.Tensor]
    premises: Mapping[fx.Node, Premise] = field(default_factory=dict)
    opaque: Mapping[fx.Node, str] = field(default_factory=dict)
    hidden: tuple[MissedSite, ...] = ()
    warnings: tuple[str, ...] = ()

    def origin(self, node: fx.Node, graph: str) -> Origin | None:
        """Return the Dynamo node in the given graph that holds a shadow node's value."""
        return next((o for o in self.origins.get(node, ()) if o.graph == graph), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """A tensor ``[B, H, N, D]`` made from one of Dynamo's graph.

    Attributes:
        origin: The node.
        node: The shadow node with the same value.
        layout: What makes it ``[B, H, N, D]``.
        heads, dim: Its sizes.
        length: Its number of tokens; None if symbolic.
        dtype: Its dtype.
    """

    origin: Origin
    node: fx.Node
    layout: Layout
    heads: int
    dim: int
    length: int | None
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class MaskTerm:
    """One mask met on the score path.

    Attributes:
        node: Broadcasts to ``[B, H, L, S]``.
        kind: "bool": True = may attend; "masked_out": True = may not (as in
            ``masked_fill(scores, node, -inf)``); "additive": added to the scaled scores; "factor":
            they are multiplied by it, and where they are visible it has to be 1.
        axes: What the axes of the scores are that it acts on: "b", "h", "q", "k", or "n" for
            ``b * H + h``. It aligns with their last ones.
        factor: By what scores are multiplied after it is added.
    """

    node: fx.Node
    kind: MaskKind
    axes: tuple[str, ...] = ("b", "h", "q", "k")
    factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an attention stands, for people and for rules.

    Attributes:
        path: Module path as the traced frame spells it, such as ``L['self'].model.layers.0.attn``.
        module_id: ``id`` of the module that runs it, or None for a plain function.
        source: ``file:line`` of the code.
    """

    path: str
    module_id: int | None
    source: str

    @property
    def local_path(self) -> str:
        """The path without the frame's spelling of the root: ``L['self'].a.b`` -> ``a.b``."""
        return re.sub(r"^[LG]\['[^']*'\]\.?", "", self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSite:
    """One softmax attention, understood.

    Attributes:
        place: Where it stands.
        output: The Dynamo node that holds its result.
        result: The shadow node with the same value.
        result_layout: What makes the result out of ``[B, Hq, L, Dv]``.
        query, key, value: Its operands; key and value with their own number of heads.
        scale, softcap, dropout_p: Score and weight modifications (0.0: none).
        masks: Every mask on the score path.
        is_causal: SDPA's flag.
        score_shape: Sizes ``(B, Hq, L, S)``; ints or SymInts.
        lengths_equal: Queries and keys have provably the same length.
        appended: The queries' own keys are the last of a cache.
        same_source: Queries and keys are projected from the same tensor, and the tokens of both and
            of the values stand as they did there.
        learned_mask: What is added to the scores depends on something that is trained.
        parameter_mask: What is added to the scores depends on a parameter, trained or frozen.
        dtype: In which it is computed: that of the result, or a wider one that scores have.
        result_dtype: Of the result.
    """

    place: Place
    output: Origin
    result: fx.Node
    result_layout: Layout
    query: Operand
    key: Operand
    value: Operand
    scale: float
    softcap: float
    dropout_p: float
    masks: tuple[MaskTerm, ...]
    is_causal: bool
    score_shape: tuple[int | torch.SymInt, ...]
    lengths_equal: bool
    appended: bool
    same_source: bool
    learned_mask: bool
    parameter_mask: bool
    dtype: torch.dtype
    result_dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class MissedSite:
    """An attention that was recognised but not understood, with the first reason."""

    place: Place
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Replace:
    """Rewrite this site.

    Attributes:
        site: What to replace.
        layer: Its name.
        config: The chosen configuration.
        op: What the rewritten attention computes.
        mask: The proved predicate, None where there was no mask tensor.
        mask_text: The predicate for people.
        slope: Slopes of ALiBi, over ``h``; None without.
        assumed: The mask is taken for what the user declares.
    """

    site: AttentionSite
    layer: LayerName
    config: EvaConfig
    op: EvaOp
    mask: MaskPredicate | None
    mask_text: str
    slope: sympy.Expr | None = None
    assumed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Leave this attention as it is, and say why.

    Attributes:
        site: The attention.
        layer: Its name.
        reason: Why it stays full.
        mask_text: What its mask was proved to be, if anything.
        expected: The configuration or the model itself asks for it; not a failure of ours.
    """

    site: AttentionSite | MissedSite
    layer: LayerName
    reason: str
    mask_text: str = ""
    expected: bool = False


Decision: TypeAlias = Replace | Keep


@dataclass(frozen=True, slots=True, kw_only=True)
class RewritePlan:
    """Decisions in graph order."""

    decisions: tuple[Decision, ...] = field(default=())
