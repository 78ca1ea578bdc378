"""Measure schedules of one attention's kernels on this GPU and keep the fastest.

``python -m flasheva_compile.tune --help`` lists the options. What it stores is used from then on by
every process with the same cache directory, for the same kernels on the same kind of device.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from flasheva_compile.kernels.blocked.block import Operands
from flasheva_compile.kernels.blocked.geometry import AttentionSettings
from flasheva_compile.lowering import launch, launch_pooling, schedule
from flasheva_compile.lowering.kernel_arguments import DTYPES
from flasheva_compile.lowering.rows import rows_of
from flasheva_compile.lowering.schedule_cost import candidates
from flasheva_compile.lowering.schedule_fp8 import converting
from flasheva_compile.lowering.spec import KernelKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from flasheva_compile.lowering.schedule_cost import Target
    from flasheva_compile.lowering.spec import KernelSpec, Schedule

Launches = dict["KernelSpec", "Callable[[], None]"]
"""What repeats the launch of each kernel."""

_TUNED = tuple(kind for kind in get_args(KernelKind) if kind != "bias_columns")  # has one schedule
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
_PARAMETERS = {"mean": 0, "tangent": 1, "evabyte": 2}
_LONGEST_REASON = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The attention whose kernels are measured.

    Attributes:
        heads: Query heads.
        kv_heads: Key heads.
        head_dim: Size of queries and keys.
        value_dim: Size of values.
        length: Sequence length [tokens].
        batch: Rows.
        window_size: Window [tokens].
        chunk_size: Keys per chunk [tokens].
        sink_tokens: Exact first tokens [tokens].
        window: ``"sliding"`` or ``"block"``.
        causal: Whether a query sees only its past.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        chunk_rule: ``"mean"``, ``"tangent"`` or ``"evabyte"``.
        key_mask: Whether keys are masked as padding is.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    length: int
    batch: int = 1
    window_size: int = 256
    chunk_size: int = 16
    sink_tokens: int = 0
    window: str = "sliding"
    causal: bool = True
    dtype: str = "bf16"
    chunk_rule: str = "mean"
    key_mask: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One schedule on trial.

    Attributes:
        spec: The kernel.
        schedule: How it was tiled.
        milliseconds: Median time; infinity where it does not run.
        note: ``"current"``, or why it does not run.
    """

    spec: KernelSpec
    schedule: Schedule
    milliseconds: float
    note: str = ""


# --- launches -------------------------------------------------------------------------------------


def launches_of(attention: Attention, kinds: Sequence[str], device: str = "cuda") -> Launches:
    """Run one forward and backward pass; return what repeats the launches of some kernels.

    Args:
        attention: What to run.
        kinds: Kernels to return; ``dpool`` runs only if it is among them.
        device: Where to run it.

    Returns:
        One entry per kernel that ran. It launches with the schedule of now, not that of then: the
        grid is part of what was recorded.
    """
    found: Launches = {}
    with _recorded(found):
        _run(attention, torch.device(device), pooling_alone="dpool" in kinds)
    return {spec: repeat for spec, repeat in found.items() if spec.kind in kinds}


@contextlib.contextmanager
def _recorded(found: Launches) -> Iterator[None]:
    """Note every launch while it happens."""
    run = launch.run

    def noting(spec: KernelSpec, programs: Callable[..., int], values: dict[str, Any]) -> None:
        found[spec] = lambda: run(spec, programs, values)
        run(spec, programs, values)

    launch.run = noting
    try:
        yield
    finally:
        launch.run = run


def _run(attention: Attention, device: torch.device, *, pooling_alone: bool) -> None:
    a, c = attention, attention.chunk_size
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=_DTYPES[a.dtype], generator=generator)

    def heads_first(heads: int, dim: int) -> torch.Tensor:
        return normal(a.batch, a.length, heads, dim).transpose(1, 2)

    q, k = heads_first(a.heads, a.head_dim), heads_first(a.kv_heads, a.head_dim)
    v, dout = heads_first(a.kv_heads, a.value_dim), heads_first(a.heads, a.value_dim)
    parameters = tuple(
        normal(a.kv_heads, a.head_dim) * 0.1 for _ in range(_PARAMETERS[a.chunk_rule])
    )
    mask = torch.ones(a.batch, a.length, dtype=torch.bool, device=device) if a.key_mask else None
    rows = rows_of(k, mask, None, chunk_size=c)
    settings = AttentionSettings(
        window_size=a.window_size,
        chunk_size=c,
        sink_tokens=-(-a.sink_tokens // c) * c,
        window=a.window,
        causal=a.causal,
        q_offset=0,
        scale=a.head_dim**-0.5,
    )
    pooling: dict[str, Any] = {"rule": a.chunk_rule, "chunk_size": c, "scale": settings.scale}
    columns = launch.reads_bias_columns((q, k, v), settings, rows, a.chunk_rule)
    tokens, pooled = launch_pooling.chunk_tokens_forward(
        k, v, parameters, rows, bias_columns=columns, **pooling
    )
    t = Operands(q=q, k=k, v=v, rfa_k=tokens[0], rfa_v=tokens[1], rfa_bias=tokens[2])
    out, lse = launch.attention_forward(t, rows, settings, pooled)
    launch.attention_backward(dout, out, lse, t, rows, settings, pooled)
    if pooling_alone:
        dk, dv, dbias = (torch.ones_like(x, dtype=torch.float32) for x in tokens)
        launch_pooling.chunk_tokens_backward((dk, dv, dbias), k, v, parameters, rows, **pooling)


# --- measuring ------------------------------------------------------------------------------------


def measure(
    specs: Iterable[KernelSpec],
    target: Target,
    *,
    top: int,
    launches: Callable[[], Launches],
    timer: Callable[[Callable[[], None]], float],
) -> list[Measurement]:
    """Time the best candidates of each kernel and its current schedule, fastest first.

    Args:
        specs: The kernels.
        target: The device.
        top: How many candidates of the cost model to try for each.
        launches: Runs everything and returns what repeats each launch.
        timer: Times a callable [milliseconds].
    """
    trials = [
        (spec, tried, tried == schedule.choose(spec, target))
        for spec in specs
        for tried in _tried(spec, target, top)
    ]
    done = [
        _trial(spec, tried, launches, timer, note="current" if current else "")
        for spec, tried, current in _progress(trials)
    ]
    order = {spec: n for n, spec in enumerate(dict.fromkeys(m.spec for m in done))}
    return sorted(done, key=lambda m: (order[m.spec], m.milliseconds))


def _tried(spec: KernelSpec, target: Target, top: int) -> dict[Schedule, None]:
    others = (converting(spec, tried, target) for tried in candidates(spec, target)[:top])
    special = schedule.specialised(spec, target)  # of which the cost model knows nothing
    return dict.fromkeys((schedule.choose(spec, target), *([special] if special else []), *others))


def _trial(
    spec: KernelSpec,
    tried: Schedule,
    launches: Callable[[], Launches],
    timer: Callable[[Callable[[], None]], float],
    *,
    note: str,
) -> Measurement:
    try:
        with schedule.forced({spec: tried}):
            time = timer(launches()[spec])
    except Exception as error:  # a compiler may give up in many ways: not a reason to stop
        time, note = float("inf"), f"{type(error).__name__}: {error}"[:_LONGEST_REASON]
    return Measurement(spec=spec, schedule=tried, milliseconds=time, note=note)


def _progress(trials: list[Any]) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        return trials
    return tqdm(trials, desc="tune", unit="schedule", file=sys.stderr, disable=None)


def winners(measurements: Iterable[Measurement]) -> dict[KernelSpec, Measurement]:
    """Return the fastest of each kernel; a kernel of which nothing ran is left out."""
    best: dict[KernelSpec, Measurement] = {}
    for found in measurements:
        known = best.get(found.spec)
        if found.milliseconds < (known.milliseconds if known else float("inf")):
            best[found.spec] = found
    return best


def table(measurements: Iterable[Measurement]) -> str:
    """Return measurements as text, one line per schedule."""
    lines = [f"{'kernel':<13}{'ms':>10}   schedule"]
    for found in measurements:
        text = ", ".join(
            f"{field.name}={getattr(found.schedule, field.name)}"
            for field in dataclasses.fields(found.schedule)
            if getattr(found.schedule, field.name) != field.default
        )
        note = f"  ({found.note})" if found.note else ""
        lines.append(f"{found.spec.kind:<13}{found.milliseconds:>10.4f}   {text}{note}")
    return "\n".join(lines) + "\n"


def store(best: dict[KernelSpec, Measurement], device: str, path: Path | None = None) -> Path:
    """Add the winners to the tuned choices, atomically; return the file."""
    path = path or schedule.tuned_path()
    entries = schedule.read_tuned(path)
    chosen = {schedule.spec_key(spec): dataclasses.asdict(m.schedule) for spec, m in best.items()}
    entries[device] = {**entries.get(device, {}), **chosen}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(entries, file, indent=1, sort_keys=True)
    Path(file.name).replace(path)
    schedule.forget()
    return path


# --- command line ---------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flasheva_compile.tune",
        description="Measure schedules of one attention's kernels on this GPU, keep the fastest.",
    )
    number = {"type": int, "metavar": "N"}
    for name in ("heads", "head-dim", "length"):
        parser.add_argument(f"--{name}", required=True, **number)
    parser.add_argument("--kv-heads", help="default: as many as heads", **number)
    parser.add_argument("--value-dim", help="default: the head dimension", **number)
    for name in ("batch", "window-size", "chunk-size", "sink-tokens"):
        default = Attention.__dataclass_fields__[name.replace("-", "_")].default
        parser.add_argument(f"--{name}", default=default, help="default: %(default)s", **number)
    parser.add_argument("--window", choices=("sliding", "block"), default="sliding")
    parser.add_argument("--bidirectional", dest="causal", action="store_false")
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="default: %(default)s")
    parser.add_argument("--chunk-rule", choices=_PARAMETERS, default="mean")
    parser.add_argument("--key-mask", action="store_true", help="with a key mask, as padding has")
    parser.add_argument("--kernels", nargs="+", choices=_TUNED, help="default: all but dpool")
    parser.add_argument(
        "--top", default=6, help="candidates per kernel, default: %(default)s", **number
    )
    parser.add_argument("--dry-run", action="store_true", help="measure and print, store nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune as a command line says; return the exit status."""
    parser = _parser()
    parsed = vars(parser.parse_args(arguments))
    kinds, top, dry = parsed.pop("kernels"), parsed.pop("top"), parsed.pop("dry_run")
    kinds = kinds or [kind for kind in _TUNED if kind != "dpool"]
    parsed["kv_heads"] = parsed["kv_heads"] or parsed["heads"]
    parsed["value_dim"] = parsed["value_dim"] or parsed["head_dim"]
    if parsed["heads"] % parsed["kv_heads"]:
        parser.error("--heads must be a multiple of --kv-heads")
    if parsed["window_size"] % parsed["chunk_size"]:
        parser.error("--window-size must be a multiple of --chunk-size")
    if not torch.cuda.is_available():
        sys.stderr.write("tune: no GPU found; schedules can only be measured on the GPU itself\n")
        return 2
    import triton

    def timer(repeat: Callable[[], None]) -> float:
        time: Any = triton.testing.do_bench(repeat, warmup=10, rep=50, return_mode="median")
        return time

    attention, target = Attention(**parsed), schedule.current_target()

    def launches() -> Launches:
        return launches_of(attention, kinds)

    measured = measure(list(launches()), target, top=top, launches=launches, timer=timer)
    sys.stdout.write(table(measured))
    if not dry:
        path = store(winners(measured), target.device)
        sys.stdout.write(f"stored for {target.device} in {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
