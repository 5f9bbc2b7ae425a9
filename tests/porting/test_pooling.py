"""`kv_pool`, which no tensor shows: what a file says of it is read, and what none says is not assumed in silence."""

import json
import os
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest

import selfattn_core
from selfattn_core import SelfAttentionConfig
from selfattn_core.porting import PortError, inspect, load, open_tensors, port, verify
from selfattn_core.problems import Remedy


@pytest.mark.parametrize(
    ("to", "target"), [("torch", "o.pt"), ("keras", "o.weights.h5"), ("flax", "o"), ("flax", "o.npz")]
)
def test_what_is_ported_to_our_own_layers_keeps_its_pooling(to, target, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "BACKENDS", {})
    config = SelfAttentionConfig(12, 3, 5, out_projection=True, kv_pool=3)
    params = {name: value + 0.25 for name, value in selfattn_core.init_params(config, 0).items()}
    selfattn_core.save_blocks(
        tmp_path / "a.safetensors",
        {
            "g.attn": (config, params),
            "d": (SelfAttentionConfig(24), selfattn_core.init_params(SelfAttentionConfig(24), 1)),
        },
    )
    port(tmp_path / "a.safetensors", tmp_path / target, to=to, prefix=["g.attn", "d"])
    assert load(tmp_path / target, dialect=to, prefix="g.attn")[0] == config
    assert load(tmp_path / target, dialect=to, prefix="d")[0].kv_pool == 1
    report = port(tmp_path / target, tmp_path / "b.safetensors", dialect=to, prefix="g.attn")
    assert selfattn_core.load(tmp_path / "b.safetensors")[0] == config
    assert not any("kv_pool" in text for text in report.blocks[0].assumptions)
    with pytest.raises(PortError, match=r"says kv_pool = 3, so .* would contradict it") as caught:
        load(tmp_path / target, dialect=to, prefix="g.attn", settings={"kv_pool": 2})
    assert caught.value.problems[0].remedies == (Remedy("settings", 2, setting="kv_pool"),)
    fits = [fit for block in inspect(tmp_path / target).blocks for fit in block.fits if fit.dialect == to]
    assert sorted(fit.config["kv_pool"] for fit in fits) == [1, 3]
    assert not any("kv_pool" in text for fit in fits for text in fit.assumptions)


def test_a_pooling_that_nothing_says_is_not_assumed_in_silence(tmp_path):
    tensors = {
        name: np.ones(shape, np.float32)
        for name, shape in (
            ("query.weight", (3, 11, 1, 1)),
            ("key.weight", (3, 11, 1, 1)),
            ("value.weight", (11, 11, 1, 1)),
            ("gamma", (1,)),
        )
    }
    np.savez(tmp_path / "a.npz", **tensors)
    with pytest.warns(UserWarning, match=r"kv_pool = 1 is assumed.*settings=\{\"kv_pool\": 1\}"):
        load(tmp_path / "a.npz", dialect="torch")
    for pool in (1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load(tmp_path / "a.npz", dialect="torch", settings={"kv_pool": pool})[0].kv_pool == pool
    report = port(tmp_path / "a.npz", tmp_path / "o.safetensors", dialect="torch")
    assert "kv_pool = 1 (--set kv_pool=…)" in report.blocks[0].assumptions


TORCH = """
import sys
import torch
from torch import nn
from selfattn_torch import SelfAttention2d
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat, self.deep = SelfAttention2d(16), nn.Sequential(nn.Conv2d(3, 16, 3), SelfAttention2d(16, kv_pool=3))
net = Net()
torch.save(net.state_dict(), f"{sys.argv[1]}/plain.pth")
torch.save({"epoch": 3, "G": nn.DataParallel(net).state_dict(), "D": SelfAttention2d(24, kv_pool=2).state_dict()}, f"{sys.argv[1]}/all.pth")
torch.save(nn.DataParallel(net).state_dict(), f"{sys.argv[1]}/parallel.pth")
torch.save(SelfAttention2d(16, kv_pool=2).state_dict(), f"{sys.argv[1]}/old.pth", _use_new_zipfile_serialization=False)
torch.save({name: value for name, value in SelfAttention2d(16, kv_pool=2).state_dict().items()}, f"{sys.argv[1]}/bare.pth")
assert set(SelfAttention2d(16, kv_pool=2).state_dict()) == set(SelfAttention2d(16).state_dict())
"""
KERAS = """
import sys
import keras
from selfattn_keras import SelfAttention2D
inner = keras.Sequential([keras.Input((8, 9, 16)), SelfAttention2D(kv_pool=3, name="attn")], name="inner")
x = keras.Input((8, 9, 16))
y = inner(SelfAttention2D(kv_pool=2, name="pooled")(SelfAttention2D(name="flat")(x)))
model = keras.Model(x, y)
model.save(f"{sys.argv[1]}/a.keras")
model.save_weights(f"{sys.argv[1]}/a.weights.h5")
keras.saving.save_model(model, f"{sys.argv[1]}/a.h5")
keras.saving.load_model(f"{sys.argv[1]}/a.keras")
model.load_weights(f"{sys.argv[1]}/a.weights.h5")
class Net(keras.Model):
    def __init__(self):
        super().__init__()
        self.attn = SelfAttention2D(kv_pool=2)
    def call(self, x):
        return self.attn(x)
net = Net()
net(keras.ops.ones((1, 8, 9, 16)))
net.save(f"{sys.argv[1]}/sub.keras")
keras.saving.save_weights(SelfAttention2D.from_spec(inner.layers[0].config), f"{sys.argv[1]}/alone.weights.h5")
"""


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A folder of files that the frameworks wrote themselves."""
    folder = tmp_path_factory.mktemp("native")
    saved(TORCH, folder)
    saved(KERAS, folder)
    return folder


def saved(script, folder):
    environment = os.environ | {"KERAS_BACKEND": "torch"}
    command = [sys.executable, "-W", "ignore", "-c", script, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_state_dict_of_ours_says_its_pooling(native):
    for name, pools in {
        "plain.pth": {"flat": 1, "deep.1": 3},
        "parallel.pth": {"flat": 1, "deep.1": 3},
        "all.pth": {"G.module.flat": 1, "G.module.deep.1": 3, "D": 2},
        "old.pth": {"": 2},
    }.items():
        for prefix, pool in pools.items():
            assert load(native / name, dialect="torch", prefix=prefix)[0].kv_pool == pool
    with pytest.warns(UserWarning, match="kv_pool = 1 is assumed"):
        load(native / "bare.pth", dialect="torch")


def test_a_keras_file_of_ours_says_its_pooling(native, tmp_path):
    for name, pools in {
        "a.keras": {"layers/flat": 1, "layers/pooled": 2, "layers/inner/layers/attn": 3},
        "a.weights.h5": {"layers/flat": 1, "layers/pooled": 2, "layers/inner/layers/attn": 3},
        "a.h5": {"flat/flat": 1, "pooled/pooled": 2, "inner/inner/attn": 3},
        "sub.keras": {"attn": 2},
        "alone.weights.h5": {"": 3},
    }.items():
        for prefix, pool in pools.items():
            assert load(native / name, dialect="keras", prefix=prefix)[0].kv_pool == pool, (name, prefix)
    report = port(native / "a.keras", tmp_path / "o.safetensors", dialect="keras", prefix="layers/pooled")
    assert selfattn_core.load(tmp_path / "o.safetensors")[0].kv_pool == 2
    assert not any("kv_pool" in text for text in report.blocks[0].assumptions)


def test_a_config_that_is_none_says_nothing(native, tmp_path):
    """Damage beside the weights, and layers of other people with our options."""
    layer = {"class_name": "Mine", "config": {"name": "flat", "kv_pool": 4}}
    endless: object = layer
    for _ in range(100):
        endless = {"class_name": "Wrapper", "config": {"layer": endless}}
    for number, config in enumerate(
        (b"{", b"[]", json.dumps({"config": {"layers": [layer, 3]}}).encode(), json.dumps(endless).encode())
    ):
        with (
            zipfile.ZipFile(native / "a.keras") as old,
            zipfile.ZipFile(tmp_path / f"{number}.keras", "w") as new,
        ):
            for name in old.namelist():
                new.writestr(name, config if name == "config.json" else old.read(name))
        with open_tensors(tmp_path / f"{number}.keras") as tensors:
            assert tensors.pools == {"layers/flat": 1, "layers/pooled": 2, "layers/inner/layers/attn": 3}
