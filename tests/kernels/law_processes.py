"""Files of laws in processes of their own, in which Triton interprets kernels.

A process takes some seconds to start, so laws share one; those of a file that take longest have
others, which spread over the cores. By hand, with any of pytest's options, 20 times the examples,
other ones each time::

    TRITON_INTERPRET=1 FLASHEVA_FUZZ=20 python -m pytest tests/kernels/interpreted_laws.py -x
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def shares(file: str, *alone: tuple[str, ...]):
    """Return parameters ``(file, laws)``: for each group in ``alone``, and for all other laws."""
    body = ast.parse(Path(__file__).with_name(file).read_text()).body
    names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    names = [name for name in names if name.startswith("test_")]
    grouped = {name for group in alone for name in group}
    assert grouped < set(names), f"{grouped - set(names)} are no laws of {file}"
    rest = tuple(name for name in names if name not in grouped)
    named = [(group, group[0].removeprefix("test_")) for group in alone]
    return [
        pytest.param(file, group, id=f"{file}-{label}") for group, label in (*named, (rest, "rest"))
    ]


def run(file: str, names: tuple[str, ...], folder: Path) -> None:
    """Run laws of a file, or fail with what pytest says: the failing example."""
    path = Path(__file__).with_name(file)
    clean = {n: x for n, x in os.environ.items() if not n.startswith("PYTEST_")}
    own = {
        "TRITON_INTERPRET": "1",
        "FLASHEVA_CACHE_DIR": str(folder / "generated"),
        "OMP_NUM_THREADS": "1",
    }
    options = ("-q", "-p", "no:cacheprovider", "--tb=short")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(f"{path}::{name}" for name in names)],
        cwd=ROOT,
        env={**clean, **own},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.fail(f"{done.stdout}\n{done.stderr}", pytrace=False)
