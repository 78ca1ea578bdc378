"""Models and caches of the generation benchmark: random weights, contexts without a prefill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    GPTNeoXConfig,
    LlamaConfig,
    StaticCache,
)
from transformers.cache_utils import Cache, StaticLayer
from transformers.masking_utils import AttentionMaskInterface

import flasheva_compile as fe
from flasheva_compile.generation.exact_layer import ExactCacheLayer
from flasheva_compile.generation.vecinfer_layer import VecInferLayer
from flasheva_compile.quantization.learn import LearningOptions

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

UNMASKED = "unmasked_decode"  # transformers takes any name with "flash" in it for FlashAttention
ROOM = 64  # tokens that a preallocated cache has room for after the context
MODELS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "gpt-neox-410m": (
        GPTNeoXConfig,
        {
            "vocab_size": 50304,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
    ),
    "llama-1b": (
        LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
    ),
}
TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to generate.

    Attributes:
        about: What it is, for the record.
        static: Whether the cache is preallocated, so that a step can be captured or compiled.
        eva: Whether the model is prepared.
        attention: The attention of a model that is not.
        config: What differs from the command line's configuration.
        store: Where a retrieving layer's exact keys are.
        full_every: Every so many layers one stays full; 0 = none.
        kv: How the full ones are stored.
    """

    about: str
    static: bool
    eva: bool = False
    attention: str = "sdpa"
    config: dict[str, Any] = field(default_factory=dict)
    store: Literal["device", "offloaded", "fp8"] = "device"
    full_every: int = 0
    kv: str = "exact"


TOP_8 = {"chunk_size": 32, "retrieve_chunks": 8}
ARMS = {
    "flasheva_static": Arm(about="FlashEvaCache, preallocated", static=True, eva=True),
    "full_static": Arm(about="StaticCache, transformers' sdpa with its mask", static=True),
    "full_dynamic": Arm(about="DynamicCache, sdpa: what generate does by itself", static=False),
    "flasheva_retrieval": Arm(
        about="FlashEvaCache, preallocated; top-8 of chunks of 32 keys, exact keys on the device",
        static=True,
        eva=True,
        config=TOP_8,
    ),
    "flasheva_offloaded": Arm(
        about="the same, keys on the host", static=True, eva=True, config=TOP_8, store="offloaded"
    ),
    "flasheva_fp8_store": Arm(
        about="the same, keys and values in fp8", static=True, eva=True, config=TOP_8, store="fp8"
    ),
    "flasheva_retrieval_full": Arm(
        about="top-8 of chunks of 32 keys by bounds, and one layer of 16 full",
        static=True,
        eva=True,
        config={**TOP_8, "retrieve_by": "bounds"},
        full_every=16,
    ),
    "flasheva_hybrid": Arm(
        about="FlashEvaCache, preallocated; every fourth layer full",
        static=True,
        eva=True,
        full_every=4,
    ),
    **{
        f"flasheva_hybrid_{name}": Arm(
            about=f"the same with the full layers in {kv}",
            static=True,
            eva=True,
            full_every=4,
            kv=kv,
        )
        for name, kv in (("2bit", "vq-2bit"), ("tc2bit", "tc-2bit"), ("tc3bit", "tc-3bit"))
    },
    "flasheva_dynamic": Arm(about="FlashEvaCache, growing", static=False, eva=True),
    "full_unmasked": Arm(
        about="StaticCache, SDPA without a mask: it reads the unwritten columns at the end too, "
        "the logits are wrong, but no full attention of PyTorch is faster",
        static=True,
        attention=UNMASKED,
    ),
    "window_sinks": Arm(
        about="a ring of FlashEVA's exact tokens and its sinks, no chunk tokens, SDPA unmasked",
        static=True,
        attention=UNMASKED,
    ),
}


def attend_to_all(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attend from one token to every column."""
    grouped = query.shape[1] != key.shape[1]
    out = functional.scaled_dot_product_attention(
        query, key, value, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2).contiguous(), None


def no_mask(*_: object, **__: object) -> None:
    """Build no mask."""


AttentionInterface.register(UNMASKED, attend_to_all)
AttentionMaskInterface.register(UNMASKED, no_mask)


class SinkRingLayer(StaticLayer):
    """Sinks and the latest tokens, in a ring; all of them are visible once it is full."""

    def __init__(self, sinks: int, ring: int) -> None:
        super().__init__(max_cache_len=sinks + ring)
        self.sinks, self.ring = sinks, ring

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Overwrite the oldest token of the ring by the new one."""
        slot = (self.sinks + (self.cumulative_length - self.sinks) % self.ring).view(1)
        self.keys.index_copy_(2, slot, key_states)
        self.values.index_copy_(2, slot, value_states)
        self.cumulative_length.add_(1)
        return self.keys, self.values


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the size of a cache depends on.

    Attributes:
        layers: Attentions.
        kv_heads: Key heads of each.
        head_dim: Of keys and values.
        itemsize: Bytes of a number.
    """

    layers: int
    kv_heads: int
    head_dim: int
    itemsize: int

    @classmethod
    def of(cls, model: Any) -> Shape:  # noqa: ANN401 - a transformers model
        """Read it off a model."""
        c = model.config
        heads = c.num_attention_heads
        return cls(
            layers=c.num_hidden_layers,
            kv_heads=getattr(c, "num_key_value_heads", None) or heads,
            head_dim=getattr(c, "head_dim", None) or c.hidden_size // heads,
            itemsize=model.dtype.itemsize,
        )

    def bytes_of(self, tokens: int) -> int:
        """Return the bytes of that many keys and values in every layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize * tokens

    def visible_bytes(self, name: str, a: argparse.Namespace, context: int) -> int:
        """Return the bytes of the keys, values and biases that the token after ``context`` sees."""
        config = eva_config(a, ARMS[name])
        w, c, sinks = config.window_size, config.chunk_size, config.sink_size
        if name == "window_sinks":
            return self.bytes_of(sinks + w + c)
        if not ARMS[name].eva:
            return self.bytes_of(context + 1)
        if every := ARMS[name].full_every:
            kv = ARMS[name].kv
            bits = 16 if kv == "exact" else int(kv.split("-")[1].removesuffix("bit"))
            full = self.layers // every / self.layers
            eva = self.visible_bytes("flasheva_static", a, context)
            return round(full * self.bytes_of(context + 1) * bits / 16 + (1 - full) * eva)
        first = max(0, context - w + 1) // c * c  # of the window
        chunks = max(0, first - sinks) // c
        exact = context + 1 - first + min(sinks, first)
        exact += min(chunks, config.retrieve_chunks) * c
        return self.bytes_of(exact + chunks) + 4 * self.layers * self.kv_heads * chunks


def build_model(a: argparse.Namespace, name: str, arm: Arm) -> Any:  # noqa: ANN401
    """Return a random model, the same weights for every arm, prepared if the arm needs it."""
    torch.manual_seed(0)
    kind, sizes = MODELS[name]
    sizes = {**sizes, "max_position_embeddings": 2 * max(a.contexts)}
    if a.tiny:
        sizes |= TINY
        if "num_key_value_heads" in sizes:
            sizes["num_key_value_heads"] = 2
    if a.layers:
        sizes["num_hidden_layers"] = a.layers
    config = kind(**sizes, attention_dropout=0.0)
    attention = "sdpa" if arm.eva else arm.attention
    with torch.device(a.device):
        dtype = getattr(torch, a.dtype)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.eval()
    if not arm.eva:
        return model
    config: dict[str, Any] = {"default": eva_config(a, arm)}
    layers, every = model.config.num_hidden_layers, arm.full_every
    config |= {str(n): {"attention": "full", "kv": arm.kv} for n in every_last(layers, every)}
    fe.prepare(model, config)
    if arm.kv != "exact":
        options = LearningOptions(iterations=1)  # what they say does not matter here
        ids = torch.arange(4096, device=a.device).view(4, -1) % model.config.vocab_size
        model.codebooks = fe.calibrate_kv(model, ids.split(1), arm.kv, options=options)
    return model


def every_last(layers: int, every: int) -> range:
    """Return the last of every so many layers."""
    return range(every - 1, layers, every) if every else range(0)


def eva_config(a: argparse.Namespace, arm: Arm) -> fe.EvaConfig:
    """Return FlashEVA's configuration."""
    sizes = {name: getattr(a, name) for name in ("window_size", "chunk_size", "sink_tokens")}
    return fe.EvaConfig(**{**sizes, **arm.config})


def step_weights(model: torch.nn.Module) -> int:
    """Return the bytes of the weights that a step reads: all but an embedding that is no head."""
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    head: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if head is not None and embedding.weight.data_ptr() != head.weight.data_ptr():
        del weights[embedding.weight.data_ptr()]
    return sum(weights.values())


def nbytes(cache: Cache) -> int:
    """Return the bytes of a cache's tensors."""
    if isinstance(cache, fe.FlashEvaCache):
        return cache.nbytes()
    tensors = [x for layer in cache.layers for x in vars(layer).values() if torch.is_tensor(x)]
    return sum(x.numel() * x.element_size() for x in tensors)


# --- caches, filled with random numbers -----------------------------------------------------------


def filled_cache(model: Any, name: str, rows: int, context: int, a: argparse.Namespace) -> Any:  # noqa: ANN401
    """Return the cache of an arm after ``context`` tokens that nobody computed."""
    arm, shape = ARMS[name], Shape.of(model)
    config = eva_config(a, arm)
    like = torch.empty(rows, shape.kv_heads, 0, shape.head_dim, device=model.device)
    like = like.to(model.dtype)
    if arm.eva:
        return _filled_eva(model, rows, context, config, arm)
    if not arm.static:
        dynamic = DynamicCache(config=model.config)
        for layer in dynamic.layers:
            size = (rows, shape.kv_heads, context, shape.head_dim)
            layer.lazy_initialization(like, like)
            layer.keys, layer.values = (like.new_empty(size).normal_() for _ in range(2))
        return dynamic
    if name == "window_sinks":
        sinks, ring = config.sink_size, config.window_size + config.chunk_size
        cache = Cache(layers=[SinkRingLayer(sinks, ring) for _ in range(shape.layers)])
    else:
        cache = StaticCache(config=model.config, max_cache_len=static_columns(context))
    layers: list[Any] = cache.layers
    for layer in layers:
        fill_full(layer, like, context)
    return cache


def fill_full(layer: Any, like: Tensor, context: int) -> None:  # noqa: ANN401 - a cache layer
    """Fill a preallocated layer that keeps every key, exactly or as codes."""
    if not layer.is_initialized:
        layer.lazy_initialization(like, like)
    if isinstance(layer, ExactCacheLayer):
        layer.state.exact_k.normal_()
        layer.state.exact_v.normal_()
        layer.state.exact_mask.fill_(True)
        layer.state.length.fill_(context)
        layer.seen, layer.is_empty = context, False
        return
    if not isinstance(layer, VecInferLayer):
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
        return
    assert layer.state is not None
    assert layer.columns is not None
    for x in (layer.state.key_codes, layer.state.value_codes):
        x.random_(0, 256)
    for x in layer.state[:4]:  # sinks and ring
        x.normal_()
    for x in (layer.state.length, layer.state.written, layer.columns):
        x.fill_(context)
    layer.seen, layer.is_empty = context, False


def fill_randomly(x: Tensor) -> None:
    """Fill a tensor with normal numbers, or with bytes that are small ones in fp8."""
    x.random_(0, 64) if x.dtype == torch.uint8 else x.normal_()


def static_columns(context: int) -> int:
    """Return the columns of a preallocated cache: a mask makes SDPA read every one of them."""
    return -(-(context + ROOM) // ROOM) * ROOM


def _filled_eva(
    model: Any,  # noqa: ANN401
    rows: int,
    context: int,
    config: fe.EvaConfig,
    arm: Arm,
) -> fe.FlashEvaCache:
    shape, columns = Shape.of(model), static_columns(context)
    sizes = {"max_batch_size": rows, "max_cache_len": columns} if arm.static else {}
    books = {"codebooks": model.codebooks} if arm.kv != "exact" else {}
    cache = fe.FlashEvaCache.for_model(model, **sizes, store=arm.store, **books)
    layers: list[Any] = cache.layers
    full = every_last(len(layers), arm.full_every)
    for index in full:
        like = torch.empty(rows, shape.kv_heads, 0, shape.head_dim, device=model.device)
        fill_full(layers[index], like.to(model.dtype), context)
    for layer in (x for n, x in enumerate(layers) if n not in full):
        if not arm.static:  # as after a prefill of the whole context
            size = (rows, shape.kv_heads, context, shape.head_dim)
            keys = torch.empty(1, dtype=model.dtype, device=model.device).expand(size)
            layer.lazy_initialization(keys, keys)
        if full or not arm.static:  # layers of one cache say that they hold alike
            layer.seen = context
        layer.is_empty = False
        exact = ("keys", "values") if config.retrieve_chunks else ("exact_k", "exact_v")
        for part in (*exact, "rfa_k", "rfa_v"):
            fill_randomly(getattr(layer.state, part))
        mask = layer.state.mask if config.retrieve_chunks else layer.state.exact_mask
        mask.fill_(True)
        layer.state.rfa_bias.fill_(torch.tensor(float(config.chunk_size)).log())
        layer.state.length.fill_(context)
    return cache
