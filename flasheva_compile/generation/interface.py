"""The attention "eva" of transformers: an attention function and the mask function it needs.

transformers calls the mask function once per kind of mask and hands its result to every attention
of that kind. Ours keeps a causal mask two-dimensional, so that no ``[N, N]`` tensor exists; layers
that stay full expand it as their own implementation wants it.

The name may not contain "flash": transformers takes such names for FlashAttention.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.alibi import MASKED, SLOPES
from flasheva_compile.generation.announcement import Announcement
from flasheva_compile.generation.eva_attention import autocast
from flasheva_compile.generation.full_cache_layer import FullCacheLayer
from flasheva_compile.generation.routes import ROUTE
from flasheva_compile.scope import KEPT

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

NAME = "eva"

_UNSUPPORTED = ("position_bias", "indices", "block_indices")


@dataclass
class KeptAttention:
    """An attention of a prepared model that stays as it was.

    Attributes:
        implementation: The name of its own attention function.
        causal: Whether it takes the model's plain causal mask; otherwise it has its own.
        announced: Its cache layer, for the time of one forward.
    """

    implementation: str
    causal: bool
    announced: Announcement = field(default_factory=Announcement)


def unsupported_inputs(inputs: dict[str, Any]) -> list[str]:
    """Return the names of given inputs that FlashEVA attention has no meaning for."""
    return [name for name in _UNSUPPORTED if inputs.get(name) is not None]


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,  # noqa: ANN401 - transformers passes what its models have
) -> tuple[Tensor, Tensor | None]:
    """Attend for one attention of a prepared model, as transformers' AttentionInterface has it."""
    eva, biased = getattr(module, "flasheva", None), bool(kwargs.pop("alibi", False))
    if eva is None:
        _expect_alibi(module, hasattr(module, SLOPES), biased)
        inputs = {"scaling": scaling, "dropout": dropout, **kwargs}
        return _kept_forward(module, query, key, value, attention_mask, inputs)
    _expect_alibi(module, eva.slopes is not None, biased)
    _expect_causal(eva.path, module, attention_mask, query.shape[2], kwargs)
    out, lse = eva(
        query,
        key,
        value,
        attention_mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap") or 0.0,
        dropout_p=dropout if module.training else 0.0,
    )
    sink = kwargs.get("s_aux")
    if sink is not None:
        out = _with_sink_logits(out, lse, sink, eva.path)
    return out.transpose(1, 2).contiguous(), None


def _expect_alibi(module: nn.Module, prepared: bool, given: bool) -> None:  # noqa: FBT001
    """Refuse calls that add ALiBi to an attention without slopes, and the other way round."""
    if prepared != given:
        was = "with" if prepared else "without"
        message = f"was prepared {was} ALiBi biases, and called the other way"
        raise ConfigError(message, subject=type(module).__name__, hint="prepare the model again")


def _expect_causal(
    path: str, module: nn.Module, mask: Tensor | None, queries: int, inputs: dict[str, Any]
) -> None:
    """Refuse calls that mean anything but causal attention, as they would be for the model's own.

    Without a mask, transformers' attentions are causal or not by a flag.
    """
    if mask is not None and mask.dim() != 2:
        raise ConfigError(
            f"a mask of shape {tuple(mask.shape)}; a prepared attention takes the model's own "
            "causal mask",
            subject=path,
            hint="pass a 2-D attention_mask or none, or leave the layer full",
        )
    causal = inputs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and not causal and queries > 1:
        raise ConfigError(
            "was called without a mask, and not as causal attention",
            subject=path,
            hint="pass attention_mask if the model is causal, or leave the layer full",
        )
    refused = unsupported_inputs(inputs)
    if refused:
        raise ConfigError(f"was called with {', '.join(refused)}", subject=path)


def _with_sink_logits(out: Tensor, lse: Tensor, sink: Tensor, path: str) -> Tensor:
    """Add one logit per head, ``[Hq]``, to the softmax; nothing is attended for it."""
    if torch.is_grad_enabled() and out.requires_grad:
        message = "attention sinks (s_aux) have no gradient yet"
        raise ConfigError(message, subject=path, hint="leave the layer full to train the model")
    share = torch.sigmoid(lse - sink.view(1, -1, 1).to(lse.dtype))
    return (out * share[..., None]).to(out.dtype)


# --- attentions that stay full --------------------------------------------------------------------


def _kept_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    inputs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    kept = getattr(module, KEPT, None)
    if kept is None:
        message = f"{type(module).__name__} was not part of the model when it was prepared"
        raise ConfigError(message, hint="call prepare(model, config) again")
    layer = kept.announced.take()
    if isinstance(layer, FullCacheLayer):
        return _stored_forward(module, (query, key, value), mask, inputs, kept, layer)
    # A causal mask can reach an attention that the trial run did not: a text tower's, for example.
    implementation = _add_slopes(module, kept, inputs)
    ours = mask is not None and mask.dim() == 2 and "flash" not in implementation
    theirs = mask is not None and mask.dim() != 2  # the caller's own: it means what it says
    if ours or (kept.causal and not theirs):
        mask = _causal_mask(module, implementation, query, key, mask, layer)
    function = own_attention_function(module, implementation)
    return function(module, query, key, value, mask, **inputs)


def _add_slopes(module: nn.Module, kept: KeptAttention, inputs: dict[str, Any]) -> str:
    """Add slopes to what the attention's function gets; return the name of one that takes them."""
    slopes = getattr(module, SLOPES, None)
    if slopes is None:
        return kept.implementation
    inputs["alibi_slopes"] = slopes.values
    return "eager"


def _stored_forward(
    module: nn.Module,
    qkv: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    inputs: dict[str, Any],
    kept: KeptAttention,
    layer: FullCacheLayer,
) -> tuple[Tensor, Tensor | None]:
    """Attend as the model itself to the first tokens, and through what is stored from others."""
    query, key, value = autocast(*qkv)
    _expect_causal(layer.path, module, mask, query.shape[2], inputs)
    implementation = _add_slopes(module, kept, inputs)
    if layer.is_empty:
        layer.append(key, value, mask)
        mask = None if mask is None else mask[:, : key.shape[2]]
        mask = _causal_mask(module, implementation, query, key, mask, None)
        function = own_attention_function(module, implementation)
        return function(module, query, key, value, mask, **inputs)
    if inputs.get("dropout") and module.training:
        message = "attention through stored tokens has no dropout"
        raise ConfigError(message, subject=layer.path, hint="call model.eval()")
    scale = inputs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # transformers' sdpa takes no notice of a cap, or refuses it: stored tokens follow the prompt.
    softcap = 0.0 if kept.implementation == "sdpa" else inputs.get("softcap") or 0.0
    slopes = inputs.get("alibi_slopes")
    out, lse = layer.attend((query, key, value), mask, scale, softcap, slopes)
    sink = inputs.get("s_aux")
    if sink is not None:
        out = _with_sink_logits(out, lse, sink, layer.path)
    return out.transpose(1, 2).contiguous(), None


def _causal_mask(
    module: Any,  # noqa: ANN401 - an attention of transformers, with its config
    implementation: str,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    layer: Any,  # noqa: ANN401 - a cache layer of transformers
) -> Tensor | None:
    """Expand the two-dimensional mask as the layer's own implementation wants it."""
    from transformers.masking_utils import (
        ALL_MASK_ATTENTION_FUNCTIONS,
        and_masks,
        causal_mask_function,
        packed_sequence_mask_function,
    )

    queries, keys = query.shape[2], key.shape[2]
    preallocated = layer is not None and layer.get_max_length() == keys
    offset = (
        layer.get_seq_length() - queries if layer is not None and preallocated else keys - queries
    )
    mask_function = causal_mask_function
    if mask is not None and mask.dtype != torch.bool:
        mask_function, mask = and_masks(mask_function, packed_sequence_mask_function(mask)), None
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=query.shape[0],
        q_length=queries,
        kv_length=keys,
        q_offset=offset,
        kv_offset=0,
        mask_function=mask_function,
        attention_mask=mask,
        allow_is_causal_skip=mask_function is causal_mask_function and not preallocated,
        dtype=query.dtype,
        config=getattr(module, "config", None),
        use_vmap=False,
        device=query.device,
    )


def own_attention_function(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """Return the attention function of a model's own implementation."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    route = getattr(module, ROUTE, None)
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    eager = eager if route is None else route.own
    if implementation == "eager" and eager is not None:
        return eager
    functions: Any = ALL_ATTENTION_FUNCTIONS
    return functions.get_interface(implementation, eager)


# --- masks ----------------------------------------------------------------------------------------


def is_causal(mask_function: Callable[..., Any]) -> bool:
    """Tell whether a mask function of transformers is the plain causal one."""
    from transformers.masking_utils import causal_mask_function

    return mask_function is causal_mask_function


def is_packed(mask_function: Callable[..., Any], inputs: dict[str, Any]) -> bool:
    """Tell whether it is causal attention within packed documents.

    transformers combines the two by ``and_masks``, without a mask tensor; it passes ``local_size``
    for windows and ``use_vmap=True`` for a model's own additions.
    """
    name = mask_function.__qualname__  # Dynamo answers getattr with the default
    plain = not inputs.get("use_vmap") and inputs.get("local_size") is None
    return name.startswith("and_masks.") and plain and inputs.get("attention_mask") is None


def causal_mask(**inputs: Any) -> Tensor | None:  # noqa: ANN401 - the interface's keywords
    """Return the mask of a prepared model, as transformers' AttentionMaskInterface has it.

    Returns:
        Of plain causal attention: None, or ``[B, columns]`` bool, of all columns so far. Of packed
        documents: ``[B, N]`` int64, their ids. Of anything else: what the model's own
        implementation makes of it.
    """
    mask_function, mask = inputs["mask_function"], inputs.get("attention_mask")
    if is_causal(mask_function):
        if mask is None and getattr(inputs["config"], "model_type", "") in MASKED:
            columns = inputs["kv_length"] + inputs.get("kv_offset", 0)
            shape = (inputs["batch_size"], columns)
            return torch.ones(shape, dtype=torch.bool, device=inputs["device"])
        return None if mask is None else _of_length(mask.bool(), inputs)
    if is_packed(mask_function, inputs):
        return _document_ids(mask_function, inputs)
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    implementation = inputs["config"].flasheva["full_implementation"]
    if implementation == "eager":
        # Its attentions have no flag: without a mask, all would be taken for causal.
        inputs["allow_is_bidirectional_skip"] = False
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](**inputs)


def _of_length(mask: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Hide the columns that a mask does not reach: those to come of a preallocated cache.

    Raises:
        ConfigError: The cache grows, so that there are no such columns.
    """
    columns, before = inputs["kv_length"] + inputs.get("kv_offset", 0), inputs["q_offset"]
    missing = columns - mask.shape[1]
    if not isinstance(missing, int) or missing <= 0:
        return mask
    if isinstance(before, int) and 0 < before == columns - inputs["q_length"]:
        raise ConfigError(
            f"has {mask.shape[1]} columns for {columns} tokens, {before} of which are in the cache",
            subject="attention_mask",
            hint="pass a mask of all tokens, or none if all are valid",
        )
    return torch.nn.functional.pad(mask, (0, missing), value=False)


def _document_ids(mask_function: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """Number the documents: one begins where a token may not attend the token before it."""
    column = torch.arange(inputs["q_length"], device=inputs["device"])
    row = torch.arange(inputs["batch_size"], device=inputs["device"])[:, None]
    before = (column - 1).clamp(min=0)[None]
    return (~mask_function(row, torch.zeros_like(row), column[None], before)).long().cumsum(-1)


def register() -> None:
    """Make the name known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, causal_mask)
