"""The one tolerance of all numerical tests: twice PyTorch's own error, plus one rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Formula = Callable[[torch.dtype], Sequence[Tensor]]


def assert_as_accurate_as_pytorch(
    actual: Sequence[Tensor], formula: Formula, dtype: torch.dtype
) -> None:
    """Compare with fp64, allowing for what the same formula loses in plain PyTorch.

    ``|actual - truth| <= 2 own * size + rounding`` in the maximum norm, where ``truth`` is the
    formula in fp64, ``size`` the tensor's largest number (at least 1, the size of the inputs), and
    ``own`` the worst error, relative to ``size``, of the same run in plain PyTorch in ``dtype``.
    The worst of the run, because a tensor of few numbers (a parameter's gradient is a sum over all
    tokens) can be right by luck. For fp64 results ``own`` is the fp32 run's error scaled by the
    ratio of the machine epsilons. The rounding is FlashAttention's, ``2 |((x + 0.3) - 0.3) - x|``,
    at the run's largest number, since small results are sums of large ones; it counts twice, once
    for the result and once for the log-sum-exp that a backward pass starts from.

    Args:
        actual: What is tested.
        formula: Computes the same tensors in a given dtype, from the same inputs.
        dtype: Precision of ``actual``.

    Source:
        FlashAttention's tests (``tests/cute``, ``hopper/test_flash_attn.py``).
    """
    truth = [t.double() for t in formula(torch.float64)]
    own_dtype = torch.float32 if dtype == torch.float64 else dtype
    own = [t.double() for t in formula(own_dtype)]
    shrink = torch.finfo(dtype).eps / torch.finfo(own_dtype).eps
    sizes = [max(1.0, _largest(t)) for t in truth]
    errors = [_error(low, want) for low, want in zip(own, truth, strict=True)]
    worst = max((e / size for e, size in zip(errors, sizes, strict=True)), default=0.0)
    rounding = 4 * torch.finfo(dtype).eps * max(sizes, default=1.0)
    assert len(actual) == len(truth)
    for index, (got, want, size) in enumerate(zip(actual, truth, sizes, strict=True)):
        assert got.shape == want.shape, f"tensor {index}: {got.shape} is not {want.shape}"
        assert torch.equal(got.isinf(), want.isinf()), f"tensor {index}: infinities differ"
        error, allowed = _error(got, want), 2 * worst * shrink * size + rounding
        assert error <= allowed, f"tensor {index}: error {error:.3g}, allowed {allowed:.3g}"


def _error(got: Tensor, want: Tensor) -> float:
    return _largest((got.double() - want).masked_fill(want.isinf(), 0))


def _largest(x: Tensor) -> float:
    finite = x.masked_fill(x.isinf(), 0)
    # NaN must fail the comparison, so it may not be dropped here.
    return finite.abs().max().item() if x.numel() else 0.0
