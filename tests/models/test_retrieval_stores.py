"""Options of the cache of retrieving models: a store in host memory, an exact prompt, bounds."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import flasheva_compile as fe
from flasheva_compile.errors import ConfigError
from flasheva_compile.generation import mapped_memory
from tests.models.test_generate import GREEDY, SMALL, generate, llama, tokens

RETRIEVING = {**SMALL, "retrieve_chunks": 2}
BY_BOUNDS = {**RETRIEVING, "retrieve_by": "bounds"}
EVERYTHING = {**SMALL, "retrieve_chunks": 100}


def logits(model, ids, mask=None, **options):
    """Return the logits of a prompt's last token and of 20 single steps."""
    cache = fe.FlashEvaCache.for_model(model, **options)
    made, at = [], ids.shape[1] - 20
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        for lo, hi in ((0, at), *((n, n + 1) for n in range(at, ids.shape[1]))):
            inputs = {"attention_mask": mask[:, :hi], "past_key_values": cache}
            made.append(model(ids[:, lo:hi], **inputs).logits[:, -1])
    return torch.stack(made, 1), cache


@pytest.mark.parametrize("config", [RETRIEVING, BY_BOUNDS, {**RETRIEVING, "window": "block"}])
@pytest.mark.parametrize("padding", [0, 7])
def test_a_store_on_the_host_computes_what_one_on_the_device_does(config, padding):
    model, ids = fe.prepare(llama(), config).double(), tokens(2, 75)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    here, _ = logits(model, ids, mask)
    there, cache = logits(model, ids, mask, store="offloaded")
    torch.testing.assert_close(there, here)
    assert cache.host_nbytes() > 0
    plain, _ = logits(fe.prepare(llama(), SMALL).double(), ids, mask)
    assert (plain - here).abs().max() > 1e-3, "nothing was retrieved"


def test_decoding_by_bounds_is_the_formula():
    model, ids = fe.prepare(llama(), BY_BOUNDS).double(), tokens(2, 75)
    stepped, _ = logits(model, ids)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, -21:]
    torch.testing.assert_close(stepped, whole)


def test_the_device_holds_no_exact_store():
    model, ids = fe.prepare(llama(), RETRIEVING), tokens(1, 400)
    _, here = logits(model, ids)
    _, there = logits(model, ids, store="offloaded")
    assert there.nbytes() < here.nbytes() / 2
    assert there.host_nbytes() > there.nbytes()


def test_generate_grows_the_host_s_store_and_reorders_it():
    model = fe.prepare(llama(), RETRIEVING)
    options = {**GREEDY, "max_new_tokens": 12, "num_beams": 2}
    here = model.generate(tokens(2, 60), **options)
    cache = fe.FlashEvaCache.for_model(model, store="offloaded")
    assert torch.equal(model.generate(tokens(2, 60), past_key_values=cache, **options), here)


def test_an_exact_prompt_is_the_model_as_it_was():
    model, ids = llama(), tokens(2, 60)
    with torch.no_grad():
        full = model(ids).logits
        fe.prepare(model, RETRIEVING)
        plain, exact = (fe.FlashEvaCache.for_model(model, prefill=p) for p in ("formula", "exact"))
        ours = model(ids, past_key_values=exact).logits
        torch.testing.assert_close(ours, full, rtol=1e-4, atol=1e-4)
        assert (model(ids, past_key_values=plain).logits - full).abs().max() > 1e-3
        # The first layer's keys are the same, so its chunk tokens and store are, too.
        for ours, theirs in zip(exact.layers[0].state, plain.layers[0].state, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert "exact prefill" in repr(exact.layers[0])
    assert "exact prefill" not in repr(plain.layers[0])


def test_an_exact_prompt_and_everything_retrieved_generates_what_the_model_did():
    model = llama()
    full = generate(model, tokens(1, 40))
    fe.prepare(model, EVERYTHING)
    cache = fe.FlashEvaCache.for_model(model, prefill="exact")
    ours = generate(model, tokens(1, 40), past_key_values=cache)
    assert torch.equal(ours.sequences, full.sequences)


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (RETRIEVING, {"store": "moon"}, "store"),
        (RETRIEVING, {"prefill": "none"}, "prefill"),
        (SMALL, {"store": "offloaded"}, "no layer has retrieve_chunks"),
        (SMALL, {"store": "fp8"}, "no layer has retrieve_chunks"),
        ({**RETRIEVING, "chunk_rule": "eva"}, {"store": "offloaded"}, "chunk_rule='eva'"),
        ({**RETRIEVING, "chunk_rule": "eva"}, {"store": "fp8"}, "chunk_rule='eva'"),
    ],
)
def test_what_does_not_fit_is_refused(config, options, words):
    model = fe.prepare(llama(), config)
    with pytest.raises(ConfigError, match=words):
        fe.FlashEvaCache.for_model(model, **options)


@pytest.mark.parametrize(
    ("config", "options"),
    [({**RETRIEVING, "retrieve_block": 4}, {}), (BY_BOUNDS, {"max_cache_len": 80})],
)
def test_a_store_on_the_host_is_preallocated_and_selects_in_blocks(config, options):
    model, ids = fe.prepare(llama(), config).double(), tokens(2, 75)
    here, _ = logits(model, ids, **options)
    there, _ = logits(model, ids, store="offloaded", **options)
    assert torch.equal(there, here)


@pytest.mark.parametrize("store", ["offloaded", "fp8"])
def test_a_store_beside_copies_of_what_is_near_rolls_back_and_is_copied(store):
    model, ids = fe.prepare(llama(), RETRIEVING), tokens(2, 60)
    with torch.no_grad():
        cache = fe.FlashEvaCache.for_model(model, store=store)
        model(ids[:, :50], past_key_values=cache)
        twin = copy.deepcopy(cache)
        assert twin.layers[0].state.keys.data_ptr() != cache.layers[0].state.keys.data_ptr()
        expected = model(ids[:, 50:], past_key_values=twin).logits
        near = [
            x.clone() for layer in cache.layers for x in (layer.state.near_k, layer.state.near_v)
        ]
        cache.activate_past_recording()
        model(ids[:, :10], past_key_values=cache)
        cache.crop(-10)
        # Only kernels read these copies: a step on a CPU would not notice.
        found = [x for layer in cache.layers for x in (layer.state.near_k, layer.state.near_v)]
        assert all(map(torch.equal, found, near))
        assert torch.equal(model(ids[:, 50:], past_key_values=cache).logits, expected)


def test_a_store_on_the_host_is_not_written_to_a_file(tmp_path):
    model = fe.prepare(llama(), RETRIEVING)
    _, cache = logits(model, tokens(1, 40), store="offloaded")
    with pytest.raises(ConfigError, match="host memory"):
        cache.save(model, tmp_path / "cache.safetensors")


@pytest.mark.parametrize("length", [None, 128])
@pytest.mark.parametrize("store", ["device", "offloaded", "fp8"])
def test_rows_follow_where_a_rollback_may_come(store, length):
    """Rows changed while tokens are recorded: state, copies of what is near, and record follow."""
    model, ids = fe.prepare(llama(), RETRIEVING), tokens(2, 60)
    options = {"store": store, "max_cache_len": length}
    cache, turned = (fe.FlashEvaCache.for_model(model, **options) for _ in range(2))
    with torch.no_grad():
        for given, row in ((cache, ids), (turned, ids.flip(0))):
            given.activate_past_recording()
            model(row[:, :40], past_key_values=given)
            given.crop(0)
            model(row[:, 40:50], past_key_values=given)
        cache.reorder_cache(torch.tensor([1, 0]))
        expect_same_state(cache, turned)
        for given in (cache, turned):
            given.crop(-7)
        expect_same_state(cache, turned)
        ours, theirs = (
            model(ids.flip(0)[:, 43:], past_key_values=given).logits for given in (cache, turned)
        )
        assert torch.equal(ours, theirs)


def expect_same_state(cache, other):
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        for name, x in ours.state._asdict().items():
            assert torch.equal(x, getattr(theirs.state, name)), name


# --- host memory, with a runtime that is not CUDA's -----------------------------------------------


@contextlib.contextmanager
def runtime(status=0):
    """Take the place of CUDA's runtime; yields what records its calls."""
    calls = mock.Mock()
    calls.cudaHostRegister.return_value = status
    with (
        mock.patch.object(mapped_memory, "_runtime", return_value=calls),
        mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "synchronize", calls.synchronize),
    ):
        yield calls


def test_pages_are_given_back_once_nothing_reads_them():
    device = torch.device("cuda", 0)
    with runtime() as calls:
        pages = mapped_memory._Pages(5000, device)
        address = pages.__cuda_array_interface__["data"][0]
        assert not calls.synchronize.called
        del pages
    calls.assert_has_calls(
        [
            mock.call.cudaHostRegister(address, 5000, 0),
            mock.call.synchronize(device),
            mock.call.cudaHostUnregister(address),
        ]
    )


@pytest.mark.parametrize(
    ("size", "status", "words"),
    [(1 << 47, 0, "134217728 MiB of host memory cannot be locked"), (1 << 20, 2, "CUDA error 2")],
)
def test_a_lack_of_host_memory_is_said(size, status, words):
    with runtime(status) as calls, pytest.raises(ConfigError, match=words):
        mapped_memory.mapped_zeros((size,), torch.uint8, torch.device("cuda", 0))
    assert not calls.cudaHostUnregister.called


LEFT_OVER = """
import torch
from tests.models.test_retrieval_stores import mapped_memory, runtime
context = runtime()
context.__enter__()
mapped_memory.left_over = mapped_memory._Pages(5000, torch.device("cuda", 0))
"""


def test_pages_that_live_until_the_interpreter_exits_are_no_trouble():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", LEFT_OVER]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "Exception ignored" not in done.stderr
