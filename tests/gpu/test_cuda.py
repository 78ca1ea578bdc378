"""The ops and the backend on a CUDA device (skipped without one)."""

from __future__ import annotations

import pytest
import torch
from flasheva_compile.kernels.reference.attention import eva_attention

import flasheva_compile as fe
from flasheva_compile import ops
from tests.models.families import BY_NAME
from tests.models.oracle import WHOLE, assert_same_to_rounding, in_double, pytorchs_own, run
from tests.tolerance import assert_as_accurate_as_pytorch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_ops_equal_the_reference(dtype, causal):
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(2, 6, 300, 40, device="cuda", generator=generator)
    k, v = torch.randn(2, 2, 2, 300, 40, device="cuda", generator=generator)
    key_mask = torch.ones(2, 300, dtype=torch.bool, device="cuda")
    key_mask[0, :37] = False
    shape = {"window_size": 64, "chunk_size": 16, "sink_tokens": 1, "causal": causal}

    def formula(precision):
        tensors = (x.to(dtype).to(precision) for x in (q, k, v))
        return [eva_attention(*tensors, key_mask=key_mask, **shape)[0]]

    low = [x.to(dtype) for x in (q, k, v)]
    out = ops.flasheva_attention(*low, key_mask=key_mask, **shape)
    out = out[0] if isinstance(out, tuple) else out
    assert_as_accurate_as_pytorch([out], formula, dtype)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_exactness_oracle(name, inner):
    torch._dynamo.reset()
    family = BY_NAME[name]
    model = family.build("sdpa").cuda()
    inputs = {n: x.cuda() for n, x in family.inputs(padded=True).items()}
    exact, theirs = in_double(model, inputs), pytorchs_own(model, inputs)
    model.compile(backend="flasheva", options={**WHOLE, "inner_backend": inner})
    assert_same_to_rounding(run(model, model, inputs), theirs, exact)
    assert len(fe.explain(model).rewritten) == 2
