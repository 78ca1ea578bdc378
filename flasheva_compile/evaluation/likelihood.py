"""Losses of given tokens, in fp32 slices: the logits of all tokens are never cast at once."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from flasheva_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_ROWS_AT_ONCE = 1024  # rows of the vocabulary-sized logits in fp32 [tokens]


def token_losses(logits: Tensor, targets: Tensor, rows_at_once: int = _ROWS_AT_ONCE) -> Tensor:
    """Return ``-ln p(target)`` of every position.

    Args:
        logits: ``[B, N, V]`` in any floating dtype.
        targets: ``[B, N]``, token ids.
        rows_at_once: Positions whose logits are held in fp32 at a time.

    Returns:
        ``[B, N]``, fp32 [nats].
    """
    targets = targets.to(logits.device)
    losses = torch.empty(targets.shape, device=logits.device)
    for row in range(targets.shape[0]):
        for start in range(0, targets.shape[1], rows_at_once):
            some = slice(start, start + rows_at_once)
            losses[row, some] = functional.cross_entropy(
                logits[row, some].float(), targets[row, some], reduction="none"
            )
    return losses


def next_token_losses(model: Any, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:  # noqa: ANN401
    """Run a model on whole sequences and return the losses of the tokens that it predicts.

    Args:
        model: A causal language model.
        inputs: Its keyword arguments, ``input_ids [B, N]`` among them.
        targets: ``[B, N - 1]``, the token after each position but the last.

    Returns:
        ``[B, N - 1]``, fp32 [nats].

    Raises:
        ConfigError: The model returns no logits.
    """
    return token_losses(logits_of(model, model(**inputs, use_cache=False))[:, :-1], targets)


def cached_token_losses(model: Any, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:  # noqa: ANN401
    """Return what :func:`next_token_losses` does, of a model that reads the rows through its cache.

    Raises:
        ConfigError: Rows have padding, or the cache lacks codebooks.
    """
    from flasheva_compile.generation.cache import FlashEvaCache
    from flasheva_compile.generation.cached_reading import read_through

    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is not None and not bool(mask.bool().all()):
        message, hint = "have padding, which is not read through a cache", "give rows of text alone"
        raise ConfigError(message, subject="batches", hint=hint)
    calls, start = [], 0
    for logits in read_through(model, ids, FlashEvaCache.for_model(model)):
        wanted = targets[:, start : start + logits.shape[1]]
        calls.append(token_losses(logits[:, : wanted.shape[1]], wanted))
        start += logits.shape[1]
    return torch.cat(calls, 1)


def candidate_losses(model: Any, ids: Tensor, candidates: Tensor) -> Tensor:  # noqa: ANN401
    """Return the loss of each of several continuations of a prompt, which is read once.

    Args:
        model: A causal language model with a cache that can be copied.
        ids: Prompts ``[B, N]``, without padding.
        candidates: Continuations ``[B, P, L]``.

    Returns:
        ``[B, P]``, fp32: ``-ln p`` of all tokens of a continuation [nats].
    """
    result = model(input_ids=ids, use_cache=True)
    last, cache = logits_of(model, result)[:, -1].float(), result.past_key_values
    del result  # the logits of all other positions
    candidates = candidates.to(last.device)
    losses = -functional.log_softmax(last, -1).gather(1, candidates[:, :, 0])
    if candidates.shape[2] == 1:
        return losses
    for place in range(candidates.shape[1]):
        tokens = candidates[:, place]
        more = model(input_ids=tokens[:, :-1], past_key_values=copy.deepcopy(cache), use_cache=True)
        losses[:, place] += token_losses(logits_of(model, more), tokens[:, 1:]).sum(1)
    return losses


def logits_of(model: Any, result: Any) -> Tensor:  # noqa: ANN401
    """Return the logits ``[B, N, V]`` of a model's result.

    Raises:
        ConfigError: It has none.
    """
    logits = getattr(result, "logits", None)
    if logits is None:
        message = f"{type(model).__name__} returns no logits"
        raise ConfigError(message, hint="pass the causal language model, with its head")
    return logits
