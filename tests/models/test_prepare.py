"""``prepare`` and ``revert``: what they change, refuse and restore."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import CompileConfig

import flasheva_compile as fe
from flasheva_compile.config import EvaConfig, HybridConfig
from flasheva_compile.errors import ConfigError
from tests.models.test_generate import GREEDY, SMALL, generate, llama, perturb, tokens


def test_reverting_restores_the_model():
    model = llama()
    before, keys, config = model(tokens(1, 30)).logits, list(model.state_dict()), model.config
    as_it_was = config.to_dict()
    fe.prepare(model, SMALL)
    assert list(model.state_dict()) != keys
    assert fe.revert(model) is model
    assert torch.equal(model(tokens(1, 30)).logits, before)
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == as_it_was
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert "_prepare_cache_for_generation" not in vars(model)
    with pytest.raises(ConfigError, match="not prepared"):
        fe.revert(model)


def test_preparing_twice_is_preparing_once():
    model = fe.prepare(llama(), SMALL)
    attention = model.model.layers[0].self_attn.flasheva
    assert fe.prepare(model, EvaConfig(**SMALL)) is model
    assert fe.prepare(model, HybridConfig.from_dict({"default": SMALL})) is model
    assert model.model.layers[0].self_attn.flasheva is attention
    assert len(model.model.layers[0].self_attn._forward_pre_hooks) == 1


def test_another_configuration_replaces_the_first():
    model = fe.prepare(llama(), SMALL)
    fe.prepare(model, {"default": SMALL, 0: "full"})
    assert not hasattr(model.model.layers[0].self_attn, "flasheva")
    assert model.model.layers[1].self_attn.flasheva.config == EvaConfig(**SMALL)


@pytest.mark.parametrize("layers", [SMALL, {"default": SMALL, 0: "full"}], ids=["all", "hybrid"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_weights_are_refused_and_not_left_out(layers, implementation):
    """transformers would return an empty tuple, or one of the full layers' weights alone."""
    model, ids = llama(), tokens(1, 12)
    model.set_attn_implementation(implementation)
    fe.prepare(model, layers)
    cache = fe.FlashEvaCache.for_model(model)
    out = model(ids, past_key_values=cache)
    for inner in (model, model.model):
        with pytest.raises(ConfigError, match=r"output_attentions: .* none.* revert"):
            inner(ids[:, :2], past_key_values=cache, output_attentions=True)
    model.generation_config.output_attentions = True
    with pytest.raises(ConfigError, match="output_attentions"):
        model.generate(ids, return_dict_in_generate=True, max_new_tokens=2, **GREEDY)
    assert cache.get_seq_length() == 12  # a refused call has stored nothing
    assert torch.equal(model(ids, output_attentions=False).logits, out.logits)
    model.set_attn_implementation("eager")
    weights = model(ids, output_attentions=True).attentions
    assert [w.shape for w in weights] == [(1, 4, 12, 12)] * len(model.model.layers)
    model.set_attn_implementation("eva")
    fe.revert(model)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_configuration_that_asks_for_weights_is_refused():
    model = llama()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ConfigError, match="output_attentions: "):
        fe.prepare(model, SMALL)
    assert len(model(tokens(1, 9)).attentions) == len(model.model.layers)


def test_a_compiled_model_refuses_weights_too():
    model = fe.prepare(llama(), SMALL)
    model.compile(backend="flasheva", options={"inner_backend": "eager"})
    with pytest.raises(ConfigError, match="output_attentions: "):
        model(tokens(1, 12), output_attentions=True)


def test_parameters_train():
    model = fe.prepare(llama(), SMALL).train()
    ids = tokens(2, 40)
    model(ids, labels=ids).loss.backward()
    phi = model.model.layers[0].self_attn.flasheva.phi
    assert phi.grad is not None
    assert phi.grad.abs().max() > 0
    assert "model.layers.0.self_attn.flasheva.phi" in model.state_dict()


def gradients(model, step=None):
    ids = tokens(2, 40)
    call = model if step is None else step
    loss = call(ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("how", ["checkpointing", "backend", "backend and checkpointing"])
def test_gradients_are_those_of_plain_training(how):
    model = fe.prepare(llama(), {"default": SMALL, 1: "full"}).train()
    perturb(model)
    want, step = gradients(model), None
    assert "model.layers.0.self_attn.flasheva.phi" in want
    if "checkpointing" in how:
        model.gradient_checkpointing_enable()
    if "backend" in how:
        step = torch.compile(model, backend="flasheva", options={"inner_backend": "aot_eager"})
    got = gradients(model, step)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4)


def test_autocast():
    model = fe.prepare(llama(), SMALL)
    want = model(tokens(1, 40), use_cache=False).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = generate(model, tokens(1, 21), steps=5)
        got = model(tokens(1, 40), use_cache=False).logits
    assert result.sequences.shape == (1, 26)
    assert (got.float() - want).abs().max() < 0.1 * want.abs().max()


def test_a_copy_is_independent():
    model = fe.prepare(llama(), SMALL)
    twin = copy.deepcopy(model)
    want = generate(model, tokens(1, 21)).sequences
    fe.revert(model)
    assert torch.equal(generate(twin, tokens(1, 21)).sequences, want)
    fe.revert(twin)
    assert torch.equal(twin(tokens(1, 30)).logits, model(tokens(1, 30)).logits)


def test_packed_documents_are_documents_alone():
    model = fe.prepare(llama(), {"default": SMALL, 1: "full"})
    ids, lengths = tokens(1, 40), (23, 17)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_the_report_names_what_stays_full():
    model = fe.prepare(llama(), {"default": SMALL, 0: "full"})
    report = fe.explain(model)
    assert [row.decision for row in report.layers] == ["full", "eva"]
    assert "configuration" in report.layers[0].reason
    assert report.layers[1].window_size == 8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"window_size": 10, "chunk_size": 4}, "multiple of chunk_size"),
        ({"default": SMALL, 7: "full"}, r"layers\[7\]"),
        ({"default": "full"}, "no attention of LlamaForCausalLM can be converted"),
        (3, "must be a HybridConfig"),
    ],
)
def test_wrong_configurations_change_nothing(config, message):
    model = llama()
    before = model(tokens(1, 30)).logits
    with pytest.raises(ConfigError, match=message):
        fe.prepare(model, config)
    assert torch.equal(model(tokens(1, 30)).logits, before)
    assert not hasattr(model.config, "flasheva")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"default": SMALL, 7: "full"}, r"layers\[7\]"),
        ({"default": "full"}, "no attention of LlamaForCausalLM can be converted"),
        ({"default": SMALL, 0: {"attention": "full", "kv": "tc-2bit"}}, "no multiple of 16"),
    ],
)
def test_wrong_configurations_leave_a_prepared_model_what_it_has_learned(config, message):
    model = fe.prepare(llama(), SMALL)
    evas = [layer.self_attn.flasheva for layer in model.model.layers]
    with torch.no_grad():
        evas[1].phi.normal_()
    before, saved = model(tokens(1, 30)).logits, model.config.flasheva
    with pytest.raises(ConfigError, match=message):
        fe.prepare(model, config)
    assert all(x.self_attn.flasheva is y for x, y in zip(model.model.layers, evas, strict=True))
    assert torch.equal(model(tokens(1, 30)).logits, before)
    assert model.config.flasheva == saved
    assert isinstance(generate(model, tokens(1, 30)).past_key_values, fe.FlashEvaCache)


def test_other_modules_are_refused():
    with pytest.raises(ConfigError, match="not a model of transformers"):
        fe.prepare(nn.Linear(2, 2), SMALL)


def test_the_report_counts_every_layer():
    model = fe.prepare(llama().bfloat16(), {"default": SMALL, 0: "full"})
    totals = fe.explain(model).totals(64)
    assert totals.attentions == 2
    assert totals.full_cache_bytes == 2 * 2 * 64 * 2 * 8 * 2


def test_the_report_counts_layers_in_few_bits_as_they_are_stored():
    """All but the first 16 and the last 128 to 255 tokens; codebooks are not counted."""
    kinds = {0: "vq-1bit", 1: "fp8"}
    layers = {index: {"attention": "full", "kv": kv} for index, kv in kinds.items()}
    model = fe.prepare(llama(layers=3), {"default": SMALL, **layers})
    totals = [fe.explain(model).totals(length) for length in (144, 1000)]
    fe.prepare(model, {"default": SMALL, 0: "full", 1: "full"})
    plain = [fe.explain(model).totals(length) for length in (144, 1000)]
    assert totals[0] == plain[0]
    coded = (1000 - 144) // 128 * 128
    saved = sum(coded * 2 * (2 * 8 * 4 - stored) for stored in (2, 2 * 8 + 2))
    assert plain[1].cache_bytes - totals[1].cache_bytes == saved
    assert plain[1].full_cache_bytes == totals[1].full_cache_bytes


def test_a_call_that_fails_half_way_leaves_nothing_behind():
    model = fe.prepare(llama(), SMALL)
    want = model(tokens(1, 30), use_cache=False).logits
    cache = fe.FlashEvaCache.for_model(model)
    model(tokens(1, 12, seed=5), past_key_values=cache)

    def fail(*_):
        raise torch.OutOfMemoryError("x")

    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        model(tokens(1, 1), past_key_values=cache)
    handle.remove()
    assert torch.equal(model(tokens(1, 30), use_cache=False).logits, want)


# --- compiled -------------------------------------------------------------------------------------


class Counter:
    """A backend that counts graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def test_a_preallocated_cache_compiles_once():
    model = fe.prepare(llama(), SMALL)
    counter = Counter()
    step = torch.compile(model.forward, backend=counter, fullgraph=True)
    cache = fe.FlashEvaCache.for_model(model, max_batch_size=1, max_cache_len=64)
    with torch.no_grad():
        for length in (21, 9):
            cache.reset()
            model(tokens(1, length), past_key_values=cache)
            for seed in range(12):
                step(tokens(1, 1, seed=seed), past_key_values=cache, use_cache=True)
    assert counter.graphs == 1


def test_a_growing_cache_does_not_compile_every_step():
    model = fe.prepare(llama(), SMALL)
    want = generate(model, tokens(1, 21)).sequences
    counter = Counter()
    model.compile(backend=counter)
    assert torch.equal(generate(model, tokens(1, 21)).sequences, want)
    first = counter.graphs
    for length in (9, 13, 30):
        generate(model, tokens(1, length))
    assert first <= 3
    assert counter.graphs <= 4


@pytest.mark.parametrize("implementation", [None, "static"])
def test_the_backend_keeps_what_prepare_decided(implementation):
    """The full layer of a prepared model is not rewritten with the backend's defaults."""
    model = fe.prepare(llama(), {"default": SMALL, 1: "full"})
    options = {"cache_implementation": implementation}
    want = generate(model, tokens(1, 21), **options)
    model.compile(backend="flasheva", options={"inner_backend": "eager"})
    got = generate(model, tokens(1, 21), **options)
    assert torch.equal(want.sequences, got.sequences)
    long = tokens(1, 290)  # beyond the default window
    compiled = model(long, use_cache=False).logits
    model._compiled_call_impl = None
    torch.testing.assert_close(compiled, model(long, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_the_backend_refuses_a_second_configuration():
    model = fe.prepare(llama(), SMALL)
    model.compile(backend="flasheva", options={"inner_backend": "eager", "window_size": 16})
    with pytest.raises(ConfigError, match="the model is prepared"):
        model(tokens(1, 21))


def test_compiled_generation_with_inductor():
    model = fe.prepare(llama(), SMALL)
    want = generate(model, tokens(1, 21)).sequences
    model.compile(backend="flasheva")
    got = model.generate(tokens(1, 21), max_new_tokens=30, cache_implementation="static", **GREEDY)
    assert torch.equal(got, want)


# --- models that are not prepared -----------------------------------------------------------------


@pytest.mark.parametrize("implementation", [None, "static"])
def test_prefill_and_decoding_agree_without_prepare(implementation):
    """Over a growing cache both are FlashEVA, over a preallocated one both stay full."""
    options = {"cache_implementation": implementation}
    reference = llama() if implementation else fe.prepare(llama(), SMALL)
    want = generate(reference, tokens(1, 21), **options)
    model = llama()
    model.compile(backend="flasheva", options={"inner_backend": "eager", **SMALL})
    got = generate(model, tokens(1, 21), **options)
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-4
    )
    reasons = {row.reason for row in fe.explain(model).layers if row.decision == "full"}
    assert any("preallocated cache" in reason for reason in reasons) == bool(implementation)


@pytest.mark.parametrize("prepared", [True, False])
def test_compiling_decoding_alone(prepared):
    """``compile_config`` leaves prefill eager: a prepared model is FlashEVA there, too."""
    build = (lambda: fe.prepare(llama(), SMALL)) if prepared else llama
    want = generate(build(), tokens(1, 21), cache_implementation="static").sequences
    options = {"inner_backend": "eager", **({} if prepared else SMALL)}
    how = CompileConfig(backend="flasheva", mode=None, options=options)
    how._compile_all_devices = True
    got = generate(build(), tokens(1, 21), cache_implementation="static", compile_config=how)
    assert torch.equal(got.sequences, want)
