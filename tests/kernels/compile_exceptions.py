"""Kernels that spill, and why that is accepted; anything else that spills is a failure.

``python -m tests.kernels.compile_exceptions`` compiles everything and prints the table anew, with
the reasons of entries that stay.
"""

from __future__ import annotations

import sys

_EPILOGUE = "after the loop, once per program: "
_KEPT = "a few words kept from before the loops until after them"

SPILLS: dict[str, dict[str, tuple[int, str]]] = {
    "sm_90": {
        "causal-bf16-d64-dkv": (112, _EPILOGUE + "the sinks' sums and the gradient of pooling"),
        "gqa-bf16-d128-dkv": (112, "loop bounds, once per query head; one word in the loop"),
        "padded-fp16-d128-dkv": (
            968,
            _EPILOGUE + "the sinks' sums and the gradient of pooling; one word in the loop",
        ),
        "fp32-d256-dq": (264, "in the loops: products without matrix instructions keep both rows"),
        "bf16-d256-forward": (16, _KEPT),
        "bf16-d256-dkv": (712, _EPILOGUE + "the sinks' sums and the gradient of pooling"),
    },
    "sm_80": {
        "causal-bf16-d64-dkv": (96, _EPILOGUE + "the gradient of pooling"),
    },
}
"""Target to kernel to bytes of local memory of a thread and the reason; with Triton 3.6.0."""


def render() -> str:
    from tests.kernels.test_offline_compile import MATRIX, used_by

    lines = []
    for target, names in MATRIX.items():
        # What only FLASHEVA_COMPILE=full compiles stays as it is.
        known = SPILLS.get(target, {})
        found = {name: entry for name, entry in known.items() if name not in names}
        for name in names:
            used = used_by(name, target)
            if used.stack:
                found[name] = (used.stack, known.get(name, (0, "unexplained"))[1])
            sys.stderr.write(f"{name}: {used}\n")
        rows = [f'        "{name}": ({stack}, "{why}"),' for name, (stack, why) in found.items()]
        lines += [f'    "{target}": {{', *rows, "    },"] if rows else []
    table = "\n".join(["SPILLS: dict[str, dict[str, tuple[int, str]]] = {", *lines, "}"])
    return table + "\n"


if __name__ == "__main__":
    print(render())
