"""The documented calls: what was rewritten, and what would be."""

from __future__ import annotations

import dataclasses
import types
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flasheva_compile import _torch_compat as compat
from flasheva_compile.analysis import analyse, describe
from flasheva_compile.backend import reports_of
from flasheva_compile.config import parse_options
from flasheva_compile.errors import CaptureError, ConfigError, FlashEvaError
from flasheva_compile.generation.prepared import ATTRIBUTE
from flasheva_compile.kernel_listing import list_kernels
from flasheva_compile.report import CompileReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from flasheva_compile.config import Options


def explain(
    model: Callable[..., Any],
    /,
    *args: Any,  # noqa: ANN401
    options: Mapping[str, Any] | None = None,
    kernels: bool | str = False,
    **kwargs: Any,  # noqa: ANN401
) -> CompileReport:
    """Say what becomes of every attention of a model, and why.

    With inputs the model is traced and run once, and nothing is compiled or changed. Without
    inputs the report is about what ``backend="flasheva"`` has compiled for the model so far, or
    about what ``prepare`` decided.

    Args:
        model: A module or function, compiled or not.
        args: Inputs of the model.
        options: As for the backend.
        kernels: Also generate the rewritten attentions' kernels and compile them for a target such
            as ``"sm_90"`` (True), ``"sm_80"`` or ``"gfx942"``; takes seconds and needs no GPU.
        kwargs: More inputs of the model.

    Returns:
        One row per attention, totals, seconds per stage; ``print`` it or call ``to_json``. Each
        of its ``kernels`` has its source.

    Raises:
        ConfigError: Wrong options, or nothing to report.
    """
    report = _explained(getattr(model, "_orig_mod", model), args, options, kwargs)
    if kernels is False:
        return report
    target = "sm_90" if kernels is True else kernels
    return dataclasses.replace(report, kernels=list_kernels(report, target))


def _explained(
    target: Callable[..., Any],
    args: tuple[Any, ...],
    options: Mapping[str, Any] | None,
    kwargs: dict[str, Any],
) -> CompileReport:
    if not args and not kwargs:
        return _compiled_so_far(target)
    settings = parse_options(options, inductor_options=compat.inductor_option_names())
    found: list[CompileReport] = []

    def collect(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(_dry_run(graph, inputs, settings))
        return graph.forward

    with _uncompiled(target):
        torch.compile(_fresh_caller(target), backend=collect)(*args, **kwargs)
    return _merge(found)


def _dry_run(
    graph: torch.fx.GraphModule, inputs: Sequence[Any], settings: Options
) -> CompileReport:
    try:
        analysis = analyse(graph, inputs, settings)
    except CaptureError as error:
        return CompileReport(warnings=(str(error),))
    except FlashEvaError as error:
        raise compat.through_dynamo(error) from error
    return describe(analysis.plan, analysis.seconds, analysis.warnings)


def _compiled_so_far(model: object) -> CompileReport:
    inner = getattr(model, "module", None)  # of DistributedDataParallel
    if hasattr(model, ATTRIBUTE) or hasattr(inner, ATTRIBUTE):
        from flasheva_compile.generation.prepare import report_of  # loads transformers

        return report_of(model)
    reports = reports_of(model) if isinstance(model, nn.Module) else ()
    if not reports:
        raise ConfigError(
            "nothing was compiled for this model yet",
            subject="explain",
            hint="call the compiled model once, or pass example inputs to explain; a model whose "
            "code was compiled for an equal one has no report of its own",
        )
    return _merge(reports)


def _merge(reports: Sequence[CompileReport]) -> CompileReport:
    """Join the reports of several graphs: rows in order, times added up."""
    seconds: dict[str, float] = {}
    for report in reports:
        for stage, time in report.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + time
    lengths = [report.length for report in reports if report.length]
    return CompileReport(
        layers=tuple(dict.fromkeys(layer for report in reports for layer in report.layers)),
        length=max(lengths, default=None),
        seconds=seconds,
        warnings=tuple(dict.fromkeys(w for report in reports for w in report.warnings)),
    )


def _fresh_caller(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a caller with a code object of its own: Dynamo keeps compiled code per code object."""

    def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return model(*args, **kwargs)

    return types.FunctionType(
        call.__code__.replace(), call.__globals__, "explained", None, call.__closure__
    )


@contextmanager
def _uncompiled(model: object) -> Iterator[None]:
    """Set aside what ``model.compile()`` attached to a module and its parts."""
    parts = list(model.modules()) if isinstance(model, nn.Module) else []
    compiled = [(part, part._compiled_call_impl) for part in parts if part._compiled_call_impl]
    for part, _ in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, implementation in compiled:
            part._compiled_call_impl = implementation
