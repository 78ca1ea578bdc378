"""Kernels of one step that begin before the kernel in front of them ends (on sm_90).

A launch costs some microseconds, a short step not many more. A kernel that *leads* says at its
start that the next launch may be prepared; one that *follows* waits, before it reads or writes
anything, until all kernels in front of it are done and what they wrote is visible (programmatic
dependent launch). So results are those of launches one after the other, whoever runs in front.
"""

from __future__ import annotations

_CHAINS = (("decode", "decode_combine"), ("extend", "extend_append", "extend_combine"))
_LEADING = frozenset(kind for chain in _CHAINS for kind in chain[:-1])
_FOLLOWING = frozenset(kind for chain in _CHAINS for kind in chain[1:])
CHAINED = _LEADING | _FOLLOWING
"""Kinds of kernels that are launched one behind the other in a step of generation."""


def follows(kind: str) -> bool:
    """Whether a kernel is launched while the one in front of it runs."""
    return kind in _FOLLOWING


def prologue(kind: str) -> str:
    """Return what such a kernel begins with."""
    lines = []
    if kind in _FOLLOWING:
        lines += ["# The kernel in front may still run: nothing is read or written before its end."]
        lines += ["tl.extra.cuda.gdc_wait()"]
    if kind in _LEADING:
        lines += ["# The next kernel may be launched; it begins behind the end of this one."]
        lines += ["tl.extra.cuda.gdc_launch_dependents()"]
    return "".join(f"{line}\n" for line in lines)
