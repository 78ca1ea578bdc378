"""``associative_recall``: does a model remember which of many names had which number?"""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.adaptation.calibrate import aligned
from flasheva_compile.errors import ConfigError
from flasheva_compile.evaluation.greedy import device_of, expect_known_tokens, greedy, running
from flasheva_compile.evaluation.likelihood import candidate_losses
from flasheva_compile.evaluation.progress import counted
from flasheva_compile.evaluation.prompt_tokens import (
    decode,
    encode,
    expect_room,
    filler,
    leading_tokens,
)
from flasheva_compile.validation import expect_integer

if TYPE_CHECKING:
    from collections.abc import Sequence

_TITLE = "Names and their numbers:"
_GAP = "\n\n"  # between the list and filler, of which the first sentence may be cut
_QUESTION = "\n\nThe names and their numbers again:"
_MORE_THAN_NUMBER = 3  # tokens for what a model may put before the number
_MARK = -1  # no token: where the question goes
_DRAWN = 4096  # names and numbers to choose those of one number of tokens from


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallRow:
    """One prompt and its answer.

    Attributes:
        pairs: Names with numbers in the prompt.
        length: Tokens of the prompt.
        sample: Number of the prompt among those with as many pairs.
        place: Which pair was asked for, from 0.
        value: Its number.
        answer: What the model said.
        found: Whether the answer contains the number.
        ranked: Whether it has the largest likelihood of all numbers in the prompt.
    """

    pairs: int
    length: int
    sample: int
    place: int
    value: str
    answer: str
    found: bool
    ranked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallReport:
    """What :func:`associative_recall` found.

    Attributes:
        rows: One per prompt.
    """

    rows: tuple[RecallRow, ...]

    @property
    def found(self) -> dict[tuple[int, int], float]:
        """Share of numbers that were said, by pairs and length of the prompt [tokens]."""
        return self._shares("found")

    @property
    def ranked(self) -> dict[tuple[int, int], float]:
        """Share of numbers that were the likeliest of those listed; by chance, 1 / pairs."""
        return self._shares("ranked")

    def _shares(self, name: str) -> dict[tuple[int, int], float]:
        values: dict[tuple[int, int], list[bool]] = defaultdict(list)
        for row in self.rows:
            values[row.pairs, row.length].append(getattr(row, name))
        return {key: sum(some) / len(some) for key, some in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``json`` accepts."""
        ranked = self.ranked
        table = [
            {
                "pairs": key[0],
                "length": key[1],
                "found": share,
                "ranked": ranked[key],
                "chance": 1 / key[0],
            }
            for key, share in self.found.items()
        ]
        return {"table": table, "rows": [dataclasses.asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("pairs", "length", "prompts", "said", "likeliest", "chance")
        ]
        for (pairs, length), share in self.found.items():
            count = sum((row.pairs, row.length) == (pairs, length) for row in self.rows)
            shares = [f"{x:.0%}" for x in (share, self.ranked[pairs, length], 1 / pairs)]
            rows.append((str(pairs), str(length), str(count), *shares))
        return "\n".join(aligned(rows))


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt and the numbers in it; all prompts with as many pairs have equal lengths."""

    pairs: int
    sample: int
    ids: list[int]
    numbers: list[tuple[str, list[int]]]
    place: int


def associative_recall(  # noqa: PLR0913 - what a user may want to say
    model: Any,  # noqa: ANN401 - a causal language model
    tokenizer: Any,  # noqa: ANN401
    *,
    pairs: Sequence[int] = (4, 16, 64),
    length: int | None = None,
    samples: int = 50,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
) -> RecallReport:
    """List made-up names with numbers and ask for one of them.

    All names, and all numbers, have equally many tokens, so that batches need no padding and
    likelihoods of numbers compare.

    Args:
        model: A causal language model, prepared or not.
        tokenizer: Its tokenizer.
        pairs: How many names a list has.
        length: Tokens of a prompt, filled up by sentences between the list and the question; None =
            nothing between.
        samples: Prompts of each number of pairs.
        seed: Of names, numbers and questions.
        batch_size: Prompts at a time.
        progress: Show a bar.

    Raises:
        ConfigError: ``length`` is too short for the list, ``pairs`` is out of range, or a token id
            is beyond the model's vocabulary.

    Source:
        Multi-query associative recall: Arora et al., "Zoology" (arXiv:2312.04927).
    """
    for name, value in (("samples", samples), ("batch_size", batch_size), *_named(pairs)):
        expect_integer(name, value, 1)
    names, numbers = _vocabulary(tokenizer, max(pairs))
    rows: list[RecallRow] = []
    batches: list[list[_Prompt]] = []
    for count in pairs:
        prompts = [
            _prompt(tokenizer, random.Random(f"{seed}/{count}/{i}"), (names, numbers), count, i)
            for i in range(samples)
        ]
        prompts = [_filled(tokenizer, prompt, length) for prompt in prompts]
        batches += [prompts[start : start + batch_size] for start in range(0, samples, batch_size)]
    for batch in counted(batches, "recall", total=len(batches), shown=progress):
        rows += _answered(model, tokenizer, batch)
    return RecallReport(rows=tuple(rows))


def _answered(model: Any, tokenizer: Any, batch: Sequence[_Prompt]) -> list[RecallRow]:  # noqa: ANN401
    ids = torch.tensor([prompt.ids for prompt in batch])
    candidates = torch.tensor([[number for _, number in prompt.numbers] for prompt in batch])
    expect_known_tokens(model, candidates)
    answers = greedy(model, ids, candidates.shape[2] + _MORE_THAN_NUMBER).tolist()
    with running(model):
        losses = candidate_losses(model, ids.to(device_of(model)), candidates)
    rows: list[RecallRow] = []
    for prompt, tokens, best in zip(batch, answers, losses.argmin(1).tolist(), strict=True):
        answer, value = decode(tokenizer, tokens), prompt.numbers[prompt.place][0]
        row = RecallRow(
            pairs=prompt.pairs,
            length=len(prompt.ids),
            sample=prompt.sample,
            place=prompt.place,
            value=value,
            answer=answer,
            found=value in answer,
            ranked=best == prompt.place,
        )
        rows.append(row)
    return rows


# --- prompts --------------------------------------------------------------------------------------

_Words = list[tuple[str, list[int]]]


def _named(pairs: Sequence[int]) -> list[tuple[str, int]]:
    if not pairs:
        raise ConfigError("must name at least one number of pairs", subject="pairs")
    return [("pairs", count) for count in pairs]


def _vocabulary(tokenizer: Any, needed: int) -> tuple[_Words, _Words]:  # noqa: ANN401
    """Return names and numbers with their tokens; each of the two has one number of tokens."""
    chance = random.Random(0)
    names = {
        "".join(chance.choice("bdfgklmnprstvz") + chance.choice("aeiou") for _ in range(3))
        for _ in range(_DRAWN)
    }
    numbers = {str(chance.randint(1000, 9999)) for _ in range(_DRAWN)}
    return (
        _most_alike(tokenizer, sorted(names), "\n{}:", needed),
        _most_alike(tokenizer, sorted(numbers), " {}", needed),
    )


def _most_alike(tokenizer: Any, words: Sequence[str], form: str, needed: int) -> _Words:  # noqa: ANN401
    """Return the words of the number of tokens that most of them have."""
    by_size: dict[int, _Words] = defaultdict(list)
    for word in words:
        tokens = encode(tokenizer, form.format(word))
        by_size[len(tokens)].append((word, tokens))
    largest = max(by_size.values(), key=len)
    if len(largest) < needed:
        raise ConfigError(f"must be at most {len(largest)}, got {needed}", subject="pairs")
    return largest


def _prompt(
    tokenizer: Any,  # noqa: ANN401
    chance: random.Random,
    words: tuple[_Words, _Words],
    pairs: int,
    sample: int,
) -> _Prompt:
    """Return a prompt without filler."""
    names, numbers = (chance.sample(some, pairs) for some in words)
    place = chance.randrange(pairs)
    lines = [n + v for (_, n), (_, v) in zip(names, numbers, strict=True)]
    ids = leading_tokens(tokenizer) + encode(tokenizer, _TITLE)
    for line in lines:
        ids += line
    return _Prompt(pairs, sample, [*ids, _MARK, *names[place][1]], numbers, place)


def _filled(tokenizer: Any, prompt: _Prompt, length: int | None) -> _Prompt:  # noqa: ANN401
    """Put the question, and filler before it, in place of the mark."""
    mark = prompt.ids.index(_MARK)
    question = encode(tokenizer, _QUESTION)
    between: list[int] = []
    if length is not None:
        gap = encode(tokenizer, _GAP)
        needed = len(prompt.ids) - 1 + len(gap) + len(question)
        room = expect_room(length, needed, f"a list of {prompt.pairs} pairs")
        between = gap + filler(tokenizer, room)[0]
    ids = [*prompt.ids[:mark], *between, *question, *prompt.ids[mark + 1 :]]
    return dataclasses.replace(prompt, ids=ids)
