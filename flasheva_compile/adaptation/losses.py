"""The losses of adaptation: attention outputs, logits of the model as it was, next tokens."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from flasheva_compile.adaptation.calibrate import (
    converted_attentions,
    exact_attention,
    running_eagerly,
    some_converted,
)
from flasheva_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from flasheva_compile.generation.eva_attention import EvaAttention

_IGNORED = -100  # transformers' label of a token without loss
_AT_ONCE = 1 << 26  # fp32 logits in memory, each slice anew in the backward pass


def language_model_loss(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:  # noqa: ANN401
    """Return the mean next-token cross-entropy over tokens that are not padding."""
    targets = _labels(inputs)[:, 1:].flatten()
    logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    return _sum_of_slices(_cross_entropy, logits, targets) / (targets != _IGNORED).sum()


def logit_loss(
    model: Any,  # noqa: ANN401 - a prepared model
    inputs: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
) -> Tensor:
    """Return ``KL(teacher || model)`` per token [nats]. The teacher has no dropout.

    Args:
        model: The prepared model.
        inputs: Its inputs.
        before: Weights of the teacher that differ from the model's by now, by name. The teacher is
            the model itself with these and exact attention: what is not trained is not copied.

    Raises:
        ConfigError: FSDP has sharded the model and ``before`` is not empty.
    """
    if before:
        _expect_whole_weights(model, "a teacher's weights cannot take the place of sharded ones")
    evas = converted_attentions(model)
    kwargs = {**inputs, "use_cache": False}
    with running_eagerly(model), exact_attention(evas):
        teacher = torch.func.functional_call(model, dict(before), kwargs=kwargs).logits
    student = model(**kwargs).logits
    counted = (_labels(inputs) != _IGNORED).flatten()
    total = _sum_of_slices(_divergence, student.flatten(0, 1), teacher.flatten(0, 1), counted)
    return total / counted.sum()


def _sum_of_slices(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Sum a loss over slices of its rows; only one slice's fp32 logits exist at a time."""
    size = max(1, _AT_ONCE // rows[0].shape[-1])
    slices = zip(*(x.split(size) for x in rows), strict=True)
    return torch.stack([_recomputed(function, part) for part in slices]).sum()


def _recomputed(function: Callable[..., Tensor], part: Sequence[Tensor]) -> Tensor:
    result = checkpoint(function, *part, use_reentrant=False)
    assert isinstance(result, torch.Tensor)
    return result


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, ignore_index=_IGNORED, reduction="sum")


def _divergence(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    mine, wanted = (functional.log_softmax(x.float(), -1) for x in (student, teacher))
    rows = functional.kl_div(mine, wanted, reduction="none", log_target=True).sum(-1)
    return rows.masked_fill(~counted, 0).sum()


def attention_output_loss(
    model: Any,  # noqa: ANN401 - a prepared model
    inputs: Mapping[str, Tensor],
    scale: float = 1.0,
) -> Tensor:
    """Add the gradients of every layer's relative squared error; return their mean.

    The model runs with exact attention and without gradients; each attention is run again by its
    rule on the same queries, keys and values, and differentiated at once: no layer's activations
    outlive it. There is no dropout: it would differ between the two.

    Args:
        model: The prepared model.
        inputs: Its inputs.
        scale: Multiplies the gradients.

    Raises:
        ConfigError: FSDP has sharded the model: it would see none of these gradients.
    """
    _expect_whole_weights(model, "differentiates each attention by itself, unseen by FSDP")
    evas = some_converted(model)
    with (
        _compared(evas, scale / len(evas)) as errors,
        exact_attention(evas),
        running_eagerly(model),
    ):
        model(**inputs, use_cache=False)
    return torch.stack(errors).mean()


@contextmanager
def _compared(evas: Sequence[EvaAttention], weight: float) -> Iterator[list[Tensor]]:
    errors: list[Tensor] = []
    configs = {id(eva): eva.config for eva in evas}
    training = {id(eva): eva.training for eva in evas}  # random features are sampled in it

    def compare(eva: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:  # noqa: ANN401
        exact, eva.config = eva.config, configs[id(eva)]
        eva.training = training[id(eva)]
        try:
            with torch.enable_grad():
                out, _ = eva.forward(*args, **kwargs)  # past the hooks that make it exact
                want = result[0].float()
                error = (out.float() - want).square().mean() / want.square().mean()
                if error.requires_grad:
                    (error * weight).backward()
        finally:
            eva.config, eva.training = exact, False
        errors.append(error.detach())

    hooks = [eva.register_forward_hook(compare, with_kwargs=True) for eva in evas]
    try:
        yield errors
    finally:
        for hook in hooks:
            hook.remove()


def is_sharded(model: nn.Module) -> bool:
    """Tell whether FSDP, of either kind, holds weights of the model."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(m, FSDPModule | FullyShardedDataParallel) for m in model.modules())


def _expect_whole_weights(model: nn.Module, message: str) -> None:
    if is_sharded(model):
        hint = "use one process or DDP, or the loss of the language model"
        raise ConfigError(message, subject=type(model).__name__, hint=hint)


def _labels(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the tokens to predict; padding has none."""
    labels = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    return labels if mask is None else labels.masked_fill(mask == 0, _IGNORED)
