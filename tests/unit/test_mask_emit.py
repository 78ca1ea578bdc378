"""Key masks and segments written back into a graph compute what the predicate says."""

from __future__ import annotations

import pytest
import sympy as sp
import torch

from flasheva_compile.masks.emit import NotEmitted, emit_key_tensor
from flasheva_compile.masks.symbolic import BATCH, KEY
from tests.mask_oracle import Oracle, Recorder, prove_program
from tests.mask_programs import FULL, PROGRAMS, B, K, old_bert_from_bool, padding


def program_named(name):
    return next(p for p in PROGRAMS if p.id == name)


def emitted(predicate_formula, predicate, inputs, sizes=(B, K)):
    """Write the formula into a new graph that takes the opaque tensors, and run it."""
    graph, nodes, values = torch.fx.Graph(), {}, []
    for name, node in predicate.nodes.items():
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["example_value"] = node.meta["val"]
        values.append(inputs[name])
    result = emit_key_tensor(graph, predicate_formula, nodes, *sizes)
    assert isinstance(result, torch.fx.Node), result
    graph.output(result)
    graph.lint()
    return torch.fx.GraphModule({}, graph)(*values), graph


def recorded(gm, predicate, inputs):
    recorder = Recorder(gm)
    recorder.run(*inputs)
    return {name: recorder.values[node] for name, node in predicate.nodes.items()}


EMITTED = [p for p in PROGRAMS if "key padding" in p.kind]


@pytest.mark.parametrize("case", EMITTED, ids=lambda p: p.id)
def test_emitted_key_mask_is_the_key_mask(case):
    gm, _, predicate = prove_program(case.function, case.inputs, case.shape, case.as_)
    values = recorded(gm, predicate, case.inputs)
    batch, _, _, keys = case.shape
    mask, _ = emitted(predicate.key_mask, predicate, values, (batch, keys))
    assert mask.shape == (batch, keys)
    assert mask.dtype == torch.bool
    expected = evaluate(predicate.key_mask, gm, predicate, case)
    within = torch.arange(keys) < min([int(n) for n in predicate.kv_length], default=keys)
    assert torch.equal(mask & within, expected & within)


def evaluate(formula, gm, predicate, case):
    recorder = Recorder(gm)
    recorder.run(*case.inputs)
    return Oracle(predicate, recorder.values, case.shape)(formula)[:, 0, 0, :]


@pytest.mark.parametrize("name", ["packed_user_positions", "llama4_chunked", "block_diagonal"])
def test_emitted_segments(name):
    case = program_named(name)
    gm, _, predicate = prove_program(case.function, case.inputs, case.shape)
    values = recorded(gm, predicate, case.inputs)
    if not values:
        graph = torch.fx.Graph()
        graph.output(emit_key_tensor(graph, predicate.segments, {}, B, K, device="cpu"))
        segments = torch.fx.GraphModule({}, graph)()
    else:
        segments, _ = emitted(predicate.segments, predicate, values)
    assert segments.shape == (B, K)
    assert torch.equal(segments, evaluate(predicate.segments, gm, predicate, case))


def test_plain_padding_is_the_node_itself():
    _gm, _, predicate = prove_program(old_bert_from_bool, (padding().bool(),), FULL)
    mask = padding().bool()
    (name,) = predicate.nodes
    result, graph = emitted(predicate.key_mask, predicate, {name: mask})
    assert [n.op for n in graph.nodes] == ["placeholder", "output"]
    assert torch.equal(result, mask)


def test_unknown_tensor_is_not_emitted():
    case = program_named("hf_eager_with_padding")
    predicate = prove_program(case.function, case.inputs, case.shape)[2]
    result = emit_key_tensor(torch.fx.Graph(), predicate.key_mask, {}, B, K)
    assert isinstance(result, NotEmitted)
    assert "no node" in result.reason


def test_unknown_operation_is_not_emitted():
    result = emit_key_tensor(torch.fx.Graph(), sp.Eq(sp.exp(KEY), 1), {}, B, K, device="cpu")
    assert isinstance(result, NotEmitted)
    assert "exp" in result.reason


def symbolic_sizes_graph():
    """``[B, S]`` padding whose sizes are nodes, as Dynamo passes them."""
    graph = torch.fx.Graph()
    batch, length, mask = (graph.placeholder(n) for n in ("batch", "length", "mask"))
    return graph, batch, length, mask


def test_sizes_may_be_nodes():
    graph, batch, length, mask = symbolic_sizes_graph()
    formula = sp.And(sp.Ne(sp.Function("mask", integer=True)(0, KEY), 0), KEY < 6)
    graph.output(emit_key_tensor(graph, formula, {"mask": mask}, batch, length, device="cpu"))
    row = padding(1, 8)
    result = torch.fx.GraphModule({}, graph)(3, 8, row)
    assert torch.equal(result, (row.bool() & (torch.arange(8) < 6)).expand(3, 8))


def test_index_outside_the_tensor_is_guarded_by_the_formula():
    graph, batch, length, mask = symbolic_sizes_graph()
    formula = sp.And(KEY < 5, sp.Ne(sp.Function("mask", integer=True)(BATCH, KEY), 0))
    graph.output(emit_key_tensor(graph, formula, {"mask": mask}, batch, length, device="cpu"))
    short = padding(2, 5)
    result = torch.fx.GraphModule({}, graph)(2, 9, short)
    assert torch.equal(result, torch.nn.functional.pad(short.bool(), (0, 4)))


def test_size_symbol_takes_its_node():
    graph, batch, length, _ = symbolic_sizes_graph()
    past = sp.Symbol("s0", integer=True, positive=True)
    formula = past <= KEY + BATCH
    node = emit_key_tensor(graph, formula, {"s0": length}, batch, 7, device="cpu")
    graph.output(node)
    result = torch.fx.GraphModule({}, graph)(2, 4, None)
    assert result.tolist() == [[b + k >= 4 for k in range(7)] for b in range(2)]


def test_without_a_device_there_is_no_index():
    graph, batch, length, mask = symbolic_sizes_graph()
    assert isinstance(emit_key_tensor(graph, KEY < 3, {"mask": mask}, batch, length), NotEmitted)
