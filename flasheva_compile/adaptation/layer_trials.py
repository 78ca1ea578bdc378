"""The loss of a prepared model with some of its attentions exact, for choosing among them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from flasheva_compile.adaptation.calibrate import exact_attention, model_inputs, running_eagerly
from flasheva_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from flasheva_compile.generation.eva_attention import EvaAttention

_IGNORED = -100  # label of what is not predicted, as in transformers
_ROWS_AT_ONCE = 1024  # rows of the vocabulary-sized logits in fp32 [tokens]


class Trials:
    """The losses of a model with some of its attentions exact; none is computed twice.

    Args:
        model: The prepared model.
        evas: Its converted attentions.
        batches: Token ids ``[B, N]``, or dicts of the model's inputs.
        subject: What messages call the batches.

    Attributes:
        tokens: How many tokens the batches predict.
        every: All places.
        paths: Module paths of the attentions, by place.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        evas: Sequence[EvaAttention],
        batches: Iterable[Any],
        subject: str,
    ) -> None:
        self._model, self._evas = model, evas
        self._batches = [
            _without_labels(inputs, subject) for inputs in model_inputs(model, batches, subject)
        ]
        self.every = frozenset(range(len(evas)))
        self.paths = [eva.path for eva in evas]
        self._found: dict[frozenset[int], float] = {}
        self.tokens = sum(int((targets != _IGNORED).sum()) for _, targets in self._batches)
        if not self.tokens:
            raise ConfigError("predict no token", subject=subject)

    def loss(self, full: frozenset[int]) -> float:
        """Return the mean next-token loss with the attentions at these places exact."""
        if full not in self._found:
            exact = [self._evas[place] for place in full]
            with running_eagerly(self._model), exact_attention(exact):
                total = sum(self._batch_loss(*batch) for batch in self._batches)
            self._found[full] = total / self.tokens
            if not math.isfinite(total):
                message = f"the loss is {total} with {len(full)} of {len(self._evas)} layers full"
                raise ConfigError(message, hint="check the model's weights and dtype")
        return self._found[full]

    def _batch_loss(self, inputs: dict[str, Any], targets: Tensor) -> float:
        """Return the sum of a batch's losses, a few logits at a time."""
        logits = getattr(self._model(**inputs, use_cache=False), "logits", None)
        if logits is None:
            message = f"{type(self._model).__name__} returns no logits"
            raise ConfigError(message, hint="pass the causal language model, with its head")
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        targets = targets.to(logits.device)
        for row, wanted in zip(logits, targets, strict=True):
            for start in range(0, len(wanted), _ROWS_AT_ONCE):
                some = slice(start, min(start + _ROWS_AT_ONCE, len(wanted)))
                total += functional.cross_entropy(
                    row[some].float(), wanted[some], reduction="sum", ignore_index=_IGNORED
                ).double()
        return float(total)


def _without_labels(inputs: dict[str, Any], subject: str) -> tuple[dict[str, Any], Tensor]:
    """Return inputs and the token that each position but the last predicts, ``[B, N - 1]``."""
    return {name: x for name, x in inputs.items() if name != "labels"}, _targets(inputs, subject)


def _targets(inputs: dict[str, Any], subject: str) -> Tensor:
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    labels = inputs["input_ids"] if labels is None else labels
    if labels.shape != inputs["input_ids"].shape:
        got, wanted = tuple(labels.shape), tuple(inputs["input_ids"].shape)
        raise ConfigError(f"labels must be {wanted} like input_ids, got {got}", subject=subject)
    targets = labels[:, 1:].long()
    if mask is None:
        return targets
    return targets.masked_fill(~(mask[:, :-1].bool() & mask[:, 1:].bool()), _IGNORED)
