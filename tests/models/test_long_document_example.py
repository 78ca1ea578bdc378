"""The example of a long document runs without a network and compares three kinds of attention."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "long_document.py"
SMALL = ("--length", "300", "--max-new-tokens", "3", "--window-size", "32", "--chunk-size", "8")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    spec = importlib.util.spec_from_file_location("long_document_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    def run(*arguments):
        command = [str(EXAMPLE), *SMALL, "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        return module.main()

    return run


def rows(printed):
    """Return the sizes of each arm's caches, here and on the host [MiB]."""
    lines = [line.split("  ") for line in printed.splitlines() if " b'" in line or ' b"' in line]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {row[0]: tuple(map(float, row[3:5])) for row in cells}


def test_full_attention_keeps_more_than_windows_and_less_than_an_exact_store(example, capsys):
    assert example("--retrieve-chunks", "2") == 0
    printed = capsys.readouterr().out
    found = rows(printed)
    assert found["FlashEVA"][0] < found["full"][0] < found["FlashEVA + retrieval"][0]
    assert "read by full attention" not in printed


def test_a_store_on_the_host_and_an_exact_prompt_are_said(example, capsys):
    assert example("--store", "offloaded", "--prefill", "exact") == 0
    printed = capsys.readouterr().out
    here, there = rows(printed)["FlashEVA + retrieval"]
    assert here < there
    assert "read by full attention" in printed


def test_a_wrong_configuration_is_said_plainly(example, capsys):
    assert example("--window-size", "33") == 1
    assert "multiple of chunk_size=8" in capsys.readouterr().err
