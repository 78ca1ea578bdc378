"""A recipe's phases in transformers' Trainer: what is trained, which loss, which steps are skipped.

Needs transformers: the package loads it when one of its names is used.
"""

from __future__ import annotations

import logging
import weakref
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from flasheva_compile.adaptation.losses import (
    attention_output_loss,
    is_sharded,
    language_model_loss,
    logit_loss,
)
from flasheva_compile.adaptation.train import restored, set_feature_noise, trained_parameters
from flasheva_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from flasheva_compile.adaptation.recipes import Phase

log = logging.getLogger(__name__)
# Who froze a model last; see PhaseCallback.freeze.
_holders: weakref.WeakKeyDictionary[nn.Module, weakref.ref[PhaseCallback]] = (
    weakref.WeakKeyDictionary()
)


def phase_arguments(phase: Phase) -> dict[str, Any]:
    """Return the arguments of ``TrainingArguments`` that train as :func:`adapt` does in a phase.

    Steps, batches per step, precision, no weight decay, gradients clipped to 1, and the learning
    rate: the same warm-up, and a cosine that is one step ahead of :func:`adapt`'s.

    Args:
        phase: The phase.
    """
    return {
        "max_steps": phase.steps,
        "learning_rate": phase.learning_rate,
        "warmup_steps": phase.warmup,
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "gradient_accumulation_steps": phase.accumulate,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": phase.precision == "bf16",
    }


class PhaseCallback(TrainerCallback):
    """Freezes what a phase does not train, and skips optimizer steps that are not finite.

    Weights are frozen when the Trainer is made and as they were when training ends; after an
    exception, of which a Trainer tells its callbacks nothing, :meth:`restore` makes them so. A step
    whose gradient is not finite is not taken: it is logged as a warning and noted in ``skipped``.
    With fp16, the gradient scaler does that by itself. The gradient's norm is in the Trainer's own
    log.

    Args:
        phase: The phase.

    Attributes:
        skipped: The steps that were not taken, counted from 0.

    Example:
        >>> Trainer(model, args, callbacks=[fe.PhaseCallback(phase)], ...)
    """

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        self.skipped: list[int] = []
        self.loss: Tensor | None = None  # of the coming step, if the trainer tells
        self._undo = ExitStack()
        self._frozen = False

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Freeze what the phase does not train."""
        self.freeze(kwargs["model"])

    def freeze(self, model: Any) -> None:  # noqa: ANN401 - a prepared model
        """Freeze what the phase does not train; sample random features.

        Raises:
            ConfigError: Another phase has frozen the model and did not train it yet.
        """
        trained = trained_parameters(model, self.phase)
        if not self._frozen:
            self._hold(model)
            self._undo.enter_context(restored(model))
            self._frozen = True
        set_feature_noise(model, self.phase.feature_noise)
        for name, p in model.named_parameters():
            p.requires_grad_(name in trained)

    def _hold(self, model: Any) -> None:  # noqa: ANN401
        """Let nobody else freeze the model: what it would restore is what is frozen here."""
        other = _holders.get(model)
        holder = other and other()
        if holder is not None and holder is not self and holder._frozen:
            raise ConfigError(
                f"the model is frozen for {holder.phase.name!r} by a trainer that has not trained",
                subject=f"PhaseCallback({self.phase.name!r})",
                hint="train that one first, or call restore() of its PhaseCallback",
            )
        _holders[model] = weakref.ref(self)

    def restore(self) -> None:
        """Leave what was frozen, and which modules train, as it was; without gradients."""
        self._frozen = False
        self._undo.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Refuse to train what was not frozen."""
        if not self._frozen:
            raise ConfigError(
                "was added after the Trainer was made, or has trained already",
                subject=f"PhaseCallback({self.phase.name!r})",
                hint="pass a new one in Trainer(callbacks=[...])",
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Drop gradients that are not finite: the optimizer then leaves everything as it is."""
        loss, self.loss = self.loss, None
        if args.fp16:
            return
        found = [p for p in kwargs["model"].parameters() if p.grad is not None]
        norm: Any = nn.utils.get_total_norm([p.grad for p in found if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if bool(norm.isfinite()) and (loss is None or bool(loss.isfinite())):
            return
        for p in found:
            p.grad = None
        self.skipped.append(state.global_step)
        told = "" if loss is None else f"loss {float(loss)}, "
        where = f"{self.phase.name}, step {state.global_step}"
        log.warning("%s skipped: %sclipped gradient norm %s", where, told, float(norm))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Leave the model as it was."""
        self.restore()


class PhaseMixin:
    """Makes a Trainer train a prepared model by a phase of a recipe; comes before the Trainer.

    The loss is the phase's; steps, learning rate and precision are those of the
    ``TrainingArguments`` (:func:`phase_arguments` has the phase's). However training ends, weights
    need gradients and modules train as they did before the trainer was made. The teacher of
    ``"logits"`` is the model as it is when the trainer is made, also after resuming.
    ``"language_model"`` is the trainer's own loss where the data has labels. Evaluation always
    reports the trainer's own loss.

    Args:
        *args: Of the Trainer.
        phase: The phase.
        **kwargs: Of the Trainer.

    Raises:
        ConfigError: The model is not prepared; or, once training starts, the phase's loss cannot be
            had with the way in which the model is distributed.

    Example:
        >>> class Adapting(fe.PhaseMixin, SFTTrainer): ...
    """

    def __init__(self, *args: Any, phase: Phase, **kwargs: Any) -> None:  # noqa: ANN401
        self.phase = phase
        self.phase_callback = PhaseCallback(phase)
        kwargs["callbacks"] = [self.phase_callback, *(kwargs.get("callbacks") or ())]
        super().__init__(*args, **kwargs)
        this: Any = self
        if this.model_init is not None:
            self.phase_callback.restore()
            message, hint = "makes another model than the one that is frozen", "pass model="
            raise ConfigError(message, subject="model_init", hint=hint)
        if this.args.n_gpu > 1:
            self.phase_callback.restore()
            message = "DataParallel shares one module's state between threads"
            raise ConfigError(message, hint="start one process per GPU: torchrun or accelerate")
        if phase.loss != "language_model":
            # Ours are means over a batch: not to be divided by the number of labels once more.
            this.model_accepts_loss_kwargs = False
        self._before: dict[int, Tensor] = {}
        if phase.loss == "logits":
            self._before = {
                id(p): p.detach().clone()
                for name, p in trained_parameters(this.model, phase).items()
                if ".flasheva." not in name  # exact attention reads none of these
            }

    def train(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Train; what the phase does not train is frozen until training ends, however it does."""
        this: Any = super()
        self.phase_callback.freeze(getattr(self, "model"))  # noqa: B009 - the Trainer's
        try:
            return this.train(*args, **kwargs)
        finally:
            self.phase_callback.restore()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:  # noqa: ANN401
        """Create the optimizer; chunk rules' parameters have a learning rate of their own."""
        this: Any = super()
        optimizer = this.create_optimizer(*args, **kwargs)
        rate = self.phase.rule_learning_rate
        model: Any = getattr(self, "model", None)
        if rate is not None:
            rules = {id(p) for name, p in model.named_parameters() if ".flasheva." in name}
            _split_groups(optimizer, rules, rate)
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - as of Trainer
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # noqa: ANN401
        """Return the phase's loss of a batch."""
        own = "labels" in inputs and self.phase.loss == "language_model"
        if return_outputs or own or not model.training:
            this: Any = super()
            return this.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {name: x for name, x in inputs.items() if name != "labels"}
        if self.phase.loss == "language_model":
            return language_model_loss(model, inputs)
        return logit_loss(model, inputs, self._teacher(model))

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Compute a batch's gradients; return its share of the step's loss."""
        if self.phase.loss == "attention_outputs":
            loss = self._attention_output_step(model, inputs)
        else:
            this: Any = super()
            loss = this.training_step(model, inputs, *args, **kwargs)
        accelerator: Any = self.accelerator  # pyright: ignore[reportAttributeAccessIssue]
        total = accelerator.reduce(loss.detach().clone(), "sum")
        callback = self.phase_callback
        callback.loss = total if callback.loss is None else callback.loss + total
        return loss

    def _attention_output_step(self, model: nn.Module, inputs: Any) -> Tensor:  # noqa: ANN401
        """Add the gradients of attention outputs, which never pass through the model's own."""
        this: Any = self
        accelerator = this.accelerator
        if is_sharded(model) or accelerator.scaler is not None:
            raise ConfigError(
                'loss="attention_outputs" differentiates each attention by itself, which neither '
                "FSDP nor a gradient scaler sees",
                subject=self.phase.name,
                hint="train the chunk rules in one process or with DDP, in fp32 or bf16",
            )
        model.train()
        inputs = {n: x for n, x in this._prepare_inputs(inputs).items() if n != "labels"}
        share = 1 / this.current_gradient_accumulation_steps
        plain = accelerator.unwrap_model(model, keep_torch_compile=False)
        with this.compute_loss_context_manager():
            loss = attention_output_loss(plain, inputs, share)
        if accelerator.sync_gradients and accelerator.num_processes > 1:
            for p in plain.parameters():
                if p.grad is not None:  # DDP has seen no backward pass
                    p.grad = accelerator.reduce(p.grad, "mean")
        return loss * share

    def _teacher(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Return the teacher's own weights by their names in the model as wrapped."""
        if self._before and is_sharded(model):
            raise ConfigError(
                "the teacher's weights cannot take the place of sharded ones",
                subject=self.phase.name,
                hint='use DDP, trains="rules", or loss="language_model"',
            )
        found: dict[str, Tensor] = {}
        for name, p in model.named_parameters():
            if id(p) in self._before:
                self._before[id(p)] = found[name] = self._before[id(p)].to(p.device)
        return found


class AdaptingTrainer(PhaseMixin, Trainer):
    """transformers' Trainer, training a prepared model by a phase of a recipe.

    Example:
        >>> for phase in recipes.distill():
        ...     args = TrainingArguments(folder, **fe.phase_arguments(phase))
        ...     fe.AdaptingTrainer(model, args, train_dataset=data, phase=phase).train()
    """


def _split_groups(optimizer: torch.optim.Optimizer, rules: set[int], rate: float) -> None:
    """Move some parameters, by ``id``, into groups with another learning rate."""
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in rules]
        group["params"] = [p for p in group["params"] if id(p) not in rules]
        if moved:
            options = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group({**options, "params": moved, "lr": rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
