"""JSON files of the GPU benchmarks: a header, checks and flat rows, rewritten after every row."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
OUT_OF_TIME = "time budget"
_LISTS = re.compile(r"\[[^][{}]*\]")  # innermost ones


def _one_line(found: re.Match[str]) -> str:
    return " ".join(found.group().split())


def header(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Describe device, software, code and command."""
    versions = {name: _version(name) for name in ("torch", "triton", "transformers")}
    described = {
        "device": platform.processor() or platform.machine(),
        **versions,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "command": " ".join(["python", *(Path(a).name if a[:1] == "/" else a for a in sys.argv)]),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_mib": properties.total_memory >> 20,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return described


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of this checkout, marked if files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        where = Path(__file__).parent
        found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=where)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


@dataclass(kw_only=True)
class Results:
    """What a run has found so far.

    Attributes:
        path: The JSON file.
        identity: Names of the fields that tell rows apart.
        header: See :func:`header`.
        checks: Comparisons of results.
        rows: Measurements, failures and what was left out.
    """

    path: Path
    identity: tuple[str, ...]
    header: dict[str, Any] = field(default_factory=dict)
    checks: list[Row] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def resume(self) -> None:
        """Take over the rows of an earlier run, except those that it had no time for."""
        if not self.path.exists():
            return
        earlier = json.loads(self.path.read_text())
        self.checks = earlier.get("checks", [])
        self.rows = [row for row in earlier["rows"] if row.get("skipped") != OUT_OF_TIME]
        past = [*earlier["header"].pop("earlier", []), earlier["header"]]
        same = {"commit", "device", "torch", "triton", "device_lost"}
        self.header["earlier"] = [
            {k: v for k, v in h.items() if k in ("date", "command") or k in same} for h in past
        ]

    def key(self, row: Row) -> tuple[Any, ...]:
        """Return what identifies a row."""
        return tuple(row.get(name) for name in self.identity)

    def has(self, row: Row) -> bool:
        """Say whether this row is there."""
        return any(self.key(row) == self.key(other) for other in self.rows)

    def add(self, row: Row) -> None:
        """Append or replace a row and write the file."""
        self.rows = [other for other in self.rows if self.key(other) != self.key(row)]
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Write the file; one that is killed meanwhile leaves the last one whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"header": self.header, "checks": self.checks, "rows": self.rows}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(_LISTS.sub(_one_line, json.dumps(content, indent=1)) + "\n")
        temporary.replace(self.path)


def restart(path: Path, budget_left_s: float) -> None:
    """Replace this process by one that goes on after the last row; a lost device needs that."""
    arguments = [a for a in sys.argv[1:] if a != "--resume"]
    while "--budget-s" in arguments:
        at = arguments.index("--budget-s")
        del arguments[at : at + 2]
    arguments = [a for a in arguments if not a.startswith("--budget-s=")]
    print(f"the device is lost: starting again, {path} is kept", file=sys.stderr, flush=True)
    budget = ["--budget-s", str(max(1, int(budget_left_s)))]
    os.execv(sys.executable, [sys.executable, sys.argv[0], *arguments, *budget, "--resume"])
