"""DDP and FSDP2: two processes compute what one does on all rows."""

from __future__ import annotations

import pytest
import torch

import flasheva_compile as fe
from flasheva_compile.adaptation.recipes import Phase
from tests.models import distributed_training as training
from tests.models.test_generate import tokens
from tests.tolerance import assert_as_accurate_as_pytorch


def one_process(loss):
    """Losses and weights of one process on whole batches, in any precision."""

    def formula(dtype):
        model = training.prepared(dtype)
        return [training.train(model, loss), *(p.detach() for p in model.parameters())]

    return formula


@pytest.mark.slow
def test_ddp_trains_as_one_process(tmp_path):
    training.run(training.ddp, tmp_path)
    found = torch.load(tmp_path / "found")
    assert len(found) == 4
    for (loss, _), tensors in found.items():
        assert_as_accurate_as_pytorch(tensors, one_process(loss), torch.float32)


@pytest.mark.slow
def test_fsdp_trains_as_one_process_and_saves_all(tmp_path):
    training.run(training.fsdp, tmp_path)
    found = torch.load(tmp_path / "found")
    logits = found.pop("logits")
    assert len(found) == 3
    for (loss, _), tensors in found.items():
        assert_as_accurate_as_pytorch(tensors, one_process(loss), torch.float32)
    again = fe.from_pretrained(tmp_path / "model")
    assert torch.equal(again(tokens(2, 48)).logits, logits)


@pytest.mark.slow
def test_every_part_of_a_split_graph_is_rewritten_or_reported(tmp_path):
    training.run(training.split_graphs, tmp_path)
    found = torch.load(tmp_path / "found")
    assert found["plain"]["rewritten"] < 3
    assert any("optimize_ddp = False" in warning for warning in found["plain"]["warnings"])
    assert found["plain, one graph"]["rewritten"] == 3
    assert not found["plain, one graph"]["warnings"]
    assert found["prepared"]["rewritten"] == 3
    ours = training.fe.prepare(training.large(), training.SMALL)
    want = training.language_model_loss(ours, {"input_ids": tokens(4, 48)}).detach()
    for name in ("plain, one graph", "prepared"):
        torch.testing.assert_close(found[name]["loss"], want)
    assert not torch.allclose(found["plain"]["loss"], want)


PHASE = {"steps": training.STEPS, "learning_rate": 1e-2, "warmup": 0}


def trained_by_one_process(phase):
    """The same steps by torch alone, clipped and scheduled as the Trainer does."""

    def formula(dtype):
        model = training.prepared(dtype)
        return training.train_phase(model, phase)

    return formula


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "trains"),
    [("attention_outputs", "rules"), ("logits", "attention"), ("language_model", "all")],
)
def test_a_trainer_of_two_processes_trains_as_one(tmp_path, loss, trains):
    phase = Phase(name="p", loss=loss, trains=trains, **PHASE)
    training.run(training.trainer, tmp_path, phase, False)
    result = torch.load(tmp_path / "found")
    assert result["skipped"] == []
    assert_as_accurate_as_pytorch(result["found"], trained_by_one_process(phase), torch.float32)


@pytest.mark.slow
def test_a_step_is_skipped_by_both_processes(tmp_path):
    phase = Phase(name="p", loss="language_model", trains="all", **PHASE)
    training.run(training.trainer, tmp_path, phase, True)
    assert torch.load(tmp_path / "found")["skipped"] == [1]
