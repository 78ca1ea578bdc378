"""A tiny model, a text, and the command lines that tests of the CLI run on them."""

from __future__ import annotations

from flasheva_compile.cli import main
from tests.models.evaluation_models import byte_llama, byte_tokenizer

CONFIG = '{"window_size": 16, "chunk_size": 4, "sink_tokens": 4}'


def make_folder(path):
    """Write a model with its tokenizer, and a text in which no stretch comes twice."""
    byte_llama(layers=4).save_pretrained(path / "model")
    byte_tokenizer().save_pretrained(path / "model")
    (path / "text.txt").write_text(" ".join(str(n * n) for n in range(600)))
    return path


def make_adapted(folder):
    """Adapt the model, with one full layer."""
    assert main(adapt(folder, folder / "adapted", "--keep-full", "1", "--select", "periodic")) == 0
    return folder / "adapted"


def adapt(folder, out, *more):
    """The command line that adapts the model in a few steps."""
    run = ["adapt", folder / "model", "--data", folder / "text.txt", "--out", out]
    sizes = ["--length", 64, "--batch-size", 2, "--steps", 6, "--config", CONFIG, "--device", "cpu"]
    return [str(argument) for argument in (*run, *sizes, *more)]


def line(capsys, *arguments):
    """Run a command that fails; return the one line that says why."""
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr().err.strip().splitlines()
    said = [x for x in said if x.startswith("flasheva")]  # bars come and go
    assert status == 2
    assert len(said) == 1, said
    return said[0]
