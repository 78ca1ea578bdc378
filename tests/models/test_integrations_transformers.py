"""After register_with_transformers, transformers' own loading restores prepared models."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import flasheva_compile as fe
from flasheva_compile.errors import ConfigError
from tests.models.test_generate import HYBRIDS, SMALL, gpt_neox, llama, perturb, tokens

REGISTERED = """
import sys, torch
from transformers import AutoModelForCausalLM
import flasheva_compile as fe
fe.register_with_transformers()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""
WITHOUT_US = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="sdpa")
assert "flasheva_compile" not in sys.modules
"""


@pytest.fixture
def registered():
    fe.register_with_transformers()
    yield
    fe.unregister_from_transformers()


def saved(folder, config=SMALL, **options):
    model = fe.prepare(llama(), config)
    perturb(model)
    model.save_pretrained(folder, **options)
    return model


def test_transformers_restores_a_prepared_model_in_a_fresh_process(tmp_path):
    model = saved(tmp_path / "model", HYBRIDS["hybrid"], max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    torch.save(tokens(1, 40), tmp_path / "ids")
    paths = [str(tmp_path / name) for name in ("model", "ids", "logits")]
    subprocess.run([sys.executable, "-c", REGISTERED, *paths], check=True)
    assert torch.equal(torch.load(tmp_path / "logits"), model(tokens(1, 40)).logits)


def test_a_class_a_config_and_keywords_work_alike(tmp_path, registered):
    model, ids = saved(tmp_path), tokens(1, 40)
    want = model(ids).logits
    config = AutoConfig.from_pretrained(tmp_path)
    assert torch.equal(LlamaForCausalLM.from_pretrained(str(tmp_path))(ids).logits, want)
    again = AutoModelForCausalLM.from_pretrained(
        pretrained_model_name_or_path=tmp_path, config=config
    )
    assert torch.equal(again(ids).logits, want)
    eager = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(eager(ids).logits, want)
    assert fe.revert(eager).config._attn_implementation == "eager"
    low, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert low.dtype == torch.bfloat16
    assert low.model.layers[0].self_attn.flasheva.phi.dtype == torch.float32
    assert torch.equal(fe.from_pretrained(tmp_path)(ids).logits, want)


def test_the_model_without_its_head_is_restored_too(tmp_path, registered):
    model, ids = saved(tmp_path), tokens(1, 40)
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def llava():
    """A model whose modules have other names in checkpoints."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = LlavaConfig(vision_config=vision, text_config=llama().config)
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("build", [gpt_neox, llava])
def test_other_names_are_found(tmp_path, registered, build):
    model, ids = fe.prepare(build(), SMALL), tokens(1, 40)
    perturb(model)
    model.save_pretrained(tmp_path)
    for load in (type(model).from_pretrained, fe.from_pretrained):
        again = load(tmp_path)
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert again.config.flasheva == model.config.flasheva


def test_plain_checkpoints_load_unchanged(tmp_path, registered):
    llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model, "_flasheva_prepared")
    assert torch.equal(model(tokens(1, 40)).logits, llama()(tokens(1, 40)).logits)
    with pytest.raises(OSError, match="nowhere"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "nowhere")


def test_registering_is_idempotent_and_undoable(monkeypatch):
    from transformers import PreTrainedModel

    before = PreTrainedModel.from_pretrained.__func__
    fe.register_with_transformers()
    ours = PreTrainedModel.from_pretrained.__func__
    fe.register_with_transformers()
    assert PreTrainedModel.from_pretrained.__func__ is ours is not before
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "from_pretrained", classmethod(lambda cls: None))
        with pytest.raises(ConfigError, match="wrapped by something else"):
            fe.unregister_from_transformers()
    fe.unregister_from_transformers()
    fe.unregister_from_transformers()
    assert PreTrainedModel.from_pretrained.__func__ is before


def change_tensors(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


PHI = "model.layers.1.self_attn.flasheva.phi"


@pytest.mark.parametrize("load", [fe.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_wrong_parameters_are_errors(tmp_path, registered, load):
    saved(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({PHI: tensors[PHI][:1]}))
    with pytest.raises(ConfigError, match=r"layers.1.self_attn.flasheva.phi is \(1, 8\), not"):
        load(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.pop(PHI))
    with pytest.raises(ConfigError, match=r"lacks layers.1.self_attn.flasheva.phi"):
        load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["flasheva"]["layers"] = {"default": SMALL, "0": "full"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    change_tensors(tmp_path, lambda tensors: tensors.update({PHI: torch.zeros(2, 8)}))
    with pytest.raises(ConfigError, match=r"holds layers.0.*stays full: the configuration"):
        load(tmp_path)


def test_without_us_a_prepared_checkpoint_is_an_error(tmp_path):
    """As loud as transformers allows; who overrides the attention sees the unused parameters."""
    saved(tmp_path)
    command = [sys.executable, "-c", WITHOUT_US, str(tmp_path)]
    plain = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"}  # of a test
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
    assert 'Specified `attn_implementation="FlashEVA"` is not supported' in result.stdout
    assert "flasheva.phi" in result.stderr
    assert "UNEXPECTED" in result.stderr
