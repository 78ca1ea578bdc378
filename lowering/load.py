"""From source text to a callable: a file in the cache directory, imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flasheva_compile.lowering.direct_launch import direct
from flasheva_compile.lowering.emit.module import emit

if TYPE_CHECKING:
    from collections.abc import Callable

    from flasheva_compile.lowering.spec import GeneratedKernel, KernelSpec, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedKernel:
    """A kernel that can be launched.

    Attributes:
        generated: Where it comes from.
        path: The file that was imported.
        launch: ``launch(programs, *arguments)``, arguments in the order of ``generated.arguments``.
        function: The Triton function, for inspection.
    """

    generated: GeneratedKernel
    path: Path
    launch: Callable[..., None]
    function: Any


def cache_directory() -> Path:
    """Return where generated sources are kept: ``FLASHEVA_CACHE_DIR`` or the user's cache."""
    root = os.environ.get("FLASHEVA_CACHE_DIR")
    base = Path(root) if root else Path.home() / ".cache" / "flasheva_compile"
    return base / f"triton-{importlib.metadata.version('triton')}"


@cache
def load(spec: KernelSpec, schedule: Schedule) -> LoadedKernel:
    """Generate, write and import a kernel; once per process."""
    generated = emit(spec, schedule)
    path = write(generated)
    name = f"flasheva_kernels.{generated.name}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None  # the path ends in .py
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    module_spec.loader.exec_module(module)
    function = getattr(module, spec.kind)
    launch = direct(module.launch, function)
    return LoadedKernel(generated=generated, path=path, launch=launch, function=function)


def write(generated: GeneratedKernel, directory: Path | None = None) -> Path:
    """Write the source atomically; its name holds its digest, so an existing file is the same."""
    directory = directory or cache_directory()
    path = directory / f"{generated.name}.py"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_text() == generated.source:
            return path
        with tempfile.NamedTemporaryFile("w", dir=directory, suffix=".tmp", delete=False) as file:
            file.write(generated.source)
    except OSError:  # a read-only home: the source is still needed as a file
        directory = Path(tempfile.mkdtemp(prefix="flasheva-"))
        return write(generated, directory)
    Path(file.name).replace(path)
    return path
