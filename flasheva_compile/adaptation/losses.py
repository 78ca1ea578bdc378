"""The losses of adaptation: attention outputs, logits of the model as it was, next tokens."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from flasheva_compile.adaptation.calibrate import converted_attentions, exact_attention

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from flasheva_compile.generation.eva_attention import EvaAttention

_IGNORED = -100  # transformers' label of a token without loss


def language_model_loss(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:  # noqa: ANN401
    """Return the mean next-token cross-entropy over tokens that are not padding."""
    labels = _labels(inputs)
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED
    )


def logit_loss(
    model: Any,  # noqa: ANN401 - a prepared model
    inputs: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
) -> Tensor:
    """Return ``KL(teacher || model)`` per token [nats].

    Args:
        model: The prepared model.
        inputs: Its inputs.
        before: Weights of the teacher that differ from the model's by now, by name. The teacher is
            the model itself with these and exact attention: what is not trained is not copied.
    """
    evas = converted_attentions(model)
    with torch.no_grad(), exact_attention(evas):
        result = torch.func.functional_call(
            model, dict(before), kwargs={**inputs, "use_cache": False}
        )
        teacher = functional.log_softmax(result.logits.float(), -1)
    student = functional.log_softmax(model(**inputs, use_cache=False).logits.float(), -1)
    divergence = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    counted = _labels(inputs) != _IGNORED
    return divergence[counted].mean()


def attention_output_loss(
    model: Any,  # noqa: ANN401 - a prepared model
    inputs: Mapping[str, Tensor],
    scale: float = 1.0,
) -> Tensor:
    """Add the gradients of every layer's relative squared error; return their mean.

    The model runs with exact attention and without gradients; each attention is run again by its
    rule on the same queries, keys and values, and differentiated at once: no layer's activations
    outlive it.

    Args:
        model: The prepared model.
        inputs: Its inputs.
        scale: Multiplies the gradients.
    """
    evas = converted_attentions(model)
    with _compared(evas, scale / len(evas)) as errors, exact_attention(evas), torch.no_grad():
        model(**inputs, use_cache=False)
    return torch.stack(errors).mean()


@contextmanager
def _compared(evas: Sequence[EvaAttention], weight: float) -> Iterator[list[Tensor]]:
    errors: list[Tensor] = []
    configs = {id(eva): eva.config for eva in evas}

    def compare(eva: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:  # noqa: ANN401
        query, key, value, mask = args
        exact, eva.config = eva.config, configs[id(eva)]
        try:
            with torch.enable_grad():
                masks = eva.masks(mask, key.shape[2])
                options = {name: kwargs[name] for name in ("scale", "softcap")}
                out, _ = eva.attend_all((query, key, value), *masks, **options)
                want = result[0].float()
                error = (out.float() - want).square().mean() / want.square().mean()
                if error.requires_grad:
                    (error * weight).backward()
        finally:
            eva.config = exact
        errors.append(error.detach())

    hooks = [eva.register_forward_hook(compare, with_kwargs=True) for eva in evas]
    try:
        yield errors
    finally:
        for hook in hooks:
            hook.remove()


def _labels(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the tokens to predict; padding has none."""
    labels = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    return labels if mask is None else labels.masked_fill(mask == 0, _IGNORED)
