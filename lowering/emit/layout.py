"""Last touches on generated text: unread names are dropped, long lines are broken."""

from __future__ import annotations

import re

WIDTH = 100
_ASSIGNMENT = re.compile(r"\s*([A-Za-z_]\w*) (?:[-+*&]?=) ")


def without_unread(body: str) -> str:
    """Drop assignments to names that nothing else reads.

    Fragments define what their neighbours may need; what no neighbour needed is no part of the
    kernel.
    """
    lines = body.splitlines()
    while True:
        reads: dict[str, int] = {}
        for line in lines:
            match = _ASSIGNMENT.match(line)
            for word in set(re.findall(r"[A-Za-z_]\w*", line)):
                if match is None or word != match.group(1):
                    reads[word] = reads.get(word, 0) + 1
        kept = [
            line
            for line in lines
            if (match := _ASSIGNMENT.match(line)) is None or reads.get(match.group(1))
        ]
        if len(kept) == len(lines):
            return "\n".join(lines) + "\n"
        lines = kept


def wrapped(body: str, width: int = WIDTH) -> str:
    """Break lines that are too long at the commas or operators of their outermost expression."""
    lines: list[str] = []
    for line in body.splitlines():
        lines += _wrap(line, width)
    return "\n".join(lines) + "\n"


def _wrap(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()))
    return _at_operators(line, indent, width) or _at_commas(line, indent, width) or [line]


def _at_commas(line: str, indent: str, width: int) -> list[str]:
    """Break the arguments of the longest call that is not inside another one."""
    calls = [
        (stop - start, start, stop)
        for start, stop in _brackets(line)
        if len(_split(line[start + 1 : stop], ", ")) > 1
    ]
    if not calls:
        return []
    _, start, stop = max(calls)
    inner = indent + "    "
    lines = [line[: start + 1]]
    for item in _split(line[start + 1 : stop], ", "):
        lines += _wrap(f"{inner}{item},", width)
    return [*lines, f"{indent}{line[stop:]}"]


def _at_operators(line: str, indent: str, width: int) -> list[str]:
    """Break an assignment or a keyword argument at its ``+`` or ``&`` signs."""
    head, equals, value = line.partition("=" if re.match(r"\s*\w+=\S", line) else " = ")
    if not equals:
        return []
    comma = "," if value.endswith(",") else ""
    value = value.removesuffix(",")
    for operator in (" & ", " + "):
        terms = _split(value, operator)
        if len(terms) > 1:
            inner = indent + "    "
            lines = [f"{head}{equals}("]
            for number, term in enumerate(terms):
                sign = operator.lstrip() if number else ""
                lines += _wrap(f"{inner}{sign}{term}", width)
            return [*lines, f"{indent}){comma}"]
    return []


def _brackets(text: str) -> list[tuple[int, int]]:
    """Return the outermost round brackets as positions."""
    result, depth, start = [], 0, 0
    for at, sign in enumerate(text):
        if sign == "(":
            start = at if depth == 0 else start
            depth += 1
        elif sign == ")":
            depth -= 1
            if depth == 0:
                result.append((start, at))
    return result


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside brackets."""
    parts, depth, begin = [], 0, 0
    for at, sign in enumerate(text):
        depth += (sign in "([") - (sign in ")]")
        if depth == 0 and text.startswith(separator, at):
            parts.append(text[begin:at])
            begin = at + len(separator)
    return [*parts, text[begin:]]
