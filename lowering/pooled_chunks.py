"""How the chunk tokens of a call were made, for kernels that read or differentiate them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PooledChunks:
    """How the chunk tokens of a call were made, for attention and for the gradient of pooling.

    Attributes:
        rule: ``"mean"``, ``"tangent"``, ``"evabyte"`` or ``"eva"``.
        parameters: The rule's parameters.
        mass_k: ``[B, Hkv, C]`` fp32, log-mass of the softmax over keys; None for ``mean``.
        mass_v: The same of the softmax over values, where it is another.
        bias_columns: ``[B, Hkv, C, 16]`` bf16, biases over the call's scale as columns of keys, if
            pooling wrote them; for the forward pass alone, nobody keeps them.
    """

    rule: str
    parameters: tuple[Tensor, ...] = ()
    mass_k: Tensor | None = None
    mass_v: Tensor | None = None
    bias_columns: Tensor | None = None


def kernel_rule(rule: str, parameters: tuple[Tensor, ...] | list[Tensor]) -> str:
    """Return the rule that a kernel implements: without parameters ``tangent`` is ``mean``."""
    return "mean" if rule == "tangent" and not parameters else rule


def kept_masses(rule: str) -> tuple[bool, bool]:
    """Return which log-masses pooling keeps: of the keys' weights, of the values' own."""
    kept = {"mean": (False, False), "tangent": (True, False), "evabyte": (True, True)}
    return kept.get(rule, (False, True))


def with_vectors(pooled: PooledChunks, k: Tensor) -> PooledChunks:
    """Give ``evabyte`` without parameters vectors of zeros, which mean the same."""
    if pooled.rule != "evabyte" or pooled.parameters:
        return pooled
    zeros = k.new_zeros(k.shape[1], k.shape[3])
    return dataclasses.replace(pooled, parameters=(zeros, zeros))
