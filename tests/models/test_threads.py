"""Prepared models that several threads run at once, each with a cache of its own."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import flasheva_compile as fe
from tests.models.generation_models import build_language_model
from tests.models.test_generate import HYBRIDS, SMALL, gpt_neox, llama, tokens

CONFIGS = {
    **{name: HYBRIDS[name] for name in ("pure", "hybrid", "retrieval")},
    "fp8": {"default": SMALL, 0: {"attention": "full", "kv": "fp8"}},
}


def in_step(model, threads):
    """Let every attention wait until all threads have announced their cache to it."""
    barrier = threading.Barrier(threads, timeout=20)

    def wait(*_):
        barrier.wait()

    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(wait)


def run(model, ids, room=None):
    cache = fe.FlashEvaCache.for_model(model, max_cache_len=room)
    with torch.no_grad():
        parts = [model(x, past_key_values=cache).logits for x in ids.split((20, 1, 1, 5), 1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("room", [None, 64], ids=("growing", "preallocated"))
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_each_goes_through_its_own_cache(config, room):
    model = fe.prepare(llama(), config)
    rows = [tokens(1, 27, seed) for seed in range(3)]
    want = [run(model, ids, room) for ids in rows]
    in_step(model, len(rows))
    with ThreadPoolExecutor(len(rows)) as pool:
        got = list(pool.map(lambda ids: run(model, ids, room), rows))
    for ours, alone in zip(got, want, strict=True):
        assert torch.equal(ours, alone)


def test_one_has_a_cache_and_the_other_has_none():
    model = fe.prepare(llama(), HYBRIDS["hybrid"])
    ids = tokens(1, 27)
    want = run(model, ids)
    whole = model(ids, use_cache=False).logits
    calls = 4  # of `run`
    in_step(model, 2)
    with ThreadPoolExecutor(2) as pool:
        cached = pool.submit(run, model, ids)
        alone = pool.submit(lambda: [model(ids, use_cache=False).logits for _ in range(calls)])
        assert torch.equal(cached.result(), want)
        assert all(torch.equal(x, whole) for x in alone.result())


def test_a_copied_model_takes_no_announcement_with_it():
    """A call that failed left one: it must not reach the copy, nor any call after it."""
    model = fe.prepare(llama(), SMALL)
    want = model(tokens(1, 30), use_cache=False).logits

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(1, 12), past_key_values=fe.FlashEvaCache.for_model(model))
    handle.remove()
    for other in (copy.deepcopy(model), model):
        attention = other.model.layers[0].self_attn
        attention._forward_pre_hooks.clear()
        attention._forward_pre_hooks_with_kwargs.clear()
        own = other is model
        assert (attention.flasheva.announced.get() is not None) == own
    assert torch.equal(copy.deepcopy(model)(tokens(1, 30), use_cache=False).logits, want)


def test_models_are_prepared_one_after_the_other():
    builds = [llama, gpt_neox, lambda: build_language_model("gemma2", windows_off=True)]
    models = [build() for build in builds]

    def slow(*_):
        time.sleep(0.05)

    for model in models:
        model.get_input_embeddings().register_forward_hook(slow)
    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(lambda model: fe.prepare(model, SMALL), models))
    for model, build in zip(models, builds, strict=True):
        want = fe.prepare(build(), SMALL)(tokens(1, 30)).logits
        assert torch.equal(model(tokens(1, 30)).logits, want)
