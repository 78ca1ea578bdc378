"""Two processes that train a small model on their halves of each batch, as two GPUs would."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, get_scheduler

import flasheva_compile as fe
from flasheva_compile.adaptation.losses import (
    attention_output_loss,
    language_model_loss,
    logit_loss,
)
from flasheva_compile.adaptation.recipes import Phase
from flasheva_compile.adaptation.train import trained_parameters
from flasheva_compile.errors import ConfigError
from tests.models.test_generate import HYBRIDS, SMALL, llama, perturb, tokens

WORLD, STEPS, SECONDS = 2, 3, 120
TEACHER = "model.layers.1.self_attn.q_proj.weight"


def run(work, folder, *args, backend="gloo"):
    """Run ``work(rank, folder, *args)`` in two processes; raise what they raise."""
    context = torch.multiprocessing.spawn(
        _in_group, (work, Path(folder), args, backend), nprocs=WORLD, join=False
    )
    for process in context.processes:
        process.join(SECONDS)
    late = [process for process in context.processes if process.is_alive()]
    for process in late:
        process.kill()
    context.join(1)
    assert not late, f"{len(late)} processes took longer than {SECONDS} s"


def _in_group(rank, work, folder, args, backend):
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    # What torchrun would say, to accelerate.
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "localhost"}
    os.environ.update({name: str(value) for name, value in {**place, "MASTER_PORT": 0}.items()})
    dist.init_process_group(
        backend,
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=SECONDS),
    )
    try:
        work(rank, folder, *args)
    finally:
        dist.destroy_process_group()


# --- what is trained ------------------------------------------------------------------------------


def prepared(dtype=torch.float32):
    model = fe.prepare(llama(), HYBRIDS["hybrid"])
    perturb(model)
    return model.to(dtype).train()


def device():
    """Where a process of a group works."""
    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else "cpu"


def inner_backend():
    """What compiles: Inductor on a GPU, where it needs no compiler of C++."""
    return {"inner_backend": "inductor" if dist.get_backend() == "nccl" else "aot_eager"}


def train(model, loss, rows=slice(None), mean=lambda x: x):
    """Take a few steps; return their losses, averaged over processes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = {}
    if loss == "logits":  # a teacher with one weight of its own
        before = {n: p.detach() * 1.25 for n, p in model.named_parameters() if TEACHER in n}
    losses = []
    for step in range(STEPS):
        ids = tokens(4, 48, seed=step)[rows]
        inputs = {"input_ids": ids.to(next(model.parameters()).device)}
        if loss == "language_model":
            value = language_model_loss(model, inputs)
        else:
            value = logit_loss(model, inputs, before if loss == "logits" else {})
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(value.detach().clone()))
    return torch.stack(losses)


def train_phase(model, phase):
    """Take a phase's steps with whole batches by torch alone; return losses and weights."""
    trained = trained_parameters(model, phase)
    before = {n: p.detach().clone() for n, p in trained.items() if ".flasheva." not in n}
    for name, p in model.named_parameters():
        p.requires_grad_(name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=phase.learning_rate)
    kind, options = "cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}
    schedule = get_scheduler(kind, optimizer, phase.warmup, phase.steps, options)
    losses = []
    for step in range(phase.steps):
        inputs = {"input_ids": tokens(4, 48, seed=step)}
        if phase.loss == "attention_outputs":
            # Relative to a batch's own size, so that processes' batches count as batches.
            halves = [{"input_ids": half} for half in inputs["input_ids"].split(2)]
            loss = sum(attention_output_loss(model, half, 1 / WORLD) for half in halves) / WORLD
        elif phase.loss == "logits":
            loss = logit_loss(model, inputs, before)
        else:
            loss = language_model_loss(model, inputs)
        if loss.requires_grad:
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
    return [torch.stack(losses), *(p.detach() for p in model.parameters())]


def mean_over_processes(x):
    dist.all_reduce(x)
    return x / WORLD


def rows_of(rank):
    return slice(2 * rank, 2 * rank + 2)


# --- works ----------------------------------------------------------------------------------------


def ddp(rank, folder):
    """Losses and weights of DDP, by loss and by whether the model is compiled."""
    found = {}
    for loss in ("language_model", "logits"):
        for compiled in (False, True):
            torch._dynamo.reset()
            model = prepared().to(device())
            wrapped = DistributedDataParallel(model)
            if compiled:
                wrapped.compile(backend="flasheva", options=inner_backend())
            losses = train(wrapped, loss, rows_of(rank), mean_over_processes)
            found[loss, compiled] = [losses, *(p.detach() for p in model.parameters())]
            assert len(fe.explain(wrapped).rewritten) == 1
    if rank == 0:
        torch.save(found, folder / "found")


def fsdp(rank, folder):
    """Losses of FSDP2 and its full states; one is saved and loaded into a model sharded anew."""
    found = {}
    for loss, compiled in (
        ("language_model", False),
        ("language_model", True),
        ("logits of itself", False),
    ):
        model = sharded()
        if compiled:
            model.compile(backend="flasheva", options=inner_backend())
        losses = train(model, loss, rows_of(rank), mean_over_processes)
        options = states.StateDictOptions(full_state_dict=True)
        full = states.get_model_state_dict(model, options=options)
        found[loss, compiled] = [losses, *full.values()]
        if loss == "language_model" and not compiled:
            if rank == 0:  # it takes the entries out of what it is given
                model.save_pretrained(folder / "model", state_dict=dict(full))
            again = sharded()
            options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            states.set_model_state_dict(again, full, options=options)
            for old, new in zip(model.parameters(), again.parameters(), strict=True):
                assert torch.equal(old.to_local(), new.to_local())
            logits = model.eval()(tokens(2, 48).to(device())).logits
            found["logits"] = logits.detach()
    if dist.get_backend() == "gloo":
        expect_refused(folder)
    if rank == 0:
        torch.save(found, folder / "found")


def expect_refused(folder):
    """Losses that would be wrong with sharded weights are errors."""
    for loss, trains in (("logits", "attention"), ("attention_outputs", "rules")):
        phase = Phase(name="p", loss=loss, trains=trains, steps=1, learning_rate=1e-3)
        arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
        refused = fe.AdaptingTrainer(prepared(), arguments, phase=phase)
        with pytest.raises(ConfigError, match=r"sharded ones|neither FSDP nor"):
            refused.training_step(sharded(), {"input_ids": tokens(2, 48)})
    model, inputs = sharded(), {"input_ids": tokens(2, 48)}
    with pytest.raises(ConfigError, match="sharded"):
        logit_loss(model, inputs, {"model.norm.weight": torch.ones(1)})
    with pytest.raises(ConfigError, match="unseen by FSDP"):
        attention_output_loss(model, inputs)


def sharded():
    model = prepared().to(device())
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def split_graphs(rank, folder):
    """What is rewritten of a model large enough for Dynamo to split it where DDP has buckets."""
    found = {}
    for name, config, optimize in (
        ("plain", None, True),
        ("plain, one graph", None, False),
        ("prepared", SMALL, True),
    ):
        torch._dynamo.reset()
        torch._dynamo.config.optimize_ddp = optimize
        model = large() if config is None else fe.prepare(large(), config)
        options = {"inner_backend": "aot_eager", **(SMALL if config is None else {})}
        model.compile(backend="flasheva", options=options)
        wrapped = DistributedDataParallel(model, bucket_cap_mb=1)
        ids = tokens(4, 48)[rows_of(rank)]
        loss = language_model_loss(wrapped, {"input_ids": ids})
        loss.backward()
        report = fe.explain(wrapped)
        found[name] = {
            "loss": mean_over_processes(loss.detach()),
            "rewritten": len(report.rewritten),
            "warnings": report.warnings,
        }
    if rank == 0:
        torch.save(found, folder / "found")


def large():
    """Three layers of more than a mebibyte each, the least that Dynamo splits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config)


def trainer(rank, folder, phase, broken):
    """A Trainer that two processes share; one of them may get a loss that is not finite."""
    logging.basicConfig(level=logging.WARNING)

    class Recorded(fe.AdaptingTrainer):
        shares = ()

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.shares = (*self.shares, mean_over_processes(loss.detach().clone()))
            return loss

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            bad = broken and rank == 1 and self.state.global_step == 1
            return loss + float("inf") if bad else loss

    rows = [{"input_ids": row} for step in range(STEPS) for row in tokens(4, 48, seed=step)]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        optim="sgd",
        use_cpu=True,
        ddp_backend="gloo",
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **fe.phase_arguments(phase),
    )
    model = prepared()
    run_ = Recorded(model, arguments, train_dataset=rows, phase=phase)
    run_.train()
    weights = [p.detach() for p in model.parameters()]
    mine = nn.utils.parameters_to_vector(weights)
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    assert torch.equal(mine, theirs)
    if rank == 0:
        found = [torch.stack(run_.shares), *weights]
        torch.save({"found": found, "skipped": run_.phase_callback.skipped}, folder / "found")
