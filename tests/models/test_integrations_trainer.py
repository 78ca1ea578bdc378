"""Phases of a recipe in transformers' Trainer: the same losses as a plain loop, nothing else."""

from __future__ import annotations

import copy
import itertools
from unittest import mock

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

import flasheva_compile as fe
from flasheva_compile.adaptation.calibrate import converted_attentions
from flasheva_compile.adaptation.losses import (
    attention_output_loss,
    language_model_loss,
    logit_loss,
)
from flasheva_compile.adaptation.recipes import Phase
from flasheva_compile.adaptation.train import trained_parameters
from flasheva_compile.errors import ConfigError
from tests.models.test_generate import SMALL, llama, perturb, tokens
from tests.tolerance import assert_as_accurate_as_pytorch

STEPS, ROWS = 4, 2


def phase(loss, trains, **options):
    options = {"steps": STEPS, "learning_rate": 1e-2, "warmup": 2, **options}
    return Phase(name="p", loss=loss, trains=trains, **options)


PHASES = [
    phase("attention_outputs", "rules"),
    phase("attention_outputs", "rules", accumulate=2),
    phase("logits", "attention"),
    phase("logits", "attention", accumulate=2, rule_learning_rate=5e-2),
    phase("language_model", "all"),
]


def prepared():
    model = fe.prepare(llama(), SMALL)
    perturb(model)
    return model


def data(count=2 * STEPS * ROWS, labels=False):
    rows = [{"input_ids": tokens(1, 48, seed=seed)[0]} for seed in range(count)]
    return [{**row, "labels": row["input_ids"]} for row in rows] if labels else rows


def arguments(folder, of=None, **options):
    fixed = {
        "output_dir": str(folder),
        "per_device_train_batch_size": ROWS,
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return TrainingArguments(**{**fixed, **(fe.phase_arguments(of) if of else {}), **options})


class Recorded(fe.AdaptingTrainer):
    """Keeps what each batch added to its step's loss."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.shares = [*getattr(self, "shares", []), float(loss)]
        return loss


def plain_loop(model, what):
    """Train as the Trainer should, with nothing but torch; return the batches' shares."""
    model.train()
    trained = trained_parameters(model, what)
    before = {n: p.detach().clone() for n, p in trained.items() if ".flasheva." not in n}
    rate = what.rule_learning_rate or what.learning_rate
    rules = [p for n, p in trained.items() if ".flasheva." in n]
    weights = [p for n, p in trained.items() if ".flasheva." not in n]
    groups = [{"params": weights}] * bool(weights) + [{"params": rules, "lr": rate}]
    for p in model.parameters():
        p.requires_grad_(any(p is x for x in trained.values()))
    optimizer = torch.optim.AdamW(groups, lr=what.learning_rate, weight_decay=0.0)
    options = {"min_lr_rate": 0.1}
    kind = "cosine_warmup_with_min_lr"
    schedule = get_scheduler(kind, optimizer, what.warmup, what.steps, options)
    shares, rows = [], data()
    for _ in range(what.steps):
        for _ in range(what.accumulate):
            ids = torch.stack([rows.pop(0)["input_ids"] for _ in range(ROWS)])
            inputs, share = {"input_ids": ids}, 1 / what.accumulate
            if what.loss == "attention_outputs":
                loss = attention_output_loss(model, inputs, share) * share
            else:
                function = logit_loss if what.loss == "logits" else language_model_loss
                extra = [before] if what.loss == "logits" else []
                loss = function(model, inputs, *extra) * share
                loss.backward()
            shares.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return shares


@pytest.mark.parametrize(
    "what", PHASES, ids=lambda p: f"{p.loss}-{p.accumulate}-{p.rule_learning_rate}"
)
def test_losses_are_those_of_a_plain_loop(tmp_path, what):
    model, twin = prepared(), prepared()
    before = copy.deepcopy(model.state_dict())
    trainer = Recorded(model, arguments(tmp_path, what), train_dataset=data(), phase=what)
    names = set(trained_parameters(model, what))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    trainer.train()
    want = plain_loop(twin, what)
    assert trainer.shares == want
    assert len(want) == what.steps * what.accumulate
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, twin.state_dict()[name]), name
        assert torch.equal(weight, before[name]) != (name in names), name
    assert all(p.requires_grad for p in model.parameters())
    assert all("grad_norm" in row for row in trainer.state.log_history[:STEPS])
    assert trainer.phase_callback.skipped == []


def test_labels_are_the_datas_own_and_evaluation_is_the_language_models(tmp_path):
    rows = data(labels=True)
    for row in rows:
        row["labels"] = row["labels"].masked_fill(torch.arange(48) < 40, -100)
    inputs = {name: torch.stack([row[name] for row in rows[:2]]) for name in rows[0]}
    want = prepared()(**inputs).loss.item()
    for loss in ("language_model", "logits"):
        trainer = Recorded(
            prepared(),
            arguments(tmp_path, max_steps=1, per_device_eval_batch_size=2),
            train_dataset=rows,
            eval_dataset=rows[:2],
            phase=phase(loss, "attention"),
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-6)
        trainer.train()
        assert (trainer.shares[0] == pytest.approx(want, rel=1e-6)) == (loss == "language_model")


class Poison(TrainerCallback):
    """Makes one step's gradients NaN."""

    def on_substep_end(self, args, state, control, model, **kwargs):
        if state.global_step == 1:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("nan"))


@pytest.mark.parametrize("trainer_class", [fe.AdaptingTrainer, Trainer])
def test_steps_that_are_not_finite_are_skipped_and_logged(tmp_path, caplog, trainer_class):
    what, weights = phase("language_model", "attention", accumulate=2), []
    model = prepared()

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            weights.append(copy.deepcopy(model.state_dict()))

    own = {"phase": what} if trainer_class is not Trainer else {}
    callback = fe.PhaseCallback(what)
    trainer = trainer_class(
        model,
        arguments(tmp_path, what),
        train_dataset=data(labels=True),
        callbacks=[Poison(), Watch(), *([] if own else [callback])],
        **own,
    )
    trainer.train()
    callback = getattr(trainer, "phase_callback", callback)
    assert callback.skipped == [1]
    assert "p, step 1 skipped:" in caplog.text
    changed = [
        any(not torch.equal(x, after[name]) for name, x in before.items())
        for before, after in itertools.pairwise(weights)
    ]
    assert changed == [False, True, True]
    assert all(bool(x.isfinite().all()) for x in weights[-1].values())


def test_a_loss_that_is_not_finite_is_skipped(tmp_path, caplog):
    what = phase("language_model", "attention")

    class Broken(fe.AdaptingTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss + float("inf") if self.state.global_step == 2 else loss

    trainer = Broken(prepared(), arguments(tmp_path, what), train_dataset=data(), phase=what)
    trainer.train()
    assert trainer.phase_callback.skipped == [2]
    assert "p, step 2 skipped: loss inf" in caplog.text


class Interrupted(TrainerCallback):
    """Fails in the middle of the second step, unless told not to."""

    armed = True

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.armed and state.global_step == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("loss", ["attention_outputs", "logits"])
def test_a_run_that_fails_leaves_the_model_as_it_was_and_can_go_on(tmp_path, loss):
    what = phase(loss, "rules", feature_noise="clamped")
    options = {"save_strategy": "steps", "save_steps": 1}

    def trainer(folder, **more):
        model = fe.prepare(llama(), {**SMALL, "chunk_rule": "eva"}).eval()
        model.model.layers[0].train()
        model.model.embed_tokens.weight.requires_grad_(False)
        made = arguments(tmp_path / folder, what, **options)
        return Recorded(model, made, train_dataset=data(), phase=what, **more)

    callback = Interrupted()
    failed = trainer("failed", callbacks=[callback])
    with pytest.raises(KeyboardInterrupt):
        failed.train()
    model = failed.model
    fresh = trainer("unused").model
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"model.embed_tokens.weight"}
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in model.modules()] == [m.training for m in fresh.modules()]
    assert {eva.feature_noise for eva in converted_attentions(model)} == {"none"}
    callback.armed = False
    failed.train(resume_from_checkpoint=str(tmp_path / "failed" / "checkpoint-1"))
    whole = trainer("whole")
    whole.train()
    assert failed.shares[2:] == whole.shares[1:]
    assert [m.training for m in whole.model.modules()] == [m.training for m in fresh.modules()]


def test_a_trainer_that_cannot_be_made_leaves_the_model_as_it_was(tmp_path):
    what, model = phase("logits", "attention"), prepared()
    made = arguments(tmp_path, what)
    with (
        mock.patch.object(TrainingArguments, "n_gpu", 2),
        pytest.raises(ConfigError, match="DataParallel"),
    ):
        fe.AdaptingTrainer(model, made, train_dataset=data(), phase=what)
    assert all(p.requires_grad for p in model.parameters())


def test_a_callback_by_itself_restores_what_it_froze(tmp_path):
    """A Trainer tells its callbacks nothing of an exception."""
    what, model = phase("language_model", "rules"), prepared()
    callback = fe.PhaseCallback(what)
    Trainer(model, arguments(tmp_path, what), train_dataset=data(), callbacks=[callback])
    assert not all(p.requires_grad for p in model.parameters())
    callback.restore()
    assert all(p.requires_grad for p in model.parameters())


def test_what_another_trainer_freezes_is_not_frozen_twice(tmp_path):
    """The second one would restore what the first one froze, or train what that one trains."""
    first, second = phase("language_model", "all"), phase("language_model", "rules")
    model = prepared()
    given = {"train_dataset": data(labels=True)}
    trainer = fe.AdaptingTrainer(model, arguments(tmp_path, first), phase=first, **given)
    with pytest.raises(ConfigError, match="by a trainer that has not trained"):
        fe.AdaptingTrainer(model, arguments(tmp_path, second), phase=second, **given)
    model.requires_grad_(requires_grad=False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer.train()  # freezes anew
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    fe.AdaptingTrainer(model, arguments(tmp_path, second), phase=second, **given)


def test_a_trainer_that_makes_its_model_is_refused(tmp_path):
    what = phase("language_model", "rules")
    with pytest.raises(ConfigError, match="another model than the one that is frozen"):
        fe.AdaptingTrainer(
            model_init=prepared, args=arguments(tmp_path, what), train_dataset=data(), phase=what
        )


def test_resuming_keeps_the_teacher_and_the_losses(tmp_path):
    what = phase("logits", "attention")
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = Recorded(
        prepared(), arguments(tmp_path, what, **options), train_dataset=data(), phase=what
    )
    whole.train()
    again = Recorded(
        prepared(), arguments(tmp_path, what, **options), train_dataset=data(), phase=what
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.shares == whole.shares[2:]
    saved = fe.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(saved(tokens(1, 48)).logits, whole.model.eval()(tokens(1, 48)).logits)


def test_what_cannot_train_is_refused(tmp_path):
    what = phase("logits", "rules")
    with pytest.raises(ConfigError, match="is not prepared"):
        fe.AdaptingTrainer(llama(), arguments(tmp_path, what), train_dataset=data(), phase=what)
    trainer = Trainer(prepared(), arguments(tmp_path, what), train_dataset=data(labels=True))
    trainer.add_callback(fe.PhaseCallback(what))
    with pytest.raises(ConfigError, match="added after the Trainer was made"):
        trainer.train()


@pytest.mark.parametrize("what", PHASES[::2], ids=lambda p: p.loss)
def test_a_compiled_model_trains_as_an_uncompiled_one(tmp_path, what):
    model = prepared()
    model.compile(backend="flasheva", options={"inner_backend": "aot_eager"})
    trainer = Recorded(model, arguments(tmp_path, what), train_dataset=data(), phase=what)
    trainer.train()

    def formula(dtype):
        return [torch.tensor(plain_loop(prepared().to(dtype), what), dtype=dtype)]

    assert_as_accurate_as_pytorch([torch.tensor(trainer.shares)], formula, torch.float32)
