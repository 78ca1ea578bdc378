"""Where queries, keys and chunks stand, in kernel text.

Coordinates: in ``dense`` and ``padded`` rows, positions (a padded row is a dense one whose pointers
start at its first valid key); in ``packed`` rows, columns, with the first column of each query's
document in ``begin``. The rules are those of ``kernels/reference/visibility.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import KernelSpec


def window(spec: KernelSpec, i: str, lo: str, hi: str) -> list[str]:
    """Compute the window ``[lo, hi)`` of the queries at ``i``; scalars and vectors alike.

    ``keys`` is the number of keys in the coordinates; for ``packed`` rows ``i`` is a column and
    ``{lo}`` is relative to ``begin``.
    """
    w, c = spec.window_size, spec.chunk_size
    if spec.causal:
        position = f"({i} - begin)" if spec.documents == "packed" else i
        origin = "begin + " if spec.documents == "packed" else ""
        if spec.window == "sliding":
            first = f"tl.maximum({position} - {w - 1}, 0) // {c} * {c}"
        else:
            first = f"tl.maximum({position}, 0) // {w} * {w}"
        return [f"{lo} = {origin}{first}", f"{hi} = tl.minimum({i} + 1, keys)"]
    inside = f"tl.minimum(tl.maximum({i}, 0), tl.maximum(keys - 1, 0))"
    if spec.window == "block":
        return [f"{lo} = {inside} // {w} * {w}", f"{hi} = tl.minimum({lo} + {w}, keys)"]
    start = f"tl.minimum(tl.maximum({inside} - {w // 2}, 0), tl.maximum(keys - {w}, 0))"
    return [
        f"{lo} = {start}",
        f"{hi} = tl.minimum(({lo} + {w + c - 1}) // {c} * {c}, keys)",
        f"{lo} = {lo} // {c} * {c}",
    ]


def row_origin(spec: KernelSpec, *, values: bool = True) -> list[str]:
    """Define the coordinates of row ``b``: ``start``, ``keys``, ``slots``; shift the pointers."""
    if spec.documents != "padded":
        return []
    stop = "tl.load(stop_ptr + b)" if not spec.causal else "columns"
    lines = [
        "start = tl.load(start_ptr + b)",
        f"keys = tl.maximum({stop} - start, 0)",
        f"first_slot = start // {spec.chunk_size}",
        "slots = chunks - first_slot",
    ]
    return lines if values else lines[:1]


def seen_from(spec: KernelSpec, chunk: str) -> str:
    """Return the first position of a causal query that sees a chunk as a chunk token."""
    w, c = spec.window_size, spec.chunk_size
    if spec.window == "sliding":
        return f"({chunk} + 1) * {c} + {w - 1}"
    return f"tl.cdiv(({chunk} + 1) * {c}, {w}) * {w}"


def seen_until(spec: KernelSpec, key: str) -> str:
    """Return the position after the last causal query that has a key in its window."""
    w, c = spec.window_size, spec.chunk_size
    if spec.window == "sliding":
        return f"{key} // {c} * {c} + {c + w - 1}"
    return f"{key} // {w} * {w} + {w}"


def seen_before(spec: KernelSpec, chunk: str) -> str:
    """Return how many positions at a row's start see a chunk to their right (bidirectional)."""
    w, c = spec.window_size, spec.chunk_size
    if spec.window == "block":
        return f"{chunk} * {c} // {w} * {w}"
    return f"tl.where({chunk} * {c} >= {w}, {chunk} * {c} - {w - w // 2 - 1}, 0)"


def seen_after(spec: KernelSpec, chunk: str) -> tuple[str, str]:
    """Return the first position that sees a chunk to its left, and whether any does."""
    w, c = spec.window_size, spec.chunk_size
    if spec.window == "block":
        first = f"tl.cdiv(({chunk} + 1) * {c}, {w}) * {w}"
        return first, f"{first} < keys"
    return f"({chunk} + 1) * {c} + {w // 2}", f"({chunk} + 1) * {c} + {w} <= keys"
