"""Mistakes reach the caller as our own errors, name the culprit, and change nothing."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flasheva_compile as fe
from tests.models.families import BY_NAME, NanoGPT

EAGER = {"inner_backend": "eager"}
TOKENS = torch.arange(3, 43)[None]

MISTAKES = {
    "unknown option": (
        {"windw_size": 64},
        "windw_size: unknown option; known: layers, config, strict, assume_mask, inner_backend, "
        "validate, window_size, chunk_size, sink_tokens, chunk_rule, window, "
        "retrieve_chunks, retrieve_block, retrieve_by. "
        'Hint: did you mean "window_size"?',
    ),
    "window no multiple of chunk": (
        {"window_size": 100},
        "window_size: must be a multiple of chunk_size=16, got 100. Hint: use 96 or 112",
    ),
    "no such index": (
        {"layers": {9: "full"}},
        "layers[9]: matches no attention; known: h.{0-3}.attn. Hint: indices run from -4 to 3",
    ),
    "no such path": (
        {"layers": {"model.h.0": "full"}},
        'layers["model.h.0"]: matches no attention; known: h.{0-3}.attn',
    ),
    "two indices in conflict": (
        {"layers": {3: {"window_size": 32}, -1: "full"}},
        "layers[-1]: conflicts with layers[3]: both name layer 3 of 4 (h.3.attn), with different "
        "values. Hint: keep one of the two",
    ),
    "bad value of a layer": (
        {"layers": {0: {"chunk_rule": "median"}}},
        'layers[0].chunk_rule: must be one of "mean", "tangent", "evabyte", "eva", got \'median\'',
    ),
    "unknown inner backend": (
        {"inner_backend": "tvm"},
        'inner_backend: must be one of "inductor", "aot_eager", "eager", got \'tvm\'',
    ),
}


def nano():
    torch.manual_seed(3)
    return NanoGPT("sdpa", 4).eval()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_option_is_a_config_error_of_the_call(mistake):
    options, message = MISTAKES[mistake]
    model = nano()
    compiled = torch.compile(model, backend="flasheva", options={**EAGER, **options})
    before = {name: id(value) for name, value in vars(model).items()}
    with pytest.raises(fe.ConfigError) as raised:
        compiled(TOKENS)
    assert str(raised.value).startswith(message)
    assert raised.value.hint == message.partition(" Hint: ")[2] or "Hint" not in message
    # Nothing happened to the model: same attributes, and right options work at once.
    assert {name: id(value) for name, value in vars(model).items()} == before
    with torch.no_grad():
        plain = model(TOKENS)
        right = torch.compile(model, backend="flasheva", options={"window_size": 64, **EAGER})
        assert (right(TOKENS) - plain).abs().max() < 1e-4 * plain.abs().max()


def test_mode_and_options_together_are_refused_by_torch():
    with pytest.raises(RuntimeError, match="Either mode or options"):
        torch.compile(nano(), backend="flasheva", mode="reduce-overhead", options=EAGER)


@pytest.mark.parametrize(
    ("asked", "mode", "options"),
    [
        ({"mode": "max-autotune-no-cudagraphs"}, "max-autotune-no-cudagraphs", {}),
        ({"options": {"window_size": 64, "max_autotune": False}}, None, {"max_autotune": False}),
    ],
    ids=["mode", "options"],
)
def test_inductor_gets_its_own_mode_and_options(monkeypatch, asked, mode, options):
    from flasheva_compile import _torch_compat

    seen = []

    def compile_inductor(graph, inputs, mode, options):
        seen.append((mode, options))
        return graph.forward

    monkeypatch.setattr(_torch_compat, "compile_inductor", compile_inductor)
    torch.compile(nano(), backend="flasheva", **asked)(TOKENS)
    assert seen == [(mode, options)]


def test_a_graph_that_cannot_be_traced_is_in_the_report(monkeypatch, caplog):
    def capture(*_):
        raise fe.CaptureError("tracing to ATen failed")

    monkeypatch.setattr("flasheva_compile.analysis.capture", capture)
    torch._dynamo.reset()
    model = nano().eval()
    want = model(TOKENS)
    model.compile(backend="flasheva", options=EAGER)
    torch.testing.assert_close(model(TOKENS), want)
    (warning,) = fe.explain(model).warnings
    assert warning.startswith("graph left as it is: tracing to ATen failed")
    assert warning in caplog.text


def test_strict_names_the_layer_and_the_reason():
    family = BY_NAME["gemma3"]
    # The model's own sliding window is left full by design: strict accepts it.
    model = family.build("sdpa").eval()
    model.compile(backend="flasheva", options={"strict": True, **EAGER})
    model(**family.inputs(padded=False))
    t5 = BY_NAME["t5"]
    model = t5.build("sdpa").eval()
    model.compile(backend="flasheva", options={"strict": True, **EAGER})
    with pytest.raises(fe.PlanError) as raised:
        model(**t5.inputs(padded=False))
    assert str(raised.value).startswith(
        "encoder.block.0.layer.0.SelfAttention: stays full: additive position bias (and "
    )


class OpaqueMask(nn.Module):
    """Attention under a mask that comes from outside."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x, mask):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_an_opaque_mask_is_left_full_unless_it_is_declared():
    model, x = OpaqueMask().eval(), torch.randn(2, 40, 16)
    mask = torch.ones(40, 40).tril().bool()
    report = fe.explain(model, x, mask, options={"window_size": 16})
    assert [row.decision for row in report.layers] == ["full"]
    assert report.layers[0].reason.startswith("mask not understood")
    declared = {"window_size": 16, "chunk_size": 4, "assume_mask": "causal"}
    for given in (mask, torch.zeros(40, 40).masked_fill(~mask, -torch.inf)):
        (row,) = fe.explain(model, x, given, options=declared).layers
        assert (row.decision, row.causal, row.mask) == ("eva", True, "assumed causal")
        (row,) = fe.explain(model, x, given, options={"window_size": 16}).layers
        assert row.reason.startswith("mask not understood")


def test_left_full_is_a_warning_not_a_silence(caplog):
    t5 = BY_NAME["t5"]
    model = t5.build("sdpa").eval()
    model.compile(backend="flasheva", options=EAGER)
    with caplog.at_level("INFO", logger="flasheva_compile"):
        model(**t5.inputs(padded=False))
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    # One warning a graph; older versions of torch break T5 into two.
    left = [re.match(r"(\d) of \1 attentions left full: (en|de)coder.block.0", w) for w in warnings]
    assert sum(int(match[1]) for match in left) == 6
    assert sum(r.levelname == "INFO" for r in caplog.records) == 6


def test_explain_without_anything_to_explain():
    with pytest.raises(fe.ConfigError, match="nothing was compiled"):
        fe.explain(nano())


def test_explain_of_a_compiled_model_runs_nothing_compiled():
    model = nano()
    model.compile(backend="flasheva", options={"layers": "full", **EAGER})
    implementation = model._compiled_call_impl
    report = fe.explain(model, TOKENS, options={"window_size": 16})
    assert len(report.rewritten) == 4
    assert model._compiled_call_impl is implementation
    optimized = torch.compile(nano(), backend="flasheva", options=EAGER)
    assert len(fe.explain(optimized, TOKENS).rewritten) == 4


def test_no_cpp_compiler_falls_back_and_says_so(monkeypatch):
    from flasheva_compile import _torch_compat

    monkeypatch.setattr(_torch_compat, "has_cpp_compiler", lambda: False)
    model = nano()
    model.compile(backend="flasheva", options={"window_size": 64})
    with torch.no_grad():
        assert model(TOKENS).isfinite().all()
    assert fe.explain(model).warnings == (
        "no C++ compiler found: aot_eager instead of Inductor, slower",
    )
