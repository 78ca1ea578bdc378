"""Values of kernel arguments: pointers, strides, tensor descriptors, by argument name."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from flasheva_compile.lowering.emit.arguments import FEATURES
from flasheva_compile.lowering.spec import parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from flasheva_compile.lowering.rows import Rows
    from flasheva_compile.lowering.spec import KernelSpec, Schedule
    from torch import Tensor

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""Dtypes that kernels compute in."""


def unit_stride(x: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous, as kernels read it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(letter: str, x: Tensor, dims: str) -> dict[str, int]:
    """Return a tensor's strides by argument name."""
    return {f"stride_{letter}{dim}": x.stride(n) for n, dim in enumerate(dims)}


def key_values(k: Tensor, v: Tensor) -> dict[str, Any]:
    """Return keys and values with their strides."""
    values = {"k_ptr": k, "v_ptr": v, "columns": k.shape[2]}
    return values | strides("k", k, "bhn") | strides("v", v, "bhn")


def row_values(rows: Rows) -> dict[str, Any]:
    """Return the layout of the rows."""
    mean = rows.chunk_mean
    return {
        "valid_ptr": None if rows.valid is None else rows.valid.view(torch.uint8),
        "start_ptr": rows.start,
        "stop_ptr": rows.stop,
        "begin_ptr": rows.begin,
        "end_ptr": rows.end,
        "chunk_first_ptr": rows.chunk_first,
        "chunk_mean_ptr": mean,
        "stride_mean": mean.stride(0) if mean is not None and mean.shape[0] > 1 else 0,
    }


def rule_values(rule: str, parameters: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return a rule's parameters by argument name."""
    contiguous = (x.contiguous() for x in parameters)
    if rule == "eva" and len(parameters) == len(FEATURES):  # of a cache: its feature maps
        return dict(zip(FEATURES, contiguous, strict=True))
    if rule == "eva":
        return {"omega_ptr": parameters[1].contiguous()}
    return dict(zip(("phi_ptr", "p_ptr", "b_ptr"), contiguous, strict=False))


def descriptors(
    arguments: tuple[str, ...], spec: KernelSpec, schedule: Schedule, values: dict[str, Any]
) -> dict[str, Any] | None:
    """Describe the tensors whose tiles the kernel fetches; None = some cannot be described."""
    rows = schedule.block_n if spec.kind in ("forward", "dq") else schedule.block_m
    result = {}
    for name, tensor, part in _descriptor_names(arguments):
        is_query = schedule.consumers and tensor == "q_ptr"  # each consumer has its own
        tile = schedule.block_m // schedule.consumers if is_query else rows
        described = _descriptor(values[tensor], tile, part, gluon=schedule.consumers > 0)
        if described is None:
            return None
        result[name] = described
    return result


@cache
def _descriptor_names(arguments: tuple[str, ...]) -> tuple[tuple[str, str, int], ...]:
    """Return each descriptor's argument, its tensor and which part of the head it fetches."""
    split = ((name, *name.split("_desc")) for name in arguments if "_desc" in name)
    return tuple((name, f"{tensor}_ptr", int(part)) for name, tensor, part in split)


def _descriptor(x: Tensor, rows: int, part: int, *, gluon: bool) -> Any:  # noqa: ANN401 - Triton's
    """Describe a tensor; Triton validates the fields for the first of equal shape and strides."""
    if x.data_ptr() & 15:
        return None
    key = (x.shape, x.stride(), x.dtype, rows, part, gluon)
    fields = _validated.get(key)
    if fields is None:
        strides = described_strides(x.shape, x.stride(), x.element_size())
        if strides is None:
            return None
        block = [1, 1, rows, parts(x.shape[3])[part][1]]
        made = _make_descriptor(gluon=gluon)(x, list(x.shape), list(strides), block)
        if len(_validated) >= _MOST_VALIDATED:
            _validated.clear()
        _validated[key] = {name: value for name, value in vars(made).items() if name != "base"}
        return made
    described = object.__new__(_descriptor_class(gluon=gluon))
    vars(described).update(fields, base=x)
    return described


@cache
def _descriptor_class(*, gluon: bool) -> type[Any]:
    if gluon:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    else:
        from triton.tools.tensor_descriptor import TensorDescriptor
    return TensorDescriptor


def _make_descriptor(*, gluon: bool) -> Callable[..., Any]:
    """Return what makes a descriptor; that of a Gluon kernel knows how tiles lie in memory."""
    made = _descriptor_class(gluon=gluon)
    if not gluon:
        return made
    return lambda x, shape, strides, block: made(
        x, shape, strides, block, tile_layout(block, x.dtype)
    )


def tile_layout(block: list[int], dtype: torch.dtype) -> Any:  # noqa: ANN401 - Triton's
    """Return how a tile of 16-bit numbers lies in shared memory."""
    from triton.experimental.gluon import language as gl

    number = gl.float16 if dtype == torch.float16 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for(block, number)


_validated: dict[tuple[Any, ...], dict[str, Any]] = {}
_MOST_VALIDATED = 4096


def described_strides(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> tuple[int, ...] | None:
    """Return the strides that a tensor descriptor gets, with harmless ones where the size is 1.

    None = none can describe it: strides must be multiples of 16 bytes, and nothing expanded.
    """
    outer = [n for size, n in zip(shape, strides, strict=True) if size > 1][:-1]
    aligned = all(n > 0 and n * itemsize % 16 == 0 for n in outer)
    if not aligned or strides[-1] != 1 or 0 in shape:
        return None
    plain = math.prod(shape) * 8  # a multiple of 16 bytes for every dtype and head dimension
    pairs = zip(shape[:-1], strides[:-1], strict=True)
    return (*(stride if size > 1 else plain for size, stride in pairs), 1)
