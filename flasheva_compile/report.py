"""From the decisions of a compilation to what people read: a table, totals, JSON."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from flasheva_compile.layer_names import compress_names
from flasheva_compile.lowering import cost
from flasheva_compile.lowering.op import EvaOp
from flasheva_compile.quantization.formats import EXACT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PREPARED = "prepared"
"""The reason of attentions that ``prepare`` converted."""

_VERSION = 1
_WIDTH = 100
_NARROWEST = 30
_HEADER = ("attention", "decision (window/chunk/sinks)", "heads/kv x dim", "mask")
_GEOMETRY = ("window_size", "chunk_size", "chunk_rule", "window", "retrieve_chunks")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What became of one attention.

    Attributes:
        path: Its module path.
        decision: ``"eva"`` (rewritten) or ``"full"`` (left as it was).
        reason: Why it was left full, or how a rewritten one was recognised.
        mask: The mask, in words: ``"causal"``, ``"causal, padding"``, ``"not recognised"``.
        source: ``file:line`` of the code.
        expected: Left full because the configuration or the model itself says so.
        kv: How the cache of one left full is stored.
        training: Whether the graph also computes gradients.
        itemsize: Bytes per element of keys and values.
        causal: A query sees only its past; None where it is not known.
        rule_parameters: How many parameters of its own the chunk rule has here.
        heads: Query heads, and so on as in ``EvaOp``; None where they are not known.
        weighted_bounds: What selects chunks by bounds has learned weights.
    """

    path: str
    decision: Literal["eva", "full"]
    reason: str = ""
    mask: str = ""
    source: str = ""
    expected: bool = False
    kv: str = EXACT
    training: bool = False
    itemsize: int = 4
    causal: bool | None = None
    rule_parameters: int = 0
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    has_key_mask: bool = False
    has_segments: bool = False
    window_size: int | None = None
    chunk_size: int | None = None
    sink_tokens: int | None = None
    chunk_rule: str | None = None
    window: str | None = None
    retrieve_chunks: int = 0
    retrieve_block: int = 1
    retrieve_by: str = "token"
    weighted_bounds: bool = False

    @classmethod
    def rewritten(cls, path: str, op: EvaOp, **facts: Any) -> LayerReport:  # noqa: ANN401
        """Describe an attention that now computes ``op``."""
        shared = ("causal", "heads", "kv_heads", "head_dim", "value_dim", "scale", "softcap")
        shared += ("dropout_p", "has_key_mask", "has_segments")
        geometry = (*_GEOMETRY, "retrieve_block", "retrieve_by")
        fields = {name: getattr(op, name) for name in shared + geometry}
        return cls(path=path, decision="eva", sink_tokens=op.sink_size, **fields, **facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    """One generated kernel of a model, compiled for a target.

    Attributes:
        layers: Module paths of the attentions that run it, abbreviated.
        kind: Which of an attention's kernels it is.
        name: Of its file in the cache of generated kernels.
        source: A complete module.
        target: Such as ``"sm_90"``.
        registers: Of a thread.
        shared_bytes: Shared memory of a program.
        spilled_bytes: What a thread keeps in memory for want of registers.
        matrix: The matrix instruction that it runs, "" = none.
    """

    layers: str
    kind: str
    name: str
    source: str = field(repr=False)
    target: str
    registers: int
    shared_bytes: int
    spilled_bytes: int
    matrix: str

    def __str__(self) -> str:
        spills = f"{self.spilled_bytes} bytes spilled" if self.spilled_bytes else "no spills"
        used = f"{self.registers} registers, {_binary(self.shared_bytes)} shared, {spills}"
        return f"{self.kind:<15} {used}, {self.matrix or 'no matrix instruction'}"


@dataclass(frozen=True, slots=True)
class Totals:
    """Cost of every attention whose shape is known, for one row of ``length`` tokens.

    Attributes:
        length: Sequence length [tokens].
        attentions: How many are counted.
        full_flops: Forward pass, all of them left full.
        flops: Forward pass, as decided.
        full_cache_bytes: Keys and values that decoding keeps, all of them left full.
        cache_bytes: Keys and values that decoding keeps, as decided.
    """

    length: int
    attentions: int
    full_flops: int
    flops: int
    full_cache_bytes: int
    cache_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileReport:
    """What became of every attention of a model.

    Attributes:
        layers: In the order in which they run.
        length: Sequence length that totals are for [tokens]; None = no totals.
        seconds: How long each stage took.
        warnings: What could not be looked into.
        kernels: What the rewritten attentions run, where that was asked for.
    """

    layers: tuple[LayerReport, ...] = ()
    length: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    kernels: tuple[KernelReport, ...] = ()

    @property
    def rewritten(self) -> tuple[LayerReport, ...]:
        """The attentions that now compute FlashEVA."""
        return tuple(layer for layer in self.layers if layer.decision == "eva")

    @property
    def unexpected(self) -> tuple[LayerReport, ...]:
        """The attentions that were left full although they were to be rewritten."""
        return tuple(layer for layer in self.left_full if not layer.expected)

    @property
    def left_full(self) -> tuple[LayerReport, ...]:
        """The attentions that were left as they were."""
        return tuple(layer for layer in self.layers if layer.decision == "full")

    def totals(self, length: int) -> Totals:
        """Add up what softmax attention and the decisions cost at one sequence length."""
        shapes = [(layer, _shape(layer)) for layer in self.layers]
        costs = [_cost(layer, shape, length) for layer, shape in shapes if shape]
        sums = [sum(column) for column in zip((0, 0, 0, 0), *costs, strict=True)]
        return Totals(length, len(costs), *sums)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "version": _VERSION,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "length": self.length,
            "totals": dataclasses.asdict(self.totals(self.length)) if self.length else None,
            "seconds": dict(self.seconds),
            "warnings": list(self.warnings),
            "kernels": [dataclasses.asdict(kernel) for kernel in self.kernels],
        }

    def to_json(self) -> str:
        """Return ``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompileReport:
        """Read ``to_dict``'s result."""
        return cls(
            layers=tuple(LayerReport(**layer) for layer in data["layers"]),
            length=data["length"],
            seconds=data["seconds"],
            warnings=tuple(data["warnings"]),
            kernels=tuple(KernelReport(**kernel) for kernel in data["kernels"]),
        )

    def __str__(self) -> str:
        lines = [f"FlashEVA: {len(self.rewritten)} of {len(self.layers)} attentions rewritten"]
        if self.layers:
            lines += ["", *_table(self.layers)]
        if self.length and self.layers:
            lines += ["", *_totals_lines(self.totals(self.length), len(self.layers))]
        if self.kernels:
            lines += ["", *_kernel_lines(self.kernels)]
        if self.seconds:
            stages = ", ".join(f"{name} {time:.2f}" for name, time in self.seconds.items())
            lines += ["", *_wrap(f"seconds: {stages}", "")]
        for warning in self.warnings:
            lines += _wrap(f"warning: {warning}", "")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What the cost of softmax attention depends on."""

    causal: bool
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


def _shape(layer: LayerReport) -> _Shape | None:
    """Return a layer's shape, or None where a part of it is not known."""
    values = {entry.name: getattr(layer, entry.name) for entry in dataclasses.fields(_Shape)}
    return None if None in values.values() else _Shape(**values)


def _cost(layer: LayerReport, shape: _Shape, length: int) -> tuple[int, int, int, int]:
    """Return full FLOPs, FLOPs as decided, full cache bytes, cache bytes as decided."""
    dims = {"head_dim": shape.head_dim, "value_dim": shape.value_dim}
    form = cost.full_flops(causal=shape.causal, heads=shape.heads, **dims)
    flops = eva_flops = cost.evaluate(form, length)
    form = cost.full_cache_bytes(kv_heads=shape.kv_heads, itemsize=layer.itemsize, **dims)
    cache = eva_cache = cost.evaluate(form, length) if shape.causal else 0
    if layer.decision == "full" and layer.kv != EXACT and shape.causal:
        sizes = {"kv_heads": shape.kv_heads, "itemsize": layer.itemsize}
        eva_cache = cost.evaluate(cost.stored_cache_bytes(layer.kv, **sizes, **dims), length)
    if layer.decision == "eva":
        op = EvaOp(
            **{name: getattr(layer, name) for name in _GEOMETRY},
            **dataclasses.asdict(shape),
            sink_size=layer.sink_tokens or 0,
            scale=layer.scale or 1.0,
        )
        eva_flops = cost.evaluate(cost.eva_flops(op), length)
        eva_cache = cost.evaluate(cost.eva_cache_bytes(op, itemsize=layer.itemsize), length)
    return flops, eva_flops, cache, eva_cache


def _table(layers: Sequence[LayerReport]) -> list[str]:
    """Write one row for all layers that differ only in the numbers of their paths.

    What does not fit into columns (the reason, the source) follows on a line of its own, once for
    rows that share it.
    """
    families: dict[tuple[object, ...], list[LayerReport]] = {}
    for layer in layers:
        numberless = tuple("#" if part.isdigit() else part for part in layer.path.split("."))
        families.setdefault((numberless, _facts(layer), _note(layer)), []).append(layer)
    rows = [(_names(same), *_facts(same[0])) for same in families.values()]
    notes = [_note(same[0]) for same in families.values()]
    widths = [max(len(row[column]) for row in (_HEADER, *rows)) for column in range(len(_HEADER))]
    widths[0] = min(widths[0], max(_WIDTH - sum(widths[1:]) - 2 * len(widths[1:]), _NARROWEST))
    lines = _row(_HEADER, widths)
    for place, (row, note) in enumerate(zip(rows, notes, strict=True)):
        lines += _row(row, widths)
        if note and notes[place + 1 : place + 2] != [note]:
            lines += _wrap(note, "    ")
    return lines


def _row(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Align cells; a first cell that is too wide gets a line of its own."""
    alone = _wrap(cells[0], "") if len(cells[0]) > widths[0] else []
    aligned = ("" if alone else cells[0], *cells[1:])
    padded = [cell.ljust(width) for cell, width in zip(aligned, widths, strict=True)]
    return [*alone, "  ".join(padded).rstrip()]


def _names(layers: Sequence[LayerReport]) -> str:
    """Write the paths of a family, and how many attentions it has."""
    names = ", ".join(compress_names(dict.fromkeys(layer.path for layer in layers)))
    return f"{names or '(no module)'} ({len(layers)}x)" if len(layers) > 1 else names


def _facts(layer: LayerReport) -> tuple[str, str, str]:
    """Return the cells after the path: decision, heads, mask."""
    decision = layer.decision
    if decision == "eva":
        geometry = f"{layer.window_size}/{layer.chunk_size}/{layer.sink_tokens}"
        decision = f"eva {geometry} {layer.window} {layer.chunk_rule}"
        if layer.retrieve_chunks:
            decision += f" top-{layer.retrieve_chunks}"
            how = " by weighted bounds" if layer.weighted_bounds else " by bounds"
            decision += how * (layer.retrieve_by == "bounds")
    heads = "-" if layer.heads is None else f"{layer.heads}/{layer.kv_heads} x {layer.head_dim}"
    return decision, heads, layer.mask or "-"


def _note(layer: LayerReport) -> str:
    """Return why a layer was left full, or where a rewritten one stands."""
    reason = f"left full: {layer.reason}" if layer.decision == "full" else layer.reason
    return " at ".join(filter(None, (reason, layer.source)))


def _wrap(text: str, indent: str) -> list[str]:
    """Break a line at 100 columns."""
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


def _kernel_lines(kernels: Sequence[KernelReport]) -> list[str]:
    """Write what each kernel needs, under the attentions that run it."""
    lines, layers = [f"kernels on {kernels[0].target}:"], ""
    for kernel in kernels:
        if kernel.layers != layers:
            layers = kernel.layers
            lines += _wrap(layers or "(no module)", "  ")
        lines.append(f"    {kernel}")
    return lines


def _totals_lines(totals: Totals, attentions: int) -> list[str]:
    """Write totals, full against FlashEVA."""
    counted = "" if totals.attentions == attentions else f" ({totals.attentions} counted)"
    lines = [f"at N = {totals.length}, one row{counted}:"]
    pairs = [("forward FLOPs", totals.full_flops, totals.flops, _si)]
    pairs.append(("KV cache", totals.full_cache_bytes, totals.cache_bytes, _binary))
    for name, full, eva, unit in pairs:
        if full:
            ratio = f"{full / eva:.1f}x less" if eva and full >= eva else "not less"
            lines.append(
                f"  {name:<14} full {unit(full):>10}   as decided {unit(eva):>10}   {ratio}"
            )
    return lines


def _si(number: int) -> str:
    """Write FLOPs with a decimal prefix."""
    value, prefixes = float(number), iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while value >= 1000 and (following := next(prefixes, "")):
        value, prefix = value / 1000, following
    return f"{value:.3g} {prefix}"


def _binary(number: int) -> str:
    """Write bytes with a binary prefix."""
    value, prefixes = float(number), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    prefix = next(prefixes)
    while value >= 1024 and (following := next(prefixes, "")):
        value, prefix = value / 1024, following
    return f"{value:.3g} {prefix}"
