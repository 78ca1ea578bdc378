"""Models of the gallery that are not transformers': PyTorch's own modules, x-transformers, timm.

A library that is not installed, or does not import, has no models here; ``missing`` says why.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTH = 24
WIDTH, HEADS = 64, 4
TOKENS = 99


@dataclass(frozen=True)
class Subject:
    """A model and what it is called with.

    Args:
        build: Makes it, with random weights.
        inputs: Makes its keyword arguments.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` of one sequence, weights not asked for or not used."""

    def __init__(self, need_weights: bool = False):
        super().__init__()
        self.need_weights = need_weights
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class Wrapped(nn.Module):
    """Dynamo does not look into a module of PyTorch's own that is compiled in place."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class Decoding(nn.Module):
    """``nn.TransformerDecoder`` over a memory, with a causal mask."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.decoder(x, x.flip(1), tgt_mask=mask, tgt_is_causal=True)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return Wrapped(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def _without_fast_path(build: Callable[[], nn.Module]) -> Subject:
    def built() -> nn.Module:
        # The fused layer of evaluation would hide the attention.
        torch.backends.mha.set_fastpath_enabled(False)
        return build()

    return Subject(built, lambda: {"x": torch.randn(2, LENGTH, 16, generator=_generator())})


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


TORCH = {
    "torch.nn.MultiheadAttention": _without_fast_path(SelfAttention),
    "torch.nn.MultiheadAttention, weights unused": _without_fast_path(lambda: SelfAttention(True)),
    "torch.nn.TransformerEncoder": _without_fast_path(_encoder),
    "torch.nn.TransformerDecoder": _without_fast_path(Decoding),
}

# Options of x-transformers' layers; those of its attention begin with "attn_".
X_TRANSFORMERS = {
    "encoder": ("Encoder", {}),
    "encoder, SDPA": ("Encoder", {"attn_flash": True}),
    "decoder": ("Decoder", {}),
    "decoder, SDPA": ("Decoder", {"attn_flash": True}),
    "decoder, rotary": ("Decoder", {"rotary_pos_emb": True}),
    "decoder, xPos": ("Decoder", {"rotary_xpos": True}),
    "decoder, grouped keys": ("Decoder", {"attn_kv_heads": 2}),
    "decoder, grouped keys, SDPA": ("Decoder", {"attn_kv_heads": 2, "attn_flash": True}),
    "decoder, one key head": ("Decoder", {"attn_one_kv_head": True}),
    "decoder, l2-normalised q and k": ("Decoder", {"attn_qk_norm": True}),
    "decoder, RMS-normalised q and k": ("Decoder", {"attn_qk_rmsnorm": True}),
    "decoder, ALiBi": ("Decoder", {"alibi_pos_bias": True}),
    "decoder, ALiBi, SDPA": ("Decoder", {"alibi_pos_bias": True, "attn_flash": True}),
    "decoder, data-dependent ALiBi": ("Decoder", {"attn_data_dependent_alibi": True}),
    "encoder, T5 bias": ("Encoder", {"rel_pos_bias": True}),
    "decoder, T5 bias": ("Decoder", {"rel_pos_bias": True}),
    "decoder, dynamic bias": ("Decoder", {"dynamic_pos_bias": True}),
    "decoder, CoPE": ("Decoder", {"attn_use_cope": True}),
    "decoder, soft-capped scores": ("Decoder", {"attn_softclamp_logits": True}),
    "decoder, talking heads": (
        "Decoder",
        {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    ),
    "decoder, top-8 keys": ("Decoder", {"attn_sparse_topk": 8}),
    "decoder, hard": ("Decoder", {"attn_hard": True}),
    "decoder, sigmoid": ("Decoder", {"attn_sigmoid": True}),
    "decoder, l2 distance": ("Decoder", {"attn_l2_distance": True}),
    "decoder, window of 8": ("Decoder", {"attn_max_attend_past": 8}),
    "encoder, memory keys": ("Encoder", {"attn_num_mem_kv": 4}),
    "decoder, memory keys": ("Decoder", {"attn_num_mem_kv": 4}),
    "decoder, zero key": ("Decoder", {"attn_add_zero_kv": True}),
    "decoder, sinks": ("Decoder", {"attn_head_learned_sink": True}),
    "decoder, gated values": ("Decoder", {"attn_gate_values": True}),
    "decoder, scaled heads": ("Decoder", {"attn_head_scale": True}),
    "decoder, attention on attention": ("Decoder", {"attn_on_attn": True}),
    "decoder, value residual": ("Decoder", {"add_value_residual": True}),
    "decoder, score residual": ("Decoder", {"residual_attn": True}),
    "decoder, latent keys": ("Decoder", {"attn_use_latent_kv": True, "attn_dim_latent_kv": 16}),
    "decoder, tied layers": ("Decoder", {"weight_tie_layers": True}),
    "decoder, macaron": ("Decoder", {"macaron": True}),
    "decoder, shifted tokens": ("Decoder", {"shift_tokens": 1}),
    "decoder, selective": ("Decoder", {"attn_selective": True}),
    "decoder, laser": ("Decoder", {"attn_laser": True}),
}


def _x_transformer(kind: str, options: dict[str, Any]) -> Subject:
    def build() -> nn.Module:
        library = importlib.import_module("x_transformers")
        layers = getattr(library, kind)(dim=WIDTH, depth=2, heads=HEADS, **options)
        return library.TransformerWrapper(
            num_tokens=TOKENS, max_seq_len=64, attn_layers=layers, scaled_sinu_pos_emb=True
        )

    return Subject(build, _tokens)


def _padded(kind: str) -> Subject:
    def inputs() -> dict[str, Any]:
        mask = torch.ones(2, LENGTH, dtype=torch.bool)
        mask[0, -5:] = False
        return {**_tokens(), "mask": mask}

    return Subject(_x_transformer(kind, {}).build, inputs)


def _x_encoder_decoder() -> Subject:
    def build() -> nn.Module:
        library = importlib.import_module("x_transformers")
        shape = {"num_tokens": TOKENS, "depth": 2, "heads": HEADS, "max_seq_len": 64}
        sides = {f"{side}_{n}": x for side in ("enc", "dec") for n, x in shape.items()}
        return library.XTransformer(dim=WIDTH, **sides).decoder.net

    def inputs() -> dict[str, Any]:
        context = torch.randn(2, LENGTH, WIDTH, generator=_generator())
        return {**_tokens(), "context": context}

    return Subject(build, inputs)


def _x_vision() -> Subject:
    def build() -> nn.Module:
        library = importlib.import_module("x_transformers")
        layers = library.Encoder(dim=WIDTH, depth=2, heads=HEADS)
        return library.ViTransformerWrapper(image_size=32, patch_size=8, attn_layers=layers)

    return Subject(build, lambda: {"img": torch.randn(2, 3, 32, 32, generator=_generator())})


def _tokens() -> dict[str, Any]:
    return {"x": torch.randint(3, TOKENS, (2, LENGTH), generator=_generator())}


# Model -> options that make it small.
TWO = {"depth": 2}
TIMM = {
    "vit_tiny_patch16_224": TWO,
    "vit_base_patch16_siglip_224": {**TWO, "embed_dim": 192, "num_heads": 3},
    "vit_relpos_small_patch16_224": TWO,
    "vit_relpos_small_patch16_rpn_224": TWO,
    "vit_small_patch16_rope_224": TWO,
    "vit_small_patch16_dinov3": {**TWO, "img_size": 64},
    "vit_tiny_r_s16_p8_224": TWO,
    "vit_small_patch14_reg4_dinov2": {**TWO, "img_size": 56},
    "vit_wee_patch16_reg1_gap_256": TWO,
    "vit_pe_core_tiny_patch16_384": {**TWO, "img_size": 64},
    "flexivit_small": TWO,
    "samvit_base_patch16_224": {**TWO, "embed_dim": 192, "num_heads": 3, "global_attn_indexes": ()},
    "aimv2_large_patch14_224": {**TWO, "embed_dim": 192, "num_heads": 3},
    "deit_tiny_patch16_224": TWO,
    "deit_tiny_distilled_patch16_224": TWO,
    "deit3_small_patch16_224": TWO,
    "beit_base_patch16_224": {**TWO, "embed_dim": 192, "num_heads": 3},
    "beitv2_base_patch16_224": {**TWO, "embed_dim": 192, "num_heads": 3},
    "eva02_tiny_patch14_224": TWO,
    "naflexvit_base_patch16_gap": {**TWO, "embed_dim": 192, "num_heads": 3},
    "cait_xxs24_224": {**TWO, "depth_token_only": 1},
    "xcit_nano_12_p16_224": TWO,
    "convit_tiny": {**TWO, "local_up_to_layer": 1},
    "crossvit_tiny_240": {},
    "tnt_s_patch16_224": TWO,
    "visformer_tiny": {},
    "pit_ti_224": {},
    "volo_d1_224": {},
    "swin_tiny_patch4_window7_224": {"depths": (2, 1, 1, 1)},
    "swinv2_tiny_window8_256": {"depths": (2, 1, 1, 1)},
    "swinv2_cr_tiny_224": {"depths": (2, 1, 1, 1)},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "twins_pcpvt_small": {"depths": (1, 1, 1, 1)},
    "twins_svt_small": {"depths": (1, 1, 2, 1)},
    "nest_tiny": {},
    "coat_lite_tiny": {},
    "davit_tiny": {"depths": (1, 1, 1, 1)},
    "gcvit_xxtiny": {},
    "hiera_tiny_224": {"stages": (1, 1, 1, 1)},
    "mvitv2_tiny": {},
    "maxvit_pico_rw_256": {},
    "coatnet_pico_rw_224": {},
    "levit_128s": {},
    "efficientformer_l1": {},
    "efficientformerv2_s0": {},
    "efficientvit_m0": {},
    "efficientvit_b0": {},
    "tiny_vit_5m_224": {"depths": (1, 1, 1, 1)},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "edgenext_xx_small": {"depths": (1, 1, 2, 1)},
    "nextvit_small": {},
    "caformer_s18": {},
    "fastvit_sa12": {"layers": (1, 1, 1, 1)},
    "vitamin_small_224": {},
    "shvit_s1": {},
    "botnet26t_256": {},
    "halonet26t": {},
    "lambda_resnet26t": {},
}


def _timm(name: str, options: dict[str, Any]) -> Subject:
    def build() -> nn.Module:
        library = importlib.import_module("timm")
        return library.create_model(name, pretrained=False, num_classes=10, **options)

    def inputs() -> dict[str, Any]:
        library = importlib.import_module("timm")
        shape = library.get_pretrained_cfg(name).input_size
        side = options.get("img_size", shape[-1])
        return {"x": torch.randn(2, shape[0], side, side, generator=_generator())}

    return Subject(build, inputs)


def missing(library: str) -> str:
    """Return why a library cannot be used here, or nothing if it can."""
    try:
        importlib.import_module(library)
    except Exception as error:  # torchvision, of another PyTorch, ends in a RuntimeError
        return f"{library} does not import: {error}"
    return ""


def subjects() -> dict[str, Subject]:
    """Return name -> model of every library that is installed."""
    found = dict(TORCH)
    if not missing("x_transformers"):
        found |= {f"x-transformers {n}": _x_transformer(*x) for n, x in X_TRANSFORMERS.items()}
        found["x-transformers encoder, padded"] = _padded("Encoder")
        found["x-transformers decoder, padded"] = _padded("Decoder")
        found["x-transformers decoder over an encoder"] = _x_encoder_decoder()
        found["x-transformers vision"] = _x_vision()
    if not missing("timm"):
        found |= {f"timm {name}": _timm(name, options) for name, options in TIMM.items()}
    return found
