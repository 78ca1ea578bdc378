"""The arms of ``adaptation_gpu.py`` as data: what each is, how it is prepared and trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from flasheva_compile.adaptation.recipes import FeatureNoise, Phase

WINDOW = 256
SINKS = 16
EVERYTHING = 8192  # a window of this size is full attention for all sequences here [tokens]
LEARNING_RATE = 2e-4
RULE_LEARNING_RATE = 1e-2
OUTPUT_STEPS = 48  # of a distillation: attention outputs, the rules' parameters alone

Placement = Literal["", "selected", "retrieval", "periodic"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to make a pretrained model cheaper.

    Attributes:
        name: Short and unique.
        config: Fields of ``EvaConfig`` of the layers that are not full.
        training: ``"none"``, ``"lm"``, ``"distill"`` or ``"paper"``; see :func:`recipe`.
        chunk_tokens: False = sinks and window alone.
        keep: How many layers stay full.
        placement: How they are chosen: by text, by text and pass keys, or evenly spread.
        compiled: Train through ``model.compile(backend="flasheva")``.
        seed: Of the order of training sequences.
        noise: What the ``eva`` rule adds to its random features in training.
        probe_lengths: Of the pass-key prompts that choose layers [tokens].
        probe_questions: How many questions on documents of 4000 tokens choose layers, too.
        select_length: Of the texts that choose layers [tokens].
        context_length: ``calibrate`` learns weights of bounds for it, from texts of that length
            [tokens]; None = none, and texts of 2048.
    """

    name: str
    config: dict[str, Any]
    training: str
    chunk_tokens: bool = True
    keep: int = 0
    placement: Placement = ""
    compiled: bool = False
    seed: int = 0
    noise: FeatureNoise = "none"
    probe_lengths: tuple[int, ...] = (2000, 6000)
    probe_questions: int = 0
    select_length: int = 2048
    context_length: int | None = None


def recipe(arm: Arm, steps: int) -> tuple[Phase, ...]:
    """Return the phases of an arm; see :func:`quiet_recipe`."""
    return tuple(replace(phase, feature_noise=arm.noise) for phase in quiet_recipe(arm, steps))


def quiet_recipe(arm: Arm, steps: int) -> tuple[Phase, ...]:
    """Return the phases of an arm without noise; every recipe sees the same tokens.

    - ``lm``: next tokens, all weights.
    - ``distill``: attention outputs (rules only; where there are parameters), then KL to the
      pretrained model's logits, all weights.
    - ``paper``: the attentions alone in fp32, a quarter of the steps; then all weights. The
      learning rate is 3e-4 throughout.
    """
    rate = {"learning_rate": LEARNING_RATE, "rule_learning_rate": RULE_LEARNING_RATE}
    everything = Phase(
        name="all weights",
        loss="language_model",
        trains="all",
        steps=steps,
        precision="bf16",
        **rate,
    )
    if arm.training == "lm":
        return (everything,)
    if arm.training == "paper":
        first = replace(
            everything,
            name="attention",
            trains="attention",
            steps=steps // 4,
            precision="fp32",
            learning_rate=3e-4,
            rule_learning_rate=None,
        )
        rest = replace(first, name="all weights", trains="all", precision="bf16")
        return first, replace(rest, steps=steps - steps // 4)
    logits = replace(everything, name="logits", loss="logits")
    learns = arm.chunk_tokens and arm.config["chunk_rule"] != "mean"
    if not learns or arm.config["window_size"] >= EVERYTHING:
        return (logits,)
    outputs = Phase(
        name="attention outputs",
        loss="attention_outputs",
        trains="rules",
        steps=min(OUTPUT_STEPS, steps // 4),
        learning_rate=5e-2,
        warmup=4,
        precision="bf16",
    )
    return outputs, replace(logits, steps=steps - outputs.steps)


def eva(rule: str = "tangent", chunk_size: int = 16, **changes: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return fields of ``EvaConfig``: sliding windows with sinks unless changed."""
    fields = {"window_size": WINDOW, "chunk_size": chunk_size, "sink_tokens": SINKS}
    return {**fields, "chunk_rule": rule, **changes}


FULL = eva("mean", window_size=EVERYTHING)
PROBED = {"placement": "retrieval"}
BLOCK = {"window": "block", "sink_tokens": 0}


def arms() -> tuple[Arm, ...]:
    """Return every arm, the most informative first."""
    without = {"config": eva("evabyte"), "chunk_tokens": False}
    found = [
        Arm(name="full", config=FULL, training="none"),
        Arm(name="window", training="none", **without),
        Arm(name="tangent c16", config=eva(), training="none"),
        Arm(name="full, lm", config=FULL, training="lm"),
        Arm(name="window, lm", training="lm", **without),
        Arm(name="tangent c16, lm", config=eva(), training="lm"),
        Arm(name="tangent c16, distill", config=eva(), training="distill"),
        Arm(name="window, distill", training="distill", **without),
        Arm(name="tangent c4, lm", config=eva(chunk_size=4), training="lm"),
    ]
    for keep, share in ((4, "1/8"), (8, "1/4")):
        for placement in ("selected", "periodic"):
            for training in ("lm", "distill")[: 1 if placement == "periodic" else 2]:
                name = f"tangent c16, {share} {placement}, {training}"
                options = {"keep": keep, "placement": placement, "training": training}
                found.append(Arm(name=name, config=eva(), **options))
    hybrid = {"keep": 4, "placement": "selected", "training": "lm"}
    distilled = {**hybrid, "training": "distill"}
    found += [
        Arm(name="window, 1/8 selected, lm", **without, **hybrid),
        Arm(name="tangent c8, lm", config=eva(chunk_size=8), training="lm"),
        Arm(name="mean c16, lm", config=eva("mean"), training="lm"),
        Arm(name="evabyte c16, lm", config=eva("evabyte"), training="lm"),
        Arm(name="eva c16, lm", config=eva("eva"), training="lm"),
        Arm(name="eva c16 block, paper", config=eva("eva", **BLOCK), training="paper"),
        Arm(name="tangent c16 block, lm", config=eva(**BLOCK), training="lm"),
        Arm(name="tangent c16, paper", config=eva(), training="paper"),
        Arm(name="tangent c4, distill", config=eva(chunk_size=4), training="distill"),
        Arm(name="tangent w512 c16, lm", config=eva(window_size=512), training="lm"),
        Arm(name="tangent w128 c16, lm", config=eva(window_size=128), training="lm"),
        Arm(name="tangent c16, 1/8 retrieval, lm", config=eva(), **{**hybrid, **PROBED}),
        Arm(name="tangent c16, 1/8 retrieval, distill", config=eva(), **{**distilled, **PROBED}),
        Arm(name="tangent c16, lm, compiled", config=eva(), training="lm", compiled=True),
        Arm(name="window, 1/8 selected, distill", **without, **distilled),
        Arm(name="tangent c16, lm, seed 1", config=eva(), training="lm", seed=1),
        Arm(name="window, lm, seed 1", **without, training="lm", seed=1),
        Arm(name="full, lm, seed 1", config=FULL, training="lm", seed=1),
        Arm(name="tangent c16 top-8, lm", config=eva(retrieve_chunks=8), training="lm"),
        Arm(
            name="tangent c32 top-16, lm",
            config=eva("tangent", 32, retrieve_chunks=16),
            training="lm",
        ),
        Arm(name="tangent c16 top-8, 1/8 selected, lm", config=eva(retrieve_chunks=8), **hybrid),
        *(
            Arm(name=f"{name}, {noise} noise", config=config, training=training, noise=noise)
            for name, config, training in (
                ("eva c16 block, paper", eva("eva", **BLOCK), "paper"),
                ("eva c16, lm", eva("eva"), "lm"),
            )
            for noise in ("clamped", "normal")
        ),
    ]
    return tuple(found)


def retrieval_arms() -> tuple[Arm, ...]:
    """Return arms of the retrieval tier without training, the most informative first."""
    without = {"config": eva("evabyte"), "chunk_tokens": False}
    found = [
        Arm(name="full", config=FULL, training="none"),
        Arm(name="window", training="none", **without),
        Arm(name="tangent c16", config=eva(), training="none"),
    ]
    sizes = [(16, 8), (32, 8), (16, 32), (16, 16), (32, 16), (16, 4), (8, 16), (32, 4)]
    for rule in ("tangent", "mean"):
        for chunk_size, count in sizes:
            config = eva(rule, chunk_size, retrieve_chunks=count)
            name = f"{rule} c{chunk_size} top-{count}"
            found.append(Arm(name=name, config=config, training="none"))
    for block in (16, 64):
        config = eva(retrieve_chunks=8, retrieve_block=block)
        found.append(Arm(name=f"tangent c16 top-8 block {block}", config=config, training="none"))
    for chunk_size, count in ((32, 8), (16, 16), (32, 16), (16, 32), (8, 32)):
        config = eva("tangent", chunk_size, retrieve_chunks=count, retrieve_by="bounds")
        name = f"tangent c{chunk_size} top-{count} by bounds"
        found.append(Arm(name=name, config=config, training="none"))
        name = f"{name}, weights"
        found.append(Arm(name=name, config=config, training="none", context_length=8192))
    for chunk_size, count in ((32, 3), (64, 2)):  # an eighth of the keys
        fields = {"window_size": 128, "retrieve_chunks": count, "retrieve_by": "bounds"}
        name = f"tangent w128 c{chunk_size} top-{count} by bounds"
        found.append(Arm(name=name, config=eva(chunk_size=chunk_size, **fields), training="none"))
    found += [_with_full_layers(count, keep) for count, keep in ((8, 2), (4, 3), (0, 5))]
    found += [_with_full_layers(count, keep, questions=16) for count, keep in ((8, 2), (4, 3))]
    wide = eva(chunk_size=32, window_size=512, retrieve_chunks=16)
    found.append(Arm(name="tangent w512 c32 top-16", config=wide, training="none"))
    return tuple(found)


def eighth_arms() -> tuple[Arm, ...]:
    """Return arms that touch an eighth of the keys of 8192 tokens, untrained and trained."""
    sizes = (  # rule, window, chunk, chunks, whether bounds select
        ("tangent", 128, 32, 6, False),
        ("tangent", 96, 32, 7, False),
        ("tangent", 64, 32, 8, False),
        ("tangent", 128, 64, 3, False),
        ("tangent", 64, 64, 4, False),
        ("tangent", 64, 64, 3, True),
        ("mean", 128, 64, 3, False),
    )
    found = []
    for rule, window, chunk_size, count, bounds in sizes:
        fields = {"window_size": window, "retrieve_chunks": count}
        by = {"retrieve_by": "bounds"} if bounds else {}
        name = f"{rule} w{window} c{chunk_size} top-{count}" + " by bounds" * bounds
        found.append((name, eva(rule, chunk_size, **fields, **by), {}))
    for window, chunk_size, count in ((128, 32, 2), (64, 32, 4), (128, 64, 1), (64, 64, 2)):
        fields = {"window_size": window, "retrieve_chunks": count}
        name = f"tangent w{window} c{chunk_size} top-{count}, 1 full"
        one = {"keep": 1, "placement": "selected", "select_length": 8192}
        found.append((name, eva("tangent", chunk_size, **fields), one))
    return tuple(
        Arm(
            name=name + f", {training}" * (training != "none"),
            config=config,
            training=training,
            **more,
        )
        for training in ("none", "distill", "lm")
        for name, config, more in found
    )


def _with_full_layers(count: int, keep: int, questions: int = 0) -> Arm:
    """Return an arm that touches a quarter of the keys, some of them in full layers."""
    retrieves = {"retrieve_chunks": count, "retrieve_by": "bounds"} if count else {}
    name = f"tangent c32 top-{count} by bounds" if count else "tangent c32"
    return Arm(
        name=f"{name}, {keep} full" + " for questions" * bool(questions),
        config=eva("tangent", 32, **retrieves),
        training="none",
        keep=keep,
        placement="retrieval",
        probe_lengths=(4000, 7600),
        probe_questions=questions,
        select_length=8192,
    )
