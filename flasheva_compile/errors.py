"""Every error that FlashEVA raises, one class per stage, each with its subject and the way out."""

from __future__ import annotations


class FlashEvaError(Exception):
    """Base of all errors raised by FlashEVA.

    Args:
        message: What is wrong, with the offending value.
        subject: What it is about: an option path or a module path.
        hint: What to do instead.
    """

    def __init__(self, message: str, *, subject: str = "", hint: str = "") -> None:
        self.message, self.subject, self.hint = message, subject, hint
        text = f"{subject}: {message}" if subject else message
        super().__init__(f"{text}. Hint: {hint}" if hint else text)


class ConfigError(FlashEvaError, ValueError):
    """A configuration value is unknown, malformed or in conflict with another."""


class CaptureError(FlashEvaError, RuntimeError):
    """A graph could not be analysed."""


class PlanError(FlashEvaError, RuntimeError):
    """``strict=True`` and an attention would have been left full."""


class RewriteError(FlashEvaError, RuntimeError):
    """An edit of the graph would have been invalid; a bug of ours."""


class LoweringError(FlashEvaError, RuntimeError):
    """An op has no implementation for these shapes, dtypes or device."""
