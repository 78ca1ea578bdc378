"""Read whole rows of text through a cache, as decoding them token by token would."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flasheva_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_CALL = 1024  # tokens at a time: what a call reads is stored as it is in steps of one token


def read_through(model: Any, ids: Tensor, cache: Any) -> Iterator[Tensor]:  # noqa: ANN401
    """Yield the logits of rows without padding, some tokens at a time, ``[B, L, vocabulary]``.

    The first call attends in full precision, so it has one token.

    Args:
        model: A causal language model.
        ids: ``[B, N]``.
        cache: An empty one.

    Raises:
        ConfigError: The model returns no logits.
    """
    for some in (ids[:, :1], *ids[:, 1:].split(_CALL, 1)):
        logits = getattr(
            model(input_ids=some, past_key_values=cache, use_cache=True), "logits", None
        )
        if logits is None:
            message = f"{type(model).__name__} returns no logits"
            raise ConfigError(message, hint="pass the causal language model, with its head")
        yield logits
