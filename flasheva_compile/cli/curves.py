"""Loss and gradient norm of an adaptation, step by step, as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from flasheva_compile.adaptation.train import AdaptationReport

MISSING = "no curves: matplotlib is not installed (pip install matplotlib)"


def draw_curves(report: AdaptationReport, path: Path) -> bool:
    """Draw the curves; return False where matplotlib is missing.

    Args:
        report: What ``adapt`` returned.
        path: The file; its suffix says the format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = list(enumerate(report.steps, 1))
    for color, name in enumerate(dict.fromkeys(step.phase for step in report.steps)):
        own = [(place, step) for place, step in steps if step.phase == name]
        places = [place for place, _ in own]
        left.plot(places, [step.loss for _, step in own], color=f"C{color}", label=name)
        right.plot(places, [step.gradient_norm for _, step in own], color=f"C{color}")
    skipped = [(place, step) for place, step in steps if step.skipped]
    if skipped:
        marks = {"linestyle": "", "marker": "x", "color": "C3", "label": "skipped"}
        right.plot([p for p, _ in skipped], [s.gradient_norm for _, s in skipped], **marks)
        right.legend(fontsize=8)
    for axes, name in ((left, "loss"), (right, "gradient norm before clipping")):
        axes.set(xlabel="optimizer step", ylabel=name, yscale="log")
        axes.grid(visible=True, alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(path)
    return True
