"""From a report to the kernels that its rewritten attentions run: source and resources."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from flasheva_compile import implementations
from flasheva_compile.errors import ConfigError
from flasheva_compile.implementations import Masks
from flasheva_compile.layer_names import compress_names
from flasheva_compile.lowering import recording
from flasheva_compile.lowering.emit.arguments import FEATURES
from flasheva_compile.lowering.launch_decode import StepShape, decode_spec
from flasheva_compile.lowering.pooled_chunks import kernel_rule
from flasheva_compile.report import PREPARED, KernelReport

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from flasheva_compile.lowering.schedule_cost import Target
    from flasheva_compile.lowering.spec import KernelSpec
    from flasheva_compile.report import CompileReport, LayerReport

_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
_WINDOWS = 4  # tokens of the call whose launches are collected, in windows
_OPTIONS = ("window_size", "chunk_size", "sink_tokens", "window", "softcap", "dropout_p")
_RETRIEVAL = ("retrieve_chunks", "retrieve_block", "retrieve_by")
_UNNAMED: dict[str, Any] = {"path": "", "source": "", "expected": False}


def list_kernels(report: CompileReport, target: str = "sm_90") -> tuple[KernelReport, ...]:
    """Generate and compile the kernels of forward (and, when training, backward) passes.

    Nothing runs and no GPU is needed: the launches of each distinct attention are collected from
    the code that makes them. Attentions that no kernel covers contribute what does run.

    Args:
        report: Of a model; half precision is taken for bf16.
        target: What to compile for, such as ``"sm_80"``, ``"sm_90"`` or ``"gfx942"``.

    Returns:
        In the order of launches, each kernel once.

    Raises:
        ConfigError: Unknown target, or Triton is missing.
    """
    try:
        from flasheva_compile.lowering.emit.module import emit
        from flasheva_compile.lowering.offline import TARGETS, resources
        from flasheva_compile.lowering.schedule import choose, known_target
    except ImportError as error:
        raise ConfigError(f"{error}", subject="kernels", hint="install triton") from error
    if target not in TARGETS:
        raise ConfigError(f"{target!r} is none of {', '.join(TARGETS)}", subject="kernels")
    known = known_target(target)
    found: dict[KernelSpec, list[str]] = {}
    for layer, paths in _distinct(report):
        for spec in _specs(layer, known):
            found.setdefault(spec, []).extend(paths)
    listed = []
    for spec, paths in found.items():
        generated = emit(spec, choose(spec, known))
        used = resources(generated, target)
        listed.append(
            KernelReport(
                layers=", ".join(compress_names(dict.fromkeys(paths))),
                kind=spec.kind,
                name=generated.name,
                source=generated.source,
                target=target,
                registers=used.registers,
                shared_bytes=used.shared,
                spilled_bytes=used.stack,
                matrix=used.matrix,
            )
        )
    return tuple(listed)


def _distinct(report: CompileReport) -> Iterator[tuple[LayerReport, list[str]]]:
    """Group rewritten attentions that launch the same."""
    groups: dict[LayerReport, list[str]] = {}
    for layer in report.rewritten:
        # Of what is written for people, these words alone decide something.
        mask = "ALiBi" * ("ALiBi" in layer.mask)
        reason = PREPARED * (layer.reason == PREPARED)
        same = dataclasses.replace(layer, **_UNNAMED, mask=mask, reason=reason)
        groups.setdefault(same, []).append(layer.path)
    yield from groups.items()


def _specs(layer: LayerReport, target: Target) -> list[KernelSpec]:
    """Collect the launches of one attention, in order, each spec once."""
    sizes = (layer.heads, layer.kv_heads, layer.head_dim, layer.value_dim)
    window, chunk = layer.window_size, layer.chunk_size
    assert None not in (*sizes, window, chunk)  # of what was rewritten they are known
    heads, kv_heads, dim, value_dim = (x or 0 for x in sizes)
    length = _WINDOWS * (window or 0) + 2 * (chunk or 0) * (1 + layer.retrieve_chunks)
    dtype = _DTYPES[layer.itemsize]
    q, k, v = (
        torch.empty(1, *shape, dtype=dtype, device="meta")
        for shape in ((heads, length, dim), (kv_heads, length, dim), (kv_heads, length, value_dim))
    )
    options: dict[str, Any] = {name: getattr(layer, name) for name in _OPTIONS + _RETRIEVAL}
    options |= {"rule": layer.chunk_rule, "scale": layer.scale or dim**-0.5}
    options |= {"causal": bool(layer.causal), "q_offset": 0}
    if layer.weighted_bounds:
        options["selector_weight"] = k.new_empty(kv_heads, 3, dim)
    run = _retrieve if layer.retrieve_chunks else _attend
    parameters = _parameters(layer, k)
    masks = _masks(layer, k)
    with recording.recorded(target) as specs:
        means = _means(k, masks, options) if layer.chunk_rule == "eva" else None
        run((q, k, v), parameters, masks, options, layer.training)
        if means and layer.training:
            means_of = {**options, "rule": "mean"}
            implementations.pool_backward(means, k, k, [], masks, means_of)
        specs += _decoding(layer, (q, k, v), parameters, options)
    return list(dict.fromkeys(specs))


def _decoding(
    layer: LayerReport,
    qkv: tuple[Tensor, Tensor, Tensor],
    parameters: list[Tensor],
    o: dict[str, Any],
) -> tuple[KernelSpec, ...]:
    """Return what one step of a prepared model's generation launches; not of retrieval."""
    if layer.reason != PREPARED or layer.retrieve_chunks:
        return ()
    q, k, v = (x[:, :, :1] for x in qkv)
    if not implementations.runs_kernels(k, v):
        return ()
    shape = StepShape(
        q=q.shape,
        v=v.shape,
        chunks=1,
        dtype=q.dtype,
        device=q.device,
        rule=kernel_rule(o["rule"], parameters),
        # Those of eva's feature maps, which the cache applies, and not what they give.
        parameters=len(FEATURES) if o["rule"] == "eva" else len(parameters),
        key_mask=layer.has_key_mask,
        alibi=bool(layer.mask),
    )
    spec = decode_spec(shape, implementations.attention_settings(o))
    return spec, spec.of_kind("decode_combine")


def _masks(layer: LayerReport, k: Tensor) -> Masks:
    length = k.shape[2]
    return Masks(
        key_mask=k.new_empty(1, length, dtype=torch.bool) if layer.has_key_mask else None,
        segment_ids=k.new_empty(1, length, dtype=torch.int64) if layer.has_segments else None,
        alibi_slopes=k.new_empty(layer.heads or 0, dtype=torch.float32) if layer.mask else None,
        dropout_seed=k.new_empty(1, dtype=torch.int64) if layer.dropout_p else None,
    )


def _parameters(layer: LayerReport, k: Tensor) -> list[Tensor]:
    if layer.chunk_rule == "eva":  # features and means, computed in front of the op
        chunks = -(-k.shape[2] // (layer.chunk_size or 1))
        return [k.new_empty(1, k.shape[1], chunks, k.shape[3]) for _ in range(2)]
    vectors = [k.new_empty(k.shape[1], k.shape[3]) for _ in range(min(2, layer.rule_parameters))]
    bias = [k.new_empty(k.shape[1])] if layer.rule_parameters > 2 else []
    return vectors + bias


def _means(k: Tensor, masks: Masks, o: dict[str, Any]) -> Sequence[Tensor]:
    """Pool what the feature maps of ``eva`` get: mean queries, like values, and mean keys."""
    return implementations.pool(k, k, [], masks, {**o, "rule": "mean"})[:3]


def _attend(
    qkv: tuple[Tensor, Tensor, Tensor],
    parameters: list[Tensor],
    masks: Masks,
    o: dict[str, Any],
    training: bool,  # noqa: FBT001 - of the same shape as `_retrieve`
) -> None:
    out, lse, pooled = implementations.pool_and_attend(qkv, parameters, masks, o)
    if training:
        given = (pooled, qkv, parameters, masks, o)
        implementations.pool_and_attend_backward(torch.empty_like(out), (out, lse), *given)


def _retrieve(
    qkv: tuple[Tensor, Tensor, Tensor],
    parameters: list[Tensor],
    masks: Masks,
    o: dict[str, Any],
    training: bool,  # noqa: FBT001
) -> None:
    pooled = implementations.pool(*qkv[1:], parameters, masks, o)
    result = implementations.retrieve(qkv, pooled[:3], masks, o)
    if training:
        dout, tokens = torch.empty_like(result[0]), pooled[:3]
        grads = implementations.retrieve_backward(dout, result, qkv, tokens, masks, o)
        implementations.pool_backward(grads[3:], *qkv[1:], parameters, masks, o)
