"""peft on prepared models: LoRA on the projections, the chunk rules' parameters trained fully."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import flasheva_compile as fe
from flasheva_compile.errors import ConfigError
from tests.models.test_generate import GREEDY, HYBRIDS, llama, perturb, tokens
from tests.tolerance import assert_as_accurate_as_pytorch

EAGER = {"inner_backend": "aot_eager"}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def prepared():
    model = fe.prepare(llama(), HYBRIDS["hybrid"])
    perturb(model)
    return model


def adapted(model):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=PROJECTIONS, modules_to_save=["flasheva"])
    return get_peft_model(model, config)


def train(model, steps=3, compiled=False):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    run = torch.compile(model, backend="flasheva", options=EAGER) if compiled else model
    model.train()
    for seed in range(steps):
        ids = tokens(2, 48, seed=seed)
        run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_lora_and_rules_train_and_nothing_else():
    model = adapted(prepared())
    assert torch.equal(model(tokens(2, 48)).logits, prepared()(tokens(2, 48)).logits)
    before = copy.deepcopy(model.state_dict())
    train(model)
    moved = {n for n, x in model.state_dict().items() if not torch.equal(x, before[n])}
    assert {n for n in moved if "lora" not in n} == {
        "base_model.model.model.layers.1.self_attn.flasheva.modules_to_save.default.phi"
    }
    assert len(moved) == 1 + 2 * 2 * len(PROJECTIONS)


def test_an_adapter_is_saved_and_loaded_with_the_rules(tmp_path):
    ids = tokens(2, 48)
    prepared().save_pretrained(tmp_path / "base")
    model = train(adapted(fe.from_pretrained(tmp_path / "base")))
    want = model(ids).logits
    assert not torch.equal(want, prepared()(ids).logits)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(fe.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(again(ids).logits, want)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, prepared()(ids).logits)


def test_transformers_and_peft_load_it_by_name(tmp_path):
    ids = tokens(2, 48)
    prepared().save_pretrained(tmp_path / "base")
    fe.register_with_transformers()
    try:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = train(adapted(base))
        model.save_pretrained(tmp_path / "adapter")
        saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == str(tmp_path / "base")
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert torch.equal(again(ids).logits, model(ids).logits)
        with pytest.raises(ConfigError, match="AutoPeftModelForCausalLM"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    finally:
        fe.unregister_from_transformers()


def test_merging_gives_a_prepared_model(tmp_path):
    model, ids = train(adapted(prepared())), tokens(2, 48)
    twins = {dtype: copy.deepcopy(model).to(dtype) for dtype in (torch.float32, torch.float64)}
    merged = model.merge_and_unload()

    def formula(dtype):
        return [twins[dtype](ids).logits]

    assert_as_accurate_as_pytorch([merged(ids).logits], formula, torch.float32)
    merged.save_pretrained(tmp_path)
    assert torch.equal(fe.from_pretrained(tmp_path)(ids).logits, merged(ids).logits)
    assert not [n for n, _ in fe.revert(merged).named_parameters() if "flasheva" in n]


def test_an_adapted_model_generates_from_its_compressed_cache():
    """peft's wrapper stands between an attention and its cache."""
    model, ids = train(adapted(prepared())), tokens(1, 21)
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    result = model.generate(input_ids=ids, max_new_tokens=30, **options)
    assert isinstance(result.past_key_values, fe.FlashEvaCache)
    with torch.no_grad():
        whole = model(result.sequences, use_cache=False).logits[:, 20:-1]
    torch.testing.assert_close(torch.stack(result.logits, 1), whole, rtol=1e-4, atol=1e-4)


def test_an_adapted_model_trains_compiled():
    def formula(dtype):
        return list(train(adapted(prepared()).to(dtype)).state_dict().values())

    compiled = train(adapted(prepared()), compiled=True).state_dict().values()
    assert_as_accurate_as_pytorch(list(compiled), formula, torch.float32)
