"""What a kernel over a cache of codes computes, and how codes lie in its tiles.

``vecinfer_append`` transforms the queries, stores the new tokens exactly and as codes;
``vecinfer_decode`` attends to a part of the cache; ``vecinfer_combine`` adds the parts up.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flasheva_compile.lowering.spec import KernelSpec, padded

from flasheva_compile.quantization.formats import FP8
from flasheva_compile.quantization.transform_coding import WORD_BITS

if TYPE_CHECKING:
    from flasheva_compile.lowering.spec import AnyKind

ROWS = 16
"""Queries of one program: heads of a key head times new tokens, as a product's smallest tile."""

EXACT_PART = 64
"""Exact tokens of one program: they are few, and what one program does with many takes long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VecInferSpec(KernelSpec):
    """A kernel over the state of ``quantization/state.py``.

    Attributes:
        key_code: ``"d4b8"`` (a code of 8 bits for 4 channels) and so on, ``"w8"`` (a word of 16
            bits for 8 channels) and so on, or ``"fp8"``.
        value_code: The same of values, of the same sort.
        new_tokens: Tokens of the call.
        exact_tokens: Last tokens that stay exact, at least.
        block_tokens: Tokens that become codes together.
        ring: Slots of the last tokens.
        per_head: Whether key heads have codebooks of their own.
        rotate_keys: Whether coded keys are rotated.
        rotate_values: Whether coded values are: they are then summed apart from the exact ones.
    """

    key_code: str
    value_code: str
    new_tokens: int
    exact_tokens: int
    block_tokens: int
    ring: int
    per_head: bool = False
    rotate_keys: bool = True
    rotate_values: bool = False

    def of_kind(self, kind: AnyKind) -> VecInferSpec:
        """Return the spec of another kernel of the same step, without what it ignores."""
        ignored = {}
        if kind == "vecinfer_combine":
            # It reads sums alone.
            ignored = {"head_dim": self.value_dim, "key_code": self.value_code, "softcap": False}
            ignored |= {"rotate_keys": True, "per_head": False}
            ignored |= {"dtype": "fp32"} if self.rotate_values else {}
        elif kind == "vecinfer_decode":
            ignored = {"rotate_keys": True, "rotate_values": False}
        return dataclasses.replace(self, kind=kind, **ignored)

    @property
    def queries(self) -> int:
        """Return the queries of a key head."""
        return self.group * self.new_tokens

    @property
    def row_blocks(self) -> int:
        """Return the programs that the queries of a key head need."""
        return -(-self.queries // ROWS)

    @property
    def sink_parts(self) -> int:
        """Return the parts that attend to sinks: the first ones."""
        return -(-self.sink_size // EXACT_PART)

    @property
    def exact_parts(self) -> int:
        """Return the parts that attend to exact tokens."""
        most = self.exact_tokens + self.block_tokens - 1 + self.new_tokens
        return self.sink_parts + -(-most // EXACT_PART)

    @property
    def is_fp8(self) -> bool:
        """Whether tokens are stored as numbers of 8 bits instead of numbers of codewords."""
        return self.key_code == FP8

    @property
    def is_words(self) -> bool:
        """Whether tokens are stored as digits in words of 16 bits: transform coding."""
        return self.keys.is_words

    @property
    def query_pieces(self) -> int:
        """Return the programs that transform sixteen queries, each some channels."""
        return max(1, self.keys.padded // 32)

    @property
    def append_jobs(self) -> tuple[int, int, int]:
        """Return the programs of ``vecinfer_append`` per key head: for queries, keys, values."""
        if self.is_fp8:  # queries need nothing, and a program takes all of a token
            return 0, self.new_tokens, self.new_tokens
        of_keys, of_values = (
            self.new_tokens * -(-layout.codes // part_codes(layout, which))
            for which, layout in (("key", self.keys), ("value", self.values))
        )
        return self.row_blocks * self.query_pieces, of_keys, of_values

    @property
    def keys(self) -> CodeLayout:
        """Return how codes of keys lie."""
        return code_layout(self.key_code, self.head_dim)

    @property
    def values(self) -> CodeLayout:
        """Return how codes of values lie."""
        return code_layout(self.value_code, self.value_dim)

    @property
    def coded_dtype(self) -> str:
        """Return the dtype of the products with what codes stand for."""
        return "fp32" if self.dtype == "fp32" else "fp16"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeLayout:
    """How the codes of one token lie in memory and in tiles.

    Attributes:
        vector: Channels per code.
        bits: Bits per code; 16 = a word, whose channels are fields.
        size: True channels.
        padded: Channels of a tile, a power of two and four codes at least, of words eight.
    """

    vector: int
    bits: int
    size: int
    padded: int

    @property
    def entries(self) -> int:
        """Return the codewords of a codebook."""
        return 1 << self.bits

    @property
    def codes(self) -> int:
        """Return the codes of a token."""
        return self.size // self.vector

    @property
    def nbytes(self) -> int:
        """Return the bytes of a token; see ``quantization/packing.py``."""
        if self.is_words:
            return 2 * self.codes
        return self.codes if self.bits <= 8 else -(-self.codes // 2) * 3

    @property
    def is_words(self) -> bool:
        """Whether codes are words of fields."""
        return self.bits == WORD_BITS

    @property
    def is_whole(self) -> bool:
        """Whether a tile has no more codes than a token."""
        return self.codes * self.vector == self.padded

    def lanes(self, warps: int) -> int:
        """Return the codes of a token that lie side by side in lanes and warps."""
        return min(8 * warps, self.padded // self.vector)

    def channel(self, column: str, warps: int) -> str:
        """Return the channel of a column of a tile of values (``vecinfer_codes.value_tile``)."""
        lanes = self.lanes(warps)
        steps = self.padded // self.vector // lanes
        code = f"({column} % {lanes} * {steps} + {column} // {lanes * self.vector})"
        return f"{code} * {self.vector} + {column} // {lanes} % {self.vector}"


def code_layout(code: str, size: int) -> CodeLayout:
    """Return the layout of codes as ``VecInferSpec`` names them, of ``size`` channels."""
    if code == FP8:
        return CodeLayout(vector=1, bits=8, size=size, padded=padded(size))
    if code.startswith("w"):
        fields = int(code[1:])
        assert size % (2 * fields) == 0
        width = fields * max(8, padded_codes(size // fields))
        return CodeLayout(vector=fields, bits=WORD_BITS, size=size, padded=width)
    found = re.fullmatch(r"d(\d+)b(\d+)", code)
    assert found is not None, code
    vector, bits = (int(x) for x in found.groups())
    assert size % vector == 0
    assert vector & (vector - 1) == 0  # sides of tiles are powers of two
    return CodeLayout(vector=vector, bits=bits, size=size, padded=max(padded(size), 4 * vector))


def part_codes(layout: CodeLayout, which: str) -> int:
    """Return how many codes of a key or a value one program of ``vecinfer_append`` finds.

    A word of keys is as many products with all channels as it has fields; one of values is none.
    """
    whole = padded_codes(layout.codes)
    if layout.is_words:
        return min(max(2, _PRODUCTS // layout.vector), whole) if which == "key" else whole
    return min(8, whole)


_PRODUCTS = 16  # of one program


def padded_codes(codes: int) -> int:
    """Return a number of codes rounded up to a power of two, two at least."""
    return max(2, 1 << (codes - 1).bit_length())
