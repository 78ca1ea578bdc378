"""The report: what people read, totals, and JSON."""

import dataclasses
import json

from flasheva_compile.lowering.op import EvaOp

from flasheva_compile.report import CompileReport, LayerReport

SOURCE = "modeling_llama.py:212"
OP = EvaOp(
    window_size=256,
    chunk_size=16,
    sink_size=16,
    window="sliding",
    chunk_rule="tangent",
    causal=True,
    scale=0.125,
    heads=9,
    kv_heads=3,
    head_dim=64,
    value_dim=64,
)
SHAPE = {"causal": True, "heads": 9, "kv_heads": 3, "head_dim": 64, "value_dim": 64}


def eva(path):
    return LayerReport.rewritten(path, OP, mask="causal", source=SOURCE, reason="sdpa")


def full(path, reason="chosen by the user", **changes):
    return LayerReport(path=path, decision="full", reason=reason, **SHAPE | changes)


HYBRID = CompileReport(
    layers=(
        full("model.layers.0.self_attn", mask="causal"),
        *(eva(f"model.layers.{i}.self_attn") for i in range(1, 29)),
        full("model.layers.29.self_attn", mask="causal"),
    ),
    length=8192,
    seconds={"capture": 1.234, "match": 0.1},
    warnings=("a checkpoint's body could not be looked into",),
)

HYBRID_TEXT = """\
FlashEVA: 28 of 30 attentions rewritten

attention                            decision (window/chunk/sinks)  heads/kv x dim  mask
model.layers.{0,29}.self_attn (2x)   full                           9/3 x 64        causal
    left full: chosen by the user
model.layers.{1-28}.self_attn (28x)  eva 256/16/16 sliding tangent  9/3 x 64        causal
    sdpa at modeling_llama.py:212

at N = 8192, one row:
  forward FLOPs  full     2.32 T   as decided      426 G   5.4x less
  KV cache       full    360 MiB   as decided   55.6 MiB   6.5x less

seconds: capture 1.23, match 0.10
warning: a checkpoint's body could not be looked into"""


def test_text():
    assert str(HYBRID) == HYBRID_TEXT


def test_rows_that_share_their_note_show_it_once():
    report = CompileReport(layers=(full("encoder.attn"), full("decoder.attn")))
    assert str(report).count("chosen by the user") == 1


def test_layers_that_differ_are_not_grouped():
    report = CompileReport(layers=(full("h.0.attn"), full("h.1.attn", "returns its weights")))
    assert "h.0.attn   full" in str(report)
    assert "h.1.attn   full" in str(report)


def test_everything_fits_100_columns():
    path = "model.language_model.decoder.block.3.layer.0.a_module_with_a_long_name.SelfAttention"
    report = CompileReport(
        layers=(eva(path), full(path, "a reason of many words " * 12)),
        length=1024,
        seconds={f"stage {number}": 0.5 for number in range(20)},
        warnings=("a warning of many words " * 12,),
    )
    assert max(map(len, str(report).splitlines())) <= 100


def test_a_model_without_attention():
    assert str(CompileReport(length=8)) == "FlashEVA: 0 of 0 attentions rewritten"


def test_json_round_trips():
    assert CompileReport.from_dict(json.loads(HYBRID.to_json())) == HYBRID


def test_totals_add_up():
    totals = HYBRID.totals(8192)
    assert totals.attentions == 30
    # 4 D FLOPs and N (N + 1) / 2 pairs per head
    assert totals.full_flops == 30 * 9 * 4 * 64 * 8192 * 8193 // 2
    assert totals.full_cache_bytes == 30 * 3 * 2 * 64 * 4 * 8192
    two_full, most_eva = HYBRID.left_full, HYBRID.rewritten
    parts = [CompileReport(layers=layers).totals(8192) for layers in (two_full, most_eva)]
    assert totals.flops == sum(part.flops for part in parts)
    assert totals.cache_bytes == sum(part.cache_bytes for part in parts)
    assert parts[0].flops == parts[0].full_flops
    assert parts[1].flops < parts[1].full_flops


def test_an_attention_of_unknown_shape_is_not_counted_and_said_so():
    report = CompileReport(layers=(eva("a"), LayerReport(path="b", decision="full")), length=64)
    assert report.totals(64).attentions == 1
    assert "one row (1 counted)" in str(report)


def test_bidirectional_attention_has_no_cache():
    report = CompileReport(layers=(full("encoder.attn", causal=False),), length=64)
    assert report.totals(64).full_cache_bytes == 0
    assert "KV cache" not in str(report)


def test_retrieval_is_shown_and_counted():
    op = dataclasses.replace(OP, retrieve_chunks=8)
    row = LayerReport.rewritten("model.layers.0.self_attn", op, mask="causal")
    report = CompileReport(layers=(row,), length=8192)
    assert "eva 256/16/16 sliding tangent top-8" in str(report)
    plain = CompileReport(layers=(eva("model.layers.0.self_attn"),)).totals(8192)
    totals = report.totals(8192)
    assert plain.flops < totals.flops < totals.full_flops
    assert totals.cache_bytes > totals.full_cache_bytes > plain.cache_bytes
    assert CompileReport.from_dict(json.loads(report.to_json())) == report
