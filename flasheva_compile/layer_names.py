"""How a key of ``layers`` names attentions: by index, by module path, by glob.

A key that names no attention becomes an error that lists what exists.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from flasheva_compile.errors import ConfigError
from flasheva_compile.validation import nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_KNOWN_SHOWN = 8
_RANGE = re.compile(r"\{(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)\}")


@dataclass(frozen=True, slots=True)
class LayerName:
    """What one attention is called.

    Args:
        path: Its module path, as in ``model.named_modules()``.
        index: The first integer in the path, its place in a ``ModuleList``; None outside of one.
        count: How long that ``ModuleList`` is; None where ``index`` is.
    """

    path: str
    index: int | None = None
    count: int | None = None


def name_layers(paths: Iterable[str], module_names: Iterable[str]) -> tuple[LayerName, ...]:
    """Number module paths by the ``ModuleList`` they are in.

    Args:
        paths: Module paths of attentions.
        module_names: Every name of ``model.named_modules()``; gives the length of each list.

    Returns:
        One ``LayerName`` per path, in order.
    """
    numbered = {path: _first_integer(path) for path in paths}
    lengths: dict[str, int] = {}
    for parent, index in filter(None, map(_first_integer, [*module_names, *numbered])):
        lengths[parent] = max(lengths.get(parent, 0), index + 1)
    return tuple(
        LayerName(path, place[1], lengths[place[0]]) if place else LayerName(path)
        for path, place in numbered.items()
    )


def is_glob(key: str) -> bool:
    """Tell a glob from a module path."""
    return any(character in key for character in "*?[{")


def covers(key: int | str, layer: LayerName) -> bool:
    """Tell whether a key names this attention.

    A path or glob also names every module below it. In a glob ``*`` and ``?`` match any character,
    dots included, and ``{2-5,9}`` matches those integers.
    """
    if isinstance(key, int):
        if layer.index is None or layer.count is None:
            return False
        return layer.index == (key if key >= 0 else key + layer.count)
    above = _above(layer.path)
    if not is_glob(key):
        return key in above
    globs = _expand_ranges(key)
    return any(fnmatchcase(path, glob) for path in above for glob in globs)


def label(key: object) -> str:
    """Write a key of ``layers`` as its owner would index it."""
    return f'layers["{key}"]' if isinstance(key, str) else f"layers[{key!r}]"


def no_such_layer(key: int | str, known: Sequence[LayerName]) -> ConfigError:
    """Say that a key names nothing, what exists, and what was probably meant."""
    names = compress_names(layer.path for layer in known)
    rest = f" and {len(names) - _KNOWN_SHOWN} more" if len(names) > _KNOWN_SHOWN else ""
    message = f"matches no attention; known: {', '.join(names[:_KNOWN_SHOWN]) or 'none'}{rest}"
    counts = [layer.count for layer in known if layer.count]
    if isinstance(key, int):
        hint = f"indices run from {-max(counts)} to {max(counts) - 1}" if counts else ""
    else:
        paths = [path for layer in known for path in _above(layer.path)]
        inner = [path for path in paths if fnmatchcase(path, f"*.{key}")]
        wanted = f"*.{key}" if is_glob(key) else next(iter(inner), "")
        hint = f'did you mean "{wanted}"?' if inner else nearest(key, paths)
    return ConfigError(message, subject=label(key), hint=hint)


def compress_names(paths: Iterable[str]) -> list[str]:
    """Write numbered names as ranges: ``model.layers.{0-29}.self_attn``; usable as globs."""
    names = [tuple(path.split(".")) for path in paths]
    for place in reversed(range(max(map(len, names), default=0))):
        groups: dict[tuple[str, ...], list[int]] = {}
        for parts in names:
            if len(parts) > place and parts[place].isdigit():
                family = (*parts[:place], "{}", *parts[place + 1 :])
                groups.setdefault(family, []).append(int(parts[place]))
            else:
                groups.setdefault(parts, [])
        names = [
            (*family[:place], _ranges(found), *family[place + 1 :]) if found else family
            for family, found in groups.items()
        ]
    return [".".join(parts) for parts in names]


def _above(path: str) -> list[str]:
    """List the path and every module that it is inside of, outermost first."""
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _first_integer(path: str) -> tuple[str, int] | None:
    """Split off the first integer component: ("model.layers", 3), or None."""
    parts = path.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:place]), int(part)
    return None


def _ranges(numbers: Sequence[int]) -> str:
    """Write integers as ``{0-3,7}``, or a single one as itself."""
    found = sorted(set(numbers))
    runs = [
        [number for _, number in run]
        for _, run in itertools.groupby(enumerate(found), lambda pair: pair[1] - pair[0])
    ]
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if len(found) == 1 else "{" + text + "}"


def _expand_ranges(glob: str) -> list[str]:
    """Replace each ``{2-5,9}`` of a glob by its integers: one glob per combination."""
    pieces = _RANGE.split(glob)
    choices: list[list[str]] = [[piece] for piece in pieces]
    for place in range(1, len(pieces), 2):
        bounds = [run.split("-") for run in pieces[place].split(",")]
        choices[place] = [str(n) for b in bounds for n in range(int(b[0]), int(b[-1]) + 1)]
    return ["".join(combination) for combination in itertools.product(*choices)]
