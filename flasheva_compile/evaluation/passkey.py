"""``passkey``: does a model find a number in a long text, by the text's length and its depth?"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.adaptation.calibrate import aligned
from flasheva_compile.evaluation.greedy import greedy
from flasheva_compile.evaluation.progress import counted
from flasheva_compile.evaluation.prompt_tokens import (
    decode,
    encode,
    expect_room,
    filler,
    labelled,
    leading_tokens,
)
from flasheva_compile.validation import expect_integer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_NEW_TOKENS = 8
_DEPTHS = 5  # bins of depth in tables
_TASK = (
    "There is important information hidden inside a lot of irrelevant text."
    " Find it and memorize it."
)
_NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
_QUESTION = " What is the pass key? The pass key is"


@dataclass(frozen=True, slots=True, kw_only=True)
class PasskeyRow:
    """One prompt and its answer.

    Attributes:
        length: Tokens of the prompt.
        depth: Where the sentence with the key stands: 0 = first, 1 = last.
        sample: Number of the prompt among those of its length.
        key: Five digits.
        answer: What the model said.
        found: Whether the answer contains the key.
    """

    length: int
    depth: float
    sample: int
    key: str
    answer: str
    found: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PasskeyReport:
    """What :func:`passkey` found.

    Attributes:
        rows: One per prompt, by length and sample.
    """

    rows: tuple[PasskeyRow, ...]

    @property
    def accuracy(self) -> float:
        """Share of all keys that were found."""
        return _share(self.rows)

    @property
    def by_length(self) -> dict[int, float]:
        """Share found, by length of the prompt [tokens]."""
        lengths = dict.fromkeys(row.length for row in self.rows)
        return {n: _share([row for row in self.rows if row.length == n]) for n in lengths}

    def by_depth(self, length: int | None = None, bins: int = _DEPTHS) -> list[float | None]:
        """Return the share found in equal bins of depth; None where there is no prompt.

        Args:
            length: Only prompts of this length; None = all.
            bins: How many.
        """
        found: list[list[PasskeyRow]] = [[] for _ in range(bins)]
        for row in self.rows:
            if length in (None, row.length):
                found[min(int(row.depth * bins), bins - 1)].append(row)
        return [_share(rows) if rows else None for rows in found]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that ``json`` accepts."""
        by_length = {
            str(n): {"accuracy": share, "by_depth": self.by_depth(n)}
            for n, share in self.by_length.items()
        }
        rows = [dataclasses.asdict(row) for row in self.rows]
        return {"accuracy": self.accuracy, "by_length": by_length, "rows": rows}

    def __str__(self) -> str:
        spans = [f"depth {i / _DEPTHS:.1f}-{(i + 1) / _DEPTHS:.1f}" for i in range(_DEPTHS)]
        rows = [("length", "prompts", "found", *spans)]
        for length, share in self.by_length.items():
            count = sum(row.length == length for row in self.rows)
            depths = ["-" if x is None else f"{x:.0%}" for x in self.by_depth(length)]
            rows.append((str(length), str(count), f"{share:.0%}", *depths))
        return "\n".join(aligned(rows))


def passkey(
    model: Any,  # noqa: ANN401 - a causal language model
    tokenizer: Any,  # noqa: ANN401
    lengths: Sequence[int],
    *,
    samples: int = 50,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
) -> PasskeyReport:
    """Hide a five-digit key in repeated sentences and ask for it.

    A prompt of a length has exactly that many tokens, so batches need no padding. The same seed
    gives the same prompts to every model with the same tokenizer, in batches of any size.

    Args:
        model: A causal language model, prepared or not.
        tokenizer: Its tokenizer.
        lengths: Tokens of the prompts.
        samples: Prompts of each length, with depths drawn uniformly.
        seed: Of keys and depths.
        batch_size: Prompts at a time.
        progress: Show a bar.

    Raises:
        ConfigError: A length is too short for key and question, or a token id is beyond the model's
            vocabulary.

    Source:
        Mohtashami and Jaggi, "Landmark Attention" (arXiv:2305.16300), passkey retrieval.
    """
    expect_integer("samples", samples, 1)
    expect_integer("batch_size", batch_size, 1)
    prompts = [
        (length, index, *make_prompt(tokenizer, length, f"{seed}/{length}/{index}"))
        for length in lengths
        for index in range(samples)
    ]
    batches = [
        [prompt for prompt in prompts if prompt[0] == length][start : start + batch_size]
        for length in dict.fromkeys(lengths)
        for start in range(0, samples, batch_size)
    ]
    rows: list[PasskeyRow] = []
    for batch in counted(batches, "passkey", total=len(batches), shown=progress):
        ids = torch.tensor([prompt[2] for prompt in batch])
        answers = greedy(model, ids, _NEW_TOKENS).tolist()
        for (length, index, _, key, depth), tokens in zip(batch, answers, strict=True):
            answer = decode(tokenizer, tokens)
            row = {"length": length, "sample": index, "key": key, "depth": depth}
            rows.append(PasskeyRow(**row, answer=answer, found=key in answer))
    return PasskeyReport(rows=tuple(rows))


def passkey_batches(
    tokenizer: Any,  # noqa: ANN401
    lengths: Sequence[int],
    *,
    samples: int = 8,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Return prompts with their answers, ``labels`` on the keys' tokens alone.

    The likelihood of the keys says more than whether they were found: it differs between models
    that find none. As a ``probe`` of ``select_full_layers``; take another seed than for
    :func:`passkey`.

    Args:
        tokenizer: The model's tokenizer.
        lengths: Tokens of the prompts, without the answers.
        samples: Prompts of each length; each is a batch of its own.
        seed: Of keys and depths.

    Raises:
        ConfigError: A length is too short for key and question.
    """
    batches = []
    for length in lengths:
        for index in range(samples):
            prompt, key, _ = make_prompt(tokenizer, length, f"{seed}/{length}/{index}")
            batches.append(labelled(prompt, encode(tokenizer, f" {key}")))
    return batches


def make_prompt(tokenizer: Any, length: int, seed: str) -> tuple[list[int], str, float]:  # noqa: ANN401
    """Return a prompt of exactly ``length`` tokens, its key, and the depth where the key stands.

    Raises:
        ConfigError: The length is too short for key and question.
    """
    chance = random.Random(seed)
    key, depth = str(chance.randint(10_000, 99_999)), chance.random()
    task = leading_tokens(tokenizer) + encode(tokenizer, _TASK)
    needle, question = encode(tokenizer, _NEEDLE.format(key=key)), encode(tokenizer, _QUESTION)
    room = expect_room(length, len(task) + len(needle) + len(question), "a pass key's prompt")
    around, starts = filler(tokenizer, room)
    # Never in the middle of a sentence; the first one may have been cut, and stays in front.
    place = min(starts[1:] or starts, key=lambda start: abs(start - depth * room))
    tokens = task + around[:place] + needle + around[place:] + question
    return tokens, key, place / max(1, room)


def _share(rows: Sequence[PasskeyRow]) -> float:
    return sum(row.found for row in rows) / len(rows)
