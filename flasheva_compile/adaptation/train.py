"""Carry out a recipe: optimizer, schedule, guards, checkpoints, progress."""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flasheva_compile.adaptation.calibrate import (
    converted_attentions,
    model_inputs,
    some_converted,
)
from flasheva_compile.adaptation.losses import (
    attention_output_loss,
    language_model_loss,
    logit_loss,
)
from flasheva_compile.adaptation.recipes import Phase, distill
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.prepared import prepared_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from flasheva_compile.adaptation.recipes import FeatureNoise

log = logging.getLogger(__name__)

_SPIKE = 4.0  # times the running mean of gradient norms: skipped
_STATE = "adaptation.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step.

    Attributes:
        phase: Its phase's name.
        loss: Mean over its batches, before the step.
        gradient_norm: Before clipping.
        tokens: Tokens of its batches.
        seconds: Wall-clock time.
        skipped: Why no step was taken; empty if it was.
    """

    phase: str
    loss: float
    gradient_norm: float
    tokens: int
    seconds: float
    skipped: str = ""


@dataclass(slots=True)
class AdaptationReport:
    """Every step of an adaptation, in order."""

    steps: list[Step] = field(default_factory=list)

    def to_json(self) -> str:
        """Return all steps as JSON."""
        return json.dumps([asdict(step) for step in self.steps], indent=1)

    def __str__(self) -> str:
        lines = []
        for name in dict.fromkeys(step.phase for step in self.steps):
            steps = [step for step in self.steps if step.phase == name]
            seconds = sum(step.seconds for step in steps)
            rate = sum(step.tokens for step in steps) / max(seconds, 1e-9)
            skipped = sum(bool(step.skipped) for step in steps)
            lines.append(
                f"{name}: {len(steps)} steps, loss {steps[0].loss:.4g} -> {steps[-1].loss:.4g}, "
                f"{rate:.0f} tokens/s, {skipped} skipped"
            )
        return "\n".join(lines)


def adapt(
    model: Any,  # noqa: ANN401 - a prepared model
    batches: Iterable[Any],
    recipe: Sequence[Phase] | None = None,
    *,
    max_grad_norm: float = 1.0,
    out: str | Path | None = None,
    save_every: int = 100,
    progress: bool = True,
) -> AdaptationReport:
    """Train a prepared model to do with FlashEVA what it did with full attention.

    Trained in place; weights that a phase does not train get no gradient in it, and afterwards the
    model is in training or evaluation mode as it was. A step whose loss
    or gradient is not finite, or whose gradient norm is far above the others', is skipped, and that
    is logged. New parameters are fp32 and so is the optimizer's state for them.

    Args:
        model: A prepared model.
        batches: Token ids ``[B, N]`` or dicts of the model's inputs; run through again and again,
            so it must be iterable more than once (a list, a DataLoader).
        recipe: Phases; None = :func:`distill`.
        max_grad_norm: Gradients are clipped to it.
        out: Folder for the state to resume from; an interrupted run with the same recipe goes on
            there, to the same losses.
        save_every: Optimizer steps between saved states.
        progress: Show a tqdm bar.

    Raises:
        ConfigError: The model is not prepared, a batch is malformed, or ``out`` holds the state of
            another recipe, configuration or model.
    """
    phases = tuple(distill() if recipe is None else recipe)
    run = _Run(model, phases, batches, max_grad_norm)
    with restored(model):
        if out is not None:
            run.resume(Path(out))
        with _progress(run, shown=progress) as bar:
            while not run.finished:
                step = run.step()
                _show(bar, step)
                if out is not None and (run.done % save_every == 0 or run.finished):
                    run.save(Path(out))
    return run.report


@contextmanager
def restored(model: Any) -> Iterator[None]:  # noqa: ANN401 - a prepared model
    """Leave which parameters need gradients, and which modules train, as they were."""
    requires = {name: p.requires_grad for name, p in model.named_parameters()}
    training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        set_feature_noise(model, "none")
        for name, p in model.named_parameters():
            p.requires_grad_(requires.get(name, p.requires_grad))
            p.grad = None
        for module, before in training.items():
            module.training = before


def trained_parameters(model: Any, phase: Phase) -> dict[str, nn.Parameter]:  # noqa: ANN401
    """Return the parameters that a phase trains, by name."""
    if phase.trains == "all":
        return dict(model.named_parameters())
    paths = tuple(f"{eva.path}." for eva in some_converted(model))
    if phase.trains == "rules":
        paths = tuple(f"{path}flasheva." for path in paths)
    return {name: p for name, p in model.named_parameters() if name.startswith(paths)}


def set_feature_noise(model: Any, noise: FeatureNoise) -> None:  # noqa: ANN401
    """Say what layers with the ``eva`` rule add to their random features in training."""
    for eva in converted_attentions(model):
        eva.feature_noise = noise


class _Run:
    """The state of an adaptation: which step comes next, and all that it depends on."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - a prepared model
        phases: Sequence[Phase],
        batches: Iterable[Any],
        max_grad_norm: float,
    ) -> None:
        converted_attentions(model)  # refuses a model that is not prepared
        self.model, self.phases, self.max_grad_norm = model, phases, max_grad_norm
        self.batches, self.taken = batches, 0
        self.stream = self._endless()
        self.done = 0
        self.report = AdaptationReport()
        self.norms: list[float] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self.before = _teacher_weights(model, phases)
        self.index = -1

    @property
    def total(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def finished(self) -> bool:
        return self.done >= self.total

    def step(self) -> Step:
        """Take one optimizer step."""
        phase, position = self._enter()
        start, losses, tokens = time.perf_counter(), [], 0
        for _ in range(phase.accumulate):
            inputs = next(self.stream)
            self.taken += 1
            losses.append(self._gradients(phase, inputs))
            tokens += inputs["input_ids"].numel()
        trained = [p for p in trained_parameters(self.model, phase).values() if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(trained, self.max_grad_norm)) if trained else 0.0
        loss = sum(losses) / len(losses)
        skipped = self._why_skip(loss, norm)
        assert self.optimizer is not None
        if skipped:
            log.warning("%s, step %d skipped: %s", phase.name, position, skipped)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate_share(phase, position)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        seconds = time.perf_counter() - start
        found = Step(
            phase=phase.name,
            loss=loss,
            gradient_norm=norm,
            tokens=tokens,
            seconds=seconds,
            skipped=skipped,
        )
        self.report.steps.append(found)
        return found

    def _gradients(self, phase: Phase, inputs: dict[str, Any]) -> float:
        share = 1 / phase.accumulate
        with _precision(phase, inputs["input_ids"].device):
            if phase.loss == "attention_outputs":
                return float(attention_output_loss(self.model, inputs, share))
            if phase.loss == "logits":
                loss = logit_loss(self.model, inputs, self.before)
            else:
                loss = language_model_loss(self.model, inputs)
        (loss * share).backward()
        return float(loss.detach())

    def _why_skip(self, loss: float, norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss}, gradient norm {norm}"
        usual = sum(self.norms[-50:]) / max(1, len(self.norms[-50:]))
        self.norms.append(min(norm, _SPIKE * usual) if self.norms else norm)
        if len(self.norms) > 20 and norm > _SPIKE * usual:
            return f"gradient norm {norm:.3g}, usually {usual:.3g}"
        return ""

    def _enter(self) -> tuple[Phase, int]:
        """Return the phase of the next step and the step's place in it; set the phase up."""
        position, index = self.done, 0
        while position >= self.phases[index].steps:
            position -= self.phases[index].steps
            index += 1
        phase = self.phases[index]
        if index != self.index:
            self.index, self.norms = index, []
            trained = trained_parameters(self.model, phase)
            for name, p in self.model.named_parameters():
                p.requires_grad_(name in trained)
            set_feature_noise(self.model, phase.feature_noise)
            self.model.train()
            groups = _parameter_groups(phase, trained)
            self.optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=0.0)
        return phase, position

    def _endless(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from model_inputs(self.model, self.batches)

    # --- resuming ---------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write all that the next step depends on."""
        folder.mkdir(parents=True, exist_ok=True)
        everything = {p for phase in self.phases for p in trained_parameters(self.model, phase)}
        weights = {n: p.detach() for n, p in self.model.named_parameters() if n in everything}
        assert self.optimizer is not None
        state = {
            "recipe": [asdict(phase) for phase in self.phases],
            "configuration": prepared_of(self.model).hybrid.to_dict(),
            "weights": weights,
            "optimizer": self.optimizer.state_dict(),
            "selectors": {
                eva.path: eva.selector_weight for eva in converted_attentions(self.model)
            },
            "before": self.before,
            "done": self.done,
            "taken": self.taken,
            "norms": self.norms,
            "steps": [asdict(step) for step in self.report.steps],
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all(),
        }
        torch.save(state, folder / f"{_STATE}.part")
        (folder / f"{_STATE}.part").replace(folder / _STATE)

    def resume(self, folder: Path) -> None:
        """Continue from a state that :meth:`save` wrote, if there is one."""
        path = folder / _STATE
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        own = dict(self.model.named_parameters())
        self._expect_own(state, {name: p.shape for name, p in own.items()}, str(path))
        for eva in converted_attentions(self.model):
            weight = state.get("selectors", {}).get(eva.path)
            if weight is not None:
                eva.selector_weight = weight.to(next(self.model.parameters()).device)
        self.before = state["before"]
        self.done = state["done"]
        if not self.finished:
            self._enter()
            assert self.optimizer is not None
            self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, weight in state["weights"].items():
                own[name].copy_(weight)
        for _ in range(state["taken"]):
            next(self.stream)
        self.taken, self.norms = state["taken"], state["norms"]
        self.report.steps = [Step(**step) for step in state["steps"]]
        torch.set_rng_state(state["random"])
        torch.cuda.set_rng_state_all(state["random_cuda"])

    def _expect_own(
        self, state: dict[str, Any], shapes: dict[str, torch.Size], subject: str
    ) -> None:
        """Refuse the state of another recipe, configuration or model."""
        fits = {
            "recipe": state["recipe"] == [asdict(phase) for phase in self.phases],
            "configuration": state.get("configuration") == prepared_of(self.model).hybrid.to_dict(),
            "model": all(shapes.get(n) == x.shape for n, x in state["weights"].items()),
        }
        for what, right in fits.items():
            if not right:
                message = f"holds the state of another {what}"
                raise ConfigError(message, subject=subject, hint="choose another folder")


def _teacher_weights(model: Any, phases: Sequence[Phase]) -> dict[str, Tensor]:  # noqa: ANN401
    """Copy the weights that training changes while the model as it was is still needed."""
    last = max((i for i, phase in enumerate(phases) if phase.loss == "logits"), default=-1)
    return {
        name: p.detach().clone()
        for phase in phases[: last + 1]
        for name, p in trained_parameters(model, phase).items()
        if ".flasheva." not in name  # exact attention reads none of these
    }


def _parameter_groups(phase: Phase, trained: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Return AdamW's groups: weights, and chunk rules' parameters with a rate of their own."""
    rules = [p for name, p in trained.items() if ".flasheva." in name]
    weights = [p for name, p in trained.items() if ".flasheva." not in name]
    rate = phase.learning_rate
    rule_rate = rate if phase.rule_learning_rate is None else phase.rule_learning_rate
    groups = [{"params": weights, "peak": rate}, {"params": rules, "peak": rule_rate}]
    return [group for group in groups if group["params"]]


def learning_rate_share(phase: Phase, position: int) -> float:
    """Return a step's share of the highest learning rate: warm-up, then a cosine to a tenth."""
    if position < phase.warmup:
        return (position + 1) / phase.warmup
    share = (position - phase.warmup) / max(1, phase.steps - phase.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


def _precision(phase: Phase, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of a phase's forward passes.

    Autocast keeps no casts: a pass casts each weight once anyway, and what a teacher cast without
    gradients must not serve the student (PyTorch 2.13 sees to that itself).
    """
    if phase.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def _progress(run: _Run, *, shown: bool) -> Any:  # noqa: ANN401 - a tqdm bar
    from tqdm import tqdm

    return tqdm(total=run.total, initial=run.done, disable=not shown, unit="step")


def _show(bar: Any, step: Step) -> None:  # noqa: ANN401
    rate = step.tokens / max(step.seconds, 1e-9)
    numbers = f"loss {step.loss:.4g}, gradient {step.gradient_norm:.3g}, {rate:.0f} tokens/s"
    bar.set_postfix_str(f"{step.phase}: {numbers}")
    bar.update()
