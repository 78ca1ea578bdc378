"""``evaluate``: the chosen tasks on one model, as one report."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch

from flasheva_compile.errors import ConfigError
from flasheva_compile.evaluation.agreement import AgreementReport, greedy_agreement
from flasheva_compile.evaluation.extractive import ExtractiveReport, extractive
from flasheva_compile.evaluation.greedy import expect_known_tokens
from flasheva_compile.evaluation.passkey import PasskeyReport, passkey
from flasheva_compile.evaluation.perplexity import PositionPerplexity, perplexity_by_position
from flasheva_compile.evaluation.progress import counted
from flasheva_compile.evaluation.prompt_tokens import encode, expect_room, leading_tokens
from flasheva_compile.evaluation.recall import RecallReport, associative_recall
from flasheva_compile.generation.prepared import ATTRIBUTE
from flasheva_compile.quantization.formats import EXACT
from flasheva_compile.validation import expect_integer, unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from flasheva_compile.evaluation.extractive import ExtractiveItem

log = logging.getLogger(__name__)

Task: TypeAlias = Literal["perplexity", "passkey", "recall", "extractive", "agreement"]
TASKS: tuple[str, ...] = get_args(Task)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """How much each task does.

    Attributes:
        samples: Prompts of each length (``passkey``) or number of pairs (``recall``).
        seed: Of these prompts.
        batch_size: Rows at a time.
        windows: At most as many windows of text of each length (``perplexity``, ``agreement``).
        pairs: Sizes of the lists of ``recall``.
        new_tokens: Tokens to compare (``agreement``).
        progress: Show bars.

    Raises:
        ConfigError: A number is below 1.
    """

    samples: int = 50
    seed: int = 0
    batch_size: int = 8
    windows: int = 32
    pairs: tuple[int, ...] = (4, 16, 64)
    new_tokens: int = 64
    progress: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size", "windows", "new_tokens"):
            expect_integer(name, getattr(self, name), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """What :func:`evaluate` found; a task that did not run has None, and ``skipped`` says why.

    Attributes:
        perplexity: By length of the windows of text.
        passkey: By length and depth.
        recall: By pairs and length.
        extractive: Over all items.
        agreement: With full attention, by length of the prompt.
        skipped: Task -> reason.
        seconds: Task -> wall-clock time.
    """

    perplexity: dict[int, PositionPerplexity] | None = None
    passkey: PasskeyReport | None = None
    recall: RecallReport | None = None
    extractive: ExtractiveReport | None = None
    agreement: AgreementReport | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``json`` accepts."""
        data: dict[str, Any] = {"skipped": self.skipped, "seconds": self.seconds}
        for task in TASKS:
            result = getattr(self, task)
            if isinstance(result, dict):
                data[task] = {str(length): found.to_dict() for length, found in result.items()}
            elif result is not None:
                data[task] = result.to_dict()
        return data

    def to_json(self) -> str:
        """Return ``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        parts: list[str] = []
        for task in TASKS:
            result = getattr(self, task)
            if isinstance(result, dict):
                parts += [f"{task}, windows of {n} tokens\n{found}" for n, found in result.items()]
            elif result is not None:
                parts.append(f"{task}\n{result}")
        parts += [f"{task}: skipped, {reason}" for task, reason in self.skipped.items()]
        return "\n\n".join(parts)


def evaluate(
    model: Any,  # noqa: ANN401 - a causal language model
    tokenizer: Any,  # noqa: ANN401
    *,
    texts: Sequence[str] = (),
    lengths: Sequence[int] = (1024,),
    tasks: Sequence[str] = ("perplexity", "passkey", "recall"),
    items: Sequence[ExtractiveItem] = (),
    options: EvaluationOptions | None = None,
) -> EvaluationReport:
    """Run tasks on a model.

    Args:
        model: A causal language model of transformers, prepared or not, on any device, in any
            dtype. One that stores layers in few bits reads text for ``perplexity`` through its
            cache.
        tokenizer: Its tokenizer.
        texts: Text that the model has not been trained on, for ``perplexity`` and ``agreement``.
        lengths: Tokens of the windows and prompts.
        tasks: Of ``"perplexity"``, ``"passkey"``, ``"recall"``, ``"extractive"``,
            ``"agreement"``.
        items: For ``extractive``: :func:`~flasheva_compile.evaluation.extractive.read_items`.
        options: Samples, batch size, seed.

    Returns:
        The figures; print it or call ``to_json``. ``agreement`` of a model that is not prepared is
        skipped, with that reason.

    Raises:
        ConfigError: A task is unknown or lacks its data, a text is too short for a length, or a
            token id is beyond the model's vocabulary. All of that is checked first.
    """
    settings = options or EvaluationOptions()
    expect_tasks(tasks)
    _expect_lengths(model, lengths)
    windows: dict[int, Tensor] = {}
    if {"perplexity", "agreement"} & set(tasks):
        windows = text_windows(model, tokenizer, texts, lengths, settings.windows)
    if "extractive" in tasks and not items:
        raise ConfigError("are needed for extractive", subject="items", hint="read_items(path)")
    run = _Evaluation(model, tokenizer, settings, windows, tuple(items))
    found: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for task in dict.fromkeys(tasks):
        if task == "agreement" and getattr(model, ATTRIBUTE, None) is None:
            skipped[task] = "the model is not prepared"
            continue
        start = time.perf_counter()
        found[task] = run.tasks[task](lengths)
        seconds[task] = time.perf_counter() - start
        log.info("%s: %.1f s\n%s", task, seconds[task], found[task])
    return EvaluationReport(**found, skipped=skipped, seconds=seconds)


def text_windows(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    texts: Sequence[str],
    lengths: Sequence[int],
    most: int | None = None,
) -> dict[int, Tensor]:
    """Cut texts into windows of tokens without overlap, each with the leading special tokens.

    Returns:
        Length -> ids ``[rows, length]``: all windows, or ``most`` of them, spread evenly.

    Raises:
        ConfigError: There is no text, none is long enough, or a token id is beyond the model's
            vocabulary.
    """
    if not texts:
        raise ConfigError("is empty", subject="texts", hint="give text to predict")
    start = torch.tensor(leading_tokens(tokenizer), dtype=torch.long)
    tokens = [torch.tensor(encode(tokenizer, text), dtype=torch.long) for text in texts]
    for ids in (*tokens, start):
        expect_known_tokens(model, ids)
    windows: dict[int, Tensor] = {}
    for length in lengths:
        step = expect_room(length, len(start) + 1, "a window") + 1
        rows = torch.cat([ids[: len(ids) // step * step].view(-1, step) for ids in tokens])
        if not len(rows):
            longest = max(map(len, tokens)) + len(start)
            message = f"the longest has {longest} tokens, {length} are needed"
            raise ConfigError(message, subject="texts", hint="give more text, or shorter lengths")
        kept = min(most or len(rows), len(rows))
        rows = rows[torch.arange(kept) * len(rows) // kept]
        windows[length] = torch.cat([start.expand(kept, -1), rows], 1)
    return windows


class _Evaluation:
    """What the tasks have in common.

    Attributes:
        tasks: Name -> what runs it for some lengths.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        tokenizer: Any,  # noqa: ANN401
        options: EvaluationOptions,
        windows: dict[int, Tensor],
        items: tuple[ExtractiveItem, ...],
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.windows, self.items = windows, items
        self.sampling: dict[str, Any] = {
            name: getattr(options, name) for name in ("samples", "seed", "batch_size", "progress")
        }
        self.tasks: dict[str, Callable[[Sequence[int]], Any]] = {
            "perplexity": self.perplexity,
            "passkey": self.passkey,
            "recall": self.recall,
            "extractive": self.extractive,
            "agreement": self.agreement,
        }

    def perplexity(self, lengths: Sequence[int]) -> dict[int, PositionPerplexity]:
        stored = _is_stored(self.model)
        return {
            n: perplexity_by_position(self.model, self._batches(n), through_cache=stored)
            for n in lengths
        }

    def passkey(self, lengths: Sequence[int]) -> PasskeyReport:
        return passkey(self.model, self.tokenizer, lengths, **self.sampling)

    def recall(self, lengths: Sequence[int]) -> RecallReport:
        options = {**self.sampling, "pairs": self.options.pairs}
        reports = [
            associative_recall(self.model, self.tokenizer, length=n, **options) for n in lengths
        ]
        return RecallReport(rows=tuple(row for report in reports for row in report.rows))

    def extractive(self, lengths: Sequence[int]) -> ExtractiveReport:
        del lengths
        return extractive(self.model, self.tokenizer, self.items, progress=self.options.progress)

    def agreement(self, lengths: Sequence[int]) -> AgreementReport:
        reports = [
            greedy_agreement(self.model, self._batches(n), new_tokens=self.options.new_tokens)
            for n in lengths
        ]
        return AgreementReport(rows=tuple(row for report in reports for row in report.rows))

    def _batches(self, length: int) -> Any:  # noqa: ANN401 - an iterable of token ids
        batches = self.windows[length].split(self.options.batch_size)
        what = f"text, {length} tokens"
        return counted(batches, what, total=len(batches), shown=self.options.progress)


def _is_stored(model: Any) -> bool:  # noqa: ANN401
    """Whether a prepared model stores layers otherwise than it computes them without a cache."""
    prepared = getattr(model, ATTRIBUTE, None)
    return prepared is not None and any(x.kv != EXACT for x in prepared.full.values())


def expect_tasks(tasks: Sequence[str]) -> None:
    """Refuse no tasks, and unknown ones.

    Raises:
        ConfigError: There are such.
    """
    if not tasks:
        raise ConfigError("must name at least one", subject="tasks")
    for task in tasks:
        if task not in TASKS:
            raise unknown(task, TASKS, what="task")


def _expect_lengths(model: Any, lengths: Sequence[int]) -> None:  # noqa: ANN401
    if not lengths:
        raise ConfigError("must name at least one", subject="lengths")
    for length in lengths:
        expect_integer("lengths", length, 2)
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and max(lengths) > most:
        log.warning("the model was made for %d tokens; %d are asked for", most, max(lengths))
