"""Triton's CPU interpreter made strict: exact bfloat16, no stray reads, no races, no stale buffers.

Import this before anything imports Triton, in a process that has ``TRITON_INTERPRET=1``: Triton
reads it when a kernel is defined, so interpreting and compiling need processes of their own
(``tests/kernels/test_interpreted.py`` starts them).

What it changes:
- run-time loop bounds work with NumPy >= 2.4, which no longer turns arrays of one element into
  integers (triton issue 9171);
- products of fp32 by sums of bfloat16 ones, which it does not know, are fp32's;
- bfloat16, which the interpreter keeps as raw bits, is multiplied and rounded exactly, and any
  other arithmetic on it is an error: a kernel has to widen it first;
- e4m3, which it keeps as raw bits, too, becomes fp16 exactly;
- an access outside of the tensors of the launch is an error, not a read of whatever is there;
- so are two stores to one address: they would race on a GPU;
- the one text of assembly that kernels hold is known, by what it computes;
- launches wait for each other anyway, so that there is nothing to wait for.
"""

from __future__ import annotations

# ruff: noqa: E402 - the assertion must come before Triton
import dataclasses
import functools
import os
from contextlib import contextmanager
from types import SimpleNamespace

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before Python starts"

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from tests import triton_interpreter_speed

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
MOVES = {  # the operations that only move elements, and those that are made exact below
    *("load", "store", "masked_load", "masked_store", "descriptor_load", "descriptor_store"),
    *("bitcast", "broadcast", "cat", "expand_dims", "join", "reshape", "select", "splat", "split"),
    *("trans", "unsplat", "addptr", "make_tensor_descriptor", "dot", "inline_asm"),
    *("fp_ext", "fp_trunc", "fp_to_fp", "fp_to_si", "fp_to_ui", "si_to_fp", "ui_to_fp"),
    "int_cast",
}


@functools.cache
def install() -> None:
    """Patch the interpreter; once per process, however many files of laws ask for it."""
    triton.knobs.compilation.front_end_debugging = True  # errors keep their tracebacks
    _fix_loop_bounds()
    triton_interpreter_speed.install()  # the language is patched here, with those bounds
    _fix_products()
    _fix_casts()
    Builder.create_inline_asm = _split_pairs
    for name in ("gdc_wait", "gdc_launch_dependents"):
        setattr(tl.extra.cuda, name, lambda: None)
    for name in [n for n in dir(Builder) if n.startswith("create_")]:
        if name.removeprefix("create_") not in MOVES:
            setattr(Builder, name, _refusing_bfloat16(name, getattr(Builder, name)))
    reduce = interpreter.ReduceOps.apply_impl
    interpreter.ReduceOps.apply_impl = _refusing_bfloat16("a reduction", reduce)
    _watch_memory()


def _fix_loop_bounds() -> None:
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.ravel(self.handle.data)[0]))

    interpreter._patch_lang_tensor = patch_lang_tensor


def _widen(handle: Handle) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32) if handle.dtype.scalar == tl.float16 else handle.data


def _round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    tensor = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    return tensor.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(np.shape(x))


def _fix_products() -> None:
    options = interpreter.interpreter_builder.options
    known = (*options.allowed_dot_input_precisions, "bf16x6")  # and computed in fp32, as others are
    interpreter.interpreter_builder.options = dataclasses.replace(
        options, allowed_dot_input_precisions=known
    )
    create_dot = Builder.create_dot

    def exact_dot(self, a, b, accumulator, *rest):
        wide = (Handle(_widen(x), tl.float32) for x in (a, b))
        return create_dot(self, *wide, accumulator, *rest)

    Builder.create_dot = exact_dot


def _fix_casts() -> None:
    cast = Builder.cast_impl

    def exact_cast(self, source, target, *_):
        before, after = source.dtype.scalar, target.scalar
        if after == before:
            return source
        if before == tl.float8e4nv:
            half = Handle(_from_e4m3(source.data), tl.float16)
            return half if after == tl.float16 else cast(self, half, target)
        if before == tl.bfloat16:
            wide = Handle(_widen(source), tl.float32)
            return wide if after == tl.float32 else cast(self, wide, target)
        if after == tl.bfloat16:
            wide = source if before == tl.float32 else cast(self, source, tl.float32)
            return Handle(_round_to_bfloat16(wide.data), after)
        return cast(self, source, target)

    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc", "int_cast"):
        setattr(Builder, f"create_{name}", exact_cast)
    Builder.cast_impl = Builder.create_fp_to_fp = exact_cast


SPLIT_PAIRS = (  # bytes 0, 2, 1, 3 of two int16, the lowest first; then two of e4m3 at a time
    "{ .reg .b32 t; .reg .b16 a, b; prmt.b32 t, $2, 0, 0x3120; mov.b32 {a, b}, t; "
    "cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }"
)


def _split_pairs(self, text, constraints, values, *_):
    """Do what ``split_pairs`` of kernels over fp8 does: bytes of int16 to fp16."""
    assert text == SPLIT_PAIRS, f"unknown assembly: {text}"
    (pairs,) = (x.data for x in values)
    low_and_high = ((pairs & 255), (pairs >> 8) & 255)
    found = [Handle(_from_e4m3(x), tl.float16) for x in low_and_high]
    return SimpleNamespace(get_result=found.__getitem__)


def _from_e4m3(codes: np.ndarray) -> np.ndarray:
    codes = torch.from_numpy(np.ascontiguousarray(codes, dtype=np.uint8))
    return codes.view(torch.float8_e4m3fn).half().numpy().reshape(np.shape(codes))


def _refusing_bfloat16(name, function):
    def guarded(self, *arguments, **options):
        for a in arguments:
            for x in a if isinstance(a, (tuple, list)) else (a,):
                if isinstance(x, (Handle, tl.tensor)) and x.dtype.scalar.name == "bf16":
                    raise TypeError(f"{name} of bfloat16 in the interpreter: widen to fp32 first")
        return function(self, *arguments, **options)

    return guarded


# --- memory ---------------------------------------------------------------------------------------


class Launch:
    """Where the tensors of the running launch are, and what it has stored so far."""

    def __init__(self, arguments) -> None:
        bases = (x.base if isinstance(x, TensorDescriptor) else x for x in arguments)
        spans = sorted(_span(x) for x in bases if isinstance(x, torch.Tensor) and x.numel())
        self.first, self.end = np.array(spans, dtype=np.uint64).reshape(-1, 2).T
        self.stored: list[np.ndarray] = []

    def check(self, what: str, pointers: Handle, mask: np.ndarray) -> np.ndarray:
        """Return the addresses of the lanes that are on, all of them inside of one tensor."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        on = pointers.data[np.broadcast_to(mask, pointers.data.shape).astype(bool)]
        if on.size:
            low, high = on.min(), on.max() + np.uint64(max(1, size))
            inside = (self.first <= low) & (high <= self.end)
            assert inside.any(), f"{what} outside of the tensors of the launch"
        return on

    def assert_no_races(self) -> None:
        """Assert that no address was stored to twice."""
        if self.stored:
            addresses = np.concatenate(self.stored)
            assert np.unique(addresses).size == addresses.size, "two stores to one address"


def _span(x: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _watch_memory() -> None:
    executor, running = interpreter.GridExecutor, []
    load, store = Builder.create_masked_load, Builder.create_masked_store
    before, after = executor._init_args_hst, executor._restore_args_dev

    def begin(self, arguments, options):
        host = before(self, arguments, options)
        running[:] = [Launch(host[0])]
        return host

    def end(self, *arguments):
        running.pop().assert_no_races()
        return after(self, *arguments)

    def checked_load(self, pointers, mask, *rest, **options):
        mask = Handle(mask, tl.int1) if isinstance(mask, np.ndarray) else mask
        running[0].check("read", pointers, mask.data)
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self, pointers, value, mask, *rest):
        running[0].stored.append(running[0].check("store", pointers, mask.data))
        return store(self, pointers, value, mask, *rest)

    executor._init_args_hst, executor._restore_args_dev = begin, end
    Builder.create_masked_load, Builder.create_masked_store = checked_load, checked_store


@contextmanager
def poisoned_buffers():
    """Fill every new uninitialised tensor with NaN, a huge integer or True."""

    def poisoning(new):
        def poisoned(*arguments, **options):
            x = new(*arguments, **options)
            if x.dtype == torch.bool:
                return x.fill_(True)
            return x.fill_(torch.nan if x.dtype.is_floating_point else torch.iinfo(x.dtype).max)

        return poisoned

    with pytest.MonkeyPatch.context() as patch:
        for owner in (torch.Tensor, torch):
            for name in ("new_empty", "empty", "empty_like", "empty_strided", "new_empty_strided"):
                if hasattr(owner, name):
                    patch.setattr(owner, name, poisoning(getattr(owner, name)))
        yield
