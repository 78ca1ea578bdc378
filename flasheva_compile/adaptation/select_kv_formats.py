"""``select_kv_formats``: in how many bits each full layer of a prepared model is stored."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from flasheva_compile.adaptation.full_layers import layers_with_full
from flasheva_compile.adaptation.kv_selection import KvMixture, KvScore, KvSelection
from flasheva_compile.adaptation.kv_trials import KvTrials
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.prepared import prepared_of
from flasheva_compile.layer_config import FullConfig
from flasheva_compile.quantization.codebooks import KvCodebooks
from flasheva_compile.quantization.formats import kv_format

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from flasheva_compile.quantization.codebooks import LayerShape

log = logging.getLogger(__name__)


def select_kv_formats(
    model: Any,  # noqa: ANN401 - a prepared transformers model
    batches: Iterable[Any],
    codebooks: Sequence[KvCodebooks],
    bits: float,
) -> KvSelection:
    """Choose a format for each full layer of a prepared model, by what it does to predictions.

    Layers differ: some hardly notice two bits. The model reads the batches through its cache once
    for every layer and format, that layer alone stored so. Of all choices of at most ``bits`` on
    average the one with the smallest sum of divergences is taken; what layers do to each other is
    left out of it, but measured of the result and of every format. The model is not changed.

    Args:
        model: A prepared model. It runs uncompiled, in evaluation mode.
        batches: An iterable of token ids ``[B, N]`` or of dicts with ``input_ids``: rows as long
            as texts to be cached, others than codebooks were learned from, without padding.
        codebooks: Of ``calibrate_kv``, one for each format to choose from, of the same layers.
        bits: Stored bits per element, at most; codebooks and exact tokens are not counted.

    Returns:
        The choice, its codebooks, and ``layers`` for ``prepare``; print it.

    Raises:
        ConfigError: The model is not prepared, codebooks are none, of other layers or another
            model's, ``bits`` are too few, or the batches are wrong, padded or too short.

    Example:
        >>> candidates = [fe.calibrate_kv(model, text, f"tc-{n}bit") for n in (2, 3, 4)]
        >>> selection = fe.select_kv_formats(model, others, candidates, bits=2.3)
        >>> fe.prepare(model, selection.layers)
        >>> selection.codebooks.save("model/kv_codebooks.safetensors")
    """
    candidates = _by_format(codebooks)
    shapes = codebooks[0].shapes
    paths = {index: prepared_of(model).full[index].path for index in _expect_full(model, shapes)}
    costs = {(index, name): _bits(shapes[index], name) for index in shapes for name in candidates}
    most = _budget(bits, shapes, candidates, costs)
    trials = KvTrials(model, batches)
    scores = _score(trials, paths, candidates)
    formats = cheapest({(x.index, x.format): x.divergence for x in scores}, costs, most)
    chosen = KvCodebooks.chosen({index: candidates[name] for index, name in formats.items()})
    ways = {name: (dict.fromkeys(shapes, name), books) for name, books in candidates.items()}
    return KvSelection(
        bits=bits,
        tokens=trials.tokens,
        scores=scores,
        formats=formats,
        mixtures=tuple(
            KvMixture(
                name=name,
                bits=sum(costs[choice] for choice in way.items()) / _elements(shapes),
                divergence=trials.divergence(way, books),
            )
            for name, (way, books) in {"selected": (formats, chosen), **ways}.items()
        ),
        codebooks=chosen,
        layers=layers_with_full(model, {paths[i]: _stored(name) for i, name in formats.items()}),
    )


def _score(
    trials: KvTrials, paths: Mapping[int, str], candidates: Mapping[str, KvCodebooks]
) -> tuple[KvScore, ...]:
    """Store one layer at a time in one format after the other."""
    scores = []
    for index, path in paths.items():
        for name, books in candidates.items():
            divergence = trials.divergence({index: name}, books)
            scores.append(KvScore(index=index, path=path, format=name, divergence=divergence))
            log.info("%s in %s: divergence %.6f", path, name, divergence)
    return tuple(scores)


def _stored(name: str) -> FullConfig:
    return FullConfig(kv=name)  # pyright: ignore[reportArgumentType] - checked when it is made


def cheapest(
    values: Mapping[tuple[int, str], float], costs: Mapping[tuple[int, str], int], most: int
) -> dict[int, str]:
    """Choose a format for every layer: the smallest sum of values among those of bounded cost.

    Costs are whole numbers, so that all sums of costs can be gone through (a knapsack).

    Args:
        values: (Layer, format) -> what is to be small.
        costs: (Layer, format) -> what is to be at most ``most`` in all.
        most: At least what the cheapest formats cost.
    """
    unit = math.gcd(*costs.values())
    best: dict[int, tuple[float, dict[int, str]]] = {0: (0.0, {})}  # cost -> value, choice
    for layer in dict.fromkeys(index for index, _ in values):
        names = [name for index, name in values if index == layer]
        grown: dict[int, tuple[float, dict[int, str]]] = {}
        for cost, (value, choice) in best.items():
            for name in names:
                total, spent = value + values[layer, name], cost + costs[layer, name] // unit
                if spent <= most // unit and (spent not in grown or total < grown[spent][0]):
                    grown[spent] = (total, {**choice, layer: name})
        best = grown
    return min(best.values(), key=lambda found: found[0])[1]


def _by_format(codebooks: Sequence[KvCodebooks]) -> dict[str, KvCodebooks]:
    """Return candidates by their format."""
    if not isinstance(codebooks, list | tuple):
        message = f"must be a list, one of each format, got {type(codebooks).__name__}"
        raise ConfigError(message, subject="codebooks")
    found: dict[str, KvCodebooks] = {}
    for books in codebooks:
        if not isinstance(books, KvCodebooks):
            message = f"must be what calibrate_kv returned, got {type(books).__name__}"
            raise ConfigError(message, subject="codebooks", hint="KvCodebooks.load(file)")
        names = set(books.formats.values())
        if len(names) != 1 or names & set(found) or books.shapes != codebooks[0].shapes:
            message = "are to be one for each format, of the same layers; got "
            message += "; ".join(str(given) for given in codebooks)
            raise ConfigError(message, subject="codebooks")
        found[names.pop()] = books
    if not found:
        raise ConfigError("are none", subject="codebooks", hint="give what calibrate_kv returned")
    return found


def _expect_full(model: Any, shapes: Mapping[int, LayerShape]) -> list[int]:  # noqa: ANN401
    full = prepared_of(model).full
    for index in shapes:
        if index not in full:
            message = f"have layer {index}, which does not stay full; there are {sorted(full)}"
            raise ConfigError(message, subject="codebooks", hint="prepare, then calibrate_kv")
    return sorted(shapes)


def _budget(
    bits: object,
    shapes: Mapping[int, LayerShape],
    candidates: Mapping[str, KvCodebooks],
    costs: Mapping[tuple[int, str], int],
) -> int:
    """Return how many bits all layers may have for a token.

    Raises:
        ConfigError: No choice has so few.
    """
    elements = _elements(shapes)
    least = sum(min(costs[index, name] for name in candidates) for index in shapes)
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not bits * elements >= least:
        message = f"must be at least {least / elements:g}, what the fewest are, got {bits!r}"
        raise ConfigError(
            message, subject="bits", hint="give codebooks of fewer bits, or more bits"
        )
    return int(min(bits, 16) * elements + 1e-6)


def _elements(shapes: Mapping[int, LayerShape]) -> int:
    """Return the numbers that all layers have for a token."""
    return sum(shape.kv_heads * (shape.head_dim + shape.value_dim) for shape in shapes.values())


def _bits(shape: LayerShape, name: str) -> int:
    return 8 * shape.kv_heads * kv_format(name).nbytes(shape.head_dim, shape.value_dim)
