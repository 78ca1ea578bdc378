"""How far a model with a cache in few bits is from itself with an exact one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from flasheva_compile.adaptation.calibrate import model_inputs, running_eagerly
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.cache import FlashEvaCache
from flasheva_compile.generation.cached_reading import read_through
from flasheva_compile.quantization.formats import EXACT, KvStorage
from flasheva_compile.quantization.state import coded_until

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

    from flasheva_compile.quantization.codebooks import KvCodebooks

_LIKELIEST = 64  # tokens whose probabilities are compared one by one; all others are one more
_ROWS_AT_ONCE = 256  # rows of the vocabulary-sized logits in fp32 [tokens]


class _Expected(NamedTuple):
    """What the model with an exact cache says of the tokens of a call, ``[B, L, 64]``."""

    tokens: Tensor
    log_probabilities: Tensor


class KvTrials:
    """Divergences of a prepared model whose full layers are stored in one way or another.

    Every token is read through the cache, as decoding token by token would, from a cache that is
    exact (once) and from one that is stored in the way to be tried. The divergence is
    Kullback-Leibler's between what both say of the next token, the 64 likeliest tokens one by one
    and all others taken together, which is at most that of all and takes little memory.

    Args:
        model: The prepared model.
        batches: Token ids ``[B, N]``, or dicts with ``input_ids``.

    Attributes:
        tokens: How many tokens a divergence is a mean over.

    Raises:
        ConfigError: The batches are none, of the wrong type, padded, or so short that every token
            is read exactly.
    """

    def __init__(self, model: Any, batches: Iterable[Any]) -> None:  # noqa: ANN401
        self._model = model
        self._batches = [
            _whole_rows(inputs, f"batches[{index}]")
            for index, inputs in enumerate(model_inputs(model, batches))
        ]
        self.tokens = sum(ids.numel() for ids in self._batches)
        with running_eagerly(model):
            self._expected = [
                [_likeliest(logits) for logits in self._calls(ids, full_layers=EXACT)]
                for ids in self._batches
            ]

    def divergence(self, formats: Mapping[int, str], codebooks: KvCodebooks) -> float:
        """Return the mean divergence with layers stored so, and others exactly [nats per token]."""
        total, way = 0.0, {"full_layers": formats, "codebooks": codebooks}
        with running_eagerly(self._model):
            for ids, expected in zip(self._batches, self._expected, strict=True):
                calls = zip(expected, self._calls(ids, **way), strict=True)
                total += sum(_divergence(*call) for call in calls)
        return total / self.tokens

    def _calls(self, ids: Tensor, **way: Any) -> Iterator[Tensor]:  # noqa: ANN401
        return read_through(self._model, ids, FlashEvaCache.for_model(self._model, **way))


def _whole_rows(inputs: dict[str, Any], subject: str) -> Tensor:
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    for name in sorted(set(inputs) - {"input_ids", "attention_mask", "labels"}):
        raise ConfigError(f"has {name}, which text read through a cache has not", subject=subject)
    if mask is not None and not bool(mask.bool().all()):
        raise ConfigError("has padding", subject=subject, hint="give rows of text alone")
    storage = KvStorage(format="fp8")  # all formats keep as many tokens exactly
    if int(coded_until(torch.tensor(ids.shape[1]), storage)) <= storage.sink_tokens:
        message = f"{ids.shape[1]} tokens are all read exactly"
        raise ConfigError(message, subject=subject, hint="give rows as long as texts to be cached")
    return ids


def _likeliest(logits: Tensor) -> _Expected:
    count = min(_LIKELIEST, logits.shape[-1] - 1)
    parts = [
        some.float().log_softmax(-1).topk(count) for some in logits.split(_ROWS_AT_ONCE, dim=1)
    ]
    values, tokens = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return _Expected(tokens, values)


def _divergence(expected: _Expected, logits: Tensor) -> float:
    """Return the sum over a call's tokens."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    split = (x.split(_ROWS_AT_ONCE, dim=1) for x in (*expected, logits))
    for tokens, values, some in zip(*split, strict=True):
        got = some.float().log_softmax(-1).gather(-1, tokens)
        p, q = _with_rest(values), _with_rest(got)
        total += (p.exp() * (p - q)).sum()
    return float(total)


def _with_rest(log_probabilities: Tensor) -> Tensor:
    """Append the logarithm of what all other tokens have together; fp64."""
    x = log_probabilities.double()
    rest = (1 - x.exp().sum(-1, keepdim=True)).clamp_min(1e-7)
    return torch.cat([x, rest.log()], -1)
