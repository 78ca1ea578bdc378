"""The kernels that a report lists are those that its attentions launch."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from flasheva_compile.lowering import launch
from flasheva_compile.lowering.emit.module import emit
from flasheva_compile.lowering.op import EvaOp
from flasheva_compile.lowering.schedule import choose

import flasheva_compile as fe
from flasheva_compile.errors import ConfigError
from flasheva_compile.kernel_listing import list_kernels
from flasheva_compile.ops import flasheva_attention
from flasheva_compile.report import CompileReport, LayerReport
from tests.models.test_generate import SMALL, llama, tokens
from tests.stand_in_device import stand_in_device

LENGTH = 96
BASE = {
    "window_size": 32,
    "chunk_size": 8,
    "sink_size": 8,
    "window": "sliding",
    "chunk_rule": "tangent",
    "causal": True,
    "scale": 0.25,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "value_dim": 32,
}
CASES = {
    "tangent": {},
    "learned": {"parameters": 1},
    "mean, no sinks": {"chunk_rule": "mean", "sink_size": 0},
    "wide, learned": {"chunk_rule": "evabyte", "parameters": 3, "head_dim": 80, "value_dim": 80},
    "padded": {"has_key_mask": True, "softcap": 20.0},
    "packed": {"has_segments": True},
    "blocks, both ways": {"window": "block", "causal": False, "value_dim": 16},
    "dropout": {"dropout_p": 0.1},
    "retrieval": {"retrieve_chunks": 2, "retrieve_block": 4},
    "beyond kernels": {"head_dim": 320},
}


def launched(op, parameters):
    """Return the specs that the op's forward and backward pass launch, on a GPU that is not one."""
    make = lambda heads, dim: torch.zeros(  # noqa: E731
        1, heads, LENGTH, dim, dtype=torch.bfloat16, requires_grad=True
    )
    q, k = make(op.heads, op.head_dim), make(op.kv_heads, op.head_dim)
    v = make(op.kv_heads, op.value_dim)
    vectors = [torch.zeros(op.kv_heads, op.head_dim) for _ in range(min(2, parameters))]
    vectors += [torch.zeros(op.kv_heads)] if parameters > 2 else []
    masks = {
        "key_mask": torch.ones(1, LENGTH, dtype=torch.bool) if op.has_key_mask else None,
        "segment_ids": torch.zeros(1, LENGTH, dtype=torch.int64) if op.has_segments else None,
    }
    names = ("window_size", "chunk_size", "window", "chunk_rule", "causal", "scale", "softcap")
    options = {name: getattr(op, name) for name in names} | {"sink_tokens": op.sink_size}
    options |= {"dropout_p": op.dropout_p, "retrieve_chunks": op.retrieve_chunks}
    options |= {"retrieve_block": op.retrieve_block}
    with (
        stand_in_device(),
        mock.patch.object(launch, "load", side_effect=launch.load) as loads,
        mock.patch("flasheva_compile.implementations._device_runs_kernels", return_value=True),
    ):
        out, _ = flasheva_attention(q, k, v, parameters=vectors, **masks, **options)
        torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
    return list(dict.fromkeys(call.args[0] for call in loads.call_args_list))


@pytest.mark.parametrize("case", CASES)
def test_what_is_listed_is_what_is_launched(case, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHEVA_CACHE_DIR", str(tmp_path))
    fields = BASE | CASES[case]
    parameters = fields.pop("parameters", 0)
    op = EvaOp(**fields)
    facts = {"training": True, "itemsize": 2, "rule_parameters": parameters}
    report = CompileReport(layers=(LayerReport.rewritten("layers.0.attn", op, **facts),))
    expected = [] if op.head_dim > 256 else launched(op, parameters)
    with mock.patch("flasheva_compile.lowering.offline.resources") as resources:
        resources.return_value = mock.Mock(registers=1, shared=0, stack=0, matrix="")
        listed = list_kernels(report)
    assert [kernel.kind for kernel in listed] == [spec.kind for spec in expected]
    assert [kernel.name for kernel in listed] == [emit(s, choose(s)).name for s in expected]


def test_explain_lists_kernels_with_source_and_resources():
    model = fe.prepare(llama().bfloat16(), SMALL)
    report = fe.explain(model, kernels=True)
    kinds = [kernel.kind for kernel in report.kernels]
    assert kinds == ["chunk_tokens", "forward", "decode", "decode_combine"]
    forward = report.kernels[1]
    assert "def launch(" in forward.source
    assert forward.registers > 16
    assert forward.spilled_bytes == 0
    assert "forward" in str(report)
    assert "no spills" in str(report)
    assert CompileReport.from_dict(report.to_dict()) == report


def test_explain_lists_nothing_unless_asked_and_refuses_unknown_targets():
    model = llama()
    assert fe.explain(model, tokens(1, 20)).kernels == ()
    with pytest.raises(ConfigError, match=r"sm_12.*sm_90"):
        fe.explain(model, tokens(1, 20), kernels="sm_12")
