"""The retrieval tier on a GPU: against the formula, bit for bit again, under a CUDA graph."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING
from unittest import mock

import pytest
import torch
from flasheva_compile.kernels.blocked import retrieval_cache
from flasheva_compile.kernels.blocked.retrieval_select import Retrieval, largest_scores
from flasheva_compile.lowering import launch_retrieval_decode
from flasheva_compile.lowering.pooled_chunks import kernel_rule

import flasheva_compile as fe
from flasheva_compile.cache_ops import cache_settings, pool_chunks
from flasheva_compile.ops import flasheva_attention
from flasheva_compile.retrieval_cache_ops import new_retrieval_state, retrieval_options
from tests.attention_cases import AttentionCase
from tests.models.test_generate import SMALL, generate, llama, tokens
from tests.retrieval_cases import op_arguments, reference
from tests.tolerance import assert_as_accurate_as_pytorch

if TYPE_CHECKING:
    from flasheva_compile.kernels.blocked.retrieval_state import RetrievalState

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CASE = AttentionCase(queries=700, keys=700, head_dim=16, window_size=32, chunk_size=8)


def on_gpu(*args, parameters=(), **options):
    moved = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    cuda = [x.cuda() for x in args]
    out, lse = flasheva_attention(*cuda, parameters=[p.cuda() for p in parameters], **moved)
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize("mask", ["none", "left_padding", "segments_with_holes"])
@pytest.mark.parametrize(("chunks", "block"), [(3, 1), (3, 16), (1000, 1)])
def test_op_and_gradients_are_the_reference(mask, chunks, block):
    case = dataclasses.replace(CASE, mask=mask, softcap=5.0, alibi=True)
    options = {"retrieve_chunks": chunks, "retrieve_block": block}
    actual = case.run(on_gpu, torch.float64, **options)
    assert_as_accurate_as_pytorch(actual, reference(case, chunks, block), torch.float64)


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_and_backward_repeat_bit_for_bit(dtype, block):
    arguments, options = op_arguments(CASE, dtype, 3, block)
    first, second = [], []
    for results in (first, second):
        leaves = [x.detach().cuda().requires_grad_() for x in arguments[:6]]
        outputs = torch.ops.flasheva.retrieval_attention(*leaves, None, None, None, None, **options)
        results += [*outputs, *torch.autograd.grad(outputs[0].sum(), leaves)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("block", "by"), [(1, "token"), (4, "token"), (1, "bounds")])
def test_cuda_graph_of_a_step(block, by):
    config = {**SMALL, "retrieve_chunks": 2, "retrieve_block": block, "retrieve_by": by}
    model = fe.prepare(llama().cuda(), config)
    want = generate(model, tokens(1, 21).cuda()).sequences
    cache = fe.FlashEvaCache.for_model(model, max_batch_size=1, max_cache_len=64)
    with torch.no_grad():
        logits = model(want[:, :21], past_key_values=cache).logits
        token = logits[:, -1:].argmax(-1)
        step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        made = [token]
        for _ in range(29):
            logits = step(token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1).clone()
            made.append(token)
    assert torch.equal(torch.cat(made, 1), want[:, 21:])


# --- generation: kernels of one step --------------------------------------------------------------

STEPS = {
    "sliding": {},
    "block": {"window": "block"},
    "mean": {"rule": "mean"},
    "evabyte": {"rule": "evabyte"},
    "no sinks": {"sinks": 0},
    "d128": {"size": 128},
    "d80": {"size": 80},
    "d40": {"size": 40},
    "values": {"size": 64, "values": 96},
    "group": {"group": 7},
    "one chunk": {"chunks": 1},
    "more chunks than there are": {"chunks": 64},
    "padding": {"padding": True},
    "softcap": {"softcap": 20.0},
    "bounds": {"by": "bounds"},
    "bounds d128": {"by": "bounds", "size": 128, "padding": True},
    "fp8": {"store": "fp8"},
    "fp8 d80, padding": {"store": "fp8", "size": 80, "padding": True},
    "fp8 d128, block": {"store": "fp8", "size": 128, "window": "block", "sinks": 0},
    "bounds d80, block": {"by": "bounds", "size": 80, "window": "block", "softcap": 20.0},
}


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A cache that one call of ``prompt`` tokens fills, then steps of one token."""

    dtype: torch.dtype = torch.bfloat16
    rule: str = "tangent"
    window: str = "sliding"
    sinks: int = 16
    chunk: int = 16
    size: int = 64
    values: int = 0
    group: int = 4
    chunks: int = 8
    padding: bool = False
    softcap: float = 0.0
    by: str = "token"
    store: str = "device"
    batch: int = 3
    heads: int = 2
    prompt: int = 1200
    steps: int = 40

    @property
    def tokens(self) -> int:
        return self.prompt + self.steps

    @property
    def options(self):
        config = fe.EvaConfig(
            window_size=128,
            chunk_size=self.chunk,
            sink_tokens=self.sinks,
            window=self.window,
            chunk_rule=self.rule,
            retrieve_chunks=self.chunks,
            retrieve_by=self.by,
        )
        return retrieval_options(config, self.size**-0.5, self.softcap)

    @cached_property
    def inputs(self):
        """Return ``q, k, v``, parameters and the key mask of the whole sequence."""
        generator = torch.Generator(device="cuda").manual_seed(0)

        def normal(*shape):
            x = torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32)
            return x.bfloat16().to(self.dtype)

        kv = (self.batch, self.heads, self.tokens)
        q = normal(self.batch, self.heads * self.group, self.tokens, self.size)
        k, v = normal(*kv, self.size), normal(*kv, self.values or self.size)
        given = {"tangent": 1, "evabyte": 2, "mean": 0}[self.rule]
        parameters = [normal(self.heads, self.size) for _ in range(given)]
        mask = None
        if self.padding:
            mask = torch.rand(self.batch, self.tokens, generator=generator, device="cuda") > 0.2
            mask[1, :250] = False
            mask[2, : self.prompt + 5] = False
        return q, k, v, parameters, mask

    def step(self, at: int):
        q, k, v, parameters, mask = self.inputs
        part = [x[:, :, at : at + 1] for x in (q, k, v)]
        return part, parameters, None if mask is None else mask[:, at : at + 1]

    def filled(self) -> RetrievalState:
        q, k, v, parameters, mask = self.inputs
        state = new_retrieval_state(k, v, self.tokens, self.options, store=self.store)
        part = [x[:, :, : self.prompt] for x in (q, k, v)]
        new = None if mask is None else mask[:, : self.prompt]
        torch.ops.flasheva.retrieval_append(*part, parameters, new, *state, **self.options)
        return state


def kernel_step(case: Steps, at: int, state: RetrievalState):
    (q, k, v), parameters, mask = case.step(at)
    rule, settings = kernel_rule(case.rule, parameters), cache_settings(case.options)
    return launch_retrieval_decode.retrieval_decode(
        q, k, v, mask, tuple(parameters), state, settings, rule, case.chunks
    )


def blocked_step(case: Steps, at: int, state: RetrievalState, selected: torch.Tensor):
    """Do the same in plain PyTorch, with the kernels' selection: rounding may choose others."""
    (q, k, v), parameters, mask = case.step(at)
    pool, settings = partial(pool_chunks, parameters, case.options), cache_settings(case.options)
    retrieval = Retrieval(chunks=case.chunks, by=case.by)
    position, exact = retrieval_cache.write((k, v), mask, state, pool, settings, None)
    chosen = selected[:, :, None]
    return retrieval_cache.attend(q, position, exact, state, settings, retrieval, chosen)


def steps_by_kernels(case: Steps, state: RetrievalState | None = None):
    state = state or case.filled()
    found = [kernel_step(case, at, state) for at in range(case.prompt, case.tokens)]
    outs, lses, selected = zip(*found, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2), torch.stack(selected, 2), state


def steps_by_blocked_code(case: Steps, selected: torch.Tensor):
    state = case.filled()
    chosen = selected.unbind(2)
    steps = enumerate(range(case.prompt, case.tokens))
    found = [blocked_step(case, at, state, chosen[n]) for n, at in steps]
    outs, lses = zip(*found, strict=True)
    return [x.cpu() for x in (torch.cat(outs, 2), torch.cat(lses, 2), state.rfa_k, state.bounds)]


@pytest.mark.parametrize("fields", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_of_a_step_equal_the_blocked_code(fields, dtype):
    case = Steps(dtype=dtype, **fields)
    out, lse, selected, state = steps_by_kernels(case)
    assert (selected[0] >= 0).all()  # it sees more chunks than any case retrieves

    def formula(precision):
        return steps_by_blocked_code(dataclasses.replace(case, dtype=precision), selected)

    actual = [x.cpu() for x in (out, lse, state.rfa_k, state.bounds)]
    assert_as_accurate_as_pytorch(actual, formula, dtype)


@pytest.mark.parametrize("by", ["token", "bounds"])
def test_kernels_select_what_the_blocked_code_selects(by):
    """Scores are whole multiples of 1/64, many of them equal: no rounding, ties go by index."""
    sizes = {"chunk": 4, "chunks": 13, "prompt": 2000, "steps": 5}
    case = Steps(dtype=torch.float32, rule="mean", by=by, **sizes)
    q, k, v, parameters, mask = case.inputs
    vars(case)["inputs"] = (q.sign(), k.sign() * (k.abs() > 1), v, parameters, mask)
    state = case.filled()
    settings, room = cache_settings(case.options), state.rfa_k.shape[2]
    for at in range(case.prompt, case.tokens):
        (q, _, _), *_ = case.step(at)
        selected = kernel_step(case, at, state)[2]
        position = (state.length - 1 - state.start)[:, None]
        grouped = retrieval_cache._grouped(q, state, settings)
        scores = retrieval_cache._selector_scores(grouped, state, room, settings).amax(2)
        visible = retrieval_cache._visible_chunks(position, room, settings)[:, None]
        assert torch.equal(selected, largest_scores(scores, visible, case.chunks)[:, :, 0])


@pytest.mark.parametrize("by", ["token", "bounds"])
def test_the_op_runs_the_kernels_and_repeats_bit_for_bit(by):
    case, results = Steps(steps=8, by=by), []
    for _ in range(2):
        state = case.filled()
        for at in range(case.prompt, case.tokens):
            qkv, parameters, mask = case.step(at)
            inputs = (*qkv, parameters, mask, *state)
            with mock.patch.object(
                retrieval_cache, "retrieval_decode", side_effect=AssertionError("blocked code")
            ):
                results.append(torch.ops.flasheva.retrieval_decode(*inputs, **case.options))
    half = len(results) // 2
    for first, second in zip(results[:half], results[half:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("prompt", "by", "store"),
    [
        (130, "token", "device"),
        (130, "token", "fp8"),
        (65536, "token", "device"),
        (4096, "bounds", "device"),
        (4096, "bounds", "fp8"),
    ],
)
def test_a_captured_step_goes_on_by_itself(prompt, by, store):
    """One graph, over every phase of a chunk, equals steps that are launched one by one."""
    padding = {"batch": 3, "padding": prompt < 1000}
    case = Steps(prompt=prompt, steps=70, by=by, store=store, **padding)
    want = steps_by_kernels(case)
    state = case.filled()
    static = [x.clone() for x in case.step(prompt)[0]]
    parameters, mask = case.step(prompt)[1:]
    mask = None if mask is None else mask.clone()
    rule, settings = kernel_rule(case.rule, parameters), cache_settings(case.options)

    def step():
        return launch_retrieval_decode.retrieval_decode(
            *static, mask, tuple(parameters), state, settings, rule, case.chunks
        )

    before = [x.clone() for x in state]
    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse, selected = step()
    for x, old in zip(state, before, strict=True):
        x.copy_(old)
    found = []
    for at in range(prompt, case.tokens):
        new, _, flags = case.step(at)
        for x, fresh in zip(static, new, strict=True):
            x.copy_(fresh)
        if mask is not None:
            mask.copy_(flags)
        graph.replay()
        found.append((out.clone(), lse.clone(), selected.clone()))
    outs, lses, chosen = zip(*found, strict=True)
    assert torch.equal(torch.cat(outs, 2), want[0])
    assert torch.equal(torch.cat(lses, 2), want[1])
    assert torch.equal(torch.stack(chosen, 2), want[2])
    assert all(torch.equal(a, b) for a, b in zip(state, want[3], strict=True))


@pytest.mark.parametrize("by", ["token", "bounds"])
def test_kernels_of_a_step_at_64k(by):
    case = Steps(prompt=65536, steps=6, batch=2, by=by)
    out, lse, selected, _ = steps_by_kernels(case)
    assert (selected >= 0).all()

    def formula(precision):
        return steps_by_blocked_code(dataclasses.replace(case, dtype=precision), selected)[:2]

    assert_as_accurate_as_pytorch([out.cpu(), lse.cpu()], formula, case.dtype)
