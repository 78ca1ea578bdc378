"""What a layer's tensors must be: a tensor of another shape, dtype or sort may broadcast silently.

Each function returns what is wrong, to be put behind a tensor's name; "" = nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def numbers_misfit(x: Tensor, *shapes: tuple[int, ...], positive: bool = False) -> str:
    """Return why a tensor is not finite numbers of one of some shapes."""
    if not x.is_floating_point():
        return f"is {x.dtype}"
    if tuple(x.shape) not in shapes:
        return f"is {tuple(x.shape)}, not {' or '.join(map(str, dict.fromkeys(shapes)))}"
    if not bool((x.isfinite() & ((x > 0) | (not positive))).all()):
        return f"has numbers that are not {'positive' if positive else 'finite'}"
    return ""


def order_misfit(x: Tensor, heads: int, channels: int) -> str:
    """Return why a tensor is not an order of all channels for each head."""
    if x.dtype != torch.long:
        return f"is {x.dtype}"
    if tuple(x.shape) != (heads, channels):
        return f"is {tuple(x.shape)}, not {(heads, channels)}"
    every = torch.arange(channels, device=x.device).expand(heads, -1)
    return "" if torch.equal(x.sort(-1).values, every) else f"is no order of {channels} channels"
