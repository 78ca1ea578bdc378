"""``perplexity_by_position``: how well a model predicts text, by how much of it it has seen."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.adaptation.calibrate import aligned, model_inputs
from flasheva_compile.errors import ConfigError
from flasheva_compile.evaluation.greedy import expect_known_tokens, running
from flasheva_compile.evaluation.likelihood import cached_token_losses, next_token_losses

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

_IGNORED = -100  # label of what is not predicted, as in transformers


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionPerplexity:
    """Losses by the position of the predicted token.

    Attributes:
        edges: Bin ``i`` holds positions from ``edges[i]`` to ``edges[i + 1] - 1``, counted from a
            row's first real token.
        tokens: How many predicted tokens each bin holds.
        nll: Their mean ``-ln p`` [nats].
    """

    edges: tuple[int, ...]
    tokens: tuple[int, ...]
    nll: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Mean ``-ln p`` over all tokens [nats]."""
        return sum(n * x for n, x in zip(self.tokens, self.nll, strict=True)) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return _exp(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``json`` accepts."""
        return {**dataclasses.asdict(self), "loss": self.loss, "perplexity": self.perplexity}

    def __str__(self) -> str:
        rows = [("position", "tokens", "loss", "perplexity")]
        for index, (count, loss) in enumerate(zip(self.tokens, self.nll, strict=True)):
            span = f"{self.edges[index]}-{self.edges[index + 1] - 1}"
            rows.append((span, str(count), f"{loss:.4f}", f"{_exp(loss):.3f}"))
        total = f"{self.loss:.4f}", f"{self.perplexity:.3f}"
        rows.append(("all", str(sum(self.tokens)), *total))
        return "\n".join(aligned(rows))


def perplexity_by_position(
    model: Any,  # noqa: ANN401 - a causal language model
    batches: Iterable[Any],
    edges: Sequence[int] = (0, 256, 1024, 2048, 4096, 8192),
    *,
    through_cache: bool = False,
) -> PositionPerplexity:
    """Return the mean loss of a model on text, by position.

    Args:
        model: A causal language model, prepared or not. It runs in evaluation mode, without
            gradients and, unless told, without a cache.
        batches: An iterable of token ids ``[B, N]``, or of dicts of the model's inputs. What an
            ``attention_mask`` hides is not predicted; ``labels`` are used where they are given.
        edges: Where bins begin, ascending from 0. Bins beyond the longest row are dropped, and
            positions beyond the last edge have a bin of their own.
        through_cache: Let a prepared model read rows without padding through its cache, as decoding
            does: layers in few bits are exact otherwise.

    Raises:
        ConfigError: ``edges`` do not ascend from 0, or the batches are none, of the wrong type, too
            short, or predict nothing.
    """
    starts = tuple(edges)
    if not starts or starts[0] != 0 or any(a >= b for a, b in zip(starts, starts[1:])):  # noqa: B905, RUF007
        raise ConfigError(f"must ascend from 0, got {starts!r}", subject="edges")
    boundaries = torch.tensor(starts)
    sums = torch.zeros(len(starts), dtype=torch.float64)
    tokens, longest = torch.zeros(len(starts), dtype=torch.long), 0
    losses_of = cached_token_losses if through_cache else next_token_losses
    with running(model):
        for inputs in model_inputs(model, batches):
            expect_known_tokens(model, inputs["input_ids"])
            inputs, targets, positions = _predicted(inputs)
            losses = losses_of(model, inputs, targets.clamp_min(0)).cpu()
            wanted = (targets != _IGNORED).cpu()
            bins = torch.bucketize(positions.cpu()[wanted], boundaries, right=True) - 1
            sums += torch.bincount(bins, losses[wanted].double(), minlength=len(starts))
            tokens += torch.bincount(bins, minlength=len(starts))
            longest = max(longest, int(positions.max()) + 1)
    if not tokens.any():
        raise ConfigError("predict no token", subject="batches")
    return _binned(starts, longest, tokens.tolist(), sums.tolist())


def _predicted(inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Return inputs without labels, and each predicted token and its position ``[B, N - 1]``."""
    ids, mask, labels = (inputs.get(n) for n in ("input_ids", "attention_mask", "labels"))
    assert ids is not None
    labels = ids if labels is None else labels
    if labels.shape != ids.shape:
        message = f"labels must be {tuple(ids.shape)} like input_ids, got {tuple(labels.shape)}"
        raise ConfigError(message, subject="batches")
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    targets = labels[:, 1:].long().masked_fill(~(valid[:, :-1] & valid[:, 1:]), _IGNORED)
    positions = (valid.cumsum(1) - 1)[:, 1:].clamp_min(0)
    return {name: x for name, x in inputs.items() if name != "labels"}, targets, positions


def _binned(
    starts: tuple[int, ...], longest: int, tokens: list[int], sums: list[float]
) -> PositionPerplexity:
    """Keep the bins that hold tokens."""
    edges = [*starts, max(longest, starts[-1] + 1)]
    kept = [index for index, count in enumerate(tokens) if count]
    used = range(kept[0], kept[-1] + 1)
    return PositionPerplexity(
        edges=tuple(edges[index] for index in (*used, used[-1] + 1)),
        tokens=tuple(tokens[index] for index in used),
        nll=tuple(sums[index] / max(1, tokens[index]) for index in used),
    )


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
