"""Laws of the generated kernels, in Triton's interpreter; see ``test_interpreted.py``."""

from __future__ import annotations

import dataclasses
import os

import pytest

from tests import triton_interpreter  # isort: skip - before anything that imports Triton

import numpy as np
import torch
import triton
import triton.language as tl
from flasheva_compile.kernels.blocked.block import Operands
from flasheva_compile.lowering import launch, launch_pooling
from flasheva_compile.lowering.emit import keys
from flasheva_compile.lowering.rows import rows_of
from flasheva_compile.lowering.spec import pools_by_products
from hypothesis import HealthCheck, Phase, given, settings
from triton.runtime.errors import InterpreterError

from tests.attention_cases import MASKS, RULES
from tests.kernels import cases
from tests.kernels.cases import KernelCase, kernel_cases, run_formula, run_kernels
from tests.property.test_attention_laws import full_mask, softmax_attention
from tests.tolerance import assert_as_accurate_as_pytorch

triton_interpreter.install()
np.seterr(over="ignore")  # unsigned products of the dropout hash wrap on purpose

FUZZ = int(os.environ.get("FLASHEVA_FUZZ", "1"))
"""How many times the examples of CI; more than one = random ones. 0 = a few, not shrunk."""


def examples(count: int):
    phases = list(Phase) if FUZZ else [Phase.explicit, Phase.generate]
    return settings(
        deadline=None,
        database=None,
        derandomize=FUZZ <= 1,
        max_examples=count * max(1, FUZZ),
        phases=phases,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def assert_right(case: KernelCase, got: dict[str, torch.Tensor], names: list[str]) -> None:
    def formula(dtype):
        truth = run_formula(case, dtype)
        return [truth[name] for name in names]

    try:
        assert_as_accurate_as_pytorch([got[name] for name in names], formula, case.dtype)
    except AssertionError as error:
        error.add_note(f"tensors: {list(enumerate(names))}")
        raise


def check(case: KernelCase) -> None:
    with triton_interpreter.poisoned_buffers():
        got = run_kernels(case)
    assert_right(case, got, cases.compared(case))


@given(kernel_cases())
@examples(50)
def test_attention_and_its_gradients_are_the_reference(case):
    check(case)


@pytest.mark.parametrize("mask", ["none", "left_padding", "segments"])
@pytest.mark.parametrize("rule", ["mean", "tangent", "evabyte", "eva"])
def test_pooling_of_wide_heads_and_of_whole_chunks(rule, mask):
    """``dpool`` adds its gradient to that of ``dkv`` where products have no rows for its chunks,
    and the mean of dense rows reads no biases."""
    fixed = {"dtype": torch.bfloat16, "seed": 5, "sink_tokens": 5, "with_parameters": True}
    sizes = {"head_dim": 80, "value_dim": 24, "chunk_size": 4, "window_size": 8}
    schedule = dataclasses.replace(cases.SMALLEST, split_window=True, tma=mask == "none")
    shape = {"batch": 1, "kv_heads": 1, "keys": 37, "queries": 37, "rule": rule, "mask": mask}
    case = KernelCase(**shape, **fixed, **sizes)
    case = dataclasses.replace(case, schedule=schedule)
    with pytest.MonkeyPatch.context() as patch:
        specs = []
        load = launch.load
        patch.setattr(launch, "load", lambda spec, how: specs.append(spec) or load(spec, how))
        check(case)
    by_products = rule == "tangent" and mask != "segments"
    assert any(spec.accumulate for spec in specs) == (rule != "mean" and not by_products)
    assert any(map(pools_by_products, specs)) == (
        mask != "segments" and rule in ("mean", "tangent")
    )
    assert any(spec.whole_chunks for spec in specs) == (rule == "mean" and mask == "none")


_POOLED_BY_PRODUCTS = {
    "dtype": torch.bfloat16,
    "fused": True,
    "with_parameters": True,
    "head_dim": 72,
    "value_dim": 24,
}


@given(
    kernel_cases(
        max_keys=60,
        masks=[mask for mask in MASKS if "segments" not in mask],
        rules=("tangent", "tangent", "mean"),
        **_POOLED_BY_PRODUCTS,
    ).filter(lambda case: case.chunk_size >= 4)
)
@examples(15)
def test_gradients_of_pooling_by_products_are_the_reference(case):
    check(case)


def _both_ways(case: KernelCase) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return what products give, and what keys one by one do."""
    found = run_kernels(case)
    with pytest.MonkeyPatch.context() as patch:
        for module in (keys, launch):
            patch.setattr(module, "pools_by_products", lambda _: False)
        return found, run_kernels(case)


def test_weights_of_one_key_lose_nothing_by_large_vectors():
    """One key has all the weight of a chunk: its deviation is zero, and is multiplied by phi."""
    shape = {"batch": 1, "kv_heads": 1, "keys": 90, "queries": 90, "rule": "tangent", "seed": 3}
    case = KernelCase(**shape, chunk_size=4, window_size=8, **_POOLED_BY_PRODUCTS)
    vars(case)["parameters"] = tuple(100 * x for x in case.parameters)
    truth = run_formula(case, torch.float64)["dk"]
    for found in _both_ways(case):
        assert (found["dk"].double() - truth).abs().max() < 5e-3 * truth.abs().max()


def test_products_lose_next_to_nothing_and_find_chunks_far_on():
    """Keys that differ little from their mean: what moves a weight is a small difference."""
    shape = {"batch": 1, "kv_heads": 2, "keys": 150, "queries": 150, "rule": "tangent"}
    sizes = {"chunk_size": 4, "window_size": 8, "seed": 3}
    case = KernelCase(**shape, **sizes, **_POOLED_BY_PRODUCTS)
    q, k, v = case.qkv
    vars(case)["qkv"] = (q, k / 8 + 4, v / 8 + 4)
    found, key_by_key = _both_ways(case)
    error = (found["dp0"] - key_by_key["dp0"]).abs().max() / key_by_key["dp0"].abs().max()
    assert 0 < error < 2e-3  # by one bf16 number each it would be 0.7


def test_a_tile_of_keys_may_touch_more_chunks_than_a_product_has_rows_at_least():
    """64 keys that begin inside a chunk of four touch 17: 32 rows, as on a GPU."""
    shape = {"batch": 1, "kv_heads": 1, "keys": 150, "queries": 150, "rule": "tangent"}
    tiles = dataclasses.replace(cases.SMALLEST, block_n=64)
    sizes = {"chunk_size": 4, "window_size": 8, "seed": 3, "schedule": tiles}
    case = KernelCase(**shape, **sizes, **_POOLED_BY_PRODUCTS)
    vars(case)["masks"] = {"key_mask": torch.arange(150)[None] >= 5, "segment_ids": None}
    check(case)
    found, key_by_key = _both_ways(case)
    error = (found["dp0"] - key_by_key["dp0"]).abs().max() / key_by_key["dp0"].abs().max()
    assert error < 1e-4


def test_an_infinite_gradient_stays_in_its_tile():
    """Products multiply it by the zeros of other chunks' keys, but of no other tile's."""
    case = KernelCase(keys=96, queries=96, chunk_size=4, rule="tangent", **_POOLED_BY_PRODUCTS)
    gradients = launch.chunk_gradients

    def with_infinity(*arguments):
        found = gradients(*arguments)
        found[1][:, 9] = torch.inf  # keys 36 to 39, in the tile of 32 to 47
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "chunk_gradients", with_infinity)
        dv = run_kernels(case)["dv"]
    lost = dv[0, 0].isfinite().logical_not().any(-1).nonzero().flatten()
    assert 36 in lost.tolist()
    assert lost.min() >= 32
    assert lost.max() < 48


@given(kernel_cases(max_keys=60))
@examples(30)
def test_pooling_and_its_gradients_are_the_reference(case):
    """The gradients also reach chunks without a key, where they must be dropped."""
    _, k, v = case.qkv
    sizes = ((case.head_dim,), (case.value_dim,), ())
    douts = [case._normal(30 + i, *k.shape[:2], case.slots, *n) for i, n in enumerate(sizes)]
    vectors = {"tangent": 1, "evabyte": 2, "eva": 2}.get(case.rule, 0) if case.parameters else 0

    def formula(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (k, v, *case.parameters)]
        tokens = cases.reference_tokens(case, *leaves[:2], leaves[2:])
        # Under some rules biases are constants.
        pairs = [(x, d.to(dtype)) for x, d in zip(tokens, douts, strict=True) if x.requires_grad]
        outputs, gradients = zip(*pairs, strict=True)
        wanted = leaves[: 2 + vectors]
        grads = torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
        pairs = zip(grads, wanted, strict=True)
        zeros = [torch.zeros_like(x) if g is None else g for g, x in pairs]
        return [x.detach() for x in (*tokens, *zeros)]

    _, low_k, low_v, _ = case.inputs()
    parameters = tuple(p.to(case.dtype) for p in case.parameters)
    rows = rows_of(low_k, *case.masks.values(), chunk_size=case.chunk_size)
    call = (low_k, low_v, parameters, rows)
    with triton_interpreter.poisoned_buffers(), cases.as_scheduled(case):
        tokens, _ = launch_pooling.chunk_tokens_forward(*call, **case.pooling)
        low_douts = tuple(x.float() for x in douts)
        grads = launch_pooling.chunk_tokens_backward(low_douts, *call, **case.pooling)
    assert_as_accurate_as_pytorch([*tokens, *grads[: 2 + vectors]], formula, case.dtype)


@given(kernel_cases(max_keys=60))
@examples(3)
def test_a_schedule_never_changes_a_result_beyond_rounding(case):
    found = []
    for block_m, block_n, splits in ((16, 64, (1, 16)), (64, 16, (4, 64)), (32, 32, (2, 1024))):
        blocks = {"block_m": block_m, "block_n": block_n}
        for switches in ({}, *({name: True} for name in cases.SWITCHES)):
            schedule = dataclasses.replace(case.schedule, **blocks, **switches)
            tried = dataclasses.replace(case, schedule=schedule, splits=splits)
            with triton_interpreter.poisoned_buffers():
                found.append(run_kernels(tried))
    for got in found:
        assert_right(case, got, cases.compared(case))


@pytest.mark.parametrize(("mask", "tma"), [("none", True), ("left_padding", False)])
def test_products_add_biases_of_any_size(mask, tma):
    """As the scores do, to fp32's rounding; -inf hides a chunk token, and all of them nothing."""
    shape = {"batch": 2, "keys": 45, "queries": 45, "window_size": 8, "chunk_size": 4}
    sizes = {"head_dim": 16, "value_dim": 16}  # rows that descriptors can describe
    case = KernelCase(**shape, **sizes, dtype=torch.bfloat16, rule="tangent", mask=mask, scale=1.0)
    size = torch.tensor([0.1, 300.0])[:, None, None]
    made = torch.Generator().manual_seed(0)
    bias = torch.randn(case.batch, case.kv_heads, case.slots, generator=made) * size
    bias[:, :, ::3], bias[:, 0] = -torch.inf, -torch.inf
    bias[0, :, 1] = torch.finfo(torch.float32).min  # no bf16 number, divided by the scale
    found = []
    for product_bias in (False, True):
        how = dataclasses.replace(cases.SMALLEST, tma=tma, product_bias=product_bias)
        scheduled = dataclasses.replace(case, schedule=how)
        q, k, v, dout = case.inputs()
        rows = rows_of(k, *case.masks.values(), chunk_size=case.chunk_size)
        with triton_interpreter.poisoned_buffers(), cases.as_scheduled(scheduled):
            tokens, _ = launch_pooling.chunk_tokens_forward(k, v, (), rows, **case.pooling)
            t = Operands(q=q, k=k, v=v, rfa_k=tokens[0], rfa_v=tokens[1], rfa_bias=bias)
            out, lse = launch.attention_forward(t, rows, case.settings)
            grads = launch.attention_backward(dout, out, lse, t, rows, case.settings)
        found.append((out.float(), lse, *(x.float() for x in grads)))
    for plain, folded in zip(*found, strict=True):
        assert torch.equal(folded.isfinite(), plain.isfinite())
    (out, lse, *grads), (folded_out, folded_lse, *folded_grads) = found
    torch.testing.assert_close(folded_lse, lse, atol=2e-4, rtol=0)
    for x, y in zip((out, *grads), (folded_out, *folded_grads), strict=True):
        torch.testing.assert_close(y, x, atol=2**-7 * max(1.0, x.abs().max().item()), rtol=0)


@pytest.mark.parametrize("mask", ["none", "left_padding", "holes", "segments_with_holes"])
@pytest.mark.parametrize("rule", RULES)
def test_pooling_writes_the_columns_of_biases_that_their_own_launch_does(rule, mask):
    """To the bit, -inf of chunks without a key included; chunk tokens stay what they are."""
    shape = {"keys": 45, "head_dim": 24, "value_dim": 16, "chunk_size": 2, "rule": rule}
    schedule = dataclasses.replace(cases.SMALLEST, product_bias=True)
    fixed = {"dtype": torch.bfloat16, "with_parameters": True, "schedule": schedule, "seed": 3}
    case = KernelCase(**shape, **fixed, mask=mask)
    q, k, v, _ = case.inputs()
    parameters = tuple(p.to(case.dtype) for p in case.parameters)
    rows = rows_of(k, *case.masks.values(), chunk_size=case.chunk_size)
    call = (k, v, parameters, rows)
    with triton_interpreter.poisoned_buffers(), cases.as_scheduled(case):
        plain, none = launch_pooling.chunk_tokens_forward(*call, **case.pooling)
        tokens, made = launch_pooling.chunk_tokens_forward(*call, bias_columns=True, **case.pooling)
        names = dict(zip(cases.TOKENS, plain, strict=True))
        t = Operands(q=q, k=k, v=v, **names)
        spec = launch.attention_spec(t, case.settings, rows, None)
        values = launch.call_values(t, rows, case.settings)
        wanted = launch.with_bias_columns(spec, values)["bias_columns_ptr"]
    assert none.bias_columns is None
    assert all(torch.equal(x, y) for x, y in zip(tokens, plain, strict=True))
    assert torch.equal(made.bias_columns.view(torch.int16), wanted.view(torch.int16))
    assert wanted[..., 0].isneginf().any() == (mask != "none")
    assert not wanted.isnan().any()


@given(kernel_cases(batch=3, kv_heads=1, group=2, dropout_p=0.0, max_keys=50))
@examples(12)
def test_a_row_alone_has_the_bits_that_it_has_in_a_batch(case):
    """Without dropout, whose hash knows the row."""
    per_row = [*cases.TOKENS, "out", "lse", "dq", "dk", "dv", "drfa_k", "drfa_v"]
    per_row += ["dp0", "dp1"] if case.rule == "eva" and case.fused else []
    batch = run_kernels(case)
    for b in range(case.batch):
        alone = run_kernels(cases.one_row(case, b))
        for name in per_row:
            assert torch.equal(alone[name], batch[name][b : b + 1]), f"{name} of row {b}"


@given(kernel_cases(max_keys=40, rules=("mean",), dropout_p=0.0, scale=None, with_parameters=False))
@examples(12)
def test_a_window_over_everything_is_softmax(case):
    widest = 80 + 2 * case.chunk_size  # queries may stand 40 behind the last key
    case = dataclasses.replace(case, window_size=widest // case.chunk_size * case.chunk_size)
    attend = softmax_attention(case, full_mask(case))
    with triton_interpreter.poisoned_buffers():
        got = run_kernels(case)
    actual = [got[name] for name in ("out", "lse", "dq", "dk", "dv")]
    assert_as_accurate_as_pytorch(actual, lambda dtype: case.run(attend, dtype), case.dtype)


@pytest.mark.parametrize("block_n", [16, 64])
@pytest.mark.parametrize("kwargs", [{"mask": "none"}, {"mask": "holes"}], ids=str)
def test_every_weight_dropped(block_n, kwargs):
    """At the largest threshold below certainty, which kernels leave to the blocked code."""
    schedule = dataclasses.replace(KernelCase().schedule, block_n=block_n)
    case = KernelCase(head_dim=16, value_dim=16, dropout_p=1 - 2**-32, schedule=schedule, **kwargs)
    check(case)
    with pytest.raises(AssertionError):
        run_kernels(dataclasses.replace(case, dropout_p=1.0))


# --- the interpreter itself -----------------------------------------------------------------------


@triton.jit
def product(a_ptr, b_ptr, out_ptr, n, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    at = offs[:, None] * SIZE + offs[None, :]
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for _ in range(n):  # a run-time bound
        total = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), total)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty))


@triton.jit
def copy(x_ptr, out_ptr, n, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=0.0))


@triton.jit
def double(x_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, x + x)


@triton.jit
def add_up(x_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + offs), 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_interpreter_multiplies_and_rounds_exactly(dtype):
    a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty(32, 32, dtype=dtype)
    product[(1,)](a, b, out, 1, SIZE=32)
    np.testing.assert_array_equal(out.float(), (a.float() @ b.float()).to(dtype).float())
    product[(1,)](a, b, out, 3, SIZE=32)
    assert_as_accurate_as_pytorch([out], lambda t: [3 * (a.to(t) @ b.to(t))], dtype)


@pytest.mark.parametrize("kernel", [double, add_up])
def test_interpreter_refuses_bfloat16_arithmetic(kernel):
    with pytest.raises((TypeError, InterpreterError), match="widen to fp32 first"):
        kernel[(1,)](torch.ones(16).bfloat16(), torch.empty(16).bfloat16(), SIZE=16)


def test_interpreter_refuses_what_is_out_of_bounds():
    x, out = torch.ones(10), torch.empty(16)
    copy[(1,)](x, out, 10, SIZE=16)
    with pytest.raises(AssertionError, match="read outside"):
        copy[(1,)](x, out, 11, SIZE=16)
    with pytest.raises(AssertionError, match="store outside"):
        copy[(1,)](x, out[:15], 10, SIZE=16)


def test_interpreter_refuses_races():
    with pytest.raises(AssertionError, match="two stores"):
        copy[(2,)](torch.ones(16), torch.empty(16), 16, SIZE=16)


def test_new_buffers_are_poisoned():
    with triton_interpreter.poisoned_buffers():
        x = torch.ones(3)
        fresh = (x.new_empty(3), torch.empty_like(x), torch.empty(3))
        assert all(y.isnan().all() for y in fresh)
        assert (x.new_empty(2, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
