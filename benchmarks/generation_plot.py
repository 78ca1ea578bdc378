"""Turn the JSON of ``generation_gpu.py`` into Markdown tables (printed) and plots (SVG or PNG).

Run ``python benchmarks/generation_plot.py benchmarks/results/generation_gpu.json --plots FOLDER``:
tokens per second and peak memory against the context, one file for each model and batch.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plot import Row, markdown, number, ratios, short

if TYPE_CHECKING:
    from collections.abc import Sequence

LARGEST = "largest"
STYLES = {  # FlashEVA solid, its rivals not; a color for each arm
    "flasheva_static": ("FlashEVA, preallocated", "C0", "-"),
    "flasheva_retrieval": ("top-8 retrieval", "C5", "-"),
    "flasheva_offloaded": ("top-8 retrieval, exact keys on the host", "C6", "-"),
    "flasheva_hybrid": ("FlashEVA, a quarter of the layers full", "C8", "-"),
    "flasheva_hybrid_2bit": ("FlashEVA, a quarter full in 2 bits", "C9", "-"),
    "flasheva_dynamic": ("FlashEVA, growing", "C1", "-"),
    "full_dynamic": ("full, growing", "C3", "--"),
    "full_static": ("full, preallocated", "C2", "--"),
    "full_unmasked": ("full, preallocated, no mask", "C4", "--"),
    "window_sinks": ("window + sinks alone", "C7", ":"),
}
PANELS = {"tokens_per_s": "tokens/s", "peak_mib": "peak memory above the weights [MiB]"}
MARKERS = {"graph": "o", "compile": "s", "autotune": "D", "eager": "^", "generate": "v"}


def table(rows: Sequence[Row]) -> str:
    """Return one table per model and batch."""
    tables: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda r: (r["model"], r["batch"] == LARGEST, r["rows"])):
        batch = LARGEST if row["batch"] == LARGEST else row["rows"]
        tables[row["model"], row["layers"], batch].append(row)
    order = list(STYLES)
    parts = []
    for (model, layers, batch), members in tables.items():
        members.sort(key=lambda r: (r["context"], order.index(r["arm"]), r["decode"]))
        versus = sorted(ratios(members))
        names = ("rows", "ms", "tokens_per_s", "cache_mib", "peak_mib", "roofline_fraction")
        columns = ["context", "arm", "decode", "rows", "ms/step", "tokens/s", "cache MiB"]
        columns += ["peak MiB", "of bandwidth", *versus]
        lines = [
            [
                short(row["context"]),
                row["arm"],
                row["decode"],
                *(number(row.get(name)) for name in (*names, *versus)),
            ]
            for row in members
        ]
        parts.append(f"### {model}, {layers} layers, batch {batch}\n\n{markdown(columns, lines)}")
    return "\n\n".join(parts)


def unmeasured(rows: Sequence[Row]) -> str:
    """List what failed or was left out, and why."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        why = "out of memory" if row.get("out_of_memory") else row.get("error")
        why = why or row.get("skipped")
        if why:
            what = (row["model"], row["arm"], row["decode"], f"b={row['batch']}")
            reasons[why].append(f"{' '.join(what)} N={short(row['context'])}")
    return "\n".join(f"- {why}: {', '.join(names)}" for why, names in reasons.items())


def plot(rows: Sequence[Row], folder: Path, suffix: str) -> list[Path]:
    """Draw tokens per second and peak memory against the context: a file per model and batch."""
    from matplotlib import pyplot

    files: dict[tuple[str, int, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row["batch"] != LARGEST and row["decode"] != "generate":
            files[row["model"], row["layers"], row["batch"]].append(row)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for (model, layers, batch), members in files.items():
        panels = [name for name in PANELS if any(name in row for row in members)]
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False
        )
        for axis, name in zip(axes[0], panels, strict=True):
            draw(axis, [row for row in members if name in row], name)
        axes[0][0].legend(fontsize=7)
        devices = ", ".join(sorted({row["device"] for row in members}))
        figure.suptitle(f"{model} ({layers} layers), batch {batch}, {devices}: decoding")
        figure.tight_layout()
        path = folder / f"generation_{model}_l{layers}_b{batch}{suffix}"
        figure.savefig(path)
        pyplot.close(figure)
        written.append(path)
    return written


def draw(axis: Any, rows: Sequence[Row], name: str) -> None:  # noqa: ANN401 - matplotlib's
    """Draw a line for each arm and way to decode."""
    from matplotlib.ticker import LogLocator

    lines: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        lines[row["arm"], row["decode"]].append((row["context"], row[name]))
    for arm, decode in sorted(lines, key=lambda key: (list(STYLES).index(key[0]), key[1])):
        label, color, style = STYLES[arm]
        contexts, values = zip(*sorted(lines[arm, decode]), strict=True)
        axis.plot(
            contexts,
            values,
            color=color,
            linestyle=style,
            marker=MARKERS[decode],
            markersize=4,
            label=f"{label} ({decode})",
        )
    ticks = sorted({row["context"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda *_: "")
    axis.set_xticks(ticks, [short(context) for context in ticks], fontsize=8)
    axis.set_xlabel("context [tokens]")
    axis.set_ylabel(PANELS[name])
    axis.grid(visible=True, alpha=0.3)


def main() -> None:
    """Print the tables and write the plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for plots; none are drawn without it")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    a = parser.parse_args()
    results = json.loads(a.results.read_text())
    about, rows = results["header"], results["rows"]
    measured = [row for row in rows if "ms" in row]
    names = ("torch", "triton", "transformers", "cuda")
    versions = [f"{name} {about[name]}" for name in names if about.get(name)]
    print(f"{about['device']}, {', '.join(versions)}, {about['date'][:10]}, {about['commit']}\n")
    print(f"copy bandwidth: {about['copy_tbs']} TB/s\n\n{table(measured)}")
    failures = unmeasured(rows)
    if failures:
        print(f"\n### Not measured\n\n{failures}")
    if a.plots:
        for path in plot(measured, a.plots, f".{a.format}"):
            print(f"\n{path}")


if __name__ == "__main__":
    main()
