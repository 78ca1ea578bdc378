"""Models of the gallery that are transformers': every base or language model, tiny and random."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

if TYPE_CHECKING:
    from torch import nn

PARAMETERS, LENGTH = 40_000_000, 24
SMALL = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "embed_dim": 32,
    "encoder_hidden_size": 32,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "d_ff": 64,
    "d_inner": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 99,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "num_mel_bins": 16,
}

# Of every way to write attention at least one; for comparing versions.
REPRESENTATIVE = (
    *("albert", "bart", "beit", "bert", "big_bird", "bloom", "canine", "clip_text_model"),
    *("cohere2", "cpmant", "deberta-v2", "deit", "dinov3_vit", "distilbert", "donut-swin"),
    *("electra", "falcon", "fsmt", "gemma", "gemma2", "gemma3_text", "git", "glm4", "gpt2"),
    *("gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "granitemoe", "ibert", "imagegpt", "led"),
    *("levit", "llama", "llama4_text", "longformer", "longt5", "mamba", "marian", "minimax"),
    *("mistral", "mixtral", "mllama", "mobilebert", "mobilevit", "modernbert", "mpnet", "mpt"),
    *("nystromformer", "olmo2", "openai-gpt", "opt", "paligemma", "pegasus_x", "phi3"),
    *("prophetnet", "pvt", "qwen2", "qwen3_moe", "qwen3_next", "recurrent_gemma", "roformer"),
    *("sam_vision_model", "segformer", "sew-d", "squeezebert", "starcoder2", "swin", "swinv2"),
    *("t5", "vit", "wav2vec2", "wavlm", "whisper", "xglm", "xlm", "xlnet", "yolos"),
)


def architectures() -> list[str]:
    """Return the model types that have a base model."""
    return sorted(set(MODEL_MAPPING_NAMES) & set(CONFIG_MAPPING))


def make_small(config: Any) -> None:
    """Shrink a configuration and those inside it, as far as it has the fields."""
    stages = any(isinstance(vars(config).get(n), list | tuple) for n in ("num_heads", "depths"))
    for name, value in ({} if stages else SMALL).items():
        present = name in config.attribute_map or name in vars(config)
        if present and isinstance(getattr(config, name, None), int):
            setattr(config, name, value)
    for name in ("layer_types", "mlp_layer_types", "block_types", "layers_block_type"):
        kinds = vars(config).get(name)
        if isinstance(kinds, list) and kinds:
            setattr(config, name, list(dict.fromkeys(kinds))[:2] * 2)
            setattr(config, name, getattr(config, name)[:2])
    for part in vars(config).values():
        if isinstance(part, transformers.PretrainedConfig):
            make_small(part)


def build(name: str) -> nn.Module:
    """Build a tiny random model in evaluation mode."""
    config = CONFIG_MAPPING[name]()
    make_small(config)
    kind = AutoModelForCausalLM if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModel
    with torch.device("meta"):
        size = sum(p.numel() for p in kind.from_config(config).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters even when small")
    return kind.from_config(config).eval()


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """Guess the inputs from what the model calls its main one."""
    generator = torch.Generator().manual_seed(1)
    main, config = model.main_input_name, model.config
    if main == "pixel_values":
        side = getattr(config, "image_size", 32)
        side = side if isinstance(side, int) else side[0]
        channels = getattr(config, "num_channels", 3)
        return {main: torch.randn(2, channels, side, side, generator=generator)}
    if main == "input_values":
        return {main: torch.randn(2, 4000, generator=generator)}
    if main == "input_features":
        bins = getattr(config, "num_mel_bins", 16)
        return {main: torch.randn(2, bins, 2 * LENGTH, generator=generator)}
    given = {"input_ids": torch.randint(3, 99, (2, LENGTH), generator=generator)}
    if getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = given["input_ids"].flip(1)
    return given
