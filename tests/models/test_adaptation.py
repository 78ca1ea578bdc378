"""Calibration and the choice of full layers: what they measure, set, restore and refuse."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import flasheva_compile as fe
from flasheva_compile.adaptation.calibrate import exact_attention
from flasheva_compile.config import HybridConfig
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation.eva_attention import EvaAttention
from tests.models.test_generate import SMALL, llama, perturb, tokens


def evas(model):
    return [module for module in model.modules() if isinstance(module, EvaAttention)]


def snapshot(model):
    """Everything that an adaptation may leave behind."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(m.training, len(m._forward_pre_hooks)) for m in model.modules()]
    return state, modules, [eva.config for eva in evas(model)]


def expect_same(before, after, *, but=()):
    for name, value in before[0].items():
        if name.split(".")[-1] not in but:
            assert torch.equal(value, after[0][name]), name
    assert list(before[0]) == list(after[0])
    assert before[1:] == after[1:]


def mean_queries(model, batches):
    """Mean query of each kv head's group in each layer of a plain model, by its own modules."""
    attentions = [layer.self_attn for layer in model.model.layers]
    rows = [[] for _ in attentions]
    mask, rope = None, None

    def projected(place):
        def hook(module, args, out):
            query = out.unflatten(-1, (-1, attentions[place].head_dim)).transpose(1, 2)
            query, _ = apply_rotary_pos_emb(query, query, *rope)
            rows[place].append(query.transpose(1, 2)[mask.bool()])  # [tokens, Hq, D]

        return hook

    def remember(module, args, out):
        nonlocal rope
        rope = out

    hooks = [a.q_proj.register_forward_hook(projected(i)) for i, a in enumerate(attentions)]
    hooks.append(model.model.rotary_emb.register_forward_hook(remember))
    with torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    kv_heads = model.config.num_key_value_heads
    return [torch.cat(row).mean(0).unflatten(0, (kv_heads, -1)).mean(1) for row in rows]


def padded_batch():
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[1, :7] = 0
    mask[2, 21:] = 0
    return {"input_ids": tokens(3, 30), "attention_mask": mask}


# --- calibrate ------------------------------------------------------------------------------------


def test_phi_is_the_mean_query_of_full_attention():
    batches = [{"input_ids": tokens(1, 45)}, padded_batch()]
    wanted = mean_queries(llama(), batches)
    model = fe.prepare(llama(), SMALL)
    perturb(model)  # what the parameters were does not matter
    before = snapshot(model)
    report = fe.calibrate(model, [tokens(1, 45), padded_batch()])
    expect_same(before, snapshot(model), but=("phi",))
    for eva, mean, row in zip(evas(model), wanted, report.layers, strict=True):
        torch.testing.assert_close(eva.phi.detach(), mean, rtol=1e-4, atol=1e-5)
        assert row.norm == pytest.approx(float(eva.phi.detach().norm(dim=-1).mean()), rel=1e-5)
    assert [row.path for row in report.calibrated] == [eva.path for eva in evas(model)]
    assert {row.tokens for row in report.layers} == {45 + 30 + 23 + 21}
    assert "2 of 2 attentions set" in str(report)
    json.dumps(report.to_dict())


def test_what_stands_in_the_padding_does_not_matter():
    found = []
    for filler in (0, 50):
        batch = padded_batch()
        batch["input_ids"] = batch["input_ids"].where(batch["attention_mask"].bool(), filler)
        model = fe.prepare(llama(), {"default": SMALL, 0: "full"})
        fe.calibrate(model, [batch])
        found.append(evas(model)[0].phi.detach().clone())
    assert torch.equal(*found)


def test_packed_documents_have_no_padding():
    model = fe.prepare(llama(), SMALL)
    positions = torch.cat([torch.arange(n) for n in (23, 17)])[None]
    report = fe.calibrate(model, [{"input_ids": tokens(1, 40), "position_ids": positions}])
    assert {row.tokens for row in report.layers} == {40}


def test_each_rule_gets_what_it_can_use():
    rules = ("mean", "eva", "evabyte", "tangent")
    layers = {i: {**SMALL, "chunk_rule": rule} for i, rule in enumerate(rules)}
    model = fe.prepare(llama(layers=4), {"default": SMALL, **layers})
    perturb(model)
    before = snapshot(model)
    report = fe.calibrate(model, [tokens(2, 40)])
    expect_same(before, snapshot(model), but=("a", "phi"))
    assert [row.calibrated for row in report.layers] == [False, False, True, True]
    assert all(row.note for row in report.layers[:3])
    scale = model.model.layers[0].self_attn.scaling
    wanted = mean_queries(llama(layers=4), [{"input_ids": tokens(2, 40)}])[2:]
    a, phi = evas(model)[2].a.detach(), evas(model)[3].phi.detach()
    torch.testing.assert_close(a, scale * wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(phi, wanted[1], rtol=1e-4, atol=1e-5)


def test_nothing_to_calibrate_is_said(caplog):
    model = fe.prepare(llama(), {**SMALL, "chunk_rule": "mean"})
    assert not fe.calibrate(model, [tokens(1, 20)]).calibrated
    assert "nothing to calibrate" in caplog.text


def test_compiled_and_training_models_calibrate_the_same():
    wanted = fe.prepare(llama(), SMALL)
    fe.calibrate(wanted, [tokens(1, 40)])
    model = fe.prepare(llama(), SMALL).train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.compile(backend="flasheva", options={"inner_backend": "eager"})
    model(tokens(1, 40), use_cache=False)
    fe.calibrate(model, (ids for ids in [tokens(1, 40)]))
    assert model.training
    for ours, theirs in zip(evas(model), evas(wanted), strict=True):
        assert torch.equal(ours.phi, theirs.phi)


def failing(*_):
    message = "no more"
    raise RuntimeError(message)


def stops_early():
    yield tokens(1, 20)
    failing()


WRONG_BATCHES = {
    "none": ([], "is empty"),
    "a tensor": (tokens(1, 20), "batches: must be an iterable of batches, got Tensor"),
    "a number": (3, "must be an iterable"),
    "short": ([tokens(1, 20), tokens(2, 1)], r"batches\[1\]: must hold at least 2 tokens"),
    "one row": ([tokens(1, 20)[0]], r"must be integers \[B, N\]"),
    "floats": ([torch.rand(1, 20)], "must be integers"),
    "text": (["text"], "must be a tensor of token ids"),
    "no ids": ([{"attention_mask": tokens(1, 20)}], "without input_ids"),
    "mask": ([{"input_ids": tokens(1, 9), "attention_mask": tokens(1, 8)}], "like input_ids"),
    "cache": ([{"input_ids": tokens(1, 9), "past_key_values": 1}], "without past_key_values"),
    "padding": (
        [{"input_ids": tokens(1, 9), "attention_mask": torch.zeros(1, 9)}],
        "no (valid )?token",
    ),
}


@pytest.mark.parametrize(("batches", "message"), WRONG_BATCHES.values(), ids=WRONG_BATCHES)
def test_wrong_batches_change_nothing(batches, message):
    model = fe.prepare(llama(), SMALL)
    before = snapshot(model)
    for adapt in (fe.calibrate, lambda *given: fe.select_full_layers(*given, keep=1)):
        with pytest.raises(ConfigError, match=message):
            adapt(model, batches)
        expect_same(before, snapshot(model))


@pytest.mark.parametrize("training", [False, True])
def test_what_the_model_raises_changes_nothing(training):
    model = fe.prepare(llama(), SMALL).train(training)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no more"):
        fe.calibrate(model, stops_early())
    hook = model.lm_head.register_forward_hook(failing)
    for adapt in (fe.calibrate, lambda *given: fe.select_full_layers(*given, keep=1)):
        with pytest.raises(RuntimeError, match="no more"):
            adapt(model, [tokens(1, 30)])
        expect_same(before, snapshot(model))
    hook.remove()


def test_queries_that_are_not_finite():
    model = fe.prepare(llama(), SMALL)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    before = [eva.phi.clone() for eva in evas(model)]
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn: its queries are not finite"):
        fe.calibrate(model, [tokens(1, 30)])
    assert all(torch.equal(eva.phi, phi) for eva, phi in zip(evas(model), before, strict=True))
    with pytest.raises(ConfigError, match="the loss is nan"):
        fe.select_full_layers(model, [tokens(1, 30)], keep=1)


def test_a_model_that_is_not_prepared():
    with pytest.raises(ConfigError, match="LlamaForCausalLM is not prepared"):
        fe.calibrate(llama(), [tokens(1, 20)])
    with pytest.raises(ConfigError, match="LlamaForCausalLM is not prepared"):
        fe.select_full_layers(llama(), [tokens(1, 20)], keep=1)


# --- select_full_layers ---------------------------------------------------------------------------


def planted(layer):
    """A model in which one attention matters, and text that it predicts well in full."""
    model = llama(layers=4)
    with torch.no_grad():
        for index, block in enumerate(model.model.layers):
            if index != layer:
                block.self_attn.o_proj.weight.mul_(1e-3)
        batch = {"input_ids": tokens(2, 60)}
        batch["labels"] = torch.nn.functional.pad(model(**batch).logits.argmax(-1)[:, :-1], (1, 0))
    return model, batch


def loss_of(model, batch):
    with torch.no_grad():
        return float(model(**batch, use_cache=False).loss)


@pytest.mark.parametrize("mode", ["restore", "replace"])
@pytest.mark.parametrize("layer", [1, 2])
def test_the_layer_that_matters_is_chosen(mode, layer):
    model, batch = planted(layer)
    full = loss_of(model, batch)
    fe.prepare(model, SMALL)
    eva, before = loss_of(model, batch), snapshot(model)
    found = fe.select_full_layers(model, [batch], keep=1, mode=mode)
    expect_same(before, snapshot(model))
    assert found.chosen == (layer,)
    assert found.full_loss == pytest.approx(full, rel=1e-4)
    assert found.eva_loss == pytest.approx(eva, rel=1e-4)
    assert found.tokens == 2 * 59
    assert {p.name: p.indices for p in found.placements} == {
        "selected": (layer,),
        "periodic": (3,),
        "first/last": (0,),
    }
    selected = found.placements[0]
    assert selected.recovered > 0.9
    fe.prepare(model, found.layers)
    assert len(evas(model)) == 3
    assert loss_of(model, batch) == pytest.approx(selected.loss, rel=1e-4)


def test_a_probe_counts_as_much_as_the_text():
    """Layers 1 and 3 matter, each to one set of batches; each wins where only its set is asked."""
    model, batch = planted(1)
    other, probe = planted(3)
    for name, weight in other.named_parameters():
        if ".layers.3." in name:
            model.get_parameter(name).data.copy_(weight)
    with torch.no_grad():
        answers = model(probe["input_ids"]).logits.argmax(-1)
    probe["labels"] = torch.full_like(answers, -100)
    probe["labels"][:, -3:] = answers[:, -4:-1]
    fe.prepare(model, SMALL)
    found = fe.select_full_layers(model, [batch], keep=2, probe=[probe], mode="greedy")
    text, probed = (
        fe.select_full_layers(model, [x], keep=2, mode="greedy") for x in (batch, probe)
    )
    for score, on_text, on_probe in zip(found.scores, text.scores, probed.scores, strict=True):
        assert score.gain == on_text.gain
        assert score.probe_gain == on_probe.gain
    selected, *_ = found.placements
    best = max(
        itertools.combinations(range(4), 2),
        key=lambda full: sum(share(model, x, full) for x in (batch, probe)),
    )
    assert selected.recovered + selected.probe_recovered == pytest.approx(
        sum(share(model, x, best) for x in (batch, probe)), rel=1e-3
    )
    assert "of the probe" in str(found)


def share(model, batch, full):
    """Return the share of the loss that these full layers win back, computed from scratch."""
    exact = [eva for place, eva in enumerate(evas(model)) if place in full]
    losses = []
    for chosen in ([], exact, evas(model)):
        with exact_attention(chosen):
            losses.append(loss_of(model, batch))
    eva, some, best = losses
    return (eva - some) / (eva - best)


def test_layers_that_help_only_together_are_found_one_after_the_other():
    """Of two layers with the same gain alone, the second best beside the first is chosen."""
    model, batch = planted(1)
    fe.prepare(model, SMALL)
    found = fe.select_full_layers(model, [batch], keep=2, mode="greedy")
    first = max(range(4), key=lambda place: found.scores[place].gain)
    second = max(set(range(4)) - {first}, key=lambda place: share(model, batch, (first, place)))
    assert found.chosen == tuple(sorted((first, second)))


def test_all_layers_full_is_the_full_model():
    model = llama(layers=3)
    full = loss_of(model, {"input_ids": tokens(2, 40), "labels": tokens(2, 40)})
    fe.prepare(model, SMALL)
    found = fe.select_full_layers(model, [tokens(2, 40)], keep=3)
    assert {row.loss for row in found.placements} == {found.full_loss}
    assert found.full_loss == pytest.approx(full, rel=1e-4)
    assert found.chosen == (0, 1, 2)


def test_padding_is_not_predicted():
    model = fe.prepare(llama(), SMALL)
    batch = padded_batch()
    found = fe.select_full_layers(model, [batch], keep=1)
    assert found.tokens == 29 + 22 + 20
    batch["input_ids"] = batch["input_ids"].where(batch["attention_mask"].bool(), 50)
    assert fe.select_full_layers(model, [batch], keep=1) == found


def test_what_is_printed_stored_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    model, batch = planted(2)
    found = fe.select_full_layers(fe.prepare(model, SMALL), [batch], keep=2)
    text = str(found)
    for row in ("first/last", "periodic", "selected", "all FlashEVA", "model.layers.3.self_attn"):
        assert row in text
    stored = json.loads(found.to_json())
    assert HybridConfig.from_dict(stored["layers"]) == HybridConfig.from_dict(found.layers)
    found.plot(tmp_path / "layers.svg")
    assert (tmp_path / "layers.svg").stat().st_size > 1000


RULES = {
    "an index from the end": {-2: {**SMALL, "chunk_size": 2}},
    "a path": {"model.layers.2": {**SMALL, "chunk_size": 2}},
    "the path itself": {"model.layers.2.self_attn": {**SMALL, "chunk_size": 2}},
    "a glob": {"model.layers.{1-2}": {**SMALL, "chunk_size": 2}},
    "one is full": {0: "full"},
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_other_rules_of_the_configuration_stay(rules):
    model, batch = planted(2)
    fe.prepare(model, {"default": SMALL, **rules})
    before = {eva.path: eva.config for eva in evas(model)}
    found = fe.select_full_layers(model, [batch], keep=1)
    assert found.chosen == (2,)
    fe.prepare(model, found.layers)
    after = {eva.path: eva.config for eva in evas(model)}
    assert before.pop("model.layers.2.self_attn")
    assert after == before


@pytest.mark.parametrize("keep", [0, 3, True, 1.0, "all"])
def test_keep_out_of_range(keep):
    model = fe.prepare(llama(), SMALL)
    with pytest.raises(ConfigError, match=rf"from 1 to 2, .*, got {keep!r}"):
        fe.select_full_layers(model, [tokens(1, 20)], keep=keep)


def test_an_unknown_mode():
    model = fe.prepare(llama(), SMALL)
    with pytest.raises(ConfigError, match="did you mean"):
        fe.select_full_layers(model, [tokens(1, 20)], keep=1, mode="restored")
