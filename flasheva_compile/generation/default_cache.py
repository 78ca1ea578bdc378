"""What ``generate`` of a prepared model starts from: a compressed cache, unless it is given one."""

from __future__ import annotations

from typing import Any

import torch

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.cache import FlashEvaCache
from flasheva_compile.generation.cache_layer import EvaCacheLayer
from flasheva_compile.generation.vecinfer_layer import VecInferLayer


def prepare_cache(
    self: Any,  # noqa: ANN401 - a prepared model
    generation_config: Any,  # noqa: ANN401
    model_kwargs: dict[str, Any],
    generation_mode: Any,  # noqa: ANN401
    *args: Any,  # noqa: ANN401
    **kwargs: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Let ``generate`` start from a compressed cache; the user's own cache is left alone."""
    from transformers.cache_utils import DynamicCache, StaticCache

    result = type(self)._prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, *args, **kwargs
    )
    cache = model_kwargs.get("past_key_values")
    if cache is None or getattr(cache, "_is_user_defined", False):
        if isinstance(cache, FlashEvaCache):
            _expect_room(cache, generation_config, generation_mode)
            _expect_what_was_told(cache, model_kwargs.get("attention_mask"))
        return result
    name = generation_config.cache_implementation
    if type(cache) is DynamicCache:
        made = FlashEvaCache.for_model(self, offloading=name == "offloaded")
    elif type(cache) is StaticCache and name == "static":
        made = FlashEvaCache.for_model(self, max_cache_len=cache.get_max_length())
    else:
        raise ConfigError(
            f"cache_implementation={name!r} cannot hold chunk tokens",
            hint='use "dynamic", "offloaded" or "static", or revert(model)',
        )
    if generation_config.is_assistant:
        made.activate_past_recording()
    model_kwargs["past_key_values"] = made
    _expect_what_was_told(made, model_kwargs.get("attention_mask"))
    return result


def _expect_room(cache: FlashEvaCache, generation_config: Any, mode: Any) -> None:  # noqa: ANN401
    room, longest = cache.room(), generation_config.max_length
    if room < 0 or longest is None:
        return
    needed = longest - 1  # the last token is not read
    if mode == "assisted_generation":
        # Candidates are: those of a lookup even beyond the last token.
        needed = longest + max(0, (generation_config.prompt_lookup_num_tokens or 0) - 2)
    if needed > room:
        raise ConfigError(
            f"holds {room} tokens, generate may need {needed}",
            subject="past_key_values",
            hint="build it with a larger max_cache_len, or lower max_new_tokens",
        )


def _expect_what_was_told(cache: FlashEvaCache, mask: Any) -> None:  # noqa: ANN401
    """Refuse a mask that now hides stored tokens, or shows hidden ones: they are pooled already.

    ``generate`` itself makes such a mask from the padding of rows that ended before others, and
    drops one that hides nothing. What was appended without ``generate``, or read from a file, is
    known by where its rows begin, or by how many tokens are hidden if all layers are full.
    """
    if mask is None:
        mask = torch.ones(1, 0, dtype=torch.bool)
    elif mask.dim() != 2:  # refused by the attentions
        return
    seen, mask = int(cache.get_seq_length()), mask.bool()
    now, told = _columns(mask, seen), cache.told
    if told is not None:
        before = _columns(told, seen)
    elif (before := _starts(cache)) is not None:
        now = _first_valid(now)
    else:
        now, before = (~now).sum(1, keepdim=True), _hidden(cache, seen)
    if before is not None and (len(before) == len(mask) or 1 in (len(before), len(mask))):
        changed = (now != before.to(now.device)).flatten(1).any(1)
        if changed.any():
            raise ConfigError(
                f"attention_mask says of stored tokens of row {int(changed.nonzero()[0])} what it "
                "did not say before",
                subject="past_key_values",
                hint="mask new tokens alone (rows that ended early keep their padding unmasked), "
                "or start from an empty cache",
            )
    cache.told = mask


def _starts(cache: FlashEvaCache) -> torch.Tensor | None:
    """Return the column where each row began, ``[B, 1]``; None = nothing is stored."""
    states = (layer.state for layer in cache.layers if isinstance(layer, EvaCacheLayer))
    return next((state.start[:, None] for state in states if state is not None), None)


def _hidden(cache: FlashEvaCache, seen: int) -> torch.Tensor | None:
    """Return how many columns of each row are no tokens, ``[B, 1]``; None = no layer has codes."""
    states = (layer.state for layer in cache.layers if isinstance(layer, VecInferLayer))
    return next((seen - state.length[:, None] for state in states if state is not None), None)


def _first_valid(mask: torch.Tensor) -> torch.Tensor:
    """Return the first valid column of each row, ``[B, 1]``; behind all if there is none."""
    return (~mask).long().cumprod(1).sum(1, keepdim=True)


def _columns(told: torch.Tensor, seen: int) -> torch.Tensor:
    return torch.nn.functional.pad(told[:, :seen], (0, max(0, seen - told.shape[1])), value=True)
