"""Write ``docs/gallery.md`` from what surveys of the gallery found, one file an environment."""

from __future__ import annotations

import collections
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHARED = "layers after a graph break share compiled code, and with it the first one's row"
# Looked into by hand.
FEWER_ROWS = {
    "diffllama": "the two attentions of a layer have equal rows",
    "higgs_audio_v2": _SHARED,
    "openai_privacy_filter": _SHARED,
    "pegasus_x": "the last layer's global tokens are not used, so Dynamo drops their attention",
    "vits": _SHARED,
}
CAUSES = {
    "5.17.0": "The differences are transformers': with 5.17 on torch 2.13 those that were run "
    "again give the same. It writes out a sliding window's mask also where the input is shorter "
    "than the window (5.23 does not), and hands masks over graph breaks (aria, ctrl, jetmoe)."
}
DOCUMENT = Path(__file__).parents[2] / "docs" / "gallery.md"


@dataclass(frozen=True)
class Found:
    """What a survey found in one environment.

    Args:
        environment: Library -> version.
        entries: Architecture -> fields of its ``Entry``.
    """

    environment: dict[str, str]
    entries: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        return ", ".join(f"{name} {version}" for name, version in self.environment.items())

    @property
    def ran(self) -> list[dict[str, Any]]:
        return [e for e in self.entries.values() if not e["failure"]]

    @property
    def attending(self) -> list[dict[str, Any]]:
        return [e for e in self.ran if e["found"] or e["ran"]]

    def total(self, field: str) -> int:
        return sum(e[field] for e in self.ran)

    def equal(self) -> int:
        return sum(e["exact"].startswith("yes") for e in self.ran)

    def compared(self) -> int:
        return sum(bool(e["exact"]) for e in self.ran)


def read(file: Path) -> Found:
    """Read what a survey left; the file's name is the environment's."""
    parts = file.stem.split("-")
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    versions = dict(zip(parts[::2], parts[1::2], strict=True))
    return Found(versions, {e["name"]: e for e in entries})


def write(files: Sequence[Path]) -> None:
    """Write the document about the environment with most, and how the others differ from it."""
    first, *others = sorted(map(read, files), key=lambda found: -len(found.entries))
    lines = [*_summary(first), *_versions(first, others), *_table(first), *_rest(first)]
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text("\n".join(lines) + "\n")


def _summary(found: Found) -> list[str]:
    reasons: collections.Counter[str] = collections.Counter()
    for entry in found.ran:
        for reason, count in entry["refused"].items():
            reasons[short(reason)] += count
    total, rewritten = found.total("found"), found.total("rewritten")
    return [
        "# Gallery",
        "",
        "Attention in the architectures of transformers, in timm's and x-transformers' models and",
        f"in PyTorch's own modules ({found.name}), tiny, with random weights, in",
        "evaluation mode. Made by `make gallery`.",
        "",
        f"- {len(found.entries)} architectures; {len(found.ran)} build and run as they are",
        f"  configured here, {len(found.attending)} of them attend.",
        f"- {total} attentions found, {rewritten} rewritten, {total - rewritten} left full, each",
        "  with a reason (equal rows of a report count once).",
        "- With a window over every token the compiled model equals the model to rounding in",
        f"  {found.equal()} of {found.compared()} that were rewritten in part or entirely.",
        "- Softmax weights that meet values, and calls of SDPA, are counted without the matcher",
        f"  while the model runs uncompiled: {len(_unaccounted(found))} architectures run more",
        "  than the report has rows (below, with the cause).",
        "",
        "| left full because | attentions |",
        "|---|--:|",
        *(f"| {reason} | {count} |" for reason, count in reasons.most_common()),
        "",
    ]


def _unaccounted(found: Found) -> list[dict[str, Any]]:
    return [e for e in found.ran if e["ran"] > e["found"]]


def _versions(first: Found, others: Sequence[Found]) -> list[str]:
    if not others:
        return []
    lines = [
        "## Versions compared",
        "",
        "| environment | surveyed | attend | found | rewritten | left full | equal |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for found in (first, *others):
        total, rewritten = found.total("found"), found.total("rewritten")
        cells = (len(found.ran), len(found.attending), total, rewritten, total - rewritten)
        equal = f"{found.equal()} of {found.compared()}"
        lines.append(f"| {found.name} | {' | '.join(map(str, cells))} | {equal} |")
    for other in others:
        lines += ["", *_difference(first, other)]
    return [*lines, ""]


def _difference(first: Found, other: Found) -> list[str]:
    both = [name for name in first.entries if name in other.entries]
    gone = [name for name in first.entries if name not in other.entries]
    new = [name for name in other.entries if name not in first.entries]
    differing = [n for n in both if outcome(first.entries[n]) != outcome(other.entries[n])]
    lines = [f"{other.name}: {len(both) - len(differing)} of {len(both)} as above."]
    if cause := CAUSES.get(other.environment["transformers"]):
        lines += ["", cause]
    if gone:
        known = "" if len(gone) > len(both) else f": {', '.join(gone)}"
        lines += ["", f"{len(gone)} are not there, or were left out{known}."]
    if new:
        lines += ["", f"There alone: {', '.join(new)}."]
    if differing:
        lines += ["", "| architecture | above | there |", "|---|---|---|"]
        pairs = ((n, outcome(first.entries[n]), outcome(other.entries[n])) for n in differing)
        lines += [f"| {name} | {here} | {there} |" for name, here, there in pairs]
    return lines


def outcome(entry: dict[str, Any]) -> str:
    """Say in a line what became of an architecture."""
    if entry["failure"]:
        return "not surveyed"  # why differs with the wording of errors
    text = f"{entry['rewritten']} of {entry['found']} rewritten"
    if entry["refused"]:
        text += f" ({_reasons(entry)})"
    if not entry["exact"]:
        return text
    return f"{text}, {'equal' if entry['exact'].startswith('yes') else entry['exact']}"


def _table(found: Found) -> list[str]:
    return [
        "## Architectures",
        "",
        "| architecture | found | rewritten | left full because | equal |",
        "|---|--:|--:|---|---|",
        *map(_row, found.attending),
        "",
    ]


def _row(entry: dict[str, Any]) -> str:
    broken = [warning for warning in entry["not_seen"] if warning.startswith("graph break: ")]
    others = [warning for warning in entry["not_seen"] if warning not in broken]
    breaks = f"graph breaks: {len(broken)}" if broken else ""
    text = "; ".join(filter(None, (_reasons(entry), *others, breaks)))
    text = text.replace("|", "or").replace("\n", " ")
    cells = (entry["name"], entry["found"], entry["rewritten"], text, entry["exact"])
    return f"| {' | '.join(map(str, cells))} |"


def _reasons(entry: dict[str, Any]) -> str:
    counts: collections.Counter[str] = collections.Counter()
    for reason, count in entry["refused"].items():
        counts[short(reason)] += count
    return "; ".join(f"{reason} ({count})" for reason, count in sorted(counts.items()))


def _rest(found: Found) -> list[str]:
    silent = [e["name"] for e in found.ran if not e["found"] and not e["ran"]]
    lines = [f"No attention: {', '.join(silent)}.", ""]
    if missed := _unaccounted(found):
        lines += ["More attentions run than the report has rows:", ""]
        for e in missed:
            cause = FEWER_ROWS.get(e["name"], "MISSED")
            lines.append(f"- {e['name']}: {e['ran']} run, {e['found']} rows; {cause}")
        lines.append("")
    failed = [e for e in found.entries.values() if e["failure"]]
    lines += ["Not surveyed, since they do not build or run here:", ""]
    return lines + [f"- {e['name']}: `{e['failure']}`" for e in failed]


def short(reason: str) -> str:
    """The reason without what differs from model to model."""
    return reason.split(": ")[0].replace("|", "or").split(" for ")[0]
