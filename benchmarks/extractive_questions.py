"""Questions on long documents with answers that stand in them word for word, made from any text.

A document is a stretch of real text with eight short records at even distances; a question asks for
one of them. The same seed gives the same documents to every model with the same tokenizer.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from flasheva_compile.evaluation.extractive import ExtractiveItem
from flasheva_compile.evaluation.prompt_tokens import decode, encode

if TYPE_CHECKING:
    from collections.abc import Sequence

PLACES = (
    "Aldmoor",
    "Brenfield",
    "Carrow",
    "Dunleigh",
    "Estwick",
    "Farnholt",
    "Greystead",
    "Hollin",
)
FIRST = ("Agnes", "Bertram", "Clara", "Duncan", "Edith", "Fergus", "Greta", "Hugo", "Ines", "Jonas")
LAST = ("Albright", "Beckett", "Corbin", "Dalton", "Ewart", "Finch", "Garrick", "Hale", "Ivory")
OFFICES = ("warden", "miller", "surveyor", "schoolmaster")


def questions(
    tokenizer: Any,  # noqa: ANN401
    stream: Sequence[int],
    count: int,
    length: int,
    seed: int = 0,
) -> list[ExtractiveItem]:
    """Return questions and answers.

    Args:
        tokenizer: The model's.
        stream: Token ids of running text, read from its beginning again where it ends.
        count: How many questions.
        length: Of a document [tokens], about.
        seed: Of names and of which record is asked for.

    Raises:
        ValueError: The text is shorter than a document.
    """
    if len(stream) < length:
        message = f"the text has {len(stream)} tokens, a document needs {length}"
        raise ValueError(message)
    return [_question(tokenizer, stream, length, f"{seed}/{n}", n) for n in range(count)]


def _question(
    tokenizer: Any,  # noqa: ANN401
    stream: Sequence[int],
    length: int,
    seed: str,
    index: int,
) -> ExtractiveItem:
    chance = random.Random(seed)
    office = chance.choice(OFFICES)
    names = [f"{chance.choice(FIRST)} {chance.choice(LAST)}" for _ in PLACES]
    records = [
        f"\n\nThe {office} of {place} is {name}.\n\n"
        for place, name in zip(PLACES, names, strict=True)
    ]
    room = length - sum(len(encode(tokenizer, record)) for record in records)
    start = index * length % (len(stream) - length + 1)
    part = -(-max(room, len(records)) // (len(records) + 1))
    text = ""
    order = chance.sample(range(len(records)), len(records))
    for place, record in enumerate(order):
        lo = start + place * part
        text += (
            decode(tokenizer, [int(token) for token in stream[lo : lo + part]]) + records[record]
        )
    last = start + len(order) * part
    text += decode(tokenizer, [int(token) for token in stream[last : last + part]])
    asked = chance.randrange(len(records))
    question = f"\n\nQuestion: Who is the {office} of {PLACES[asked]}?\nAnswer: The {office} of "
    return ExtractiveItem(prompt=f"{text}{question}{PLACES[asked]} is", answer=names[asked])
