"""Which calls over fp8 chunk tokens run kernels, by their query heads for each key head."""

from __future__ import annotations

import pytest
import torch

from flasheva_compile import cache_ops
from flasheva_compile.op_checks import OP_VERSION
from tests.kernels.decode_cases import DecodeCase
from tests.kernels.extend_cases import ExtendCase, portions_of


class Launched(Exception):  # noqa: N818 - no error
    """A kernel would run."""


def launched(*_args, **_options):
    raise Launched


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("group", [32, 40])
def test_large_groups_over_fp8_run_the_blocked_code(monkeypatch, group, fp8, tokens):
    """One form of their tiles added values wrongly on a GPU."""
    sizes = {"batch": 1, "kv_heads": 1, "head_dim": 16, "value_dim": 16}
    shape = {"window_size": 8, "chunk_size": 4, "rule": "tangent", "parameter_count": 1}
    case = DecodeCase(
        **sizes, **shape, group=group, fp8_chunks=fp8, prefix=40, steps=3, dtype=torch.float32
    )
    state, parameters = case.filled_state(torch.float32), case.parameters_in(torch.float32)
    calls = ExtendCase(sequence=case, portions=(tokens,) * (case.steps // tokens))
    *qkv, mask = next(iter(portions_of(calls, torch.float32)))
    monkeypatch.setattr(cache_ops, "runs_kernels", lambda *_: True)
    monkeypatch.setattr(cache_ops.launch_decode, "decode", launched)
    monkeypatch.setattr(cache_ops.launch_extend, "decode", launched)

    def step():
        options = {**case.options, "version": OP_VERSION}
        return torch.ops.flasheva.decode(*qkv, parameters, mask, *state, **options)

    if fp8 and group > 32:
        assert step()[0].isfinite().all()
        return
    with pytest.raises(Launched):
        step()
