"""Choice of a schedule for a spec: what the user has tuned, the shipped table, static rules."""

from __future__ import annotations

import dataclasses
import json
import warnings
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from flasheva_compile.lowering import recording, schedule_cost
from flasheva_compile.lowering.emit.dependent_launch import CHAINED
from flasheva_compile.lowering.load import cache_directory
from flasheva_compile.lowering.schedule_cost import DECODE_KINDS, SHARED_LIMITS, Target
from flasheva_compile.lowering.schedule_extend import EXTEND_KINDS, extend_schedule
from flasheva_compile.lowering.schedule_fp8 import converting, decode_fitted
from flasheva_compile.lowering.schedule_retrieval import RETRIEVAL_KINDS, retrieval_schedule
from flasheva_compile.lowering.schedule_retrieval_backward import (
    LEAVING_OUT,
    RETRIEVAL_BACKWARD_KINDS,
    leaving_out_schedule,
    retrieval_backward_schedule,
)
from flasheva_compile.lowering.schedule_retrieval_decode import (
    SELECTING_KINDS,
    gathering_schedule,
    selecting_schedule,
)
from flasheva_compile.lowering.schedule_vecinfer import vecinfer_schedule
from flasheva_compile.lowering.spec import NARROW, Schedule, adds_bias_by_product, padded, parts
from flasheva_compile.lowering.spec_vecinfer import VecInferSpec
from flasheva_compile.lowering.specialists import specialists_rejection

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flasheva_compile.lowering.spec import KernelSpec

_TABLE = Path(__file__).with_name("schedules.json")
_HEAD_SIZES = (64, 128, 256)
_FEW_SINKS = 16
_THREE_PROGRAMS = 168  # registers of a thread where a multiprocessor holds three of four warps
_TWO_PROGRAMS = 128  # and two programs of eight warps
_LAUNCHES_DEPENDENTS = 90  # the compute capability where it was run; later ones know it, too
_SOFTMAX_RULES = ("tangent", "evabyte")  # pooling keeps so much that four warps spill

_forced: dict[KernelSpec, Schedule] = {}


def choose(spec: KernelSpec, target: Target | None = None) -> Schedule:
    """Return the schedule of a spec; measures nothing and never fails.

    Args:
        spec: What the kernel computes.
        target: The device; None = the current one.

    Returns:
        The tuned choice for this device and spec, else the entry of the shipped table, else the
        best candidate of the cost model. A choice that breaks a static rule is passed over.
    """
    if _forced and spec in _forced:
        return _forced[spec]
    return _choose(spec, target or current_target())


@cache
def choose_alike(spec: KernelSpec, target: Target) -> Schedule:
    """Return the schedule of a kernel whose warps all do the same; see :func:`choose`."""
    chosen = _choose(spec, target)
    if not chosen.consumers:
        return chosen
    plain = shipped(spec, target)
    assert plain is not None  # whatever has specialists has such an entry, too
    return plain


@cache
def _choose(spec: KernelSpec, target: Target) -> Schedule:
    schedule = converting(spec, _tiles(spec, target), target)
    dependent = spec.kind in CHAINED and target.capability == _LAUNCHES_DEPENDENTS
    return dataclasses.replace(schedule, dependent=dependent)


def _tiles(spec: KernelSpec, target: Target) -> Schedule:
    by_rule = _by_rule(spec, target)
    if by_rule is not None:
        return by_rule
    table = None if spec.selection_group and spec.kind in LEAVING_OUT else shipped(spec, target)
    for schedule in (tuned(spec, target), specialised(spec, target), table):
        if schedule and schedule_cost.rejection(spec, schedule, target) is None:
            return schedule
    if spec.selection_group and spec.kind in LEAVING_OUT:
        plain = dataclasses.replace(spec, selection_group=0)
        return leaving_out_schedule(spec, _choose(plain, target), target)
    ranked = schedule_cost.candidates(spec, target)
    return ranked[0] if ranked else _SMALLEST


def _by_rule(spec: KernelSpec, target: Target) -> Schedule | None:
    """Return the schedule of a kernel that has a closed rule."""
    if isinstance(spec, VecInferSpec):
        return vecinfer_schedule(spec)
    if spec.kind in SELECTING_KINDS:
        return selecting_schedule(spec)
    if spec.kind == "bias_columns":
        return _SMALL_ROWS
    if spec.kind == "retrieval_decode":
        decode = dataclasses.replace(spec, kind="decode", retrieve_chunks=0)
        return gathering_schedule(spec, _choose(decode, target), target)
    if spec.kind == "extend_combine":
        return _choose(dataclasses.replace(spec, kind="decode_combine"), target)
    for kinds, rule in (
        (RETRIEVAL_KINDS, retrieval_schedule),
        (EXTEND_KINDS, extend_schedule),
        (RETRIEVAL_BACKWARD_KINDS, retrieval_backward_schedule),
    ):
        if spec.kind in kinds:
            return rule(spec, target)
    return None


_SMALLEST = Schedule(block_m=16, block_n=16, num_warps=4, num_stages=1)
_SMALL_ROWS = Schedule(block_m=16, block_n=128, num_warps=4, num_stages=1)


@contextmanager
def forced(schedules: Mapping[KernelSpec, Schedule]) -> Iterator[None]:
    """Make :func:`choose` return given schedules, for tuning and tests; not thread-safe."""
    before = dict(_forced)
    _forced.update(schedules)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


# --- targets --------------------------------------------------------------------------------------


def known_target(arch: str, device: str = "") -> Target:
    """Return the target of an architecture whose limits are known, such as ``"sm_80"``."""
    return Target(arch=arch, shared_limit=SHARED_LIMITS[arch], device=device)


def current_target() -> Target:
    """Return the current CUDA or ROCm device; without one, an H100 without a name.

    While launches are collected, what they are collected for.
    """
    if recording.target is not None:
        return recording.target
    return _device_target(torch.cuda.current_device()) if _has_device() else _NO_DEVICE


_NO_DEVICE = known_target("sm_90")


@cache
def _has_device() -> bool:
    return torch.cuda.is_available()


@cache
def _device_target(index: int) -> Target:
    properties: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    plain = properties.shared_memory_per_block
    limit = getattr(properties, "shared_memory_per_block_optin", 0) or plain
    return Target(
        arch=arch,
        shared_limit=SHARED_LIMITS.get(arch, limit),
        device=properties.name,
        multiprocessors=properties.multi_processor_count,
    )


# --- the shipped table ----------------------------------------------------------------------------


def shipped(spec: KernelSpec, target: Target) -> Schedule | None:
    """Return the entry of the shipped table for the target's family, fitted to the spec."""
    table = shipped_decode_table() if spec.kind in DECODE_KINDS else shipped_table()
    section = table.get(_family(target), {}).get(spec.kind, {})
    size = max(spec.head_dim, spec.value_dim)
    bucket = next((str(most) for most in _HEAD_SIZES if size <= most), "")
    schedule = section.get(dtype_class(spec), {}).get(bucket)
    return schedule and _fit(spec, schedule, target)


def specialised(spec: KernelSpec, target: Target) -> Schedule | None:
    """Return the schedule of specialised warps, for the specs that have one."""
    if specialists_rejection(spec, target):
        return None
    schedule = _SPECIALISTS[spec.head_dim]
    return dataclasses.replace(schedule, product_bias=not spec.whole_chunks)


_SPECIALISTS = {
    # Four programs of one consumer each: registers for more in one program are not there.
    64: Schedule(
        block_m=64, block_n=64, num_warps=4, num_stages=2, tma=True, consumers=1, max_registers=64
    ),
    128: Schedule(
        block_m=128,
        block_n=64,
        num_warps=4,
        num_stages=4,
        tma=True,
        consumers=2,
        overlap=True,
        persistent=True,
    ),
}

_Table = dict[str, dict[str, dict[str, dict[str, Schedule]]]]


@cache
def shipped_table() -> _Table:
    """Return the shipped table: family, kernel, dtype class and largest head size to schedule."""
    families = json.loads(_TABLE.read_text())
    del families["decode"]
    return _parsed(families)


@cache
def shipped_decode_table() -> _Table:
    """Return the same for the kernels of generation."""
    return _parsed(json.loads(_TABLE.read_text())["decode"])


def _parsed(families: dict[str, Any]) -> _Table:
    return {
        family: {
            kind: {
                dtype: {size: Schedule(**fields) for size, fields in sizes.items()}
                for dtype, sizes in dtypes.items()
            }
            for kind, dtypes in kinds.items()
        }
        for family, kinds in families.items()
    }


def dtype_class(spec: KernelSpec) -> str:
    """Return ``"16-bit"``, ``"tf32"`` or ``"fp32"``: dtypes that share schedules."""
    return "16-bit" if spec.dtype != "fp32" else "tf32" if spec.tf32 else "fp32"


def _family(target: Target) -> str:
    """Return the section of the table for a target: its own, or that of the generation before."""
    if target.is_amd:
        return target.arch
    return "sm_90" if target.capability >= 90 else "sm_80"


def _fit(spec: KernelSpec, schedule: Schedule, target: Target) -> Schedule:
    """Drop what this spec cannot use from an entry that many specs share."""
    if spec.kind == "dsink" and spec.sink_size <= _FEW_SINKS:
        split = len(parts(spec.head_dim)) > 1 or len(parts(spec.value_dim)) > 1
        # Without wgmma every part of a split head holds its own fragments: smaller tiles, no spill.
        block_m = 16 if split else schedule.block_m
        schedule = dataclasses.replace(schedule, block_m=block_m, block_n=16)
    if spec.kind == "chunk_tokens" and spec.chunk_rule in _SOFTMAX_RULES:
        schedule = _weighing(spec, schedule, target)
    if _pools_with_columns_of_biases(spec) and target.capability == 90:
        schedule = dataclasses.replace(schedule, max_registers=_TWO_PROGRAMS)
    if spec.kind == "decode" and schedule.num_warps == 2 and target.capability != 90:
        schedule = dataclasses.replace(schedule, num_warps=4, max_registers=128)
    if spec.kind == "decode" and spec.chunk_rule == "eva" and schedule.num_warps <= 4:
        # What feature maps keep would spill under a lower limit, and in fp32 under any.
        schedule = dataclasses.replace(schedule, num_warps=4)
        most = 0 if spec.dtype == "fp32" else _THREE_PROGRAMS
        schedule = dataclasses.replace(schedule, max_registers=most)
    if spec.kind == "decode" and spec.fp8_chunks:
        schedule = decode_fitted(spec, schedule, target)
    if schedule.tma and schedule_cost.tma_rejection(spec, target):
        schedule = dataclasses.replace(schedule, tma=False)
    # Measured on sm_90, through descriptors.
    measured = schedule.tma and target.capability == 90
    if schedule.product_bias and not (measured and adds_bias_by_product(spec)):
        schedule = dataclasses.replace(schedule, product_bias=False)
    plain = spec.documents == "dense" and not (spec.dropout or spec.key_mask)
    if schedule.product_bias and spec.kind == "dq" and plain:
        # A few registers less than it takes of itself, and no spill; others do, or take less.
        schedule = dataclasses.replace(schedule, max_registers=_THREE_PROGRAMS)
    return schedule


def _weighing(spec: KernelSpec, schedule: Schedule, target: Target) -> Schedule:
    """Give pooling by weights, which keeps more than sums, more threads a chunk.

    On sm_90 narrow heads get programs of two warps instead, so that some load while others add up:
    5 % of pooling and attention at 16k (measured at ``D = 64``).
    """
    size = padded(max(spec.head_dim, spec.value_dim))
    measured = spec.chunk_rule == "tangent" and spec.dtype != "fp32" and target.capability == 90
    if size > NARROW or not measured:
        return dataclasses.replace(schedule, num_warps=2 * schedule.num_warps)
    return dataclasses.replace(schedule, block_n=8 * NARROW // size, num_warps=2)


def _pools_with_columns_of_biases(spec: KernelSpec) -> bool:
    """Whether columns of biases take two registers more than two programs have; others do not."""
    sizes = (spec.chunk_size, spec.head_dim, spec.value_dim)
    plain = spec.chunk_rule == "tangent" and spec.documents == "dense"
    return spec.bias_columns and plain and sizes == (16, 128, 128)


# --- what the user has tuned ----------------------------------------------------------------------


def spec_key(spec: KernelSpec) -> str:
    """Return the text that identifies a spec among tuned choices."""
    return ", ".join(
        f"{field.name}={getattr(spec, field.name)!r}"
        for field in dataclasses.fields(spec)
        if getattr(spec, field.name) != field.default
    )


def tuned_path() -> Path:
    """Return the file that the tune command writes."""
    return cache_directory() / "tuned.json"


def tuned(spec: KernelSpec, target: Target) -> Schedule | None:
    """Return what was tuned for exactly this spec on exactly this kind of device."""
    fields = _tuned_entries(tuned_path()).get(target.device, {}).get(spec_key(spec))
    try:
        return Schedule(**fields) if fields else None
    except TypeError:  # written by another version
        return None


def read_tuned(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the tuned choices of a file: device, spec key, fields; {} where there are none."""
    try:
        entries = json.loads(path.read_text())
        assert isinstance(entries, dict)
        assert all(isinstance(of_device, dict) for of_device in entries.values())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AssertionError):
        warnings.warn(f"no tuned schedules: {path} cannot be read", stacklevel=2)
        return {}
    return entries


_tuned_entries = lru_cache(maxsize=None)(read_tuned)


def forget() -> None:
    """Read tuned choices again: the file has changed."""
    _tuned_entries.cache_clear()
    _choose.cache_clear()
    choose_alike.cache_clear()
