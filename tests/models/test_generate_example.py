"""The example of generation runs without a network and says what its cache takes."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "generate.py"
SMALL = ("--max-new-tokens", "3", "--window-size", "32", "--chunk-size", "8", "--device", "cpu")


@pytest.fixture
def example(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("generate_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    document = tmp_path / "document.txt"
    document.write_text("0123456789" * 30)

    def run(*arguments):
        command = [str(EXAMPLE), "--document", str(document), *SMALL, *arguments]
        monkeypatch.setattr(sys, "argv", command)
        return module.main()

    return run


def test_random_model(example, capsys):
    assert example() == 0
    printed = capsys.readouterr().out
    assert "4 of 4 attentions rewritten" in printed
    assert "cache after 351 tokens" in printed
    assert "2 tokens" in printed


def test_layers_that_stay_full_and_a_preallocated_cache(example, capsys):
    assert example("--keep-full=0,-1", "--preallocate") == 0
    assert "2 of 4 attentions rewritten" in capsys.readouterr().out


def test_a_wrong_configuration_is_said_plainly(example, capsys):
    assert example("--window-size", "33") == 1
    assert "multiple of chunk_size=8" in capsys.readouterr().err
