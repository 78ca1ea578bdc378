"""ALiBi of attentions that add it themselves: slopes, and what else their routes have to know.

ALiBi adds a number for each head times the key's position. What is the same for all keys of a query
is nothing to a softmax: positions may count from anywhere, so that padding changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Slopes = tuple[float, ...]

SLOPES = "flasheva_slopes"
"""Attribute of attentions with ALiBi that stay full; those converted have them at ``flasheva``."""

MASKED = frozenset({"mpt"})
"""Models that call a method of their mask, whatever ``model_type`` they are of: None has none."""


class AlibiSlopes(nn.Module):
    """The slopes of one attention: they move with the model, and are never cast.

    Args:
        slopes: One for each query head.
        device: Where they are.

    Attributes:
        values: A buffer, ``[Hq]`` fp32.
    """

    values: Tensor

    def __init__(self, slopes: Slopes, device: torch.device) -> None:
        super().__init__()
        self._slopes = slopes
        self.register_buffer("values", self._on(device), persistent=False)

    def _on(self, device: torch.device) -> Tensor:
        return torch.tensor(self._slopes, dtype=torch.float32, device=device)

    def _apply(self, *args: Any, **options: Any) -> AlibiSlopes:  # noqa: ANN401 - as of Module
        super()._apply(*args, **options)
        self.values = self._on(self.values.device)  # a cast rounds, to_empty leaves them undefined
        return self


# --- slopes ---------------------------------------------------------------------------------------


def slopes_of_bloom(module: Any, _: str) -> Slopes:  # noqa: ANN401
    """Return those of a ``BloomAttention``."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    return _slopes(_from_mask(build_alibi_tensor, module.num_heads))


def slopes_of_falcon(module: Any, implementation: str) -> Slopes:  # noqa: ANN401
    """Return those of a ``FalconAttention`` as its own implementation applies them.

    They are scaled as scores are. Its model adds them to the mask, and its eager code once more.
    """
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    times = 1 if implementation == "sdpa" else 2
    biases = _from_mask(build_alibi_tensor, module.num_heads)
    return _slopes(times * module.inv_norm_factor * biases.double())


def slopes_of_mpt(module: Any, _: str) -> Slopes:  # noqa: ANN401
    """Return those of an ``MptAttention``."""
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    return _slopes(build_mpt_alibi_tensor(module.n_heads, 2))


def _from_mask(build: Callable[..., Tensor], heads: int) -> Tensor:
    return build(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)


def _slopes(biases: Tensor) -> Slopes:
    """Return the slopes of biases of two neighbours, ``[H, 1, 2]``."""
    return tuple(biases.double().diff(dim=-1).flatten().tolist())


# --- what goes in and comes out -------------------------------------------------------------------


def project_bloom(
    module: Any,  # noqa: ANN401
    hidden_states: Tensor,
    _: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value ``[B, H, L, D]`` of a ``BloomAttention``."""
    return module._reshape(module.query_key_value(hidden_states))


def finish_bloom(module: Any, out: Tensor, inputs: dict[str, Any]) -> Tensor:  # noqa: ANN401
    """Return what a ``BloomAttention`` returns: it adds the residual itself."""
    dropped = nn.functional.dropout(out, module.hidden_dropout, module.training)
    return inputs["residual"] + dropped


def project_mpt(
    module: Any,  # noqa: ANN401
    hidden_states: Tensor,
    _: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value ``[B, H, L, D]`` of an ``MptAttention``."""
    mixed = module.Wqkv(hidden_states)
    if module.clip_qkv:
        mixed = mixed.clamp(-module.clip_qkv, module.clip_qkv)
    query, key, value = mixed.unflatten(-1, (3, module.n_heads, -1)).permute(2, 0, 3, 1, 4)
    return query, key, value


def plain_mask_of_mpt(mask: Tensor) -> Tensor:
    """Return the additive mask that an MPT made its own of: True where it hides."""
    shown = torch.zeros_like(mask, dtype=torch.float32)
    return shown.masked_fill(mask, torch.finfo(torch.float32).min)


def unrounded_falcon(module: Any, inputs: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    """Return a call's inputs with slopes times positions, which Falcon rounds to bf16."""
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    slopes = _from_mask(build_alibi_tensor, module.num_heads).diff(dim=-1).to(inputs["alibi"])
    rounded, mask = inputs["alibi"], inputs["attention_mask"]
    exact = slopes * (rounded / slopes).round()
    least = torch.finfo(mask.dtype).min
    scaled = (exact * module.inv_norm_factor).expand_as(mask)
    return {**inputs, "alibi": exact, "attention_mask": scaled.masked_fill(mask == least, least)}


def falcon_rounds(module: Any) -> bool:  # noqa: ANN401
    """Tell whether rounding changes the biases of a few tokens."""
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    biases = build_alibi_tensor(
        torch.ones(1, 16, dtype=torch.long), module.num_heads, torch.float32
    )
    return not torch.equal(biases, biases[..., 1:2] * torch.arange(16))


def plain_mask_of_falcon(mask: Tensor) -> Tensor:
    """Return the additive mask that a Falcon put its biases into."""
    least = torch.finfo(mask.dtype).min
    return torch.zeros_like(mask[:, :1]).masked_fill(mask[:, :1] == least, least)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alibi:
    """How attentions of one class add ALiBi.

    Attributes:
        input: The input whose presence says that they do.
        slopes: Returns the slopes of an attention under the implementation of this name.
        plain_mask: Returns the additive mask that the model was given, of the four-dimensional one
            that it made of it; None = it hands on what it was given.
        unrounded: Returns the inputs of a call of few tokens without what the model rounds to bf16,
            whatever its own dtype is; None = it does not.
        rounds: Tells whether an attention's biases are rounded so, in a call of few tokens.
    """

    input: str
    slopes: Callable[[Any, str], Slopes]
    plain_mask: Callable[[Tensor], Tensor] | None = None
    unrounded: Callable[[Any, dict[str, Any]], dict[str, Any]] | None = None
    rounds: Callable[[Any], bool] = lambda _: False

    def given_mask(self, mask: Tensor | None) -> Tensor | None:
        """Return the mask that the model was given, of the one that an attention gets."""
        if self.plain_mask is None or mask is None or mask.dim() != 4:
            return mask
        return self.plain_mask(mask)


BLOOM = Alibi(input="alibi", slopes=slopes_of_bloom)
FALCON = Alibi(
    input="alibi",
    slopes=slopes_of_falcon,
    plain_mask=plain_mask_of_falcon,
    unrounded=unrounded_falcon,
    rounds=falcon_rounds,
)
MPT = Alibi(input="position_bias", slopes=slopes_of_mpt, plain_mask=plain_mask_of_mpt)
