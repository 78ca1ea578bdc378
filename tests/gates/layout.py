"""Lay the sources out as an installation has them, for tools that do not follow ``package-dir``.

The type checker and import-linter see one regular package; the ``__init__.py`` files that they need
are added here and nowhere else.
"""

from __future__ import annotations

import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def lay_out(target: Path) -> None:
    """Copy every package of pyproject.toml to where its import name says."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shutil.rmtree(target, ignore_errors=True)
    for package in setuptools["packages"]:
        folder = setuptools["package-dir"].get(package, package.replace(".", "/"))
        copy = target / package.replace(".", "/")
        copy.mkdir(parents=True)
        for path in (ROOT / folder).iterdir():
            if path.is_file():
                shutil.copy2(path, copy)
        (copy / "__init__.py").touch()


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
