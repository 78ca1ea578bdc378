"""Training through the backend with an ordinary loop."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import flasheva_compile as fe
from tests.models.families import BY_NAME, VOCABULARY
from tests.models.oracle import WHOLE, assert_same_to_rounding, in_double, pytorchs_own, run

LENGTH = 96


def repeating_text(batch):
    """Rows that repeat a random phrase: only attention can predict the second half."""
    generator = torch.Generator().manual_seed(0)
    phrase = torch.randint(3, VOCABULARY, (batch, LENGTH // 4), generator=generator)
    return phrase.repeat(1, 4)


def test_the_loss_falls():
    model = BY_NAME["llama"].build("sdpa").train()
    compiled = torch.compile(
        model,
        backend="flasheva",
        options={"window_size": 16, "chunk_size": 4, "inner_backend": "aot_eager"},
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids, losses = repeating_text(8), []
    for _ in range(40):
        logits = compiled(input_ids=ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(fe.explain(compiled).rewritten) == 2
    assert losses[-1] < 0.6 * losses[0], losses


def test_dropout_on_the_weights_is_kept():
    """BERT's own dropout stays in force, differs between calls, and is off in evaluation."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=VOCABULARY,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.5,
    )
    model = BertModel(config).train()
    model.compile(
        backend="flasheva",
        options={"window_size": 64, "chunk_size": 8, "inner_backend": "aot_eager"},
    )
    ids = repeating_text(2)[:, :40]
    first, second = (model(ids).last_hidden_state for _ in range(2))
    assert len(fe.explain(model).rewritten) == 1
    assert not torch.allclose(first, second)
    first.sum().backward()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)


def test_gradient_checkpointing_is_seen_through():
    family = BY_NAME["llama"]
    options = {"window_size": 16, "chunk_size": 4, "inner_backend": "aot_eager"}
    ids = repeating_text(2)
    gradients = []
    for checkpointing in (False, True):
        torch._dynamo.reset()
        model = family.build("sdpa").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.compile(backend="flasheva", options=options)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert len(fe.explain(model).rewritten) == 2
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("name", "implementation"), [("llama", "sdpa"), ("llama", "eager"), ("bert", "eager")]
)
def test_a_padding_mask_reaches_checkpointed_layers(name, implementation):
    """The finished mask is built outside of the layers; what it was made from is handed in."""
    family = BY_NAME[name]
    model, inputs = family.build(implementation).train(), family.inputs(padded=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    exact, theirs = in_double(model, inputs), pytorchs_own(model, inputs)
    model.compile(backend="flasheva", options={**WHOLE, "inner_backend": "aot_eager"})
    assert_same_to_rounding(run(model, model, inputs), theirs, exact)
    rows = fe.explain(model).layers
    assert [row.decision for row in rows] == ["eva", "eva"]
    assert all("key padding" in row.mask for row in rows)
