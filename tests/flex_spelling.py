"""The attention of `tests.spellings` by ``flex_attention``, right and wrong."""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

FLEX_NEAR_MISSES = (
    "flex with blocks of another mask",
    "flex with no block listed",
    "flex with one key more",
    "flex with its log-sum-exp",
    "flex with absolute scores",
    "flex with a prefix",
)


def flex(self, q, k, v, padding):
    """The same by ``flex_attention``; its block mask is made inside."""
    length = q.shape[2]
    masked, slopes, wrong = self.choice.mask != "none", self.slopes, self.near_miss

    def visible(b, h, i, j):
        keep = i >= j if masked or wrong else j >= 0
        if wrong == "flex with one key more":
            keep = i + 1 >= j
        if wrong == "flex with a prefix":
            keep = (i >= j) | (j < 3)
        return keep if padding is None else keep & (padding[b, j] != 0)

    def scored(score, b, h, i, j):
        if self.choice.softcap:
            score = 4.0 * torch.tanh(score / 4.0)
        if self.choice.alibi != "none":
            score = score + slopes[h] * (j - i)
        return score.abs() if wrong == "flex with absolute scores" else score

    listed = (lambda b, h, i, j: (i >= j) & (i - j < 5)) if "another" in wrong else visible
    rows = None if padding is None else q.shape[0]
    blocks = create_block_mask(listed, rows, None, length, length, device=q.device, BLOCK_SIZE=4)
    blocks.mask_mod = visible
    if wrong == "flex with no block listed":
        blocks.kv_num_blocks = blocks.kv_num_blocks * 0
    scale = {"none": 1.0, "other": 0.2}.get(self.choice.scale)
    lse = wrong == "flex with its log-sum-exp"
    grouped = q.shape[1] != k.shape[1]
    result = flex_attention(
        q, k, v, scored, blocks, scale=scale, enable_gqa=grouped, return_lse=lse
    )
    return result[0] * result[1][..., None] if lse else result
