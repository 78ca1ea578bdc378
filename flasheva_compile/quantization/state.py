"""What a quantised layer stores: sinks and a ring of last tokens exactly, codes of all others.

Tokens are stored by their place among the valid tokens of their row: padding is left out, so that a
padded row is stored as it would be alone. Codes are written when a token arrives; what
:func:`coded_until` returns decides which of two forms is read. So a rollback has nothing to undo.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from flasheva_compile.errors import ConfigError
from flasheva_compile.quantization.fp8 import Fp8Codec

if TYPE_CHECKING:
    from flasheva_compile.quantization.formats import KvStorage

ROLLBACK = 32  # tokens that can be forgotten at any time; the ring is longer by as many


class Codec(Protocol):
    """Turns tokens into codes: ``VqCodec``, ``TransformCodec`` or ``Fp8Codec``.

    Attributes:
        key_bytes: Bytes of a key's codes, without the byte behind them that fp8 has.
        value_bytes: The same of a value.
    """

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
        exponents: Last bytes of fp8's keys and values, ``[B, Hkv, room, 2]`` uint8, apart from the
            others so that those are aligned; of other formats ``[B, Hkv, room, 0]``.
        length: Valid tokens of each row, ``[B]`` int64.
        written: The most that it ever was, ``[B]`` int64.
    """

    sink_k: Tensor
    sink_v: Tensor
    tail_k: Tensor
    tail_v: Tensor
    key_codes: Tensor
    value_codes: Tensor
    exponents: Tensor
    length: Tensor
    written: Tensor


def ring_size(storage: KvStorage) -> int:
    """Return the tokens that the ring holds."""
    return storage.exact_tokens + storage.block_tokens + ROLLBACK


def packed_tokens(state: QuantizedState, block: slice) -> tuple[Tensor, Tensor]:
    """Return keys and values of a block of codes as a codec encoded them."""
    exponents = state.exponents[:, :, block]
    parts = (state.key_codes, exponents[..., :1]), (state.value_codes, exponents[..., 1:])
    keys, values = (torch.cat([codes[:, :, block], own], -1) for codes, own in parts)
    return keys, values


def last_places(length: Tensor, ring: int) -> Tensor:
    """Return the last place that each slot of a ring holds, ``[B, ring]``; negative = none."""
    last = length[:, None] - 1
    return last - (last - torch.arange(ring, device=length.device)) % ring


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
        exponents=codes(k, 2 if isinstance(codec, Fp8Codec) else 0),
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
    """Store new tokens, in place; nothing waits for the device.

    Args:
        state: With room for them.
        codec: Writes the codes.
        storage: What is exact.
        kv: New keys ``[B, Hkv, L, D]`` and values ``[B, Hkv, L, Dv]``.
        valid: ``[B, L]`` bool: which of them are no padding.

    Raises:
        ConfigError: There is no room, and the state is on the host. Elsewhere nobody knows in time:
            ``append_and_attend`` returns NaN.
    """
    k, v = kv
    if not k.shape[2]:
        return
    arrived, before = valid.sum(1), state.length.clone()
    if k.device.type == "cpu":
        _expect_room(int((before + arrived).amax()), state, storage)
    state.length.add_(arrived)
    torch.maximum(state.written, state.length, out=state.written)
    new = _NewTokens(
        column=valid.byte().argsort(dim=1, descending=True, stable=True),
        arrived=arrived,
        before=before,
    )
    first = torch.arange(storage.sink_tokens, device=k.device).expand(k.shape[0], -1)
    last = last_places(state.length, state.tail_k.shape[2])
    for x, sink, tail in ((k, state.sink_k, state.tail_k), (v, state.sink_v, state.tail_v)):
        new.keep(sink, x, first)
        new.keep(tail, x, last)
    for codes, exponents, encoded in (
        (state.key_codes, state.exponents[..., :1], codec.encode_keys(k)),
        (state.value_codes, state.exponents[..., 1:], codec.encode_values(v)),
    ):
        own = encoded.tensor_split([codes.shape[3]], -1)
        for kept, part in zip((codes, exponents), own, strict=True):
            new.store(kept, part, storage.sink_tokens)


class _NewTokens(NamedTuple):
    """Where the new tokens of each row belong: the ``j``-th valid one at ``before + j``.

    Attributes:
        column: Of the valid tokens in their order, then of the others, ``[B, L]``.
        arrived: Valid tokens, ``[B]``.
        before: Tokens that the row had, ``[B]``.
    """

    column: Tensor
    arrived: Tensor
    before: Tensor

    def keep(self, kept: Tensor, x: Tensor, place: Tensor) -> None:
        """Write those of ``x [B, Hkv, L, D]`` whose places ``kept [B, Hkv, T, D]`` is to hold.

        Args:
            kept: Written in place.
            x: New tokens.
            place: What each slot of ``kept`` is to hold, ``[B, T]``.
        """
        index = place - self.before[:, None]
        fresh = (index >= 0) & (index < self.arrived[:, None])
        column = self.column.gather(1, index.clamp(0, x.shape[2] - 1))
        column = column[:, None, :, None].expand(-1, *kept.shape[1:])
        kept.copy_(x.gather(2, column).where(fresh[:, None, :, None], kept))

    def store(self, codes: Tensor, encoded: Tensor, sinks: int) -> None:
        """Write ``encoded [B, Hkv, L, bytes]`` where their places are in ``codes``."""
        room, row = codes.shape[2], torch.arange(codes.shape[0], device=codes.device)[:, None]
        ordinal = torch.arange(encoded.shape[2], device=codes.device)
        # What is no code (sinks, padding) rewrites a slot of its own with what is there: slots of
        # as many tokens as there is room for differ.
        for part in ordinal.split(room) if room else ():
            slot = self.before[:, None] + part - sinks
            stored = (slot >= 0) & (slot < room) & (part < self.arrived[:, None])
            slot = slot.remainder(room)
            new = encoded[row, :, self.column[:, part]]  # [B, part, Hkv, bytes]
            codes[row, :, slot] = new.where(stored[..., None, None], codes[row, :, slot])


def _expect_room(needed: int, state: QuantizedState, storage: KvStorage) -> None:
    room = storage.sink_tokens + state.key_codes.shape[2]
    if needed > room:
        message, hint = f"{needed} tokens in a cache of {room}", "give a larger max_cache_len"
        raise ConfigError(message, subject="vecinfer_decode", hint=hint)


def can_crop(state: QuantizedState, storage: KvStorage, tokens: Tensor) -> bool:
    """Return whether the ring holds every token that is read exactly after :func:`crop`."""
    length = state.length - tokens
    held = state.written - state.tail_k.shape[2]
    # A query sees at least one token more than what stays.
    return not bool(((length < 0) | (coded_until(length + 1, storage) < held)).any())


def crop(state: QuantizedState, storage: KvStorage, tokens: Tensor) -> bool:
    """Forget the last tokens of each row, in place.

    Args:
        state: Changed only if all can be forgotten.
        storage: What is exact.
        tokens: How many, ``[B]``.

    Returns:
        What :func:`can_crop` says.
    """
    granted = can_crop(state, storage, tokens)
    if granted:
        state.length.sub_(tokens)
    return granted
