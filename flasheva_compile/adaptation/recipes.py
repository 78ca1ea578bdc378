"""What an adaptation does, phase by phase, as data; ``losses.py`` and ``train.py`` carry it out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from flasheva_compile.errors import ConfigError
from flasheva_compile.validation import expect_choice, expect_integer

Loss: TypeAlias = Literal["attention_outputs", "logits", "language_model"]
Trains: TypeAlias = Literal["rules", "attention", "all"]
Precision: TypeAlias = Literal["fp32", "bf16"]
FeatureNoise: TypeAlias = Literal["none", "clamped", "normal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Some optimizer steps with one loss and one set of trained weights.

    Args:
        name: For logs.
        loss: ``"attention_outputs"``: each FlashEVA attention against exact attention of the same
            queries, keys and values, relative squared error, averaged over layers.
            ``"logits"``: KL divergence from the model as it was, with exact attention.
            ``"language_model"``: next-token cross-entropy.
        trains: ``"rules"``: the chunk rules' parameters; ``"attention"``: these and every weight of
            the converted attentions; ``"all"``: every weight.
        steps: Optimizer steps.
        learning_rate: After warm-up; it then falls along a cosine to a tenth.
        rule_learning_rate: That of the chunk rules' parameters; None = ``learning_rate``. They are
            few and as large as keys, so they need more.
        warmup: Steps in which it rises.
        accumulate: Batches per optimizer step.
        precision: ``"bf16"``: forward and backward under autocast; weights and optimizer keep
            their dtypes.
        feature_noise: What layers with the ``eva`` rule add to the centres ``omega`` of their
            random features: nothing, or one sample of a standard normal distribution per chunk,
            ``"clamped"`` to [-1, 1] or as it is. The paper clips, and says no bound: this is ours.

    Raises:
        ConfigError: A value is of the wrong type or out of range.
    """

    name: str
    loss: Loss
    trains: Trains
    steps: int
    learning_rate: float
    rule_learning_rate: float | None = None
    warmup: int = 20
    accumulate: int = 1
    precision: Precision = "fp32"
    feature_noise: FeatureNoise = "none"

    def __post_init__(self) -> None:
        expect_choice("loss", self.loss, get_args(Loss))
        expect_choice("trains", self.trains, get_args(Trains))
        expect_choice("precision", self.precision, get_args(Precision))
        expect_choice("feature_noise", self.feature_noise, get_args(FeatureNoise))
        for name, least in (("steps", 0), ("warmup", 0), ("accumulate", 1)):
            expect_integer(name, getattr(self, name), least)
        if self.loss == "attention_outputs" and self.trains != "rules":
            raise ConfigError(
                f'trains={self.trains!r} with loss="attention_outputs"',
                subject=self.name,
                hint='that loss depends on the rules\' parameters alone: trains="rules"',
            )


def distill(*, rule_steps: int = 200, logit_steps: int = 400) -> tuple[Phase, ...]:
    """Return our recipe: attention outputs first, then the logits of the model as it was."""
    outputs = Phase(
        name="attention outputs",
        loss="attention_outputs",
        trains="rules",
        steps=rule_steps,
        learning_rate=1e-2,
    )
    logits = Phase(
        name="logits", loss="logits", trains="attention", steps=logit_steps, learning_rate=1e-4
    )
    return outputs, logits


def paper(*, attention_steps: int = 2000, steps: int = 10_000) -> tuple[Phase, ...]:
    """Return the recipe of FlashEVA (arXiv:2511.00576): attention layers, then all weights.

    Layers with the ``eva`` rule sample their random features; other rules have none.
    """
    attention = Phase(
        name="attention",
        loss="language_model",
        trains="attention",
        steps=attention_steps,
        learning_rate=3e-4,
        feature_noise="clamped",
    )
    return attention, replace(attention, name="all weights", trains="all", steps=steps)
