"""Laws of the cache: appending in any portions computes what one call over everything does."""

from __future__ import annotations

import pytest
import torch
from flasheva_compile.kernels.reference.attention import eva_attention
from hypothesis import given, settings
from hypothesis import strategies as st

from flasheva_compile.cache_ops import cache_options, new_state
from flasheva_compile.config import EvaConfig
from flasheva_compile.errors import LoweringError
from tests.attention_cases import AttentionCase, attention_cases
from tests.tolerance import assert_as_accurate_as_pytorch

FP64 = torch.float64
MASKS = ("none", "left_padding", "holes")
laws = settings(deadline=None, derandomize=True, max_examples=150, database=None)


@st.composite
def portions(draw, case: AttentionCase) -> list[int]:
    """Draw how many tokens each call brings; mostly one, as in generation."""
    left, sizes = case.keys, []
    while left:
        one = draw(st.integers(0, 2)) > 0
        sizes.append(1 if one else draw(st.integers(1, left)))
        left -= sizes[-1]
    return sizes


@st.composite
def cached_calls(draw, **fixed):
    names = {"causal": True, "q_offset": 0}
    case = draw(attention_cases(masks=MASKS, **{**names, **fixed}))
    case = AttentionCase(
        **{**vars_of(case), "queries": max(1, case.keys), "keys": max(1, case.keys)}
    )
    return case, draw(portions(case)), draw(st.integers(0, 3)) == 0


def vars_of(case: AttentionCase) -> dict[str, object]:
    return {name: getattr(case, name) for name in AttentionCase.__dataclass_fields__}


def eva_config(case: AttentionCase) -> EvaConfig:
    return EvaConfig(
        window_size=case.window_size,
        chunk_size=case.chunk_size,
        sink_tokens=case.sink_tokens,
        window=case.window,
        chunk_rule=case.rule,
    )


def slopes_of(case: AttentionCase, dtype: torch.dtype) -> torch.Tensor | None:
    """Return slopes in fp32 at least, as layers keep them."""
    slopes = case._normal(7, case.kv_heads * case.group) / 8
    return slopes.to(torch.promote_types(dtype, torch.float32)) if case.alibi else None


def reference(case: AttentionCase, dtype: torch.dtype):
    q, k, v = (x.to(dtype) for x in case.qkv)
    parameters = [p.to(dtype) for p in case.parameters]
    slopes = slopes_of(case, dtype)
    options = {**case.options, "alibi_slopes": slopes}
    return list(eva_attention(q, k, v, parameters=parameters, **options))


def in_portions(case, sizes, dtype, *, append_first=False, chunks=None, rows=slice(None)):
    """Run the ops; the first portion may be appended without attending."""
    q, k, v = (x.to(dtype)[rows] for x in case.qkv)
    parameters = [p.to(dtype) for p in case.parameters]
    key_mask = case.masks["key_mask"]
    options = cache_options(eva_config(case), case.head_dim**-0.5, case.softcap)
    chunks = -(-case.keys // case.chunk_size) if chunks is None else chunks
    state = new_state(k, v, chunks, options, alibi=case.alibi)
    slopes = slopes_of(case, dtype)
    outs, lses, lo = [], [], 0
    for size in sizes:
        part = [x[:, :, lo : lo + size] for x in (q, k, v)]
        mask = None if key_mask is None else key_mask[rows, lo : lo + size]
        inputs = (*part, parameters, mask, *state)
        if append_first and lo == 0:
            torch.ops.flasheva.cache_append(*inputs, **options)
        else:
            out, lse = torch.ops.flasheva.decode(*inputs, **options, alibi_slopes=slopes)
            outs.append(out)
            lses.append(lse)
        lo += size
    skipped = sizes[0] if append_first else 0
    empty = q.new_zeros(*q.shape[:2], 0, v.shape[3])
    return [torch.cat([empty, *outs], 2), torch.cat([empty[..., 0], *lses], 2)], skipped, state


@given(cached_calls())
@laws
def test_any_portions_are_one_call(call):
    case, sizes, append_first = call
    actual, skipped, state = in_portions(case, sizes, FP64, append_first=append_first)
    assert int(state.length) == case.keys

    def formula(dtype):
        return [x[:, :, skipped:] for x in reference(case, dtype)]

    assert_as_accurate_as_pytorch(actual, formula, FP64)


@given(cached_calls())
@settings(laws, max_examples=40)
def test_low_precision_is_as_accurate_as_pytorch(call):
    case, sizes, _ = call
    actual = in_portions(case, sizes, torch.bfloat16)[0]
    formula = lambda dtype: reference(case, dtype)  # noqa: E731
    assert_as_accurate_as_pytorch(actual, formula, torch.bfloat16)


@given(cached_calls(batch=3))
@settings(laws, max_examples=40)
def test_rows_do_not_see_each_other(call):
    case, sizes, _ = call
    together = in_portions(case, sizes, FP64)[0]
    alone = in_portions(case, sizes, FP64, rows=slice(1, 2))[0]
    formula = lambda dtype: [x[1:2].to(dtype) for x in together]  # noqa: E731
    assert_as_accurate_as_pytorch(alone, formula, FP64)


def test_a_full_cache_answers_nan_instead_of_forgetting():
    case = AttentionCase(keys=40, queries=40, sink_tokens=0, window_size=4, chunk_size=2, batch=1)
    enough, short = ([1] * 40, 18, None), ([1] * 40, 17, None)
    out = in_portions(case, enough[0], FP64, chunks=enough[1])[0][0]
    assert out.isfinite().all()
    out = in_portions(case, short[0], FP64, chunks=short[1])[0][0]
    lost = out.isnan().all(-1)[0, 0]
    # The last window begins at position 36, behind eighteen chunks.
    assert lost.tolist() == [False] * 39 + [True]


def test_another_batch_is_refused():
    case = AttentionCase()
    _, _, state = in_portions(case, [case.keys], FP64)
    q, k, v = (x[:1, :, :1] for x in case.qkv)
    options = cache_options(eva_config(case), 1.0)
    with pytest.raises(LoweringError, match="the cache holds"):
        torch.ops.flasheva.decode(q, k, v, list(case.parameters), None, *state, **options)


def test_slopes_and_the_positions_that_they_need_come_together():
    case = AttentionCase(alibi=True)
    options = cache_options(eva_config(case), 1.0)
    slopes = slopes_of(case, FP64)
    for alibi, wrong, message in (
        (False, slopes, "the state keeps positions"),
        (True, None, "the state keeps positions"),
        (True, slopes[:1], r"must be \[Hq\]"),
        (True, slopes.bfloat16(), "must be fp32"),
    ):
        state = new_state(*case.qkv[1:], 3, options, alibi=alibi)
        inputs = (*case.qkv, list(case.parameters), None, *state)
        with pytest.raises(LoweringError, match=message):
            torch.ops.flasheva.decode(*inputs, **options, alibi_slopes=wrong)
        assert not state.length


@pytest.mark.parametrize(
    ("op", "alibi"), [("decode", False), ("decode", True), ("cache_append", True)]
)
def test_ops_pass_opcheck(op, alibi):
    case = AttentionCase(mask="holes", keys=9, queries=9, alibi=alibi)
    options = cache_options(eva_config(case), 0.5)
    state = new_state(*case.qkv[1:], 3, options, alibi=alibi)
    if op == "decode":
        options["alibi_slopes"] = slopes_of(case, FP64)
    inputs = (*case.qkv, list(case.parameters), case.masks["key_mask"], *state)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.flasheva, op), inputs, options, test_utils=checks)
