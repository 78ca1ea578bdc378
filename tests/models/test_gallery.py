"""A representative part of the gallery; ``make gallery`` surveys everything that is installed."""

from __future__ import annotations

import pytest
import torch

from tests.models.gallery import MODULES, survey

ENTIRELY = (
    "gemma",
    "phi3",
    "falcon",
    "modernbert",
    "distilbert",
    "git",
    "gpt_neo",
    "dinov3_vit",
    "wav2vec2",
    *MODULES,
)
PARTLY = {
    "bloom": "additive position bias",
    "mpt": "additive position bias",
    "gpt_oss": "cat between the product and the softmax",
    "whisper": "",
    "cpmant": "softmax weights go to masked_fill",
    "mobilebert": "cross-attention",
}


@pytest.fixture(autouse=True)
def _fast_path_as_it_was():
    fast = torch.backends.mha.get_fastpath_enabled()
    yield
    torch.backends.mha.set_fastpath_enabled(fast)


@pytest.mark.parametrize("name", ENTIRELY)
def test_architecture_is_rewritten_and_equal(name):
    entry = survey(name)
    assert not entry.failure
    assert entry.rewritten == entry.found > 0, entry.refused
    assert entry.exact == "yes"


@pytest.mark.parametrize("name", PARTLY)
def test_what_is_left_full_has_its_reason(name):
    entry = survey(name)
    assert not entry.failure
    assert entry.found
    assert all(PARTLY[name] in reason for reason in entry.refused)
    assert sum(entry.refused.values()) + entry.rewritten == entry.found
    assert not entry.rewritten or entry.exact == "yes"
