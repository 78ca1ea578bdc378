"""What a quantised layer stores: sinks and a ring of last tokens exactly, codes of all others.

Tokens are stored by their place among the valid tokens of their row: padding is left out, so that a
padded row is stored as it would be alone. Codes are written when a token arrives; what
:func:`coded_until` returns decides which of two forms is read. So a rollback has nothing to undo.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flasheva_compile.quantization.formats import KvStorage

ROLLBACK = 32  # tokens that can be forgotten at any time; the ring is longer by as many


class Codec(Protocol):
    """Turns tokens into codes: ``VqCodec`` or ``Fp8Codec``."""

    key_bytes: int
    value_bytes: int

    def encode_keys(self, k: Tensor) -> Tensor:
        """Return codes of keys."""
        ...

    def encode_values(self, v: Tensor) -> Tensor:
        """Return codes of values."""
        ...

    def transform_queries(self, q: Tensor) -> Tensor:
        """Return queries as coded keys need them."""
        ...

    def scores(self, q: Tensor, packed: Tensor) -> Tensor:
        """Return products of transformed queries and coded keys."""
        ...

    def decode_values(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Return coded values."""
        ...

    def restore_values(self, v: Tensor) -> Tensor:
        """Return weighted sums of coded values as sums of values."""
        ...


class QuantizedState(NamedTuple):
    """The tensors of one layer.

    Attributes:
        sink_k: First keys, ``[B, Hkv, sinks, D]``.
        sink_v: First values, ``[B, Hkv, sinks, Dv]``.
        tail_k: Ring of the last keys, ``[B, Hkv, ring, D]``; place ``p`` is at ``p % ring``.
        tail_v: Ring of the last values, ``[B, Hkv, ring, Dv]``.
        key_codes: ``[B, Hkv, room, bytes]`` uint8; place ``p`` is at ``p - sinks``.
        value_codes: ``[B, Hkv, room, bytes]`` uint8.
        length: Valid tokens of each row, ``[B]`` int64.
        written: The most that it ever was, ``[B]`` int64.
    """

    sink_k: Tensor
    sink_v: Tensor
    tail_k: Tensor
    tail_v: Tensor
    key_codes: Tensor
    value_codes: Tensor
    length: Tensor
    written: Tensor


def ring_size(storage: KvStorage) -> int:
    """Return the tokens that the ring holds."""
    return storage.exact_tokens + storage.block_tokens + ROLLBACK


def coded_until(tokens: Tensor, storage: KvStorage) -> Tensor:
    """Return the place from which keys are read exactly by a query that sees ``tokens`` keys."""
    beyond = (tokens - storage.sink_tokens - storage.exact_tokens).clamp_min(0)
    return storage.sink_tokens + beyond // storage.block_tokens * storage.block_tokens


def new_state(k: Tensor, v: Tensor, codec: Codec, storage: KvStorage, room: int) -> QuantizedState:
    """Return an empty state for keys and values like these, with room for some codes."""
    sinks, ring = storage.sink_tokens, ring_size(storage)

    def exact(x: Tensor, tokens: int) -> Tensor:
        return x.new_zeros(*x.shape[:2], tokens, x.shape[3])

    def codes(x: Tensor, size: int) -> Tensor:
        return torch.zeros(*x.shape[:2], room, size, dtype=torch.uint8, device=x.device)

    return QuantizedState(
        sink_k=exact(k, sinks),
        sink_v=exact(v, sinks),
        tail_k=exact(k, ring),
        tail_v=exact(v, ring),
        key_codes=codes(k, codec.key_bytes),
        value_codes=codes(v, codec.value_bytes),
        length=k.new_zeros(k.shape[0], dtype=torch.long),
        written=k.new_zeros(k.shape[0], dtype=torch.long),
    )


def append(
    state: QuantizedState,
    codec: Codec,
    storage: KvStorage,
    kv: tuple[Tensor, Tensor],
    valid: Tensor,
) -> None:
    """Store new tokens, in place.

    Args:
        state: With room for them.
        codec: Writes the codes.
        storage: What is exact.
        kv: New keys ``[B, Hkv, L, D]`` and values ``[B, Hkv, L, Dv]``.
        valid: ``[B, L]`` bool: which of them are no padding.
    """
    k, v = kv
    sinks, ring = storage.sink_tokens, state.tail_k.shape[2]
    row, column = valid.nonzero(as_tuple=True)
    place = (state.length[:, None] + valid.cumsum(1) - 1)[row, column]
    state.length.add_(valid.sum(1))
    torch.maximum(state.written, state.length, out=state.written)

    first = place < sinks
    last = place >= state.length[row] - ring  # of two tokens for one slot, the later
    for x, sink, tail in ((k, state.sink_k, state.tail_k), (v, state.sink_v, state.tail_v)):
        sink[row[first], :, place[first]] = x[row[first], :, column[first]]
        tail[row[last], :, place[last] % ring] = x[row[last], :, column[last]]
    row, column, slot = row[~first], column[~first], place[~first] - sinks
    for x, codes, encode in (
        (k, state.key_codes, codec.encode_keys),
        (v, state.value_codes, codec.encode_values),
    ):
        tokens = x[row, :, column].transpose(0, 1)[None]  # [1, Hkv, tokens, D]
        codes[row, :, slot] = encode(tokens)[0].transpose(0, 1)


def crop(state: QuantizedState, storage: KvStorage, tokens: Tensor) -> bool:
    """Forget the last tokens of each row, in place.

    Args:
        state: Changed only if all can be forgotten.
        storage: What is exact.
        tokens: How many, ``[B]``.

    Returns:
        Whether the ring still holds every token that is read exactly then.
    """
    length = state.length - tokens
    held = state.written - state.tail_k.shape[2]
    # A query sees at least one token more than what stays.
    if bool(((length < 0) | (coded_until(length + 1, storage) < held)).any()):
        return False
    state.length.copy_(length)
    return True
