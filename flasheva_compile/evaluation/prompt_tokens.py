"""Prompts put together from tokens, so that their length is exact and their parts are known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_IGNORED = -100  # label of what is not predicted, as in transformers
FILLER = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)


def encode(tokenizer: Any, text: str) -> list[int]:  # noqa: ANN401 - a tokenizer of transformers
    """Return a text's token ids, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def leading_tokens(tokenizer: Any) -> list[int]:  # noqa: ANN401
    """Return the special tokens that a tokenizer puts before every text."""
    with_special, plain = list(tokenizer("a")["input_ids"]), encode(tokenizer, "a")
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


def labelled(prompt: list[int], answer: list[int]) -> dict[str, Tensor]:
    """Return a batch of one row, ``labels`` on the answer's tokens alone."""
    labels = [_IGNORED] * len(prompt) + answer
    pair = {"input_ids": [prompt + answer], "labels": [labels]}
    return {name: torch.tensor(rows) for name, rows in pair.items()}


def filler(tokenizer: Any, count: int) -> tuple[list[int], list[int]]:  # noqa: ANN401
    """Return exactly ``count`` tokens of repeated sentences, and where sentences begin.

    The first sentence is cut where the rest does not fill the count; the last one is whole.

    Returns:
        The tokens, and ascending positions from 0 to ``count``.
    """
    sentences = [encode(tokenizer, sentence) for sentence in FILLER]
    parts: list[list[int]] = []
    left, index = count, len(sentences) - 1
    while left > 0:
        parts.append(sentences[index % len(sentences)][-left:])
        left -= len(parts[-1])
        index -= 1
    tokens, starts = [], [0]
    for part in reversed(parts):
        tokens += part
        starts.append(len(tokens))
    return tokens, starts


def expect_room(length: int, needed: int, what: str) -> int:
    """Return how many tokens of a prompt are left for filler.

    Raises:
        ConfigError: None.
    """
    if length < needed:
        message = f"{length} tokens are too short for {what} of {needed} tokens"
        raise ConfigError(message, subject="length")
    return length - needed


def decode(tokenizer: Any, ids: Sequence[int]) -> str:  # noqa: ANN401
    """Return the text of tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))
