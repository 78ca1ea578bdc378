"""Recipes: each phase lowers its loss, trains what it says, and goes on where it stopped."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import flasheva_compile as fe
from flasheva_compile import ops
from flasheva_compile.adaptation.calibrate import converted_attentions
from flasheva_compile.adaptation.losses import (
    attention_output_loss,
    language_model_loss,
    logit_loss,
)
from flasheva_compile.adaptation.recipes import Phase
from flasheva_compile.adaptation.train import set_feature_noise
from flasheva_compile.errors import ConfigError
from tests.models.test_generate import SMALL, llama, perturb, tokens

FAST = {"learning_rate": 3e-2, "warmup": 2}
RULES = Phase(name="r", loss="attention_outputs", trains="rules", steps=12, **FAST)
LOGITS = Phase(name="l", loss="logits", trains="attention", steps=6, learning_rate=1e-3, warmup=2)


def prepared():
    model = fe.prepare(llama(), SMALL)
    perturb(model)
    return model


def batches(count=3):
    return [tokens(2, 48, seed=seed) for seed in range(count)]


def run(model, recipe, **options):
    return fe.adapt(model, batches(), recipe, progress=False, **options)


PHASES = [("attention_outputs", "rules")]
PHASES += [
    (loss, x) for loss in ("logits", "language_model") for x in ("rules", "attention", "all")
]


@pytest.mark.parametrize(("loss", "trains"), PHASES)
def test_a_phase_lowers_its_loss_and_trains_what_it_says(loss, trains):
    model = prepared()
    before = copy.deepcopy(model.state_dict())
    rate = 3e-2 if trains == "rules" else 1e-3
    phase = Phase(name="p", loss=loss, trains=trains, steps=24, learning_rate=rate, warmup=2)
    steps = run(model, [phase]).steps
    first, last = (sum(s.loss for s in part) / 3 for part in (steps[:3], steps[-3:]))
    assert last < first
    for name, weight in model.state_dict().items():
        rule, attention = ".flasheva." in name, ".self_attn." in name
        trained = {"rules": rule, "attention": attention, "all": True}[trains]
        assert trained or torch.equal(weight, before[name]), name
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_attention_output_gradients_are_those_of_the_loss():
    """Differentiating layer by layer is differentiating the mean."""
    model, ids = prepared(), tokens(2, 48)
    loss = attention_output_loss(model, {"input_ids": ids})
    phi = model.model.layers[1].self_attn.flasheva.phi
    step = 1e-2 * phi.grad / phi.grad.norm()
    want = float((phi.grad * step).sum())
    with torch.no_grad():
        phi.sub_(step)
        low = attention_output_loss(model, {"input_ids": ids})
        phi.add_(2 * step)
        high = attention_output_loss(model, {"input_ids": ids})
    assert float(loss) == pytest.approx(float(low + high) / 2, rel=1e-2)
    assert float(high - low) / 2 == pytest.approx(want, rel=2e-2)


def test_a_window_over_everything_has_nothing_to_learn():
    model, ids = fe.prepare(llama(), {"window_size": 64, "chunk_size": 4}), tokens(2, 48)
    assert float(attention_output_loss(model, {"input_ids": ids})) < 1e-9
    assert float(logit_loss(model, {"input_ids": ids}, {})) < 1e-6


def test_dropout_does_not_come_between_a_model_and_its_teacher():
    """Exact attention is compared without dropout, and the teacher of logits has none."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 128, "n_positions": 64}
    rates = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.5)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **rates, **ends))
    fe.prepare(model, {"window_size": 64, "chunk_size": 4})
    inputs = {"input_ids": tokens(2, 48)}
    teacher = model.eval()(**inputs).logits.log_softmax(-1)
    assert float(attention_output_loss(model.train(), inputs)) < 1e-9
    torch.manual_seed(1)
    student = model(**inputs, use_cache=False).logits.log_softmax(-1)
    want = (teacher.exp() * (teacher - student)).sum(-1).mean()
    torch.manual_seed(1)
    assert float(logit_loss(model, inputs, {})) == pytest.approx(float(want), rel=1e-4)
    assert all(module.training for module in model.modules())


def test_padding_has_no_loss():
    model, ids = prepared(), tokens(1, 48)
    mask = torch.ones(1, 60, dtype=torch.long)
    mask[:, 48:] = 0
    padded = {"input_ids": torch.cat([ids, tokens(1, 12, seed=9)], 1), "attention_mask": mask}
    want, got = (float(logit_loss(model, x, {})) for x in ({"input_ids": ids}, padded))
    assert got == pytest.approx(want, rel=1e-4)


def test_the_teacher_is_the_model_as_it_was():
    model = prepared()
    with torch.no_grad():
        teacher = llama()(tokens(2, 48)).logits.log_softmax(-1)
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = {"model.layers.0.self_attn.q_proj.weight": weight.detach().clone()}
    with torch.no_grad():
        weight.mul_(1.5)
        student = model(tokens(2, 48), use_cache=False).logits.log_softmax(-1)
        want = (teacher.exp() * (teacher - student)).sum(-1).mean()
        got = logit_loss(model, {"input_ids": tokens(2, 48)}, before)
    assert float(got) == pytest.approx(float(want), rel=1e-4)


def test_weights_that_change_before_or_during_logits_are_kept_for_the_teacher():
    quick = {"learning_rate": 3e-2, "warmup": 0}
    first = Phase(name="a", loss="language_model", trains="attention", steps=6, **quick)
    rules = Phase(name="r", loss="logits", trains="rules", steps=1, learning_rate=1e-9)
    model = prepared()
    steps = fe.adapt(model, [tokens(2, 48)], [first, rules], progress=False).steps
    attentions = {n: p for n, p in llama().named_parameters() if ".self_attn." in n}
    want = logit_loss(model, {"input_ids": tokens(2, 48)}, attentions)
    drifted = logit_loss(model, {"input_ids": tokens(2, 48)}, {})
    assert steps[-1].loss == pytest.approx(float(want), rel=1e-3)
    assert steps[-1].loss != pytest.approx(float(drifted), rel=1e-2)


def test_a_sudden_gradient_is_skipped():
    model, calls = prepared(), []

    def jump(module, args, output):
        calls.append(1)
        return output * (1e3 if len(calls) == 31 else 1)

    phase = Phase(name="l", loss="language_model", trains="attention", steps=32, learning_rate=1e-5)
    handle = model.lm_head.register_forward_hook(jump)
    steps = run(model, [phase]).steps
    handle.remove()
    assert [i for i, step in enumerate(steps) if step.skipped] == [30]


def test_an_interrupted_run_goes_on_to_the_same_losses(tmp_path):
    want = run(prepared(), [RULES, LOGITS]).steps
    model = prepared()
    data = batches()

    class Interrupted(list):
        def __iter__(self):
            for _ in range(3):
                yield from data
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fe.adapt(model, Interrupted(), [RULES, LOGITS], out=tmp_path, save_every=4, progress=False)
    assert not model.training
    resumed = prepared()
    again = run(resumed, [RULES, LOGITS], out=tmp_path, save_every=4).steps
    assert [s.loss for s in again] == pytest.approx([s.loss for s in want], rel=1e-5)
    assert all(p.requires_grad for p in resumed.parameters())
    with pytest.raises(ConfigError, match="another recipe"):
        run(prepared(), [RULES], out=tmp_path)
    other = fe.prepare(llama(), {**SMALL, "window_size": 2 * SMALL["window_size"]})
    with pytest.raises(ConfigError, match="another configuration"):
        run(other, [RULES, LOGITS], out=tmp_path)


@pytest.mark.parametrize("training", [False, True])
def test_a_model_trains_as_before_afterwards(training):
    model = prepared().train(training)
    model.model.layers[0].train(not training)
    before = {module: module.training for module in model.modules()}
    run(model, [LOGITS])
    assert {module: module.training for module in model.modules()} == before


def test_steps_that_are_not_finite_are_skipped():
    model = prepared()
    handle = model.lm_head.register_forward_hook(lambda *_: _[2] * torch.nan)
    before = copy.deepcopy(model.state_dict())
    steps = run(model, [LOGITS]).steps
    handle.remove()
    assert all("nan" in step.skipped for step in steps)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


NOISY = {"loss": "language_model", "trains": "all", "steps": 4, "learning_rate": 1e-3}


def losses(noise, rule="eva", seed=0):
    model = fe.prepare(llama(), {**SMALL, "chunk_rule": rule})
    perturb(model)
    torch.manual_seed(seed)
    found = run(model, [Phase(name="n", warmup=0, feature_noise=noise, **NOISY)])
    assert all(eva.feature_noise == "none" for eva in converted_attentions(model))
    return [step.loss for step in found.steps]


def test_random_features_are_sampled_in_training_alone():
    quiet, clamped, normal = (losses(noise) for noise in ("none", "clamped", "normal"))
    assert len({quiet[0], clamped[0], normal[0]}) == 3
    assert losses("clamped") == clamped
    assert losses("clamped", seed=1) != clamped
    assert losses("normal", rule="tangent") == losses("none", rule="tangent")
    model = fe.prepare(llama(), {**SMALL, "chunk_rule": "eva"}).eval()
    want = model(tokens(2, 48)).logits
    set_feature_noise(model, "normal")
    assert torch.equal(model(tokens(2, 48)).logits, want)
    assert not torch.equal(model.train()(tokens(2, 48)).logits, want)


def test_clamped_noise_is_within_one_of_omega(monkeypatch):
    found = []
    real = ops.eva_features

    def features(q, k, pool, parameters, noise):
        found.extend([] if noise is None else [noise])  # `prepare` looks at the model, too
        return real(q, k, pool, parameters, noise)

    monkeypatch.setattr(ops, "eva_features", features)
    losses("clamped")
    assert len(found) == 4 * 2  # steps, layers
    noise = torch.stack(found)
    assert noise.abs().max() == 1
    assert noise.shape[-2] == 12  # a chunk of 4 tokens each
    assert 0.2 < float((noise.abs() == 1).float().mean()) < 0.45  # 0.317 of a normal distribution


def test_attention_outputs_train_rules_alone():
    with pytest.raises(ConfigError, match="rules' parameters alone"):
        Phase(name="p", loss="attention_outputs", trains="all", steps=1, learning_rate=1.0)


def test_a_model_that_is_not_prepared_is_refused():
    with pytest.raises(ConfigError, match="not prepared"):
        fe.adapt(llama(), batches(), progress=False)


def test_chunk_rules_have_a_learning_rate_of_their_own():
    """Adam's first step is as long as its learning rate wherever there is a gradient."""
    rates = {"learning_rate": 1e-4, "rule_learning_rate": 1e-1, "warmup": 0}
    model = prepared()
    before = copy.deepcopy(model.state_dict())
    run(model, [Phase(name="p", loss="language_model", trains="all", steps=1, **rates)])
    for name, weight in model.state_dict().items():
        longest = float((weight - before[name]).abs().max())
        rate = rates["rule_learning_rate" if ".flasheva." in name else "learning_rate"]
        assert longest == pytest.approx(rate, rel=0.05), name


@pytest.mark.parametrize("loss", ["attention_outputs", "logits", "language_model"])
def test_low_precision_trains_the_same_parameters_nearly_alike(loss):
    trains = "rules" if loss == "attention_outputs" else "all"
    found = []
    for precision in ("fp32", "bf16"):
        model = prepared()
        phase = Phase(
            name="p", loss=loss, trains=trains, steps=8, learning_rate=1e-3, precision=precision
        )
        before = copy.deepcopy(model.state_dict())
        steps = run(model, [phase]).steps
        for name, weight in model.named_parameters():
            trained = trains == "all" or ".flasheva." in name
            assert torch.equal(weight, before[name]) != trained, name
        assert all(step.gradient_norm > 0 and not step.skipped for step in steps)
        assert all(x.dtype == torch.float32 for x in model.parameters())
        found.append(torch.tensor([step.loss for step in steps]))
    bits = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(found[1], found[0], rtol=8 * bits, atol=bits)
    assert not torch.equal(*found)


def test_slices_of_logits_change_no_loss_and_no_gradient(monkeypatch):
    """Slices bound memory; they are recomputed in the backward pass."""
    found = []
    for at_once in (1 << 26, 1 << 8):
        monkeypatch.setattr("flasheva_compile.adaptation.losses._AT_ONCE", at_once)
        for loss in (language_model_loss, lambda *a: logit_loss(*a, {})):
            model = prepared().double()
            value = loss(model, {"input_ids": tokens(2, 48)})
            value.backward()
            gradient = model.model.embed_tokens.weight.grad
            found.append((value.detach(), gradient))
    for whole, sliced in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(sliced, whole)
    logits = prepared().double()
    ids = tokens(2, 48)
    plain = logits(ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(found[0][0].float(), plain.detach().float())
