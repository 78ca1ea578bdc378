"""Compile generated kernels for a target without a GPU, and read what they need of it.

Works on any machine with Triton's wheel: it holds the assemblers of both vendors. Nothing here
launches a kernel.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton
from flasheva_compile.lowering.emit.arguments import (
    DESCRIPTORS,
    FEATURES,
    LENGTHS,
    POINTERS,
    STRIDES,
)
from flasheva_compile.lowering.kernel_arguments import DTYPES, tile_layout
from flasheva_compile.lowering.load import load
from flasheva_compile.lowering.spec import BIAS_COLUMNS, parts
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import GeneratedKernel, KernelSpec, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A GPU architecture to compile for.

    Attributes:
        backend: ``"cuda"`` or ``"hip"``.
        arch: What Triton calls it.
        warp_size: Threads of a warp.
        shared_limit: Shared memory of one program, at most [bytes].
    """

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS = {
    "sm_80": Target(backend="cuda", arch=80, warp_size=32, shared_limit=166912),
    "sm_89": Target(backend="cuda", arch=89, warp_size=32, shared_limit=101376),
    "sm_90": Target(backend="cuda", arch=90, warp_size=32, shared_limit=232448),
    "sm_100": Target(backend="cuda", arch=100, warp_size=32, shared_limit=232448),
    "sm_120": Target(backend="cuda", arch=120, warp_size=32, shared_limit=101376),
    "gfx942": Target(backend="hip", arch="gfx942", warp_size=64, shared_limit=65536),
    "gfx950": Target(backend="hip", arch="gfx950", warp_size=64, shared_limit=163840),
}
"""Known targets; Triton itself does not check the limits of shared memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one compiled kernel needs.

    Attributes:
        target: A key of ``TARGETS``.
        registers: Per thread; on AMD, vector registers.
        shared: Shared memory of a program [bytes].
        stack: Local memory of a thread, which is where registers spill to [bytes].
        matrix: Its matrix instruction: ``"wgmma"``, ``"tcgen05"``, ``"mma"``, ``"mfma"``, ``""``.
        matrix_count: How many of them the text holds.
    """

    target: str
    registers: int
    shared: int
    stack: int
    matrix: str
    matrix_count: int

    def problems(self) -> tuple[str, ...]:
        """Name what makes the kernel slow (``"stack"``) or impossible to launch (``"shared"``)."""
        found = {
            "stack": self.stack > 0,
            "shared": self.shared > TARGETS[self.target].shared_limit,
        }
        return tuple(name for name, there in found.items() if there)


_FP32 = {
    *("rfa_bias_ptr", "mass_k_ptr", "mass_v_ptr", "lse_ptr", "lse2_ptr", "delta_ptr"),
    *("drfa_k_ptr", "drfa_v_ptr", "drfa_bias_ptr", "dk_sink_ptr", "dv_sink_ptr"),
    *("dphi_ptr", "dp_ptr", "domega_ptr", "chunk_mean_ptr", "slopes_ptr", "partial_ptr"),
    *("scores_ptr", "selector_weight_ptr", "selector_ptr", "dk_parts_ptr", "dv_parts_ptr"),
    *FEATURES,
    *("book_scale_ptr", "key_words_ptr", "value_words_ptr", "key_scale_ptr", "q_scale_ptr"),
    *("key_rotation_ptr", "value_rotation_ptr", "key_offset_ptr", "key_centre_ptr"),
    *("key_step_ptr", "key_digit_ptr", "value_offset_ptr", "value_step_ptr", "value_digit_ptr"),
}
_INT32 = {
    *("start_ptr", "stop_ptr", "begin_ptr", "end_ptr", "chunk_first_ptr"),
    *("selected_ptr", "bits_ptr", "turned_ptr"),
    *("members_ptr", "first_member_ptr", "first_piece_ptr", "piece_chunk_ptr"),
    *("key_fields_ptr", "value_fields_ptr", "value_order_ptr"),
}
_VALUES = {"v", "rfa_v", "do"}
_TORCH = {name: dtype for dtype, name in DTYPES.items()}
_OTHER = {
    "valid_ptr": "*u8",
    "seed_ptr": "*i64",
    "peaks_ptr": "*i32",
    "bias_columns_ptr": "*bf16",
    "drop_below": "i64",
    **dict.fromkeys(("exact_mask_ptr", "key_mask_ptr"), "*i1"),
    **dict.fromkeys(("row_start_ptr", "length_ptr", "written_ptr"), "*i64"),
    **dict.fromkeys(("key_codes_ptr", "value_codes_ptr", "exponents_ptr"), "*u8"),
    "rfa_exponents_ptr": "*i8",
}

_MATRIX = {  # the newest first: a kernel that has one may hold older ones, too
    "tcgen05": r"tcgen05\.mma\.",
    "wgmma": r"wgmma\.mma_async",
    "mma": r"mma\.sync",
    "mfma": r"v_mfma_",
}


def argument_type(name: str, spec: KernelSpec, schedule: Schedule) -> str:
    """Return the Triton type of an argument of a kernel's entry point."""
    if name in DESCRIPTORS:
        tensor, part = name.split("_desc")
        size = spec.value_dim if tensor in _VALUES else spec.head_dim
        rows = schedule.block_n if spec.kind in ("forward", "dq") else schedule.block_m
        if schedule.consumers and tensor == "q":
            rows = schedule.block_m // schedule.consumers
        is_bias = tensor == "bias_columns"
        dtype = "bf16" if is_bias else spec.dtype
        block = [1, 1, rows, BIAS_COLUMNS if is_bias else parts(size)[int(part)][1]]
        layout = f",{tile_layout(block, _TORCH[dtype])!r}" if schedule.consumers else ""
        return f"tensordesc<{dtype}{block}{layout}>"
    if name in ("rfa_k_ptr", "rfa_v_ptr") and spec.fp8_chunks:
        return "*u8"
    if name in _OTHER:
        return _OTHER[name]
    if name in ("coded_q_ptr", "key_book_ptr", "value_book_ptr"):
        return "*fp32" if spec.dtype == "fp32" else "*fp16"
    if name in POINTERS:
        return "*fp32" if name in _FP32 else "*i32" if name in _INT32 else f"*{spec.dtype}"
    return "i32" if name in STRIDES or name in LENGTHS else "fp32"


def launch_options(generated: GeneratedKernel) -> dict[str, Any]:
    """Return the options that the generated launcher passes, such as ``num_warps``."""
    launcher = next(
        node
        for node in ast.parse(generated.source).body
        if isinstance(node, ast.FunctionDef) and node.name == "launch"
    )
    calls = [node for node in ast.walk(launcher) if isinstance(node, ast.Call) and node.keywords]
    return {k.arg: ast.literal_eval(k.value) for call in calls for k in call.keywords if k.arg}


def compile_for(generated: GeneratedKernel, target: str) -> Any:  # noqa: ANN401 - Triton's class
    """Compile a kernel as a launch with aligned pointers and strides would.

    Args:
        generated: What to compile.
        target: A key of ``TARGETS``.

    Returns:
        Triton's compiled kernel; ``asm`` holds its stages.
    """
    names = generated.arguments
    function = load(generated.spec, generated.schedule).function
    aligned = [n for n in names if n in POINTERS or n in STRIDES]
    source = _source_class(generated.schedule)(
        fn=function,
        signature={n: argument_type(n, generated.spec, generated.schedule) for n in names},
        constexprs={},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    known = TARGETS[target]
    options = {"enable_fp_fusion": True, **launch_options(generated)}
    gpu = GPUTarget(known.backend, known.arch, known.warp_size)
    return triton.compile(source, target=gpu, options=options)


def _source_class(schedule: Schedule) -> type[ASTSource]:
    if not schedule.consumers:
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


@cache
def resources(generated: GeneratedKernel, target: str) -> Resources:
    """Compile a kernel for a target and read its resources; once per process.

    Args:
        generated: What to compile.
        target: A key of ``TARGETS``.

    Raises:
        RuntimeError: The vendor's tool says something that this module cannot read.
    """
    kernel = compile_for(generated, target)
    hip = TARGETS[target].backend == "hip"
    text = kernel.asm["amdgcn" if hip else "ptx"]
    registers, stack = _amd_usage(text) if hip else _nvidia_usage(kernel.asm["cubin"])
    counts = {name: len(re.findall(pattern, text)) for name, pattern in _MATRIX.items()}
    matrix = next((name for name, count in counts.items() if count), "")
    return Resources(
        target=target,
        registers=registers,
        shared=kernel.metadata.shared,
        stack=stack,
        matrix=matrix,
        matrix_count=counts.get(matrix, 0),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in the output of the assembler:\n{text[-2000:]}")
    return int(found.group(1))


def _amd_usage(text: str) -> tuple[int, int]:
    """Read vector registers and scratch of a thread from the assembly's metadata."""
    registers = _number(r"\.vgpr_count:\s*(\d+)", text)
    return registers, _number(r"\.private_segment_fixed_size:\s*(\d+)", text)


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Read registers and stack of a thread from a binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return _number(r"REG:(\d+)", done.stdout), _number(r"STACK:(\d+)", done.stdout)
