"""Masks that transformers really builds: captured, proved, compared with the given padding."""

from __future__ import annotations

import pytest
import torch
import torch.fx.traceback as fx_traceback
import transformers as tf
from torch._guards import TracingContext
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from flasheva_compile.masks.emit import emit_key_tensor
from flasheva_compile.masks.prove import MaskProver
from tests.mask_oracle import Recorder

B, S = 2, 16
VOCABULARY = {"vocab_size": 64}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **VOCABULARY,
}
CONFIGS = {
    "llama": lambda: (tf.LlamaForCausalLM, tf.LlamaConfig(**SIZES)),
    "mistral": lambda: (tf.MistralForCausalLM, tf.MistralConfig(**SIZES, sliding_window=8)),
    "gemma3": lambda: (
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig(
            **SIZES,
            head_dim=8,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "gpt2": lambda: (
        tf.GPT2LMHeadModel,
        tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **VOCABULARY),
    ),
    "bert": lambda: (
        tf.BertModel,
        tf.BertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    ),
}
CAUSAL, WINDOW = "causal", "causal+window"
KINDS = {
    "llama": [CAUSAL, CAUSAL],
    "mistral": [WINDOW, WINDOW],
    "gemma3": [WINDOW, CAUSAL],
    "gpt2": [CAUSAL, CAUSAL],
    "bert": ["bidirectional", "bidirectional"],
}


def build(name, implementation):
    torch.manual_seed(0)
    cls, config = CONFIGS[name]()
    config._attn_implementation = implementation
    return cls(config).eval()


def capture(model, inputs, dynamic=False):
    """The pre-dispatch ATen shadow of the one graph of a forward pass, and its real inputs."""
    captured = []

    def backend(gm, example_inputs):
        mode = TracingContext.get().fake_mode
        fakes = [
            mode.from_tensor(e) if isinstance(e, torch.Tensor) and type(e) is not FakeTensor else e
            for e in example_inputs
        ]
        with torch.no_grad(), mode, fx_traceback.preserve_node_meta():
            run = torch.fx.Interpreter(gm).run
            shadow = make_fx(
                run, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True
            )(*fakes)
        shadow.graph.eliminate_dead_code()
        concrete = [int(e) if isinstance(e, torch.SymInt) else e for e in example_inputs]
        captured.append((shadow, concrete))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(**inputs)
    assert len(captured) == 1
    return captured[0]


def attention_masks(shadow):
    """(mask, kind, score shape) of every attention, found from SDPA or from softmax."""
    found = []
    for node in shadow.graph.nodes:
        name = getattr(node.target, "__name__", "").split(".")[0]
        if name == "scaled_dot_product_attention":
            mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
            query, key = (n.meta["val"].shape for n in node.args[:2])
            found.append((mask, (*query[:-1], key[-2])))
        elif name == "softmax":
            scores = node.args[0]
            found.append((scores.args[1], scores.meta["val"].shape))
    # Newer versions of transformers leave the mask to is_causal where nothing is padded.
    if not all(isinstance(m, torch.fx.Node) and dtype_of(m) for m, _ in found):
        pytest.skip(f"transformers {tf.__version__} builds no mask here")
    return [
        (mask, "bool" if dtype_of(mask) == torch.bool else "additive", tuple(shape))
        for mask, shape in found
    ]


def dtype_of(node):
    return getattr(node.meta["val"], "dtype", None)


def predicates(shadow):
    prover = MaskProver()
    return [
        prover.prove(mask, kind=kind, score_shape=shape)
        for mask, kind, shape in attention_masks(shadow)
    ]


def token_inputs(name, padded=False):
    ids = torch.randint(0, 64, (B, S), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if name != "bert":
        inputs["use_cache"] = False
    if padded:
        inputs["attention_mask"] = torch.ones(B, S, dtype=torch.long)
        inputs["attention_mask"][0, :5] = 0
    return inputs


CALLS = {  # implementation, padded, dynamic: every pair once is enough
    "sdpa-full-static": ("sdpa", False, False),
    "eager-full-dynamic": ("eager", False, True),
    "sdpa-padded-dynamic": ("sdpa", True, True),
    "eager-padded-static": ("eager", True, False),
}


@pytest.mark.parametrize(("implementation", "padded", "dynamic"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", CONFIGS)
def test_masks_of_a_forward(name, implementation, padded, dynamic):
    inputs = token_inputs(name, padded)
    shadow, real = capture(build(name, implementation), inputs, dynamic)
    proofs = predicates(shadow)
    suffix = "+key padding" if padded else ""
    assert [p.kind for p in proofs] == [kind + suffix for kind in KINDS[name]]
    for proof in proofs:
        assert not proof.causal or proof.q_offset == 0
        assert proof.window in (None, 7)
        if padded:
            assert_emits(shadow, real, proof, inputs["attention_mask"].bool())


def assert_emits(shadow, real, proof, expected):
    graph = torch.fx.Graph()
    nodes = {name: graph.placeholder(name) for name in proof.nodes}
    graph.output(emit_key_tensor(graph, proof.key_mask, nodes, B, S, device="cpu"))
    recorder = Recorder(shadow)
    with torch.no_grad():
        recorder.run(*real)
    values = [recorder.values[node] for node in proof.nodes.values()]
    assert torch.equal(torch.fx.GraphModule({}, graph)(*values), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_positions(name, implementation):
    inputs = token_inputs(name)
    inputs["position_ids"] = torch.tensor([[*range(6), *range(10)], [*range(9), *range(7)]])
    shadow, _ = capture(build(name, implementation), inputs)
    for proof in predicates(shadow):
        assert str(proof.segments).startswith("cumsum")
        if proof.kind == "unknown":
            # From 5.23 on "causal" is said of positions, which are equal to columns only within
            # a document: not proved, so the attention stays full.
            assert tf.__version__ >= "5.18"
            assert "position" in str(proof.unknown) or "arg" in str(proof.unknown)
        else:
            assert proof.kind == KINDS[name][0] + "+segments"


def with_cache(model, cache, steps):
    """Run all but the last step eagerly; the last is what gets compiled."""
    ids = torch.randint(0, 64, (B, 20), generator=torch.Generator().manual_seed(2))
    done = 0
    for length in steps[:-1]:
        with torch.no_grad():
            model(input_ids=ids[:, done : done + length], past_key_values=cache, use_cache=True)
        done += length
    return {
        "input_ids": ids[:, done : done + steps[-1]],
        "past_key_values": cache,
        "use_cache": True,
    }


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_decode_with_a_growing_cache(implementation, dynamic):
    model = build("llama", implementation)
    inputs = with_cache(model, tf.DynamicCache(config=model.config), [12, 1, 1])
    shadow, _ = capture(model, inputs, dynamic)
    for (_, _, shape), proof in zip(attention_masks(shadow), predicates(shadow), strict=True):
        assert proof.kind == "causal"
        keys = shape[3] if isinstance(shape[3], int) else shape[3].node.expr
        assert proof.q_offset - (keys - 1) == 0


@pytest.mark.parametrize("steps", [[12], [12, 1]], ids=["prefill", "decode"])
def test_static_cache(steps):
    model = build("llama", "sdpa")
    cache = tf.StaticCache(config=model.config, max_cache_len=32)
    shadow, _ = capture(model, with_cache(model, cache, steps))
    for proof in predicates(shadow):
        assert proof.kind == "causal", proof.describe()
