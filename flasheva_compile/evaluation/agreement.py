"""``greedy_agreement``: how long a prepared model says what it says with full attention."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flasheva_compile.adaptation.calibrate import (
    aligned,
    converted_attentions,
    exact_attention,
    model_inputs,
)
from flasheva_compile.errors import ConfigError
from flasheva_compile.evaluation.greedy import greedy
from flasheva_compile.validation import expect_integer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementRow:
    """One prompt.

    Attributes:
        length: Tokens of the prompt.
        new_tokens: Tokens that were compared.
        equal: How many of them are equal, place by place.
        prefix: How many are equal before the first that differs.
    """

    length: int
    new_tokens: int
    equal: int
    prefix: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementReport:
    """What :func:`greedy_agreement` found.

    Attributes:
        rows: One per prompt.
    """

    rows: tuple[AgreementRow, ...]

    @property
    def equal(self) -> float:
        """Share of all tokens that are equal."""
        return sum(row.equal for row in self.rows) / sum(row.new_tokens for row in self.rows)

    @property
    def prefix(self) -> float:
        """Mean number of tokens before the first that differs."""
        return sum(row.prefix for row in self.rows) / len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``json`` accepts."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return {"equal": self.equal, "prefix": self.prefix, "rows": rows}

    def __str__(self) -> str:
        rows = [("length", "prompts", "tokens", "equal", "equal from the start")]
        for length in dict.fromkeys(row.length for row in self.rows):
            some = AgreementReport(rows=tuple(r for r in self.rows if r.length == length))
            count, size = str(len(some.rows)), str(some.rows[0].new_tokens)
            rows.append((str(length), count, size, f"{some.equal:.0%}", f"{some.prefix:.1f}"))
        return "\n".join(aligned(rows))


def greedy_agreement(
    model: Any,  # noqa: ANN401 - a prepared model
    batches: Iterable[Any],
    *,
    new_tokens: int = 64,
) -> AgreementReport:
    """Compare a prepared model's greedy tokens with those of the same weights and full attention.

    Full attention is the same model with windows over everything and a cache that keeps every
    token: no second copy, and the weights are those that the model has now.

    Args:
        model: A prepared model.
        batches: Prompts, token ids ``[B, N]`` without padding.
        new_tokens: Tokens to compare; end-of-sequence tokens end nothing.

    Raises:
        ConfigError: The model is not prepared, or the batches are malformed or padded.
    """
    from transformers.cache_utils import DynamicCache

    expect_integer("new_tokens", new_tokens, 1)
    evas, rows = converted_attentions(model), []
    for index, inputs in enumerate(model_inputs(model, batches)):
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is not None and not bool(mask.bool().all()):
            hint = "group prompts of one length"
            raise ConfigError("must have no padding", subject=f"batches[{index}]", hint=hint)
        ours = greedy(model, ids, new_tokens, stop=False)
        with exact_attention(evas):
            full = greedy(
                model, ids, new_tokens, stop=False, cache=DynamicCache(config=model.config)
            )
        rows += [_row(ids.shape[1], *pair) for pair in zip(ours, full, strict=True)]
    return AgreementReport(rows=tuple(rows))


def _row(length: int, ours: Tensor, full: Tensor) -> AgreementRow:
    equal = ours == full
    return AgreementRow(
        length=length,
        new_tokens=len(equal),
        equal=int(equal.sum()),
        prefix=int(equal.long().cumprod(0).sum()),
    )
