"""Turn the JSON of ``adaptation_gpu.py`` into a Markdown table (printed) and plots (SVG or PNG).

Run ``python benchmarks/adaptation_plot.py benchmarks/results/adaptation_gpu.json --plots FOLDER``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from plot import Row, markdown

if TYPE_CHECKING:
    from collections.abc import Sequence

LENGTHS = ("2048", "8192")
FULL_OF = {"none": "full", "lm": "full, lm", "paper": "full, lm", "distill": "full"}
WINDOW_OF = {
    "none": "window",
    "lm": "window, lm",
    "paper": "window, lm",
    "distill": "window, distill",
}
CURVES = {
    "window, lm": ("C7", "-"),
    "tangent c16, lm": ("C0", "-"),
    "tangent c16 block, lm": ("C0", ":"),
    "eva c16, lm": ("C3", "-"),
    "eva c16 block, paper": ("C3", ":"),
    "evabyte c16, lm": ("C1", "-"),
    "full, lm": ("C2", "--"),
}
NOISE = {
    "eva c16 block, paper": ("C7", "-"),
    "eva c16 block, paper, clamped noise": ("C0", "-"),
    "eva c16 block, paper, normal noise": ("C3", "-"),
}
POSITIONS = {
    "full, lm": ("C2", "--"),
    "window, lm": ("C7", "-"),
    "tangent c16, lm": ("C0", "-"),
    "tangent c4, lm": ("C4", "-"),
    "tangent c16, 1/8 selected, lm": ("C1", "-"),
}
SMOOTH = 10  # steps a point of a curve is a mean over


def recovered(rows: dict[str, Row], row: Row, length: str) -> float | None:
    """Return the share of the loss between window + sinks and full attention that an arm wins back.

    All three trained alike, on the same order of sequences; full attention is the teacher of
    ``distill`` and so is not trained.
    """
    seed = f", seed {row['seed']}" if row["seed"] else ""
    full, window = (rows.get(names[row["training"]] + seed) for names in (FULL_OF, WINDOW_OF))
    if full is None or window is None or "perplexity" not in row:
        return None
    own, best, worst = (math.log(x["perplexity"][length]) for x in (row, full, window))
    return (worst - own) / (worst - best)


def table(rows: Sequence[Row]) -> str:
    """Return one line per arm."""
    named = {row["name"]: row for row in rows}
    keys = [key for row in rows for key in row.get("passkey", {})]
    prompts = list(dict.fromkeys(keys))
    columns = ["arm", *(f"perplexity {n}" for n in LENGTHS), *(f"recovered {n}" for n in LENGTHS)]
    columns += ["chunk tokens off", *(f"pass keys {n}" for n in prompts)]
    lines = []
    for row in rows:
        if "error" in row:
            lines.append([row["name"], row["error"][:60], *[""] * (len(columns) - 2)])
            continue
        off = row.get("chunk_tokens_off", {}).get("8192")
        shares = [recovered(named, row, n) for n in LENGTHS]
        lines.append(
            [
                row["name"],
                *(f"{row['perplexity'][n]:.2f}" for n in LENGTHS),
                *("" if x is None else f"{x:.0%}" for x in shares),
                "" if off is None else f"{off:.2f}",
                *(f"{row['passkey'][n]:.0%}" for n in prompts),
            ]
        )
    return markdown(columns, lines)


def smooth(values: Sequence[float]) -> list[float]:
    """Return means of consecutive values."""
    return [sum(values[i : i + SMOOTH]) / SMOOTH for i in range(len(values) - SMOOTH + 1)]


def plot_curves(
    rows: dict[str, Row],
    curves: dict[str, tuple[str, str]],
    limits: tuple[float, float],
    path: Path,
) -> None:
    """Draw losses and gradient norms of the arms that ``curves`` names, step by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, (color, style) in curves.items():
        if name in rows and "loss" in rows[name]:
            options = {"color": color, "linestyle": style, "label": name}
            left.plot(smooth(rows[name]["loss"]), **options)
            right.plot(smooth(rows[name]["gradient_norm"]), **options)
    left.set(xlabel="step", ylabel="loss [nats/token]", ylim=limits)
    right.set(xlabel="step", ylabel="gradient norm", yscale="log")
    left.legend(fontsize=7)
    figure.savefig(path)


def plot_positions(rows: dict[str, Row], path: Path) -> None:
    """Draw losses by position, relative to window + sinks, averaged over sources."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    base = by_position(rows["window, lm"])
    for name, (color, style) in POSITIONS.items():
        if name in rows:
            found = by_position(rows[name])
            heights = [found[edge] - base[edge] for edge in found]
            axes.plot(list(found), heights, style, color=color, label=name, marker="o")
    axes.set_xscale("symlog", base=2, linthresh=256)
    axes.set(xlabel="position from [tokens]", ylabel="loss above window + sinks [nats/token]")
    axes.legend(fontsize=7)
    figure.savefig(path)


def by_position(row: Row) -> dict[int, float]:
    """Return an arm's mean loss over sources by the first position of each bin."""
    parts = [x["loss_by_position"] for key, x in row["perplexity"].items() if key.endswith(" 8192")]
    return {int(edge): sum(part[edge] for part in parts) / len(parts) for edge in parts[0]}


def main() -> None:
    """Print and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for plots; none unless given")
    arguments = parser.parse_args()
    rows = json.loads(arguments.result.read_text())["rows"]
    print(table(rows))
    if arguments.plots:
        named = {row["name"]: row for row in rows}
        arguments.plots.mkdir(parents=True, exist_ok=True)
        plot_curves(named, CURVES, (2.1, 3.3), arguments.plots / "adaptation_curves.svg")
        plot_curves(named, NOISE, (2.4, 4.5), arguments.plots / "adaptation_noise.svg")
        plot_positions(named, arguments.plots / "adaptation_positions.svg")


if __name__ == "__main__":
    main()
