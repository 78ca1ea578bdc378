"""How ops of the namespace ``flasheva`` are registered: schema, code, shapes, gradient.

``torch.library.custom_op`` would do all of it, but checks every call for results that alias inputs:
0.3 ms for each op of a generated token. ``opcheck`` makes that check in the tests.
"""

# ruff: noqa: ANN401 - the ops' functions are typed by their schemas
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile import _torch_compat as compat
from flasheva_compile.errors import LoweringError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_TWICE = "has no second derivative"
_ONCE = "differentiate without create_graph=True, or leave the attention full"

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
    """Register the backward pass of an op, as ``torch.library.register_autograd`` does.

    The op cannot be differentiated twice, which raises LoweringError, nor in forward mode.

    That function would look up the schema's arguments and take lists apart in every call: 0.2 ms of
    the host for each layer of a model.

    Args:
        name: An op whose positional arguments have no defaults, and are at most one ``Tensor[]``.
        gradient: Maps ``ctx`` and the gradients of the outputs to those of the inputs.
        setup_context: Saves for it; keywords ``ctx, inputs, keyword_only_inputs, output``.
    """
    op: Any = getattr(torch.ops.flasheva, name).default
    arguments = [x for x in op._schema.arguments if not x.kwarg_only]
    assert not any(x.has_default_value() for x in arguments)  # the dispatcher would drop them
    lists = [n for n, x in enumerate(arguments) if isinstance(x.type, torch.ListType)]
    assert len(lists) <= 1

    def flat(values: Sequence[Any]) -> list[Any]:
        listed = (values[n : n + 1] if n not in lists else values[n] for n in range(len(values)))
        return [x for group in listed for x in group]

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *call: Any) -> Any:
            keyset, args, options = call[-1]
            result = compat.below_autograd(op, keyset, args, options)
            setup_context(ctx=ctx, inputs=args, keyword_only_inputs=options, output=result)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():  # create_graph=True
                raise LoweringError(_TWICE, subject=f"flasheva::{name}", hint=_ONCE)
            return *flat(gradient(ctx, *grads)), None

    def differentiable(keyset: Any, *args: Any, **options: Any) -> Any:
        tensors = flat(args)
        trained = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in tensors
        )
        # Below autograd tangents would be lost; there they are refused.
        if trained or compat.in_forward_differentiation():
            return Differentiable.apply(*tensors, (keyset, args, options))
        return compat.below_autograd(op, keyset, args, options)

    _ops.impl(name, differentiable, "Autograd", with_keyset=True)
