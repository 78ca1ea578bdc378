"""The registered ops: registration, gradients, precisions, edges, compile, dropout, complaints."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flasheva_compile.kernels.blocked import block
from flasheva_compile.kernels.blocked.dropout import keep_mask
from flasheva_compile.kernels.reference.attention import eva_attention
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.nn import functional

from flasheva_compile import implementations
from flasheva_compile.errors import LoweringError
from flasheva_compile.ops import OP_VERSION, eva_features, flasheva_attention
from tests.attention_cases import MASKS, RULES, AttentionCase
from tests.tolerance import assert_as_accurate_as_pytorch

CASE = AttentionCase()
OPTIONS = {
    "window_size": 8,
    "chunk_size": 4,
    "sink_tokens": 3,
    "window": "sliding",
    "causal": True,
    "q_offset": 0,
    "scale": 0.3,
    "softcap": 0.0,
    "dropout_p": 0.0,
    "version": OP_VERSION,
}


def chunk_options(rule: str) -> dict[str, object]:
    return {"rule": rule, "chunk_size": 4, "scale": 0.3, "version": OP_VERSION}


def leaves(case: AttentionCase) -> list[torch.Tensor]:
    return [x.requires_grad_() for x in (*case.qkv, *case.parameters)]


@pytest.mark.parametrize("rule", RULES)
def test_chunk_tokens_passes_opcheck(rule):
    case = dataclasses.replace(CASE, rule=rule, mask="left_padding")
    _, k, v, *parameters = leaves(case)
    if rule == "eva":
        parameters = [case._normal(i, 2, 2, 6, 8).requires_grad_() for i in (30, 31)]
    inputs = (k, v, parameters, case.masks["key_mask"], None)
    opcheck(torch.ops.flasheva.chunk_tokens.default, inputs, chunk_options(rule))


@pytest.mark.parametrize("mask", ["none", "segments_with_holes"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_attention_passes_opcheck(mask, dropout_p):
    case = dataclasses.replace(CASE, mask=mask)
    q, k, v = (x.requires_grad_() for x in case.qkv)
    shapes = ((2, 2, 6, 8), (2, 2, 6, 6), (2, 2, 6))
    rfa = [case._normal(30 + i, *shape).requires_grad_() for i, shape in enumerate(shapes)]
    optional = (*case.masks.values(), torch.ones(4).double() / 8, torch.tensor([5]))
    options = {**OPTIONS, "dropout_p": dropout_p, "softcap": 2.0}
    opcheck(torch.ops.flasheva.attention.default, (q, k, v, *rfa, *optional), options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_are_those_of_the_reference(rule, mask):
    case = dataclasses.replace(CASE, rule=rule, mask=mask, softcap=2.0, alibi=True)
    assert_as_accurate_as_pytorch(case.op(torch.float64), case.reference, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("causal", [True, False])
def test_low_precision_loses_no_more_than_pytorch(dtype, rule, causal):
    case = dataclasses.replace(
        CASE, rule=rule, causal=causal, queries=150, keys=150, head_dim=32, window_size=32
    )
    actual = case.op(dtype)
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.float32
    assert_as_accurate_as_pytorch(actual, case.reference, dtype)


@pytest.mark.parametrize("rule", ["mean", "tangent", "evabyte"])
@pytest.mark.parametrize(
    ("queries", "keys"), [(0, 5), (0, 0), (3, 0), (1, 1), (3, 3), (5, 21), (9, 4), (200, 200)]
)
def test_edge_shapes(rule, queries, keys):
    offset = keys - queries if queries != 200 else 0
    case = dataclasses.replace(CASE, rule=rule, queries=queries, keys=keys, q_offset=offset)
    assert_as_accurate_as_pytorch(case.op(torch.float64), case.reference, torch.float64)


def test_more_queries_than_keys_from_the_top_left():
    case = dataclasses.replace(CASE, queries=70, keys=20)
    assert_as_accurate_as_pytorch(case.op(torch.float64), case.reference, torch.float64)


def test_inputs_need_not_be_contiguous():
    def transposed(q, k, v, **options):
        strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        return flasheva_attention(*strided, **options)

    assert_as_accurate_as_pytorch(
        CASE.run(transposed, torch.float64), CASE.reference, torch.float64
    )


def test_lse_is_not_differentiable():
    q, k, v = (x.clone().requires_grad_() for x in CASE.qkv)
    out, lse = flasheva_attention(q, k, v, **CASE.options)
    assert out.requires_grad
    assert not lse.requires_grad


def test_eva_noise_is_added_as_it_is():
    case = dataclasses.replace(CASE, rule="eva")
    noise = 3 * case._normal(50, 2, 2, 6, 8)
    actual = case.op(torch.float64, noise=noise)

    def formula(dtype):
        return case.run(lambda *a, **o: eva_attention(*a, **o, noise=noise.to(dtype)), dtype)

    assert_as_accurate_as_pytorch(actual, formula, torch.float64)


def test_results_repeat_bit_for_bit():
    case = dataclasses.replace(CASE, queries=300, keys=300, mask="left_padding")
    first, second = case.op(torch.float32), case.op(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_are_left_alone():
    before = [x.clone() for x in CASE.qkv]
    CASE.op(torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(before, CASE.qkv, strict=True))


@pytest.mark.parametrize("rule", ["tangent", "eva"])
def test_compiles_without_graph_breaks_for_any_length(rule):
    graphs = []

    def count(gm, _):
        graphs.append(gm)
        return gm

    torch.compiler.reset()
    backends = (count, "aot_eager")
    for backend in backends:
        compiled = torch.compile(flasheva_attention, fullgraph=True, dynamic=True, backend=backend)
        for length in (21, 32, 55):
            case = dataclasses.replace(CASE, queries=length, keys=length, rule=rule)
            actual = case.run(compiled, torch.float64)
            assert_as_accurate_as_pytorch(actual, case.reference, torch.float64)
    assert len(graphs) == 1


def test_compiles_with_inductor():
    torch.compiler.reset()
    compiled = torch.compile(flasheva_attention, fullgraph=True)
    assert_as_accurate_as_pytorch(CASE.run(compiled, torch.float32), CASE.reference, torch.float32)


# --- dropout --------------------------------------------------------------------------------------


def ids(n: int) -> torch.Tensor:
    return torch.arange(n)


def test_dropout_drops_the_right_share_independently_everywhere():
    keep = keep_mask(torch.tensor([7]), ids(4), ids(4), ids(64), ids(256)[None], 0.3)
    count = keep.numel()
    deviation = (0.3 * 0.7 / count) ** 0.5
    assert abs(keep.double().mean().item() - 0.7) < 4 * deviation
    other = keep_mask(torch.tensor([8]), ids(4), ids(4), ids(64), ids(256)[None], 0.3)
    for shifted in (other, *(keep.roll(1, axis) for axis in range(4))):
        agreement = (keep == shifted).double().mean().item()
        expected = 0.7**2 + 0.3**2
        assert abs(agreement - expected) < 6 * (expected * (1 - expected) / count) ** 0.5


def test_dropout_does_not_depend_on_where_a_weight_is_computed():
    whole = keep_mask(torch.tensor([7]), ids(4), ids(4), ids(8), ids(32)[None], 0.5)
    part = keep_mask(torch.tensor([7]), ids(4)[2:], ids(4)[1:], ids(8)[3:], ids(32)[None, 9:], 0.5)
    assert torch.equal(whole[2:, 1:, 3:, 9:], part)


@pytest.mark.parametrize("mask", ["none", "left_padding", "segments"])
def test_backward_regenerates_the_dropout_mask_of_forward(mask):
    """Values enter linearly: out = W(seed) v, so both passes can be read off W."""
    case = dataclasses.replace(CASE, rule="mean", mask=mask)
    q, k, v = case.qkv
    v = torch.eye(case.keys).double().expand(2, 2, -1, -1).clone().requires_grad_()
    options = {**case.options, "dropout_p": 0.4, "dropout_seed": torch.tensor([3])}
    weights, lse = flasheva_attention(q, k, v, **options)
    plain, plain_lse = flasheva_attention(q, k, v, **{**options, "dropout_p": 0.0})
    assert torch.equal(lse, plain_lse)
    assert ((weights == 0) & (plain > 0)).any()
    dout = case._normal(40, *weights.shape)
    (dv,) = torch.autograd.grad(weights, v, dout)

    def transpose(dtype):
        grouped = (weights.mT @ dout).unflatten(1, (2, 2)).sum(2)
        return [grouped.detach().to(dtype)]

    assert_as_accurate_as_pytorch([dv], lambda dtype: transpose(dtype), torch.float64)


def test_dropout_gradients_are_those_of_the_forward():
    case = AttentionCase(batch=1, kv_heads=1, queries=9, keys=9, window_size=4, chunk_size=2)

    def dropped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        options = {**case.options, "dropout_p": 0.4, "dropout_seed": torch.tensor([3])}
        return flasheva_attention(q, k, v, **options)[0]

    assert torch.autograd.gradcheck(dropped, tuple(x.requires_grad_() for x in case.qkv))


def test_dropout_does_not_depend_on_how_rows_are_grouped(monkeypatch):
    options = {**CASE.options, "dropout_p": 0.4, "dropout_seed": torch.tensor([3])}
    together = flasheva_attention(*CASE.qkv, **options)[0]
    monkeypatch.setattr(block, "_ROW_BUDGET", 1)

    def one_by_one(dtype):
        return [flasheva_attention(*(x.to(dtype) for x in CASE.qkv), **options)[0]]

    assert_as_accurate_as_pytorch([together], one_by_one, torch.float64)


def test_dropout_seed_comes_from_pytorch_when_not_given():
    options = {**CASE.options, "dropout_p": 0.5}

    def run(seed):
        torch.manual_seed(seed)
        return flasheva_attention(*CASE.qkv, **options)[0]

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_dropping_everything_gives_zero():
    options = {**CASE.options, "dropout_p": 1.0, "dropout_seed": torch.tensor([3])}
    assert not flasheva_attention(*CASE.qkv, **options)[0].any()


def test_second_derivatives_and_forward_mode_are_refused():
    """Neither has a formula; without one a tangent would be lost on the way."""
    q, k, v = CASE.qkv
    leaf = q.clone().requires_grad_()
    squares = flasheva_attention(leaf, k, v, **CASE.options)[0].square().sum()
    with pytest.raises(LoweringError, match="no second derivative"):
        torch.autograd.grad(squares, leaf, create_graph=True)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        flasheva_attention(forward_ad.make_dual(q, q), k, v, **CASE.options)


# --- complaints -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window_size": 6}, "multiple of chunk_size"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"window": "round"}, "unknown window 'round'"),
        ({"chunk_rule": "median"}, "unknown rule 'median'"),
        ({"sink_tokens": -1}, "sink_tokens=-1"),
        ({"dropout_p": 1.5}, "between 0 and 1"),
        ({"softcap": -1.0}, "0 means none"),
        ({"parameters": [torch.zeros(2, 8).double()] * 2}, "got 2 parameters"),
        ({"parameters": [torch.zeros(3, 8).double()]}, r"is \(3, 8\), not \(2, 8\)"),
        ({"key_mask": torch.ones(2, 20, dtype=torch.bool)}, r"key_mask is \(2, 20\)"),
        ({"key_mask": torch.ones(2, 21)}, "key_mask must be bool"),
        ({"segment_ids": torch.ones(2, 21)}, "segment_ids must be integers"),
        ({"segment_ids": torch.ones(2, 21).long(), "q_offset": 1}, r"q_offset \+ L <= S"),
        ({"segment_ids": torch.ones(2, 21).long(), "causal": False}, "bidirectional"),
        ({"causal": False, "q_offset": 1}, "L == S"),
        ({"alibi_slopes": torch.ones(2)}, r"alibi_slopes must be \[Hq\]"),
        ({"alibi_slopes": torch.ones(4).requires_grad_()}, "alibi_slopes has no gradient"),
        ({"chunk_rule": "eva", "parameters": [torch.zeros(8, 8)]}, "none, or 4 of f_q"),
        ({"window_sise": 8}, "unknown option window_sise"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    q, k, v = (x.clone().requires_grad_() for x in CASE.qkv)
    with pytest.raises(LoweringError, match=words):
        flasheva_attention(q, k, v, **{**CASE.options, **change})


def test_missing_options_and_misfit_tensors_are_refused():
    q, k, v = CASE.qkv
    with pytest.raises(LoweringError, match="without chunk_size"):
        flasheva_attention(q, k, v, window_size=8)
    with pytest.raises(LoweringError, match="3 query heads over 2 key heads"):
        flasheva_attention(q[:, :3], k, v, **CASE.options)
    with pytest.raises(LoweringError, match="differ in dtype"):
        flasheva_attention(q.float(), k, v, **CASE.options)
    with pytest.raises(LoweringError, match="L == S"):
        flasheva_attention(q[:, :, :5], k, v, **{**CASE.options, "chunk_rule": "eva"})
    tokens = (k[:, :, :6], v[:, :, :6], k[:, :, :6, 0])
    call = torch.ops.flasheva.attention
    with pytest.raises(LoweringError, match="needs a dropout_seed"):
        call(q, k, v, *tokens, *[None] * 4, **{**OPTIONS, "dropout_p": 0.5})
    with pytest.raises(LoweringError, match="version"):
        call(q, k, v, *tokens, *[None] * 4, **{**OPTIONS, "version": "0"})
    with pytest.raises(LoweringError, match="rfa_k is"):
        call(q, k, v, k, *tokens[1:], *[None] * 4, **OPTIONS)


def test_misfits_are_refused_while_compiling_too():
    torch.compiler.reset()
    compiled = torch.compile(flasheva_attention, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="multiple of chunk_size"):
        compiled(*CASE.qkv, **{**CASE.options, "window_size": 6})


def test_features_of_the_eva_rule_have_the_dtype_of_keys():
    """A prepared model's parameters are fp32 whatever its weights are; kernels want one dtype."""
    q, k = (torch.randn(1, 2, 8, 4, dtype=torch.bfloat16) for _ in range(2))
    parameters = [torch.eye(4), *torch.zeros(1, 4), *torch.ones(1, 4), *torch.zeros(1, 4)] * 2

    def tokens(_rule, values, _parameters):
        return (*(x.unflatten(2, (-1, 4)).mean(3) for x in (k, values)), None)

    found = eva_features(q, k, tokens, parameters, None)
    assert [x.dtype for x in found] == [torch.bfloat16] * 2


def test_gradients_that_an_op_returns_share_no_storage():
    """Kernels add up those of chunk tokens in one tensor; outputs of an op may not be its parts."""
    sums = torch.ones(12)
    grads = [torch.ones(2) for _ in range(3)] + list(sums.split(4))
    found = implementations._as_outputs(grads, [torch.ones(4) for _ in grads])
    storages = {x.untyped_storage().data_ptr() for x in found}
    assert len(storages) == len(grads)
    assert all(a is b for a, b in zip(found[:3], grads, strict=False))


@pytest.mark.parametrize("chunk_size", [4, 16, 48])
def test_windows_and_sinks_beyond_any_row_are_cut_to_what_32_bits_can_add(chunk_size):
    """A padded row's first query minus a window near 2 ** 31 wrapped around, and saw nothing."""
    huge = {"window_size": 2**40 * chunk_size, "sink_tokens": 2**40}
    settings = implementations.attention_settings({**OPTIONS, **huge, "chunk_size": chunk_size})
    for size in (settings.window_size, settings.sink_tokens):
        assert size % chunk_size == 0
        assert 2**30 - chunk_size < size < 2**30 + chunk_size
    own = implementations.attention_settings({**OPTIONS, "chunk_size": 2**31, "window_size": 2**31})
    assert own.window_size == 2**31  # never less than a chunk


def test_a_window_beyond_any_row_is_softmax():
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in "qkv")
    mask = torch.arange(40)[None] >= 20
    seen = mask & torch.ones(40, 40, dtype=torch.bool).tril()
    out = flasheva_attention(q, k, v, key_mask=mask, window_size=2**40, chunk_size=16)[0]
    wanted = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    torch.testing.assert_close(out[:, :, 20:], wanted[:, :, 20:])
