"""Tiny causal language models of every architecture, with what each needs beyond being small."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.models.gallery_models import PARAMETERS, make_small

SHARPER = 4
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ROPE_3D = {**ROPE, "mrope_section": [1, 1, 2]}
GEMMA4 = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "vocab_size_per_layer_input": 99,
    "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "pad_token_id": 0,
}
# Two layers read the keys of others, as in the smaller released models.
GEMMA3N = {
    **{name: GEMMA4[name] for name in GEMMA4 if name not in ("global_head_dim", "layer_types")},
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "full", "sliding", "full")],
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0] * 5,
}
QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
# Constructor arguments of configurations that are not complete, or not sound, by default.
GIVEN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 99,
        "encoder_config": {"hidden_size": 32, "hidden_size_global": 32, "num_attention_heads": 4},
        "decoder_config": {"hidden_size": 32, "hidden_size_global": 32, "num_attention_heads": 4},
        "global_config": {"hidden_size": 32, "num_attention_heads": 4},
        "patch_in_forward": False,
    },
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), ROPE_3D)
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": GEMMA3N,
    "gemma4": {"text_config": GEMMA4},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "hrm_text": {"num_layers_per_stack": 1},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "n_mamba_heads": 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_hidden_layers": 2},
}
# Sizes that have to fit those of the gallery; set where the configuration has them.
FITTING = {
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "n_group": 1,
    "topk_group": 1,
    "rotary_dim": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    # Windows shorter than the prompt, so that what keeps them shows it.
    "sliding_window": 8,
    "attention_window_size": 8,
    "attention_chunk_size": 8,
    "index_topk": 8,
}
SET: dict[str, dict[str, Any]] = {
    "gpt_neo": {"window_size": 8},
    "hrm_text": {"num_hidden_layers": 8},
    "mamba2": {"head_dim": 16},
    "mpt": {"use_cache": True},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"embedding_dim": 64, "hidden_size": 64, "num_blocks": 2, "qk_dim_factor": 1.0},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "num_key_value_heads": 4,
    },
}
# Not to be changed once they are made: their layers differ.
COMPLETE = ("gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")


def build_language_model(name: str, *, windows_off: bool = False) -> Any:
    """Build a tiny random causal language model that never ends a text by itself."""
    torch.manual_seed(0)
    config = _config(name)
    if windows_off:
        _turn_windows_off(config.get_text_config(decoder=True))
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters even when small")
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    _sharpen(model)
    return model


def _config(name: str) -> Any:
    config = CONFIG_MAPPING[name](**GIVEN.get(name, {}))
    if name in COMPLETE:
        return config
    make_small(config)
    _fit(config)
    for field, value in SET.get(name, {}).items():
        setattr(config, field, value)
    return config


def _fit(config: Any) -> None:
    for field, value in FITTING.items():
        present = field in config.attribute_map or field in vars(config)
        if present and isinstance(getattr(config, field, None), int):
            setattr(config, field, value)
    if isinstance(getattr(config, "kv_lora_rank", None), int):
        config.num_key_value_heads = config.num_attention_heads
    if getattr(config, "is_decoder", True) is False:
        config.is_decoder = True
    for part in vars(config).values():
        if isinstance(part, transformers.PretrainedConfig):
            _fit(part)


def _turn_windows_off(config: Any) -> None:
    """Configure full attention, as later versions of some models do."""
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * len(config.layer_types)
    else:
        config.sliding_window = None


@torch.no_grad()
def _sharpen(model: nn.Module) -> None:
    """Enlarge matrices: at their random initialisation attention is close to a plain mean."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(SHARPER)
