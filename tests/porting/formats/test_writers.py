"""What is written is what the framework itself loads; a target appears whole or not at all, and is never lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from selfattn_core import SelfAttentionConfig, weights
from selfattn_core.params import parameter_table
from selfattn_core.porting import PortError, open_tensors, write_tensors
from selfattn_core.porting.formats.write import WRITABLE

CONFIG = SelfAttentionConfig(11, 2, 5, out_projection=True, kv_pool=2)
METADATA = {"source": "a test", "report": "γ = 0.7; " * 20_000}


def canonical(dtype=np.float32, seed=0):
    generator = np.random.default_rng(seed)
    return {
        row.name: generator.standard_normal(row.shape).astype(dtype)
        for row in parameter_table(CONFIG).values()
    }


def torch_state(dtype=np.float32):
    state = {}
    for name, array in canonical(dtype).items():
        kernel = name.endswith("kernel")
        state[name.replace("kernel", "weight")] = array.T[:, :, None, None] if kernel else array
    return state


def tree(dtype=np.float32, prefix=""):
    """As Keras and Flax have them; the transposed views above and the ones here are not contiguous."""
    return {
        f"{prefix}{name.replace('.', '/')}": array[None, None] if name.endswith("kernel") else array
        for name, array in canonical(dtype).items()
    }


def assert_reads_back(path, want, format):
    with open_tensors(path) as opened:
        assert opened.format == format
        assert set(opened) == set(want)
        assert METADATA.items() <= opened.metadata.items()
        for name, array in want.items():
            got = opened.read(name)
            assert got.dtype == array.dtype
            assert got.shape == array.shape
            assert got.tobytes() == np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("format", ["safetensors", "npz", "torch"])
def test_state_dicts(tmp_path, format, dtype):
    write_tensors(tmp_path / "layer", torch_state(dtype), format=format, metadata=METADATA)
    assert_reads_back(tmp_path / "layer", torch_state(dtype), format)


def test_torch_loads_its_state_dict(tmp_path):
    from selfattn_torch import SelfAttention2d, to_canonical

    write_tensors(tmp_path / "layer.pt", torch_state(), format="torch", metadata=METADATA)
    layer = SelfAttention2d.from_config(CONFIG)
    state = torch.load(tmp_path / "layer.pt", weights_only=True)
    assert layer.load_state_dict(state).missing_keys == []
    for name, array in canonical().items():
        assert to_canonical(layer)[name].tobytes() == array.tobytes()


def test_numpy_and_safetensors_load_theirs(tmp_path):
    write_tensors(tmp_path / "layer.npz", torch_state(), format="npz", metadata=METADATA)
    write_tensors(tmp_path / "layer.safetensors", torch_state(), format="safetensors")
    with np.load(tmp_path / "layer.npz") as file:
        arrays = {name: file[name] for name in file.files if name != "__metadata__.json"}
    assert set(arrays) == set(torch_state())
    for name, array in torch_state().items():
        assert arrays[name].tobytes() == np.ascontiguousarray(array).tobytes()
        loaded = safetensors.numpy.load_file(tmp_path / "layer.safetensors")[name]
        assert loaded.tobytes() == np.ascontiguousarray(array).tobytes()


KERAS = """
import sys
from pathlib import Path
import keras, numpy as np
from selfattn_core import SelfAttentionConfig
from selfattn_keras import SelfAttention2D, to_canonical
config = SelfAttentionConfig(11, 2, 5, out_projection=True, kv_pool=2)
folder = Path(sys.argv[1])
layer = SelfAttention2D.from_spec(config)
keras.saving.load_weights(layer, folder / "layer.weights.h5")
np.savez(folder / "layer.npz", **to_canonical(layer))
model = keras.Sequential([keras.Input((5, 7, 11)), SelfAttention2D(2, 5, out_projection=True, kv_pool=2)])
model.load_weights(folder / "model.weights.h5")
np.savez(folder / "model.npz", **to_canonical(model.layers[0]))
"""


def test_keras_loads_its_weights_into_our_layer(tmp_path):
    """Into the layer alone, and into a model."""
    prefixes = {"layer": "", "model": "layers/self_attention2d/"}
    for name, prefix in prefixes.items():
        path = tmp_path / f"{name}.weights.h5"
        write_tensors(path, tree(prefix=prefix), format="keras", metadata=METADATA)
        assert_reads_back(path, tree(prefix=prefix), "keras")
    environment = os.environ | {"KERAS_BACKEND": "torch"}
    command = [sys.executable, "-c", KERAS, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    for name in prefixes:
        with np.load(tmp_path / f"{name}.npz") as loaded:
            for parameter, array in canonical().items():
                assert loaded[parameter].tobytes() == array.tobytes()


def test_keras_has_no_number_for_a_stranger(tmp_path):
    with pytest.raises(PortError, match=r"attn/sigma: Keras stores variables by number.*kernel, bias, gamma"):
        write_tensors(tmp_path / "x.weights.h5", {"attn/sigma": np.ones(1)}, format="keras")
    write_tensors(tmp_path / "x.weights.h5", {"attn/vars/3": np.ones(2)}, format="keras")
    with open_tensors(tmp_path / "x.weights.h5") as opened:
        assert list(opened) == ["attn/vars/3"]


ORBAX = """
import sys
from pathlib import Path
import numpy as np
from flax import nnx
from orbax import checkpoint
from selfattn_core import SelfAttentionConfig
from selfattn_core.porting import PortError, open_tensors, write_tensors
from selfattn_flax import SelfAttention2D, to_canonical
with np.load(sys.argv[1]) as file:
    tree = {name: file[name] for name in file.files}
target = Path(sys.argv[2])
metadata = {"source": "a test", "report": "γ = 0.7"}
write_tensors(target, tree, format="orbax", metadata=metadata)
try:
    write_tensors(target, tree, format="orbax")
    raise SystemExit("overwritten")
except PortError as error:
    assert "exists already" in str(error)
write_tensors(target, tree, format="orbax", metadata=metadata, overwrite=True)
with open_tensors(target) as opened:
    assert opened.metadata == metadata, opened.metadata
    for name, array in tree.items():
        assert opened.read(name).tobytes() == array.tobytes()
layer = SelfAttention2D.from_config(SelfAttentionConfig(11, 2, 5, out_projection=True, kv_pool=2), rngs=nnx.Rngs(0))
with checkpoint.StandardCheckpointer() as checkpointer:
    nnx.update(layer, checkpointer.restore(target.absolute(), nnx.to_pure_dict(nnx.state(layer))))
np.savez(sys.argv[3], **to_canonical(layer))
"""


def test_orbax_restores_its_checkpoint_into_our_layer(tmp_path):
    np.savez(tmp_path / "tree.npz", **tree())
    arguments = [str(tmp_path / "tree.npz"), str(tmp_path / "orbax"), str(tmp_path / "back.npz")]
    result = subprocess.run(
        [sys.executable, "-c", ORBAX, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    with np.load(tmp_path / "back.npz") as loaded:
        for name, array in canonical().items():
            assert loaded[name].tobytes() == array.tobytes()
    assert {path.name for path in tmp_path.iterdir()} == {"tree.npz", "orbax", "back.npz"}


def test_bfloat16_is_widened(tmp_path):
    import ml_dtypes

    narrow = {"gamma": np.array([1.5, -2.25], ml_dtypes.bfloat16)}
    write_tensors(tmp_path / "x.npz", narrow, format="npz")
    with open_tensors(tmp_path / "x.npz") as opened:
        assert opened.read("gamma").tolist() == [1.5, -2.25]
        assert opened["gamma"].dtype == "float32"


def test_equal_tensors_are_equal_files(tmp_path):
    for format in ("safetensors", "npz", "torch"):
        for name in ("a", "b"):
            write_tensors(tmp_path / name, torch_state(), format=format, metadata=METADATA, overwrite=True)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("format", WRITABLE)
def test_targets_that_cannot_be(tmp_path, format):
    """Each with its own message, and nothing is written or lost."""
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_bytes(b"precious")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x")
    before = listing(tmp_path)

    def refused(name: str, words: str, **options) -> None:
        with pytest.raises(PortError) as error:
            write_tensors(tmp_path / name, tree(), format=format, **options)
        assert words in str(error.value)
        assert str(tmp_path / name) in str(error.value)

    folder = format == "orbax"
    refused(
        "file",
        "is a file; a checkpoint of Orbax is a folder" if folder else "exists already and was left as it is",
    )
    refused("folder", "exists already" if folder else "is a folder; name a file in it")
    refused(
        "folder",
        "is a folder that is not a checkpoint" if folder else "is a folder; name a file in it",
        overwrite=True,
    )
    refused("absent/file", "there is no folder")
    assert listing(tmp_path) == before


def test_an_unknown_format(tmp_path):
    with pytest.raises(
        PortError,
        match=f"unknown format 'onnx'; can be written: {', '.join(WRITABLE)}",
    ):
        write_tensors(tmp_path / "x", tree(), format="onnx")


@pytest.mark.parametrize("format", ["safetensors", "npz", "torch", "keras"])
def test_a_full_disk(tmp_path, format, monkeypatch):
    path = tmp_path / "layer"
    path.write_bytes(b"precious")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.os, "fsync", full)
    with pytest.raises(PortError, match=r"cannot be written: No space left on device\. Nothing was written"):
        write_tensors(path, tree(), format=format, overwrite=True)
    assert listing(tmp_path) == {"layer": b"precious"}


FULL = """
import resource, signal, sys
import numpy as np
from selfattn_core.porting import PortError, write_tensors
from selfattn_core.porting.formats import orbax
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tensors = {"query/kernel": np.random.default_rng(0).standard_normal((1, 1, 300, 1000))}
if sys.argv[2] == "orbax":
    write_tensors(sys.argv[1], {"gamma": np.ones(1)}, format="orbax")
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
if sys.argv[3] == "meanwhile":
    orbax.check_room = lambda *_: None
try:
    write_tensors(sys.argv[1], tensors, format=sys.argv[2], overwrite=True)
except PortError as error:
    assert "cannot be written: File too large." in str(error), error
    raise SystemExit(7)
"""


@pytest.mark.parametrize(("format", "when"), [("npz", "before"), ("orbax", "before"), ("orbax", "meanwhile")])
def test_a_disk_that_fills_up(tmp_path, format, when):
    """A limit on the size of files stands in for it; the old target stays whole, and nothing is left beside it."""
    path = tmp_path / "layer"
    if format == "npz":
        write_tensors(path, {"gamma": np.ones(1)}, format=format)
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(path), format, when], capture_output=True, text=True, check=False
    )
    assert result.returncode == 7, result.stderr[-2000:]
    assert "Traceback" not in result.stderr, "the error says it all"
    with open_tensors(path) as opened:
        assert list(opened) == ["gamma"]
        assert opened.read("gamma").tolist() == [1.0]
    assert [child.name for child in tmp_path.iterdir()] == ["layer"]


def test_a_folder_that_may_not_be_written(tmp_path):
    """In a process that gives up its rights, for root may write everywhere."""
    tmp_path.chmod(0o755)
    script = """
import os
import numpy as np
from selfattn_core.porting import PortError, write_tensors
if os.getuid() == 0:
    os.setuid(65534)
else:
    os.chmod(".", 0o555)
try:
    write_tensors("layer.npz", {"gamma": np.ones(1)}, format="npz")
except PortError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("layer.npz: cannot be written: Permission denied. Nothing was written"), (
        result
    )
    assert not list(tmp_path.iterdir())


def test_json_of_the_metadata_is_text(tmp_path):
    """Metadata are strings in every format; a number becomes one."""
    write_tensors(tmp_path / "x.npz", {"gamma": np.ones(1)}, format="npz", metadata={"step": 3})
    with open_tensors(tmp_path / "x.npz") as opened:
        assert json.loads(json.dumps(opened.metadata)) == {"step": "3"}
