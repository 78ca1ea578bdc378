"""Run a model as it is, in low and in double precision, and compiled; compare the three."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tests.models.families import logits_of
from tests.tolerance import assert_as_accurate_as_pytorch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

WHOLE = {"window_size": 64, "chunk_size": 8}  # the window covers every test sequence


@dataclass(frozen=True)
class Outcome:
    """Logits of the real tokens and the gradient of every parameter."""

    logits: torch.Tensor
    gradients: Mapping[str, torch.Tensor]


def run(call: Callable[..., Any], model: nn.Module, inputs: Mapping[str, Any]) -> Outcome:
    """Forward, loss over the real tokens, backward."""
    model.zero_grad()
    logits = real_tokens(logits_of(call(**inputs)), inputs)
    # A fixed random target: the gradient of a plain sum would forget most of the logits.
    target = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * target.to(logits)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Outcome(logits.detach(), gradients)


def real_tokens(logits: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Drop the positions of padding: nothing is promised about them."""
    mask = inputs.get("attention_mask")
    if mask is None or "decoder_input_ids" in inputs:
        return logits
    return logits[mask.bool()]


def in_double(model: nn.Module, inputs: Mapping[str, Any]) -> Outcome:
    """Run a copy of the model in double precision.

    With SDPA where the model has the choice: transformers' eager attention takes its softmax in
    single precision, where the mask of a double model overflows to NaN.
    """
    exact = copy.deepcopy(model).double()
    if hasattr(exact, "set_attn_implementation"):
        exact.set_attn_implementation("sdpa")
    doubled = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    return run(exact, exact, doubled)


def pytorchs_own(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Outcome, ...]:
    """Run the uncompiled model with each attention that PyTorch offers it."""
    outcomes = [run(model._call_impl, model, inputs)]
    if hasattr(model, "set_attn_implementation"):
        other = copy.deepcopy(model)
        now = model.config._attn_implementation
        other.set_attn_implementation({"sdpa": "eager", "eager": "sdpa"}[now])
        outcomes.append(run(other._call_impl, other, inputs))
    return tuple(outcomes)


def assert_as_accurate(
    actual: torch.Tensor, torchs: Sequence[torch.Tensor], exact: torch.Tensor
) -> None:
    """Apply the one tolerance; PyTorch's own error is that of the worse of its own results."""
    worst = max(torchs, key=lambda x: (x.double() - exact.double()).abs().max().item())
    assert_as_accurate_as_pytorch(
        [actual], lambda dtype: [exact if dtype == torch.float64 else worst], actual.dtype
    )


def assert_same_to_rounding(ours: Outcome, torchs: Sequence[Outcome], exact: Outcome) -> None:
    """Our error against double precision is at most about PyTorch's own in the same precision.

    Gradients are compared together: a key bias has gradient zero but for rounding.
    """
    assert_as_accurate(ours.logits, [o.logits for o in torchs], exact.logits)
    assert ours.gradients.keys() == exact.gradients.keys()
    assert_as_accurate(_flat(ours), [_flat(o) for o in torchs], _flat(exact))


def _flat(outcome: Outcome) -> torch.Tensor:
    return torch.cat([outcome.gradients[name].flatten() for name in sorted(outcome.gradients)])
