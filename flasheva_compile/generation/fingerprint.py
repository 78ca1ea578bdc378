"""Digests that tell whether something was made for this model."""

from __future__ import annotations

import hashlib
from itertools import chain
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

_SAMPLE = 64  # elements of each parameter that identify a model's weights


def fingerprint(model: nn.Module) -> str:
    """Return a digest of a model's parameter names, shapes, dtypes and of some of its weights.

    What ``calibrate`` learned for selectors counts, too.
    """
    digest = hashlib.sha256()
    learned = ((n, x) for n, x in model.named_buffers() if n.endswith(".flasheva.selector_weight"))
    for name, x in chain(model.named_parameters(), learned):
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        sample = x.detach().flatten()[:_SAMPLE].float().cpu()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """Return a digest that is the same for a model in fp32 and bf16, prepared or not.

    Weights count as bf16, and FlashEVA's own parameters not at all.
    """
    digest = hashlib.sha256()
    for name, x in model.named_parameters():
        if ".flasheva." not in name:
            digest.update(f"{name} {tuple(x.shape)}".encode())
            sample = x.detach().flatten()[:_SAMPLE].to(torch.bfloat16)
            digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()
