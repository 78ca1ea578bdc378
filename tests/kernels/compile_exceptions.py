"""Kernels that spill, and why that is accepted; anything else that spills is a failure.

``python -m tests.kernels.compile_exceptions`` compiles everything with the Triton that is installed
and prints the table anew: figures of other versions and the reasons of entries stay.
"""

from __future__ import annotations

import sys

import triton

VERSIONS = ("3.6", "3.9")
"""Triton versions that every kernel was compiled with; one between them may spill as either."""

_EPILOGUE = "after the loop, once per program: "
_POOLING = _EPILOGUE + "the sinks' sums and the gradient of pooling"
_BOUNDS = "loop bounds, kept from before the loops of a block until each begins"
_KEPT = "a few words kept from before the loops until after them"

FOUND: dict[str, dict[str, tuple[dict[str, int], str]]] = {
    "sm_90": {
        "causal-bf16-d64-forward": ({"3.9": 32}, _KEPT),
        "whole-bf16-d64-forward": ({"3.9": 32}, _KEPT),
        "gqa-bf16-d128-forward": ({"3.6": 8, "3.9": 32}, _KEPT),
        "padded-fp16-d128-forward": ({"3.6": 8, "3.9": 8}, _KEPT),
        "padded-bf16-d64-forward": ({"3.9": 32}, _BOUNDS),
        "bidirectional-bf16-d128-forward": ({"3.6": 8, "3.9": 24}, _BOUNDS),
        "bidirectional-fp16-d64-forward": ({"3.9": 48}, _BOUNDS),
        "causal-bf16-d64-dkv": ({"3.6": 112, "3.9": 80}, _POOLING),
        "gqa-bf16-d128-dkv": ({"3.6": 328, "3.9": 536}, _POOLING + "; bounds, once per query head"),
        "gqa-bf16-d128-dchunk": ({"3.9": 64}, _KEPT + "; loop bounds, once per query head"),
        "padded-fp16-d128-dkv": ({"3.6": 968, "3.9": 568}, _POOLING + "; one word in the loop"),
        "fp32-d256-dq": (
            {"3.6": 264, "3.9": 288},
            "in the loops: products without matrix instructions keep both rows",
        ),
        "bf16-d256-forward": ({"3.6": 16}, _KEPT),
        "bf16-d256-dkv": ({"3.6": 168, "3.9": 360}, _POOLING),
        "bf16-d64-e64-dkv": ({"3.6": 112, "3.9": 80}, _POOLING),
        "bf16-d72-e72-dkv": ({"3.6": 24, "3.9": 48}, _POOLING),
        "bf16-d80-e80-dkv": ({"3.6": 32, "3.9": 32}, _POOLING),
        "bf16-d96-e96-dkv": ({"3.6": 152, "3.9": 120}, _POOLING),
        "bf16-d112-e112-dkv": ({"3.6": 232, "3.9": 288}, _POOLING),
        "bf16-d128-e128-dkv": ({"3.6": 408, "3.9": 568}, _POOLING),
        "retrieval-bf16-d64-g4-forward": ({"3.6": 24, "3.9": 72}, _BOUNDS),
        "retrieval-bf16-d128-g4-block16-forward": ({"3.6": 16, "3.9": 8}, _BOUNDS),
        "retrieval-bf16-d128-g8-forward": ({"3.6": 32, "3.9": 16}, _BOUNDS),
        "mean0-dkv": ({"3.6": 32, "3.9": 40}, _POOLING),
        "tangent1-dkv": ({"3.6": 408, "3.9": 568}, _POOLING),
    },
    "sm_80": {
        "causal-bf16-d64-dkv": ({"3.6": 96, "3.9": 8}, _EPILOGUE + "the gradient of pooling"),
    },
}
"""Target to kernel to bytes of local memory of a thread, by version of Triton, and the reason."""


def installed() -> str:
    """Return the version of Triton as this table names it."""
    return ".".join(triton.__version__.split(".")[:2])


def allowed(target: str, name: str) -> tuple[int, int, str]:
    """Return between how many bytes a kernel may spill with this Triton, and why."""
    by_version, reason = FOUND.get(target, {}).get(name, ({}, ""))
    if installed() in VERSIONS:
        most = by_version.get(installed(), 0)
        return min(most, 1), most, reason if most else ""
    return 0, max(by_version.values(), default=0), reason


def render() -> str:
    from tests.kernels.test_offline_compile import MATRIX, used_by

    lines = []
    for target, names in MATRIX.items():
        # What only FLASHEVA_COMPILE=full compiles stays as it is.
        known = FOUND.get(target, {})
        table = {name: (dict(bytes_), why) for name, (bytes_, why) in known.items()}
        for name in names:
            used = used_by(name, target)
            bytes_, why = table.pop(name, ({}, "unexplained"))
            bytes_ = {n: spilt for n, spilt in bytes_.items() if n != installed()}
            if used.stack:
                bytes_[installed()] = used.stack
            if bytes_:
                table[name] = (bytes_, why)
            sys.stderr.write(f"{name}: {used}\n")
        rows = [f'        "{name}": ({spilt}, "{why}"),' for name, (spilt, why) in table.items()]
        lines += [f'    "{target}": {{', *rows, "    },"] if rows else []
    head = "FOUND: dict[str, dict[str, tuple[dict[str, int], str]]] = {"
    return "\n".join([head, *lines, "}"]) + "\n"


if __name__ == "__main__":
    print(render())
