"""Triton's CPU interpreter without work that it repeats: most of its time goes into bookkeeping.

Nothing that a kernel computes or checks changes:
- the language is patched once per process, not at each launch and each call of a device function;
- types of blocks, the shapes of tensors and NumPy's types are made once each;
- what a device assertion would test, which the interpreter skips, is not computed;
- operands of one type are not converted to it, and xor, which sorting reduces by, runs in NumPy;
- a kernel's text is parsed once, not cut out of its file by Python's tokenizer, twice.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from functools import cache
from pathlib import Path

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

core = tl.core


def install() -> None:
    """Patch the interpreter; once per process, after what changes ``_patch_lang_tensor``."""
    builder = interpreter.interpreter_builder
    # The assertions are `device_assert`s, which do nothing without `debug`.
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _patch_language_once()
    _make_block_types_once()
    _make_shapes_once()
    _find_numpy_types_once()
    _compare_types_by_identity()
    _leave_equal_types_alone()
    _reduce_xor_in_numpy()
    interpreter.FunctionRewriter.rewrite_ast = _rewrite


class _Forever:
    """A scope of patches that stay."""

    def set_attr(self, owner: object, name: str, value: object) -> None:
        setattr(owner, name, value)

    def restore(self) -> None:
        """Leave the patches: the process does nothing but interpret."""


def _patch_language_once() -> None:
    scope = _Forever()
    interpreter._patch_attr = _patch_attr
    for module in (tl, core, tl.math):
        interpreter._patch_builtin(module, interpreter.interpreter_builder, scope)
    for owner in (core.tensor, core.tensor_descriptor_base):
        interpreter._patch_builtin(owner, interpreter.interpreter_builder, scope)
    interpreter._patch_lang_tensor(core.tensor, scope)
    for module in (tl, core):
        interpreter._patch_lang_core(module, scope)
    interpreter._patch_lang = lambda _: scope


def _patch_attr(owner, name, member, builder, scope) -> None:
    semantic = TritonSemantic(builder)
    function = getattr(member, "__wrapped__", member)  # without the check for `_semantic`

    def interpreted(*arguments, **options):
        options["_semantic"] = semantic
        return function(*arguments, **options)

    scope.set_attr(owner, name, interpreted)


def _make_block_types_once() -> None:
    made: dict[tuple, core.block_type] = {}
    initialise = core.block_type.__init__

    def new(cls, element_ty, shape):
        sizes = (getattr(size, "value", size) for size in shape)
        key = (element_ty.name, getattr(element_ty, "address_space", 0), *sizes)
        if key not in made:
            fresh = object.__new__(cls)
            initialise(fresh, element_ty, shape)
            made[key] = fresh
        return made[key]

    core.block_type.__new__ = staticmethod(new)
    core.block_type.__init__ = lambda self, element_ty, shape: None


def _make_shapes_once() -> None:
    made: dict[tuple[int, ...], tuple] = {}
    initialise = core.tensor.__init__

    def fast(self, handle, type):
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in made:
            initialise(self, handle, type)
            made[key] = (self.numel, self.shape)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = made[key]

    core.tensor.__init__ = fast


def _find_numpy_types_once() -> None:
    found: dict[str, np.dtype] = {}
    find = interpreter._get_np_dtype

    def fast(type):
        if type.name not in found:
            found[type.name] = find(type)
        return found[type.name]

    interpreter._get_np_dtype = fast


def _compare_types_by_identity() -> None:
    """Before comparing names: each scalar type is one object, and now each type of a block."""
    for kind in (core.dtype, core.block_type, core.pointer_type):
        compare, kept = kind.__eq__, kind.__hash__

        def fast(self, other, compare=compare):
            return self is other or compare(self, other)

        kind.__eq__, kind.__hash__ = fast, kept
    integers = frozenset(core.dtype.SINT_TYPES + core.dtype.UINT_TYPES)
    core.dtype.is_int = lambda self: self.name in integers


def _leave_equal_types_alone() -> None:
    convert = TritonSemantic.binary_op_type_checking_impl

    def fast(self, a, b, *options, **named):
        both = isinstance(a, core.tensor) and isinstance(b, core.tensor)
        div_or_mod = named.get("div_or_mod", options[3] if len(options) > 3 else False)
        if both and a.type is b.type and not (div_or_mod or a.dtype.is_ptr()):
            return a, b
        return convert(self, a, b, *options, **named)

    TritonSemantic.binary_op_type_checking_impl = fast


def _reduce_xor_in_numpy() -> None:
    reduce = interpreter.ReduceOps.apply_impl

    def fast(self, inputs):
        if self.combine_fn is not tl.standard._xor_combine or self.axis is None:
            return reduce(self, inputs)
        data = inputs[0].handle.data
        found = np.bitwise_xor.reduce(data, axis=self.axis, keepdims=self.keep_dims)
        return [self.to_tensor(found, inputs[0].dtype)]

    interpreter.ReduceOps.apply_impl = fast


@cache
def _definitions(text: str) -> dict[tuple[str, int], ast.FunctionDef]:
    return {
        (node.name, min([node.lineno, *(x.lineno for x in node.decorator_list)])): node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
    }


@cache
def _transformed(text: str, name: str, line: int) -> ast.Module:
    tree = ast.Module([_definitions(text)[name, line]], [])
    tree.body[0].decorator_list = []
    return ast.fix_missing_locations(interpreter.FunctionRewriter.ast_transformer.visit(tree))


def _rewrite(self):
    """Do what the interpreter does to a function's text: make tensors of what is assigned."""
    self.filename = inspect.getsourcefile(self.fn)
    found = (self.fn.__name__, self.fn.__code__.co_firstlineno)
    return self._compile_and_exec(_transformed(Path(self.filename).read_text(), *found))
