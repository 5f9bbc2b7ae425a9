"""What is not read says what it is, and which call makes a file that is; each advice is followed here where it can be."""

import gzip
import json
import warnings
import zipfile

import numpy as np
import pytest
import torch
from flax import serialization

import selfattn_core
import selfattn_torch
from selfattn_core import SelfAttentionConfig
from selfattn_core.porting import PortError, inspect, load, open_tensors, port, verify
from tests.porting.checkpoints import written
from tests.porting.originals import ORIGINALS


def said(path):
    with pytest.raises(PortError) as caught:
        inspect(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth.gz", gzip.compress(b"x" * 99, mtime=0), "is compressed with gzip. Unpack it with gunzip"),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Run `git lfs pull`"),
        (
            "a.pth",
            b"\n<!DOCTYPE html><html><body>Quota exceeded",
            "is a web page, saved instead of the file",
        ),
        ("a.safetensors", b"<html>", "is a web page"),
        ("a.mat", b"MATLAB 5.0 MAT-file", "scipy.io.loadmat"),
        ("a.onnx", b"\x08\x07\x12\x07pytorch", "onnx.numpy_helper.to_array"),
        ("a.pb", b"\x0a\x10\x0a\x01x", "is a graph of TensorFlow"),
        ("a.tflite", b"\x1c\0\0\0TFL3", "is a model of LiteRT"),
    ],
)
def test_what_it_is_and_what_to_do(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert message in said(tmp_path / name)


def test_a_dictionary_in_one_array_of_numpy(tmp_path):
    arrays = {"attn.gamma": np.ones(1), "w": np.ones(3)}
    path = tmp_path / "a.npy"
    np.save(path, arrays, allow_pickle=True)
    advice = said(path)
    assert "numpy.savez('weights.npz', **numpy.load(PATH, allow_pickle=True).item())" in advice
    np.savez(tmp_path / "weights.npz", **np.load(path, allow_pickle=True).item())
    with open_tensors(tmp_path / "weights.npz") as opened:
        assert set(opened) == set(arrays)


def test_a_dictionary_in_an_npz(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, weights=np.array({"w": np.ones(3)}, dtype=object))
    assert "numpy.savez(NEW, **numpy.load(PATH, allow_pickle=True)['weights'].item())" in said(path)
    np.savez(tmp_path / "new.npz", **np.load(path, allow_pickle=True)["weights"].item())
    with open_tensors(tmp_path / "new.npz") as opened:
        assert set(opened) == {"w"}


def test_a_program_of_torch_export(tmp_path):
    layer = torch.nn.Linear(3, 2)
    path = tmp_path / "a.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(layer, (torch.ones(1, 3),)), path)
        assert "torch.save(torch.export.load(PATH).state_dict, 'weights.pth')" in said(path)
        torch.save(torch.export.load(path).state_dict, tmp_path / "weights.pth")
    with open_tensors(tmp_path / "weights.pth") as opened:
        assert set(opened) == {"weight", "bias"}


def test_a_checkpoint_in_a_zip_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("nets/D.pth", b"x")
    assert "is a zip archive that holds nets/D.pth. Unpack it and name that file" in said(tmp_path / "a.zip")


def test_a_distributed_checkpoint_of_torch(tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = tmp_path / "dcp"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save({"gamma": torch.ones(1)}, checkpoint_id=folder)
        assert f"format_utils dcp_to_torch {folder} weights.pth" in said(folder)
        # What that command calls.
        dcp_to_torch_save(folder, tmp_path / "weights.pth")
    with open_tensors(tmp_path / "weights.pth") as opened:
        assert set(opened) == {"gamma"}


def test_a_folder_of_orbax_steps_names_the_latest(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "BACKENDS", {})
    config = SelfAttentionConfig(16)
    selfattn_core.save(tmp_path / "a.safetensors", config, selfattn_core.init_params(config, 0))
    (tmp_path / "run").mkdir()
    for step in ("9", "10"):
        (tmp_path / "run" / step).mkdir()
        port(tmp_path / "a.safetensors", tmp_path / "run" / step / "default", to="flax")
    advice = said(tmp_path / "run")
    assert advice.endswith(f"Name one: {tmp_path}/run/9, {tmp_path}/run/10.")
    assert load(advice.removesuffix(".").rpartition(" ")[2], dialect="flax")[0] == config


def test_a_folder_that_holds_checkpoints(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "epoch_3.pth")
    assert "is a folder. Name a file in it: epoch_3.pth" in said(tmp_path)


def test_quantised_numbers(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"w": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, tmp_path / "a.pth")
    assert "holds quantised numbers (QInt8Storage); in torch call dequantize()" in said(tmp_path / "a.pth")


class Unknown:
    pass


def test_what_to_save_again_is_named(tmp_path):
    """A checkpoint that has its state dict already is not to be told to save one."""
    torch.save({"G": {"w": torch.ones(1)}, "sampler": Unknown(), "epoch": 3}, tmp_path / "a.pth")
    assert "load it with the code that wrote it, and save only checkpoint['G']." in said(tmp_path / "a.pth")
    torch.save(Unknown(), tmp_path / "b.pth")
    assert "and save only model.state_dict()." in said(tmp_path / "b.pth")


def test_a_block_of_another_kind_is_not_called_gaussian(tmp_path):
    """Only where a `g` is there has `theta` been left out on purpose."""
    names = ("f_key.0", "f_query.0", "f_value", "W")
    np.savez(tmp_path / "a.npz", **{f"s.{name}.weight": np.ones((8, 16, 1, 1), "f4") for name in names})
    for dialect in ("nonlocal", "mmcv"):
        with pytest.raises(PortError) as caught:
            port(tmp_path / "a.npz", tmp_path / "o.safetensors", dialect=dialect, prefix="s.")
        assert "gaussian" not in str(caught.value)
        assert "missing: " in str(caught.value)


def test_load_names_what_to_pass(tmp_path):
    path, _ = written(tmp_path, "heykeetae, plain")
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=r"\(npz\)[.] Choose its dialect with dialect=: its keys fit .*heykeetae"
    ):
        selfattn_torch.load(path)
    with pytest.raises(
        ValueError,
        match=r"\(torch\)[.] Choose its dialect with dialect=: its keys fit no dialect, and `selfattn inspect`",
    ):
        selfattn_torch.load(tmp_path / "a.pth")
    (tmp_path / "b.safetensors").write_bytes(b"x" * 30)
    with pytest.raises(ValueError, match="truncated or another format"):
        selfattn_torch.load(tmp_path / "b.safetensors")


def test_a_file_of_flax_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "BACKENDS", {})
    path, original = written(tmp_path, "studiogan, plain")
    report = port(path, tmp_path / "o.msgpack", dialect="studiogan", to="flax")
    assert report.written
    tree = serialization.msgpack_restore((tmp_path / "o.msgpack").read_bytes())
    assert set(tree) == {"query", "key", "value", "out", "gamma"}
    kernel = ORIGINALS["studiogan, plain"]().tensors[f"{original.prefix}conv1x1_theta.weight"].astype("f4")
    assert (tree["query"]["kernel"][0, 0] == kernel[:, :, 0, 0].T).all()
    with pytest.raises(PortError, match=r"a file of Flax cannot have the keys of torch[.] Pass to='flax'"):
        port(path, tmp_path / "p.msgpack", dialect="studiogan", to="torch")
    assert json.loads(json.dumps(report.to_dict()))["target_format"] == "msgpack"
