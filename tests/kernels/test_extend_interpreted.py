"""Every law of ``extend_laws.py``, in processes where Triton interprets kernels.

By hand, with any of pytest's options, 20 times the examples, other ones each time::

    TRITON_INTERPRET=1 FLASHEVA_FUZZ=20 python -m pytest tests/kernels/extend_laws.py -x
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAWS = Path(__file__).with_name("extend_laws.py")
TESTS = [
    node.name
    for node in ast.parse(LAWS.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]
FUZZED = "test_calls_are_the_blocked_code"


@pytest.mark.parametrize("names", [[FUZZED], [n for n in TESTS if n != FUZZED]], ids=len)
def test_laws(names, tmp_path):
    clean = {n: x for n, x in os.environ.items() if not n.startswith("PYTEST_")}
    own = {
        "TRITON_INTERPRET": "1",
        "FLASHEVA_CACHE_DIR": str(tmp_path / "generated"),
        "OMP_NUM_THREADS": "1",
    }
    options = ("-q", "-p", "no:cacheprovider", "--tb=short")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(f"{LAWS}::{name}" for name in names)],
        cwd=ROOT,
        env={**clean, **own},
        capture_output=True,
        text=True,
    )
    if done.returncode:  # with the failing example
        pytest.fail(f"{done.stdout}\n{done.stderr}", pytrace=False)
