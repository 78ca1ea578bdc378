"""Attentions of transformers that do not go through its AttentionInterface, and how they can.

Some compute their softmax in a method of their own that takes keys and values as cached; others
within ``forward``. :data:`ROUTES` says, for each class, which method is replaced on its instances
by one that calls an attention function of the interface. The first kind keeps all else as it is;
of the second kind, the trial run compares the replaced ``forward`` with the class's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.alibi import (
    BLOOM,
    FALCON,
    MPT,
    finish_bloom,
    project_bloom,
    project_mpt,
)
from flasheva_compile.generation.plain_attention import softmax_attention
from flasheva_compile.scope import KEPT

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from flasheva_compile.generation.alibi import Alibi

ROUTE = "_flasheva_route"
"""Attribute of the attentions that were rerouted."""

CACHE_ARGUMENTS = ("past_key_values", "layer_past", "past_key_value")
_HINT = 'use torch.compile(model, backend="flasheva"), or leave the layer full and the input out'


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRoute:
    """How attentions of one class are led through the AttentionInterface.

    Attributes:
        method: The method that is replaced: one that computes attention alone, or ``forward``.
        replace: Given an attention function of the interface, returns what replaces the method.
        own: What the class itself computes, as an attention function of the interface; it takes
            additive masks.
        place: The attribute with the attention's place in the cache.
        window: Returns the window an attention has of its own, in tokens; 0 = none.
        alibi: How the class adds ALiBi; None = it does not.
        inputs: Of a ``forward``, every name it may have in its signature: one with others is of a
            version that is not known, and means something by them.
    """

    method: str
    replace: Callable[[Callable[..., Any]], Callable[..., Any]]
    own: Callable[..., Any]
    place: str
    window: Callable[[Any], int]
    alibi: Alibi | None = None
    inputs: frozenset[str] = frozenset()


# --- attention in a method of its own -------------------------------------------------------------


def _attn(
    divisor: str,
    dropout: str,
    *,
    place: str = "layer_idx",
    window: Callable[[Any], int] | None = None,
) -> AttentionRoute:
    """Route a class whose ``_attn`` takes query, key, value ``[B, H, L, D]`` and a mask.

    Args:
        divisor: The attribute that scores are divided by; empty = they are not.
        dropout: The attribute with the weights' ``Dropout``.
        place: See :class:`AttentionRoute`.
        window: See :class:`AttentionRoute`; None = no attention of the class has one.
    """

    def replace(attention: Callable[..., Any]) -> Callable[..., Any]:
        # Not named as the method: a pickled model must not come back with its own method.
        def flasheva_attn(
            self: Any,  # noqa: ANN401
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None = None,
        ) -> tuple[Tensor, Tensor | None]:
            if window is not None and window(self):
                _expect_growing_keys(self, key)
            # Scores are computed in fp32, whatever these are: rotated in fp32, for example.
            query, key = query.to(value.dtype), key.to(value.dtype)
            scaling = 1.0 / getattr(self, divisor) if divisor else 1.0
            p = getattr(self, dropout).p
            out, weights = attention(
                self, query, key, value, attention_mask, scaling=scaling, dropout=p
            )
            return out.transpose(1, 2), weights

        return flasheva_attn

    return AttentionRoute(
        method="_attn", replace=replace, own=_own_attn, place=place, window=window or _no_window
    )


def _no_window(_: Any) -> int:  # noqa: ANN401
    return 0


def _own_attn(
    module: Any,  # noqa: ANN401
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **_: Any,  # noqa: ANN401 - the method knows scale and dropout
) -> tuple[Tensor, Tensor | None]:
    out, weights = type(module)._attn(module, query, key, value, mask)
    return out.transpose(1, 2), weights


def _expect_growing_keys(module: Any, key: Tensor) -> None:  # noqa: ANN401
    """Refuse windows that are counted from the last key, if that is one to come."""
    kept = getattr(module, KEPT, None)
    layer = None if kept is None else kept.announced.get()
    if layer is not None and layer.get_max_length() == key.shape[2]:
        raise ConfigError(
            f"{type(module).__name__} counts its window from the last key, and a preallocated "
            "cache has keys to come",
            subject="past_key_values",
            hint="let the cache grow: leave out max_cache_len and cache_implementation",
        )


def _window_of_gpt_neo(module: Any) -> int:  # noqa: ANN401
    return module.config.window_size if module.attention_type != "global" else 0


# --- attention within forward ---------------------------------------------------------------------


# What the classes below take beside hidden states, and do not read, or as we do.
_INPUTS = frozenset(
    ("self", "hidden_states", "attention_mask", "position_ids", "use_cache", "output_attentions")
).union(CACHE_ARGUMENTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Forward:
    """What classes that attend within ``forward`` differ in.

    Attributes:
        project: Returns query, key and value ``[B, H, L, D]`` of (module, hidden states, inputs),
            the keys as they are cached.
        refused: Name -> meaning of inputs that attention through the interface has no place for.
        output: The attribute with the layer after attention; empty = another module has it.
        finish: Returns what the class does, of (module, what that layer returned, inputs).
        positional: Names of inputs that come by position, behind the hidden states.
        scaling: The attribute that scores are multiplied by; empty = by the root of the head
            dimension, inverted.
        dropout: Returns the weights' dropout of (module, inputs).
        alibi: See :class:`AttentionRoute`.
    """

    project: Callable[..., tuple[Tensor, Tensor, Tensor]]
    refused: dict[str, str]
    output: str
    finish: Callable[..., Tensor] | None
    positional: tuple[str, ...]
    scaling: str
    dropout: Callable[[Any, dict[str, Any]], float]
    alibi: Alibi | None

    def replace(self, attention: Callable[..., Any]) -> Callable[..., Any]:
        """Return what replaces ``forward``; see :class:`AttentionRoute`."""

        def flasheva_forward(
            module: Any,  # noqa: ANN401
            hidden_states: Tensor,
            *args: Any,  # noqa: ANN401
            attention_mask: Tensor | None = None,
            **inputs: Any,  # noqa: ANN401
        ) -> tuple[Tensor, Tensor | None]:
            inputs |= zip(self.positional, args, strict=True)
            for name, meaning in self.refused.items():
                if inputs.get(name) is not None:
                    raise ConfigError(
                        f"{meaning} ({name})", subject=type(module).__name__, hint=_HINT
                    )
            query, key, value = self.project(module, hidden_states, inputs)
            cache = next((inputs[n] for n in CACHE_ARGUMENTS if inputs.get(n) is not None), None)
            if cache is not None:
                key, value = cache.update(key, value, module.layer_idx)
            options: dict[str, Any] = {"dropout": self.dropout(module, inputs)}
            scale = getattr(module, self.scaling) if self.scaling else query.shape[-1] ** -0.5
            if self.alibi is not None:
                options["alibi"] = inputs.get(self.alibi.input) is not None
                if options["alibi"]:
                    attention_mask = self.alibi.given_mask(attention_mask)
            out, weights = attention(
                module, query, key, value, attention_mask, scaling=scale, **options
            )
            out = out.flatten(2)
            out = getattr(module, self.output)(out) if self.output else out
            return (out if self.finish is None else self.finish(module, out, inputs)), weights

        return flasheva_forward


def _forward(  # noqa: PLR0913 - what these classes differ in
    project: Callable[..., tuple[Tensor, Tensor, Tensor]],
    refused: dict[str, str] | None = None,
    *,
    output: str = "",
    finish: Callable[..., Tensor] | None = None,
    read: tuple[str, ...] = (),
    positional: tuple[str, ...] = (),
    scaling: str = "",
    dropout: Callable[[Any, dict[str, Any]], float] | None = None,
    alibi: Alibi | None = None,
) -> AttentionRoute:
    """Route a class that attends within ``forward``; see :class:`_Forward`.

    ``read`` names further inputs that are read, or decide nothing.
    """
    own = _Forward(
        project=project,
        refused=refused or {},
        output=output,
        finish=finish,
        positional=positional,
        scaling=scaling,
        dropout=dropout or _dropout_of,
        alibi=alibi,
    )
    return AttentionRoute(
        method="forward",
        replace=own.replace,
        own=softmax_attention,
        place="layer_idx",
        window=_no_window,
        alibi=alibi,
        inputs=_INPUTS.union(own.refused, read, positional),
    )


def _dropout_of(module: Any, _: dict[str, Any]) -> float:  # noqa: ANN401
    dropout = getattr(module, "dropout", 0.0)
    return dropout.p if isinstance(dropout, torch.nn.Dropout) else dropout


def _project_separately(
    module: Any,  # noqa: ANN401
    hidden_states: Tensor,
    _: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """As attentions that come from BART do."""
    shape = (*hidden_states.shape[:2], -1, module.head_dim)
    layers = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (layer(hidden_states).view(shape).transpose(1, 2) for layer in layers)
    return query, key, value


def _project_of_falcon(
    module: Any,  # noqa: ANN401
    hidden_states: Tensor,
    inputs: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    heads = module._split_heads(module.query_key_value(hidden_states))
    query, key, value = (x.transpose(1, 2) for x in heads)
    if inputs.get("alibi") is not None:
        return query, key, value
    query, key = apply_rotary_pos_emb(query, key, *inputs["position_embeddings"])
    return query, key, value


def _dropout_of_falcon(module: Any, inputs: dict[str, Any]) -> float:  # noqa: ANN401
    """Of Falcon's two branches one drops weights."""
    return 0.0 if inputs.get("alibi") is None else module.attention_dropout.p


def _project_of_bert(
    module: Any,  # noqa: ANN401
    hidden_states: Tensor,
    inputs: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """As attentions that come from BERT do; RoFormer rotates what it projects."""
    shape = (*hidden_states.shape[:2], -1, module.attention_head_size)
    layers = (module.query, module.key, module.value)
    query, key, value = (layer(hidden_states).view(shape).transpose(1, 2) for layer in layers)
    angles = inputs.get("sinusoidal_pos")
    if angles is None:
        return query, key, value
    if module.rotary_value:
        return module.apply_rotary_position_embeddings(angles, query, key, value)
    return *module.apply_rotary_position_embeddings(angles, query, key), value


_CROSS = {
    "key_value_states": "it attends to another sequence",
    "encoder_hidden_states": "it attends to another sequence",
}
_PROMPT = {"attn_prompt": "it attends to a learned prompt before the first token"}

_BART = _forward(_project_separately, _CROSS, output="out_proj")
_BERT = _forward(_project_of_bert, _CROSS, read=("sinusoidal_pos",))
ROUTES: dict[str, AttentionRoute] = {
    "bloom.modeling_bloom.BloomAttention": _forward(
        project_bloom,
        output="dense",
        finish=finish_bloom,
        read=("alibi",),
        positional=("residual",),
        dropout=lambda module, _: module.attention_dropout.p,
        alibi=BLOOM,
    ),
    "codegen.modeling_codegen.CodeGenAttention": _attn("scale_attn", "attn_dropout"),
    "gptj.modeling_gptj.GPTJAttention": _attn("scale_attn", "attn_dropout"),
    "gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention": _attn(
        "", "attn_dropout", place="layer_id", window=_window_of_gpt_neo
    ),
    "gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseAttention": _attn(
        "norm_factor", "attention_dropout"
    ),
    "falcon.modeling_falcon.FalconAttention": _forward(
        _project_of_falcon,
        output="dense",
        read=("position_embeddings", "alibi"),
        dropout=_dropout_of_falcon,
        alibi=FALCON,
    ),
    "megatron_bert.modeling_megatron_bert.MegatronBertSelfAttention": _BERT,
    "mpt.modeling_mpt.MptAttention": _forward(
        project_mpt,
        output="out_proj",
        read=("position_bias",),
        scaling="softmax_scale",
        dropout=lambda module, _: module.attn_dropout_p,
        alibi=MPT,
    ),
    "mvp.modeling_mvp.MvpAttention": _forward(
        _project_separately, _CROSS | _PROMPT, output="out_proj"
    ),
    "rembert.modeling_rembert.RemBertSelfAttention": _BERT,
    "roformer.modeling_roformer.RoFormerSelfAttention": _BERT,
    "trocr.modeling_trocr.TrOCRAttention": _BART,
    "xglm.modeling_xglm.XGLMAttention": _BART,
}
"""Class, within ``transformers.models`` -> how its attentions are rerouted."""

REFUSED: dict[str, str] = {
    "git.modeling_git.GitSelfAttention": "its mask lets images attend to what follows in them",
    "openai.modeling_openai.Attention": "it keeps no cache",
}
"""Class -> why no route leads its attentions through the interface."""


# --- looking up -----------------------------------------------------------------------------------


def route_of(module: nn.Module) -> AttentionRoute | None:
    """Return how attentions of a module's very class are rerouted; None of all others."""
    return ROUTES.get(_class_of(module))


def refusals(model: nn.Module) -> list[str]:
    """Return why attentions of a model cannot be rerouted, as far as that is known."""
    return sorted({REFUSED[name] for m in model.modules() if (name := _class_of(m)) in REFUSED})


def _class_of(module: nn.Module) -> str:
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("transformers.models.")


def place_of(module: nn.Module) -> int | None:
    """Return an attention's place in the cache; None if it does not say."""
    route = getattr(module, ROUTE, None)
    return getattr(module, "layer_idx" if route is None else route.place, None)
