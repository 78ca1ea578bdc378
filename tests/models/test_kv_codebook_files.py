"""Files of codebooks whose metadata are damaged: each is one clear refusal."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import flasheva_compile as fe
from flasheva_compile.errors import ConfigError
from flasheva_compile.quantization.codebooks import KvCodebooks
from tests.models.test_generate import llama, tokens

VQ, TC = "0", "1"  # places in the cache


@pytest.fixture(scope="module", name="stored")
def _stored(tmp_path_factory):
    """Tensors and metadata of a layer of codebooks and of one of words."""
    path = tmp_path_factory.mktemp("books") / "books.safetensors"
    fe.calibrate_kv(llama(), [tokens(1, 30)], {0: "vq-2bit", 1: "tc-4bit"}).save(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def refusal(path, tensors, metadata):
    save_file(tensors, path, metadata)
    with pytest.raises(ConfigError) as caught:
        KvCodebooks.load(path)
    assert caught.value.subject == str(path)
    return caught.value.message.removeprefix("is damaged: ")


WITHOUT = {name: f"there is no '{name}'" for name in ("layers", "model", "tokens")}
NO_METADATA = {
    **{f"no {name}": ({name: None}, message) for name, message in WITHOUT.items()},
    "tokens in words": ({"tokens": "many"}, "tokens are 'many'"),
    "cut off": ({"layers": '{"0": {'}, "layers are not JSON: "),
    "a list": ({"layers": "[]"}, "layers are not listed by their places in the cache"),
    "no place": ({"layers": '{"first": {}}'}, "layers are not listed by their places"),
    "a layer's number": ({"layers": '{"0": 3}'}, "layer 0: 3"),
}


@pytest.mark.parametrize(("change", "message"), NO_METADATA.values(), ids=NO_METADATA)
def test_damaged_metadata_are_refused(stored, tmp_path, change, message):
    tensors, metadata = stored
    metadata = {name: x for name, x in {**metadata, **change}.items() if x is not None}
    assert refusal(tmp_path / "x", tensors, metadata).startswith(message)


NAMES = ["scale", "keys", "values", "order"]
NO_LAYER = {
    **{
        f"no {name}": (VQ, {name: None}, f"layer 0: there is no '{name}'")
        for name in ("format", "kv_heads", "value_dim", "rotate_keys", "tensors")
    },
    "unknown format": (VQ, {"format": "vq-3bit"}, "layer 0: format 'vq-3bit' is not one of 'vq-4"),
    "format in fp8": (TC, {"format": "fp8"}, "layer 1: format 'fp8' is not one of 'vq-4"),
    "no whole size": (TC, {"head_dim": "8"}, "layer 1: head_dim is '8'"),
    "no flag": (VQ, {"rotate_values": 0}, "layer 0: rotate_values is 0"),
    "flag of codebooks": (TC, {"rotate_keys": True}, "layer 1: tc-4bit has no 'rotate_keys'"),
    "codebooks as words": (VQ, {"format": "tc-4bit"}, "layer 0: there is no tensor 'key_scale'"),
    "words as codebooks": (TC, {"format": "vq-4bit"}, "layer 1: there is no 'rotate_keys'"),
    "unknown fact": (TC, {"heads": 2}, "layer 1: tc-4bit has no 'heads'"),
    "names as text": (VQ, {"tensors": "scale"}, "layer 0: tensors is 'scale'"),
    "a name too few": (VQ, {"tensors": NAMES[1:]}, "layer 0: there is no tensor 'scale'"),
    "a name too many": (VQ, {"tensors": [*NAMES, "x"]}, "layer 0: vq-2bit has no 'x'"),
    "no name": (VQ, {"tensors": [*NAMES, ["x"]]}, "layer 0: vq-2bit has no ['x']"),
    "an offset left out": (VQ, {"tensors": NAMES}, "tensor 0.offset is of no layer"),
}


@pytest.mark.parametrize(("index", "change", "message"), NO_LAYER.values(), ids=NO_LAYER)
def test_damaged_descriptions_of_layers_are_refused(stored, tmp_path, index, change, message):
    tensors, metadata = stored
    layers = json.loads(metadata["layers"])
    changed = {name: x for name, x in {**layers[index], **change}.items() if x is not None}
    layers = json.dumps({**layers, index: changed})
    assert refusal(tmp_path / "x", tensors, {**metadata, "layers": layers}).startswith(message)


@pytest.mark.parametrize("name", ["0.values", "0.offset", "1.key_widths"])
def test_files_that_lack_a_tensor_are_refused(stored, tmp_path, name):
    tensors, metadata = stored
    less = {other: x for other, x in tensors.items() if other != name}
    assert refusal(tmp_path / "x", less, metadata) == f"there is no tensor {name}"
