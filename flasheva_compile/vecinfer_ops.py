"""The op of generation over a cache of codes, ``flasheva::vecinfer_decode``: it writes a state.

A call sees ``L`` new tokens and the state of :class:`QuantizedState`; it appends them and attends
from them. On a GPU a few tokens run generated kernels, everything else the PyTorch code of
``quantization/attention.py``.
"""

# ruff: noqa: ANN401 - the ops' functions are typed by their schemas
from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.implementations import runs_kernels
from flasheva_compile.lowering import launch_vecinfer
from flasheva_compile.op_checks import OP_VERSION, require
from flasheva_compile.op_registration import fakes, implements
from flasheva_compile.quantization.attention import append_and_attend
from flasheva_compile.quantization.formats import FP8, CodeFormat, KvFormat, KvStorage
from flasheva_compile.quantization.fp8 import Fp8Codec
from flasheva_compile.quantization.state import QuantizedState
from flasheva_compile.quantization.vecinfer import LayerCodebooks, VqCodec

if TYPE_CHECKING:
    from torch import Tensor

    from flasheva_compile.quantization.state import Codec

_STATE_SCHEMA = ", ".join(f"Tensor(s{i}!) {name}" for i, name in enumerate(QuantizedState._fields))
_INPUTS = f"Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor[] books, {_STATE_SCHEMA}"
_OPTIONS = (
    "str key_code, str value_code, bool rotate_keys, bool rotate_values, bool lookup, "
    "int sink_tokens, int exact_tokens, int block_tokens, float scale, float softcap, str version"
)
_SUBJECT = "flasheva::vecinfer_decode"


def vecinfer_options(
    codec: Codec, storage: KvStorage, scale: float, softcap: float = 0.0
) -> dict[str, Any]:
    """Return the keyword arguments of the op for a layer."""
    names = ("sink_tokens", "exact_tokens", "block_tokens")
    options: dict[str, Any] = {name: getattr(storage, name) for name in names}
    options |= {"scale": scale, "softcap": softcap, "version": OP_VERSION}
    if not isinstance(codec, VqCodec):
        rotate = {"rotate_keys": False, "rotate_values": False, "lookup": False}
        return {"key_code": FP8, "value_code": FP8, **rotate, **options}
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
    """Return the tensors of a codec as the op takes them: to be made once for a layer.

    The first five are those of ``LayerCodebooks``, empty where there is none; the others are what
    kernels read. fp8 has none.
    """
    if not isinstance(codec, VqCodec):
        return []
    books = codec.codebooks
    nothing = books.scale.new_empty(0)
    optional = (nothing if x is None else x for x in (books.order, books.offset))
    own = [books.scale, books.keys, books.values, *optional]
    if not launch_vecinfer.fits(codec.form, dtype):
        return own
    sizes = (codec.head_dim, codec.value_dim)
    return [*own, *launch_vecinfer.kernel_codebooks(books, sizes, dtype)]


def _code_format(text: str) -> CodeFormat:
    found = re.fullmatch(r"d(\d+)b(\d+)", text)
    require(found is not None, f"{text!r} is no format of codes", _SUBJECT, "such as 'd4b8'")
    assert found is not None
    return CodeFormat(*map(int, found.groups()))


def _codec(q: Tensor, v: Tensor, books: list[Tensor], o: dict[str, Any]) -> Codec:
    sizes = (q.shape[3], v.shape[3])
    if o["key_code"] == FP8:
        return Fp8Codec(*sizes)
    order, offset = (x if x.numel() else None for x in books[3:5])
    rotate = {name: o[name] for name in ("rotate_keys", "rotate_values")}
    scale, keys, values = books[:3]
    layer = LayerCodebooks(
        scale=scale, keys=keys, values=values, order=order, offset=offset, **rotate
    )
    form = KvFormat(_code_format(o["key_code"]), _code_format(o["value_code"]))
    return VqCodec(layer, form, *sizes, lookup=o["lookup"])


def _storage(o: dict[str, Any]) -> KvStorage:
    names = ("sink_tokens", "exact_tokens", "block_tokens")
    return KvStorage(format=FP8, **{name: o[name] for name in names})  # the name is not read


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
    coded = o["key_code"] == FP8 or len(books) >= 5
    require(coded, "codes without codebooks", _SUBJECT, "pass what op_books returned")


@implements("vecinfer_decode", f"({_INPUTS}, *, {_OPTIONS}) -> (Tensor, Tensor)")
def _decode(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Append and attend: ``out [B, Hq, L, Dv]`` and ``lse [B, Hq, L]``."""
    _check(args, options)
    q, k, v, key_mask, books, *tensors = args
    state, codec, storage = (
        QuantizedState(*tensors),
        _codec(q, v, books, options),
        _storage(options),
    )
    scale, softcap = options["scale"], options["softcap"]
    prepared = len(books) > 5 and runs_kernels(k, v)
    if prepared and isinstance(codec, VqCodec) and launch_vecinfer.covers(q, v, codec.form):
        return launch_vecinfer.vecinfer_decode(
            (q, k, v),
            key_mask,
            state,
            launch_vecinfer.KernelCodebooks(*books[5:]),
            codec.form,
            storage,
            rotate=(options["rotate_keys"], options["rotate_values"]),
            scale=scale,
            softcap=softcap,
        )
    valid = key_mask if key_mask is not None else k.new_ones(k.shape[0], k.shape[2]).bool()
    return append_and_attend((q, k, v), valid, state, codec, storage, scale, softcap)


@fakes("vecinfer_decode")
def _(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    _check(args, options)
    q, _, v = args[:3]
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:3], dtype=accumulator)
    return q.new_empty(*q.shape[:3], v.shape[3]), lse
