"""Laws of ``forward`` by specialised warps that leave out what queries have selected."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from flasheva_compile.lowering.rows import rows_of

from tests.kernels.cases import KernelCase
from tests.kernels.test_specialised import WHERE_MISTAKES_SHOW, attend


@pytest.mark.parametrize("mask", ["none", "left_padding"])
@pytest.mark.parametrize(("group", "block_n", "overlap"), [(1, 64, True), (5, 16, False)])
def test_chunk_tokens_that_queries_selected_are_left_out(mask, group, block_n, overlap):
    """As if their biases were -inf, for these queries alone."""
    case = KernelCase(
        batch=2,
        kv_heads=2,
        group=2,
        keys=260,
        queries=260,
        head_dim=16,
        value_dim=16,
        rule="tangent",
        window_size=32,
        chunk_size=4,
        sink_tokens=8,
        mask=mask,
        dtype=torch.bfloat16,
    )
    how = dataclasses.replace(WHERE_MISTAKES_SHOW, block_n=block_n, overlap=overlap)
    _, k, _, _ = case.inputs()
    rows, sinks = rows_of(k, *case.masks.values(), chunk_size=4), 2
    start = rows.start.tolist() if rows.documents == "padded" else [0, 0]
    patterns = torch.rand(3, case.slots, generator=torch.Generator().manual_seed(0)) < 0.4
    groups = torch.arange(-(-260 // group))
    kinds = (groups + torch.arange(2)[:, None, None] + torch.arange(2)[:, None]) % 3
    found = attend(case, how, bits=words_of(patterns[kinds][..., sinks:]), group=group)
    kinds = kinds.repeat_interleave(group, 2)[:, :, :260].repeat_interleave(2, 1)
    for kind, pattern in enumerate(patterns):
        hide = torch.zeros(2, 2, case.slots, dtype=torch.bool)
        for row, first in enumerate(x // 4 for x in start):
            hide[row, :, first + sinks :] = pattern[sinks : case.slots - first]
        wanted = attend(case, how, hide=hide)
        for one, other in zip(found, wanted, strict=True):
            assert other.isfinite().any()
            assert torch.equal(one[kinds == kind], other[kinds == kind])


def words_of(picked: torch.Tensor) -> torch.Tensor:
    """Return bits ``[B, Hkv, words, groups]`` of ``[B, Hkv, groups, chunks]``, the last unread."""
    chunks = picked.shape[3]
    padded = torch.nn.functional.pad(picked, (0, -chunks % 32 + 32), value=True)
    powers = 1 << torch.arange(32)
    words = (padded.unflatten(3, (-1, 32)) * powers).sum(-1)
    return words.where(words < 2**31, words - 2**32).int().mT.contiguous()
