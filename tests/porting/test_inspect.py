"""What is found in a checkpoint of a whole network, and how much of it is read for that."""

import json
import subprocess
import sys
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import safetensors.numpy

from selfattn_core.porting import PortError, Tensors, inspect, port
from selfattn_core.porting.dialects.catalogue import dialect
from selfattn_core.porting.translation import from_dialect
from tests.porting.checkpoints import written
from tests.porting.originals import ORIGINALS

# What else has a file's keys and shapes; whoever wrote the file decides.
SAME_KEYS = {
    "heykeetae, plain": {"heykeetae", "danet", "pytorch-advanced", "heykeetae-2018-06-08"},
    "heykeetae, old hook": {"heykeetae", "danet", "pytorch-advanced"},
    "heykeetae, SpectralNorm class": {"heykeetae", "danet", "pytorch-advanced"},
    "danet, plain": {"heykeetae", "danet", "pytorch-advanced", "heykeetae-2018-06-08"},
    "pytorch-advanced, plain": {"heykeetae", "danet", "pytorch-advanced", "heykeetae-2018-06-08"},
    "torch, plain": {"torch", "torchgan"},
    "biggan, plain": {"biggan", "mimicry", "fastai-1-pooled"},
    "mimicry, plain": {"biggan", "mimicry", "fastai-1-pooled"},
    "mimicry, hook": {"mimicry", "fastai-1-pooled"},
    "fastai-1-pooled, hook": {"mimicry", "fastai-1-pooled"},
    "deoldify, hook": {"deoldify", "fastai-1"},
    "deoldify, SpectralNorm class": {"deoldify", "fastai-1"},
    "fastai-1, hook": {"deoldify", "fastai-1"},
    "keras": {"keras", "flax"},
    "flax": {"keras", "flax"},
    "fgh, gamma never saved": {"fgh"},
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_every_original_is_found_with_all_that_has_its_keys(name, tmp_path):
    path, original = written(tmp_path, name)
    (block,) = inspect(path).blocks
    assert block.prefix == original.prefix
    fits = {fit.dialect for fit in block.fits if fit.verdict != "almost"}
    assert fits == SAME_KEYS.get(name, {original.dialect})
    for fit in block.fits:
        assert (fit.verdict == "refused") == (fit.verdict != "almost" and dialect(fit.dialect).refused)
        assert fit.reasons or fit.verdict == "fits"


def test_swapped_names_are_no_reason_to_leave_a_candidate_out(tmp_path):
    """A layer of fastai and one of the same names without a swap differ in nothing that a file shows."""
    path, original = written(tmp_path, "deoldify, hook")
    tensors = {key: value[..., None] if value.ndim == 3 else value for key, value in original.tensors.items()}
    np.savez(path, **tensors)
    (block,) = inspect(path).blocks
    verdicts = {fit.dialect: fit for fit in block.fits}
    assert verdicts["torch"].verdict == "fits"
    assert any("the one called query acts as the key" in note for note in verdicts["torch"].notes)
    assert verdicts["deoldify"].verdict == "almost"
    assert any("axes OIL" in reason for reason in verdicts["deoldify"].reasons)


def test_a_whole_network(tmp_path):
    """Blocks of two dialects, and attention of other kinds, which is named and not taken for ours."""
    one, other = ORIGINALS["biggan, ajbrock"](), ORIGINALS["sagan-tf"]()
    tensors = {f"G.{key}": value for key, value in one.tensors.items()} | other.tensors
    for name in ("q", "k", "v", "proj_out"):
        tensors[f"mid.attn_1.{name}.weight"] = np.ones((32, 32, 1, 1))
        tensors[f"mid.attn_1.{name}.bias"] = np.ones(32)
    tensors |= {"mid.attn_1.norm.weight": np.ones(32), "mid.attn_1.norm.bias": np.ones(32)}
    for name in ("query", "key", "value", "proj_attn"):
        tensors[f"vae.{name}.weight"], tensors[f"vae.{name}.bias"] = np.ones((32, 32)), np.ones(32)
    tensors |= {"vae.group_norm.weight": np.ones(32), "vae.group_norm.bias": np.ones(32)}
    for name in ("query", "key", "value"):
        tensors[f"bert.{name}.weight"], tensors[f"bert.{name}.bias"] = np.ones((32, 32)), np.ones(32)
    path = tmp_path / "network.npz"
    np.savez(path, **tensors, **{"conv.weight": np.ones((3, 3))})
    report = inspect(path)
    found = {
        block.prefix: {fit.dialect: fit.verdict for fit in block.fits if fit.verdict != "almost"}
        for block in report.blocks
    }
    assert found["G.blocks.3.1."] == {"biggan": "fits"}
    assert found["model/g_non_local/"] == {"sagan-tf": "fits"}
    assert found["mid.attn_1."] == {"taming": "refused"}
    assert found["vae."] == {"diffusers": "refused"}
    assert found["bert."] == {}
    text = report.to_text()
    for part in ("GroupNorm", "Equal keys do not mean equal functions", "block bert."):
        assert part in text
    assert json.loads(json.dumps(report.to_dict()))["parameters"] == report.parameters


def test_a_network_without_attention(tmp_path):
    np.savez(tmp_path / "a.npz", **{"conv.weight": np.ones((3, 3)), "gamma": np.ones(1)})
    report = inspect(tmp_path / "a.npz")
    assert report.blocks == ()
    assert "No dialect has names for an attention block" in report.to_text()
    with pytest.raises(
        PortError, match=r"Expected keys that end with theta.weight, phi.weight, g.weight, o.weight"
    ):
        port(tmp_path / "a.npz", tmp_path / "o.safetensors", dialect="biggan")


MINE = """
name = "mine"
title = "an implementation nobody has heard of"
source = "https://example.org"
layout = "BHWC"

[layer]
out_projection = true
use_bias = false

[roles]
query = "to_q"
key = "to_k"
value = "to_v"
out = "to_out"

[gamma]
key = "alpha"

[scale]
factor = 0.25

[[kernels]]
axes = "1OI"
kernel = "{path}/matrix"

[kernels.spectral_norm]
u = "//state/{module}/{path}/vector"
sigma = "iterate"
side = "in"
normalize = "root-add"
eps = 1e-3
iterations = 3
"""


def test_a_dialect_of_ones_own(tmp_path):
    """Described by its file alone: another layout, state in another tree, three iterations, a scale."""
    (tmp_path / "mine.toml").write_text(MINE, encoding="utf-8")
    make = np.random.Generator(np.random.PCG64(0))
    tensors, kernels = {"weights/net/attn/alpha": np.array(-0.6)}, {}
    for name, (i, o) in {"to_q": (10, 3), "to_k": (10, 3), "to_v": (10, 4), "to_out": (4, 10)}.items():
        w, u = make.standard_normal((i, o)), make.standard_normal(i)
        tensors[f"weights/net/attn/{name}/matrix"], tensors[f"state/net/attn/{name}/vector"] = w.T[None], u
        for _ in range(3):
            v = w.T @ u
            v /= np.sqrt((v**2).sum() + 1e-3)
            u = w @ v
            u /= np.sqrt((u**2).sum() + 1e-3)
        kernels[name] = w / (u @ w @ v)
    np.savez(tmp_path / "a.npz", **tensors)
    x = make.standard_normal((2, 3, 5, 10))
    flat = x.reshape(2, 15, 10)
    scores = 0.25 * (flat @ kernels["to_q"]) @ (flat @ kernels["to_k"]).swapaxes(1, 2)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    out = (e / e.sum(-1, keepdims=True)) @ (flat @ kernels["to_v"]) @ kernels["to_out"]
    np.savez(tmp_path / "io.npz", x=x, y=(-0.6 * out + flat).reshape(x.shape))
    mine = str(tmp_path / "mine.toml")
    report = port(tmp_path / "a.npz", tmp_path / "o.safetensors", dialect=mine, check=tmp_path / "io.npz")
    assert [check.outcome for check in report.checks if check.name.startswith("source")] == ["passed"]
    (block,) = inspect(tmp_path / "a.npz", dialects=[mine]).blocks
    assert (block.fits[0].dialect, block.fits[0].verdict) == ("mine", "fits")


def test_only_what_is_needed_is_read(tmp_path, monkeypatch):
    """A block of a large file costs its own tensors."""
    _, original = written(tmp_path, "biggan, ajbrock")
    big = {f"layer{number}.weight": np.zeros((1 << 20,), np.float32) for number in range(16)}
    path = tmp_path / "network.safetensors"
    safetensors.numpy.save_file(original.tensors | big, path)
    read = []
    right = Tensors.read
    monkeypatch.setattr(Tensors, "read", lambda self, key: read.append(key) or right(self, key))
    tracemalloc.start()
    inspect(path)
    assert read == []
    port(path, tmp_path / "o.safetensors", dialect="biggan", prefix="blocks.3.1")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not any(key.startswith("layer") for key in read)
    assert peak < 2 << 20


def test_a_port_holds_less_than_the_tensors_that_it_needs(tmp_path):
    """One at a time, its source and its result: what a large block needs would otherwise be there several times."""
    make = np.random.Generator(np.random.PCG64(0))
    channels, tensors = 2048, {"gamma": np.ones((), np.float32)}
    for name, (out, wide) in {
        "theta": (256, 2048),
        "phi": (256, 2048),
        "g": (1024, 2048),
        "o": (2048, 1024),
    }.items():
        tensors[f"{name}.weight"] = make.standard_normal((out, wide, 1, 1), np.float32)
        tensors[f"{name}.u0"] = make.standard_normal((1, out), np.float32)
    needed = sum(tensor.nbytes for tensor in tensors.values())
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    del tensors
    tracemalloc.start()
    report = port(tmp_path / "a.safetensors", tmp_path / "o.safetensors", dialect="biggan")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.blocks[0].config["channels"] == channels
    assert peak < 1.2 * needed


def test_a_port_reads_no_tensor_more_often_than_it_must(tmp_path, monkeypatch):
    """A kernel to fold it, and twice to write the trial; the target is made of the trial. One power iteration a kernel."""
    path, original = written(tmp_path, "biggan, ajbrock")
    read, iterated = Counter(), []
    right, state = Tensors.read, from_dialect.spectral_state
    monkeypatch.setattr(
        Tensors, "read", lambda self, key: read.update([key] * (self.path == path)) or right(self, key)
    )
    monkeypatch.setattr(from_dialect, "spectral_state", lambda *given: iterated.append(1) or state(*given))
    port(path, tmp_path / "o.safetensors", dialect="biggan")
    kernels = [key for key in original.tensors if key.endswith("weight")]
    assert [read[key] for key in kernels] == [3] * 4
    assert max(read.values()) <= 4
    assert len(iterated) == 4


SCRIPT = """
import sys
from selfattn_core.cli import main
try:
    main(["inspect", sys.argv[1]])
except SystemExit as end:
    assert not end.code
frameworks = {"torch", "tensorflow", "jax", "keras", "flax", "h5py", "ml_dtypes", "tensorstore"}
print(sorted(frameworks & {name.partition(".")[0] for name in sys.modules}))
"""


def test_inspecting_safetensors_imports_no_framework(tmp_path):
    _, original = written(tmp_path, "biggan, ajbrock")
    safetensors.numpy.save_file(original.tensors, tmp_path / "a.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "a.safetensors")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "fits    biggan" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == "[]"
