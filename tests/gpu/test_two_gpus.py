"""DDP and FSDP2 on two GPUs through NCCL: the losses and weights of one process."""

from __future__ import annotations

import pytest
import torch

import flasheva_compile as fe
from tests.models import distributed_training as training
from tests.models.test_generate import tokens
from tests.models.test_integrations_distributed import one_process
from tests.tolerance import assert_as_accurate_as_pytorch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < training.WORLD, reason="needs two CUDA devices"),
]


def check(work, folder):
    """Compare what two GPUs found with one process on a CPU."""
    training.run(work, folder, backend="nccl")
    found = torch.load(folder / "found", map_location="cpu")
    logits = found.pop("logits", None)
    for (loss, _), tensors in found.items():
        assert_as_accurate_as_pytorch(tensors, one_process(loss), torch.float32)
    return found, logits


def test_ddp_trains_as_one_process(tmp_path):
    found, _ = check(training.ddp, tmp_path)
    assert len(found) == 4


def test_fsdp_trains_as_one_process_and_saves_all(tmp_path):
    found, logits = check(training.fsdp, tmp_path)
    assert len(found) == 3
    again = fe.from_pretrained(tmp_path / "model").to("cuda")
    found_again = again(tokens(2, 48).to("cuda")).logits
    torch.testing.assert_close(found_again.cpu(), logits)
