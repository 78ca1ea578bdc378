"""Which rule a layer gets is decided by the module, under every way of compiling."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

import flasheva_compile as fe
from flasheva_compile.backend import reports_of
from tests.models.families import BY_NAME, NanoGPT

SMALL = {"window_size": 8, "chunk_size": 4}
EAGER = {"inner_backend": "eager"}
RULES = {"default": SMALL, 1: {"window_size": 16}, -1: "full"}


def nano(layers=4):
    torch.manual_seed(3)
    return NanoGPT("sdpa", layers).eval()


def tokens(length=40):
    return torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(0))


def compiled_whole(model, layers):
    model.compile(backend="flasheva", options={"layers": layers, **EAGER})
    with torch.no_grad():
        return model(tokens())


def windows(report):
    return {row.path: row.window_size for row in report.layers}


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_layers_marked_full_are_the_inner_compilers_own_result(inner):
    family = BY_NAME["llama"]
    inputs = family.inputs(padded=True)
    with torch.no_grad():
        model = family.build("sdpa").eval()
        model.compile(backend=inner)
        expected = model(**inputs).logits
        torch._dynamo.reset()
        model.compile(backend="flasheva", options={"layers": "full", "inner_backend": inner})
        assert torch.equal(model(**inputs).logits, expected)


def test_a_full_layer_beside_a_rewritten_one_is_untouched():
    family = BY_NAME["llama"]
    inputs = {**family.inputs(padded=False, length=40), "output_hidden_states": True}
    model = family.build("sdpa").eval()
    with torch.no_grad():
        model.compile(backend="aot_eager")
        expected = model(**inputs).hidden_states
        torch._dynamo.reset()
        layers = {"default": SMALL, 0: "full"}
        model.compile(backend="flasheva", options={"layers": layers, "inner_backend": "aot_eager"})
        actual = model(**inputs).hidden_states
    assert torch.equal(actual[1], expected[1])
    assert not torch.allclose(actual[2], expected[2], atol=1e-3)


def test_rules_name_layers_by_index_path_and_glob():
    model = nano()
    layers = {
        "default": SMALL,
        "h.[12].*": {"window_size": 16},
        "h.2": {"window_size": 32},
        -1: "full",
    }
    compiled_whole(model, layers)
    report = fe.explain(model)
    assert windows(report) == {"h.0.attn": 8, "h.1.attn": 16, "h.2.attn": 32, "h.3.attn": None}
    assert [row.reason for row in report.left_full] == ["full by configuration"]


def test_layers_compiled_one_by_one_share_options_but_not_rules():
    """All blocks share one code object: without a guard block 0's graph would serve them all."""
    expected = compiled_whole(nano(), RULES)
    torch._dynamo.reset()
    model = nano()
    for block in model.h:
        block.compile(backend="flasheva", options={"layers": RULES, **EAGER})
    with torch.no_grad():
        assert torch.equal(model(tokens()), expected)
        assert torch.equal(model(tokens()), expected)
    graphs = reports_of(model)
    assert [row.window_size for report in graphs for row in report.layers] == [8, 16, None]


@torch._dynamo.config.patch(recompile_limit=3)
def test_more_rules_than_dynamo_keeps_graphs_are_refused():
    """Beyond its limit Dynamo runs code as it is: layers without a graph would attend fully."""
    model = nano()
    rules = {"default": SMALL, **{n: {"window_size": 8 * (n + 1)} for n in range(len(model.h))}}
    for block in model.h:
        block.compile(backend="flasheva", options={"layers": rules, **EAGER})
    with pytest.raises(fe.ConfigError, match=r"layers: 4 different rules .* keeps 3 graphs"):
        model(tokens())


@torch._dynamo.config.patch(recompile_limit=2)
def test_the_last_graph_that_dynamo_compiles_says_so():
    model = nano()
    model.compile(backend="flasheva", dynamic=False, options={**SMALL, **EAGER})
    with torch.no_grad():
        for length in (16, 20, 24):
            model(tokens()[:, :length])
    first, last = reports_of(model)  # the third length runs uncompiled
    assert not any("recompile_limit" in warning for warning in first.warnings)
    assert any("2 graphs of this function" in warning for warning in last.warnings)


def test_layers_with_equal_rules_share_one_graph():
    model = nano()
    for block in model.h:
        block.compile(backend="flasheva", options={**SMALL, **EAGER})
    with torch.no_grad():
        model(tokens())
    assert len(reports_of(model)) == 1


def test_layers_compiled_with_options_of_their_own():
    expected = compiled_whole(nano(), RULES)
    torch._dynamo.reset()
    model = nano()
    own = [SMALL, {**SMALL, "window_size": 16}, SMALL, {"layers": "full"}]
    for block, options in zip(model.h, own, strict=True):
        block.compile(backend="flasheva", options={**options, **EAGER})
    with torch.no_grad():
        assert torch.equal(model(tokens()), expected)


def test_one_model_compiled_twice_with_different_options():
    model = nano()
    wide = torch.compile(model, backend="flasheva", options={"window_size": 64, **EAGER})
    narrow = torch.compile(model, backend="flasheva", options={**SMALL, **EAGER})
    with torch.no_grad():
        plain = model(tokens())
        for _ in range(2):
            torch.testing.assert_close(wide(tokens()), plain)
            assert not torch.allclose(narrow(tokens()), plain, rtol=1e-2, atol=1e-2)


def test_a_wrapper_around_the_model_does_not_change_its_names():
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model = nano()
    model.compile(
        backend="flasheva", options={"layers": {"default": SMALL, "h.0": "full"}, **EAGER}
    )
    with torch.no_grad():
        Wrapper(model)(tokens())
    assert windows(fe.explain(model))["h.0.attn"] is None


def test_indices_in_a_block_compiled_alone_follow_the_whole_model():
    family = BY_NAME["llama"]
    model = family.build("sdpa").eval()
    for layer in model.model.layers:
        layer.compile(
            backend="flasheva",
            options={"layers": {"default": SMALL, -1: "full"}, "assume_mask": "causal", **EAGER},
        )
    with torch.no_grad():
        model(**family.inputs(padded=False, length=40))
    assert windows(fe.explain(model)) == {
        "model.layers.0.self_attn": 8,
        "model.layers.1.self_attn": None,
    }


def test_a_rule_reaches_an_attention_that_is_compiled_by_itself():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = self.qkv(x)[:, None].chunk(3, -1)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]

    class Stack(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(Attention() for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = Stack()
    for layer in model.layers:
        layer.compile(
            backend="flasheva", options={"layers": {"default": SMALL, -1: "full"}, **EAGER}
        )
    with torch.no_grad():
        model(torch.randn(1, 40, 16))
    assert windows(fe.explain(model)) == {"layers.0": 8, "layers.2": None}


def test_the_state_dict_is_unchanged_by_per_layer_rules():
    model = nano()
    before = set(model.state_dict())
    for block in model.h:
        block.compile(backend="flasheva", options={"layers": RULES, **EAGER})
    with torch.no_grad():
        model(tokens())
    assert set(model.state_dict()) == before


class TestMaskBuffers:
    def test_a_causal_buffer_is_recognised_by_its_data(self):
        model = BY_NAME["nanogpt"].build("eager").eval()
        report = fe.explain(model, tokens(24), options=SMALL)
        assert [row.decision for row in report.layers] == ["eva", "eva"]

    def test_a_buffer_that_is_no_causal_mask_keeps_its_layer_full(self):
        model = BY_NAME["nanogpt"].build("eager").eval()
        model.h[0].attn.bias[..., 5, 9] = 1
        report = fe.explain(model, tokens(24), options=SMALL)
        assert [row.decision for row in report.layers] == ["full", "eva"]
        assert "mask not understood" in report.layers[0].reason

    @pytest.mark.parametrize("replace", [False, True], ids=["written", "replaced"])
    def test_a_buffer_that_changes_later_is_noticed(self, replace):
        model = BY_NAME["nanogpt"].build("eager").eval()
        model.compile(backend="flasheva", options={"window_size": 64, **EAGER})
        with torch.no_grad():
            before = model(tokens(24))
            if replace:
                model.h[0].attn.bias = torch.ones_like(model.h[0].attn.bias)
            else:
                model.h[0].attn.bias.fill_(1)
            assert torch.equal(model(tokens(24)), model._call_impl(tokens(24)))
            model.h[0].attn.bias.copy_(model.h[1].attn.bias)
            assert torch.equal(model(tokens(24)), before)

    def test_the_fallback_is_the_model_as_it_is_under_checkpointing_too(self):
        class Checkpointed(NanoGPT):
            def forward(self, input_ids):
                x = self.wte(input_ids)
                for block in self.h:
                    x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
                return self.head(x)

        torch.manual_seed(0)
        model = Checkpointed("eager")
        model.compile(backend="flasheva", options={"window_size": 64, **EAGER})
        model(tokens(24))
        assert len(fe.explain(model).rewritten) == 2
        for block in model.h:
            block.attn.bias.fill_(1)
        assert torch.equal(model(tokens(24)), model._call_impl(tokens(24)))
