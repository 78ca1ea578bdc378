"""Survey ``generate`` of prepared models in every causal architecture of transformers.

``python -m tests.models.generation_survey`` writes ``docs/generation_survey.md``; names as
arguments survey only those and print them. Models are tiny, with random weights. Of each, the
logits of every decoding step with the compressed cache are compared with those of the same prepared
model without any cache; with windows over everything, with those of the model as it was.
"""

from __future__ import annotations

import collections
import json
import logging
import multiprocessing
import re
import sys
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.eva_attention import EvaAttention
from flasheva_compile.generation.prepare import prepare, report_of, revert
from tests.models.gallery import limited
from tests.models.generation_models import build_language_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

EVA = {"window_size": 8, "chunk_size": 4, "sink_tokens": 1}
WHOLE = {"window_size": 64, "chunk_size": 4, "sink_tokens": 1}
SECONDS = 60
ROWS, PROMPT, NEW, PADDING = 2, 19, 12, 5  # the first row of a padded prompt has padding
ROUNDING = 64 * torch.finfo(torch.float32).eps  # of the largest logit
MEANINGFUL = 1e-3  # a model whose own results differ by more has nothing to compare with

EQUAL, REFUSED, WRONG, ERROR = "equal", "refused", "wrong", "error"
NOT_COMPARABLE, NOT_BUILT, NOT_RUN = "not comparable", "does not build", "does not run as it is"
OUTCOMES = (EQUAL, REFUSED, WRONG, ERROR, NOT_COMPARABLE, NOT_BUILT, NOT_RUN)

DOCUMENT = Path(__file__).parents[2] / "docs" / "generation_survey.md"
COUNTS = DOCUMENT.with_suffix(".json")  # of every version that was surveyed


@dataclass
class Entry:
    """What the survey of one architecture found.

    Attributes:
        name: Its ``model_type``.
        outcome: One of the words above.
        converted: Paths of the attentions that compute FlashEVA.
        kept: Path -> why an attention stays full.
        reason: Why it is not equal.
        windows_off: Whether the sliding windows of its configuration were turned off.
        errors: What was compared -> the error, and what is allowed, relative to the largest logit.
        notes: What is peculiar about the model itself.
    """

    name: str
    outcome: str = ""
    converted: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    windows_off: bool = False
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def names() -> list[str]:
    """Return every architecture with a causal language model."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING))


def survey(name: str) -> Entry:
    """Survey one architecture; without sliding windows if those are all there is to it."""
    entry = _surveyed(Entry(name))
    if entry.outcome == REFUSED and "window" in entry.reason:
        without = _surveyed(Entry(name, windows_off=True))
        return without if without.outcome in (EQUAL, WRONG) else entry
    return entry


def _surveyed(entry: Entry) -> Entry:
    try:
        with limited(SECONDS), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _survey(entry)
    except Exception as error:
        if entry.outcome == REFUSED and not isinstance(error, ConfigError):
            entry.outcome = ERROR  # a refusal states its reason
        entry.reason = _first_line(error)
    return entry


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0].split(" Hint: ")[0]
    return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text[:120]}"


def _survey(entry: Entry) -> None:
    entry.outcome = NOT_BUILT
    model = build_language_model(entry.name, windows_off=entry.windows_off)
    entry.outcome = NOT_RUN
    cases = [Case("unpadded"), Case("padded", PADDING)]
    for case in cases:
        case.run_as_it_is(model)
    entry.outcome = REFUSED
    prepare(model, WHOLE)
    entry.outcome = ERROR
    for case in cases:
        case.whole = case.logits(model, use_cache=True)
    prepare(model, EVA)
    for row in report_of(model).layers:
        if row.decision == "eva":
            entry.converted.append(row.path)
        else:
            entry.kept[row.path] = row.reason
    _randomise(model)
    for case in cases:
        case.run_prepared(model)
    revert(model)
    for case in cases:
        case.reverted = case.logits(model, use_cache=True)
    for case in cases:
        _judge(entry, case)
    if entry.outcome == ERROR:
        entry.outcome = EQUAL


def _randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in _rule_parameters(model):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)


def _rule_parameters(model: torch.nn.Module) -> Iterable[Tensor]:
    for module in model.modules():
        if isinstance(module, EvaAttention):
            yield from module.rule_parameters()


class Case:
    """Logits of one prompt's continuation, in several ways; its tokens are always the same.

    Args:
        label: For the report.
        padding: How much of the first row is padding.
    """

    def __init__(self, label: str, padding: int = 0) -> None:
        generator = torch.Generator().manual_seed(1)
        self.label, self.padding = label, padding
        self.ids = torch.randint(3, 99, (ROWS, PROMPT), generator=generator)
        self.mask = torch.ones_like(self.ids)
        self.ids[0, :padding] = self.mask[0, :padding] = 0
        self.tokens: Tensor | None = None
        self.whole = self.reverted = self.full_alone = self.ours_alone = self.ours_even = None

    def run_as_it_is(self, model: Any) -> None:
        self.full = self.logits(model, use_cache=False)
        self.full_cached = self.logits(model, use_cache=True)
        if self.padding:
            self.full_alone = self.logits(model, use_cache=True, alone=True)

    def run_prepared(self, model: Any) -> None:
        self.ours = self.logits(model, use_cache=False)
        self.ours_cached = self.logits(model, use_cache=True)
        if self.padding:
            self.ours_alone = self.logits(model, use_cache=True, alone=True)
            for parameter in _rule_parameters(model):
                parameter.zero_()
            even = [self.logits(model, use_cache=True, alone=alone) for alone in (False, True)]
            self.ours_even = even[0][:1], even[1]
            _randomise(model)

    def logits(self, model: Any, *, use_cache: bool, alone: bool = False) -> Tensor:
        """Generate; ``alone`` = the padded row by itself, without its padding."""
        ids, mask = self.ids, self.mask
        if alone:
            ids, mask = (x[:1, self.padding :] for x in (ids, mask))
        result = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=False,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_logits=True,
            **self._forced(ids.shape[1]),
        )
        if self.tokens is None:
            self.tokens = result.sequences[:, ids.shape[1] :]
        return torch.stack(result.logits, 1)

    def _forced(self, width: int) -> dict[str, Callable[[int, Tensor], list[int]]]:
        """Force the tokens of the first run: a tie could part the texts."""
        tokens = self.tokens
        if tokens is None:
            return {}
        return {"prefix_allowed_tokens_fn": lambda row, ids: [int(tokens[row, len(ids) - width])]}


def _judge(entry: Entry, case: Case) -> None:
    own = _error(case.full_cached, case.full)
    if not own <= MEANINGFUL:
        entry.outcome = NOT_COMPARABLE
        entry.reason = f"the model as it is differs with and without a cache, by {own:.2g}"
        return
    _compare(entry, f"{case.label}, cache", case.ours_cached, case.ours, own)
    _compare(entry, f"{case.label}, window over everything", case.whole, case.full, own)
    _compare(entry, f"{case.label}, reverted", case.reverted, case.full_cached, 0.0)
    eva = _error(case.ours, case.full)
    if not eva > 10 * (2 * own + ROUNDING):
        entry.outcome, entry.reason = WRONG, f"{case.label}: it is full attention, not FlashEVA"
    if case.padding:
        _judge_alone(entry, case)


def _judge_alone(entry: Entry, case: Case) -> None:
    own = _error(case.full_cached[:1], case.full_alone)
    even = case.ours_even
    assert even is not None
    if not own <= MEANINGFUL:
        entry.notes.append("as it is, padding changes what it computes")
    elif _error(case.ours_cached[:1], case.ours_alone) <= 2 * own + ROUNDING:
        pass
    elif _error(*even) <= 2 * own + ROUNDING:
        entry.notes.append("it rotates by columns, so what chunk parameters learn sees the padding")
    else:
        _compare(entry, "padded, alone", *even, own)


def _compare(entry: Entry, label: str, got: Tensor | None, want: Tensor, own: float) -> None:
    assert got is not None
    error, allowed = _error(got, want), 2 * own + ROUNDING
    entry.errors[label] = error, allowed
    if not error <= allowed:
        entry.outcome, entry.reason = WRONG, f"{label}: {error:.2g}, allowed {allowed:.2g}"


def _error(got: Tensor, want: Tensor | None) -> float:
    """The worst difference, relative to the largest logit."""
    assert want is not None
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


# --- the document ---------------------------------------------------------------------------------


def document(entries: list[Entry], counts: dict[str, dict[str, int]]) -> str:
    """Write the table of this run, under the counts of all versions."""
    equal = sum(e.outcome == EQUAL for e in entries)
    hybrid = sum(e.outcome == EQUAL and bool(e.kept) for e in entries)
    lines = [
        "# Generation survey",
        "",
        "`prepare` and `generate` with the compressed cache in every causal language model of",
        "transformers. Models are tiny, with random weights, windows of 8 tokens and chunks of 4;",
        f"two prompts of {PROMPT} tokens, one with {PADDING} of them padding, continued by {NEW}.",
        "Made by `make survey`.",
        "",
        "*Equal* means, of the logits of every step, to rounding: with the compressed cache as",
        "without any; a padded row as by itself; with windows over everything as before `prepare`;",
        "and, of a model reverted, exactly as before. What is not equal is refused by `prepare`, ",
        "with the reason below.",
        "",
        f"| version | architectures | {' | '.join(OUTCOMES)} |",
        f"|---|--:|{'--:|' * len(OUTCOMES)}",
        *(_counts_row(version, counts[version]) for version in sorted(counts)),
        "",
        f"The table is of {_version()}: every attention is converted in {equal - hybrid}",
        f"architectures, and some stay full in {hybrid}.",
        "",
        "| architecture | result | converted | left full because | remarks |",
        "|---|---|--:|---|---|",
        *(_row(entry) for entry in entries if entry.outcome not in (NOT_BUILT, NOT_RUN)),
        "",
        "Not surveyed, since they do not build or run here:",
        "",
        *(
            f"- {e.name}, {e.outcome}: `{e.reason}`"
            for e in entries
            if e.outcome in (NOT_BUILT, NOT_RUN)
        ),
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _counts_row(version: str, counts: dict[str, int]) -> str:
    cells = [str(sum(counts.values())), *(str(counts.get(outcome, 0)) for outcome in OUTCOMES)]
    return f"| {version} | {' | '.join(cells)} |"


def _row(entry: Entry) -> str:
    reasons = collections.Counter(_short(reason) for reason in entry.kept.values())
    kept = [f"{reason} ({count})" for reason, count in reasons.items()]
    text = "; ".join(kept) if entry.outcome == EQUAL else _short(entry.reason)
    notes = [*entry.notes, *(["its windows turned off"] if entry.windows_off else [])]
    count = str(len(entry.converted) or "")
    return f"| {entry.name} | {entry.outcome} | {count} | {text} | {'; '.join(notes)} |"


def _short(reason: str) -> str:
    """The reason without the model's name, and without paths."""
    reason = reason.split(" can be converted: ")[-1].replace("|", "or")
    return re.sub(r"\S+\.layers\.\d+\.\S+", "another attention", reason)


def _version() -> str:
    return f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"


def quiet() -> None:
    """Use one thread, and say nothing but results."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)


def main(arguments: list[str]) -> None:
    """Survey everything and write the document (``--counts``: its counts), or what is named."""
    quiet()
    counts_only, asked = "--counts" in arguments, [a for a in arguments if a != "--counts"]
    entries: list[Entry] = []
    # Fresh processes now and then: what models leave behind is kept as long as a process lives.
    with multiprocessing.get_context("spawn").Pool(1, quiet, maxtasksperchild=40) as pool:
        for entry in pool.imap(survey, asked or names()):
            entries.append(entry)
            print(json.dumps(asdict(entry)), flush=True)
    if asked:
        return
    counts = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    counts[_version()] = dict(collections.Counter(entry.outcome for entry in entries))
    COUNTS.write_text(json.dumps(counts, indent=1, sort_keys=True) + "\n")
    if not counts_only:
        DOCUMENT.write_text(document(entries, counts))


if __name__ == "__main__":
    main(sys.argv[1:])
