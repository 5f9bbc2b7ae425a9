"""Pickles: arrays of numpy in them are read, settings beside tensors are named, and nothing is ever made or run."""

import argparse
import collections
import datetime as dt
import pathlib
import pickle
import sys

import numpy as np
import pytest
import torch

from selfattn_core.porting import PortError, inspect, load, open_tensors
from tests.porting.originals import ORIGINALS


@pytest.fixture
def tensors():
    return {name: value.astype("f4") for name, value in ORIGINALS["heykeetae, plain"]().tensors.items()}


def same(path, tensors, format):
    with open_tensors(path) as opened:
        assert opened.format == format
        assert set(opened) == set(tensors)
        for name, value in tensors.items():
            got = opened.read(name)
            assert (got.dtype, got.shape) == (value.dtype, value.shape)
            assert got.tobytes() == value.tobytes()
            assert got.flags.c_contiguous
        return opened.metadata


@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays_in_a_pickle(protocol, tensors, tmp_path):
    more = {
        "half": np.float16([[1.5, -2.25]]),
        "wide": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "count": np.array(7),
        "none": np.zeros((0, 3), np.uint8),
    }
    (tmp_path / "a.pdparams").write_bytes(pickle.dumps(tensors | more, protocol))
    same(
        tmp_path / "a.pdparams",
        tensors | {k: np.ascontiguousarray(v).reshape(v.shape) for k, v in more.items()},
        "pickle",
    )
    assert load(tmp_path / "a.pdparams", dialect="heykeetae")[1]["gamma"] == tensors["net.attn.gamma"]


def test_an_array_of_the_other_byte_order(tmp_path):
    value = np.arange(6, dtype=">f4").reshape(2, 3)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": value}))
    same(tmp_path / "a.pkl", {"w": value.astype("f4")}, "pickle")


def test_arrays_in_a_file_of_torch(tensors, tmp_path):
    torch.save(tensors, tmp_path / "a.pth")
    same(tmp_path / "a.pth", tensors, "torch")


def test_parameters_of_flax_in_a_pickle(tmp_path):
    import jax.numpy as jnp
    from flax.core import freeze

    tree = {
        "params": {
            "attn": {"gamma": jnp.full((1,), 0.5), "query": {"kernel": jnp.ones((1, 1, 8, 2), jnp.bfloat16)}}
        }
    }
    for name, value in {"plain": tree, "frozen": freeze(tree)}.items():
        (tmp_path / name).write_bytes(pickle.dumps(value))
        want = {
            "attn.gamma": np.float32([0.5]),
            "attn.query.kernel": np.ones((1, 1, 8, 2), "f4"),
        }
        same(tmp_path / name, want, "pickle")


def test_settings_beside_tensors_are_named(tensors, tmp_path):
    """What argparse, Lightning and training scripts save; torch.load(weights_only=True) refuses it."""
    state = {f"generator.{name}": torch.from_numpy(value) for name, value in tensors.items()}
    content = {
        "state_dict": state,
        "epoch": np.int64(3),
        "loss": np.float32(0.5),
        "args": argparse.Namespace(lr=1e-4, out=pathlib.PosixPath("runs/1")),
        "history": collections.defaultdict(list, loss=[1.0]),
        "date": dt.datetime(2020, 1, 2),
        "names": np.array(["a", None], dtype=object),
    }
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(content, tmp_path / "a.ckpt", **options)
        with open_tensors(tmp_path / "a.ckpt") as opened:
            assert "argparse.Namespace" in opened.metadata["types that were only named"]
            assert opened.left_out == {"names": "names: holds Python objects or texts"}
        found = load(tmp_path / "a.ckpt", dialect="heykeetae")[1]["gamma"]
        assert found == tensors["net.attn.gamma"]


def test_the_settings_of_lightning_are_a_dictionary(tensors, tmp_path, monkeypatch):
    """Its AttributeDict is one of the names that are known, without the library."""
    module = type(sys)("pytorch_lightning.utilities.parsing")
    kind = type("AttributeDict", (dict,), {"__module__": module.__name__})
    module.AttributeDict = kind
    for name in ("pytorch_lightning", "pytorch_lightning.utilities"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    held = {name: torch.from_numpy(value) for name, value in tensors.items()}
    torch.save({"state_dict": held, "hyper_parameters": kind(lr=0.1, betas=(0, 0.9))}, tmp_path / "a.ckpt")
    monkeypatch.undo()
    same(tmp_path / "a.ckpt", tensors, "torch")


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


class Mine:
    pass


@pytest.mark.parametrize("value", [Trap, Mine])
def test_anything_else_is_refused_and_nothing_is_run(value, tensors, tmp_path):
    thing = value(tmp_path / "touched") if value is Trap else value()
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"weights": tensors, "thing": thing}))
    with pytest.raises(PortError, match=r"nothing was executed. Expected arrays. .* numpy.savez"):
        inspect(tmp_path / "a.pkl")
    torch.save({"weights": tensors, "thing": thing}, tmp_path / "a.pth")
    with pytest.raises(PortError, match=r"nothing was executed. Expected a state dict."):
        inspect(tmp_path / "a.pth")
    assert not (tmp_path / "touched").exists()


def test_a_plain_pickle_of_tensors(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"w": torch.ones(3)}))
    with pytest.raises(PortError, match=r"is a plain pickle of tensors, .* save the result with torch.save"):
        inspect(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"K\x02K\x03\x86", b"K\x02K\x07\x86", r"float64 \(2, 7\) needs 112 bytes, there are 48"),
        (b"K\x02K\x03\x86", b"K\x02J\xff\xff\xff\xff\x86", "is not one of an array"),
        (b"K\x02K\x03\x86", b"K\x02]\x86", "is not one of an array"),
        (b"K\x02K\x03\x86", b"X\x02\x00\x00\x00ab", "is not one of an array"),
    ],
)
def test_arrays_that_are_made_to_deceive(old, new, message, tmp_path):
    content = pickle.dumps({"w": np.arange(6.0).reshape(2, 3)}, 2)
    assert content.count(old) == 1
    (tmp_path / "a.pkl").write_bytes(content.replace(old, new))
    with pytest.raises(PortError, match=message):
        inspect(tmp_path / "a.pkl")
