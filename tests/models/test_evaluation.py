"""Losses by position: those of a direct cross-entropy, in slices or not, padded or not."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional

import flasheva_compile as fe
from flasheva_compile.errors import ConfigError
from flasheva_compile.evaluation.likelihood import candidate_losses, token_losses
from flasheva_compile.evaluation.perplexity import perplexity_by_position
from tests.models.evaluation_models import VOCABULARY, byte_llama
from tests.tolerance import assert_as_accurate_as_pytorch

EVA = {"window_size": 8, "chunk_size": 4, "sink_tokens": 1}


def tokens(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def direct(model, ids):
    """The loss of each predicted token, ``[B, N - 1]``, all at once and in fp64."""
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits.double()
    return functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")


@pytest.mark.parametrize("prepared", [False, True], ids=["full", "prepared"])
def test_bins_hold_the_mean_cross_entropy_of_their_positions(prepared):
    model, batches = byte_llama(), [tokens(2, 40), tokens(1, 24, seed=1)]
    if prepared:
        fe.prepare(model, EVA)
    found = perplexity_by_position(model, batches, edges=(0, 8, 24, 64))
    losses = [direct(model, ids) for ids in batches]
    bins = [(1, 8), (8, 24), (24, 64)]  # nothing predicts the first token
    want = [torch.cat([x[:, a - 1 : b - 1].flatten() for x in losses]) for a, b in bins]
    assert found.tokens == tuple(map(len, want)) == (21, 48, 32)
    assert found.nll == pytest.approx([float(x.mean()) for x in want])
    assert found.loss == pytest.approx(float(torch.cat(want).mean()))
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.edges == (0, 8, 24, 64)


def test_bins_beyond_the_rows_are_dropped_and_what_is_beyond_the_bins_is_kept():
    model = byte_llama()
    assert perplexity_by_position(model, [tokens(1, 9)], edges=(0, 4, 16, 32)).edges == (0, 4, 16)
    beyond = perplexity_by_position(model, [tokens(1, 40)], edges=(0, 4, 16))
    assert (beyond.edges, beyond.tokens) == ((0, 4, 16, 40), (3, 12, 24))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted_and_has_no_position(side):
    model, ids = fe.prepare(byte_llama(), EVA), tokens(1, 30)
    pad = (5, 0) if side == "left" else (0, 5)
    mask = functional.pad(torch.ones_like(ids), pad)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = {
        "input_ids": functional.pad(ids, pad),
        "attention_mask": mask,
        "position_ids": positions,
    }
    found = perplexity_by_position(model, [padded], edges=(0, 8))
    want = perplexity_by_position(model, [ids], edges=(0, 8))
    assert (found.edges, found.tokens) == (want.edges, want.tokens)
    assert found.nll == pytest.approx(want.nll)


def test_labels_say_what_is_predicted():
    model, ids = byte_llama(), tokens(1, 30)
    labels = ids.masked_fill(torch.arange(30) < 20, -100)
    found = perplexity_by_position(model, [{"input_ids": ids, "labels": labels}], edges=(0,))
    assert found.tokens == (10,)
    assert found.loss == pytest.approx(float(direct(model, ids)[:, 19:].mean()))


def test_slices_do_not_change_losses():
    logits = torch.randn(2, 37, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = tokens(2, 37) % 50
    losses = token_losses(logits, targets)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, token_losses(logits, targets, rows_at_once=5))

    def formula(dtype):
        return [functional.cross_entropy(logits.to(dtype).mT, targets, reduction="none")]

    assert_as_accurate_as_pytorch([losses], formula, torch.float32)


def test_logits_are_cast_in_slices(monkeypatch):
    """No fp32 tensor of all positions comes to be."""
    sizes = []
    loss = functional.cross_entropy

    def seen(logits, *args, **options):
        sizes.append(logits.shape[0])
        return loss(logits, *args, **options)

    monkeypatch.setattr(functional, "cross_entropy", seen)
    token_losses(torch.zeros(1, 2500, 3, dtype=torch.bfloat16), torch.zeros(1, 2500).long())
    assert sizes == [1024, 1024, 452]


@pytest.mark.parametrize("prepared", [False, True], ids=["full", "prepared"])
@pytest.mark.parametrize("length", [1, 3])
def test_candidates_have_the_losses_of_whole_sequences(prepared, length):
    """Reading the prompt once is reading it with every candidate."""
    model, ids = byte_llama(), tokens(2, 30)
    if prepared:
        fe.prepare(model, EVA)
    candidates = tokens(8, length, seed=1).view(2, 4, length)
    with torch.no_grad():
        found = candidate_losses(model, ids, candidates)
    for place in range(4):
        whole = torch.cat([ids, candidates[:, place]], 1)
        want = direct(model, whole)[:, -length:].sum(1)
        assert found[:, place].tolist() == pytest.approx(want.tolist(), rel=1e-5)


def test_a_model_keeps_its_mode_and_dtype():
    model = byte_llama().bfloat16().train()
    found = perplexity_by_position(model, [tokens(1, 20)])
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert found == perplexity_by_position(model.eval(), [tokens(1, 20)])


def test_the_report_is_plain_data_and_readable():
    found = perplexity_by_position(byte_llama(), [tokens(1, 20)], edges=(0, 8))
    assert json.loads(json.dumps(found.to_dict()))["loss"] == found.loss
    assert f"{found.perplexity:.3f}" in str(found)
    assert "8-19" in str(found)


@pytest.mark.parametrize(
    ("batches", "edges", "message"),
    [
        ([tokens(1, 8)], (1, 4), "ascend from 0"),
        ([tokens(1, 8)], (0, 4, 4), "ascend from 0"),
        ([tokens(1, 8)], (), "ascend from 0"),
        ([], (0,), "is empty"),
        ([{"input_ids": tokens(1, 8), "labels": tokens(1, 7)}], (0,), "labels must be"),
        ([{"input_ids": tokens(1, 8), "labels": tokens(1, 8) * 0 - 100}], (0,), "predict no token"),
        ([tokens(1, 8) + VOCABULARY], (0,), f"the model has {VOCABULARY} tokens"),
    ],
)
def test_what_cannot_be_measured_is_said(batches, edges, message):
    with pytest.raises(ConfigError, match=message):
        perplexity_by_position(byte_llama(), batches, edges)
