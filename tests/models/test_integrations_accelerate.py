"""accelerate and transformers' Trainer compile with the backend and train prepared models."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import flasheva_compile as fe
from tests.models.test_generate import SMALL, llama, perturb, tokens

COMPILED = {**SMALL, "inner_backend": "aot_eager"}


@pytest.fixture
def registered():
    fe.register_with_accelerate()
    yield
    fe.unregister_from_accelerate()
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the first accelerator's


def data(count=4):
    ids = [tokens(1, 48, seed=seed)[0] for seed in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


def train(accelerator, model, steps=3):
    """Run an ordinary accelerate loop; return the model as prepared by it, and its losses."""
    torch.manual_seed(0)
    loader = DataLoader(data(2 * steps), batch_size=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
    losses = []
    for batch in loader:
        loss = model(**batch, use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


class Plain:
    """What accelerate is to one process."""

    prepare = staticmethod(lambda *objects: objects)
    backward = staticmethod(torch.Tensor.backward)


def test_registering_is_idempotent_and_undoable():
    names = DynamoBackend.list()
    fe.register_with_accelerate()
    fe.register_with_accelerate()
    assert DynamoBackend.list() == [*names, "FLASHEVA"]
    assert DynamoBackend("FLASHEVA") is DynamoBackend.FLASHEVA is DynamoBackend["FLASHEVA"]
    assert TorchDynamoPlugin(backend="flasheva").to_dict()["backend"] == "flasheva"
    fe.unregister_from_accelerate()
    fe.unregister_from_accelerate()
    assert DynamoBackend.list() == names
    assert not hasattr(DynamoBackend, "FLASHEVA")
    with pytest.raises(ValueError, match="not a valid DynamoBackend"):
        TorchDynamoPlugin(backend="flasheva")


def test_accelerate_compiles_with_the_backend(registered):
    plugin = TorchDynamoPlugin(backend="flasheva", options=COMPILED)
    accelerator = Accelerator(cpu=True, dynamo_plugin=plugin)
    model, losses = train(accelerator, llama())
    assert len(fe.explain(model).rewritten) == 2
    twin = llama()
    twin.compile(backend="flasheva", options=COMPILED)
    assert losses == train(Plain, twin)[1]


def test_accelerate_trains_a_prepared_model(tmp_path):
    """The same losses as without accelerate; the rule's parameters move and are saved."""
    models = []
    for _ in range(2):
        models.append(fe.prepare(llama(), SMALL))
        perturb(models[-1])
    before = models[0].model.layers[0].self_attn.flasheva.phi.detach().clone()
    accelerator = Accelerator(cpu=True)
    model, losses = train(accelerator, models[0])
    assert losses == train(Plain, models[1])[1]
    inner = accelerator.unwrap_model(model)
    assert not torch.equal(inner.model.layers[0].self_attn.flasheva.phi, before)
    inner.save_pretrained(tmp_path, state_dict=accelerator.get_state_dict(model))
    again, ids = fe.from_pretrained(tmp_path), tokens(1, 48)
    assert torch.equal(again(ids).logits, inner.eval()(ids).logits)


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )


@pytest.mark.slow
def test_trainer_compiles_with_the_backend_by_name(tmp_path, registered, monkeypatch):
    for name in ("BACKEND", "MODE"):  # Trainer may set them for good
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    options = arguments(tmp_path, torch_compile_backend="flasheva")
    trainer = Trainer(llama(), options, train_dataset=data())
    trainer.train()
    assert len(fe.explain(trainer.model_wrapped).rewritten) == 2
    trainer.save_model(str(tmp_path / "model"))
    again, ids = LlamaForCausalLM.from_pretrained(tmp_path / "model"), tokens(1, 48)
    assert torch.equal(again(ids).logits, trainer.model.eval()(ids).logits)


def test_trainer_trains_a_compiled_model(tmp_path):
    model = llama()
    model.compile(backend="flasheva", options=COMPILED)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=data())
    trainer.train()
    assert len(fe.explain(model).rewritten) == 2
