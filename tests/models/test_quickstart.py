"""The quickstart runs, reports, and says plainly when it has to make do."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from flasheva_compile.report import CompileReport, LayerReport

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.py"


@pytest.mark.slow
def test_random_weights_without_inductor():
    short = ("--random", "--layers", "3", "--length", "384", "--window-size", "64")
    short += ("--inner-backend", "eager")
    done = subprocess.run(
        [sys.executable, QUICKSTART, *short],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RANDOM WEIGHTS" in done.stdout + done.stderr
    assert "3 of 3 attentions rewritten" in done.stdout
    assert "layers.{0-2}.self_attn (3x)" in done.stdout
    for row in ("perplexity", "forward pass [s]", "memory beyond weights [MiB]"):
        assert row in done.stdout


@pytest.mark.parametrize(
    ("expected", "perplexity", "status"), [(True, 9.0, 0), (False, 9.0, 1), (True, float("nan"), 1)]
)
def test_it_fails_if_something_was_left_full_unasked(expected, perplexity, status, capsys):
    spec = importlib.util.spec_from_file_location("quickstart", QUICKSTART)
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    left = LayerReport(path="layers.0", decision="full", reason="why", expected=expected)
    report = CompileReport(layers=(left, LayerReport(path="layers.1", decision="eva")))
    measured = {"perplexity": perplexity, "rewritten": 1, "unexpected": [], "warnings": []}
    assert quickstart.verdict(report, {"full": measured, "flasheva": measured}) == status
    assert ("FAILED" in capsys.readouterr().err) == bool(status)
