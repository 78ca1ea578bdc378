"""Values of kernel arguments: pointers, strides, tensor descriptors, by argument name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from flasheva_compile.lowering.spec import parts

if TYPE_CHECKING:
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
    if rule == "eva":
        return {"omega_ptr": parameters[1].contiguous()}
    contiguous = (x.contiguous() for x in parameters)
    return dict(zip(("phi_ptr", "p_ptr", "b_ptr"), contiguous, strict=False))


TILES = {
    "forward": ("k_ptr", "v_ptr", "rfa_k_ptr", "rfa_v_ptr"),
    "dq": ("k_ptr", "v_ptr", "rfa_k_ptr", "rfa_v_ptr"),
    **dict.fromkeys(("dchunk", "dsink", "dkv"), ("q_ptr", "do_ptr")),
}
"""Tensors that a kernel's loops read in tiles."""


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can describe it: 16-byte strides, nothing expanded."""
    strides = [n for size, n in zip(x.shape, x.stride(), strict=True) if size > 1][:-1]
    aligned = all(n > 0 and n * x.element_size() % 16 == 0 for n in strides)
    return aligned and x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and 0 not in x.shape


def descriptors(
    arguments: tuple[str, ...], spec: KernelSpec, schedule: Schedule, values: dict[str, Any]
) -> dict[str, Any]:
    """Describe the tensors whose tiles the kernel fetches."""
    names = [name for name in arguments if "_desc" in name]
    if not names:
        return {}
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows = schedule.block_n if spec.kind in ("forward", "dq") else schedule.block_m
    result = {}
    for name in names:
        tensor, part = name.split("_desc")
        x = values[f"{tensor}_ptr"]
        _, size = parts(x.shape[3])[int(part)]
        result[name] = TensorDescriptor(x, list(x.shape), _full_strides(x), [1, 1, rows, size])
    return result


def _full_strides(x: Tensor) -> list[int]:
    """Return the strides, with harmless ones for dimensions of size 1."""
    plain = math.prod(x.shape) * 8  # a multiple of 16 bytes for every dtype and head dimension
    strides = zip(x.shape[:3], x.stride()[:3], strict=True)
    return [*(stride if size > 1 else plain for size, stride in strides), 1]
