"""Each mask program, proved and compared with the real mask on every (b, h, q, k)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sympy as sp
import torch

from flasheva_compile.masks.prove import MaskProver, prove
from flasheva_compile.site import MaskTerm
from tests.mask_adversaries import ADVERSARIES
from tests.mask_oracle import assert_exact, output_node, prove_program, trace
from tests.mask_programs import (
    FULL,
    MIN,
    PROGRAMS,
    B,
    H,
    K,
    Q,
    hf_eager_with_padding,
    index,
    padding,
)

if TYPE_CHECKING:
    from flasheva_compile.masks.predicate import MaskPredicate


@pytest.mark.parametrize("case", PROGRAMS, ids=lambda p: p.id)
def test_proof_equals_brute_force(case):
    gm, node, predicate = prove_program(case.function, case.inputs, case.shape, case.as_)
    assert predicate.kind == case.kind, predicate.describe()
    assert_exact(gm, node, predicate, case.inputs, case.shape, case.as_)
    assert case.kind in predicate.describe()


@pytest.mark.parametrize("case", ADVERSARIES, ids=lambda p: p.id)
def test_adversary_is_not_proved(case):
    _, _, predicate = prove_program(case.function, case.inputs, case.shape)
    assert predicate.kind == case.kind, predicate.describe()
    assert predicate.unknown or predicate.bias is not None


# ---- what the fields say


def proved(name) -> MaskPredicate:
    case = next(p for p in PROGRAMS if p.id == name)
    return prove_program(case.function, case.inputs, case.shape, case.as_)[2]


@pytest.mark.parametrize(
    ("name", "offset"),
    [
        ("broadcast_le", 0),
        ("lower_right_aligned", 4),
        ("strictly_causal", -1),
        ("dynamic_cache_decode", 15),
        ("static_cache_prefill", 0),
        ("packed_default_positions", 0),
    ],
)
def test_causal_offset(name, offset):
    assert proved(name).q_offset == offset


def test_causal_offset_may_be_a_tensor():
    predicate = proved("static_cache_decode")
    (name,) = predicate.nodes
    assert predicate.q_offset == sp.Function(name, integer=True)()
    assert predicate.nodes[name].op == "placeholder"


@pytest.mark.parametrize(("name", "width"), [("sliding", 3), ("sliding_by_triu", 3)])
def test_window(name, width):
    assert proved(name).window == width


def test_length_of_a_padded_mask():
    assert proved("static_cache_padded_mask").kv_length == (8,)


def test_size_one_query_dimension_is_broadcast_without_score_shape():
    def one_row():
        return (torch.arange(16) <= torch.arange(1) + 5)[None, None, None]

    _, node = trace(one_row, ())
    assert prove(node, kind="bool").kv_length == (6,)
    assert prove(node, kind="bool", score_shape=(B, H, 8, 16)).kv_length == (6,)
    assert prove(node, kind="bool", score_shape=(B, H, 1, 16)).q_offset == 5


def test_terms_combine():
    def bias_and_mask(bias):
        _, q, k = index()
        return bias + 0, torch.where(k <= q, 0.0, MIN)

    _gm, nodes = trace(bias_and_mask, (torch.randn(1, H, Q, K),))
    predicate = MaskProver().prove_terms([MaskTerm(n, "additive") for n in nodes], score_shape=FULL)
    assert predicate.kind == "causal+bias"


def test_one_proof_per_mask():
    _, node = trace(hf_eager_with_padding, (padding(),))
    prover = MaskProver()
    first = prover.prove(node, kind="additive", score_shape=FULL)
    assert prover.prove(node, kind="additive", score_shape=FULL) is first


def test_overwritten_data_is_reported():
    def decode(length):
        _, q, k = index(1, 16, offset=length)
        mask = (k <= q).clone()
        length.add_(1)
        return mask

    gm, _ = trace(decode, (torch.tensor(3),))
    node = output_node(gm)
    predicate = prove(node, kind="bool", score_shape=(B, H, 1, 16))
    assert predicate.kind == "causal"
    assert predicate.overwritten == set(predicate.nodes)


def test_placeholder_of_a_body_continues_in_the_outer_graph():
    _, outer = trace(hf_eager_with_padding, (padding(),))
    body, inner = trace(lambda mask: mask.to(torch.float32) + 0, (torch.zeros(FULL),))
    placeholder = next(n for n in body.graph.nodes if n.op == "placeholder")
    assert prove(inner, kind="additive").kind == "bidirectional+bias"
    bound = MaskProver({placeholder: outer})
    assert bound.prove(inner, kind="additive").kind == "causal+key padding"
