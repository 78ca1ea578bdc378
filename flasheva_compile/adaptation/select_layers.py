"""``select_full_layers``: which attentions of a prepared model are worth leaving full."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from flasheva_compile.adaptation.calibrate import some_converted
from flasheva_compile.adaptation.full_layers import attention_names, layers_with_full
from flasheva_compile.adaptation.layer_selection import (
    LayerScore,
    LayerSelection,
    Mode,
    Placement,
)
from flasheva_compile.adaptation.layer_trials import Trials
from flasheva_compile.errors import ConfigError
from flasheva_compile.validation import expect_choice

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

log = logging.getLogger(__name__)


def select_full_layers(
    model: Any,  # noqa: ANN401 - a prepared transformers model
    batches: Iterable[Any],
    keep: int,
    *,
    probe: Iterable[Any] | None = None,
    mode: Mode = "restore",
) -> LayerSelection:
    """Score every converted attention of a prepared model and choose those to leave full.

    The model is run once on the batches for every layer, and with as many full layers placed
    periodically (the last of each of ``keep`` equal stretches) or at both ends. Full is the same
    attention with a window over everything, so the model stays as it was. Calibrate or train it
    first: scores are those of its present parameters.

    Text alone says little about retrieval: most tokens need none. With a ``probe``, layers are
    chosen by the sum of both shares: how much of the loss between all-FlashEVA and all-full a
    choice wins back on the text, and on the probe.

    Args:
        model: A model that went through ``prepare``. It runs uncompiled, in evaluation mode.
        batches: An iterable of token ids ``[B, N]``, or of dicts of the model's inputs. What an
            ``attention_mask`` hides is not predicted; ``labels`` are used where they are given.
            Rows must be longer than the window, or nothing is approximated.
        keep: How many layers to leave full, from 1 to all.
        probe: More batches, with ``labels`` where something has to be found, as
            :func:`~flasheva_compile.evaluation.passkey.passkey_batches` makes them.
        mode: ``"restore"``: a layer's gain is what making it full saves in the all-FlashEVA model.
            ``"replace"``: what making it FlashEVA costs in the full model. ``"greedy"``: gains as
            of ``"restore"``, but each layer is chosen beside those that are chosen already, which
            takes ``keep`` times as long: layers that only help together are missed otherwise.

    Returns:
        Scores, chosen layers, and ``layers`` for ``prepare``; print it or plot it. Where nothing
        but full layers remain, ``prepare`` refuses ``layers``: there is nothing to convert.

    Raises:
        ConfigError: The model is not prepared, ``keep`` or ``mode`` is out of range, the batches
            are of the wrong type or predict nothing, or a loss is not finite.
    """
    evas = some_converted(model)
    _expect_range(keep, len(evas))
    expect_choice("mode", mode, get_args(Mode))
    text = Trials(model, evas, batches, "batches")
    trials = _Both(text, None if probe is None else Trials(model, evas, probe, "probe"))
    scores = _score(model, trials, mode)
    chosen = _greedy(trials, keep) if mode == "greedy" else _best(scores, trials, keep)
    placements = _place(trials, scores, sorted(chosen))
    return LayerSelection(
        mode=mode,
        tokens=text.tokens,
        full_loss=text.loss(text.every),
        eva_loss=text.loss(frozenset()),
        scores=scores,
        chosen=placements[0].indices,
        layers=layers_with_full(model, {scores[place].path: "full" for place in sorted(chosen)}),
        placements=placements,
    )


@dataclass(frozen=True)
class _Both:
    """The losses on text and, where there is one, on a probe."""

    text: Trials
    probe: Trials | None

    def value(self, full: frozenset[int]) -> float:
        """Return the sum of the shares of both losses that these full layers win back."""
        both = (trials for trials in (self.text, self.probe) if trials is not None)
        return sum((x.loss(frozenset()) - x.loss(full)) / _gap(x) for x in both)


def _score(model: Any, trials: _Both, mode: Mode) -> tuple[LayerScore, ...]:  # noqa: ANN401
    names, scores = attention_names(model), []
    for place, path in enumerate(trials.text.paths):
        index = names[path].index
        loss, saved = _alone(trials.text, place, mode)
        probed = None if trials.probe is None else _alone(trials.probe, place, mode)[1]
        index = place if index is None else index
        scores.append(LayerScore(path=path, index=index, loss=loss, gain=saved, probe_gain=probed))
        log.info("%s: loss %.4f, gain %+.4f", path, loss, saved)
    return tuple(scores)


def _alone(trials: Trials, place: int, mode: Mode) -> tuple[float, float]:
    """Return the loss with one layer changed alone, and what its being full saves."""
    alone = frozenset({place})
    if mode == "replace":
        loss = trials.loss(trials.every - alone)
        return loss, loss - trials.loss(trials.every)
    loss = trials.loss(alone)
    return loss, trials.loss(frozenset()) - loss


def _best(scores: Sequence[LayerScore], trials: _Both, keep: int) -> list[int]:
    """Return the places with the largest scores, one by one; the probe counts as the text does."""

    def value(place: int) -> float:
        score = scores[place]
        if trials.probe is None or score.probe_gain is None:
            return score.gain
        return score.gain / _gap(trials.text) + score.probe_gain / _gap(trials.probe)

    return sorted(range(len(scores)), key=lambda place: -value(place))[:keep]


def _gap(trials: Trials) -> float:
    gap = trials.loss(frozenset()) - trials.loss(trials.every)
    return gap if gap > 0 else 1.0


def _greedy(trials: _Both, keep: int) -> list[int]:
    """Add the layer that helps most beside those that are chosen, again and again."""
    chosen: frozenset[int] = frozenset()
    for _ in range(keep):
        left = sorted(trials.text.every - chosen)
        chosen |= {max(left, key=lambda place: trials.value(chosen | {place}))}
    return sorted(chosen)


def _place(
    trials: _Both, scores: Sequence[LayerScore], selected: list[int]
) -> tuple[Placement, ...]:
    """Evaluate the selection and as many full layers elsewhere."""
    keep, count = len(selected), len(scores)
    places = {
        "selected": selected,
        "periodic": [(step + 1) * count // keep - 1 for step in range(keep)],
        "first/last": [*range(-(-keep // 2)), *range(count - keep // 2, count)],
    }
    return tuple(
        Placement(
            name=name,
            indices=tuple(scores[place].index for place in chosen),
            loss=trials.text.loss(frozenset(chosen)),
            recovered=_recovered(trials.text, chosen),
            probe_recovered=None if trials.probe is None else _recovered(trials.probe, chosen),
        )
        for name, chosen in places.items()
    )


def _recovered(trials: Trials, chosen: Sequence[int]) -> float | None:
    eva, full = trials.loss(frozenset()), trials.loss(trials.every)
    return (eva - trials.loss(frozenset(chosen))) / (eva - full) if eva > full else None


def _expect_range(keep: object, count: int) -> None:
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= count:
        raise ConfigError(
            f"must be from 1 to {count}, the number of converted attentions, got {keep!r}",
            subject="keep",
        )
