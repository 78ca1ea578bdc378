"""Mask programs of the field, each with the kind that it must be proved to be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

B, H, Q, K = 2, 3, 12, 12
FULL = (B, H, Q, K)
MIN = torch.finfo(torch.float32).min
INF = float("inf")


@dataclass(frozen=True)
class Program:
    function: object
    kind: str
    inputs: tuple = ()
    shape: tuple = FULL
    as_: str | None = None  # how the mask is applied; default by dtype

    @property
    def id(self):
        return self.function.__name__


PROGRAMS: list[Program] = []


def program(kind, *inputs, shape=FULL, as_=None):
    def register(function):
        PROGRAMS.append(Program(function, kind, inputs, shape, as_))
        return function

    return register


def padding(*shape, seed=0):
    """Random 0/1 padding whose last key is always valid."""
    mask = torch.randint(0, 2, shape or (B, K), generator=torch.Generator().manual_seed(seed))
    mask[..., -1] = 1
    return mask


def index(q_length=Q, k_length=K, offset=0):
    b = torch.arange(B)[:, None, None, None]
    q = (torch.arange(q_length) + offset)[None, None, :, None]
    k = torch.arange(k_length)[None, None, None, :]
    return b, q, k


PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0]])


# ---- causal in every spelling


@program("causal")
def broadcast_le():
    _, q, k = index()
    return (k <= q).expand(B, -1, -1, -1)


@program("causal")
def flipped_ge():
    _, q, k = index()
    return q >= k


@program("causal")
def strict_with_plus_one():
    _, q, k = index()
    return k < q + 1


@program("causal")
def bool_tril():
    return torch.ones(Q, K, dtype=torch.bool).tril()


@program("causal", as_="masked_out")
def bool_triu_masked_out():
    return torch.ones(Q, K, dtype=torch.bool).triu(1)


@program("causal")
def inverted_triu():
    return ~torch.ones(Q, K, dtype=torch.bool).triu(diagonal=1)


@program("causal")
def full_inf_triu():
    return torch.full((Q, K), -INF).triu(1)


@program("causal")
def one_minus_tril_times_1e4():
    return (1 - torch.tril(torch.ones(Q, K))) * -1e4


@program("causal")
def zeros_masked_fill():
    return torch.zeros(Q, K).masked_fill(torch.tril(torch.ones(Q, K)) == 0, -INF)


@program("causal")
def in_place_masked_fill():
    mask = torch.zeros(Q, K)
    mask.masked_fill_(torch.ones(Q, K).triu(1).bool(), -INF)
    return mask[None, None]


@program("causal")
def mask_cond_bart():
    mask = torch.full((Q, K), MIN)
    cond = torch.arange(K)
    mask.masked_fill_(cond < (cond + 1).view(K, 1), 0)
    return mask[None, None].expand(B, 1, Q, K)


@program("causal")
def half_precision_triu():
    return torch.full((Q, K), torch.finfo(torch.float16).min, dtype=torch.float16).triu(1).float()


@program("causal")
def bfloat16_where():
    _, q, k = index()
    return torch.where(k <= q, torch.zeros((), dtype=torch.bfloat16), -INF)


@program("causal")
def reshaped_heads():
    mask = torch.ones(Q, K).tril().expand(B, H, Q, K).reshape(B * H, Q, K)
    return torch.where(mask.view(B, H, Q, K) > 0, 0.0, -INF)


@program("causal")
def flat_modulo():
    flat = torch.arange(Q * K)
    row, column = torch.div(flat, K, rounding_mode="floor"), torch.remainder(flat, K)
    return (column <= row).view(Q, K)


@program("causal", shape=(B, H, Q, K + 4))
def lower_right_aligned():
    return torch.ones(Q, K + 4, dtype=torch.bool).tril(4)


@program("causal")
def strictly_causal():
    return torch.ones(Q, K, dtype=torch.bool).tril(-1)


@program("causal")
def arange_in_float():
    i = torch.arange(Q, dtype=torch.float32)
    return i[None, :] <= i[:, None]


@program("causal")
def concatenated_columns():
    left = torch.ones(Q, 4, dtype=torch.bool).tril()
    right = torch.ones(Q, K - 4, dtype=torch.bool).tril(-4)
    return torch.cat([left, right], dim=-1)


@program("causal")
def flipped_arange():
    k = torch.arange(K).flip(0)
    q = torch.arange(Q).flip(0)
    return k[None, :] >= q[:, None]


# ---- padding


@program("causal+key padding", padding())
def hf_eager_with_padding(m):
    b, q, k = index()
    keep = (k <= q) & m.to(torch.bool)[b, k]
    return torch.where(keep, torch.tensor(0.0), MIN)


@program("bidirectional+key padding", padding())
def bert_padding(m):
    b, q, k = index()
    return (q >= 0) & m.bool()[b, k]


@program("causal+key padding", padding())
def minimum_of_two(m):
    _, q, k = index()
    causal = torch.where(k <= q, 0.0, MIN)
    return torch.minimum(causal, torch.where(m[:, None, None, :] != 0, 0.0, MIN))


@program("causal+key padding", padding())
def sum_of_two(m):
    _, q, k = index()
    causal = torch.where(k <= q, 0.0, -INF)
    return causal + torch.zeros(B, 1, 1, K).masked_fill(m[:, None, None, :] == 0, -INF)


@program("causal+key padding", padding().bool())
def old_bert_from_bool(m):
    _, q, k = index()
    return torch.where(k <= q, 0.0, MIN) + (1.0 - m[:, None, None, :].float()) * MIN


@program("bidirectional+key padding", padding(1, K))
def padding_of_one_row(m):
    return (m != 0)[:, None, None, :].expand(B, 1, Q, K)


@program("causal+key padding", torch.tensor([3, 0]))
def left_padding_by_start(start):
    _, q, k = index()
    return (k <= q) & (k >= start[:, None, None, None])


@program("bidirectional+key padding+query mask", padding(), padding(seed=1))
def outer_product_of_masks(m, n):
    return (m[:, None, None, :] * n[:, None, :, None]).bool()


@program("bidirectional+key padding", padding().bool())
def three_dimensional(m):
    return m[0].expand(H, Q, K)


@program("bidirectional")
def trivially_true():
    _, q, _ = index()
    return torch.where(q >= 0, torch.tensor(0.0), MIN)


@program("bidirectional+kv length")
def all_but_the_last_key():
    _, _, k = index()
    return k < K - 1


@program("bidirectional+key padding", 1 + torch.arange(B * K).view(B, K) * 1e-3)
def rounded_to_bfloat16(x):  # 1.001 becomes 1
    return (x.to(torch.bfloat16) == 1)[:, None, None, :]


# ---- windows


@program("causal+window")
def sliding():
    _, q, k = index()
    return (k > q - 4) & (k <= q)


@program("causal+window")
def sliding_by_triu():
    return torch.ones(Q, K, dtype=torch.bool).tril() & torch.ones(Q, K).triu(-3).bool()


@program("bidirectional+window")
def only_the_past_is_limited():
    _, q, k = index()
    return k >= q


@program("causal+window")
def two_bounds():  # a band written as two bounds is exact: k <= q + 2 and q - k <= 3
    _, q, k = index()
    return (k <= q + 2) & (k >= q - 3)


# ---- caches


@program("causal", shape=(B, H, 1, 16))
def dynamic_cache_decode():
    _, q, k = index(1, 16, offset=15)
    return (k <= q).expand(B, -1, 1, 16)


@program("causal", torch.tensor(5), shape=(B, H, 1, 16))
def static_cache_decode(cumulative_length):
    _, q, k = index(1, 16, offset=cumulative_length)
    return (k <= q).expand(B, -1, 1, 16)


@program("causal+kv length+key padding", padding(B, 8), torch.tensor(5), shape=(B, H, 1, 16))
def static_cache_padded_mask(m, cumulative_length):
    b, q, k = index(1, 16, offset=cumulative_length)
    padded = torch.nn.functional.pad(m.bool(), (0, 8))
    return (k <= q) & padded[b, k]


@program("causal", shape=(B, H, Q, 2 * K))
def static_cache_prefill():
    _, q, k = index(Q, 2 * K)
    return k <= q


@program("causal+key padding", padding(B, 24), shape=(B, H, 8, 20))
def mask_longer_than_keys(m):
    b, q, k = index(8, 20, offset=12)
    return (k <= q) & m.bool()[b, k]


@program("causal+window+key padding", padding(B, 24), shape=(B, H, 1, 8))
def ring_buffer(m):
    b, q, k = index(1, 8, offset=16)
    k = k + 9
    return (k <= q) & (k > q - 8) & m.bool()[b, k]


# ---- packed sequences and chunks


def _packed(positions):
    b, q, k = index()
    breaks = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
    segment = breaks.cumsum(-1)
    return (k <= q) & (segment[b, q] == segment[b, k])


@program("causal")
def packed_default_positions():
    return _packed(torch.arange(Q).unsqueeze(0).expand(B, -1))


@program("causal+segments", PACKED)
def packed_user_positions(positions):
    return _packed(positions)


@program("causal+segments", padding())
def llama4_chunked(m):
    _, q, k = index()
    left = (m == 0).sum(-1)[:, None, None, None]
    return (k <= q) & ((k - left) // 4 == (q - left) // 4)


@program("bidirectional+segments")
def block_diagonal():
    _, q, k = index()
    return q // 3 == k // 3


# ---- biases: the geometry is proved, the bias reported


@program("causal+bias", torch.randn(B, H, Q, K))
def t5_bias_and_mask(bias):
    _, q, k = index()
    return torch.where(k <= q, bias, MIN)


@program("bidirectional+bias", torch.rand(H))
def alibi(slopes):
    k = torch.arange(K)
    return slopes[None, :, None, None] * k[None, None, None, :]


@program("causal+bias", torch.rand(H))
def alibi_masked_fill(slopes):
    _, q, k = index()
    bias = slopes[None, :, None, None] * (k - q) / 2
    return bias.masked_fill(k > q, MIN)


@program("bidirectional+bias")
def minus_five_is_not_a_mask():
    return torch.full((Q, K), -5.0).triu(1)


@program("bidirectional+key padding", padding())
def old_bert_from_integers(m):  # of zeros and ones; for a 2 it would add the largest number
    return (1.0 - m[:, None, None, :].float()) * MIN


@program("bidirectional+bias", torch.randn(B, 1, Q, 1))
def constant_along_the_row(row_bias):
    return row_bias.expand(B, 1, Q, K)


@program("bidirectional")
def documented_trap():  # bool(-inf) is True: the mask shifts every score by 1
    mask = torch.ones(Q, K, dtype=torch.bool).tril()
    return mask.masked_fill(~mask, -INF).float()


@program("bidirectional+bias")
def bool_triangle_added():
    return torch.ones(Q, K, dtype=torch.bool).tril().float()


@program("always masked")
def nothing():
    return torch.full((Q, K), MIN)
