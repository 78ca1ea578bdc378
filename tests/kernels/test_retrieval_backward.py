"""Kernels of the retrieval tier's backward pass: source text and offline compiles.

Its laws are in ``retrieval_backward_laws.py``. ``FLASHEVA_COMPILE=full`` compiles all specs for all
targets: minutes.
"""

from __future__ import annotations

import os

import pytest
import torch
from flasheva_compile.kernels.blocked.retrieval_select import Retrieval
from flasheva_compile.lowering import launch_retrieval_backward
from flasheva_compile.lowering.emit.module import emit
from flasheva_compile.lowering.offline import TARGETS, resources
from flasheva_compile.lowering.rows import Rows
from flasheva_compile.lowering.schedule import choose, known_target
from flasheva_compile.lowering.selection_lists import selection_lists

from tests.kernels import test_source
from tests.kernels.test_retrieval_forward import call


def specs():
    """Return specs by name: dtypes, head sizes, groups, blocks, as launches ask for them."""
    calls = {
        "bf16-d64-g4": (call(), (8, 1)),
        "bf16-d128-g4-block16": (call(size=128), (16, 16)),
        "bf16-d128-g8": (call(size=128, group=8), (32, 1)),
        "fp16-d80-softcap": (call(torch.float16, 80, 2, softcap=20.0), (8, 64)),
        "fp32-d64": (call(torch.float32, group=2), (8, 16)),
    }
    found = {}
    for name, ((t, s), (chunks, block)) in calls.items():
        retrieval = Retrieval(chunks=chunks, block=block)
        of_call = launch_retrieval_backward.specs(t, Rows(documents="dense"), s, retrieval)
        found |= {f"{name}-{kind}": spec for kind, spec in of_call.items() if kind != "dsink"}
    return found


SPECS = specs()
FULL = os.environ.get("FLASHEVA_COMPILE") == "full"
EVERYWHERE = [n for n in SPECS if FULL or n in ("bf16-d64-g4-dchunk", "bf16-d64-g4-retrieved_dkv")]
MATRIX = [("sm_90", n) for n in SPECS if FULL or n.startswith("bf16-d128-g4")]
MATRIX += [(target, n) for target in ("sm_80", "sm_100", "gfx942") for n in EVERYWHERE]


@pytest.mark.parametrize(("target", "name"), MATRIX)
def test_compiles_within_the_limits_of_the_target(target, name, tmp_path, monkeypatch):
    for cache in ("FLASHEVA_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(cache, str(tmp_path))
    spec = SPECS[name]
    used = resources(emit(spec, choose(spec, known_target(target))), target)
    assert used.problems() == (), used
    assert used.shared <= TARGETS[target].shared_limit
    assert used.matrix or spec.dtype == "fp32"


def test_text_is_complete():
    kernels = {name: emit(spec, choose(spec)) for name, spec in SPECS.items()}
    test_source.test_arguments_are_those_that_the_body_reads(kernels)
    test_source.test_every_name_is_defined(kernels)


def test_other_calls_run_the_blocked_code():
    retrieval, dense = Retrieval(chunks=8), Rows(documents="dense")
    (t, s), covers = call(), launch_retrieval_backward.covers
    selected = torch.empty(1, 2, 96, 6, dtype=torch.int32, device="meta")
    assert covers(t, dense, s, retrieval, selected)
    assert not covers(t, Rows(documents="packed"), s, retrieval, selected)
    assert not covers(t, dense, call(dropout_p=0.1)[1], retrieval, selected)
    assert not covers(t, dense, s, Retrieval(chunks=33), selected)
    assert not covers(call(group=9)[0], dense, s, retrieval, selected)
    huge = selected.expand(1, 2, 96, 6).new_empty(2, 2, 2**26, 8)
    assert not covers(t, dense, s, retrieval, huge)


@pytest.mark.parametrize("piece_size", [1, 3, 100])
def test_lists_name_every_group_that_selected_a_chunk_once_and_in_order(piece_size):
    groups, chunks, picks = 23, 7, 4
    generator = torch.Generator().manual_seed(piece_size)
    scores = torch.rand(2, 3, groups, chunks, generator=generator)
    chosen = scores.topk(picks).indices.sort(-1).values
    some = torch.randint(0, picks + 1, (2, 3, groups, 1), generator=generator)
    selected = torch.where(torch.arange(picks) < some, chosen, -1).int()
    lists = selection_lists(selected, chunks, piece_size)
    for row, slots in enumerate(selected.flatten(0, 1)):
        for chunk in range(chunks):
            begin, end = lists.first_member[row, chunk : chunk + 2]
            wanted = (slots == chunk).any(-1).nonzero().flatten() + row * groups
            assert torch.equal(lists.members[begin:end].long(), wanted)
            first, last = lists.first_piece[row, chunk : chunk + 2].tolist()
            pieces = (lists.piece_chunk[row] == chunk).nonzero().flatten().tolist()
            assert pieces == list(range(first, last))
            assert len(pieces) == -(-len(wanted) // piece_size)
    assert bool((lists.piece_chunk <= chunks).all())
