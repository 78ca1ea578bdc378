"""How ops of the namespace ``flasheva`` are registered: schema, code, shapes, gradient.

``torch.library.custom_op`` would do all of it, but checks every call for results that alias inputs:
0.3 ms for each op of a generated token. ``opcheck`` makes that check in the tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_ops = torch.library.Library("flasheva", "FRAGMENT")


def implements(name: str, schema: str) -> Callable[..., Any]:
    """Define ``flasheva::<name>`` and decorate its code, for all devices.

    Args:
        name: Without the namespace.
        schema: ``(arguments) -> results``, in PyTorch's schema language.
    """
    _ops.define(name + schema)
    return torch.library.impl(_ops, name, "CompositeExplicitAutograd")


def fakes(name: str) -> Callable[..., Any]:
    """Decorate the function that gives an op's results without their values."""
    return torch.library.register_fake(f"flasheva::{name}", lib=_ops)


def differentiates(
    name: str, gradient: Callable[..., Any], setup_context: Callable[..., Any]
) -> None:
    """Register the backward pass of an op; see ``torch.library.register_autograd``."""
    op = f"flasheva::{name}"
    torch.library.register_autograd(op, gradient, setup_context=setup_context, lib=_ops)
