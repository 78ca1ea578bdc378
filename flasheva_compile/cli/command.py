"""Run one command line: parse it, carry it out, say in one line what is wrong."""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

import torch

from flasheva_compile.cli.arguments import command_parser
from flasheva_compile.errors import FlashEvaError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

_MODULES = {"eval": "evaluate"}  # where a command has another name
_FAILED, _INTERRUPTED = 2, 130
# Where Linux's allocator says no, torch raises a RuntimeError of its own.
_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command ``flasheva``.

    Args:
        arguments: Of the command line; None = those of the process.

    Returns:
        The exit status: 0, or 2 with one line on stderr that says what is wrong.
    """
    # Local files alone: nothing is asked of a hub, whatever a model's configuration names.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        parsed = command_parser().parse_args(arguments)
    except SystemExit as end:  # --help, or a wrong argument; argparse has said which
        return int(end.code or 0)
    try:
        module = _MODULES.get(parsed.command, parsed.command)
        return import_module(f"flasheva_compile.cli.{module}").run(parsed)
    except FlashEvaError as error:
        return _fail(parsed, str(error))
    except ImportError as error:
        return _fail(parsed, f"{error}: pip install flasheva-compile[cli]")
    except OSError as error:
        return _fail(parsed, str(error))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _fail(parsed, f"out of memory: {parsed.memory.format(**vars(parsed))}")
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return _INTERRUPTED


def _fail(parsed: argparse.Namespace, message: str) -> int:
    line = " ".join(message.split())
    sys.stderr.write(f"flasheva {parsed.command}: {line}\n")
    return _FAILED


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error).lower() for words in _NO_MEMORY)
