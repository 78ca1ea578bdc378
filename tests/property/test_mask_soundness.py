"""Random mask programs: whatever the prover claims is exactly the mask, on every (b, h, q, k)."""

from __future__ import annotations

import random

import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.mask_oracle import assert_exact, prove_program

B, H, Q, K = 2, 2, 6, 8
INF = float("inf")


class Choices:
    """Draws from hypothesis or from a seeded generator."""

    def __init__(self, integer):
        self.integer = integer

    def pick(self, options):
        return options[self.integer(0, len(options) - 1)]


def program_of(choices, additive, depth=3):
    """A mask program as a function of (positions, padding, bias), and its text."""
    if additive:
        return additive_mask(choices, depth)
    return boolean_mask(choices, depth)


def leaf(c):
    n = c.integer(-3, 8)
    step = c.integer(1, 4)
    return c.pick(
        [
            (f"k<=q+{n}", lambda e: e.k <= e.q + n),
            (f"q-k<={n}", lambda e: e.q - e.k <= n),
            (f"k<{n}", lambda e: e.k < n),
            (f"q>={n}", lambda e: e.q >= n),
            ("pad[b,k]", lambda e: e.pad[e.b, e.k]),
            ("pad[b,q]", lambda e: e.pad[e.b, e.q] != 0),
            ("ints[:,None,None,:]", lambda e: e.ints[:, None, None, :] == n),
            ("packed", lambda e: packed(e.ints, e)),
            ("packed arange", lambda e: packed(torch.arange(K).expand(B, K) + n, e)),
            (f"q//{step}==k//{step}", lambda e: e.q // step == e.k // step),
            (f"(q-k)%{step}==0", lambda e: (e.q - e.k) % step == 0),
            (f"tril({n})", lambda e: torch.ones(Q, K, dtype=torch.bool).tril(n)),
            (f"triu({n})", lambda e: torch.ones(B, H, Q, K).triu(n) != 0),
            (f"start+{n}", lambda e: e.k >= e.ints[:, :1, None, None] + n),
            (f"abs<={n}", lambda e: (e.q - e.k).abs() <= n),
            (f"float k*{step}", lambda e: e.k.float() * step / 2 <= e.q.float()),
            ("cumulated", lambda e: e.pad.cumsum(-1)[:, None, None, :] >= e.q),
            (f"half k+{n}", lambda e: (e.k + n).to(torch.bfloat16) <= e.q),
            (f"min({n})", lambda e: torch.minimum(e.k, e.q + n) == e.k),
        ]
    )


def packed(positions, e):
    segment = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return segment[e.b, e.q] == segment[e.b, e.k]


def boolean_mask(c, depth):
    if depth == 0 or c.integer(0, 3) == 0:
        return leaf(c)
    (ta, a), (tb, b) = boolean_mask(c, depth - 1), boolean_mask(c, depth - 1)
    n = c.integer(1, 5)
    return c.pick(
        [
            (f"({ta})&({tb})", lambda e: a(e) & b(e)),
            (f"({ta})and({tb})", lambda e: torch.logical_and(a(e), b(e))),
            (f"({ta})|({tb})", lambda e: a(e) | b(e)),
            (f"~({ta})", lambda e: ~a(e)),
            (f"({ta})^({tb})", lambda e: a(e) ^ b(e)),
            (f"({ta})==({tb})", lambda e: a(e) == b(e)),
            (f"({ta})*({tb})", lambda e: a(e).int() * b(e) != 0),
            (f"where({ta},{tb})", lambda e: torch.where(a(e), b(e), a(e))),
            (f"fill({ta},{tb})", lambda e: full(a(e)).masked_fill(b(e), -INF)),
            (f"flip({ta})", lambda e: full(a(e)).flip(-1)),
            (f"pad({ta})", lambda e: torch.nn.functional.pad(full(a(e))[..., n:], (0, n))),
            (f"lpad({ta})", lambda e: torch.nn.functional.pad(full(a(e))[..., :-n], (n, 0))),
            (
                f"cat({ta},{tb})",
                lambda e: torch.cat([full(a(e))[..., :n], full(b(e))[..., n:]], -1),
            ),
            (f"reshape({ta})", lambda e: full(a(e)).reshape(B * H, Q, K).view(B, H, Q, K)),
            (f"double({ta})", lambda e: full(a(e)).transpose(0, 1).repeat(1, 2, 1, 1)[:, :2]),
            (f"in_place({ta},{tb})", lambda e: full(a(e)).clone().logical_and_(b(e))),
            (f"written({ta},{tb})", lambda e: written(full(a(e)).clone(), b(e), n)),
        ]
    )


def full(mask):
    return mask.expand(B, H, Q, K)


def written(mask, other, n):
    mask[..., :n] = full(other)[..., :n]
    return mask & True


def additive_mask(c, depth):
    ta, a = boolean_mask(c, depth - 1)
    value = c.pick([-INF, torch.finfo(torch.float32).min, -1e9, -1e4, -5.0])
    base = [
        (f"where({ta},0,{value})", lambda e: torch.where(a(e), 0.0, value)),
        (f"zeros.fill(~{ta},{value})", lambda e: torch.zeros(Q, K).masked_fill(~a(e), value)),
        (f"(1-{ta})*{value}", lambda e: (1.0 - a(e).float()) * value),
        (f"where({ta},bias,{value})", lambda e: torch.where(a(e), e.bias, value)),
    ]
    text, mask = c.pick(base)
    if depth == 1 or c.integer(0, 1):
        return text, mask
    tb, other = additive_mask(c, depth - 1)
    return c.pick(
        [
            (f"{text}+{tb}", lambda e: mask(e) + other(e)),
            (f"min({text},{tb})", lambda e: torch.minimum(mask(e), other(e))),
            (f"max({text},{tb})", lambda e: torch.maximum(mask(e), other(e))),
            (f"{text}+bias", lambda e: mask(e) + e.bias),
            (f"{text}-3", lambda e: mask(e) - 3),
        ]
    )


class Environment:
    def __init__(self, pad, ints, bias):
        self.pad, self.ints, self.bias = pad, ints, bias
        self.b = torch.arange(B)[:, None, None, None]
        self.q = torch.arange(Q)[None, None, :, None]
        self.k = torch.arange(K)[None, None, None, :]


def random_inputs(seed):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.rand(B, K, generator=g) < 0.7,
        torch.randint(-1, 4, (B, K), generator=g),
        torch.randn(B, 1, Q, K, generator=g),
    )


def check(choices, additive, seed):
    """Compare the proof with the mask; whether there was a complete proof."""
    text, function = program_of(choices, additive)

    def run(pad, ints, bias):
        return function(Environment(pad, ints, bias))

    inputs = random_inputs(seed)
    shape = (B, H, Q, K)
    gm, node, predicate = prove_program(run, inputs, shape)
    if predicate.unknown:
        return False
    try:
        for extra in range(3):
            assert_exact(gm, node, predicate, random_inputs(seed + extra), shape)
    except AssertionError as error:
        raise AssertionError(f"wrong proof of {text}: {predicate.describe()}") from error
    return True


@settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(st.data(), st.booleans(), st.integers(0, 1000))
def test_a_proof_is_the_mask(data, additive, seed):
    choices = Choices(lambda low, high: data.draw(st.integers(low, high)))
    event("proved" if check(choices, additive, seed) else "unknown")


def test_the_random_programs_are_not_all_unknown():
    generator = random.Random(0)
    choices = Choices(generator.randint)
    proved = sum(check(choices, additive=n % 2 == 0, seed=n) for n in range(60))
    assert proved >= 20
