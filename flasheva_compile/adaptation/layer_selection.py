"""What ``select_full_layers`` finds, to print, store or draw: scores, rivals, a configuration."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from flasheva_compile.adaptation.calibrate import aligned

if TYPE_CHECKING:
    import os

Mode: TypeAlias = Literal["restore", "replace", "greedy"]

_MEANING = {
    "restore": "loss with this layer alone full; gain: how far below all-FlashEVA",
    "replace": "loss with this layer alone FlashEVA; gain: how far above all-full",
    "greedy": "loss with this layer alone full, but chosen one beside the other",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScore:
    """What one attention's exactness is worth.

    Attributes:
        path: Its module path.
        index: Its number in the model, as keys of ``layers`` have it.
        loss: Mean next-token loss of the model with this layer changed alone.
        gain: How much loss leaving it full saves.
        probe_gain: The same of the probe's loss; None without one.
    """

    path: str
    index: int
    loss: float
    gain: float
    probe_gain: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A choice of full layers and what it gives.

    Attributes:
        name: ``"selected"``, ``"periodic"`` or ``"first/last"``.
        indices: The layers that are full.
        loss: Mean next-token loss.
        recovered: Share of the loss between all-FlashEVA and all-full that it wins back; None where
            FlashEVA loses nothing.
        probe_recovered: The same of the probe's loss; None also without a probe.
    """

    name: str
    indices: tuple[int, ...]
    loss: float
    recovered: float | None
    probe_recovered: float | None = None


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
        scores = [("layer", "attention", "loss", "gain", "probe", "")]
        for score in self.scores:
            mark = "full" if score.index in self.chosen else ""
            loss, gain = f"{score.loss:.4f}", f"{score.gain:+.4f}"
            probed = "" if score.probe_gain is None else f"{score.probe_gain:+.4f}"
            scores.append((str(score.index), score.path, loss, gain, probed, mark))
        placed = [("placement", "loss", "recovered", "of the probe", "full layers")]
        placed.append(("none (all FlashEVA)", f"{self.eva_loss:.4f}", "0 %", "", ""))
        for row in self.placements:
            share, probed = _percent(row.recovered), _percent(row.probe_recovered)
            indices = ", ".join(map(str, row.indices))
            placed.append((row.name, f"{row.loss:.4f}", share, probed, indices))
        placed.append(("all", f"{self.full_loss:.4f}", "100 %", "", ""))
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


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{round(100 * share)} %"
