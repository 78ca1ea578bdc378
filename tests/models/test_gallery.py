"""A representative part of the gallery; ``make gallery`` surveys everything that is installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.models.attention_calls import attention_calls
from tests.models.gallery import survey
from tests.models.gallery_libraries import TORCH, missing

TRANSFORMERS = (
    "gemma",
    "phi3",
    "falcon",
    "modernbert",
    "distilbert",
    "git",
    "gpt_neo",
    "dinov3_vit",
    "wav2vec2",
    "bloom",
    "mobilebert",  # its values are not projected from what queries and keys are
    "openai-gpt",
    "mixtral",  # its experts' grouped products know no double precision
)
TRANSFORMERS_PARTLY = {
    "mpnet": "additive position bias",
    "gpt_oss": "cat between the product and the softmax",
    "whisper": "",
    "cpmant": "softmax weights go to masked_fill",
}
TORCH_PARTLY = {"torch.nn.TransformerDecoder": "cross-attention"}
X_TRANSFORMERS = (
    "x-transformers encoder, padded",
    "x-transformers decoder, rotary",
    "x-transformers decoder, grouped keys, SDPA",
    "x-transformers decoder, l2-normalised q and k",
)
X_TRANSFORMERS_PARTLY = {
    "x-transformers decoder, T5 bias": "additive position bias",
    "x-transformers decoder, sinks": "cat between the product and the softmax",
    "x-transformers decoder over an encoder": "cross-attention",
}
TIMM = ("timm vit_tiny_patch16_224", "timm eva02_tiny_patch14_224")
TIMM_PARTLY = {"timm swin_tiny_patch4_window7_224": ""}


def _of(library: str, names):
    reason = missing(library)
    return [pytest.param(n, marks=pytest.mark.skipif(bool(reason), reason=reason)) for n in names]


@pytest.fixture(autouse=True)
def _fast_path_as_it_was():
    fast = torch.backends.mha.get_fastpath_enabled()
    yield
    torch.backends.mha.set_fastpath_enabled(fast)


@pytest.mark.parametrize(
    "name",
    [
        *TRANSFORMERS,
        *(name for name in TORCH if name not in TORCH_PARTLY),
        *_of("x_transformers", X_TRANSFORMERS),
        *_of("timm", TIMM),
    ],
)
def test_architecture_is_rewritten_and_equal(name):
    entry = survey(name)
    assert not entry.failure
    assert entry.rewritten == entry.found == entry.ran > 0, entry.refused
    assert entry.exact == "yes"


REASONS = {**TRANSFORMERS_PARTLY, **TORCH_PARTLY, **X_TRANSFORMERS_PARTLY, **TIMM_PARTLY}


@pytest.mark.parametrize(
    "name",
    [
        *TRANSFORMERS_PARTLY,
        *TORCH_PARTLY,
        *_of("x_transformers", X_TRANSFORMERS_PARTLY),
        *_of("timm", TIMM_PARTLY),
    ],
)
def test_what_is_left_full_has_its_reason(name):
    entry = survey(name)
    assert not entry.failure
    assert entry.found == entry.ran > 0
    assert all(REASONS[name] in reason for reason in entry.refused)
    assert sum(entry.refused.values()) + entry.rewritten == entry.found
    assert not entry.rewritten or entry.exact == "yes"


class Attending(nn.Module):
    """Attention from four lines, twice from one; a router and a mixture that are none."""

    def __init__(self):
        super().__init__()
        self.mixture, self.heads = nn.Linear(4, 5), nn.Linear(2, 2)

    def forward(self, x):
        x = self.mixture(x).softmax(-1) @ x
        for _ in range(2):
            x = ((x @ x.transpose(1, 2)).float().softmax(-1).to(x.dtype) * 0.5).contiguous() @ x
        x = F.scaled_dot_product_attention(x, x, x)
        x = (-torch.cdist(x, x)).softmax(-1) @ x
        scores = (x @ x.transpose(1, 2)).unflatten(0, (1, 2)).permute(0, 2, 3, 1)
        x = (self.heads(scores).permute(0, 3, 1, 2).softmax(-1) @ x).flatten(0, 1)
        chosen = torch.topk((x @ x.transpose(1, 2)).softmax(-1), 2).values
        return chosen.sum(-1, keepdim=True) * x


def test_attentions_are_counted_without_the_matcher():
    _, places = attention_calls(Attending(), {"x": torch.randn(2, 5, 4)})
    assert [place.rpartition(":")[0] for place in places] == ["Attending.forward"] * 4
