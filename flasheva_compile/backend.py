"""The backend behind ``torch.compile(model, backend="flasheva")``: composes the stages."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from flasheva_compile import _torch_compat as compat
from flasheva_compile.analysis import analyse, describe
from flasheva_compile.config import parse_options
from flasheva_compile.errors import CaptureError, FlashEvaError
from flasheva_compile.plan import expect_rewritten
from flasheva_compile.premises import guarded, untouched_copy
from flasheva_compile.report import CompileReport
from flasheva_compile.rewrite import rewrite
from flasheva_compile.scope import guard_rules

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import fx, nn

    from flasheva_compile.analysis import Analysis
    from flasheva_compile.config import Options

log = logging.getLogger(__name__)

_SPLIT = (
    "DistributedDataParallel: Dynamo compiles this model in parts, and a mask that another part "
    "makes cannot be understood. Set torch._dynamo.config.optimize_ddp = False, or prepare(model)"
)

_LAST = (
    "{} graphs of this function: Dynamo compiles no more of them, and calls that none of them fits "
    "run with full attention. Raise torch._dynamo.config.recompile_limit"
)

_reports: WeakKeyDictionary[nn.Module, list[CompileReport]] = WeakKeyDictionary()


def flasheva_backend(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite the attentions of a graph, then compile it; called by ``torch.compile``.

    Args:
        graph: Dynamo's graph; edited in place.
        inputs: Its example inputs.
        mode: ``torch.compile(mode=)``; forwarded to Inductor.
        options: ``torch.compile(options=)``; see ``parse_options``.

    Returns:
        The compiled callable.

    Raises:
        ConfigError: An option is wrong; nothing was changed.
        PlanError: ``strict=True`` and an attention cannot be rewritten; nothing was changed.
    """
    try:
        return _compile(graph, inputs, mode, options)
    except FlashEvaError as error:
        raise compat.through_dynamo(error) from error


def reports_of(model: nn.Module) -> tuple[CompileReport, ...]:
    """Return the reports of every graph compiled so far for a model or a part of it."""
    return tuple(report for part in model.modules() for report in _reports.get(part, ()))


def _compile(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    mode: str | None,
    options: Mapping[str, Any] | None,
) -> Callable[..., Any]:
    settings = parse_options(options, inductor_options=compat.inductor_option_names())
    inner, warnings = _inner_backend(settings, inputs)
    try:
        analysis = analyse(graph, inputs, settings)
    except CaptureError as error:
        if settings.strict:
            raise
        _publish(CompileReport(warnings=(f"graph left as it is: {error}",)))
        return _run_inner(inner, graph, inputs, mode, settings)
    original = untouched_copy(graph) if analysis.premises else None
    report = _edit(analysis, settings, warnings)
    _publish(report)
    compiled = _run_inner(inner, graph, inputs, mode, settings)
    if original is not None and report.rewritten:
        return guarded(compiled, original, analysis.premises, tuple(inputs))
    return compiled


def _edit(analysis: Analysis, settings: Options, warnings: tuple[str, ...]) -> CompileReport:
    """Carry out the plan and guard what it rests on."""
    start = time.perf_counter()
    done = rewrite(analysis.captured, analysis.plan)
    if settings.strict:
        # A mask that turned out impossible to rebuild; the edited graph is thrown away.
        expect_rewritten(done)
    guard_rules(analysis.scope, analysis.places, settings.hybrid)
    seconds = {**analysis.seconds, "rewrite": time.perf_counter() - start}
    report = describe(done, seconds, (*analysis.warnings, *warnings))
    more = [_SPLIT] if report.unexpected and compat.splits_for_ddp() else []
    if report.rewritten and (variants := compat.compiled_variants()) >= compat.recompile_limit():
        more.append(_LAST.format(variants))
    return dataclasses.replace(report, warnings=(*report.warnings, *more))


def _inner_backend(settings: Options, inputs: Sequence[Any]) -> tuple[str, tuple[str, ...]]:
    """Choose what compiles the rewritten graph, with a warning if it is not what was asked."""
    on_cpu = any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in inputs)
    if settings.inner_backend == "inductor" and on_cpu and not compat.has_cpp_compiler():
        return "aot_eager", ("no C++ compiler found: aot_eager instead of Inductor, slower",)
    return settings.inner_backend, ()


def _run_inner(
    inner: str,
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    mode: str | None,
    settings: Options,
) -> Callable[..., Any]:
    if inner == "eager":
        return graph.forward
    if inner == "aot_eager":
        return compat.compile_aot_eager(graph, inputs)
    return compat.compile_inductor(graph, inputs, mode, dict(settings.inductor))


def _publish(report: CompileReport) -> None:
    """Log the report and attach it to the module whose frame was compiled."""
    for layer in report.layers:
        log.info("%s: %s (mask: %s) %s", layer.path, layer.decision, layer.mask, layer.reason)
    for warning in report.warnings:
        log.warning("%s", warning)
    if report.unexpected:
        reasons = dict.fromkeys(f"{layer.path}: {layer.reason}" for layer in report.unexpected)
        log.warning(
            "%d of %d attentions left full: %s",
            len(report.unexpected),
            len(report.layers),
            "; ".join(list(reasons)[:4]),
        )
    found = compat.compiled_frame_module()
    # A frame that goes on after a graph break in a plain function has no module of its own.
    owners = [found[1]] if found is not None else compat.modules_on_stack()[:1]
    for owner in owners:
        _reports.setdefault(owner, []).append(report)
