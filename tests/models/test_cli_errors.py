"""Every way in which a command line can be wrong: one line, exit status 2, nothing written."""

from __future__ import annotations

import importlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flasheva_compile.cli import main
from tests.models.cli_commands import CONFIG, adapt, line, make_adapted, make_folder
from tests.models.evaluation_models import byte_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def adapted(folder):
    return make_adapted(folder)


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the model to break."""
    shutil.copytree(folder / "model", tmp_path / "broken")
    return tmp_path / "broken"


def test_missing_models_and_texts(folder, capsys, tmp_path):
    assert "nowhere: no such folder or file" in line(capsys, "explain", "nowhere")
    assert "there is no config.json" in line(capsys, "explain", tmp_path)
    nothing = ["--data", tmp_path / "nothing.txt"]
    for command in ("adapt", "calibrate"):
        said = line(capsys, command, folder / "model", *nothing, "--out", tmp_path / "out")
        assert "nothing.txt: no such file" in said
    assert "nothing.txt: no such file" in line(capsys, "eval", folder / "model", "--full", *nothing)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_models(broken, capsys):
    (broken / "config.json").write_text("{")
    assert "config.json: is not a JSON object" in line(capsys, "explain", broken)
    (broken / "config.json").write_text('{"model_type": "no such model"}')
    assert "cannot be loaded" in line(capsys, "explain", broken)
    (broken / "model.gguf").write_bytes(b"nothing")
    assert "cannot be loaded" in line(capsys, "explain", broken / "model.gguf")


def test_weights_that_are_missing_or_broken(broken, capsys):
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    said = line(capsys, "explain", broken)
    assert "lacks 1 weights, model.layers.1.mlp.up_proj.weight among them" in said
    (broken / "model.safetensors").write_bytes(b"0123456789")
    assert "cannot be loaded" in line(capsys, "explain", broken)
    (broken / "model.safetensors").unlink()
    assert "cannot be loaded" in line(capsys, "explain", broken)


def test_no_tokenizer(broken, folder, capsys, tmp_path):
    for path in broken.glob("tokenizer*"):
        path.unlink()
    command = ["calibrate", broken, "--data", folder / "text.txt", "--length", 64]
    said = line(capsys, *command, "--out", tmp_path / "out")
    assert "has no tokenizer that can be loaded" in said
    assert "--tokenizer" in said
    command += ["--config", CONFIG, "--rows", 1, "--out", tmp_path / "new", "--tokenizer"]
    assert "no such folder" in line(capsys, *command, tmp_path / "nothing")
    assert main([str(x) for x in (*command, folder / "model")]) == 0


def test_a_tokenizer_of_another_model(broken, folder, capsys, tmp_path):
    model = byte_llama(layers=1)
    model.resize_token_embeddings(80)
    model.save_pretrained(broken)
    command = ["--data", folder / "text.txt", "--length", 64, "--config", CONFIG, "--out"]
    for name in ("calibrate", "adapt"):
        said = line(capsys, name, broken, *command, tmp_path / name)
        assert "tokenizer: gives token id" in said
        assert "but the model has 80 tokens" in said
    said = line(capsys, "eval", broken, "--full", "--tasks", "passkey", "--lengths", 300)
    assert "but the model has 80 tokens" in said


def test_codebooks_that_cannot_be_written(folder, adapted, capsys, tmp_path):
    text = ["--data", folder / "text.txt", "--length", 64, "--rows", 1]
    command = ["calibrate", folder / "model", *text]
    assert "nothing to write" in line(capsys, *command)
    assert "--kv: 'vq-3bit' is not one of" in line(capsys, *command, "--kv", "vq-3bit")
    assert "'fp8' is not one of" in line(capsys, *command, "--kv", "fp8")
    said = line(capsys, *command, "--kv", "vq-2bit", "--config", CONFIG)
    assert "--config: changes the model" in said
    (tmp_path / "model.gguf").write_bytes(b"nothing")
    said = line(capsys, "calibrate", tmp_path / "model.gguf", *text, "--kv", "vq-2bit")
    assert "is a single file" in said
    shutil.copytree(adapted, tmp_path / "adapted")
    (tmp_path / "adapted" / "kv_codebooks.safetensors").write_text("")
    said = line(capsys, "calibrate", tmp_path / "adapted", *text, "--kv", "vq-2bit")
    assert "holds kv_codebooks.safetensors already" in said


def test_no_full_layer_to_learn_codebooks_for(folder, capsys, tmp_path):
    text = ["--data", folder / "text.txt", "--length", 64, "--rows", 1]
    out = tmp_path / "out"
    command = ["calibrate", folder / "model", *text, "--config", CONFIG, "--out", out]
    said = line(capsys, *command, "--kv", "vq-2bit")
    assert "no full attention" in said
    assert not (out / "config.json").exists()


def test_texts_that_are_too_short_or_no_text(folder, capsys, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    command = ["calibrate", folder / "model", "--out", tmp_path / "out", "--data", short]
    assert "the longest has 13 tokens, 2048 are needed" in line(capsys, *command)
    command = ["eval", folder / "model", "--full", "--data", short, "--tasks", "perplexity"]
    assert "the longest has 13 tokens, 1024 are needed" in line(capsys, *command)
    said = line(capsys, *adapt(folder, tmp_path / "adapt", "--batch-size", 1000))
    assert "rows of --length 64 do not fill a batch of 1000" in said
    short.write_text(" \n")
    assert "short.txt: is empty" in line(capsys, *command)
    short.write_bytes(b"\xff\xfe\xfa")
    assert "short.txt: is not UTF-8 text" in line(capsys, *command)


def test_wrong_configurations(folder, capsys, tmp_path):
    def said(config):
        return line(capsys, "explain", folder / "model", "--config", config)

    assert "is neither JSON nor a file" in said("nothing.json")
    assert "is not JSON" in said("{")
    assert "multiple of chunk_size=4" in said('{"window_size": 18, "chunk_size": 4}')
    assert 'did you mean "window_size"?' in said('{"window_size": 16, "windowsize": 4}')
    assert "must be less than 4" in line(capsys, *adapt(folder, tmp_path / "a", "--keep-full", 4))


def test_wrong_arguments(folder, capsys):
    model = folder / "model"
    assert "unknown task" in line(capsys, "eval", model, "--tasks", "passkeys")
    assert "recipe" in line(capsys, *adapt(folder, folder / "x", "--recipe", "slow"))
    assert "must be an integer >= 1, got '0'" in line(capsys, "explain", model, "--length", "0")
    assert "perplexity: needs --data" in line(capsys, "eval", model, "--tasks", "perplexity")
    assert "extractive: needs --items" in line(capsys, "eval", model, "--tasks", "extractive")
    said = line(capsys, "eval", model, "--full", "--data", "x", "--tasks", "agreement")
    assert "drop --full" in said
    for device in ("none", "cuda:99"):
        said = line(capsys, "explain", model, "--device", device)
        assert f"--device {device}: cannot be used" in said
    assert "required" in line(capsys)
    assert "invalid choice" in line(capsys, "evaluate", model)


def test_a_model_that_is_not_adapted(folder, capsys):
    said = line(capsys, "eval", folder / "model")
    assert "is not an adapted checkpoint" in said
    assert "--full" in said


def test_a_model_that_is_adapted_already(adapted, folder, capsys, tmp_path):
    command = adapt(folder, tmp_path / "out")
    command[1] = str(adapted)
    assert "is adapted already" in line(capsys, *command)


def test_folders_that_are_in_use(folder, adapted, capsys, tmp_path):
    assert "holds a model already" in line(capsys, *adapt(folder, adapted))
    (tmp_path / "file").write_text("")
    assert "is a file" in line(capsys, *adapt(folder, tmp_path / "file"))
    said = line(capsys, *adapt(folder, tmp_path / "new", "--resume"))
    assert "there is nothing to resume" in said
    state = tmp_path / "started" / "state"
    state.mkdir(parents=True)
    (state / "start.json").write_text(json.dumps({"--recipe": "distill", "--steps": 7}))
    assert "holds a run that was interrupted" in line(capsys, *adapt(folder, state.parent))
    said = line(capsys, *adapt(folder, state.parent, "--resume"))
    assert "--steps: the run was started with 7, not 6" in said


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate ..."),
    ],
)
def test_out_of_memory_names_the_setting(folder, adapted, capsys, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    for module, name in (("adapt", "adapt"), ("calibrate", "calibrate"), ("evaluate", "evaluate")):
        place = importlib.import_module(f"flasheva_compile.cli.{module}")
        monkeypatch.setattr(place, name, fail)
    said = line(capsys, *adapt(folder, tmp_path / "out"))
    assert "out of memory: lower --batch-size (now 2) or --length (now 64)" in said
    said = line(capsys, "eval", adapted, "--lengths", 300, 400)
    assert "out of memory: lower --batch-size (now 8) or --lengths (now [300, 400])" in said
    command = ["calibrate", folder / "model", "--data", folder / "text.txt", "--length", 64]
    said = line(capsys, *command, "--config", CONFIG, "--out", tmp_path / "calibrated")
    assert "out of memory: lower --batch-size (now 1) or --length (now 64)" in said


def test_other_errors_are_not_hidden(folder, adapted, monkeypatch):
    place = importlib.import_module("flasheva_compile.cli.evaluate")

    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(place, "evaluate", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["eval", str(adapted)])
