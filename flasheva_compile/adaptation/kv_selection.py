"""What ``select_kv_formats`` finds, to print or store: scores, rivals, a configuration."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flasheva_compile.adaptation.calibrate import aligned

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flasheva_compile.quantization.codebooks import KvCodebooks


@dataclass(frozen=True, slots=True, kw_only=True)
class KvScore:
    """What storing one layer in one format does.

    Attributes:
        index: The layer's place in the cache.
        path: Its attention's module path.
        format: A name of :data:`~flasheva_compile.quantization.formats.FORMATS`.
        divergence: Of the model with this layer alone stored so [nats per token].
    """

    index: int
    path: str
    format: str
    divergence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KvMixture:
    """One way to store all layers, and what it does.

    Attributes:
        name: ``"selected"``, or the format of all layers.
        bits: Stored bits per element, without codebooks and exact tokens.
        divergence: Of the model with all layers stored so [nats per token].
    """

    name: str
    bits: float
    divergence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSelection:
    """What :func:`select_kv_formats` found.

    Attributes:
        bits: What was asked for, at most.
        tokens: How many tokens each divergence is a mean over.
        scores: One per layer and format.
        formats: Place in the cache -> format.
        mixtures: The selection, and every format for all layers.
        codebooks: Of the selection; ``save`` them beside the model.
        layers: What ``prepare`` takes: the model's configuration with these layers stored so.
    """

    bits: float
    tokens: int
    scores: tuple[KvScore, ...]
    formats: Mapping[int, str]
    mixtures: tuple[KvMixture, ...]
    codebooks: KvCodebooks
    layers: dict[str | int, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``json`` accepts, without codebooks; keys become strings."""
        return {
            "bits": self.bits,
            "tokens": self.tokens,
            "scores": [dataclasses.asdict(score) for score in self.scores],
            "formats": {str(index): name for index, name in self.formats.items()},
            "mixtures": [dataclasses.asdict(mixture) for mixture in self.mixtures],
            "layers": {str(key): value for key, value in self.layers.items()},
        }

    def to_json(self) -> str:
        """Return ``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        names = list(dict.fromkeys(score.format for score in self.scores))
        found = {(score.index, score.format): score.divergence for score in self.scores}
        rows = [("layer", "attention", *names, "")]
        for index, path in {score.index: score.path for score in self.scores}.items():
            cells = (f"{found[index, name]:.5f}" for name in names)
            rows.append((str(index), path, *cells, self.formats[index]))
        mixed = [("all layers", "bits", "divergence")]
        mixed += [(m.name, f"{m.bits:.2f}", f"{m.divergence:.5f}") for m in self.mixtures]
        title = f"{self.mixtures[0].bits:.2f} bits of at most {self.bits:g}"
        what = f"divergence from exact layers over {self.tokens} tokens [nats per token]"
        return "\n".join([title, what, "", *aligned(rows), "", *aligned(mixed)])
