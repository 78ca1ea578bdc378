"""``flex_attention``: a mask_mod says what it means, if the blocks of its block mask follow it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import (
    BlockMask,
    create_block_mask,
    create_mask,
    flex_attention,
)

import flasheva_compile as fe
from tests.models.oracle import assert_as_accurate

LENGTH, BLOCK = 48, 16
WHOLE = {"window_size": 64, "chunk_size": 4, "inner_backend": "eager"}
NARROW = {"window_size": 8, "chunk_size": 4, "inner_backend": "eager"}
DOCUMENTS = torch.tensor([0] * 20 + [3] * 17 + [7] * 11)
OTHERS = torch.tensor([0] * 5 + [3] * 30 + [7] * 13)
UNSORTED = torch.tensor([1] * 20 + [0] * 17 + [1] * 11)


@pytest.fixture(autouse=True)
def _alone():
    torch._dynamo.reset()
    with torch.no_grad():  # PyTorch does not differentiate flex_attention on a CPU
        yield


class Flex(nn.Module):
    """Projections around ``core(q, k, v, *rest)``; 4 heads share 2 of keys and values."""

    def __init__(self, core):
        super().__init__()
        torch.manual_seed(0)
        self.core = core
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x, *rest):
        q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.core(q, k, v, *rest)


def flex(q, k, v, **given):
    return flex_attention(q, k, v, enable_gqa=True, **given)


def causal(b, h, i, j):
    return i >= j


def blocks_of(mask_mod, rows=None, length=LENGTH, **given):
    return create_block_mask(mask_mod, rows, None, length, length, device="cpu", **given)


def of_documents(ids):
    return lambda b, h, i, j: (i >= j) & (ids[i] == ids[j])


def compiled(core, *rest, options=WHOLE):
    """Output in single precision, of the model as it is, the same in double, and the report."""
    model, x = Flex(core), torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(1))
    exact = copy.deepcopy(model).double()(x.double(), *rest)
    ours = torch.compile(model, backend="flasheva", options=options)
    return ours(x, *rest), model(x, *rest), exact, fe.explain(model)


def made_inside(q, k, v):
    return flex(q, k, v, block_mask=blocks_of(causal))


def documents_inside(q, k, v, ids):
    return flex(q, k, v, block_mask=blocks_of(of_documents(ids), BLOCK_SIZE=BLOCK))


def padded_inside(q, k, v, real):
    mask = blocks_of(lambda b, h, i, j: (i >= j) & real[b, j], len(real))
    return flex(q, k, v, block_mask=mask, scale=0.3)


def given_mask(q, k, v, mask):
    return flex(q, k, v, block_mask=mask)


def by_score_mod(q, k, v):
    return flex(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i >= j, s, -math.inf))


def capped(q, k, v, mask):
    return flex(q, k, v, block_mask=mask, score_mod=lambda s, b, h, i, j: 5 * torch.tanh(s / 5))


def alibi(q, k, v, mask):
    return flex(
        q, k, v, block_mask=mask, score_mod=lambda s, b, h, i, j: s + (j - i) * 2.0 ** (-h - 1)
    )


def unmasked(q, k, v):
    return flex(q, k, v)


REAL = torch.ones(2, LENGTH, dtype=torch.bool)
REAL[0, -9:] = False
RIGHT = {
    made_inside: ((), "causal"),
    documents_inside: ((DOCUMENTS,), "causal+segments"),
    padded_inside: ((REAL,), "causal+key padding"),
    given_mask: ((blocks_of(causal, BLOCK_SIZE=BLOCK),), "causal"),
    by_score_mod: ((), "causal"),
    capped: ((blocks_of(causal),), "causal"),
    alibi: ((blocks_of(causal),), "causal+ALiBi"),
    unmasked: ((), "bidirectional"),
}


@pytest.mark.parametrize("core", RIGHT, ids=lambda core: core.__name__)
def test_a_mask_that_is_proved_is_rewritten_exactly(core):
    rest, mask = RIGHT[core]
    ours, theirs, exact, report = compiled(core, *rest)
    (row,) = report.layers
    assert (row.decision, row.mask) == ("eva", mask), row.reason
    assert (row.heads, row.kv_heads) == (4, 2)
    assert_as_accurate(ours, [theirs], exact)


def sliding(q, k, v):
    mask = blocks_of(lambda b, h, i, j: (i >= j) & (i - j < 8))
    return flex(q, k, v, block_mask=mask)


def prefix(q, k, v):
    return flex(q, k, v, block_mask=blocks_of(lambda b, h, i, j: (i >= j) | (j < 4)))


def with_lse(q, k, v):
    out, lse = flex(q, k, v, block_mask=blocks_of(causal), return_lse=True)
    return out * lse[..., None]


def blocks_of_another(q, k, v):
    mask = blocks_of(lambda b, h, i, j: (i >= j) & (i - j < BLOCK), BLOCK_SIZE=BLOCK)
    mask.mask_mod = causal
    return flex(q, k, v, block_mask=mask)


def written_to(q, k, v, mask, ids):
    ids.add_(0)
    return flex(q, k, v, block_mask=mask)


def absolute(q, k, v, mask):
    return flex(q, k, v, block_mask=mask, score_mod=lambda s, b, h, i, j: s.abs())


def several_values(q, k, v):
    def whole(b, h, i, j):
        return torch.stack([i >= j, i == j]).any()

    return flex(q, k, v, block_mask=blocks_of(whole))


def listed_by_hand():
    """Blocks on the diagonal alone, with no mask_mod: block-sparse attention."""
    count = LENGTH // BLOCK
    number = torch.ones(1, 1, count, dtype=torch.int32)
    indices = torch.arange(count, dtype=torch.int32).view(1, 1, count, 1).repeat(1, 1, 1, count)
    return BlockMask.from_kv_blocks(number, indices, BLOCK_SIZE=BLOCK)


WRITTEN = DOCUMENTS.clone()
WRONG = {
    sliding: ((), "sliding window"),
    prefix: ((), "not understood"),
    with_lse: ((), "logsumexp of the scores is also used"),
    blocks_of_another: ((), "not made of its mask_mod alone"),
    written_to: ((blocks_of(of_documents(WRITTEN)), WRITTEN), "reads what is computed"),
    absolute: ((blocks_of(causal),), "between the product and the softmax"),
    several_values: ((), "that is not understood: stack"),
    given_mask: ((listed_by_hand(),), "do not follow its mask_mod"),
    documents_inside: ((UNSORTED,), "not understood"),
}


@pytest.mark.parametrize("core", WRONG, ids=lambda core: core.__name__)
def test_anything_else_stays_full_and_says_why(core):
    rest, reason = WRONG[core]
    ours, theirs, _, report = compiled(core, *rest, options=NARROW)
    (row,) = report.layers
    assert row.decision == "full"
    assert reason in row.reason
    torch.testing.assert_close(ours, theirs)


class TestPremises:
    """What rests on data is looked at again when the data changes."""

    def call(self, core, *rests):
        """Compile for the first arguments; return errors against full attention for all."""
        model, x = Flex(core), torch.randn(2, LENGTH, 32)
        ours = torch.compile(model, backend="flasheva", options=NARROW)
        return [float((ours(x, *rest) - model(x, *rest)).abs().max()) for rest in rests]

    def test_another_block_mask_of_the_same_mask_mod_stays_rewritten(self):
        ids = DOCUMENTS.clone()
        masks = [blocks_of(of_documents(ids), BLOCK_SIZE=BLOCK)]
        rewritten = self.call(given_mask, (masks[0],), (copy.copy(masks[0]),))
        assert min(rewritten) > 1e-3

    def test_blocks_that_leave_out_what_the_mask_mod_shows_are_noticed(self, caplog):
        honest = blocks_of(causal, BLOCK_SIZE=BLOCK)
        sparse = blocks_of(causal, BLOCK_SIZE=BLOCK)
        sparse.kv_num_blocks = sparse.kv_num_blocks.clamp(max=0)
        errors = self.call(given_mask, (honest,), (sparse,), (honest,))
        assert errors[1] == 0.0
        assert min(errors[0], errors[2]) > 1e-3
        assert "no longer true: the blocks of a block mask follow its mask_mod" in caplog.text

    def test_document_ids_that_no_longer_increase_are_noticed(self, caplog):
        errors = self.call(documents_inside, (DOCUMENTS,), (OTHERS,), (UNSORTED,))
        assert min(errors[:2]) > 1e-3
        assert errors[2] == 0.0
        assert "no longer true: the document ids" in caplog.text

    def test_a_tensor_in_the_memory_of_another_is_looked_at(self):
        """Inputs of a training loop come and go at one address, and with one id."""
        model, x = Flex(documents_inside), torch.randn(2, LENGTH, 32)
        ours = torch.compile(model, backend="flasheva", options=NARROW)
        for ids in (DOCUMENTS, UNSORTED, OTHERS, UNSORTED):
            given = ids.clone()
            error = float((ours(x, given) - model(x, given)).abs().max())
            assert (error == 0.0) is (ids is UNSORTED)
            del given


def test_a_mask_made_by_vmap_is_read():
    def core(q, k, v):
        mask = create_mask(causal, None, None, LENGTH, LENGTH, device="cpu")
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    ours, theirs, exact, report = compiled(core)
    assert [row.mask for row in report.rewritten] == ["causal"]
    assert_as_accurate(ours, [theirs], exact)
