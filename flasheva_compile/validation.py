"""The checks that every configuration value passes, and how their errors read."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flasheva_compile.errors import ConfigError

VERSION = 1  # of the plain dicts that configurations are stored as


def unknown(
    name: object, valid: Sequence[str], *, what: str, shown: Sequence[str] | None = None
) -> ConfigError:
    """Say that a name is unknown, which ones exist, and which was probably meant."""
    return ConfigError(
        f"unknown {what}; known: {', '.join(shown or valid)}",
        subject=str(name),
        hint=nearest(str(name), valid),
    )


def nearest(name: str, valid: Iterable[str]) -> str:
    """Suggest the valid name that looks most like this one, if one does."""
    near = difflib.get_close_matches(name, list(valid), n=1)
    return f'did you mean "{near[0]}"?' if near else ""


def expect_integer(name: str, value: object, least: int) -> None:
    """Refuse what is no integer (True is none) or too small."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"must be an integer >= {least}, got {value!r}", subject=name)


def expect_boolean(name: str, value: object) -> None:
    """Refuse what is not True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"must be True or False, got {value!r}", subject=name)


def expect_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse what is not one of the choices."""
    if value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices)
        hint = nearest(value, choices) if isinstance(value, str) else ""
        raise ConfigError(f"must be one of {listed}, got {value!r}", subject=name, hint=hint)


def expect_mapping(name: str, value: object) -> Mapping[Any, Any]:
    """Refuse what is no mapping."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"must be a dict, got {value!r}", subject=name)
    return value


def expect_version(fields: Mapping[Any, Any]) -> None:
    """Refuse what another version of this package has written."""
    version = fields.get("version", VERSION)
    if version != VERSION:
        raise ConfigError(
            f"must be {VERSION}, got {version!r}",
            subject="version",
            hint="a newer version of flasheva-compile may have written it",
        )


def load_json(text: str) -> Any:  # noqa: ANN401
    """Parse JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"is not JSON: {error}", subject="text") from None
