"""The submodule that a prepared attention gets: its configuration, its rule's parameters, its call.

It lives at ``<attention>.flasheva``, so that ``state_dict``, optimizers, DDP, FSDP and peft see its
parameters like any others.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.alibi import AlibiSlopes
from flasheva_compile.generation.announcement import Announcement
from flasheva_compile.ops import flasheva_attention

if TYPE_CHECKING:
    from torch import Tensor

    from flasheva_compile.config import EvaConfig
    from flasheva_compile.generation.alibi import Slopes
    from flasheva_compile.generation.cache_layer import EvaCacheLayer


class EvaAttention(nn.Module):
    """FlashEVA attention of one layer.

    Args:
        path: The attention's module path, for messages.
        config: How it approximates.
        kv_heads: ``Hkv``.
        head_dim: ``D``.
        device: Where to create the parameters; they are fp32.
        slopes: Of ALiBi, one for each query head; None = no ALiBi.

    Attributes:
        slopes: Of ALiBi; None = no ALiBi.
        selector_weight: A buffer, what ``calibrate`` learned for selection by bounds,
            ``[Hkv, 3, D]``; None = 1/2 everywhere.
    """

    selector_weight: Tensor | None

    def __init__(
        self,
        path: str,
        config: EvaConfig,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
        slopes: Slopes | None = None,
    ) -> None:
        super().__init__()
        self.slopes = None if slopes is None else AlibiSlopes(slopes, device)
        self.path, self.config = path, config
        for name, value in _initial_parameters(config, kv_heads, head_dim).items():
            self.register_parameter(name, nn.Parameter(value.to(device)))
        self.register_buffer("selector_weight", None)
        self._selector_shape = (kv_heads, 3, head_dim)
        self.announced = Announcement()  # the cache layer, for the time of one forward
        self.feature_noise = "none"  # of the eva rule, in training; a recipe's phase sets it

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        c = self.config
        retrieved = f", top-{c.retrieve_chunks}" if c.retrieve_chunks else ""
        weighted = "" if self.selector_weight is None else "weighted "
        retrieved += f" by {weighted}bounds" * (c.retrieve_by == "bounds")
        retrieved += ", ALiBi" * (self.slopes is not None)
        return f"{c.chunk_rule}, {c.window} window={c.window_size}, chunk={c.chunk_size}{retrieved}"

    @property
    def alibi_slopes(self) -> Tensor | None:
        """Slopes of ALiBi, ``[Hq]`` fp32; None = no ALiBi."""
        return None if self.slopes is None else self.slopes.values

    def rule_parameters(self) -> list[Tensor]:
        """Return the rule's parameters in the order of the ops."""
        return [p for p in self._parameters.values() if p is not None]

    def new_selector_weight(self, device: torch.device) -> Tensor:
        """Return weights with which nothing changes, ``[Hkv, 3, D]``."""
        return torch.full(self._selector_shape, 0.5, device=device)

    def selector_options(self) -> dict[str, Tensor]:
        """Return what an op that selects chunks gets besides its settings."""
        weight = self.selector_weight
        return {} if weight is None else {"selector_weight": weight}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        *rest: Any,  # noqa: ANN401
        **named: Any,  # noqa: ANN401
    ) -> None:
        # Only a calibrated module has weights of the selector: make room for saved ones.
        saved = state_dict.get(f"{prefix}selector_weight")
        by_bounds = self.config.retrieve_by == "bounds"
        if saved is not None and self.selector_weight is None and by_bounds:
            self.selector_weight = self.new_selector_weight(next(self.parameters(), saved).device)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scale: float,
        softcap: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query: ``[B, Hq, L, D]``.
            key: ``[B, Hkv, S, D]``; the new keys alone where a compressed cache holds the others.
            value: ``[B, Hkv, S, Dv]``.
            mask: Of every column so far, ``[B, >= S]``: bool, True = may attend, or integers,
                the packed documents' ids; None = one document, all valid.
            scale: Score scale.
            softcap: ``softcap * tanh(score / softcap)``; 0 = none.
            dropout_p: Probability of dropping a weight.

        Returns:
            ``out [B, Hq, L, Dv]`` and ``lse [B, Hq, L]``.

        Raises:
            ConfigError: Dropout through a compressed cache.
        """
        layer: EvaCacheLayer | None = self.announced.take()
        query, key, value = autocast(query, key, value)
        if layer is not None:
            if dropout_p:
                message = "attention through a compressed cache has no dropout"
                hint = "call model.eval(), or pass use_cache=False"
                raise ConfigError(message, subject=self.path, hint=hint)
            return layer.attend(self, (query, key, value), mask, scale, softcap)
        key_mask, segment_ids = self.masks(mask, key.shape[2])
        options: dict[str, Any] = {"scale": scale, "softcap": softcap, "dropout_p": dropout_p}
        return self.attend_all((query, key, value), key_mask, segment_ids, **options)

    def attend_all(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        key_mask: Tensor | None,
        segment_ids: Tensor | None,
        *,
        exact: bool = False,
        **options: float,
    ) -> tuple[Tensor, Tensor]:
        """Attend from the last queries to all keys; see :func:`flasheva_attention`.

        ``exact`` makes it full attention, by a window over all keys.
        """
        q, k, v = qkv
        c = covering(self.config, k.shape[2]) if exact else self.config
        return flasheva_attention(
            q,
            k,
            v,
            parameters=self.rule_parameters(),
            noise=self._noise(k),
            key_mask=key_mask,
            segment_ids=segment_ids,
            alibi_slopes=self.alibi_slopes,
            window_size=c.window_size,
            chunk_size=c.chunk_size,
            sink_tokens=c.sink_tokens,
            window=c.window,
            chunk_rule=c.chunk_rule,
            q_offset=k.shape[2] - q.shape[2],
            retrieve_chunks=c.retrieve_chunks,
            retrieve_block=c.retrieve_block,
            retrieve_by=c.retrieve_by,
            selector_weight=self.selector_weight,
            **options,  # pyright: ignore[reportArgumentType]
        )

    def _noise(self, k: Tensor) -> Tensor | None:
        """Sample what is added to ``omega``, ``[B, Hkv, C, D]``, one slot for every chunk."""
        if not self.training or self.feature_noise == "none" or self.config.chunk_rule != "eva":
            return None
        batch, heads, columns, size = k.shape
        chunks = -(-columns // self.config.chunk_size)
        noise = torch.randn(batch, heads, chunks, size, dtype=k.dtype, device=k.device)
        return noise.clamp(-1, 1) if self.feature_noise == "clamped" else noise

    def masks(self, mask: Tensor | None, columns: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the key mask and the documents' ids that a mask of ``columns`` keys means."""
        if mask is None:
            return None, None
        if mask.shape[1] < columns:
            raise ConfigError(
                f"{columns} keys for an attention_mask of {mask.shape[1]} columns",
                subject=self.path,
                hint="pass FlashEvaCache.for_model(model), or a cache that grows",
            )
        mask = mask[:, :columns]
        return (mask, None) if mask.dtype == torch.bool else (None, mask)


def covering(config: EvaConfig, keys: int) -> EvaConfig:
    """Return a configuration whose window covers ``keys``: full attention by the same ops."""
    if config.window_size >= keys:
        return config
    # Powers of two: on a GPU every window size is a kernel of its own.
    chunks = 1 << (-(-keys // config.chunk_size) - 1).bit_length()
    return config.replace(window_size=config.chunk_size * chunks)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast does for SDPA: rotary embeddings hand over fp32 beside low precision."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) for x in tensors)


def _initial_parameters(config: EvaConfig, heads: int, size: int) -> dict[str, Tensor]:
    """Return the rule's parameters where training starts.

    ``tangent`` starts as ``mean``; ``evabyte`` too, with a bias that counts a chunk's tokens;
    ``eva`` starts at LayerNorm of the means (its ``f`` has a LayerNorm).
    """
    if config.chunk_rule == "tangent":
        return {"phi": torch.zeros(heads, size)}
    if config.chunk_rule == "evabyte":
        bias = torch.full((heads,), math.log(config.chunk_size))
        return {"a": torch.zeros(heads, size), "p": torch.zeros(heads, size), "b": bias}
    if config.chunk_rule == "mean":
        return {}
    parameters: dict[str, Any] = {}
    for side in ("q", "k"):
        parameters[f"{side}_weight"] = torch.eye(size)
        parameters[f"{side}_bias"] = torch.zeros(size)
        parameters[f"{side}_norm_weight"] = torch.ones(size)
        parameters[f"{side}_norm_bias"] = torch.zeros(size)
    return parameters
