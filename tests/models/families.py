"""Tiny random models of the families that the compiler must handle, and inputs for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

VOCABULARY = 64
LENGTH = 24
HF_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "intermediate_size": 48,
}
GROUPED = {**HF_SHAPE, "num_key_value_heads": 2}
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}


@dataclass(frozen=True)
class Family:
    """A model family.

    Args:
        name: For test ids.
        build: attn_implementation -> model.
        rewritten: Paths of the attentions that FlashEVA replaces (evaluation mode).
        left_full: Path -> part of the reason, for those it must leave.
        kind: Which inputs it takes: "tokens", "pixels" or "encoder-decoder".
    """

    name: str
    build: Callable[[str], nn.Module]
    rewritten: tuple[str, ...]
    left_full: tuple[tuple[str, str], ...] = ()
    kind: str = "tokens"

    def __str__(self) -> str:
        return self.name

    def inputs(self, *, padded: bool, length: int = LENGTH) -> dict[str, torch.Tensor]:
        """Return inputs; padded ones have left padding in the first row."""
        generator = torch.Generator().manual_seed(7)
        if self.kind == "pixels":
            return {"pixel_values": torch.randn(2, 3, 56, 56, generator=generator)}
        ids = torch.randint(3, VOCABULARY, (2, length), generator=generator)
        inputs = {"input_ids": ids}
        if padded:
            mask = torch.ones(2, length, dtype=torch.long)
            mask[0, :5] = 0
            inputs["attention_mask"] = mask
        if self.kind == "encoder-decoder":
            inputs["decoder_input_ids"] = ids.flip(1)
        return inputs


def _hf(model: str, config: str, **fields: Any) -> Callable[[str], nn.Module]:
    def build(implementation: str) -> nn.Module:
        torch.manual_seed(3)
        built = getattr(hf, model)._from_config(
            getattr(hf, config)(**fields), attn_implementation=implementation
        )
        return _louder(built)

    return build


def _louder(model: nn.Module) -> nn.Module:
    """Scale the weights up: at initialisation attention is so flat that a wrong mask hides."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not any(part in name for part in ("embed", "wte", "lm_")):
                parameter.mul_(6.0)
    return model


def _layers(pattern: str, *numbers: int) -> tuple[str, ...]:
    return tuple(pattern.format(n) for n in numbers)


class NanoAttention(nn.Module):
    """Attention as nanoGPT writes it: packed qkv, a tril buffer, masked_fill."""

    def __init__(self, implementation: str, dim: int = 32, heads: int = 4, length: int = 64):
        super().__init__()
        self.heads, self.flash = heads, implementation == "sdpa"
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.register_buffer("bias", torch.tril(torch.ones(length, length))[None, None])

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.heads, C // self.heads).transpose(1, 2)
            for part in self.c_attn(x).split(C, dim=2)
        )
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class NanoBlock(nn.Module):
    def __init__(self, implementation: str):
        super().__init__()
        self.ln, self.attn, self.mlp = (
            nn.LayerNorm(32),
            NanoAttention(implementation),
            nn.Linear(32, 32),
        )

    def forward(self, x):
        x = x + self.attn(self.ln(x))
        return x + self.mlp(x).relu()


class NanoGPT(nn.Module):
    def __init__(self, implementation: str = "sdpa", layers: int = 2):
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, 32)
        self.wpe = nn.Embedding(64, 32)
        self.h = nn.ModuleList(NanoBlock(implementation) for _ in range(layers))
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, input_ids):
        x = self.wte(input_ids) + self.wpe.weight[: input_ids.shape[1]]
        for block in self.h:
            x = block(x)
        return self.head(x)


def nano_gpt(implementation: str) -> nn.Module:
    torch.manual_seed(3)
    return _louder(NanoGPT(implementation))


_T5_BIAS = "additive position bias"
_CROSS = "cross-attention"

FAMILIES = (
    Family(
        "llama",
        _hf("LlamaForCausalLM", "LlamaConfig", **GROUPED),
        _layers("model.layers.{}.self_attn", 0, 1),
    ),
    Family(
        "qwen3",
        _hf("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=8),
        _layers("model.layers.{}.self_attn", 0, 1),
    ),
    Family(
        "mistral",
        _hf("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=None),
        _layers("model.layers.{}.self_attn", 0, 1),
    ),
    Family(
        "gemma3",
        _hf(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **GROUPED,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        ("model.layers.1.self_attn",),
        (("model.layers.0.self_attn", "the model's own sliding window"),),
    ),
    Family(
        "gpt2",
        _hf(
            "GPT2LMHeadModel",
            "GPT2Config",
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=VOCABULARY,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        _layers("transformer.h.{}.attn", 0, 1),
    ),
    Family(
        "gpt_neox",
        _hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **HF_SHAPE),
        _layers("gpt_neox.layers.{}.attention", 0, 1),
    ),
    Family(
        "opt",
        _hf(
            "OPTForCausalLM",
            "OPTConfig",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            ffn_dim=48,
            dropout=0.0,
            word_embed_proj_dim=32,
        ),
        _layers("model.decoder.layers.{}.self_attn", 0, 1),
    ),
    Family(
        "bert",
        _hf("BertForMaskedLM", "BertConfig", **HF_SHAPE, **NO_DROPOUT),
        _layers("bert.encoder.layer.{}.attention.self", 0, 1),
    ),
    Family(
        "vit",
        _hf(
            "ViTForImageClassification",
            "ViTConfig",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=56,
            patch_size=8,
            **NO_DROPOUT,
        ),
        _layers("vit.layers.{}.attention", 0, 1),
        kind="pixels",
    ),
    Family(
        "t5",
        _hf(
            "T5ForConditionalGeneration",
            "T5Config",
            d_model=32,
            num_layers=2,
            num_heads=4,
            d_kv=8,
            vocab_size=VOCABULARY,
            d_ff=48,
            dropout_rate=0.0,
        ),
        (),
        (
            *((path, _T5_BIAS) for path in _layers("encoder.block.{}.layer.0.SelfAttention", 0, 1)),
            *((path, _T5_BIAS) for path in _layers("decoder.block.{}.layer.0.SelfAttention", 0, 1)),
            *((path, _CROSS) for path in _layers("decoder.block.{}.layer.1.EncDecAttention", 0, 1)),
        ),
        kind="encoder-decoder",
    ),
    Family("nanogpt", nano_gpt, _layers("h.{}.attn", 0, 1)),
)
BY_NAME = {family.name: family for family in FAMILIES}


def logits_of(output: Any) -> torch.Tensor:
    """Return the logits of whatever a model returns."""
    return output if isinstance(output, torch.Tensor) else output.logits
