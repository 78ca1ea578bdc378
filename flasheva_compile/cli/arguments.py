"""The arguments of every command, and how a wrong one is said."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from flasheva_compile.evaluation.suite import TASKS, EvaluationOptions
from flasheva_compile.quantization.formats import FORMATS

_MODEL = "folder of a transformers model, or a GGUF file"
CONFIGURED = "configured"
"""In the place of a format: what the configuration says."""

_CONFIG = (
    'JSON, or a file of it: {"window_size": 256, "chunk_size": 16} or {"default": ..., "0": "full"}'
)
_DATA = "text files, UTF-8"


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        sys.stderr.write(f"{self.prog}: {message}; see {self.prog} --help\n")
        raise SystemExit(2)


def command_parser() -> Parser:
    """Return the parser of ``flasheva``."""
    parser = Parser(prog="flasheva", description="FlashEVA attention for local language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _explain(commands.add_parser("explain", help="what becomes of every attention of a model"))
    _calibrate(
        commands.add_parser(
            "calibrate", help="prepare a model, or codes for its cache, without training"
        )
    )
    _adapt(commands.add_parser("adapt", help="train a model to do with FlashEVA what it did"))
    _eval(commands.add_parser("eval", help="perplexity, retrieval, agreement"))
    return parser


def _explain(parser: Parser) -> None:
    _add_model(parser, "auto")
    parser.add_argument("--config", metavar="JSON", help=_CONFIG)
    _add_count(parser, "--length", 8192, "that costs are given for [tokens]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    what = "registers, shared memory and spills of every kernel, for sm_80, sm_90, gfx942 ..."
    parser.add_argument("--kernels", nargs="?", const="sm_90", metavar="TARGET", help=what)
    what = "write the kernels' sources there, a file each; with --kernels"
    parser.add_argument("--sources", type=Path, metavar="DIR", help=what)
    parser.set_defaults(memory="try --device cpu or --dtype bf16")


def _calibrate(parser: Parser) -> None:
    _add_model(parser, "auto")
    _add_text(parser, required=True)
    parser.add_argument("--config", metavar="JSON", help=_CONFIG)
    what = "new folder; not needed with --kv, which then adds codebooks to MODEL"
    parser.add_argument("--out", type=Path, metavar="DIR", help=what)
    what = f"learn codebooks for the cache of full layers: {', '.join(FORMATS)}; or several with "
    what += "commas between them, of which each layer gets the one that suits it; or "
    what += f"{CONFIGURED!r}: what the configuration says of each layer"
    parser.add_argument("--kv", type=_formats, metavar="FORMAT[,...]", help=what)
    what = "stored bits per element that layers may have on average; with several formats"
    parser.add_argument("--kv-bits", type=float, metavar="BITS", help=what)
    _add_count(parser, "--length", 2048, "of a row [tokens]")
    _add_count(parser, "--batch-size", 1, "rows at a time")
    _add_count(parser, "--rows", 8, "at most as many rows of text are read")
    what = "of a row that codebooks are learned from [tokens], default: the most, up to "
    what += "8192, of which the text fills --rows; codes fit texts of up to this length best"
    parser.add_argument("--kv-length", type=_positive, metavar="N", help=what)
    what = "learn selectors by bounds, too, for contexts of up to N tokens, from rows of that "
    what += "length (--length) alone"
    parser.add_argument("--context-length", type=_positive, metavar="N", help=what)
    what = "learn codebooks for every kv head, instead of one for all of a layer"
    parser.add_argument("--kv-per-head", action="store_true", help=what)


def _adapt(parser: Parser) -> None:
    _add_model(parser, "fp32")
    _add_text(parser, required=True)
    add = parser.add_argument
    add("--config", metavar="JSON", help=_CONFIG)
    add("--out", type=Path, required=True, metavar="DIR", help="new folder")
    add("--recipe", choices=("distill", "paper"), default="distill", help="default: %(default)s")
    add("--keep-full", type=_natural, default=0, metavar="N", help="layers that stay full")
    placing = "which: what the text's loss says (measured, default), what it and pass keys say, "
    placing += "one layer beside the other (retrieval, slower), or evenly spread (periodic)"
    choices = ("measured", "retrieval", "periodic")
    add("--select", choices=choices, default="measured", help=placing)
    _add_count(parser, "--length", 2048, "of a row [tokens]")
    _add_count(parser, "--batch-size", 8, "rows of a step")
    _add_count(parser, "--steps", 600, "optimizer steps of all phases")
    _add_count(parser, "--save-every", 100, "steps between saved states")
    precisions = "of forward and backward passes; weights keep theirs"
    add("--precision", choices=("fp32", "bf16"), default="fp32", help=precisions)
    add("--seed", type=int, default=0, help="of the order of rows")
    add("--resume", action="store_true", help="go on where an interrupted run into DIR stopped")


def _eval(parser: Parser) -> None:
    parser.add_argument("model", type=Path, metavar="DIR", help="adapted model; else --full")
    _add_where(parser, "auto")
    _add_text(parser, required=False)
    add, default = parser.add_argument, EvaluationOptions()
    tasks = "default: all that there is data for"
    add("--full", action="store_true", help="evaluate with full attention, adapted or not")
    add("--tasks", nargs="+", metavar="TASK", help=f"of {', '.join(TASKS)}; {tasks}")
    add("--items", type=Path, metavar="FILE", help="JSON lines of context, question, answer")
    help_ = "of windows and prompts [tokens], default: 1024"
    add("--lengths", nargs="+", type=_positive, default=[1024], metavar="N", help=help_)
    help_ = "sizes of the lists of recall, default: 4 16 64"
    add("--pairs", nargs="+", type=_positive, default=list(default.pairs), metavar="N", help=help_)
    _add_count(parser, "--samples", default.samples, "prompts per length, or size of list")
    _add_count(parser, "--windows", default.windows, "at most as many windows of text per length")
    _add_count(parser, "--new-tokens", default.new_tokens, "tokens to compare in agreement")
    _add_count(parser, "--batch-size", default.batch_size, "rows at a time")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    memory = "lower --batch-size (now {batch_size}) or --lengths (now {lengths})"
    parser.set_defaults(memory=memory)


def _add_model(parser: Parser, dtype: str) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help=_MODEL)
    _add_where(parser, dtype)


def _add_where(parser: Parser, dtype: str) -> None:
    add, dtypes = parser.add_argument, ("auto", "fp32", "bf16", "fp16")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--dtype", choices=dtypes, default=dtype, help="of the weights, default: %(default)s")
    add("--tokenizer", type=Path, metavar="DIR", help="default: the model's own")


def _add_text(parser: Parser, *, required: bool) -> None:
    add: Any = parser.add_argument
    add("--data", nargs="+", type=Path, required=required, default=[], metavar="TEXT", help=_DATA)
    memory = "lower --batch-size (now {batch_size}) or --length (now {length})"
    parser.set_defaults(memory=memory)


def _add_count(parser: Parser, name: str, default: int, what: str) -> None:
    help_ = f"{what}, default: {default}"
    parser.add_argument(name, type=_positive, default=default, metavar="N", help=help_)


def _formats(text: str) -> tuple[str, ...]:
    """Read formats of a cache, commas between them."""
    names = tuple(text.split(","))
    if names == (CONFIGURED,):
        return names
    unknown = [name for name in names if name not in FORMATS]
    if unknown or len(set(names)) != len(names):
        what = "a format is named twice"
        if unknown:
            what = f"{unknown[0]!r} is not one of {', '.join(FORMATS)}"
        raise argparse.ArgumentTypeError(what)
    return names


def _positive(text: str) -> int:
    return _integer(text, 1)


def _natural(text: str) -> int:
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be an integer >= {least}, got {text!r}")
    return int(text)
