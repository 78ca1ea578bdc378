"""``calibrate``: chunk-rule parameters from the queries of the model itself, without training."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.adaptation.calibrate_selector import learns_selector, lessons_of, listening
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.eva_attention import EvaAttention, covering
from flasheva_compile.generation.prepared import prepared_of
from flasheva_compile.generation.probe import evaluating

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

    from flasheva_compile.adaptation.calibrate_selector import LearnedSelector

log = logging.getLogger(__name__)

_HEADER = ("attention", "rule", "tokens", "norm", "parameters")
_NOTHING = {
    "mean": "nothing to calibrate: the rule has no parameters",
    "eva": "nothing to calibrate: its feature maps see the queries themselves",
}
_EVABYTE = "p and b as they were: no p gives values the weights that a gives keys"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCalibration:
    """What became of one converted attention.

    Attributes:
        path: Its module path.
        rule: Its chunk rule.
        tokens: How many valid tokens' queries reached it.
        calibrated: Whether a parameter was set, or the selector's weights.
        parameter: The name of that parameter; empty if none was.
        norm: Its Euclidean norm, averaged over kv heads; None if none was set.
        selector_queries: How many queries the selector's weights were learned from; 0 if they stay.
        note: What was left alone, and why.
    """

    path: str
    rule: str
    tokens: int
    calibrated: bool = False
    parameter: str = ""
    norm: float | None = None
    selector_queries: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """What :func:`calibrate` did.

    Attributes:
        layers: One row per converted attention, in the order in which they run.
    """

    layers: tuple[LayerCalibration, ...]

    @property
    def calibrated(self) -> tuple[LayerCalibration, ...]:
        """The attentions of which a parameter or the selector's weights were set."""
        return tuple(layer for layer in self.layers if layer.calibrated)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {"layers": [dataclasses.asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        rows = [
            (
                layer.path,
                layer.rule,
                str(layer.tokens),
                "-" if layer.norm is None else f"{layer.norm:.3g}",
                "; ".join(filter(None, (_what_was_set(layer), layer.note))),
            )
            for layer in self.layers
        ]
        title = f"calibration: {len(self.calibrated)} of {len(self.layers)} attentions set"
        return "\n".join([title, "", *aligned([_HEADER, *rows])])


def _what_was_set(layer: LayerCalibration) -> str:
    learned = f"selector_weight set from {layer.selector_queries} queries"
    found = (
        f"{layer.parameter} set" * bool(layer.parameter),
        learned * bool(layer.selector_queries),
    )
    return "; ".join(filter(None, found))


def calibrate(
    model: Any,  # noqa: ANN401
    batches: Iterable[Any],
    *,
    context_length: int | None = None,
) -> CalibrationReport:
    """Set chunk-rule parameters to what the queries of a prepared model say, without training.

    Runs the model on the batches with every converted attention exact, so that the queries are
    those of full attention, and averages them over all valid tokens and over the query heads that
    share a kv head: ``mean_h``. Then

    - ``tangent``: ``phi_h = mean_h``, where a chunk's mass is exact;
    - ``evabyte``: ``a_h = scale * mean_h``, which gives keys the weights of ``tangent``. Its values
      are weighed by ``softmax(scale * (p.k - |k|^2 / 2))``, which no ``p`` turns into those
      weights, so ``p`` and ``b`` stay;
    - ``mean`` and ``eva`` stay: the one has no parameters, the other pools queries itself.

    A few sequences of a few thousand tokens are enough for that. With ``context_length``,
    attentions that select chunks by bounds also learn ``selector_weight``, from documents of at
    least so many tokens alone: perplexity gains by it, single facts far back may be found less
    often (docs/retrieval.md). Nothing changes if an error occurs.

    Args:
        model: A model that went through ``prepare``. It runs uncompiled, in evaluation mode.
        batches: An iterable of token ids ``[B, N]``, or of dicts of the model's inputs; tokens
            that an ``attention_mask`` hides are left out.
        context_length: Learn weights of bounds, for contexts up to so many tokens; None = leave
            them as they are.

    Returns:
        What was set, layer by layer; print it.

    Raises:
        ConfigError: The model is not prepared, or the batches are none, of the wrong type, too
            short, or give queries that are not finite; ``context_length`` is not positive.

    Example:
        >>> fe.prepare(model)
        >>> print(fe.calibrate(model, [tokenizer(text, return_tensors="pt")]))
    """
    evas = some_converted(model)
    context = _context_length(context_length)
    long: list[dict[str, Any]] = []
    with running_eagerly(model), exact_attention(evas), _recording(evas) as seen:
        for inputs in model_inputs(model, batches):
            model(**inputs, use_cache=False)
            long += [inputs] * (0 < context <= inputs["input_ids"].shape[1])
    values = {eva.path: _values(eva, seen[eva.path]) for eva in evas}
    if not any(record.tokens for record in seen.values()):
        raise ConfigError("hold no valid token", subject="batches")
    learned = _learned_selectors(model, evas, values, long, context)
    with torch.no_grad():
        for eva in evas:
            for name, value in values[eva.path].items():
                eva.get_parameter(name).copy_(value)
            if eva.path in learned and learned[eva.path].queries:
                eva.selector_weight = learned[eva.path].weight
    rows = [_row(eva, seen[eva.path], values[eva.path]) for eva in evas]
    return _reported([_with_selector(row, learned.get(row.path), context) for row in rows])


def some_converted(model: Any) -> list[EvaAttention]:  # noqa: ANN401
    """Return the converted attentions of a prepared model; refuse one that has none."""
    evas = converted_attentions(model)
    if not evas:
        message = "all its attentions stay full, which chunk rules have no part in"
        hint = "calibrate_kv learns how a cache is stored in few bits"
        raise ConfigError(message, subject=type(model).__name__, hint=hint)
    return evas


def _reported(rows: Iterable[LayerCalibration]) -> CalibrationReport:
    """Return and log the report."""
    report = CalibrationReport(layers=tuple(rows))
    for row in report.layers:
        log.info("%s: %s", row.path, _what_was_set(row) or row.note)
    if not report.calibrated:
        log.warning("nothing to calibrate: %s", "; ".join(sorted({r.note for r in report.layers})))
    return report


# --- selectors ------------------------------------------------------------------------------------


def _learned_selectors(
    model: Any,  # noqa: ANN401
    evas: Sequence[EvaAttention],
    values: Mapping[str, Mapping[str, Tensor]],
    batches: Sequence[dict[str, Any]],
    context: int,
) -> dict[str, LearnedSelector]:
    """Learn the weights of selectors by bounds, given the rules' parameters as they will be."""
    learning = [eva for eva in evas if learns_selector(eva.config)]
    lessons = {eva.path: lessons_of(eva, values[eva.path]) for eva in learning}
    with running_eagerly(model), listening(learning, lessons, context), exact_attention(evas):
        for inputs in batches if learning else ():
            model(**inputs, use_cache=False)
    return {path: lesson.learned(path) for path, lesson in lessons.items()}


def _context_length(given: int | None) -> int:
    """Return the tokens that a document needs to teach selectors; 0 = none are to learn."""
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
        message = f"must be a positive number of tokens, got {given!r}"
        raise ConfigError(message, subject="context_length")
    return given or 0


def _with_selector(
    row: LayerCalibration, learned: LearnedSelector | None, context: int
) -> LayerCalibration:
    """Add to a row what became of its selector, if it has one that can be learned."""
    if learned is None:
        return row
    if learned.queries:
        return dataclasses.replace(row, selector_queries=learned.queries, calibrated=True)
    why = f"no document of {context} tokens" if context else "no context_length"
    note = "; ".join(filter(None, (row.note, f"selector_weight as it was: {why}")))
    return dataclasses.replace(row, note=note)


# --- running a prepared model as another -------------------------------------------------------


def converted_attentions(model: Any) -> list[EvaAttention]:  # noqa: ANN401
    """Return the FlashEVA attentions of a prepared model in the order in which they run."""
    order = [row.path for row in prepared_of(model).report.layers]
    evas = [module for module in model.modules() if isinstance(module, EvaAttention)]
    return sorted(evas, key=lambda eva: order.index(eva.path))


@contextmanager
def running_eagerly(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode, without gradients, and uncompiled, for a while.

    Compiled code would be compiled anew for every configuration that is tried.
    """
    with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def exact_attention(evas: Sequence[EvaAttention]) -> Iterator[None]:
    """Let attentions see all keys exactly for a while: their windows cover whatever they get."""
    before = [(eva, eva.config) for eva in evas]
    hooks = [eva.register_forward_pre_hook(_cover_all_keys) for eva in evas]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for eva, config in before:
            eva.config = config


def _cover_all_keys(eva: Any, args: tuple[Any, ...]) -> None:  # noqa: ANN401 - an EvaAttention
    eva.config = covering(eva.config, args[1].shape[2])


def model_inputs(
    model: Any,  # noqa: ANN401
    batches: Iterable[Any],
    subject: str = "batches",
) -> Iterator[dict[str, Any]]:
    """Check batches one by one and yield them as keyword arguments, on the model's device.

    Args:
        model: The model.
        batches: Token ids ``[B, N]``, or dicts of the model's inputs.
        subject: What messages call them.

    Raises:
        ConfigError: There are none, or one is of the wrong type or too short.
    """
    if isinstance(batches, torch.Tensor | Mapping | str) or not isinstance(batches, Iterable):
        message = f"must be an iterable of batches, got {type(batches).__name__}"
        raise ConfigError(message, subject=subject, hint="put a single batch into a list")
    device = model.get_input_embeddings().weight.device
    index = -1
    for index, batch in enumerate(batches):
        inputs = _checked(batch, f"{subject}[{index}]")
        yield {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
    if index < 0:
        raise ConfigError("is empty", subject=subject)


def _checked(batch: Any, subject: str) -> dict[str, Any]:  # noqa: ANN401
    """Return a batch as a dict of the model's inputs."""
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        got = "a dict without input_ids" if ids is None else type(ids).__name__
        message = f"must be a tensor of token ids or a dict with input_ids, got {got}"
        raise ConfigError(message, subject=subject)
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        message = f"token ids must be integers [B, N], got {ids.dtype} {tuple(ids.shape)}"
        raise ConfigError(message, subject=subject)
    if ids.shape[0] < 1 or ids.shape[1] < 2:
        message = f"must hold at least 2 tokens a row, got {tuple(ids.shape)}"
        raise ConfigError(message, subject=subject)
    mask = inputs.get("attention_mask")
    if mask is not None and getattr(mask, "shape", None) != ids.shape:
        got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        message = f"attention_mask must be {tuple(ids.shape)} like input_ids, got {got}"
        raise ConfigError(message, subject=subject)
    if inputs.get("past_key_values") is not None:
        raise ConfigError("must be whole sequences, without past_key_values", subject=subject)
    return {name: value for name, value in inputs.items() if name != "use_cache"}


# --- queries --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Queries:
    """The queries that reached one attention: their sum ``[Hq, D]`` in fp64, and how many."""

    total: Tensor | float = 0.0
    tokens: int = 0
    kv_heads: int = 1
    scale: float = 1.0

    def mean(self) -> Any:  # noqa: ANN401 - a tensor, once there are tokens
        """Return the mean of each kv head's group, ``[Hkv, D]``."""
        total: Any = self.total
        return total.unflatten(0, (self.kv_heads, -1)).mean(1) / self.tokens


@contextmanager
def _recording(evas: Sequence[EvaAttention]) -> Iterator[dict[str, _Queries]]:
    """Add up the queries that reach attentions for a while, by their paths."""
    seen = {eva.path: _Queries() for eva in evas}

    def record(eva: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ANN401
        query, key, _, mask = args
        queries = seen[eva.path]
        queries.kv_heads, queries.scale = key.shape[1], kwargs["scale"]
        tokens = query.shape[0] * query.shape[2]
        if (
            mask is not None and mask.dtype == torch.bool
        ):  # integers are ids of documents: no padding
            valid = mask[:, key.shape[2] - query.shape[2] : key.shape[2]]
            query = query.masked_fill(~valid[:, None, :, None], 0)
            # A mask of one row serves them all.
            tokens = int(valid.sum()) * (query.shape[0] // valid.shape[0])
        queries.total = queries.total + query.sum((0, 2), dtype=torch.float64).cpu()
        queries.tokens += tokens

    hooks = [eva.register_forward_pre_hook(record, with_kwargs=True) for eva in evas]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _values(eva: EvaAttention, queries: _Queries) -> dict[str, Tensor]:
    """Return the parameters to set, by name."""
    rule = eva.config.chunk_rule
    if rule not in ("tangent", "evabyte") or not queries.tokens:
        return {}
    mean = queries.mean()
    if not torch.isfinite(mean).all():
        message = "its queries are not finite"
        raise ConfigError(message, subject=eva.path, hint="check the model's weights and dtype")
    return {"phi": mean} if rule == "tangent" else {"a": queries.scale * mean}


def _row(eva: EvaAttention, queries: _Queries, values: dict[str, Tensor]) -> LayerCalibration:
    rule = eva.config.chunk_rule
    note = _NOTHING.get(rule) or ("" if queries.tokens else "as it was: no query reached it")
    if values and rule == "evabyte":
        note = _EVABYTE
    name, value = next(iter(values.items()), ("", None))
    return LayerCalibration(
        path=eva.path,
        rule=rule,
        tokens=queries.tokens,
        calibrated=bool(values),
        parameter=name,
        norm=None if value is None else float(value.norm(dim=-1).mean()),
        note=note,
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Write rows of cells as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
