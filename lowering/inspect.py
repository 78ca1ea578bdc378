"""Print a generated kernel and what it needs of a GPU; no GPU needed.

Run ``python -m flasheva_compile.lowering.inspect --help`` for the options, one for each field of
:class:`~flasheva_compile.lowering.spec.KernelSpec`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from flasheva_compile.lowering.emit.module import emit
from flasheva_compile.lowering.offline import TARGETS, resources
from flasheva_compile.lowering.schedule import choose, known_target
from flasheva_compile.lowering.schedule_retrieval import RETRIEVAL_KINDS
from flasheva_compile.lowering.schedule_retrieval_backward import RETRIEVAL_BACKWARD_KINDS
from flasheva_compile.lowering.spec import KernelSpec, Schedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flasheva_compile.lowering.offline import Resources

_CHOICES = {
    "dtype": ("bf16", "fp16", "fp32"),
    "window": ("sliding", "block", "whole"),
    "chunk_rule": ("mean", "tangent", "evabyte", "eva"),
}
_STARTING_POINT: dict[str, Any] = {
    "kind": "forward",
    "dtype": "bf16",
    "head_dim": 64,
    "chunk_size": 16,
    "window_size": 256,
}

_RETRIEVED = 8  # chunks, unless told


def describe(spec: KernelSpec, target: str, schedule: Schedule | None = None) -> str:
    """Return the source of a kernel and its resources on a target.

    Args:
        spec: What it computes.
        target: A key of :data:`~flasheva_compile.lowering.offline.TARGETS`.
        schedule: How it is tiled; None = the default for spec and target.

    Returns:
        Lines of text: the source as it is compiled, then what the target spends on it.
    """
    generated = emit(spec, schedule or choose(spec, known_target(target)))
    return generated.source + "\n" + summary(resources(generated, target)) + "\n"


def summary(used: Resources) -> str:
    """Return resources as one comment line."""
    limit = TARGETS[used.target].shared_limit
    matrix = f"{used.matrix_count} {used.matrix}" if used.matrix else "no matrix instruction"
    parts = [
        f"{used.registers} registers",
        f"{used.shared} of {limit} bytes of shared memory",
        f"{used.stack} bytes spilled" if used.stack else "no spills",
        matrix,
    ]
    return f"# {used.target}: " + ", ".join(parts)


def _add_fields(parser: argparse._ActionsContainer, owner: type, defaults: dict[str, Any]) -> None:
    hints = get_type_hints(owner)
    for field in dataclasses.fields(owner):
        flag, default = f"--{field.name.replace('_', '-')}", defaults.get(field.name, field.default)
        default = None if default is dataclasses.MISSING else default
        if hints[field.name] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
            continue
        number = hints[field.name] is int
        parser.add_argument(
            flag,
            type=int if number else str,
            default=default,
            choices=_CHOICES.get(field.name) or get_args(hints[field.name]) or None,
            metavar="N" if number else None,
        )


def _read(arguments: argparse.Namespace, owner: type) -> dict[str, Any]:
    return {field.name: getattr(arguments, field.name) for field in dataclasses.fields(owner)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flasheva_compile.lowering.inspect",
        description="Print the generated source of one kernel and its registers, shared memory "
        "and spills on a target. Needs no GPU.",
    )
    parser.add_argument("--target", choices=TARGETS, default="sm_90", help="default: %(default)s")
    spec = parser.add_argument_group("spec", "Fields of KernelSpec.")
    _add_fields(spec, KernelSpec, _STARTING_POINT)
    tiling = parser.add_argument_group("schedule", "Fields of Schedule; default: as chosen.")
    nothing = dict.fromkeys(field.name for field in dataclasses.fields(Schedule))
    _add_fields(tiling, Schedule, nothing)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse a command line and print a description."""
    parsed = _parser().parse_args(arguments)
    fields = _read(parsed, KernelSpec)
    fields["value_dim"] = fields["value_dim"] or fields["head_dim"]
    fields["key_mask"] = fields["key_mask"] or fields["documents"] == "padded"
    if fields["kind"] in RETRIEVAL_KINDS + RETRIEVAL_BACKWARD_KINDS:
        fields["selection_group"] = fields["selection_group"] or 1
        fields["retrieve_chunks"] = fields["retrieve_chunks"] or _RETRIEVED
    spec = KernelSpec(**fields)
    spec = spec.of_kind(spec.kind)
    given = {name: x for name, x in _read(parsed, Schedule).items() if x is not None}
    schedule = dataclasses.replace(choose(spec, known_target(parsed.target)), **given)
    sys.stdout.write(describe(spec, parsed.target, schedule))
    return 0


if __name__ == "__main__":
    sys.exit(main())
