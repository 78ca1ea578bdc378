"""Text fragments of Triton source: indentation, tiles split along the head dimension, products."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flasheva_compile.lowering.spec import padded, parts

if TYPE_CHECKING:
    from collections.abc import Iterator


class Source:
    """Lines of Python under construction."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._depth = 0

    def line(self, text: str = "") -> None:
        """Append one line at the current depth."""
        self._lines.append("    " * self._depth + text if text else "")

    def lines(self, *texts: str) -> None:
        """Append several lines."""
        for text in texts:
            self.line(text)

    @contextmanager
    def block(self, header: str) -> Iterator[None]:
        """Append a header line and indent what follows."""
        self.line(header)
        self._depth += 1
        yield
        self._depth -= 1

    def text(self) -> str:
        """Return everything, with a newline at the end."""
        return "\n".join(self._lines) + "\n"


@dataclass(frozen=True, slots=True)
class Dim:
    """A head dimension as parts that are powers of two.

    Attributes:
        letter: ``"d"`` for queries and keys, ``"e"`` for values; offsets are ``offs_d0``, ...
        size: Its true size.
        split: In parts; or else in one part that reaches beyond ``size``.
    """

    letter: str
    size: int
    split: bool = True

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """``(offset, size)`` of each part."""
        return parts(self.size) if self.split else ((0, padded(self.size)),)

    @property
    def indices(self) -> range:
        """Number of each part."""
        return range(len(self.parts))

    def offsets(self) -> list[str]:
        """Define the column offsets of the parts."""
        return [
            f"offs_{self.letter}{n} = " + (f"{lo} + " if lo else "") + f"tl.arange(0, {size})"
            for n, (lo, size) in enumerate(self.parts)
        ]

    def bound(self, n: int) -> str | None:
        """Return the condition under which a column of part ``n`` exists; None = always."""
        lo, size = self.parts[n]
        return f"offs_{self.letter}{n}[None, :] < {self.size}" if lo + size > self.size else None

    def address(self, n: int, pointer: str, rows: str, stride: str) -> str:
        """Return the pointers of a tile: rows of a matrix, columns of part ``n``."""
        return f"{pointer} + {rows}[:, None] * {stride} + offs_{self.letter}{n}[None, :]"

    def mask(self, n: int, row_bound: str | None) -> str | None:
        """Return the mask of a tile whose rows are bound by a condition on a column vector."""
        bounds = [b for b in (row_bound and f"({row_bound})[:, None]", self.bound(n)) if b]
        if len(bounds) == 2:
            bounds[1] = f"({bounds[1]})"
        return " & ".join(bounds) or None

    def load(
        self,
        tile: str,
        pointer: str,
        rows: str,
        stride: str,
        row_bound: str | None,
        *,
        cast: str = "",
    ) -> list[str]:
        """Load ``{tile}0``, ``{tile}1``, ... from rows ``rows`` of ``pointer``."""
        lines = []
        for n in self.indices:
            mask = self.mask(n, row_bound)
            guard = f", mask={mask}, other=0.0" if mask else ""
            address = self.address(n, pointer, rows, stride)
            lines.append(f"{tile}{n} = tl.load({address}{guard}){cast}")
        return lines

    def load_tile(self, tile: str, pointer: str, row_bound: str) -> list[str]:
        """Load the rows ``offset + offs_t`` of ``pointer``, neighbours in memory."""
        return [
            f"{tile}_tile = {pointer} + offset * tl.cast({self.size}, tl.int64)",
            *self.load(tile, f"{tile}_tile", "offs_t", str(self.size), row_bound),
        ]

    def fetch(self, tile: str, tensor: str, at: str, rows: str) -> list[str]:
        """Load the parts of a tile of ``rows`` rows through tensor descriptors."""
        return [
            f"{tile}{n} = {tensor}_desc{n}.load([{at}, {lo}]).reshape({rows}, {size})"
            for n, (lo, size) in enumerate(self.parts)
        ]

    def store(
        self, tile: str, pointer: str, rows: str, stride: str, row_bound: str | None
    ) -> list[str]:
        """Store ``{tile}0``, ``{tile}1``, ... to rows ``rows`` of ``pointer``."""
        lines = []
        for n in self.indices:
            mask = self.mask(n, row_bound)
            guard = f", mask={mask}" if mask else ""
            address = self.address(n, pointer, rows, stride)
            lines.append(f"tl.store({address}, {tile}{n}{guard})")
        return lines

    def load_row(self, tile: str, pointer: str, *, cast: str = "") -> list[str]:
        """Load one row as tiles of one row."""
        lines = []
        for n in self.indices:
            bound = self.bound(n)
            guard = f", mask={bound}, other=0.0" if bound else ""
            address = f"{pointer} + offs_{self.letter}{n}[None, :]"
            lines.append(f"{tile}{n} = tl.load({address}{guard}){cast}")
        return lines

    def store_row(self, tile: str, pointer: str) -> list[str]:
        """Store tiles of one row."""
        lines = []
        for n in self.indices:
            bound = self.bound(n)
            guard = f", mask={bound}" if bound else ""
            address = f"{pointer} + offs_{self.letter}{n}[None, :]"
            lines.append(f"tl.store({address}, {tile}{n}{guard})")
        return lines

    def zeros(self, tile: str, rows: str) -> list[str]:
        """Define accumulators ``{tile}0``, ``{tile}1``, ..."""
        return [
            f"{tile}{n} = tl.zeros([{rows}, {size}], tl.float32)"
            for n, (_, size) in enumerate(self.parts)
        ]

    def scale(self, tile: str, factor: str) -> list[str]:
        """Multiply every part."""
        return [f"{tile}{n} *= {factor}" for n in self.indices]

    def row_sum(self, left: str, right: str) -> str:
        """Return the sum over columns of the elementwise product of two tiles."""
        return " + ".join(f"tl.sum({left}{n} * {right}{n}, 1)" for n in self.indices)

    def contract(
        self, result: str, left: str, right: str, precision: str, *, more: bool = False
    ) -> list[str]:
        """Compute ``result = left @ right.T``, or add ``more``, over this dimension by parts."""
        lines = []
        for n in self.indices:
            seed = f", {result}" if n or more else ""
            lines.append(f"{result} = tl.dot({left}{n}, tl.trans({right}{n}){seed}{precision})")
        return lines

    def accumulate(self, result: str, left: str, right: str, precision: str) -> list[str]:
        """Compute ``result += left @ right`` where this dimension is the columns of ``right``."""
        return [
            f"{result}{n} = tl.dot({left}, {right}{n}, {result}{n}{precision})"
            for n in self.indices
        ]
