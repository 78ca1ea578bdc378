"""The part of ``calibrate`` that sees whole documents: what teaches each layer's selector."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.adaptation.selector import learn_selector_weight, selector_sample
from flasheva_compile.cache_ops import cache_options, cache_settings
from flasheva_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from flasheva_compile.adaptation.selector import SelectorSample
    from flasheva_compile.config import EvaConfig
    from flasheva_compile.generation.eva_attention import EvaAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedSelector:
    """Weights of one attention's selector, and how many queries they were learned from; None, 0."""

    weight: Tensor | None
    queries: int


@dataclass(slots=True, kw_only=True)
class SelectorLessons:
    """What one attention's selector is learned from.

    Attributes:
        config: How the attention approximates, whatever runs meanwhile.
        parameters: Its chunk rule's, as they will be.
        samples: One per document that was long enough.
    """

    config: EvaConfig
    parameters: list[Tensor]
    samples: list[SelectorSample] = field(default_factory=list)

    def learned(self, path: str) -> LearnedSelector:
        """Learn, if a document was long enough.

        Raises:
            ConfigError: What was learned is not finite.
        """
        if not self.samples:
            return LearnedSelector(weight=None, queries=0)
        weight = learn_selector_weight(self.samples)
        if not torch.isfinite(weight).all():
            message = "the weights that its selector learned are not finite"
            raise ConfigError(message, subject=path, hint="check the model's weights and dtype")
        return LearnedSelector(weight=weight, queries=sum(x.q.shape[2] for x in self.samples))


def learns_selector(config: EvaConfig) -> bool:
    """Whether an attention has a selector that can be learned; ``eva`` has no cache for it."""
    return config.retrieve_by == "bounds" and config.chunk_rule != "eva"


def lessons_of(eva: EvaAttention, values: Mapping[str, Tensor]) -> SelectorLessons:
    """Return empty lessons of an attention whose parameters are about to be ``values``."""
    device = next((p.device for p in eva.parameters()), None)
    parameters = [
        values[name].to(device or value.device) if name in values else value.detach()
        for name, value in eva.named_parameters()
    ]
    return SelectorLessons(config=eva.config, parameters=parameters)


@contextmanager
def listening(
    evas: Sequence[EvaAttention], lessons: Mapping[str, SelectorLessons], context_length: int
) -> Iterator[None]:
    """Keep samples of the documents that reach attentions for a while, if they are long enough."""

    def listen(eva: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ANN401
        query, key, value, mask = args
        lesson, columns = lessons[eva.path], key.shape[2]
        for row in range(query.shape[0]):
            seen = None if mask is None else mask[row % mask.shape[0], :columns]
            for at in _documents(seen, columns, key.device):
                if len(at) >= context_length:
                    qkv = tuple(x[row].index_select(1, at) for x in (query, key, value))
                    _listen_to(lesson, qkv, kwargs["scale"], kwargs["softcap"])

    hooks = [
        eva.register_forward_pre_hook(listen, with_kwargs=True)
        for eva in evas
        if eva.path in lessons
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _documents(mask: Tensor | None, columns: int, device: torch.device) -> list[Tensor]:
    """Return each document's columns, without padding."""
    everything = torch.arange(columns, device=device)
    if mask is None:
        return [everything]
    if mask.dtype == torch.bool:
        return [everything[mask]]
    borders = ((mask[1:] != mask[:-1]).nonzero()[:, 0] + 1).tolist()
    return list(everything.tensor_split(borders))


def _listen_to(
    lesson: SelectorLessons, qkv: tuple[Tensor, ...], scale: float, softcap: float
) -> None:
    """Add a document's sample."""
    q, k, v = qkv
    options = cache_options(lesson.config, scale, softcap)
    names = ("rule", "chunk_size", "scale", "version")
    pooling = {name: options[name] for name in names}
    inputs = (k[None], v[None], lesson.parameters, None, None)
    rfa_k, rfa_v, bias = torch.ops.flasheva.chunk_tokens(*inputs, **pooling)
    tokens, chunks = (rfa_k[0], rfa_v[0], bias[0]), lesson.config.retrieve_chunks
    sample = selector_sample((q, k, v), tokens, cache_settings(options), chunks)
    if sample is not None:
        lesson.samples.append(sample)
