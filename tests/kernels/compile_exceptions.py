"""Kernels that spill, and why that is accepted; anything else that spills is a failure.

``python -m tests.kernels.compile_exceptions`` compiles everything and prints the table anew, with
the reasons of entries that stay.
"""

from __future__ import annotations

import sys

SPILLS: dict[str, dict[str, tuple[int, str]]] = {
    "sm_90": {
        "causal-bf16-d64-chunk_tokens": (16, "untuned: the schedule is a first guess"),
        "causal-bf16-d64-dkv": (32, "untuned: the schedule is a first guess"),
        "gqa-bf16-d128-chunk_tokens": (8, "untuned: the schedule is a first guess"),
        "gqa-bf16-d128-dkv": (1704, "untuned: the schedule is a first guess"),
        "padded-fp16-d128-dkv": (968, "untuned: the schedule is a first guess"),
        "packed-bf16-d64-chunk_tokens": (832, "untuned: the schedule is a first guess"),
        "fp32-d64-forward": (368, "untuned: the schedule is a first guess"),
        "fp32-d64-dkv": (312, "untuned: the schedule is a first guess"),
        "bf16-d256-dkv": (720, "untuned: the schedule is a first guess"),
    },
    "sm_80": {
        "causal-bf16-d64-chunk_tokens": (24, "untuned: the schedule is a first guess"),
        "causal-bf16-d64-forward": (408, "untuned: the schedule is a first guess"),
        "causal-bf16-d64-dq": (816, "untuned: the schedule is a first guess"),
        "causal-bf16-d64-dchunk": (128, "untuned: the schedule is a first guess"),
        "causal-bf16-d64-dsink": (184, "untuned: the schedule is a first guess"),
        "causal-bf16-d64-dkv": (1120, "untuned: the schedule is a first guess"),
        "whole-bf16-d64-forward": (352, "untuned: the schedule is a first guess"),
        "whole-bf16-d64-dkv": (864, "untuned: the schedule is a first guess"),
    },
    "sm_100": {
        "causal-bf16-d64-chunk_tokens": (296, "untuned: the schedule is a first guess"),
    },
    "gfx942": {
        "causal-bf16-d64-dq": (48, "untuned: the schedule is a first guess"),
        "causal-bf16-d64-dkv": (36, "untuned: the schedule is a first guess"),
    },
}
"""Target to kernel to bytes of local memory of a thread and the reason; with Triton 3.6.0."""


def render() -> str:
    from tests.kernels.test_offline_compile import MATRIX, used_by

    lines = []
    for target, names in MATRIX.items():
        rows = []
        for name in names:
            used = used_by(name, target)
            reason = SPILLS.get(target, {}).get(name, (0, "TODO: say why"))[1]
            if used.stack:
                rows.append(f'        "{name}": ({used.stack}, "{reason}"),')
            sys.stderr.write(f"{name}: {used}\n")
        lines += [f'    "{target}": {{', *rows, "    },"] if rows else []
    table = "\n".join(["SPILLS: dict[str, dict[str, tuple[int, str]]] = {", *lines, "}"])
    return table + "\n"


if __name__ == "__main__":
    print(render())
