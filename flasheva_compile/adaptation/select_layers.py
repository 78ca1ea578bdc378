"""``select_full_layers``: which attentions of a prepared model are worth leaving full."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch.nn import functional

from flasheva_compile.adaptation.calibrate import (
    aligned,
    converted_attentions,
    exact_attention,
    model_inputs,
    running_eagerly,
)
from flasheva_compile.config import HybridConfig
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.prepared import prepared_of
from flasheva_compile.layer_names import covers, name_layers
from flasheva_compile.validation import expect_choice

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from flasheva_compile.config import LayerName
    from flasheva_compile.generation.eva_attention import EvaAttention

log = logging.getLogger(__name__)

Mode: TypeAlias = Literal["restore", "replace"]

_IGNORED = -100  # label of what is not predicted, as in transformers
_ROWS_AT_ONCE = 1024  # rows of the vocabulary-sized logits in fp32 [tokens]
_MEANING = {
    "restore": "loss with this layer alone full; gain: how far below all-FlashEVA",
    "replace": "loss with this layer alone FlashEVA; gain: how far above all-full",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScore:
    """What one attention's exactness is worth.

    Attributes:
        path: Its module path.
        index: Its number in the model, as keys of ``layers`` have it.
        loss: Mean next-token loss of the model with this layer changed alone.
        gain: How much loss leaving it full saves.
    """

    path: str
    index: int
    loss: float
    gain: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A choice of full layers and what it gives.

    Attributes:
        name: ``"selected"``, ``"periodic"`` or ``"first/last"``.
        indices: The layers that are full.
        loss: Mean next-token loss.
        recovered: Share of the loss between all-FlashEVA and all-full that it wins back; None where
            FlashEVA loses nothing.
    """

    name: str
    indices: tuple[int, ...]
    loss: float
    recovered: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSelection:
    """What :func:`select_full_layers` found.

    Attributes:
        mode: How layers were scored.
        tokens: How many predicted tokens each loss is a mean over.
        full_loss: With all layers full.
        eva_loss: With all converted layers FlashEVA.
        scores: One per converted attention, in the order in which they run.
        chosen: Indices of the layers to leave full, in that order.
        layers: What ``prepare`` takes: the model's configuration with these layers full.
        placements: The selection and its rivals with as many full layers.
    """

    mode: Mode
    tokens: int
    full_loss: float
    eva_loss: float
    scores: tuple[LayerScore, ...]
    chosen: tuple[int, ...]
    layers: dict[str | int, Any]
    placements: tuple[Placement, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``json`` accepts; keys of ``layers`` become strings."""
        data = dataclasses.asdict(self)
        return data | {"layers": {str(key): value for key, value in self.layers.items()}}

    def to_json(self) -> str:
        """Return ``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        scores = [("layer", "attention", "loss", "gain", "")]
        for score in self.scores:
            mark = "full" if score.index in self.chosen else ""
            loss, gain = f"{score.loss:.4f}", f"{score.gain:+.4f}"
            scores.append((str(score.index), score.path, loss, gain, mark))
        placed = [("placement", "loss", "recovered", "full layers")]
        placed.append(("none (all FlashEVA)", f"{self.eva_loss:.4f}", "0 %", ""))
        for row in self.placements:
            share = "-" if row.recovered is None else f"{round(100 * row.recovered)} %"
            indices = ", ".join(map(str, row.indices))
            placed.append((row.name, f"{row.loss:.4f}", share, indices))
        placed.append(("all", f"{self.full_loss:.4f}", "100 %", ""))
        title = f"{len(self.chosen)} of {len(self.scores)} layers full, by {self.mode!r}"
        counted = f"mean next-token loss over {self.tokens} tokens; {_MEANING[self.mode]}"
        return "\n".join([title, counted, "", *aligned(scores), "", *aligned(placed)])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw what every layer gains and what each placement loses; needs matplotlib.

        Args:
            path: The file; its suffix says the format.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        colors = ["C1" if score.index in self.chosen else "C0" for score in self.scores]
        places = range(len(self.scores))
        left.bar(places, [score.gain for score in self.scores], color=colors)
        left.set_xticks(places, [str(score.index) for score in self.scores], fontsize=7)
        left.axhline(0, color="black", linewidth=0.5)
        left.set(xlabel="layer", ylabel="loss saved [nats/token]")
        left.set_title(f"{self.mode} one layer at a time; orange: left full")
        right.bar([row.name for row in self.placements], [row.loss for row in self.placements])
        right.axhline(self.eva_loss, color="C3", linestyle="--", label="all FlashEVA")
        right.axhline(self.full_loss, color="C2", linestyle="--", label="all full")
        losses = [self.eva_loss, self.full_loss, *(row.loss for row in self.placements)]
        room = 0.1 * (max(losses) - min(losses)) or 1e-3
        right.set(ylim=(min(losses) - room, max(losses) + 3 * room), ylabel="loss [nats/token]")
        right.set_title(f"{len(self.chosen)} full layers, placed")
        right.legend(fontsize=7)
        figure.savefig(path)


def select_full_layers(
    model: Any,  # noqa: ANN401 - a prepared transformers model
    batches: Iterable[Any],
    keep: int,
    *,
    mode: Mode = "restore",
) -> LayerSelection:
    """Score every converted attention of a prepared model and choose those to leave full.

    The model is run once on the batches for every layer, and a few times more: all layers full, all
    FlashEVA, the selection, and as many full layers placed periodically (the last of each of
    ``keep`` equal stretches) or at both ends. Full is the same attention with a window over
    everything, so nothing is prepared anew and the model stays as it was. Calibrate or train it
    first: scores are those of its present parameters.

    Args:
        model: A model that went through ``prepare``. It runs uncompiled, in evaluation mode.
        batches: An iterable of token ids ``[B, N]``, or of dicts of the model's inputs. What an
            ``attention_mask`` hides is not predicted; ``labels`` are used where they are given.
            Rows must be longer than the window, or nothing is approximated.
        keep: How many layers to leave full, from 1 to all.
        mode: ``"restore"``: a layer's gain is what making it full saves in the all-FlashEVA model.
            ``"replace"``: what making it FlashEVA costs in the full model.

    Returns:
        Scores, chosen layers, and ``layers`` for ``prepare``; print it or plot it. Where nothing
        but full layers remain, ``prepare`` refuses ``layers``: there is nothing to convert.

    Raises:
        ConfigError: The model is not prepared, ``keep`` or ``mode`` is out of range, the batches
            are of the wrong type or predict nothing, or a loss is not finite.

    Example:
        >>> selection = fe.select_full_layers(model, batches, keep=4)
        >>> fe.prepare(model, selection.layers)
    """
    evas = converted_attentions(model)
    _expect_range(keep, len(evas))
    expect_choice("mode", mode, get_args(Mode))
    trials = _Trials(model, evas, list(model_inputs(model, batches)))
    scores = _score(model, trials, mode)
    best = sorted(range(len(evas)), key=lambda place: -scores[place].gain)[:keep]
    placements = _place(trials, scores, sorted(best))
    return LayerSelection(
        mode=mode,
        tokens=trials.tokens,
        full_loss=trials.loss(trials.every),
        eva_loss=trials.loss(frozenset()),
        scores=scores,
        chosen=placements[0].indices,
        layers=_layers(model, [scores[place].path for place in sorted(best)]),
        placements=placements,
    )


def _score(model: Any, trials: _Trials, mode: Mode) -> tuple[LayerScore, ...]:  # noqa: ANN401
    names, scores = _names(model), []
    full, eva = trials.loss(trials.every), trials.loss(frozenset())
    for place, path in enumerate(trials.paths):
        alone = frozenset({place})
        loss = trials.loss(alone if mode == "restore" else trials.every - alone)
        gain = eva - loss if mode == "restore" else loss - full
        index = names[path].index
        index = place if index is None else index
        scores.append(LayerScore(path=path, index=index, loss=loss, gain=gain))
        log.info("%s: loss %.4f, gain %+.4f", path, loss, gain)
    return tuple(scores)


def _place(
    trials: _Trials, scores: Sequence[LayerScore], selected: list[int]
) -> tuple[Placement, ...]:
    """Evaluate the selection and as many full layers elsewhere."""
    keep, count = len(selected), len(scores)
    places = {
        "selected": selected,
        "periodic": [(step + 1) * count // keep - 1 for step in range(keep)],
        "first/last": [*range(-(-keep // 2)), *range(count - keep // 2, count)],
    }
    full, eva = trials.loss(trials.every), trials.loss(frozenset())
    placements: list[Placement] = []
    for name, chosen in places.items():
        loss = trials.loss(frozenset(chosen))
        recovered = (eva - loss) / (eva - full) if eva > full else None
        indices = tuple(scores[place].index for place in chosen)
        placements.append(Placement(name=name, indices=indices, loss=loss, recovered=recovered))
    return tuple(placements)


def _expect_range(keep: object, count: int) -> None:
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= count:
        raise ConfigError(
            f"must be from 1 to {count}, the number of converted attentions, got {keep!r}",
            subject="keep",
        )


# --- losses ---------------------------------------------------------------------------------------


class _Trials:
    """The losses of a model with some of its attentions exact; none is computed twice.

    Args:
        model: The prepared model.
        evas: Its converted attentions.
        batches: Keyword arguments of the model.

    Attributes:
        tokens: How many tokens the batches predict.
        every: All places.
        paths: Module paths of the attentions, by place.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        evas: Sequence[EvaAttention],
        batches: list[dict[str, Any]],
    ) -> None:
        self._model, self._evas = model, evas
        self._batches = [(_without(inputs, "labels"), _targets(inputs)) for inputs in batches]
        self.every = frozenset(range(len(evas)))
        self.paths = [eva.path for eva in evas]
        self._found: dict[frozenset[int], float] = {}
        self.tokens = sum(int((targets != _IGNORED).sum()) for _, targets in self._batches)
        if not self.tokens:
            raise ConfigError("predict no token", subject="batches")

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


def _targets(inputs: dict[str, Any]) -> Tensor:
    """Return the token that each position but the last predicts, ``[B, N - 1]``."""
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    labels = inputs["input_ids"] if labels is None else labels
    if labels.shape != inputs["input_ids"].shape:
        got, wanted = tuple(labels.shape), tuple(inputs["input_ids"].shape)
        raise ConfigError(f"labels must be {wanted} like input_ids, got {got}", subject="batches")
    targets = labels[:, 1:].long()
    if mask is None:
        return targets
    return targets.masked_fill(~(mask[:, :-1].bool() & mask[:, 1:].bool()), _IGNORED)


def _without(inputs: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key != name}


# --- the configuration ----------------------------------------------------------------------------


def _names(model: Any) -> dict[str, LayerName]:  # noqa: ANN401
    """Return the names of all attentions of a prepared model by their paths."""
    paths = [row.path for row in prepared_of(model).report.layers]
    names = name_layers(paths, [path for path, _ in model.named_modules()])
    return {name.path: name for name in names}


def _layers(model: Any, full: Sequence[str]) -> dict[str | int, Any]:  # noqa: ANN401
    """Return the model's own configuration with the attentions at these paths full.

    A layer is named by its index where that names nothing else and no path overrules it.
    """
    hybrid, names = prepared_of(model).hybrid, _names(model)
    layers = _without(hybrid.to_dict(), "version")
    wanted = {path: hybrid.resolve(name) for path, name in names.items()}
    wanted |= dict.fromkeys(full, "full")
    for path in full:
        index = names[path].index
        alone = index is not None and sum(covers(index, name) for name in names.values()) == 1
        if alone and _resolved(_with_index(layers, names, path), names[path]) == "full":
            layers = _with_index(layers, names, path)
        else:
            layers[path] = "full"
    assert wanted == {path: _resolved(layers, name) for path, name in names.items()}
    return {"default": layers.pop("default")} | {_key(key): layers[key] for key in layers}


def _with_index(layers: dict[str, Any], names: dict[str, LayerName], path: str) -> dict[str, Any]:
    """Make a layer full by its index; other indices that name it are dropped."""
    index = names[path].index
    kept = {key: value for key, value in layers.items() if not _is_index(key, names[path])}
    return {**kept, str(index): "full"}


def _is_index(key: str, name: LayerName) -> bool:
    number = _key(key)
    return isinstance(number, int) and covers(number, name)


def _key(key: str) -> str | int:
    return int(key) if key.removeprefix("-").isdecimal() else key


def _resolved(layers: dict[str, Any], name: LayerName) -> Any:  # noqa: ANN401
    return HybridConfig.from_dict(layers).resolve(name)
