"""Greedy continuations of prompts of one length: no padding, no sampling, one set of rules."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.probe import evaluating

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


def greedy(
    model: Any,  # noqa: ANN401 - a causal language model
    ids: Tensor,
    new_tokens: int,
    *,
    stop: bool = True,
    cache: Any = None,  # noqa: ANN401 - a cache of transformers
) -> Tensor:
    """Return the tokens that follow prompts.

    What the model's own ``generation_config`` says about sampling, penalties, and lengths is not
    applied: scores of different models come from one rule.

    Args:
        model: A causal language model; it runs in evaluation mode, without gradients.
        ids: Prompts ``[B, N]``, without padding.
        new_tokens: Tokens to add.
        stop: End a row at the model's end-of-sequence token; the rest of it is padding.
        cache: What to start from; None = what the model's ``generate`` makes.

    Returns:
        ``[B, <= new_tokens]``, on the CPU.

    Raises:
        ConfigError: A token id is beyond the model's vocabulary.
    """
    expect_known_tokens(model, ids)
    ids = ids.to(device_of(model))
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    if cache is not None:
        options["past_key_values"] = cache
    with running(model), _plain_generation(model, stop=stop):
        result = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return result[:, ids.shape[1] :].cpu()


@contextmanager
def running(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Run a model in evaluation mode and without gradients for a while, compiled if it is."""
    with evaluating(model), torch.no_grad():
        yield


def device_of(model: Any) -> torch.device:  # noqa: ANN401
    """Return where a model's inputs belong."""
    return model.get_input_embeddings().weight.device


def expect_known_tokens(model: Any, ids: Tensor) -> None:  # noqa: ANN401
    """Refuse token ids that a model has no embedding for.

    Raises:
        ConfigError: There is one; a GPU would say no more than that an assertion has failed.
    """
    size = model.get_input_embeddings().weight.shape[0]
    largest = int(ids.max()) if ids.numel() else 0
    if largest >= size:
        raise ConfigError(
            f"gives token id {largest}, but the model has {size} tokens",
            subject="tokenizer",
            hint="use the tokenizer that the model was trained with",
        )


@contextmanager
def _plain_generation(model: Any, *, stop: bool) -> Iterator[None]:  # noqa: ANN401
    """Set a model's own generation settings aside for a while."""
    from transformers import GenerationConfig

    before = model.generation_config
    end, pad = before.eos_token_id, before.pad_token_id
    first_end = end[0] if isinstance(end, list) else end
    model.generation_config = GenerationConfig(
        eos_token_id=end if stop else None,
        pad_token_id=pad if pad is not None else first_end or 0,
    )
    try:
        yield
    finally:
        model.generation_config = before
