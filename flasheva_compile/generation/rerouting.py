"""Replace methods of attentions by those of their routes, and restore them."""

from __future__ import annotations

import types
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.routes import ROUTE, AttentionRoute, route_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn


def reroute(module: nn.Module, function: Callable[..., Any]) -> None:
    """Replace the route's method of one attention by ``function``, which takes the module first.

    Raises:
        ConfigError: Something else has replaced it.
    """
    route = route_of(module)
    assert route is not None
    if route.method in vars(module):
        raise ConfigError(
            f"its {route.method} was replaced on the instance",
            subject=type(module).__name__,
            hint="prepare the model before accelerate or others put hooks on it",
        )
    setattr(module, route.method, types.MethodType(function, module))
    setattr(module, ROUTE, route)


def restore(module: nn.Module) -> None:
    """Undo :func:`reroute`; of other modules, nothing changes."""
    route = vars(module).pop(ROUTE, None)
    if route is not None:
        del vars(module)[route.method]


def expect_restorable(model: nn.Module) -> None:
    """Refuse to restore what was wrapped since it was rerouted.

    Raises:
        ConfigError: The method of a rerouted attention is no longer ours.
    """
    for name, module in model.named_modules():
        route = vars(module).get(ROUTE)
        if route is not None and not _is_ours(vars(module).get(route.method)):
            raise ConfigError(
                f"its {route.method} was wrapped after the model was prepared",
                subject=name,
                hint="remove the wrapper first, such as accelerate's hooks",
            )


def _is_ours(method: Any) -> bool:  # noqa: ANN401
    function = getattr(method, "__func__", None)  # a copied model has methods of its own
    own = getattr(function, "__module__", None) == AttentionRoute.__module__
    return own and not hasattr(function, "__wrapped__")


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Let a model's rerouted attentions run their own methods for a while."""
    before = [
        (module, vars(module)[ROUTE], vars(module)[vars(module)[ROUTE].method])
        for module in model.modules()
        if ROUTE in vars(module)
    ]
    for module, _, _ in before:
        restore(module)
    try:
        yield
    finally:
        for module, route, method in before:
            setattr(module, route.method, method)
            setattr(module, ROUTE, route)
