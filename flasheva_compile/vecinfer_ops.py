"""The ops of generation over a cache of codes: they write a :class:`QuantizedState`.

``flasheva::vecinfer_append`` stores the first tokens; ``flasheva::vecinfer_decode`` sees ``L`` new
tokens, appends them and attends from them. On a GPU a few tokens run generated kernels, everything
else the PyTorch code of ``quantization``.
"""

# ruff: noqa: ANN401 - the ops' functions are typed by their schemas
from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from flasheva_compile.implementations import runs_kernels
from flasheva_compile.lowering import launch_vecinfer
from flasheva_compile.lowering.vecinfer_books import (
    KernelCodebooks,
    KernelTransforms,
    kernel_codebooks,
    kernel_transforms,
)
from flasheva_compile.op_checks import OP_VERSION, require
from flasheva_compile.op_registration import fakes, implements
from flasheva_compile.quantization.attention import append_and_attend
from flasheva_compile.quantization.coding import codec_of
from flasheva_compile.quantization.formats import (
    FP8,
    CodeFormat,
    KvFormat,
    KvStorage,
    WordFormat,
    WordKvFormat,
)
from flasheva_compile.quantization.fp8 import Fp8Codec
from flasheva_compile.quantization.state import QuantizedState, append
from flasheva_compile.quantization.transform_coding import (
    TRANSFORM_TENSORS,
    LayerTransforms,
    TransformCodec,
)
from flasheva_compile.quantization.vecinfer import LayerCodebooks, VqCodec

if TYPE_CHECKING:
    from torch import Tensor

    from flasheva_compile.quantization.state import Codec

_STATE_SCHEMA = ", ".join(f"Tensor(s{i}!) {name}" for i, name in enumerate(QuantizedState._fields))
_NEW_TOKENS = f"Tensor k, Tensor v, Tensor? key_mask, Tensor[] books, {_STATE_SCHEMA}"
_OPTIONS = (
    "str key_code, str value_code, bool rotate_keys, bool rotate_values, bool lookup, "
    "int sink_tokens, int exact_tokens, int block_tokens, float scale, float softcap, str version"
)
_SUBJECT = "flasheva::vecinfer_decode"
_OWN = 5  # tensors of ``LayerCodebooks``


def vecinfer_options(
    codec: Codec, storage: KvStorage, scale: float, softcap: float = 0.0
) -> dict[str, Any]:
    """Return the keyword arguments of the ops for a layer."""
    names = ("sink_tokens", "exact_tokens", "block_tokens")
    options: dict[str, Any] = {name: getattr(storage, name) for name in names}
    options |= {"scale": scale, "softcap": softcap, "version": OP_VERSION}
    if not isinstance(codec, VqCodec):
        words = isinstance(codec, TransformCodec)
        rotate = {"rotate_keys": words, "rotate_values": False, "lookup": False}
        key, value = (codec.form.key, codec.form.value) if words else (FP8, FP8)
        return {"key_code": str(key), "value_code": str(value), **rotate, **options}
    books = codec.codebooks
    return {
        "key_code": str(codec.form.key),
        "value_code": str(codec.form.value),
        "rotate_keys": books.rotate_keys,
        "rotate_values": books.rotate_values,
        "lookup": codec.lookup,
        **options,
    }


def op_books(codec: Codec, dtype: torch.dtype) -> list[Tensor]:
    """Return the tensors of a codec as the ops take them: to be made once for a layer.

    The first ones are those of ``LayerCodebooks``, empty where there is none, or of
    ``LayerTransforms``; the others are what kernels read. fp8 has none.
    """
    if isinstance(codec, TransformCodec):
        own = list(codec.transforms.tensors().values())
        prepared = launch_vecinfer.fits(codec.form, dtype)
        return [*own, *(kernel_transforms(codec.transforms, dtype) if prepared else ())]
    if not isinstance(codec, VqCodec):
        return []
    books = codec.codebooks
    nothing = books.scale.new_empty(0)
    optional = (nothing if x is None else x for x in (books.order, books.offset))
    own = [books.scale, books.keys, books.values, *optional]
    if not launch_vecinfer.fits(codec.form, dtype):
        return own
    sizes = (codec.head_dim, codec.value_dim)
    return [*own, *kernel_codebooks(books, sizes, dtype)]


def _kv_format(key: str, value: str) -> KvFormat | WordKvFormat:
    """Read the formats of keys and values, which are of one sort."""
    words = [re.fullmatch(r"w(\d+)", text) for text in (key, value)]
    if words[0] and words[1]:
        return WordKvFormat(*(WordFormat(int(found[1])) for found in words if found))
    codes = [re.fullmatch(r"d(\d+)b(\d+)", text) for text in (key, value)]
    what, hint = f"{key!r} and {value!r} are no formats of codes", "such as 'd4b8'"
    require(all(found is not None for found in codes), what, _SUBJECT, hint)
    return KvFormat(*(CodeFormat(*map(int, found.groups())) for found in codes if found))


class _Call(NamedTuple):
    """What calls that are alike have in common.

    Attributes:
        form: Of the codes; None = fp8.
        storage: What is exact.
        kernels: Whether generated kernels run: of codes, if ``op_books`` prepared what they read.
    """

    form: KvFormat | WordKvFormat | None
    storage: KvStorage
    kernels: bool


def _described(args: tuple[Any, ...], o: dict[str, Any]) -> _Call:
    """Check the arguments, once for calls that are alike: every layer does it for every token."""
    q, k, v, key_mask, books, *state = args
    tensors = tuple((x.shape, x.dtype) for x in (q, k, v, state[2], state[3]))
    key = (tensors, k.device, None if key_mask is None else key_mask.shape, len(books), *o.items())
    call = _known.get(key)
    if call is None:
        _check(args, o)
        names = ("sink_tokens", "exact_tokens", "block_tokens")
        storage = KvStorage(format=FP8, **{n: o[n] for n in names})  # the name is not read
        form = None
        if o["key_code"] != FP8:
            form = _kv_format(o["key_code"], o["value_code"])
        prepared = form is None or len(books) > own_tensors(form)
        kernels = prepared and runs_kernels(k, v) and launch_vecinfer.covers(q, v, form)
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        call = _known[key] = _Call(form, storage, kernels)
    return call


_known: dict[tuple[Any, ...], _Call] = {}
_MOST_KNOWN = 4096


def own_tensors(form: KvFormat | WordKvFormat) -> int:
    """Return how many of the books are what was learned; kernels read what is behind them."""
    return _OWN if isinstance(form, KvFormat) else len(TRANSFORM_TENSORS)


def _codec(
    books: list[Tensor], sizes: tuple[int, int], form: KvFormat | WordKvFormat | None, o: Any
) -> Codec:
    """Return what the PyTorch code reads the books by: made once, for it prepares rotations."""
    if form is None:
        return Fp8Codec(*sizes)
    own = books[: own_tensors(form)]
    flags = (o["rotate_keys"], o["rotate_values"], o["lookup"])
    # One layer's scale may be another's, too: their other tensors tell them apart.
    identity = (sizes, form, flags, *((x.data_ptr(), x.shape) for x in own))
    known: Any = _codecs.setdefault(own[0], {})
    if identity not in known:
        # Aliases: a codec that held the scale itself would keep its own entry alive.
        learned = _learned([x.detach() for x in own], form, flags)
        known[identity] = codec_of(learned, form, sizes, lookup=flags[2])
    return known[identity]


def _learned(
    own: list[Tensor], form: KvFormat | WordKvFormat, flags: tuple[bool, bool, bool]
) -> LayerCodebooks | LayerTransforms:
    if isinstance(form, WordKvFormat):
        return LayerTransforms(**dict(zip(TRANSFORM_TENSORS, own, strict=True)))
    scale, keys, values, order, offset = own
    return LayerCodebooks(
        scale=scale,
        keys=keys,
        values=values,
        order=order if order.numel() else None,
        offset=offset if offset.numel() else None,
        rotate_keys=flags[0],
        rotate_values=flags[1],
    )


_codecs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Scale of a layer -> codecs of the layers that have it."""


def _check(args: tuple[Any, ...], o: dict[str, Any]) -> None:
    q, k, v, key_mask, books, *tensors = args
    state = QuantizedState(*tensors)
    require(o["version"] == OP_VERSION, f"version {o['version']!r}", _SUBJECT, "compile again")
    same = q.dim() == k.dim() == v.dim() == 4 and q.dtype == k.dtype == v.dtype
    require(same, "q, k and v must be [B, H, L, D] of one dtype", _SUBJECT)
    require(k.shape[2] > 0, "no token to append", _SUBJECT)
    require(q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} heads for {k.shape[1]}", _SUBJECT)
    masked = key_mask is None or tuple(key_mask.shape) == (k.shape[0], k.shape[2])
    require(masked, "key_mask must be [B, L]", _SUBJECT)
    for name, x, kept in (("k", k, state.tail_k), ("v", v, state.tail_v)):
        fits = x.shape[:2] == kept.shape[:2] and x.shape[3] == kept.shape[3]
        message = f"{name} is {tuple(x.shape)} {x.dtype}, the cache holds {tuple(kept.shape)}"
        hint = "use the batch and the model that the cache was filled with, or reset it"
        require(fits and x.dtype == kept.dtype, f"{message} {kept.dtype}", _SUBJECT, hint)
    coded = True
    if o["key_code"] != FP8:
        coded = len(books) >= own_tensors(_kv_format(o["key_code"], o["value_code"]))
    require(coded, "codes without codebooks", _SUBJECT, "pass what op_books returned")


def _valid(k: Tensor, key_mask: Tensor | None) -> Tensor:
    return k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if key_mask is None else key_mask


@implements("vecinfer_append", f"({_NEW_TOKENS}, *, {_OPTIONS}) -> ()")
def _append(*args: Any, **options: Any) -> None:
    """Append without attending: scale and softcap are not read."""
    call = _described((args[0], *args), options)
    k, v, key_mask, books, *state = args
    codec = _codec(books, (k.shape[3], v.shape[3]), call.form, options)
    append(QuantizedState(*state), codec, call.storage, (k, v), _valid(k, key_mask))


@fakes("vecinfer_append")
def _(*args: Any, **options: Any) -> None:
    _check((args[0], *args), options)


@implements("vecinfer_decode", f"(Tensor q, {_NEW_TOKENS}, *, {_OPTIONS}) -> (Tensor, Tensor)")
def _decode(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Append and attend: ``out [B, Hq, L, Dv]`` and ``lse [B, Hq, L]``."""
    call = _described(args, options)
    q, k, v, key_mask, books, *tensors = args
    state, scale, softcap = QuantizedState(*tensors), options["scale"], options["softcap"]
    if call.kernels:
        return launch_vecinfer.vecinfer_decode(
            (q, k, v),
            key_mask,
            state,
            _kernel_books(books, call.form),
            call.form,
            call.storage,
            rotate=(options["rotate_keys"], options["rotate_values"]),
            scale=scale,
            softcap=softcap,
        )
    codec = _codec(books, (q.shape[3], v.shape[3]), call.form, options)
    valid = _valid(k, key_mask)
    return append_and_attend((q, k, v), valid, state, codec, call.storage, scale, softcap)


def _kernel_books(
    books: list[Tensor], form: KvFormat | WordKvFormat | None
) -> KernelCodebooks | KernelTransforms | None:
    """Return the part of the books that kernels read."""
    if form is None:
        return None
    prepared = books[own_tensors(form) :]
    kind = KernelCodebooks if isinstance(form, KvFormat) else KernelTransforms
    return kind._make(prepared)


@fakes("vecinfer_decode")
def _(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    _check(args, options)
    q, _, v = args[:3]
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:3], dtype=accumulator)
    return q.new_empty(*q.shape[:3], v.shape[3]), lse
