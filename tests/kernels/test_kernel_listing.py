"""The kernels that a report lists are those that its attentions launch."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from flasheva_compile.lowering import launch, recording
from flasheva_compile.lowering.emit.module import emit
from flasheva_compile.lowering.op import EvaOp
from flasheva_compile.lowering.schedule import choose

import flasheva_compile as fe
from flasheva_compile.errors import ConfigError
from flasheva_compile.kernel_listing import list_kernels
from flasheva_compile.ops import flasheva_attention
from flasheva_compile.report import PREPARED, CompileReport, LayerReport
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
    "eva": {"chunk_rule": "eva"},
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


def test_learned_weights_of_bounds_are_listed_where_they_run():
    model = fe.prepare(llama(), SMALL | {"retrieve_chunks": 2, "retrieve_by": "bounds"})
    assert "weighted" not in str(fe.explain(model))
    eva = model.model.layers[1].self_attn.flasheva
    eva.selector_weight = eva.new_selector_weight(torch.device("cpu"))
    with mock.patch("flasheva_compile.lowering.offline.resources") as resources:
        resources.return_value = mock.Mock(registers=1, shared=0, stack=0, matrix="")
        report = fe.explain(model, kernels=True)
    bounds = {k.layers: k.source for k in report.kernels if k.kind == "chunk_bounds"}
    reads = {layers: "selector_weight_ptr" in source for layers, source in bounds.items()}
    assert reads == {"model.layers.0.self_attn": False, "model.layers.1.self_attn": True}
    assert str(report).count("by weighted bounds") == 1
    assert CompileReport.from_dict(report.to_dict()) == report
    eva.selector_weight = None
    assert not any(row.weighted_bounds for row in fe.explain(model).layers)


@pytest.mark.parametrize("beyond", [{"itemsize": 8}, {"head_dim": 320, "value_dim": 320}])
def test_generation_without_kernels_lists_none(beyond):
    prepared = {"reason": PREPARED, "rule_parameters": 1, "itemsize": 2}
    op = EvaOp(**BASE)
    row = LayerReport.rewritten("layers.0.attn", op, **prepared)
    assert recorded_kinds(row, "sm_90")[-2:] == ["decode", "decode_combine"]
    assert recorded_kinds(dataclasses.replace(row, **beyond), "sm_90") == []


def test_a_model_in_double_precision_runs_no_kernels():
    assert fe.explain(llama().double(), tokens(1, 20), options=SMALL, kernels=True).kernels == ()


def test_the_target_s_memory_decides_what_runs():
    """Sixteen queries of nine heads of 256 numbers in fp32 do not fit into 100 KiB."""
    op = EvaOp(**BASE | {"heads": 16, "head_dim": 256, "value_dim": 256, "retrieve_chunks": 2})
    row = LayerReport.rewritten("layers.0.attn", op, itemsize=4)
    assert recorded_kinds(row, "sm_89") == ["chunk_tokens"]
    assert recorded_kinds(row, "sm_90") == ["chunk_tokens", "select", "forward", "retrieve"]


def test_a_failure_ends_the_collection_of_launches():
    row = LayerReport.rewritten("layers.0.attn", EvaOp(**BASE))
    with (
        mock.patch("flasheva_compile.implementations.pool_and_attend", side_effect=MemoryError),
        pytest.raises(MemoryError),
    ):
        list_kernels(CompileReport(layers=(row,)))
    assert (recording.specs, recording.target) == (None, None)


def recorded_kinds(row, target):
    """Return what a report of one attention lists, without compiling it."""
    with mock.patch("flasheva_compile.lowering.offline.resources") as resources:
        resources.return_value = mock.Mock(registers=1, shared=0, stack=0, matrix="")
        return [kernel.kind for kernel in list_kernels(CompileReport(layers=(row,)), target)]


def test_explain_lists_nothing_unless_asked_and_refuses_unknown_targets():
    model = llama()
    assert fe.explain(model, tokens(1, 20)).kernels == ()
    with pytest.raises(ConfigError, match=r"sm_12.*sm_90"):
        fe.explain(model, tokens(1, 20), kernels="sm_12")
