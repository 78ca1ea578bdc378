"""What runs behind the ops: generated kernels on a GPU, blocked PyTorch code everywhere else.

Both compute what ``kernels/reference`` defines. The blocked code also serves the corners that no
kernel covers: fp64, head dimensions above 256, dropout of everything, no Triton.
"""

from __future__ import annotations

import importlib.util
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from flasheva_compile.kernels.blocked.attention import attention_forward
from flasheva_compile.kernels.blocked.attention_backward import attention_backward
from flasheva_compile.kernels.blocked.block import Operands
from flasheva_compile.kernels.blocked.chunk_bounds import chunk_bounds, selecting_by_bounds
from flasheva_compile.kernels.blocked.chunk_tokens import ChunkSettings, chunk_tokens_forward
from flasheva_compile.kernels.blocked.chunk_tokens_backward import (
    TokenGradients,
    chunk_tokens_backward,
)
from flasheva_compile.kernels.blocked.geometry import (
    AttentionSettings,
    attention_geometry,
    exact_interval,
)
from flasheva_compile.kernels.blocked.retrieval import retrieval_forward
from flasheva_compile.kernels.blocked.retrieval_backward import retrieval_backward
from flasheva_compile.kernels.blocked.retrieval_select import (
    Retrieval,
    group_size,
    select_chunks,
)
from flasheva_compile.lowering import (
    first_calls,
    launch,
    launch_pooling,
    launch_retrieval,
    launch_retrieval_backward,
    recording,
)
from flasheva_compile.lowering.kernel_arguments import DTYPES
from flasheva_compile.lowering.pooled_chunks import PooledChunks, kept_masses, kernel_rule
from flasheva_compile.lowering.rows import rows_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from flasheva_compile.lowering.rows import Rows

_LARGEST_HEAD_DIM = 256
_SMALLEST_CAPABILITY = (8, 0)  # bf16 products


class Masks(NamedTuple):
    """The optional tensors of a call, as in the ops' schemas."""

    key_mask: Tensor | None = None
    segment_ids: Tensor | None = None
    alibi_slopes: Tensor | None = None
    dropout_seed: Tensor | None = None


class Pooled(NamedTuple):
    """Chunk tokens and the log-masses that their gradient needs (empty where it needs none)."""

    rfa_k: Tensor
    rfa_v: Tensor
    rfa_bias: Tensor
    mass_k: Tensor
    mass_v: Tensor


@cache
def _device_runs_kernels(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.version.hip is not None or (
        torch.cuda.get_device_capability(device) >= _SMALLEST_CAPABILITY
    )


def runs_kernels(k: Tensor, v: Tensor, dropout_p: float = 0.0) -> bool:
    """Whether a call runs generated kernels; the blocked code computes the same."""
    covered = k.dtype in DTYPES and max(k.shape[3], v.shape[3]) <= _LARGEST_HEAD_DIM
    sized = 0 not in k.shape and v.shape[3] > 0
    if not covered or not sized or dropout_p >= 1:
        return False
    return recording.specs is not None or (k.is_cuda and _device_runs_kernels(k.device))


def mass_sizes(
    k: Tensor, v: Tensor, parameters: Sequence[Tensor], o: dict[str, Any]
) -> tuple[bool, bool]:
    """Return which log-masses :func:`pool` keeps: of the keys' weights, of the values'."""
    if not runs_kernels(k, v):
        return False, False
    return kept_masses(kernel_rule(o["rule"], list(parameters)))


_LONGEST = 2**30  # tokens; a row of bf16 keys would take 64 GiB and more


def attention_settings(o: dict[str, Any]) -> AttentionSettings:
    """Return the numbers of a call; sinks are rounded up to whole chunks.

    Windows and sinks longer than any row are cut: kernels add and subtract them in 32 bits.
    """
    c = o["chunk_size"]
    names = ("chunk_size", "window", "causal", "q_offset", "scale", "softcap")
    return AttentionSettings(
        window_size=min(o["window_size"], max(1, _LONGEST // c) * c),
        sink_tokens=-(-min(o["sink_tokens"], _LONGEST) // c) * c,
        dropout_p=o["dropout_p"],
        **{name: o[name] for name in names},
    )


def _operands(qkv: Sequence[Tensor], tokens: Sequence[Tensor], masks: Masks) -> Operands:
    q, k, v = qkv
    rfa_k, rfa_v, rfa_bias = tokens
    return Operands(
        q=q,
        k=k,
        v=v,
        rfa_k=rfa_k,
        rfa_v=rfa_v,
        rfa_bias=rfa_bias,
        alibi_slopes=masks.alibi_slopes,
        dropout_seed=masks.dropout_seed,
    )


def _rows(k: Tensor, masks: Masks, chunk_size: int) -> Rows:
    alibi = masks.alibi_slopes is not None
    return rows_of(k, masks.key_mask, masks.segment_ids, chunk_size=chunk_size, alibi=alibi)


# --- pooling --------------------------------------------------------------------------------------


def pool(
    k: Tensor, v: Tensor, parameters: Sequence[Tensor], masks: Masks, o: dict[str, Any]
) -> Pooled:
    """Pool keys and values into chunk tokens."""
    rule, c, scale = o["rule"], o["chunk_size"], o["scale"]
    if runs_kernels(k, v):
        tokens, pooled = launch_pooling.chunk_tokens_forward(
            k, v, tuple(parameters), _rows(k, masks, c), rule=rule, chunk_size=c, scale=scale
        )
        return _outputs(tokens, pooled)
    settings = ChunkSettings(rule=rule, chunk_size=c, scale=scale)
    tokens = chunk_tokens_forward(k, v, parameters, masks.key_mask, masks.segment_ids, settings)
    return Pooled(*tokens, tokens[2].new_empty(0), tokens[2].new_empty(0))


def _outputs(tokens: tuple[Tensor, Tensor, Tensor], pooled: PooledChunks) -> Pooled:
    like = tokens[2]  # outputs of an op may not share storage: one empty tensor each
    masses = (like.new_empty(0) if x is None else x for x in (pooled.mass_k, pooled.mass_v))
    return Pooled(*tokens, *masses)


def pool_backward(
    grads: Sequence[Tensor],
    k: Tensor,
    v: Tensor,
    parameters: Sequence[Tensor],
    masks: Masks,
    o: dict[str, Any],
) -> list[Tensor]:
    """Differentiate :func:`pool`: gradients of ``k``, ``v`` and the parameters."""
    rule, c, scale = o["rule"], o["chunk_size"], o["scale"]
    if runs_kernels(k, v):
        dk, dv, *vectors = launch_pooling.chunk_tokens_backward(
            tuple(grads),  # pyright: ignore[reportArgumentType]
            k,
            v,
            tuple(parameters),
            _rows(k, masks, c),
            rule=rule,
            chunk_size=c,
            scale=scale,
        )
        return [dk, dv, *_parameter_gradients(vectors, parameters, grads[2], k)]
    settings = ChunkSettings(rule=rule, chunk_size=c, scale=scale)
    masked = (parameters, masks.key_mask, masks.segment_ids, settings)
    dk, dv, dp = chunk_tokens_backward(TokenGradients(*grads), k, v, *masked)
    return [x.contiguous() for x in (dk, dv, *dp)]


def _parameter_gradients(
    vectors: Sequence[Tensor], parameters: Sequence[Tensor], drfa_bias: Tensor, k: Tensor
) -> list[Tensor]:
    """Cast gradients of parameters; the bias of ``evabyte`` adds up what arrives at chunks."""
    if not parameters:
        return []
    grads = list(vectors[: len(parameters)])
    if len(parameters) > len(grads):
        grads.append(drfa_bias.sum((0, 2)))
    return [g.to(p.dtype).view_as(p) for g, p in zip(grads, parameters, strict=True)]


# --- attention over given chunk tokens ------------------------------------------------------------


def attend(
    qkv: Sequence[Tensor], tokens: Sequence[Tensor], masks: Masks, o: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Attend to chunk tokens, sinks and window: ``out`` and ``lse``."""
    q, k, v = qkv
    settings, t = attention_settings(o), _operands(qkv, tokens, masks)
    if k.shape[2] == 0:
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        return out, q.new_full(q.shape[:3], -torch.inf, dtype=t.compute_dtype)
    if runs_kernels(k, v, settings.dropout_p):
        rows = _rows(k, masks, settings.chunk_size)
        return launch.attention_forward(t, rows, settings)
    geometry = attention_geometry(
        q.shape[2], k.shape[2], settings, masks.key_mask, masks.segment_ids, q.device
    )
    return attention_forward(t, geometry, settings)


def attend_backward(
    dout: Tensor,
    result: tuple[Tensor, Tensor],
    qkv: Sequence[Tensor],
    tokens: Sequence[Tensor],
    masks: Masks,
    o: dict[str, Any],
) -> tuple[Tensor, ...]:
    """Differentiate :func:`attend` with respect to its six tensors."""
    q, k, v = qkv
    if k.shape[2] == 0:
        return tuple(x.new_zeros(x.shape) for x in (*qkv, *tokens))
    settings, t = attention_settings(o), _operands(qkv, tokens, masks)
    if runs_kernels(k, v, settings.dropout_p):
        rows = _rows(k, masks, settings.chunk_size)
        call = (dout, *result, t, rows, settings)
        grads = first_calls.side_by_side(partial(launch.attention_backward, *call))
        return _as_outputs(grads, (*qkv, *tokens))
    geometry = attention_geometry(
        q.shape[2], k.shape[2], settings, masks.key_mask, masks.segment_ids, q.device
    )
    return tuple(attention_backward(dout, *result, t, geometry, settings))


def _as_outputs(grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Cast gradients to the dtypes of their inputs; those of chunk tokens share storage."""
    pairs = enumerate(zip(grads, inputs, strict=True))
    return tuple(g.to(x.dtype, copy=n >= 3) for n, (g, x) in pairs)


# --- both -----------------------------------------------------------------------------------------


def pool_and_attend(
    qkv: Sequence[Tensor], parameters: Sequence[Tensor], masks: Masks, o: dict[str, Any]
) -> tuple[Tensor, Tensor, Pooled]:
    """Pool, then attend."""
    return first_calls.side_by_side(partial(_pool_and_attend, qkv, parameters, masks, o))


def _pool_and_attend(
    qkv: Sequence[Tensor], parameters: Sequence[Tensor], masks: Masks, o: dict[str, Any]
) -> tuple[Tensor, Tensor, Pooled]:
    q, k, v = qkv
    if not runs_kernels(k, v, o["dropout_p"]):
        pooled = pool(k, v, parameters, masks, o)
        return *attend(qkv, pooled[:3], masks, o), pooled
    s, rows = attention_settings(o), _rows(k, masks, o["chunk_size"])
    pooling: dict[str, Any] = {name: o[name] for name in ("rule", "chunk_size", "scale")}
    rule, sloped = kernel_rule(o["rule"], list(parameters)), masks.alibi_slopes is not None
    pooling["bias_columns"] = launch.reads_bias_columns((q, k, v), s, rows, rule, sloped=sloped)
    tokens, known = launch_pooling.chunk_tokens_forward(k, v, tuple(parameters), rows, **pooling)
    out, lse = launch.attention_forward(_operands(qkv, tokens, masks), rows, s, known)
    return out, lse, _outputs(tokens, known)


def _known(pooled: Pooled, parameters: Sequence[Tensor], o: dict[str, Any]) -> PooledChunks:
    mass_k, mass_v = (x if x.numel() else None for x in (pooled.mass_k, pooled.mass_v))
    rule = kernel_rule(o["rule"], list(parameters))
    return PooledChunks(rule, tuple(parameters), mass_k, mass_v)


def pool_and_attend_backward(
    dout: Tensor,
    result: tuple[Tensor, Tensor],
    pooled: Pooled,
    qkv: Sequence[Tensor],
    parameters: Sequence[Tensor],
    masks: Masks,
    o: dict[str, Any],
) -> list[Tensor]:
    """Differentiate :func:`pool_and_attend`: ``dq, dk, dv`` and the parameters' gradients."""
    _, k, v = qkv
    if runs_kernels(k, v, o["dropout_p"]):
        settings, t = attention_settings(o), _operands(qkv, pooled[:3], masks)
        rows = _rows(k, masks, settings.chunk_size)
        known = _known(pooled, parameters, o)
        call = (dout, *result, t, rows, settings, known)
        grads = first_calls.side_by_side(partial(launch.attention_backward, *call))
        vectors = _parameter_gradients(grads[6:], parameters, grads[5], k)
        return [*grads[:3], *vectors]
    dq, dk, dv, *dtokens = attend_backward(dout, result, qkv, pooled[:3], masks, o)
    pool_dk, pool_dv, *dparameters = pool_backward(dtokens, k, v, parameters, masks, o)
    return [dq, dk + pool_dk, dv + pool_dv, *dparameters]


# --- retrieval tier -------------------------------------------------------------------------------


def selection_shape(
    q: Tensor, tokens: Sequence[Tensor], masks: Masks, o: dict[str, Any]
) -> tuple[Any, ...]:
    """Return the shape of a selection, ``[B, Hkv, groups, chunks]``."""
    uniform = masks.key_mask is None and masks.segment_ids is None
    group = group_size(o["retrieve_block"], uniform=uniform)
    batch, kv_heads, slots = tokens[2].shape
    groups = (q.shape[2] + group - 1) // group
    return batch, kv_heads, groups, torch.sym_min(o["retrieve_chunks"], slots)


def _nothing_to_retrieve(q: Tensor, k: Tensor, s: AttentionSettings) -> bool:
    """Whether sinks and window cover every key, so that no query sees any chunk token.

    Queries may stand behind the last key, and their windows, too.
    """
    last = max(k.shape[2], s.q_offset + q.shape[2]) - 1
    return exact_interval(last, k.shape[2], s)[0] <= s.sink_tokens


def retrieve(
    qkv: Sequence[Tensor], tokens: Sequence[Tensor], masks: Masks, o: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend exactly inside the best chunks too: ``out``, ``lse`` and the selection."""
    q, k, v = qkv
    settings, t = attention_settings(o), _operands(qkv, tokens, masks)
    if k.shape[2] == 0 or _nothing_to_retrieve(q, k, settings):
        out, lse = attend(qkv, tokens, masks, o)
        return out, lse, q.new_full(selection_shape(q, tokens, masks, o), -1, dtype=torch.int32)
    by, weight = o["retrieve_by"], o.get("selector_weight")
    weight = None if weight is None else weight.contiguous()
    sizes = {"chunks": o["retrieve_chunks"], "block": o["retrieve_block"]}
    retrieval = Retrieval(**sizes, by=by, weight=weight)
    if runs_kernels(k, v, settings.dropout_p):
        rows = _rows(k, masks, settings.chunk_size)
        if launch_retrieval.covers(t, rows, settings, retrieval):
            call = partial(launch_retrieval.retrieval_forward, t, rows, settings, retrieval)
            return first_calls.side_by_side(call)
    geometry = attention_geometry(
        q.shape[2], k.shape[2], settings, masks.key_mask, masks.segment_ids, q.device
    )
    selecting = t
    if by == "bounds":
        bounds = chunk_bounds(k, masks.key_mask, masks.segment_ids, settings.chunk_size, weight)
        selecting = selecting_by_bounds(t, bounds)
    selected = select_chunks(selecting, geometry, settings, retrieval)
    return *retrieval_forward(t, geometry, settings, retrieval, selected), selected


def retrieve_backward(
    dout: Tensor,
    result: tuple[Tensor, Tensor, Tensor],
    qkv: Sequence[Tensor],
    tokens: Sequence[Tensor],
    masks: Masks,
    o: dict[str, Any],
) -> tuple[Tensor, ...]:
    """Differentiate :func:`retrieve` with respect to its six tensors, the selection given."""
    q, k, v = qkv
    out, lse, selected = result
    settings, t = attention_settings(o), _operands(qkv, tokens, masks)
    if k.shape[2] == 0 or _nothing_to_retrieve(q, k, settings):
        return attend_backward(dout, (out, lse), qkv, tokens, masks, o)
    retrieval = Retrieval(chunks=o["retrieve_chunks"], block=o["retrieve_block"])
    if runs_kernels(k, v, settings.dropout_p):
        rows = _rows(k, masks, settings.chunk_size)
        if launch_retrieval_backward.covers(t, rows, settings, retrieval, selected):
            call = (dout, (out, lse, selected), t, rows, settings, retrieval)
            differentiate = partial(launch_retrieval_backward.retrieval_backward, *call)
            grads = first_calls.side_by_side(differentiate)
            return _as_outputs(grads, (*qkv, *tokens))
    geometry = attention_geometry(
        q.shape[2], k.shape[2], settings, masks.key_mask, masks.segment_ids, q.device
    )
    return tuple(retrieval_backward(dout, out, lse, t, geometry, settings, retrieval, selected))
