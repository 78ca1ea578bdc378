"""Ways to store a cache in few bits, for ``vecinfer_quality.py``, and attention through them.

Every position reads the first tokens and the last ones exactly, all between as they are stored: one
pass over a text gives what decoding it token by token would.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

import flasheva_compile as fe
from flasheva_compile.quantization.codebook import nearest_by_products
from flasheva_compile.quantization.coding import codec_of
from flasheva_compile.quantization.formats import KvFormat, KvStorage, kv_format
from flasheva_compile.quantization.fp8 import Fp8Codec
from flasheva_compile.quantization.learn import LearningOptions
from flasheva_compile.quantization.transform_coding import TransformCodec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from flasheva_compile.quantization.codebooks import KvCodebooks
    from flasheva_compile.quantization.formats import CodeFormat
    from flasheva_compile.quantization.vecinfer import VqCodec

    Quantise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

NAME = "vecinfer-quality"
GROUP = 32  # of KIVI: tokens of a key's channel, channels of a value
LONG = 32768  # length that bytes per token are given for besides those measured [tokens]
MANY = 1024  # codewords; of more, fewer vectors each, and half of the iterations
PAPER = LearningOptions.paper()
OURS = LearningOptions()
ABLATIONS = {
    "paper": PAPER,
    "paper, no smoothing": replace(PAPER, smooth="none"),
    "paper, no Hadamard": replace(PAPER, rotate="none"),
    "paper, neither": replace(PAPER, smooth="none", rotate="none"),
    "paper, centred": replace(PAPER, centre=True),
    "paper, weighed": replace(PAPER, weigh=0.7),
    "not weighed": replace(OURS, weigh=0.0),
    "not centred": replace(OURS, centre=False),
    "Hadamard of all channels": replace(OURS, rotate="hadamard"),
    "balanced": replace(OURS, smooth="balance"),
    "smoothed by max": replace(OURS, smooth="largest"),
    "not smoothed": replace(OURS, smooth="none"),
    "not rotated": replace(OURS, rotate="none"),
    "values rotated": replace(OURS, rotate_values=True),
    "a codebook per head": replace(OURS, per_head=True),
}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One way to store the cache.

    Attributes:
        about: What it is.
        bits: Stored bits per element of what is not exact, without codebooks.
        quantise: Layer -> function that rounds keys and values ``[B, Hkv, N, D]``.
        books: What was learned.
    """

    about: str
    bits: float
    quantise: Callable[[int], Quantise] | None = None
    books: KvCodebooks | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What codebooks are learned from.

    Attributes:
        model: The model, with full attention in the layers to learn.
        rows: Text ``[rows, tokens]``.
        iterations: Of k-means, at most.
        layers: Places in the cache; None = all.
        others: Text to select formats by ``[rows, tokens]``.
    """

    model: Any
    rows: Tensor
    iterations: int
    others: Tensor | None = None
    layers: Sequence[int] | None = None


def exact(_: Learning) -> Stored:
    """Return what nothing is quantised in."""
    return Stored(about="keys and values in bf16", bits=16)


def fp8(learning: Learning) -> Stored:
    """Return this project's fp8."""
    size = head_dim(learning.model)
    codec = Fp8Codec(size, size)
    about = "e4m3, a power of two per token and head"
    return Stored(about=about, bits=8 + 8 / size, quantise=lambda _: partial(coded_fp8, codec))


def kivi_style(_: Learning) -> Stored:
    """Return KIVI's rule at 2 bits."""
    about = (
        f"keys per channel in groups of {GROUP} tokens, values per token in groups of {GROUP} "
        "channels, asymmetric, scale and zero in fp16"
    )
    return Stored(about=about, bits=2 + 32 / GROUP, quantise=lambda _: kivi)


def vecinfer(name: str, options: LearningOptions, about: str, learning: Learning) -> Stored:
    """Learn codebooks and return codes of them."""
    form, size = kv_format(name), head_dim(learning.model)
    options = replace(options, iterations=learning.iterations)
    if has_many_codewords(name):
        options = replace(options, iterations=learning.iterations // 2, vectors=128)
    rows = learning.rows.split(1)
    books = fe.calibrate_kv(learning.model, rows, name, options=options, layers=learning.layers)
    bits = 8 * form.nbytes(size, size) / (2 * size)
    return stored_as(books, f"K {form.key}, V {form.value}: {about}", bits, learning.model)


def stored_as(books: KvCodebooks, about: str, bits: float, model: Any) -> Stored:  # noqa: ANN401
    """Return codes of codebooks, whose formats may differ."""
    size, device = head_dim(model), model.device
    codecs = {
        index: codec_of(layer.to(device), kv_format(books.formats[index]), (size, size))
        for index, layer in books.layers.items()
    }
    return Stored(about=about, bits=bits, quantise=lambda i: partial(coded, codecs[i]), books=books)


def has_many_codewords(name: str) -> bool:
    """Whether k-means of a format's codebooks takes long."""
    form = kv_format(name)
    return isinstance(form, KvFormat) and form.key.entries > MANY


def theirs(backend: str, bits: int, _: Learning) -> Stored | dict[str, Any]:
    """Return transformers' own quantised cache, whose backend is a package of its own."""
    from transformers import cache_utils

    module = {"quanto": "optimum.quanto", "hqq": "hqq"}[backend]
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        return {"skipped": f"{module} is not installed"}
    kind = {"quanto": "QuantoQuantizedLayer", "hqq": "HQQQuantizedLayer"}[backend]
    axis = {"quanto": 0, "hqq": 1}[backend]  # as transformers' own documentation advises
    make = partial(getattr(cache_utils, kind), nbits=bits, axis_key=axis, axis_value=axis)

    def rounded(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        layer = make()
        layer.lazy_initialization(k, v)
        k, v = (layer._dequantize(layer._quantize(x.contiguous(), axis)) for x in (k, v))
        return k, v

    about = f"{kind}, {bits} bits, groups of 64, a scale and a zero each in 16 bits"
    return Stored(about=about, bits=bits + 32 / 64, quantise=lambda _: rounded)


def their_fp8(_: Learning) -> Stored | dict[str, Any]:
    """Return transformers' own fp8: one scale per tensor."""
    try:
        from transformers.cache_utils import Fp8QuantizedLayer
    except ImportError:
        return {"skipped": "this version of transformers has none"}

    def rounded(*tensors: Tensor) -> Any:  # noqa: ANN401
        pairs = [Fp8QuantizedLayer()._quantize(x) for x in tensors]
        return tuple((codes.float() * scale).to(x) for x, (codes, scale) in zip(tensors, pairs))  # noqa: B905

    return Stored(about="e4m3, one scale per tensor", bits=8, quantise=lambda _: rounded)


def head_dim(model: Any) -> int:  # noqa: ANN401
    """Return the head dimension."""
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_bytes(model: Any, length: int, form: str | None, books: Any) -> int:  # noqa: ANN401
    """Return the bytes of a preallocated cache of a prepared model for one row."""
    options = {} if form is None else {"full_layers": form, "codebooks": books}
    cache = fe.FlashEvaCache.for_model(model, max_cache_len=length, **options)
    heads, size = model.config.num_key_value_heads, head_dim(model)
    empty = torch.empty(1, heads, 0, size, dtype=model.dtype, device=model.device)
    for layer in cache.layers:
        layer.lazy_initialization(empty, empty)
    return cache.nbytes()


def described(stored: Stored, model: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return what an arm stores, in bits per element of what is not exact and of whole caches."""
    storage, config = KvStorage(format="fp8"), model.config
    layers = config.num_hidden_layers if stored.books is None else len(stored.books.layers)
    size = head_dim(model) * config.num_key_value_heads * layers * 2  # elements per token
    lengths = (2048, 8192, LONG)
    overhead = 0 if stored.books is None else stored.books.nbytes()

    def whole(length: int) -> float:
        exact = min(length, storage.exact_tokens + storage.sink_tokens)
        bits = 16 * exact + stored.bits * (length - exact)
        return round(bits / length + 8 * overhead / (size * length), 3)

    return {
        "about": stored.about,
        "bits": stored.bits,
        "codebook_bytes": overhead,
        "bits_with_all": {str(n): whole(n) for n in lengths},
        "bytes_per_token": {str(n): round(whole(n) * size / 8, 1) for n in lengths},
    }


# --- rounding -------------------------------------------------------------------------------------


def coded(codec: VqCodec | TransformCodec, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Encode and decode; of equally near codewords, any."""
    if isinstance(codec, TransformCodec):
        words = codec.encode_keys(k), codec.encode_values(v)
        keys, values = (
            codec.decode_keys(words[0], torch.float32),
            codec.decode_values(words[1], torch.float32),
        )
        return codec.restore_keys(keys).to(k), codec.restore_values(values).to(v)
    books = codec.codebooks
    offset = 0 if books.offset is None else books.offset[:, None]
    keys = _codewords(codec.transform_keys(k) - offset, books.keys, codec.form.key) + offset
    values = _codewords(codec.transform_values(v), books.values, codec.form.value)
    return codec.restore_keys(keys).to(k), codec.restore_values(values).to(v)


def _codewords(x: Tensor, books: Tensor, form: CodeFormat) -> Tensor:
    """Return ``[B, Hkv, N, D]`` with each sub-vector's nearest codeword in its place."""
    books = books.to(x)
    parts = x.unflatten(-1, (-1, form.vector))
    groups = [parts] if books.shape[0] == 1 else parts.split(1, 1)
    found = [
        book[nearest_by_products(group.flatten(0, -2), book)[0]].view(group.shape)
        for group, book in zip(groups, books, strict=True)
    ]
    return torch.cat(found, 1).flatten(-2)


def coded_fp8(codec: Fp8Codec, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Encode and decode."""
    keys = codec.decode_keys(codec.encode_keys(k), torch.float32)
    values = codec.decode_values(codec.encode_values(v), torch.float32)
    return keys.to(k), values.to(v)


def kivi(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Round to four levels: keys along tokens, values along channels."""
    tokens = k.shape[2]
    padded = torch.nn.functional.pad(k.float(), (0, 0, 0, -tokens % GROUP), mode="replicate")
    keys = _four_levels(padded.unflatten(2, (-1, GROUP)), 3).flatten(2, 3)[:, :, :tokens]
    values = _four_levels(v.float().unflatten(-1, (-1, GROUP)), -1).flatten(-2)
    return keys.to(k), values.to(v)


def _four_levels(x: Tensor, axis: int) -> Tensor:
    zero = x.amin(axis, keepdim=True).half().float()
    step = ((x.amax(axis, keepdim=True) - zero) / 3).half().float()
    level = ((x - zero) / step.clamp_min(1e-8)).round().clamp(0, 3)
    return level * step + zero


# --- attention ------------------------------------------------------------------------------------


class StoredAttention:
    """The attention function of every arm: what is not exact is read as it is stored.

    Attributes:
        storage: What is exact.
        quantise: Layer -> how it is stored; a layer that is not there is stored in bf16.
        prefill: Tokens whose queries read everything in bf16, as a prompt's do.
    """

    def __init__(self) -> None:
        self.storage = KvStorage(format="fp8")
        self.quantise: dict[int, Quantise] = {}
        self.prefill = 0
        self.mask: tuple[tuple[Any, ...], Tensor] | None = None
        AttentionInterface.register(NAME, self)
        AttentionMaskInterface.register(NAME, lambda **_: None)

    def __call__(
        self,
        module: Any,  # noqa: ANN401
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _: Tensor | None,
        scaling: float | None = None,
        **__: Any,  # noqa: ANN401
    ) -> tuple[Tensor, None]:
        """Attend causally."""
        attend = torch.nn.functional.scaled_dot_product_attention
        group = query.shape[1] // key.shape[1]
        k, v = (x.bfloat16().to(x) for x in (key, value))
        quantise = self.quantise.get(module.layer_idx)
        first = self.prefill if quantise else query.shape[2]
        k_wide, v_wide = (x.repeat_interleave(group, 1) for x in (k, v))
        parts = []
        if first:
            start = (x[:, :, :first] for x in (query, k_wide, v_wide))
            parts.append(attend(*start, is_causal=True, scale=scaling))
        if quantise:
            k_coded, v_coded = (x.repeat_interleave(group, 1) for x in quantise(k, v))
            keys, values = torch.cat([k_wide, k_coded], 2), torch.cat([v_wide, v_coded], 2)
            mask = self.visible(first, query)
            parts.append(attend(query[:, :, first:], keys, values, attn_mask=mask, scale=scaling))
        return torch.cat(parts, 2).transpose(1, 2).contiguous(), None

    def visible(self, first: int, query: Tensor) -> Tensor:
        """Return which exact keys and which codes the queries from ``first`` on see, as a bias."""
        tokens, dtype, device = query.shape[2], query.dtype, query.device
        identity = (first, tokens, dtype, device)
        if self.mask is None or self.mask[0] != identity:
            column = torch.arange(tokens, device=device)
            distance = column[first:, None] - column
            codes = (distance >= self.storage.exact_tokens) & (column >= self.storage.sink_tokens)
            seen = torch.cat([(distance >= 0) & ~codes, codes], 1)
            bias = torch.zeros(seen.shape, dtype=dtype, device=device)
            self.mask = (identity, bias.masked_fill_(~seen, -torch.inf))
        return self.mask[1]
