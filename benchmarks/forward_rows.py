"""Forward of dense, padded and bidirectional rows: specialised warps against warps all alike.

Run ``PYTHONPATH=.:benchmarks python benchmarks/forward_rows.py``. Pooling is included, medians of
CUDA graphs; ``difference`` is the largest between the results of both.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from flasheva_compile.lowering import launch, schedule
from records import Results, header
from timing import Effort, measure, side_stream

from flasheva_compile.ops import flasheva_attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

RESULT = Path(__file__).parent / "results" / "forward_rows.json"
HEADS = {64: 32, 128: 16}
FORMS = ("dense", "padded", "bidirectional", "padded bidirectional")
WINDOWS = (("block", 0), ("sliding", 16))
SHAPES = ((4, 1024), (4, 4096), (2, 16384))
IDENTITY = ("head_dim", "form", "window", "batch", "length")
choose = launch.choose


def choose_alike(spec: Any, *_: Any) -> Any:  # noqa: ANN401
    """Choose as for a kernel whose warps all do the same."""
    target = schedule.current_target()
    return schedule.choose_alike(spec, target) if spec.kind == "forward" else choose(spec)


def key_mask(form: str, batch: int, length: int, device: torch.device) -> Tensor | None:
    """Return left padding of an eighth, a third, five tokens and none."""
    if "padded" not in form:
        return None
    starts = torch.tensor([0, length // 8, length // 3, 5][:batch], device=device)
    return torch.arange(length, device=device) >= starts[:, None]


def call(row: dict[str, Any], device: torch.device) -> Callable[[], Tensor]:
    """Return the attention of a row of the results, on random inputs."""
    b, n, d = row["batch"], row["length"], row["head_dim"]
    shape, dtype = (b, HEADS[d], n, d), torch.bfloat16
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in "qkv")
    phi = torch.zeros(HEADS[d], d, device=device, dtype=dtype)
    sinks = dict(WINDOWS)[row["window"]]
    options: dict[str, Any] = {"window_size": 256, "chunk_size": 16, "sink_tokens": sinks}
    options |= {"window": row["window"], "causal": "bidirectional" not in row["form"]}
    mask = key_mask(row["form"], b, n, device)
    masked = {"parameters": [phi], "key_mask": mask, "scale": d**-0.5}
    return lambda: flasheva_attention(q, k, v, **options, **masked)[0]


@torch.no_grad()
def measured(row: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Time both kernels on the same inputs."""
    attend, effort = call(row, device), Effort(measure_ms=20, warmup_ms=5)
    found, results = {}, []
    for name, choice in (("specialised", choose), ("alike", choose_alike)):
        launch.choose = choice
        try:
            results.append(attend().float())
            found[f"{name}_us"] = round(measure([attend], device, effort).ms * 1e3, 1)
        finally:
            launch.choose = choose
    difference = (results[0] - results[1]).abs().max().item()
    ratio = round(found["alike_us"] / found["specialised_us"], 3)
    return {**row, **found, "ratio": ratio, "difference": difference}


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--commit", help="recorded where git cannot say it")
    a = parser.parse_args()
    device = torch.device("cuda:0")
    results = Results(path=a.out, identity=IDENTITY, header=header(device, a.commit))
    with side_stream(device):
        for case in itertools.product(HEADS, FORMS, (w for w, _ in WINDOWS), SHAPES):
            row = dict(zip(IDENTITY, (*case[:3], *case[3]), strict=True))
            results.add(measured(row, device))
            print(json.dumps(results.rows[-1]), flush=True)
    results.write()


if __name__ == "__main__":
    main()
