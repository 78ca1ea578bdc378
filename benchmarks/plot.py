"""Turn the JSON of the GPU benchmarks into Markdown tables (printed) and plots (SVG or PNG).

Run ``python benchmarks/plot.py benchmarks/results/attention_gpu.json --plots FOLDER``.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Row = dict[str, Any]
MEASURES = {"ms": "ms", "tflops": "TFLOP/s", "roofline_fraction": "roofline", "peak_mib": "MiB"}
ATTENTION = ("batch", "pass", "causal", "heads", "kv_heads", "head_dim", "length")
WINDOW = ("window", "window_size", "chunk_size", "sink_tokens")
MODEL = ("layers", "hidden", "checkpointing", "pass", "length")


def short(length: int) -> str:
    """Write 65536 as ``64k``."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def number(value: float | str | None) -> str:
    """Write a number with three digits or so."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def window_name(row: Row) -> str:
    """Name window, chunks and sinks of a row: ``sliding 256/16/16``."""
    if row.get("window") is None:
        return "full"
    return f"{row['window']} {'/'.join(str(row[name]) for name in WINDOW[1:])}"


def heading(row: Row) -> str:
    """Name the table or plot that a row of an attention belongs to."""
    mask = "causal" if row["causal"] else "bidirectional"
    heads = f"{row['heads']} heads of {row['head_dim']}"
    group = "" if row["heads"] == row["kv_heads"] else f", {row['kv_heads']} key heads"
    batch = "" if row["batch"] == 1 else f", batch {row['batch']}"
    return f"{row['pass']}, {mask}, {heads}{group}{batch}"


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    table = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def ratios(rows: Iterable[Row]) -> list[str]:
    """List the ratios that any of the rows has, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith("vs_")))


def attention_tables(rows: Sequence[Row]) -> str:
    """Return one table per pass, mask and shape of heads."""
    tables: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda r: [str(r[name]) for name in ATTENTION[:-1]]):
        tables[heading(row)].append(row)
    parts = []
    for title, members in tables.items():
        members.sort(key=lambda r: (r["length"], window_name(r)))
        versus = ratios(members)
        columns = ["N", "contestant", "window w/c/sinks", *MEASURES.values(), *versus]
        lines = [
            [
                short(row["length"]),
                row["contestant"],
                window_name(row),
                *(number(row.get(name)) for name in (*MEASURES, *versus)),
            ]
            for row in members
        ]
        parts.append(f"### {title}\n\n{markdown(columns, lines)}")
    return "\n\n".join(parts)


def model_table(rows: Sequence[Row]) -> str:
    """Return the table of whole models."""
    versus = ratios(rows)
    names = ("ms", "peak_mib", "tokens_per_s", "first_call_s", "attentions_rewritten", *versus)
    columns = ["pass", "N", "contestant", "ms", "MiB", "tokens/s", "first call s", "rewritten"]
    rows = sorted(rows, key=lambda r: [str(r[name]) for name in MODEL[:-1]] + [r["length"]])
    lines = [
        [row["pass"], short(row["length"]), row["contestant"], *(number(row.get(n)) for n in names)]
        for row in rows
    ]
    return markdown([*columns, *versus], lines)


def unmeasured(rows: Sequence[Row]) -> str:
    """List what failed or was left out, and why."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        why = row.get("error") or row.get("skipped")
        if why:
            dim = f" d={row['head_dim']}" if "head_dim" in row else ""
            name = f"{row['contestant']} {row['pass']} N={short(row['length'])}{dim}"
            reasons[why].append(name)
    return "\n".join(
        f"- {why}: {', '.join(dict.fromkeys(names))}" for why, names in reasons.items()
    )


def checks(found: Sequence[Row]) -> str:
    """Say how far FlexAttention and the formula in fp32 were from FlashEVA."""
    lines = []
    for check in found:
        worst = [v for k, v in check.items() if k.endswith("_relative")]
        largest = f"{max(worst):.2g} of the largest entry" if worst else check.get("error", "")
        name = f"{heading(check)}, N={short(check['length'])}, {window_name(check)}"
        lines.append(f"- {'ok' if check.get('ok') else 'NOT OK'}: {name}: {largest}")
    return "\n".join(lines)


def plot(rows: Sequence[Row], device: str, folder: Path, suffix: str) -> list[Path]:
    """Draw the speedup over every peer against the length: a file for each pass and mask."""
    from matplotlib import pyplot

    files: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if ratios([row]):
            group = row["heads"] // row["kv_heads"]
            files[row["pass"], row["causal"], group, row["batch"]].append(row)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for (step, causal, group, batch), members in files.items():
        dims = sorted({row["head_dim"] for row in members})
        figure, axes = pyplot.subplots(
            1, len(dims), figsize=(5.5 * len(dims), 4), sharey=True, squeeze=False
        )
        for axis, dim in zip(axes[0], dims, strict=True):
            draw(axis, [row for row in members if row["head_dim"] == dim])
            axis.set_title(f"head dim {dim}")
        mask = "causal" if causal else "bidirectional"
        axes[0][0].set_ylabel(f"times faster, {step}")
        figure.suptitle(f"{device}, bf16, {mask}, GQA {group}:1, batch {batch}")
        figure.tight_layout()
        name = f"attention_{step.replace('+', '_')}_{mask}_gqa{group}_b{batch}{suffix}"
        figure.savefig(folder / name)
        pyplot.close(figure)
        written.append(folder / name)
    return written


def lines_of(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """Gather the points of each peer and window: of one chunk size, or of one number of chunks."""
    by_size: dict[str, list[tuple[int, float]]] = defaultdict(list)
    by_number: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        alone = row["contestant"] == "flasheva_attention"
        for name in ratios([row]):
            # A kernel alone is compared with kernels alone, and the whole with the whole.
            if ("flex" in name) != alone:
                continue
            label = f"{name[3:]}{' (kernel alone)' if alone else ''}: {row['window']}"
            size = f"{label} w={row['window_size']} c={row['chunk_size']}"
            by_size[f"{size} sinks={row['sink_tokens']}"].append((row["length"], row[name]))
            sinks = " with sinks" if row["sink_tokens"] else ""
            chunks = f"{label} {row['length'] // row['chunk_size']} chunks{sinks}"
            by_number[chunks].append((row["length"], row[name]))
    found = {label: points for label, points in by_number.items() if len(points) > 1}
    drawn = {point for points in found.values() for point in points}
    return found | {
        label: points
        for label, points in by_size.items()
        if len(points) > 1 or not drawn.issuperset(points)
    }


def draw(axis: Any, rows: Sequence[Row]) -> None:  # noqa: ANN401 - matplotlib's, imported late
    """Draw a line for each peer and window."""
    lines = lines_of(rows)
    for label, points in lines.items():
        lengths, values = zip(*sorted(points), strict=True)
        axis.plot(lengths, values, marker="o", markersize=4, label=label)
    ticks = sorted({row["length"] for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(ticks, [short(length) for length in ticks])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_xlabel("tokens")
    axis.grid(visible=True, alpha=0.3)
    axis.legend(fontsize=7)


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
    versions = [f"{name} {about[name]}" for name in ("torch", "triton", "cuda") if about.get(name)]
    print(f"{about['device']}, {', '.join(versions)}, {about['date'][:10]}, {about['commit']}\n")
    is_attention = bool(rows) and "head_dim" in rows[0]
    print(attention_tables(measured) if is_attention else model_table(measured))
    for title, text in (("Checks", checks(results["checks"])), ("Not measured", unmeasured(rows))):
        if text:
            print(f"\n### {title}\n\n{text}")
    if a.plots and is_attention:
        for path in plot(measured, about["device"], a.plots, f".{a.format}"):
            print(f"\n{path}")


if __name__ == "__main__":
    main()
