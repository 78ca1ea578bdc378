"""Run a model eagerly with its attention replaced by the reference: no compiler involved."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from flasheva_compile.kernels.reference.attention import eva_attention
from transformers import AttentionInterface, AttentionMaskInterface

from flasheva_compile.config import EvaConfig
from tests.models import families

NAME = "eva-reference"
_configs: dict[Any, EvaConfig | str] = {}


def reference_attention(q, k, v, config, *, causal, scale=None, key_mask=None):
    """Attend by the formula; ``config`` may be "full"."""
    if config == "full":
        config = EvaConfig(window_size=4096, chunk_size=16)
    out, _ = eva_attention(
        q,
        k,
        v,
        window_size=config.window_size,
        chunk_size=config.chunk_size,
        sink_tokens=config.sink_tokens,
        window=config.window,
        chunk_rule=config.chunk_rule,
        causal=causal,
        scale=scale,
        key_mask=key_mask,
    )
    return out


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    config = _configs[module]
    if getattr(module, "sliding_window", None):
        return AttentionInterface()["sdpa"](
            module, query, key, value, _sliding_mask(module, query, attention_mask), scaling=scaling
        )
    causal = getattr(module, "is_causal", True)
    out = reference_attention(
        query, key, value, config, causal=causal, scale=scaling, key_mask=attention_mask
    )
    return out.transpose(1, 2).contiguous(), None


def _sliding_mask(module, query, key_mask):
    position = torch.arange(query.shape[2])
    distance = position[:, None] - position[None]
    allowed = (distance >= 0) & (distance < module.sliding_window)
    return allowed[None, None] if key_mask is None else allowed & key_mask[:, None, None]


def _key_mask(*args, attention_mask=None, **kwargs):
    return None if attention_mask is None else attention_mask.bool()


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _key_mask)


@contextmanager
def with_reference(model, choose):
    """Within: ``model`` attends by the reference, with ``choose(path)`` for each attention."""
    paths = {module: path for path, module in model.named_modules()}
    if not hasattr(model, "set_attn_implementation"):
        with mock.patch.object(families.NanoAttention, "forward", _nano_forward(paths, choose)):
            yield model
        return
    before = model.config._attn_implementation
    _configs.update({module: choose(path) for module, path in paths.items()})
    model.set_attn_implementation(NAME)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)
        _configs.clear()


def _nano_forward(paths, choose):
    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.heads, C // self.heads).transpose(1, 2)
            for part in self.c_attn(x).split(C, dim=2)
        )
        config = choose(paths[self])
        y = reference_attention(q, k, v, config, causal=True, scale=1 / math.sqrt(k.size(-1)))
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))

    return forward
