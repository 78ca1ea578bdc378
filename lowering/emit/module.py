"""From spec and schedule to a complete module: header, constants, kernel, launcher."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from typing import TYPE_CHECKING, Any

from flasheva_compile.lowering.emit import specialised
from flasheva_compile.lowering.emit.arguments import LENGTHS, arguments
from flasheva_compile.lowering.emit.decode import emit_combine, emit_decode
from flasheva_compile.lowering.emit.decode_features import FEATURE_FUNCTION
from flasheva_compile.lowering.emit.dependent_launch import follows, prologue
from flasheva_compile.lowering.emit.extend import emit_extend
from flasheva_compile.lowering.emit.extend_append import emit_extend_append, emit_extend_pool
from flasheva_compile.lowering.emit.fp8_products import SPLIT_FUNCTION
from flasheva_compile.lowering.emit.keys import emit_key_kernel
from flasheva_compile.lowering.emit.layout import without_unread, wrapped
from flasheva_compile.lowering.emit.loops import SINK_STEP
from flasheva_compile.lowering.emit.pool_gradient_products import HALVES_FUNCTION
from flasheva_compile.lowering.emit.pooling import (
    emit_centre_gradient,
    emit_chunk_tokens,
    emit_pool_gradient,
)
from flasheva_compile.lowering.emit.product_bias import (
    PIECES_FUNCTION,
    ROWS_FUNCTION,
    emit_bias_columns,
)
from flasheva_compile.lowering.emit.queries import emit_query_kernel
from flasheva_compile.lowering.emit.retrieval_backward_bits import emit_selection_bits
from flasheva_compile.lowering.emit.retrieval_backward_keys import emit_retrieved_dkv
from flasheva_compile.lowering.emit.retrieval_backward_queries import emit_retrieved_dq
from flasheva_compile.lowering.emit.retrieval_chunk_bounds import emit_chunk_bounds
from flasheva_compile.lowering.emit.retrieval_decode import emit_retrieval_decode
from flasheva_compile.lowering.emit.retrieval_decode_select import (
    emit_decode_scores,
    emit_decode_select,
)
from flasheva_compile.lowering.emit.retrieval_forward_attend import emit_retrieve
from flasheva_compile.lowering.emit.retrieval_forward_select import emit_select
from flasheva_compile.lowering.emit.scores import DROPOUT_FUNCTIONS
from flasheva_compile.lowering.emit.vecinfer_append import emit_vecinfer_append
from flasheva_compile.lowering.emit.vecinfer_combine import emit_vecinfer_combine
from flasheva_compile.lowering.emit.vecinfer_decode import emit_vecinfer_decode
from flasheva_compile.lowering.spec import GeneratedKernel, digest, group_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from flasheva_compile.lowering.spec import KernelSpec, Schedule

_PURPOSE = {
    "chunk_tokens": "pool keys and values into chunk tokens",
    "bias_columns": "biases of chunk tokens as columns of keys",
    "forward": "attend to chunk tokens, sinks and window in one softmax",
    "dq": "gradient of queries, and delta for the kernels after it",
    "dchunk": "gradient of chunk tokens",
    "dsink": "gradient of sinks from queries whose window is behind them",
    "dkv": "gradient of keys and values",
    "dpool": "gradient of pooling",
    "domega": "gradient of what the eva rule pools values around",
    "chunk_bounds": "centre and spread of the keys of chunks",
    "select": "find the chunks that each group of queries attends exactly",
    "retrieve": "attend to the keys of selected chunks, join with what is there",
    "selection_bits": "mark the chunk tokens that were selected",
    "retrieved_dq": "gradient of queries through the keys of selected chunks",
    "retrieved_dkv": "gradient of the keys of a chunk from queries that selected it",
    "decode": "attend from a new token to part of the cache, append the token",
    "decode_combine": "add up what the parts of the cache give",
    "extend_pool": "pool the chunks that new tokens complete",
    "extend": "attend from new tokens to part of the cache and of themselves",
    "extend_append": "write new tokens into the cache",
    "extend_combine": "add up what the parts give",
    "retrieval_scores": "append a token, score chunk tokens, note the peaks",
    "retrieval_select": "find the best chunks where the peaks are",
    "retrieval_decode": "attend from a new token to part of what it sees",
    "vecinfer_append": "transform queries, store tokens exactly or as codes",
    "vecinfer_decode": "attend from new tokens to part of a cache of codes",
    "vecinfer_combine": "add up what the parts give, count the new tokens",
}


def emit(spec: KernelSpec, schedule: Schedule) -> GeneratedKernel:
    """Generate one kernel; pure: the same spec and schedule give the same bytes."""
    if schedule.consumers:
        return _specialised(spec, schedule)
    body = without_unread(_body(spec, schedule))
    body = prologue(spec.kind) + body if schedule.dependent else body
    names = arguments(body)
    constants = _constants(body, spec, schedule)
    source = _header(spec, schedule) + constants
    if spec.dropout:
        source += "\n\n" + DROPOUT_FUNCTIONS + "\n\n"
    if "feature_map(" in body:
        source += ("\n\n" if constants else "\n") + FEATURE_FUNCTION + "\n\n"
    if "split_pairs(" in body:
        source += "\n\n" + SPLIT_FUNCTION + "\n\n"
    if "halves(" in body:
        source += "\n\n" + HALVES_FUNCTION + "\n\n"
    if "bias_rows(" in body:
        source += "\n\n" + PIECES_FUNCTION + "\n\n" + ROWS_FUNCTION + "\n\n"
    source += _function(spec, names, body) + _launcher(spec, schedule, names)
    return GeneratedKernel(
        spec=spec, schedule=schedule, name=_name(spec, source), source=source, arguments=names
    )


def _specialised(spec: KernelSpec, schedule: Schedule) -> GeneratedKernel:
    names = specialised.arguments(spec, schedule)
    text = wrapped(specialised.emit_specialised(spec, schedule)).rstrip("\n") + "\n"
    source = _header(spec, schedule, specialised.IMPORTS) + text + _launcher(spec, schedule, names)
    return GeneratedKernel(
        spec=spec, schedule=schedule, name=_name(spec, source), source=source, arguments=names
    )


_BODIES: dict[str, Callable[[Any], str]] = {  # a kind has its own class of spec
    "chunk_tokens": emit_chunk_tokens,
    "dpool": emit_pool_gradient,
    "domega": emit_centre_gradient,
    "bias_columns": emit_bias_columns,
    "chunk_bounds": emit_chunk_bounds,
    "select": emit_select,
    "selection_bits": emit_selection_bits,
    "decode_combine": emit_combine,
    "extend_pool": emit_extend_pool,
    "extend_combine": emit_combine,
    "vecinfer_append": emit_vecinfer_append,
    "vecinfer_combine": emit_vecinfer_combine,
}
_TILED_BODIES: dict[str, Callable[[Any, Schedule], str]] = {
    **dict.fromkeys(("forward", "dq"), emit_query_kernel),
    **dict.fromkeys(("dchunk", "dsink", "dkv"), emit_key_kernel),
    "decode": emit_decode,
    "extend": emit_extend,
    "extend_append": emit_extend_append,
    "retrieve": emit_retrieve,
    "retrieved_dq": emit_retrieved_dq,
    "retrieved_dkv": emit_retrieved_dkv,
    "retrieval_decode": emit_retrieval_decode,
    "retrieval_scores": emit_decode_scores,
    "retrieval_select": emit_decode_select,
    "vecinfer_decode": emit_vecinfer_decode,
}


def _body(spec: KernelSpec, schedule: Schedule) -> str:
    if spec.kind in _BODIES:
        return _BODIES[spec.kind](spec)
    return _TILED_BODIES[spec.kind](spec, schedule)


def _fields(value: object) -> list[str]:
    """Spell the fields that differ from their defaults."""
    return [
        f"{field.name}={getattr(value, field.name)!r}"
        for field in dataclasses.fields(value)  # pyright: ignore[reportArgumentType]
        if getattr(value, field.name) != field.default
    ]


_IMPORTS = "import triton\nimport triton.language as tl\n"


def _header(spec: KernelSpec, schedule: Schedule, imports: str = _IMPORTS) -> str:
    width = {"width": 96, "initial_indent": "    ", "subsequent_indent": "    "}
    spec_text = textwrap.fill(", ".join(_fields(spec)), **width)
    schedule_text = textwrap.fill(", ".join(_fields(schedule)), **width)
    return (
        f'"""{spec.kind}: {_PURPOSE[spec.kind]}. Generated; do not edit.\n\n'
        f"KernelSpec:\n{spec_text}\nSchedule:\n{schedule_text}\n\n"
        "Reproduce: flasheva_compile.lowering.emit.module.emit(KernelSpec(...), Schedule(...)).\n"
        f'"""\n\n{imports}\n'
    )


def _constants(body: str, spec: KernelSpec, schedule: Schedule) -> str:
    sink_block = min(SINK_STEP, max(16, 1 << (spec.sink_size - 1).bit_length()))
    values = {
        "BLOCK_M": schedule.block_m,
        "BLOCK_N": schedule.block_n,
        "BLOCK_S": sink_block,
        "BLOCK_G": group_rows(spec.group),
    }
    used = set(re.findall(r"\w+", body))
    lines = [f"{name} = tl.constexpr({value})" for name, value in values.items() if name in used]
    return "".join(f"{line}\n" for line in lines)


def _function(spec: KernelSpec, names: tuple[str, ...], body: str) -> str:
    quoted = [f'"{n}"' for n in names if n in LENGTHS]
    # A comma makes a tuple of one name.
    lengths = wrapped(f"LENGTHS = ({', '.join(quoted)}{',' * (len(quoted) == 1)})").strip()
    signature = textwrap.fill(
        ", ".join(names), width=96, initial_indent="    ", subsequent_indent="    "
    )
    return (
        f"# A new length is no new kernel.\n{lengths}\n\n\n"
        "@triton.jit(do_not_specialize=LENGTHS)\n"
        f"def {spec.kind}(\n{signature},\n):\n" + wrapped(textwrap.indent(body, "    "))
    )


def _launcher(spec: KernelSpec, schedule: Schedule, names: tuple[str, ...]) -> str:
    options = f"num_warps={schedule.num_warps}, num_stages={schedule.num_stages}"
    options += f", maxnreg={schedule.max_registers}" if schedule.max_registers else ""
    options += ", launch_pdl=True" if schedule.dependent and follows(spec.kind) else ""
    return (
        f"\n\ndef launch(programs, *arguments):\n"
        f'    """Launch {spec.kind} over ``programs`` programs; return what Triton compiled."""\n'
        + wrapped(f"    return {spec.kind}[(programs,)](*arguments, {options})")
    )


def _name(spec: KernelSpec, source: str) -> str:
    words = [spec.kind, spec.dtype, f"d{spec.head_dim}"]
    words += [f"e{spec.value_dim}"] if spec.value_dim != spec.head_dim else []
    words += [f"w{spec.window_size}"] if spec.window_size else []
    words += [f"c{spec.chunk_size}", digest(source)]
    return "_".join(words)
