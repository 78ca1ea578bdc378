"""The retrieval tier end to end: the backend, prepared models, generation."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel

import flasheva_compile as fe
from flasheva_compile.backend import reports_of
from flasheva_compile.errors import ConfigError, PlanError
from tests.models.families import BY_NAME
from tests.models.oracle import assert_same_to_rounding, in_double, pytorchs_own, run
from tests.models.test_generate import GREEDY, SMALL, generate, llama, tokens

EAGER = {"inner_backend": "aot_eager", "validate": False}
RETRIEVING = {**SMALL, "retrieve_chunks": 2}
EVERYTHING = {**SMALL, "retrieve_chunks": 100}


def compiled(model, **options):
    return torch.compile(model, backend="flasheva", options={**EAGER, **options})


@pytest.mark.parametrize(
    ("name", "padded"), [("llama", False), ("llama", True), ("gpt_neox", True), ("nanogpt", False)]
)
def test_everything_retrieved_is_the_model_as_it_was(name, padded):
    """The second end-to-end oracle, forward and gradients, on models that know nothing of it."""
    family = BY_NAME[name]
    model, inputs = family.build("sdpa").train(), family.inputs(padded=padded)
    exact, theirs = in_double(model, inputs), pytorchs_own(model, inputs)
    model.compile(backend="flasheva", options={**EAGER, **EVERYTHING})
    assert_same_to_rounding(run(model, model, inputs), theirs, exact)
    assert tuple(row.path for row in fe.explain(model).rewritten) == family.rewritten


def test_one_graph_serves_every_length():
    family = BY_NAME["llama"]
    model = family.build("sdpa").eval()
    model.compile(backend="flasheva", dynamic=True, options={**EAGER, **EVERYTHING})
    graphs = []
    for length in (20, 33, 48):
        inputs = family.inputs(padded=True, length=length)
        exact, theirs = in_double(model, inputs), pytorchs_own(model, inputs)
        assert_same_to_rounding(run(model, model, inputs), theirs, exact)
        graphs.append(len(reports_of(model)))
    assert graphs[0] == graphs[-1], "a new length compiled a new graph"


@pytest.mark.parametrize("block", [1, 4])
def test_backend_and_prepared_model_agree(block):
    config, ids = {**RETRIEVING, "retrieve_block": block}, tokens(2, 70)
    by_graph = compiled(llama(), **config, strict=True)(ids).logits
    prepared = fe.prepare(llama(), config)(ids, use_cache=False).logits
    plain = fe.prepare(llama(), SMALL)(ids, use_cache=False).logits
    torch.testing.assert_close(by_graph, prepared, rtol=1e-4, atol=1e-4)
    assert (prepared - plain).abs().max() > 1e-2


def test_the_rule_s_parameters_learn():
    model = fe.prepare(llama(), RETRIEVING)
    model(tokens(2, 70), use_cache=False).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("phi"):
            assert parameter.grad.abs().max() > 0


def test_the_report_says_so():
    report = fe.explain(llama(), tokens(1, 70), options={**EAGER, **RETRIEVING})
    assert "eva 8/4/4 sliding tangent top-2" in str(report)


def test_bidirectional_attention_stays_full_with_the_reason():
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    model = BertModel(config).eval()
    report = fe.explain(model, tokens(1, 40), options={**EAGER, **RETRIEVING})
    assert [row.reason for row in report.unexpected] == ["retrieve_chunks needs causal attention"]
    with pytest.raises(PlanError, match="retrieve_chunks needs causal attention"):
        compiled(model, **RETRIEVING, strict=True)(tokens(1, 40))


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 4])
def test_decoding_from_a_preallocated_cache_is_one_graph(block):
    model = fe.prepare(llama(), {**RETRIEVING, "retrieve_block": block})
    want = torch.stack(generate(model, tokens(1, 21)).logits, 1)
    cache = fe.FlashEvaCache.for_model(model, max_batch_size=1, max_cache_len=64)
    graphs = []

    def count(gm, _):
        graphs.append(gm)
        return gm

    step = torch.compile(model, fullgraph=True, backend=count, dynamic=False)
    with torch.no_grad():
        made = [model(tokens(1, 21), past_key_values=cache).logits[:, -1]]
        for at in range(21, 50):
            position = torch.tensor([[at]])
            token = made[-1].argmax(-1)[:, None]
            made.append(step(token, past_key_values=cache, position_ids=position).logits[:, -1])
    torch.testing.assert_close(torch.stack(made, 1), want, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


def test_generating_with_everything_retrieved_is_the_model_as_it_was():
    model = llama()
    full = generate(model, tokens(1, 21))
    ours = generate(fe.prepare(model, EVERYTHING), tokens(1, 21))
    assert isinstance(ours.past_key_values, fe.FlashEvaCache)
    assert torch.equal(ours.sequences, full.sequences)
    torch.testing.assert_close(
        torch.stack(ours.logits), torch.stack(full.logits), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("use_cache", [True, False])
def test_rule_eva_retrieves_without_a_cache_only(use_cache):
    model = fe.prepare(llama(), {**RETRIEVING, "chunk_rule": "eva"})
    options = {**GREEDY, "max_new_tokens": 3, "use_cache": use_cache}
    if use_cache:
        with pytest.raises(ConfigError, match="has no cache"):
            model.generate(tokens(1, 30), **options)
    else:
        assert model.generate(tokens(1, 30), **options).shape == (1, 33)


def test_the_cache_holds_what_the_report_says():
    config = {**RETRIEVING, "sink_tokens": 0, "window": "block"}
    model = fe.prepare(llama(), config)
    cache = fe.FlashEvaCache.for_model(model, max_batch_size=1, max_cache_len=256)
    told = fe.explain(model).totals(257).cache_bytes
    assert told <= cache.nbytes() <= 1.1 * told
