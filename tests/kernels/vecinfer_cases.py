"""Sequences over a cache of codes as values; see ``decode_cases.py``."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from flasheva_compile.lowering import launch_vecinfer, offline
from flasheva_compile.lowering.spec import Schedule
from flasheva_compile.lowering.vecinfer_books import (
    KernelCodebooks,
    KernelTransforms,
    kernel_codebooks,
    kernel_transforms,
)
from hypothesis import strategies as st
from torch import Tensor

from flasheva_compile.quantization.attention import append_and_attend
from flasheva_compile.quantization.coding import codec_of
from flasheva_compile.quantization.formats import (
    CodeFormat,
    KvFormat,
    KvStorage,
    WordFormat,
    WordKvFormat,
)
from flasheva_compile.quantization.fp8 import Fp8Codec
from flasheva_compile.quantization.learn_transforms import _allocations
from flasheva_compile.quantization.state import QuantizedState, append, new_state
from flasheva_compile.quantization.transform_coding import LayerTransforms, TransformCodec
from flasheva_compile.quantization.vecinfer import LayerCodebooks, VqCodec
from tests.kernels.cases import DTYPES, POINTER_TYPES

CODES = ("key_codes", "value_codes", "exponents")


@dataclass(frozen=True, kw_only=True)
class VecInferCase:
    """``prefix`` tokens that plain PyTorch appends, then ``steps`` calls of ``new_tokens``.

    ``words``: fields of a word of keys and of values, of transform coding; 0 = codes. ``room``:
    codes that there is room for beyond the tokens. ``sizes``: a token's numbers are up to as many
    powers of two larger or smaller than others'; fp8 stores them all as well.
    """

    batch: int = 1
    kv_heads: int = 1
    group: int = 4
    head_dim: int = 32
    value_dim: int = 32
    fp8: bool = False
    words: tuple[int, int] = (0, 0)
    sizes: int = 0
    key: tuple[int, int] = (4, 3)
    value: tuple[int, int] = (4, 3)
    rotate_keys: bool = True
    rotate_values: bool = False
    per_head: bool = False
    grouped: bool = False
    softcap: float = 0.0
    scale: float = 0.3
    mask: str = "none"
    prefix: int = 50
    steps: int = 3
    new_tokens: int = 1
    sinks: int = 3
    exact: int = 5
    block: int = 16
    room: int = 0
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    block_n: int = 16
    warps: int = 1
    splits: int = 2
    seed: int = 0
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        return self.prefix + self.steps * self.new_tokens

    @property
    def form(self) -> KvFormat | WordKvFormat | None:
        if self.words[0]:
            return WordKvFormat(*map(WordFormat, self.words))
        return None if self.fp8 else KvFormat(CodeFormat(*self.key), CodeFormat(*self.value))

    @property
    def storage(self) -> KvStorage:
        return KvStorage(
            format="fp8",  # the name is not read
            sink_tokens=self.sinks,
            exact_tokens=self.exact,
            block_tokens=self.block,
        )

    def _normal(self, stream: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 100 + stream)
        # Rounded to bf16 so that every precision starts from the same numbers.
        return torch.randn(shape, generator=generator).bfloat16().double().to(self.device)

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        kv = (self.batch, self.kv_heads, self.tokens)
        q = self._normal(1, self.batch, self.kv_heads * self.group, self.tokens, self.head_dim)
        k, v = self._normal(2, *kv, self.head_dim), self._normal(3, *kv, self.value_dim)
        if self.sizes:  # keys are smaller, for larger ones leave one weight
            powers = self._normal(11, 2, *kv, 1).mul(self.sizes / 2).round()
            powers = powers.clamp(-self.sizes, self.sizes)
            k, v = k * 2 ** -powers[0].abs(), v * 2 ** powers[1]
        return q, k, v

    @cached_property
    def valid(self) -> Tensor:
        """``[B, N]`` bool."""
        if self.mask == "holes":
            return self._normal(4, self.batch, self.tokens) > -0.5
        if self.mask == "left_padding":
            padding = (self._normal(5, self.batch, 1).abs() * self.tokens / 2).long()
            return torch.arange(self.tokens, device=self.device) >= padding
        return torch.ones(self.batch, self.tokens, dtype=torch.bool, device=self.device)

    @cached_property
    def books(self) -> LayerCodebooks:
        assert isinstance(self.form, KvFormat)
        heads = self.kv_heads if self.per_head else 1
        shapes = [(heads, f.entries, f.vector) for f in (self.form.key, self.form.value)]
        return LayerCodebooks(
            scale=self._normal(6, self.kv_heads, self.head_dim).abs() + 0.5,
            keys=self._normal(7, *shapes[0]),
            values=self._normal(8, *shapes[1]),
            rotate_keys=self.rotate_keys,
            rotate_values=self.rotate_values,
            order=self._normal(9, self.kv_heads, self.head_dim).argsort() if self.grouped else None,
            offset=self._normal(10, self.kv_heads, self.head_dim) if self.grouped else None,
        )

    @cached_property
    def transforms(self) -> LayerTransforms:
        """Return bits by chance, among them fields of none, and steps that reach most numbers."""
        generator = torch.Generator().manual_seed(self.seed)
        sizes, widths = (self.head_dim, self.value_dim), []
        for fields in self.words:
            known = torch.tensor(_allocations(fields))
            chosen = torch.randint(len(known), (self.kv_heads,), generator=generator)
            widths.append(known[chosen].to(self.device))
        steps, offsets = [], []
        for n, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            uneven = self._normal(12 + n, self.kv_heads, size).mul(0.3).exp()
            reach = (1 << width).repeat_interleave(size // width.shape[1], 1).double()
            steps.append(4 * uneven / reach)
            offsets.append(-steps[-1] * (reach - 1) / 2 + self._normal(14 + n, self.kv_heads, size))
        return LayerTransforms(
            key_scale=self._normal(6, self.kv_heads, self.head_dim).abs() + 0.5,
            key_rotation=torch.linalg.qr(
                self._normal(7, self.kv_heads, self.head_dim, self.head_dim)
            ).Q,
            key_offset=offsets[0],
            key_step=steps[0],
            key_widths=widths[0],
            value_order=self._normal(8, self.kv_heads, self.value_dim).argsort(),
            value_offset=offsets[1],
            value_step=steps[1],
            value_widths=widths[1],
        )

    @property
    def codec(self) -> VqCodec | TransformCodec | Fp8Codec:
        sizes = (self.head_dim, self.value_dim)
        if self.form is None:
            return Fp8Codec(*sizes)
        learned = self.transforms if self.words[0] else self.books
        return codec_of(learned, self.form, sizes)

    @property
    def kernel_books(self) -> KernelCodebooks | KernelTransforms | None:
        if self.words[0]:
            return kernel_transforms(self.transforms, self.dtype)
        if self.fp8:
            return None
        return kernel_codebooks(self.books, (self.head_dim, self.value_dim), self.dtype)

    def filled_state(self, dtype: torch.dtype) -> QuantizedState:
        """Return the state after the prefix; its codes are those of fp64."""
        _, k, v = self.qkv
        room = max(0, self.tokens - self.sinks + self.room)
        state = new_state(k, v, self.codec, self.storage, room)
        part = slice(0, self.prefix)
        kv = (k[:, :, part], v[:, :, part])
        append(state, self.codec, self.storage, kv, self.valid[:, part])
        return QuantizedState(*(x.to(dtype) if x.is_floating_point() else x for x in state))

    def lay_out(self, x: Tensor) -> Tensor:
        """Return equal numbers with the case's strides, in NaN where the tensor has gaps."""
        if self.layout == "slice":
            b, h, n, d = x.shape
            whole = x.new_full((b, h + 2, n + 3, d + 8), torch.nan)
            return whole[:, 1 : h + 1, 2 : n + 2, 8:].copy_(x)
        return x.mT.contiguous().mT if self.layout == "columns_last" else x


def steps_of(case: VecInferCase, dtype: torch.dtype):
    """Yield ``(q, k, v), valid`` of each call, as views of the whole sequence."""
    qkv = [case.lay_out(x.to(dtype)) for x in case.qkv]
    for at in range(case.prefix, case.tokens, case.new_tokens):
        part = slice(at, at + case.new_tokens)
        yield tuple(x[:, :, part] for x in qkv), case.valid[:, part]


def run_pytorch(
    case: VecInferCase, dtype: torch.dtype, codes: list[QuantizedState]
) -> tuple[Tensor, Tensor, list[QuantizedState]]:
    """Return ``out`` and ``lse`` of all calls, and the state after each.

    Each call reads the codes of the state that ``codes`` has for it: in low precision rounding may
    find another codeword.
    """
    state, found, states = case.filled_state(dtype), [], []
    for (qkv, valid), known in zip(steps_of(case, dtype), codes, strict=False):
        for name in CODES:
            getattr(state, name).copy_(getattr(known, name))
        settings = (case.codec, case.storage, case.scale, case.softcap)
        found.append(append_and_attend(qkv, valid, state, *settings))
        states.append(QuantizedState(*(x.clone() for x in state)))
    return *(torch.cat(x, 2) for x in zip(*found, strict=True)), states


def run_kernels(
    case: VecInferCase, state: QuantizedState | None = None, *, own_schedule: bool = False
) -> tuple[Tensor, Tensor, list[QuantizedState]]:
    """Do the same on the generated kernels; the states begin with that before the first call.

    ``own_schedule``: with the tiles and parts that a launch chooses, not with those of the case.
    """
    state = state or case.filled_state(case.dtype)
    books, rotate = case.kernel_books, (bool(case.words[0]), False)
    if not case.fp8 and not case.words[0]:
        rotate = (case.rotate_keys, case.rotate_values)
    found, states = [], [QuantizedState(*(x.clone() for x in state))]
    with nullcontext() if own_schedule else as_scheduled(case):
        for qkv, valid in steps_of(case, case.dtype):
            mask = None if case.mask == "none" else valid
            given = (qkv, mask, state, books, case.form, case.storage)
            found.append(
                launch_vecinfer.vecinfer_decode(
                    *given, rotate=rotate, scale=case.scale, softcap=case.softcap
                )
            )
            states.append(QuantizedState(*(x.clone() for x in state)))
    return *(torch.cat(x, 2) for x in zip(*found, strict=True)), states


@contextmanager
def as_scheduled(case: VecInferCase):
    """Launch with the case's tiles and parts; check argument types against offline compiles."""
    schedule = Schedule(block_m=16, block_n=case.block_n, num_warps=case.warps, num_stages=1)
    types = {**POINTER_TYPES, torch.bool: "*i1"}

    def checking(kernel):
        def launch(programs, *arguments):
            for name, value in zip(kernel.generated.arguments, arguments, strict=True):
                if isinstance(value, Tensor):
                    declared = offline.argument_type(name, kernel.generated.spec, schedule)
                    assert declared == types[value.dtype], f"{name}: {declared}"
            kernel.launch(programs, *arguments)

        return launch

    def load(spec, chosen):
        kernel = loaded(spec, chosen)
        return dataclasses.replace(kernel, launch=checking(kernel))

    module, loaded = launch_vecinfer, launch_vecinfer.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "choose", lambda *_: schedule)
        patch.setattr(module, "load", load)
        patch.setattr(module, "parts_of", lambda *_: case.splits)
        module._plan.cache_clear()
        try:
            yield
        finally:
            module._plan.cache_clear()


HEADS = ((1, 1, 4), (2, 2, 1), (1, 2, 3), (1, 1, 17))
SIZES = ((64, 64), (16, 16), (40, 48), (80, 80), (128, 32))
FP8_SIZES = ((20, 12), (256, 16), (4, 200))
KEY_CODES = ((4, 4), (2, 3), (8, 9), (8, 5), (1, 2), (4, 8))


def words_of(size: int) -> list[int]:
    """Return how many fields words of so many channels may have."""
    return [fields for fields in (4, 8, 16) if size % (2 * fields) == 0]


@st.composite
def vecinfer_cases(draw, **fixed):
    """Draw cases that the kernels take; keyword arguments fix fields."""
    batch, kv_heads, group = draw(st.sampled_from(HEADS))
    fp8 = fixed.get("fp8", draw(st.booleans()))
    head_dim, value_dim = draw(st.sampled_from((*SIZES, *FP8_SIZES) if fp8 else SIZES))
    words = (0, 0)
    if fixed.get("words"):
        words = tuple(draw(st.sampled_from(words_of(size))) for size in (head_dim, value_dim))
    drawn = {
        "fp8": fp8,
        "sizes": draw(st.sampled_from([0, 0, 10])) if fp8 else 0,
        "batch": batch,
        "kv_heads": kv_heads,
        "group": group,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "key": draw(st.sampled_from(KEY_CODES)),
        "value": draw(st.sampled_from(KEY_CODES)),
        "rotate_keys": draw(st.booleans()),
        "rotate_values": draw(st.booleans()),
        "per_head": draw(st.booleans()),
        "grouped": draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 0.0, 3.0])),
        "scale": draw(st.sampled_from([0.3, 0.3, -0.3, 0.0])),
        "mask": draw(st.sampled_from(["none", "holes", "left_padding"])),
        "prefix": draw(st.integers(0, 70)),
        "steps": draw(st.integers(1, 3)),
        "new_tokens": draw(st.sampled_from([1, 1, 2, 5])),
        "sinks": draw(st.sampled_from([0, 2, 70])),
        "exact": draw(st.integers(1, 20)),
        "block": draw(st.sampled_from([16, 32, 1, 7])),
        "room": draw(st.sampled_from([0, 0, 21])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "layout": draw(st.sampled_from(["contiguous", "slice", "columns_last"])),
        "block_n": draw(st.sampled_from([16, 32])),
        "warps": draw(st.sampled_from([1, 2, 4])),
        "splits": draw(st.sampled_from([1, 2, 3])),
        "seed": draw(st.integers(0, 1000)),
    }
    return VecInferCase(**{**drawn, **fixed, "words": words})
