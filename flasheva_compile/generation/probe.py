"""Which attentions of a transformers model can be converted: run it once, small, and watch.

Every attention that goes through AttentionInterface is run by the model's own function and by ours
with a window over everything; an attention is convertible if both agree, with and without a cache,
with padding. Everything else stays full, with the reason. Attentions that :mod:`.routes` knows are
led through the interface for the run.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile.errors import ConfigError
from flasheva_compile.generation import interface
from flasheva_compile.generation.prepared import attention_configs
from flasheva_compile.generation.routes import place_of, route_of
from flasheva_compile.generation.trial import difference, rerouted
from flasheva_compile.ops import flasheva_attention

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from flasheva_compile.generation.alibi import Slopes

_NAME = "eva_probe"
_PROMPT, _STEP, _PADDING = 7, 2, 2  # tokens of the first call, of the second, left padding of row 1
_WINDOW = 16  # over all of them


@dataclasses.dataclass(slots=True, kw_only=True)
class ProbedAttention:
    """What the probe saw of one attention.

    Attributes:
        path: Its module path.
        module: The attention.
        index: Its place in the cache; None if it has none.
        implementation: The name of its own attention function.
        itemsize: Bytes per element of keys and values.
        heads: ``Hq``.
        kv_heads: ``Hkv``.
        head_dim: ``D``.
        value_dim: ``Dv``.
        causal: Whether it got the model's plain causal mask.
        calls: How often it ran.
        slopes: Of ALiBi, as its own implementation adds it; None = it does not.
        reason: Why it cannot be converted; empty if it can.
    """

    path: str
    module: Any
    index: int | None
    implementation: str
    itemsize: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool = False
    calls: int = 0
    slopes: Slopes | None = None
    reason: str = ""


class _Probe:
    """The state of one probe run; attention and mask functions find it in ``_running``."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = {id(module): path for path, module in model.named_modules()}
        modules: list[Any] = [m for m in model.modules() if hasattr(m, "config")]
        self.implementations: dict[int, str] = {
            id(m): m.config._attn_implementation
            for m in modules
            if hasattr(m.config, "_attn_implementation")
        }
        self.found: dict[int, ProbedAttention] = {}
        # What is looked up by id is kept, so that the id stays its own.
        self.masks: dict[int, tuple[Tensor, str]] = {}  # why it is not plain causal; "" if it is
        self.updated: list[tuple[Tensor, Tensor]] = []
        self.readers: dict[int, ProbedAttention] = {}  # id of keys -> the attention that had them
        self.cache: Any = None

    def implementation_of(self, module: nn.Module) -> str:
        """Return the name of the function that an attention runs by itself."""
        route = route_of(module)
        if route is not None and route.method != "forward":
            return "eager"  # its own method, whatever the configuration says
        return self.implementations.get(id(module), "sdpa" if route is None else "eager")

    def unlike_causal(self, mask: Tensor | None, *, biased: bool) -> str:
        """Say what a mask is instead of the plain causal one; empty if it is that.

        Models with ALiBi may have made it anew, as their routes know; then its numbers tell.
        """
        if id(mask) in self.masks:
            return self.masks[id(mask)][1]
        same = (
            why
            for known, why in self.masks.values()
            if biased and mask is not None and torch.equal(known, mask.to(known.dtype))
        )
        return next(same, "its mask is the model's own")


_running: list[_Probe] = []
_alone = threading.Lock()  # of two threads that prepare models, one waits


def probe(model: Any) -> tuple[ProbedAttention, ...]:  # noqa: ANN401 - a transformers model
    """Run ``model`` on a few tokens and return its attentions in the order in which they run.

    Returns:
        Those that go through AttentionInterface, by themselves or by a route of ours; none of a
        model that has no such attention.

    Raises:
        ConfigError: The model has some, but cannot be run on token ids and a cache alone, or what
            a route replaces is not as the route says.
    """
    from transformers.cache_utils import DynamicCache

    _register()
    text = model.config.get_text_config(decoder=True)
    run = _Probe(model)
    run.cache = DynamicCache(config=text)
    _watch_updates(run)
    routes = rerouted(model, _attention, run.updated)
    with _alone, _implementation(model, _NAME), evaluating(model), torch.no_grad(), routes:
        _running.append(run)
        try:
            for inputs in probe_calls(model):
                run.masks.clear()
                model(**inputs, past_key_values=run.cache, use_cache=True)
        except ConfigError:
            raise
        except Exception as error:
            if _attends(model, run):
                raise _cannot_run(model, error) from error
        finally:
            _running.clear()
    return tuple(run.found.values())


def _attends(model: Any, run: _Probe) -> bool:  # noqa: ANN401
    """Tell whether a model that does not run with a cache has attentions that we could see."""
    if not run.found:
        inputs = next(iter(probe_calls(model)))
        try:
            model(input_ids=inputs["input_ids"], use_cache=False)
        except Exception:
            return True  # nothing is known; the first error says why
    return bool(run.found)


def _cannot_run(model: Any, error: Exception) -> ConfigError:  # noqa: ANN401
    why = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    return ConfigError(
        f"{type(model).__name__} cannot be run on a few token ids and a DynamicCache: {why}",
        hint='use torch.compile(model, backend="flasheva"), which needs no trial run',
    )


def probe_calls(model: Any) -> Iterator[dict[str, Tensor]]:  # noqa: ANN401
    """Yield the inputs of the probe's two calls: a padded prompt, two more tokens."""
    text = model.config.get_text_config(decoder=True)
    device = model.get_input_embeddings().weight.device
    count = 2 * (_PROMPT + _STEP)
    ids = (torch.arange(count, device=device) * 5 + 3) % max(1, min(text.vocab_size, 256) - 1)
    ids = ids.view(2, -1)
    mask = torch.ones_like(ids)
    mask[1, :_PADDING] = 0
    yield {"input_ids": ids[:, :_PROMPT], "attention_mask": mask[:, :_PROMPT]}
    yield {"input_ids": ids[:, _PROMPT:], "attention_mask": mask}


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)


def _watch_updates(run: _Probe) -> None:
    update = run.cache.update

    def watched(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        result = update(*args, **kwargs)
        run.updated.append(result)
        return result

    run.cache.update = watched


@contextmanager
def _implementation(model: Any, name: str) -> Iterator[None]:  # noqa: ANN401
    before = attention_configs(model)
    for config, _ in before:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, own in before:
            config._attn_implementation = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# --- what runs in place of attention and mask functions -------------------------------------------


def _mask(**inputs: Any) -> Tensor:  # noqa: ANN401 - the interface's keywords
    """Return an additive mask, and remember whether it is the plain causal one."""
    from transformers.masking_utils import eager_mask

    inputs = {**inputs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = eager_mask(**inputs)
    _running[0].masks[id(mask)] = (mask, _unlike_causal(inputs))
    return mask


def _unlike_causal(inputs: dict[str, Any]) -> str:
    """Say what a mask is instead of the plain causal one; empty if it is that."""
    from transformers.masking_utils import bidirectional_mask_function

    mask_function, size = inputs["mask_function"], inputs.get("local_size")
    if interface.is_causal(mask_function):
        return ""
    if size is not None:
        return f"it has a window or chunks of {size} tokens already"
    if mask_function is bidirectional_mask_function:
        return "it is not causal"
    return "its mask is not the plain causal mask, but has additions of the model's own"


def _attention(
    module: Any,  # noqa: ANN401 - an attention of transformers
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,  # noqa: ANN401
) -> tuple[Tensor, Tensor | None]:
    """Run the model's own function, and note whether ours computes the same."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    run, route = _running[0], route_of(module)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    eager = eager if route is None else route.own
    function = eager or ALL_ATTENTION_FUNCTIONS["sdpa"]
    # The class's own forward runs beside it, and not as an implementation that has a name for it.
    slopes = _slopes(module, "eager", query.device) if kwargs.pop("alibi", False) else None
    inputs = {"scaling": scaling, "dropout": dropout, **kwargs}
    inputs |= {} if slopes is None else {"alibi_slopes": slopes}
    out, weights = function(module, query, key, value, attention_mask, **inputs)
    seen = run.found.get(id(module))
    if seen is None:
        seen = ProbedAttention(
            path=run.paths.get(id(module), type(module).__name__),
            module=module,
            index=place_of(module),
            implementation=run.implementation_of(module),
            itemsize=key.element_size(),
            heads=query.shape[1],
            kv_heads=key.shape[1],
            head_dim=key.shape[3],
            value_dim=value.shape[3],
        )
        run.found[id(module)] = seen
    seen.calls += 1
    if slopes is not None:
        assert route is not None
        assert route.alibi is not None
        seen.slopes = route.alibi.slopes(module, seen.implementation)
    seen.causal = run.unlike_causal(attention_mask, biased=slopes is not None) == ""
    _note_sharing(run, seen, key)
    seen.reason = seen.reason or _refusal(run, seen, (query, key, value), attention_mask, inputs)
    if not seen.reason and attention_mask is not None:
        ours = _ours(query, key, value, attention_mask, scaling, inputs)
        seen.reason = difference(ours, out, attention_mask)
    return out, weights


def _slopes(module: Any, implementation: str, device: torch.device) -> Tensor:  # noqa: ANN401
    route = route_of(module)
    assert route is not None
    assert route.alibi is not None
    return torch.tensor(route.alibi.slopes(module, implementation), device=device)


def _note_sharing(run: _Probe, seen: ProbedAttention, key: Tensor) -> None:
    """Refuse attentions that read the same keys: a compressed layer hands out the new ones only."""
    if not any(key is k for k, _ in run.updated):
        return
    first = run.readers.setdefault(id(key), seen)
    if first is not seen:
        first.reason = first.reason or f"{seen.path} reads its keys and values, too"
        seen.reason = seen.reason or f"it reads the keys and values of {first.path}"


def _refusal(
    run: _Probe,
    seen: ProbedAttention,
    qkv: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> str:
    """Say why an attention cannot be converted, from what it was called with; empty if it can."""
    from transformers.cache_utils import DynamicLayer

    query, key, value = qkv
    layers, index = run.cache.layers, seen.index
    refused = interface.unsupported_inputs(kwargs)
    unlike = run.unlike_causal(mask, biased="alibi_slopes" in kwargs)
    cached = any(key is k and value is v for k, v in run.updated)
    if index is None or index >= len(layers):
        return "its place in the cache is not known" if cached else "it keeps no cache"
    kind, route = type(layers[index]), route_of(seen.module)
    window = route.window(seen.module) if route is not None else 0
    sliding = getattr(layers[index], "sliding_window", None)
    checks = (
        (mask is None, "it is called without a mask"),
        (bool(refused), f"it is called with {', '.join(refused)}"),
        (unlike != "", unlike),
        (window > 0, f"it has a window of {window} tokens already"),
        (kwargs.get("sliding_window") is not None, "it has a sliding window of its own"),
        (sliding is not None, f"its cache keeps a window of {sliding} tokens"),
        (kind is not DynamicLayer, f"its cache is a {kind.__name__}"),
        (not cached, "what it attends to is computed from what it caches, not cached itself"),
        (query.shape[1] % key.shape[1] != 0, "its heads are no multiple of its kv heads"),
        (mask is not None and key.shape[2] != mask.shape[-1], "its mask is not of its keys"),
    )
    return next((reason for fails, reason in checks if fails), "")


def _ours(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    key_mask = mask[:, 0, -1] == 0
    out, lse = flasheva_attention(
        query,
        key,
        value,
        key_mask=key_mask.expand(key.shape[0], -1),
        window_size=_WINDOW,
        chunk_size=_WINDOW,
        q_offset=key.shape[2] - query.shape[2],
        scale=scaling,
        softcap=kwargs.get("softcap") or 0.0,
        alibi_slopes=kwargs.get("alibi_slopes"),
    )
    sink = kwargs.get("s_aux")
    if sink is not None:
        out = out * torch.sigmoid(lse - sink.view(1, -1, 1).to(lse.dtype))[..., None]
    return out.transpose(1, 2)
