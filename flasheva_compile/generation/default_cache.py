"""What ``generate`` of a prepared model starts from: a compressed cache, unless it is given one."""

from __future__ import annotations

from typing import Any

import torch

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.cache import FlashEvaCache


def prepare_cache(
    self: Any,  # noqa: ANN401 - a prepared model
    generation_config: Any,  # noqa: ANN401
    model_kwargs: dict[str, Any],
    *args: Any,  # noqa: ANN401
    **kwargs: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Let ``generate`` start from a compressed cache; the user's own cache is left alone."""
    from transformers.cache_utils import DynamicCache, StaticCache

    result = type(self)._prepare_cache_for_generation(
        self, generation_config, model_kwargs, *args, **kwargs
    )
    cache = model_kwargs.get("past_key_values")
    if cache is None or getattr(cache, "_is_user_defined", False):
        if isinstance(cache, FlashEvaCache):
            _expect_room(cache, generation_config)
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


def _expect_room(cache: FlashEvaCache, generation_config: Any) -> None:  # noqa: ANN401
    room, needed = cache.get_max_length(), generation_config.max_length
    if room >= 0 and needed is not None and needed > room + 1:
        raise ConfigError(
            f"holds {room} tokens, generate may need {needed - 1}",
            subject="past_key_values",
            hint="build it with a larger max_cache_len, or lower max_new_tokens",
        )


def _expect_what_was_told(cache: FlashEvaCache, mask: Any) -> None:  # noqa: ANN401
    """Refuse a mask that now hides stored tokens, or shows hidden ones: they are pooled already.

    ``generate`` itself makes such a mask from the padding of rows that ended before others, and
    drops one that hides nothing.
    """
    if mask is None:
        mask = torch.ones(1, 0, dtype=torch.bool)
    elif mask.dim() != 2:  # refused by the attentions
        return
    told, seen, mask = cache.told, cache.get_seq_length(), mask.bool()
    if told is not None and (len(told) == len(mask) or 1 in (len(told), len(mask))):
        now, before = (_columns(x, seen) for x in (mask, told))
        changed = (now != before.to(now.device)).any(1)
        if changed.any():
            raise ConfigError(
                f"attention_mask says of stored tokens of row {int(changed.nonzero()[0])} what it "
                "did not say before",
                subject="past_key_values",
                hint="mask new tokens alone (rows that ended early keep their padding unmasked), "
                "or start from an empty cache",
            )
    cache.told = mask


def _columns(told: torch.Tensor, seen: int) -> torch.Tensor:
    return torch.nn.functional.pad(told[:, :seen], (0, max(0, seen - told.shape[1])), value=True)
