"""The command ``flasheva``: explain, calibrate, adapt and evaluate models from local files."""

from flasheva_compile.cli.command import main

__all__ = ["main"]
