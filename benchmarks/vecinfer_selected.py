"""Formats selected layer by layer, as arms of ``vecinfer_quality.py``."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import TYPE_CHECKING

from vecinfer_storage import Learning, Stored, stored_as

import flasheva_compile as fe
from flasheva_compile.adaptation.select_kv_formats import cheapest
from flasheva_compile.quantization.codebooks import KvCodebooks

if TYPE_CHECKING:
    from flasheva_compile.adaptation.kv_selection import KvSelection
    from flasheva_compile.quantization.learn import LearningOptions


class Candidates:
    """Formats to select from; layers are measured once for any number of bits.

    Args:
        names: The formats.
        options: How codebooks are learned.
    """

    def __init__(self, names: list[str], options: LearningOptions) -> None:
        self.names, self.options = names, options
        self.found: tuple[KvSelection, dict[str, KvCodebooks]] | None = None

    def measured(self, learning: Learning) -> tuple[KvSelection, dict[str, KvCodebooks]]:
        """Return what ``select_kv_formats`` finds with bits for everything, and codebooks."""
        if self.found is None:
            assert learning.others is not None
            model = copy.deepcopy(learning.model)
            model.set_attn_implementation("sdpa")
            fe.prepare(model, {"default": {"attention": "full", "kv": self.names[0]}})
            options = replace(self.options, iterations=learning.iterations)
            books = {
                name: fe.calibrate_kv(model, learning.rows.split(1), name, options=options)
                for name in self.names
            }
            selection = fe.select_kv_formats(model, [learning.others], list(books.values()), 16)
            self.found = selection, books
        return self.found


def selected(candidates: Candidates, bits: float, learning: Learning) -> Stored:
    """Store each layer in the format that is selected for it."""
    selection, books = candidates.measured(learning)
    divergence = {(score.index, score.format): score.divergence for score in selection.scores}
    own = {mixture.name: mixture.bits for mixture in selection.mixtures}
    # Layers of this model are alike: what a format takes of one is its share of all.
    costs = {key: round(100 * own[key[1]]) for key in divergence}
    formats = cheapest(divergence, costs, round(100 * bits * len(selection.formats)))
    chosen = KvCodebooks.chosen({index: books[name] for index, name in formats.items()})
    mean = sum(own[name] for name in formats.values()) / len(formats)
    return stored_as(chosen, json.dumps(formats), mean, learning.model)
