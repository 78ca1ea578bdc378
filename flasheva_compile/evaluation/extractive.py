"""``extractive``: does a model's continuation of a text and a question contain the answer?"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.adaptation.calibrate import aligned
from flasheva_compile.errors import ConfigError
from flasheva_compile.evaluation.greedy import device_of, expect_known_tokens, greedy, running
from flasheva_compile.evaluation.likelihood import next_token_losses
from flasheva_compile.evaluation.progress import counted
from flasheva_compile.evaluation.prompt_tokens import decode, encode, labelled, leading_tokens
from flasheva_compile.validation import expect_integer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractiveItem:
    """A text to continue, and what the continuation should contain.

    Attributes:
        prompt: The text, question included.
        answer: What to find.
    """

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractiveRow:
    """One continuation.

    Attributes:
        item: Number of the item, from 0.
        tokens: Of the prompt.
        answer: The right one.
        completion: What the model said.
        found: Whether it contains the answer, whatever the case.
        nll: Mean ``-ln p`` of the answer's tokens after the prompt [nats].
        answer_tokens: How many these are.
    """

    item: int
    tokens: int
    answer: str
    completion: str
    found: bool
    nll: float
    answer_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractiveReport:
    """What :func:`extractive` found.

    Attributes:
        rows: One per item.
    """

    rows: tuple[ExtractiveRow, ...]

    @property
    def accuracy(self) -> float:
        """Share of continuations that contain the answer."""
        return sum(row.found for row in self.rows) / len(self.rows)

    @property
    def nll(self) -> float:
        """Mean ``-ln p`` over the tokens of all answers [nats]."""
        total = sum(row.nll * row.answer_tokens for row in self.rows)
        return total / sum(row.answer_tokens for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``json`` accepts."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return {"accuracy": self.accuracy, "nll": self.nll, "rows": rows}

    def __str__(self) -> str:
        lengths = sorted(row.tokens for row in self.rows)
        span = f"{lengths[0]}-{lengths[-1]}"
        rows = [("items", "prompt tokens", "contained", "answer's loss")]
        rows.append((str(len(lengths)), span, f"{self.accuracy:.0%}", f"{self.nll:.4f}"))
        return "\n".join(aligned(rows))


def read_items(path: str | Path) -> list[ExtractiveItem]:
    """Read a file of JSON lines, each with ``context``, ``question`` or ``prompt``, and ``answer``.

    A ``question`` is asked as ``Question: ... Answer:`` after the context; a ``prompt`` follows it
    as it is.

    Raises:
        ConfigError: The file is missing or empty, or a line is something else.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError("no such file", subject=str(path))
    items: list[ExtractiveItem] = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"is not JSON: {error}", subject=f"{path}:{number}") from None
        items.append(_item(fields, f"{path}:{number}"))
    if not items:
        raise ConfigError("holds no item", subject=str(path))
    return items


def _item(fields: Any, subject: str) -> ExtractiveItem:  # noqa: ANN401
    names = [n for n in ("question", "prompt") if isinstance(fields, dict) and n in fields]
    if len(names) != 1 or not {"context", "answer"} <= set(fields):
        message = 'must have "context", "answer", and either "question" or "prompt"'
        raise ConfigError(message, subject=subject)
    text: Mapping[str, Any] = fields
    wrong = [n for n in ("context", "answer", *names) if not isinstance(text[n], str)]
    if wrong or not text["answer"].strip():
        message = f"{(wrong or ['answer'])[0]} must be a text that is not empty"
        raise ConfigError(message, subject=subject)
    asked = text[names[0]]
    end = f"\nQuestion: {asked}\nAnswer:" if names[0] == "question" else f"\n{asked}"
    return ExtractiveItem(prompt=(text["context"] + end).strip(), answer=text["answer"].strip())


def extractive(
    model: Any,  # noqa: ANN401 - a causal language model
    tokenizer: Any,  # noqa: ANN401
    items: Iterable[ExtractiveItem],
    *,
    new_tokens: int = 48,
    progress: bool = False,
) -> ExtractiveReport:
    """Continue texts and look for answers in the continuations, one text at a time.

    Args:
        model: A causal language model, prepared or not.
        tokenizer: Its tokenizer.
        items: Texts and answers; :func:`read_items` reads a file of them.
        new_tokens: Greedy tokens in which the answer has to come.
        progress: Show a bar.

    Raises:
        ConfigError: There is no item, or a token id is beyond the model's vocabulary.

    Source:
        FDA and SWDE as in Arora et al., "Simple linear attention language models balance the
        recall-throughput tradeoff" (arXiv:2402.18668): contained in the continuation.
    """
    expect_integer("new_tokens", new_tokens, 1)
    asked, rows = list(items), []
    if not asked:
        raise ConfigError("is empty", subject="items")
    start = leading_tokens(tokenizer)
    for index, item in enumerate(counted(asked, "extractive", total=len(asked), shown=progress)):
        prompt = start + encode(tokenizer, item.prompt)
        tokens = greedy(model, torch.tensor([prompt]), new_tokens)[0].tolist()
        completion = decode(tokenizer, tokens)
        answer = encode(tokenizer, f" {item.answer}")
        row = ExtractiveRow(
            item=index,
            tokens=len(prompt),
            answer=item.answer,
            completion=completion,
            found=item.answer.lower() in completion.lower(),
            nll=_loss_after(model, prompt, answer),
            answer_tokens=len(answer),
        )
        rows.append(row)
    return ExtractiveReport(rows=tuple(rows))


def extractive_batches(
    tokenizer: Any,  # noqa: ANN401
    items: Iterable[ExtractiveItem],
) -> list[dict[str, Tensor]]:
    """Return texts with their answers, ``labels`` on the answers' tokens alone.

    As a ``probe`` of ``select_full_layers``: layers are chosen by the likelihood of the answers.
    Take other items than for :func:`extractive`.

    Args:
        tokenizer: The model's tokenizer.
        items: Texts and answers; each is a batch of its own.

    Raises:
        ConfigError: There is no item.
    """
    start, batches = leading_tokens(tokenizer), []
    for item in items:
        prompt = start + encode(tokenizer, item.prompt)
        batches.append(labelled(prompt, encode(tokenizer, f" {item.answer}")))
    if not batches:
        raise ConfigError("is empty", subject="items")
    return batches


def _loss_after(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:  # noqa: ANN401
    """Return the mean loss of an answer's tokens after a prompt."""
    ids = torch.tensor([[*prompt, *answer]])
    expect_known_tokens(model, ids)
    ids = ids.to(device_of(model))
    with running(model):
        losses = next_token_losses(model, {"input_ids": ids}, ids[:, 1:])
    return float(losses[0, -len(answer) :].double().mean())
