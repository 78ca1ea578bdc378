"""What one generated kernel computes (KernelSpec) and how fast it tries to (Schedule)."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Literal

KernelKind = Literal[
    "chunk_tokens", "bias_columns", "forward", "dq", "dchunk", "dsink", "dkv", "dpool", "domega"
]
"""Kernels of one attention.

``chunk_tokens`` pools keys and values; ``bias_columns`` writes biases as columns of keys, for a
``forward`` whose products add them and whose chunk tokens were not pooled in the same call;
``forward`` and ``dq`` keep a block of queries and walk over what it sees; ``dchunk``, ``dsink`` and
``dkv`` keep a block of chunk tokens, sinks or keys and walk over the queries that see it; ``dkv``
with a chunk rule and ``dpool`` add the gradient of pooling; ``domega`` keeps a block of chunks of
the ``eva`` rule, for the gradient of what it pools around.
"""

DecodeKind = Literal["decode", "decode_combine"]
"""Kernels of one step of generation.

``decode`` attends from one new token per row to a part of the cache, and appends the token;
``decode_combine`` adds the parts up.
"""

ExtendKind = Literal["extend_pool", "extend", "extend_append", "extend_combine"]
"""Kernels of several new tokens over a cache, in the order of their launches.

``extend_pool`` pools the chunks that the tokens complete; ``extend`` attends from them to a part of
the cache and of themselves; ``extend_append`` writes them; ``extend_combine`` adds the parts up.
"""

RetrievalKind = Literal["chunk_bounds", "select", "retrieve"]
"""Kernels of the retrieval tier, around ``forward``.

``chunk_bounds`` makes what scores chunks where their tokens do not; ``select`` finds the chunks
that each group of queries attends exactly; ``retrieve`` attends to their keys and goes on with the
softmax of ``forward``.
"""

RetrievalBackwardKind = Literal["selection_bits", "retrieved_dq", "retrieved_dkv"]
"""Kernels of the retrieval tier's backward pass, beside those of one attention.

``selection_bits`` marks the selected chunk tokens again, as ``select`` did; ``retrieved_dq`` keeps
a group of queries and adds the gradient through the keys that it retrieved; ``retrieved_dkv`` keeps
a chunk and walks over the queries that retrieved it.
"""

RetrievalDecodeKind = Literal["retrieval_scores", "retrieval_select", "retrieval_decode"]
"""Kernels of one step of generation with retrieval, before ``decode_combine``.

``retrieval_scores`` appends the token and scores the chunk tokens, each program a tile of them;
``retrieval_select`` finds the best where tiles have peaks; ``retrieval_decode`` attends to a
part of what the token sees.
"""

VecInferKind = Literal["vecinfer_append", "vecinfer_decode", "vecinfer_combine"]
"""Kernels of one step over a cache of codes; see ``spec_vecinfer.py``."""

AnyKind = Literal[
    KernelKind,
    ExtendKind,
    RetrievalKind,
    RetrievalBackwardKind,
    DecodeKind,
    RetrievalDecodeKind,
    VecInferKind,
]

Documents = Literal["dense", "padded", "packed"]
"""``dense``: every key is valid; ``padded``: a key mask per row; ``packed``: several documents."""

BIAS_COLUMNS = 16
"""Columns that hold a bias in three pieces: the least that a product of matrices takes."""

STATE_BLOCK = 128
"""Largest tile of queries; the states of queries are padded to a multiple and one block more."""

_QUERY_FIELDS = ("window_size", "sink_size", "window", "causal", "group", "softcap", "alibi")
_SCORE_FIELDS = ("dropout", "negative_scale", "tf32", "whole_chunks")
_POOLING_FIELDS = ("chunk_rule", "parameters", "accumulate", "bias_columns")
_DECODE_FIELDS = ("documents", "causal", "accumulate", "bias_columns", *_SCORE_FIELDS)
_COMBINE_FIELDS = (
    *("key_mask", "chunk_size", "retrieve_chunks", "by_bounds", "weighted_bounds"),
    *("near_store", "fp8_store", "fp8_chunks"),
    *(*_QUERY_FIELDS, *_POOLING_FIELDS, *_DECODE_FIELDS),
)
_SELECTED_BY = (
    *("group", "retrieve_chunks", "by_bounds"),
    *("window", "window_size", "chunk_size", "sink_size"),
)
_IGNORED: dict[str, tuple[str, ...]] = {  # by other kernels: what pools
    "chunk_tokens": _QUERY_FIELDS + _SCORE_FIELDS,
    "dpool": ("bias_columns", *_QUERY_FIELDS, *_SCORE_FIELDS),
    **dict.fromkeys(("chunk_bounds", "domega"), _QUERY_FIELDS + _SCORE_FIELDS + _POOLING_FIELDS),
    "dkv": ("bias_columns",),
    "decode": _DECODE_FIELDS,
    "retrieval_scores": ("alibi", *_DECODE_FIELDS),
    **dict.fromkeys(("decode_combine", "extend_combine"), _COMBINE_FIELDS),
    "bias_columns": _COMBINE_FIELDS,
    "extend_pool": ("group", "softcap", *_DECODE_FIELDS),
    "extend": (*_POOLING_FIELDS, *_DECODE_FIELDS),
    "extend_append": ("group", "softcap", "fp8_chunks", "alibi", *_POOLING_FIELDS, *_DECODE_FIELDS),
    "retrieval_select": tuple(name for name in _COMBINE_FIELDS if name not in _SELECTED_BY),
    "retrieval_decode": (
        *("key_mask", "by_bounds", "weighted_bounds", "alibi"),
        *(*_POOLING_FIELDS, *_DECODE_FIELDS),
    ),
}
_READ_BY_EVA = {  # what others ignore: it keeps the mean queries of groups
    "extend_pool": ("group",),
    "extend_append": ("group", "chunk_rule"),
}
_NEUTRAL = {
    "documents": "dense",
    "key_mask": False,
    "chunk_size": 1,
    "window_size": 0,
    "sink_size": 0,
    "window": "sliding",
    "causal": True,
    "group": 1,
    "softcap": False,
    "alibi": False,
    "dropout": False,
    "negative_scale": False,
    "tf32": False,
    "whole_chunks": False,
    "chunk_rule": None,
    "parameters": 0,
    "accumulate": False,
    "bias_columns": False,
    "retrieve_chunks": 0,
    "by_bounds": False,
    "weighted_bounds": False,
    "near_store": False,
    "fp8_store": False,
    "fp8_chunks": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """Everything that decides the result of one kernel; lengths and strides are arguments.

    Attributes:
        kind: Which kernel.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"`` of queries, keys, values and results.
        head_dim: Size ``D`` of queries and keys.
        value_dim: Size ``Dv`` of values.
        group: Query heads per key head.
        window_size: Window ``w`` [tokens].
        chunk_size: Keys per chunk ``c`` [tokens].
        sink_size: Exact first tokens, a multiple of ``chunk_size`` [tokens].
        window: ``"sliding"`` or ``"block"``; of kernels over a cache also ``"whole"``, every token.
        causal: Whether a query sees only its past.
        documents: How rows are laid out.
        key_mask: Whether a key mask is read, by ``decode`` that of the new tokens; always for
            ``padded``.
        softcap: Scores go through ``softcap * tanh(x / softcap)``.
        alibi: Scores get a slope per head times the distance.
        dropout: Joint weights are dropped.
        negative_scale: The score scale is not positive (costs one multiplication a score).
        chunk_rule: Rule of the pooling that this kernel does; None = none.
        parameters: How many parameters the rule has; of ``eva``, over a cache, 8 or none.
        accumulate: ``dpool`` adds to gradients that are there, instead of writing them.
        bias_columns: ``chunk_tokens`` writes its biases as columns of keys, too.
        tf32: Products of fp32 run in TF32.
        whole_chunks: Every query stands inside the keys and every chunk token that is seen has the
            bias ``ln c``: no bias is read, and none gets a gradient.
        selection_group: Queries that share a selection of chunks, whose chunk tokens ``forward``,
            ``dq`` and ``dchunk`` leave out, and ``dkv`` adds what retrieved keys get; 0 = nothing
            is retrieved.
        retrieve_chunks: Chunks that a query attends exactly, at most.
        retrieve_block: Positions for which the first one selects; ``select`` alone asks.
        by_bounds: The bounds of a chunk's keys score it, not its chunk token.
        weighted_bounds: This kernel makes bounds, with weights instead of halves.
        near_store: Sinks and the latest tokens are read from copies of their own.
        fp8_store: Selected keys are read from fp8; implies ``near_store``.
        fp8_chunks: Chunk tokens of a cache are stored in fp8.
    """

    kind: AnyKind
    dtype: str
    head_dim: int
    value_dim: int
    chunk_size: int
    documents: Documents = "dense"
    key_mask: bool = False
    group: int = 1
    window_size: int = 0
    sink_size: int = 0
    window: str = "sliding"
    causal: bool = True
    softcap: bool = False
    alibi: bool = False
    dropout: bool = False
    negative_scale: bool = False
    chunk_rule: str | None = None
    parameters: int = 0
    accumulate: bool = False
    bias_columns: bool = False
    tf32: bool = False
    whole_chunks: bool = False
    selection_group: int = 0
    retrieve_chunks: int = 0
    retrieve_block: int = 1
    by_bounds: bool = False
    weighted_bounds: bool = False
    near_store: bool = False
    fp8_store: bool = False
    fp8_chunks: bool = False

    def of_kind(self, kind: AnyKind) -> KernelSpec:
        """Return the spec of another kernel of the same attention, without what it ignores."""
        ignored = _IGNORED.get(kind, _POOLING_FIELDS)
        reads = _READ_BY_EVA.get(kind, ()) if self.chunk_rule == "eva" else ()
        neutral = {name: _NEUTRAL[name] for name in ignored if name not in reads}
        if kind in ("decode_combine", "extend_combine"):
            neutral["head_dim"] = self.value_dim  # it reads values alone
        elif kind in ("retrieval_select", "bias_columns"):
            # They read scores or biases alone.
            neutral |= {"dtype": "fp32", "head_dim": 1, "value_dim": 1, "selection_group": 0}
        return dataclasses.replace(self, kind=kind, **neutral)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How a kernel is tiled; changes speed and rounding, never what is computed.

    Attributes:
        block_m: Queries per tile; ``decode`` takes the query heads of a key head instead.
        block_n: Keys, chunk tokens, (``chunk_tokens``) chunks or (``decode_combine``) parts per
            tile.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
        tma: Tiles of the loops come through tensor descriptors (sm_90 and later).
        split_window: Separate loops for the parts of the window that need no mask.
        max_registers: Registers a thread may use, so that more programs fit; 0 = no limit.
        product_bias: Products add the biases of chunk tokens, see ``emit/product_bias.py``.
        consumers: Warpgroups that attend from 64 queries each, fed by a warp of its own, see
            ``emit/specialised.py``; 0 = all warps do the same.
        overlap: Consumers add the values of one tile while they score the next.
        persistent: As many programs as fit walk over all blocks of queries.
        e4m3: Instructions that know e4m3 turn fp8 into numbers (sm_89 and later).
        dependent: Launched before the kernel in front of it ends, and lets the next one be
            launched, see ``emit/dependent_launch.py`` (sm_90).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    split_window: bool = False
    max_registers: int = 0
    product_bias: bool = False
    consumers: int = 0
    overlap: bool = False
    persistent: bool = False
    e4m3: bool = False
    dependent: bool = False


def adds_bias_by_product(spec: KernelSpec) -> bool:
    """Whether biases may go through the products: they are scaled there as products are."""
    scaled_alone = not (spec.softcap or spec.alibi or spec.negative_scale)
    has_biases = spec.kind in ("forward", "dq") and not spec.whole_chunks
    return has_biases and scaled_alone and spec.dtype != "fp32"


def pools_by_products(spec: KernelSpec) -> bool:
    """Whether ``dkv`` computes the gradient of pooling by products: few chunks touch its tiles.

    Narrow heads have the registers to do it key by key, which is 3 to 5 % faster (measured).
    """
    ruled = spec.kind == "dkv" and spec.chunk_rule in ("mean", "tangent")
    fits = spec.dtype == "bf16" and spec.documents != "packed" and spec.chunk_size >= 4
    return ruled and fits and max(spec.head_dim, spec.value_dim) > NARROW


NARROW = 64
"""Head dimensions up to this leave room for the gradient of pooling, whatever the rule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedKernel:
    """Source text of one kernel.

    Attributes:
        spec: What it computes.
        schedule: How it is tiled.
        name: Readable file name without suffix, ending in the digest.
        source: A complete module.
        arguments: Names of the entry point's arguments, in order.
    """

    spec: KernelSpec
    schedule: Schedule
    name: str
    source: str
    arguments: tuple[str, ...]


def padded(size: int) -> int:
    """Return a head dimension rounded up to one power of two.

    ``decode`` waits for memory, which padding does not touch; parts cost it registers, and with
    them programs that wait side by side.
    """
    return max(16, 1 << (size - 1).bit_length())


def group_rows(group: int) -> int:
    """Return the rows of a tile that holds the query heads of one key head."""
    return padded(group)


def digest(text: str) -> str:
    """Return twelve hexadecimal digits that identify a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def parts(size: int) -> tuple[tuple[int, int], ...]:
    """Split a head dimension into powers of two, ``(offset, size)``, at least 16 each.

    A tile's sides must be powers of two; padding 80 to 128 would waste 1.6x of the products, while
    80 = 64 + 16 wastes nothing. Only the last part may reach beyond ``size``.
    """
    rounded = -(-size // 16) * 16
    result, offset = [], 0
    for bit in reversed(range(rounded.bit_length())):
        if rounded >> bit & 1:
            result.append((offset, 1 << bit))
            offset += 1 << bit
    return tuple(result)
