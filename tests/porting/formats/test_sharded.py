"""Weights in several files with an index, as Hugging Face's libraries and Keras write them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch

from selfattn_core.porting import PortError, inspect, load, open_tensors
from tests.porting.originals import ORIGINALS


@pytest.fixture
def tensors():
    return {name: value.astype("f4") for name, value in ORIGINALS["heykeetae, plain"]().tensors.items()}


def sharded(folder, tensors, suffix):
    """Every second tensor in the second file, so that the layer is in neither."""
    kind = "bin" if suffix == ".bin" else "safetensors"
    files = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        file = f"{'pytorch_model' if kind == 'bin' else 'model'}-0000{number}-of-00002{suffix}"
        part = {name: tensors[name] for name in names}
        if kind == "bin":
            torch.save({name: torch.from_numpy(value) for name, value in part.items()}, folder / file)
        else:
            safetensors.numpy.save_file(part, folder / file)
        files |= dict.fromkeys(names, file)
    index = folder / ("pytorch_model.bin.index.json" if kind == "bin" else "model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}), encoding="utf-8")
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_index_of_hugging_face(suffix, prefix, tensors, tmp_path):
    index = sharded(tmp_path, {prefix + name: value for name, value in tensors.items()}, suffix)
    for path in (index, tmp_path):
        config, params = load(path, dialect="heykeetae")
        assert config.channels == 24
        assert (params["value.bias"] == tensors["net.attn.value_conv.bias"]).all()
        with open_tensors(path) as opened:
            assert len(opened) == len(tensors)


def test_a_folder_with_one_file(tensors, tmp_path):
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert [block.prefix for block in inspect(tmp_path).blocks] == ["net.attn."]


def test_files_that_are_not_there_are_named(tensors, tmp_path):
    index = sharded(tmp_path, tensors, ".safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        PortError, match=r"1 of its 2 files are not beside it: model-00002-of-00002.safetensors; download"
    ):
        inspect(index)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 10**5, "has an unknown format"),
        ('{"a": ' * 10**5, "is not JSON"),
        ('{"model_type": "gan"}', "is JSON without the weight_map"),
        ('{"weight_map": {}}', "is JSON without the weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "which is not a file beside the index"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "which is not a file beside the index"),
        ('{"weight_map": {"a": ".."}}', "which is not a file beside the index"),
        ('{"weight_map": {"a": []}}', "which is not a file beside the index"),
        ('{"weight_map": {"a": {"b": 1}}}', "which is not a file beside the index"),
        ('{"weight_map": {"a": "whole.safetensors"}}', "a: is not in whole.safetensors"),
        (
            '{"weight_map": {"net.attn.gamma": ["whole.safetensors", "whole.safetensors"]}}',
            "is in several files",
        ),
        (
            json.dumps({"weight_map": {str(n): f"{n}.bin" for n in range(501)}}),
            "names 501 files; at most 500",
        ),
    ],
)
def test_an_index_that_is_none_or_leads_elsewhere(content, message, tensors, tmp_path):
    safetensors.numpy.save_file(tensors, tmp_path / "whole.safetensors")
    (tmp_path / "index.json").write_text(content, encoding="utf-8")
    with pytest.raises(PortError, match=message):
        inspect(tmp_path / "index.json")


def test_one_file_of_several_leads_to_the_index(tensors, tmp_path):
    index = sharded(tmp_path, tensors, ".safetensors")
    for shard in sorted(tmp_path.glob("*-of-*")):
        advice = f"is one of several files of a model: name the index beside it, {index.name}, or the folder"
        assert advice in inspect(shard).to_text()
        with pytest.raises(PortError, match="is one of several files"):
            load(shard, dialect="heykeetae")
    assert "one of several" not in inspect(index).to_text()


def test_several_indices_are_not_chosen_from(tensors, tmp_path):
    sharded(tmp_path, tensors, ".safetensors")
    sharded(tmp_path, tensors, ".bin")
    with pytest.raises(PortError, match="holds 2 indices, name one"):
        inspect(tmp_path)


KERAS = """
import sys
import keras
import numpy as np
from selfattn_keras import SelfAttention2D
model = keras.Sequential([keras.Input((8, 9, 64)), SelfAttention2D(kv_pool=2, name="attn", gamma_initializer="ones")])
model.save_weights(f"{sys.argv[1]}/w.weights.json", max_shard_size=17_000 / 2**30)
np.savez(f"{sys.argv[1]}/w.npz", **{weight.path: np.asarray(weight) for weight in model.weights})
"""


def test_a_layer_of_keras_in_two_files(tmp_path):
    environment = os.environ | {"KERAS_BACKEND": "jax"}
    command = [sys.executable, "-c", KERAS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(tmp_path.glob("*.h5"))) > 1
    with np.load(tmp_path / "w.npz") as file:
        want = {name.partition("/")[2]: file[name] for name in file.files}
    for path in (tmp_path, tmp_path / "w.weights.json"):
        config, params = load(path, dialect="keras")
        assert config.kv_pool == 2
        for name, value in want.items():
            key = name.partition("/")[2].replace("/", ".")
            assert (params[key] == value.reshape(params[key].shape)).all()
    with pytest.raises(PortError):
        load(sorted(tmp_path.glob("*.h5"))[0], dialect="keras")


def test_two_files_of_keras_with_one_variable(tmp_path):
    from selfattn_core.porting import write_tensors

    for name in ("a", "b"):
        write_tensors(tmp_path / f"{name}.weights.h5", {"attn/gamma": np.ones(1)}, format="keras")
    files = ["a.weights.h5", "b.weights.h5"]
    (tmp_path / "w.weights.json").write_text(
        json.dumps({"weight_map": {"/attn/vars": files}}), encoding="utf-8"
    )
    with pytest.raises(PortError, match="its files hold attn/vars/0 twice"):
        inspect(tmp_path / "w.weights.json")


def test_metadata_of_mlx(tensors, tmp_path):
    """MLX writes null where there is none."""
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(tensors, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps({"__metadata__": None, **json.loads(content[8 : 8 + length])}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert [block.prefix for block in inspect(path).blocks] == ["net.attn."]
