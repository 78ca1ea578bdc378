"""With a window shorter than the text the compiled model computes the reference's numbers."""

from __future__ import annotations

import copy

import pytest
import torch

import flasheva_compile as fe
from flasheva_compile.config import EvaConfig
from tests.models.families import BY_NAME, FAMILIES, logits_of
from tests.models.oracle import assert_as_accurate, assert_same_to_rounding, run
from tests.models.reference_model import with_reference

LENGTH = 61  # no multiple of window or chunk
SMALL = EvaConfig(window_size=16, chunk_size=4, sink_tokens=1)
CASES = [
    pytest.param(family, implementation, padded, id=f"{family}-{implementation}-{padded=}")
    for family in FAMILIES
    for implementation, padded in (("sdpa", True), ("eager", False))
    if family.rewritten and not (padded and family.name in {"nanogpt", "vit"})
]
RULES = [
    EvaConfig(window_size=16, chunk_size=4, sink_tokens=0, chunk_rule="eva", window="block"),
    EvaConfig(window_size=16, chunk_size=8, sink_tokens=0, chunk_rule="evabyte", window="block"),
    EvaConfig(window_size=8, chunk_size=2, sink_tokens=3, chunk_rule="mean"),
    EvaConfig(window_size=16, chunk_size=4, chunk_rule="eva"),
]


def compare(family, model, inputs, options, choose):
    """The compiled model against the reference, forward and every gradient."""
    exact = in_double_reference(model, inputs, choose)
    with with_reference(model, choose):
        theirs = run(model._call_impl, model, inputs)
    model.compile(backend="flasheva", options={**options, "inner_backend": "aot_eager"})
    ours = run(model, model, inputs)
    assert_same_to_rounding(ours, [theirs], exact)
    return ours


def in_double_reference(model, inputs, choose):
    doubled = copy.deepcopy(model).double()
    with with_reference(doubled, choose):
        floats = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
        return run(doubled, doubled, floats)


@pytest.mark.parametrize(("family", "implementation", "padded"), CASES)
def test_every_family(family, implementation, padded):
    model = family.build(implementation).eval()
    inputs = family.inputs(padded=padded, length=LENGTH)
    options = {n: v for n, v in SMALL.to_dict().items() if n != "version"}
    ours = compare(family, model, inputs, options, lambda path: SMALL)
    plain = run(model._call_impl, model, inputs)
    gap = (ours.logits - plain.logits).abs().max()
    assert gap > 1e-3 * plain.logits.abs().max(), "nothing was approximated: the test is blind"


@pytest.mark.parametrize("config", RULES, ids=lambda c: f"{c.chunk_rule}-{c.window}")
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_every_rule(config, name):
    family = BY_NAME[name]
    model = family.build("sdpa").eval()
    compare(
        family,
        model,
        family.inputs(padded=True, length=LENGTH),
        {"config": config},
        lambda path: config,
    )


def test_layers_differ():
    family = BY_NAME["llama"]
    model = family.build("sdpa").eval()
    layers = {"default": {"window_size": 8, "chunk_size": 4}, 0: "full", 1: {"chunk_size": 2}}
    hybrid = fe.HybridConfig.from_dict(layers)
    chosen = {
        "model.layers.0.self_attn": "full",
        "model.layers.1.self_attn": hybrid.rules[1].config,
    }
    inputs = family.inputs(padded=True, length=LENGTH)
    compare(family, model, inputs, {"layers": layers}, lambda path: chosen.get(path))


@pytest.mark.parametrize("padding", [0, 3, 11])
def test_left_padding_does_not_change_real_tokens(padding):
    family = BY_NAME["llama"]
    model = family.build("sdpa").eval()
    model.compile(backend="flasheva", options={"window_size": 8, "chunk_size": 4, "strict": True})
    ids = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(0))
    alone = _padded_logits(model, ids, 0)
    double = family.build("sdpa").eval().double()
    options = {"window_size": 8, "chunk_size": 4, "inner_backend": "eager"}
    double.compile(backend="flasheva", options=options)
    exact = _padded_logits(double, ids, 0)
    assert_as_accurate(_padded_logits(model, ids, padding), [alone], exact)


def _padded_logits(model, ids, padding):
    """Logits of ``ids`` behind some padding, beside another row that has none."""
    length = ids.shape[1] + padding
    other = torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(1))
    row = torch.cat([torch.zeros(1, padding, dtype=torch.long), ids], 1)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :padding] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        output = model(
            input_ids=torch.cat([row, other]), attention_mask=mask, position_ids=position_ids
        )
    return logits_of(output)[0, padding:]


def test_a_row_does_not_depend_on_the_others():
    family = BY_NAME["llama"]
    model = family.build("sdpa").eval()
    options = {"window_size": 8, "chunk_size": 4, "inner_backend": "eager"}
    model.compile(backend="flasheva", options=options)
    inputs = family.inputs(padded=True, length=LENGTH)
    with torch.no_grad():
        before = logits_of(model(**inputs))[1]
        inputs["input_ids"] = inputs["input_ids"].clone()
        inputs["input_ids"][0] = 5
        inputs["attention_mask"] = inputs["attention_mask"].clone()
        inputs["attention_mask"][0, :17] = 0
        after = logits_of(model(**inputs))[1]
    assert torch.equal(before, after)


def test_decoding_with_a_growing_cache_equals_one_forward():
    """Token by token over the model's own cache, with and without a mask in the graph."""
    family = BY_NAME["llama"]
    options = {"window_size": 8, "chunk_size": 4, "inner_backend": "eager"}
    ids = torch.randint(3, 64, (2, 44), generator=torch.Generator().manual_seed(0))

    def whole(dtype):
        torch._dynamo.reset()
        model = family.build("sdpa").eval().to(dtype)
        model.compile(backend="flasheva", options=options)
        return model(input_ids=ids, use_cache=False).logits[:, 30:]

    with torch.no_grad():
        exact, once = whole(torch.float64), whole(torch.float32)
        model = family.build("sdpa").eval()
        model.compile(backend="flasheva", options=options)
        cache = model(input_ids=ids[:, :31], use_cache=True)
        steps = [cache.logits[:, -1]]
        for position in range(31, ids.shape[1]):
            cache = model(
                input_ids=ids[:, position : position + 1], past_key_values=cache.past_key_values
            )
            steps.append(cache.logits[:, -1])
    assert fe.explain(model).unexpected == ()
    assert_as_accurate(torch.stack(steps, 1), [once], exact)
