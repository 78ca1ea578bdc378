"""A second ``generate`` on a cache: its mask must say of stored tokens what the first said."""

from __future__ import annotations

import copy

import pytest
import torch

import flasheva_compile as fe
from flasheva_compile.errors import ConfigError
from tests.models.test_generate import GREEDY, SMALL, llama, tokens

REFUSED = "past_key_values: attention_mask says of stored tokens of row 0"
FEW_BITS = {"default": {"attention": "full", "kv": "fp8"}}
CONFIGS = {"pure": SMALL, "hybrid": {"default": SMALL, "0": "full"}, "few bits": FEW_BITS}


@pytest.fixture(params=(None, 64), ids=("growing", "preallocated"), name="room")
def _room(request):
    return request.param


@pytest.fixture(params=CONFIGS, name="model")
def _model(request):
    return fe.prepare(llama(), CONFIGS[request.param])


def first(model, room, mask=None):
    """Return a cache after one turn, its tokens, and a next turn for it."""
    cache = fe.FlashEvaCache.for_model(model, max_cache_len=room)
    ids = tokens(2, 12)
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, **GREEDY
    )
    return cache, torch.cat([out, tokens(2, 4, seed=2)], 1)


def second(model, cache, ids, mask):
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, **GREEDY
    )


@pytest.mark.parametrize("column", [3, 14], ids=("of the prompt", "generated"))
def test_hiding_a_stored_token_is_refused(model, room, column):
    cache, ids = first(model, room)
    mask = torch.ones_like(ids)
    mask[0, column] = 0
    for _ in range(2):
        with pytest.raises(ConfigError, match=REFUSED):
            second(model, cache, ids, mask)


def test_showing_a_hidden_token_is_refused(model, room):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    cache, ids = first(model, room, mask)
    with pytest.raises(ConfigError, match=REFUSED):
        second(model, cache, ids, torch.ones_like(ids))


def test_padding_of_a_row_that_ended_early_is_refused(model, room):
    """``generate`` takes tokens equal to the padding for masked ones, if it is given no mask."""
    cache, ids = first(model, room)
    ids[0, 15:18] = GREEDY["pad_token_id"]
    with pytest.raises(ConfigError, match=REFUSED):
        second(model, cache, ids, None)


def test_the_same_mask_goes_on(model, room):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    cache, ids = first(model, room, mask)
    whole = torch.nn.functional.pad(mask, (0, ids.shape[1] - 12), value=1)
    whole[1, -4] = 0  # a new token may be hidden
    cropped = copy.deepcopy(cache)
    out = second(model, cache, ids, whole)
    assert torch.equal(out, second(model, cropped, ids, whole))
    cache.reset()
    with pytest.raises(ConfigError, match=REFUSED):
        second(model, cropped, out, torch.ones_like(out))
    second(model, cache, ids, torch.ones_like(ids))  # it is empty


def test_rows_take_what_was_told_with_them(model, room):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    cache, ids = first(model, room, mask)
    whole = torch.nn.functional.pad(mask, (0, ids.shape[1] - 12), value=1)
    turned = torch.tensor([1, 0])
    cache.reorder_cache(turned)
    again = copy.deepcopy(cache)
    with pytest.raises(ConfigError, match=REFUSED):
        second(model, again, ids[turned], whole)
    second(model, cache, ids[turned], whole[turned])
    one = first(model, room, mask)[0]
    one.batch_select_indices(torch.tensor([1]))
    one.batch_repeat_interleave(2)
    second(model, one, ids[[1, 1]], whole[[1, 1]])


@pytest.mark.parametrize("hidden", [0, 3])
def test_what_was_appended_without_generate_is_told_too(model, room, hidden):
    ids, mask = tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[0, :hidden] = 0
    cache = fe.FlashEvaCache.for_model(model, max_cache_len=room)
    with torch.no_grad():
        model(ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache)
    other = mask.clone()
    other[0, :3] = hidden // 3
    with pytest.raises(ConfigError, match=REFUSED):
        second(model, cache, ids, other)
    second(model, cache, ids, mask)
