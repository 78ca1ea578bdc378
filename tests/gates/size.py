"""Fail on files over 400 lines and, outside of kernels/, on functions over 60 lines."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("flasheva_compile", "lowering", "kernels", "tests", "examples", "benchmarks")
MAX_FILE, MAX_FUNCTION = 400, 60


def too_long(path: Path) -> list[str]:
    """List what is too long in one file."""
    text, name = path.read_text(), path.relative_to(ROOT)
    lines = len(text.splitlines())
    found = [f"{name}: {lines} lines, at most {MAX_FILE}"] if lines > MAX_FILE else []
    if name.parts[0] == "kernels":
        return found
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > MAX_FUNCTION:
                where = f"{name}:{node.lineno}"
                found.append(f"{where}: {node.name} has {size} lines, at most {MAX_FUNCTION}")
    return found


if __name__ == "__main__":
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    sys.exit("\n".join(entry for path in files for entry in too_long(path)) or 0)
