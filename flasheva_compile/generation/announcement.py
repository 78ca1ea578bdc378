"""Which cache layer a call goes through: from the hook before an attention to the attention."""

from __future__ import annotations

import threading
from typing import Any

import torch

from flasheva_compile.errors import ConfigError


class Announcement:
    """A cache layer, or None, for the time of one call; of each thread its own.

    Threads may run one model at once, each with a cache of its own: what one announces, another
    must not take. Within a traced graph hook and attention run as one, and no thread is known. A
    copy holds nothing.
    """

    def __init__(self) -> None:
        self._of_threads: dict[int, Any] = {}
        self._traced: tuple[Any] | None = None

    def set(self, layer: Any) -> None:  # noqa: ANN401 - a cache layer
        """Announce what the attention takes next."""
        if torch.compiler.is_compiling():
            self._traced = (layer,)
        else:
            self._traced = None  # of a graph that broke off before the attention
            self._of_threads[threading.get_ident()] = layer

    def get(self) -> Any:  # noqa: ANN401
        """Return what was announced and not taken; None if nothing was."""
        if self._traced is not None:
            return self._traced[0]
        if not torch.compiler.is_compiling():
            return self._of_threads.get(threading.get_ident())
        # The hook ran before the graph, in a thread that a graph cannot name.
        if len(self._of_threads) > 1:
            message = "several threads run an attention that was compiled without its hooks"
            raise ConfigError(message, hint="compile the whole model, or run one thread at a time")
        return next(iter(self._of_threads.values()), None)

    def take(self) -> Any:  # noqa: ANN401
        """Return what :meth:`get` returns, and forget it."""
        layer = self.get()
        if self._traced is not None:
            self._traced = None
        elif torch.compiler.is_compiling():
            self._of_threads.clear()
        else:
            self._of_threads.pop(threading.get_ident(), None)
        return layer

    def __reduce__(self) -> tuple[type[Announcement], tuple[()]]:
        return Announcement, ()
