"""Every law of the kernels that work on caches, in processes where Triton interprets kernels.

By hand, with any of pytest's options, 20 times the examples, other ones each time::

    TRITON_INTERPRET=1 FLASHEVA_FUZZ=20 python -m pytest tests/kernels/decode_laws.py -x
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FUZZED = {  # of each file the law that takes longest, which gets a process of its own
    "decode_laws.py": "test_steps_are_the_blocked_code_and_the_reference",
    "extend_laws.py": "test_calls_are_the_blocked_code",
    "retrieval_decode_laws.py": "test_steps_are_the_blocked_code",
    "vecinfer_laws.py": "test_calls_are_those_of_pytorch",
}


def laws(file):
    """Return the names of a file's tests."""
    body = ast.parse(Path(__file__).with_name(file).read_text()).body
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return [name for name in functions if name.startswith("test_")]


def processes():
    """Return the tests that run in one process, for each process."""
    for file, fuzzed in FUZZED.items():
        names = laws(file)
        assert fuzzed in names
        others = [name for name in names if name != fuzzed]
        for chosen in ([fuzzed], others):
            yield pytest.param(file, chosen, id=f"{file}-{len(chosen)}")


@pytest.mark.parametrize(("file", "names"), processes())
def test_laws(file, names, tmp_path):
    clean = {n: x for n, x in os.environ.items() if not n.startswith("PYTEST_")}
    own = {
        "TRITON_INTERPRET": "1",
        "FLASHEVA_CACHE_DIR": str(tmp_path / "generated"),
        "OMP_NUM_THREADS": "1",
    }
    path = Path(__file__).with_name(file)
    options = ("-q", "-p", "no:cacheprovider", "--tb=short")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(f"{path}::{name}" for name in names)],
        cwd=ROOT,
        env={**clean, **own},
        capture_output=True,
        text=True,
    )
    if done.returncode:  # with the failing example
        pytest.fail(f"{done.stdout}\n{done.stderr}", pytrace=False)
