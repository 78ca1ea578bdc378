"""Lead attentions through the AttentionInterface for the trial run, and compare what they return.

A replaced ``forward`` runs beside the class's own, over the same keys and values: if it caches or
returns anything else, the model is refused, for it would no longer be the same model.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.rerouting import reroute, restore
from flasheva_compile.generation.routes import CACHE_ARGUMENTS, route_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from flasheva_compile.generation.routes import AttentionRoute


@contextmanager
def rerouted(
    model: nn.Module, attention: Callable[..., Any], updates: list[tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """Lead a model's attentions through ``attention`` for a while.

    Args:
        model: Any model; attentions without a route stay as they are.
        attention: An attention function of the interface.
        updates: What the cache returned, appended at each of its updates.

    Raises:
        ConfigError: An attention's method was replaced, or, within, it is not as its route says.
    """
    routed = [(module, route) for module in model.modules() if (route := route_of(module))]
    try:
        for module, route in routed:
            own = route.method == "forward"
            reroute(
                module,
                _compared(route, attention, updates) if own else route.replace(attention),
            )
        yield
    finally:
        for module, _ in routed:
            restore(module)


def difference(ours: Tensor, own: Tensor, mask: Tensor | None) -> str:
    """Say how far two results ``[B, L, ...]`` are apart where a query attends anything.

    What is in the padding has no meaning. Empty if they agree.
    """
    if ours.shape != own.shape:
        return f"its attention returns {tuple(own.shape)}, not {tuple(ours.shape)}"
    error = (ours - own).abs().flatten(2)
    if mask is not None:
        error = error.masked_fill(~(mask[:, 0] == 0).any(-1, keepdim=True), 0)
    allowed = max(1e-4, 8 * torch.finfo(own.dtype).eps) * own.abs().max()
    if not error.max() <= allowed:
        return f"it computes something else than softmax attention (by {float(error.max()):.2g})"
    return ""


def _compared(
    route: AttentionRoute, attention: Callable[..., Any], updates: list[tuple[Tensor, Tensor]]
) -> Callable[..., Any]:
    """Return a ``forward`` that is the class's own, and compares ours with it."""
    replaced = route.replace(attention)

    def flasheva_trial(self: Any, *args: Any, **inputs: Any) -> Any:  # noqa: ANN401
        unknown = _named(type(self).forward) - route.inputs
        if unknown:
            raise _not_as_known(self, f"it takes {', '.join(sorted(unknown))}")
        alibi = route.alibi
        if alibi is not None and inputs.get(alibi.input) is None:
            alibi = None
        if alibi is not None and alibi.unrounded is not None:
            inputs = alibi.unrounded(self, inputs)
        before = len(updates)
        own = type(self).forward(self, *args, **inputs)
        cached = _Cached(updates[before:])
        ours = {
            name: cached if name in CACHE_ARGUMENTS and value is not None else value
            for name, value in inputs.items()
        }
        try:
            out, _ = replaced(self, *args, **ours)
        except ConfigError:
            raise
        except Exception as error:
            raise _not_as_known(self, str(error).strip().split("\n")[0]) from error
        mask = inputs.get("attention_mask")
        mask = mask if alibi is None else alibi.given_mask(mask)
        why = cached.difference() or difference(out, own[0], mask)
        if why:
            raise _not_as_known(self, why)
        return own

    return flasheva_trial


class _Cached:
    """Stands in for the cache: returns what the real one did, and compares what it was given."""

    def __init__(self, updates: list[tuple[Tensor, Tensor]]) -> None:
        self.left, self.why = updates, ""

    def update(self, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        """Return the keys and values that the class's own ``forward`` got."""
        result = self.left.pop(0)
        for new, known in zip((key, value), result, strict=True):
            last = known[:, :, -new.shape[2] :].transpose(1, 2)
            self.why = self.why or difference(new.transpose(1, 2), last, None)
        return result

    def difference(self) -> str:
        """Say what differs between the caches; empty if nothing does."""
        return "it updates its cache more than once" if self.left else self.why


def _named(function: Callable[..., Any]) -> set[str]:
    """Return the names of a function's parameters, without those of ``**kwargs``."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}


def _not_as_known(module: Any, why: str) -> ConfigError:  # noqa: ANN401
    return ConfigError(
        f"the forward of {type(module).__name__} is not as in the versions known: {why}",
        hint='use torch.compile(model, backend="flasheva")',
    )
