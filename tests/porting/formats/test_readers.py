"""Every format gives the names, shapes and bits that its own library put in, lazily and without a framework."""

import json
import os
import shutil
import subprocess
import sys

import h5py
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

from selfattn_core.porting import PortError, open_tensors
from selfattn_core.porting.formats.numbers import decode
from tests.porting.formats.samples import tensors

WANT = tensors()


def contents(path, **options):
    with open_tensors(path, **options) as opened:
        arrays = {key: opened.read(key) for key in opened}
        for key, array in arrays.items():
            assert array.shape == opened[key].shape
            assert array.flags.c_contiguous
            assert array.flags.writeable
            assert array.dtype.isnative
    return arrays


def assert_same(got, want):
    assert set(got) == set(want)
    for name, array in want.items():
        assert got[name].shape == array.shape, name
        assert got[name].dtype == array.dtype, name
        assert got[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("plain.safetensors", "safetensors"),
        ("plain.npz", "npz"),
        ("plain.pth", "torch"),
        ("legacy.pth", "torch"),
    ],
)
def test_flat_formats(samples, name, format):
    assert_same(contents(samples / name), WANT)
    with open_tensors(samples / name) as opened:
        assert opened.format == format
        assert opened["key.weight"].dtype == "float32"


def test_the_content_and_not_the_name_says_the_format(samples, tmp_path):
    for name in ("plain.safetensors", "plain.npz", "plain.pth", "legacy.pth"):
        other = tmp_path / "weights.ckpt"
        other.write_bytes((samples / name).read_bytes())
        assert_same(contents(other), WANT)
    with pytest.raises(PortError, match="unknown format 'zip'; known are safetensors, "):
        open_tensors(other, format="zip")


def test_a_length_that_looks_like_json(samples, tmp_path):
    """The length of a header of 0x7B20 bytes begins as JSON does, with a space and a brace."""
    content = (samples / "plain.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].ljust(0x7B20)
    (tmp_path / "long.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + content[8 + length :]
    )
    assert_same(contents(tmp_path / "long.safetensors"), WANT)


def test_flax(samples):
    with np.load(samples / "flax.npz") as file:
        want = {f"params/{name}": file[name] for name in file.files}
    assert want["params/gamma"] == np.float32(0.7)
    for name in ("plain.msgpack", "pieces.msgpack", "linen"):
        assert_same(contents(samples / name), want)
    # NNX' own variables, whose level `value` is Orbax' and not a name.
    bare = {name.removeprefix("params/"): array for name, array in want.items()}
    assert_same(contents(samples / "nnx"), bare)
    narrow = {"kernel": np.array([[1.5, -2.25, 3.0]], np.float32)}
    for name in ("narrow.msgpack", "narrow"):
        assert_same(contents(samples / name), narrow)
        with open_tensors(samples / name) as opened:
            assert opened["kernel"].dtype == "bfloat16"


def test_keras(samples):
    """Variables have the names that Keras gives them in memory, below the names that the user gave the layers."""
    with np.load(samples / "keras.npz") as file:
        want = {name: file[name] for name in file.files}
    layers = {name.replace("sequential/", "layers/"): array for name, array in want.items()}
    assert {"layers/first/query/kernel", "layers/first/gamma", "layers/norm/moving_mean"} < set(layers)
    for name in ("model.keras", "model.weights.h5"):
        assert_same(contents(samples / name), layers)
    old = contents(samples / "old.h5")
    assert len(old) == len(want)
    for name, array in want.items():
        layer = name.split("/")[1]
        assert old[f"{layer}/{name}"].tobytes() == array.tobytes()
    with open_tensors(samples / "model.keras") as opened:
        assert opened.metadata["keras_version"].startswith("3.")
    with np.load(samples / "half.npz") as file:
        got = contents(samples / "half.weights.h5")
        assert got["layers/narrow/kernel"].tobytes() == file["narrow/kernel"].tobytes()
        assert got["layers/narrow/bias"].dtype == np.float32


@pytest.mark.parametrize("libver", ["earliest", "v108", "v110", "latest"])
def test_hdf5_of_every_version_is_what_h5py_wrote(tmp_path, libver):
    path = tmp_path / "numbers.h5"
    numbers = np.arange(30).reshape(2, 3, 5) - 7
    with h5py.File(path, "w", libver=(libver, "latest")) as file:
        for order in "<>":
            for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"):
                # Eight to a group at most: in the newest versions larger ones have a form that is refused.
                file[f"{kind[0]}/{kind}{'little' if order == '<' else 'big'}"] = numbers.astype(order + kind)
        file["scalar/vars/0"] = np.float32(2.5)
        file["empty/array"] = np.zeros((0, 3), np.float32)
        file["a name, ünïcode/vars/0"] = np.ones(3)
        file["a name, ünïcode/vars"].attrs["name"] = "x"
        file.attrs["fixed"] = np.bytes_("fixed text")
        file.attrs["source"] = "variable text, γ"
        file.attrs["numbers"] = [1, 2, 3]
    with h5py.File(path) as file:
        want = {}
        file.visititems(lambda name, item: want.update({name: item[()]}) if hasattr(item, "dtype") else None)
    got = contents(path)
    assert len(got) == len(want) == 25
    for name, array in want.items():
        mine = got[name]
        assert mine.dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(mine, array)
    with open_tensors(path) as opened:
        assert opened.metadata == {"fixed": "fixed text", "source": "variable text, γ"}


def test_a_large_group_of_the_oldest_version(tmp_path):
    """Its table of names is a tree of several levels."""
    with h5py.File(tmp_path / "many.h5", "w") as file:
        for number in range(1000):
            file[f"layers/layer_{number}/vars/0"] = np.full(1 + number % 3, number, np.float32)
    got = contents(tmp_path / "many.h5")
    assert len(got) == 1000
    assert got["layers/layer_999/vars/0"].tolist() == [999.0]


def test_tensorflow(samples, tmp_path):
    scoped = {f"generator/attention/{name.replace('.', '/')}": array for name, array in WANT.items()}
    want = scoped | {"step": np.array(3), "narrow": np.array([[1.5, -2.25, 3.0]], np.float32)}
    for name in (
        "model.ckpt-7",
        "model.ckpt-7.index",
        "model.ckpt-7.meta",
        "model.ckpt-7.data-00000-of-00001",
        "",
    ):
        assert_same(contents(samples / "saver" / name), want)
    # As a SavedModel has it, which is what TensorFlow Hub hands out.
    for path in (samples / "saver").glob("model.ckpt-7.*"):
        (tmp_path / "variables").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "variables" / path.name.replace("model.ckpt-7", "variables"))
    assert_same(contents(tmp_path), want)
    with np.load(samples / "keras.npz") as file:
        ours = {name: file[name] for name in file.files}
    first = {name.partition("/first/")[2]: value for name, value in ours.items() if "/first/" in name}
    # By the way through the layers, and not as `optimizer/_trainable_variables/3`.
    for folder in ("tf2", "exported"):
        held = contents(samples / folder)
        gammas = [
            key for key in held if key.endswith("/gamma") and held[key].tobytes() == first["gamma"].tobytes()
        ]
        (prefix,) = (key.removesuffix("gamma") for key in gammas)
        assert_same({name: held[prefix + name] for name in first}, first)
    graph = contents(samples / "graph")
    assert graph["attention/kernel"].tobytes() == WANT["query.weight"].tobytes()


def test_our_checksum_of_tensorflow_is_theirs():
    for size in (0, 1, 7, 64, 1001, 65_537):
        content = bytes(np.random.default_rng(size).integers(0, 256, size, np.uint8))
        from selfattn_core.porting.formats.untrusted.crc32c import crc32c

        slow = 0xFFFFFFFF
        for byte in content:
            slow ^= byte
            for _ in range(8):
                slow = slow >> 1 ^ 0x82F63B78 * (slow & 1)
        assert crc32c(content) == slow ^ 0xFFFFFFFF


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16"])
def test_narrow_floats_are_widened_exactly(dtype):
    width = np.dtype(getattr(ml_dtypes, dtype)).itemsize
    raw = np.arange(2 ** (8 * width), dtype=f"<u{width}")
    want = raw.view(getattr(ml_dtypes, dtype)).astype(np.float32)
    np.testing.assert_array_equal(decode(raw.view(np.uint8), dtype), want)


def test_narrow_floats_in_files(tmp_path):
    numbers = torch.tensor([[1.5, -0.25, 448.0], [0.0, -2.0, 0.125]])
    narrow = {"a": torch.bfloat16, "b": torch.float8_e4m3fn, "c": torch.float8_e5m2}
    state = {name: numbers.to(dtype) for name, dtype in narrow.items()}
    import safetensors.torch

    torch.save(state, tmp_path / "narrow.pth")
    safetensors.torch.save_file(state, tmp_path / "narrow.safetensors")
    want = {name: tensor.float().numpy() for name, tensor in state.items()}
    assert_same(contents(tmp_path / "narrow.pth"), want)
    assert_same(contents(tmp_path / "narrow.safetensors"), want)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_torch_views_and_kinds(tmp_path, new):
    """What torch itself loads with weights_only=True, for every way in which a tensor can lie in its storage."""
    base = torch.arange(60, dtype=torch.float64).reshape(3, 4, 5)
    state = {
        "slice": base[1:, 1:3],
        "transposed": base.transpose(0, 2),
        "stepped": base[::2, ::3],
        "expanded": torch.arange(3.0).expand(7, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.tensor([1.0, 2.0])),
        "buffer": torch.nn.Buffer(torch.tensor([3.0])),
        "channels_last": torch.arange(30.0).reshape(1, 2, 3, 5).to(memory_format=torch.channels_last),
        "long": torch.tensor([2**40, -1]),
        "bool": torch.tensor([True, False]),
        "half": torch.tensor([1.5]).half(),
        "complex": torch.tensor([1 + 2j]),
    }
    path = tmp_path / "views.pth"
    torch.save(state, path, _use_new_zipfile_serialization=new)
    loaded = torch.load(path, weights_only=True)
    assert_same(contents(path), {name: loaded[name].detach().numpy().copy() for name in state})


def test_torch_containers(tmp_path):
    """One container's name is left out; of two, neither is chosen. DDP's and the compiler's parts of names are not names."""
    weights = {"attn.gamma": torch.tensor([0.7])}
    average = {"attn.gamma": torch.tensor([0.6])}
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    optimizer.param_groups[0]["params"][0].sum().backward()
    optimizer.step()

    def names(content):
        torch.save(content, tmp_path / "file.pth")
        with open_tensors(tmp_path / "file.pth") as opened:
            return set(opened), opened.metadata

    assert names(weights) == ({"attn.gamma"}, {})
    for container in ("state_dict", "model", "netG", "params_ema"):
        assert names({container: weights, "epoch": 3, "args": {"lr": 0.1}}) == (
            {"attn.gamma"},
            {"container": container},
        )
    both = {"model": weights, "ema": average}
    assert names(both) == ({"model.attn.gamma", "ema.attn.gamma"}, {})
    held, metadata = names({"model": weights, "optimizer": optimizer.state_dict()})
    assert "attn.gamma" in held
    assert "optimizer.state.0.exp_avg" in held
    assert metadata == {"container": "model"}
    parallel = {f"module.{name}": tensor for name, tensor in weights.items()}
    assert names({"state_dict": parallel}) == (
        {"attn.gamma"},
        {"container": "state_dict", "stripped": "module."},
    )
    compiled = {"_orig_mod.attn.gamma": weights["attn.gamma"], "head._orig_mod.bias": torch.ones(2)}
    assert names(compiled) == ({"attn.gamma", "head.bias"}, {"stripped": "_orig_mod."})
    # Taking the part away would make two names one.
    same = {"_orig_mod.gamma": torch.ones(1), "gamma": torch.ones(1)}
    assert names(same) == ({"_orig_mod.gamma", "gamma"}, {})
    only_some = {"module.gamma": torch.ones(1), "gamma": torch.ones(1)}
    assert names(only_some) == ({"module.gamma", "gamma"}, {})


def test_torch_state_dict_of_a_layer(tmp_path):
    from selfattn_torch import SelfAttention2d

    layer = SelfAttention2d(11, 2, 5, out_projection=True)
    torch.save(layer.state_dict(), tmp_path / "layer.pth")
    want = {name: tensor.numpy() for name, tensor in layer.state_dict().items()}
    assert_same(contents(tmp_path / "layer.pth"), want)


def test_tensors_that_are_no_plain_arrays(tmp_path):
    sparse = {"w": torch.eye(3).to_sparse()}
    torch.save(sparse, tmp_path / "sparse.pth")
    with pytest.raises(PortError, match=r"w: is a sparse tensor; convert it to a plain one"):
        open_tensors(tmp_path / "sparse.pth")
    torch.save(torch.nn.Linear(2, 3), tmp_path / "module.pth")
    with pytest.raises(PortError, match=r"import and could run .*Linear.*save only model\.state_dict\(\)"):
        open_tensors(tmp_path / "module.pth")


def test_reading_after_the_end_and_unknown_names(samples):
    with open_tensors(samples / "plain.npz") as opened, pytest.raises(PortError, match="has no tensor 'q'"):
        opened.read("q")
    with pytest.raises(PortError, match=r"is closed[.] Read gamma before"):
        opened.read("gamma")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "large.safetensors"
    safetensors.numpy.save_file({"w": np.ones(2**20, np.float32)}, path)
    with open_tensors(path) as opened:
        os.truncate(path, 2**20)
        with pytest.raises(PortError, match="w cannot be read: the file ends too early"):
            opened.read("w")


LOADED = """
import json, sys
from selfattn_core.porting import open_tensors
with open_tensors(sys.argv[1]) as opened:
    for key in opened:
        opened.read(key)
names = {name.partition(".")[0] for name in sys.modules}
print(json.dumps(sorted(names & set(sys.argv[2].split(",")))))
"""


@pytest.mark.parametrize(
    ("name", "libraries"),
    [
        ("plain.safetensors", []),
        ("plain.npz", []),
        ("plain.pth", []),
        ("legacy.pth", []),
        ("plain.msgpack", []),
        ("saver", []),
        ("model.keras", []),
        ("linen", ["tensorstore"]),
    ],
)
def test_reading_a_format_needs_its_own_library_at_most(samples, name, libraries):
    frameworks = "torch,tensorflow,jax,flax,keras,orbax,h5py,tensorstore,msgpack"
    command = [sys.executable, "-c", LOADED, str(samples / name), frameworks]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == libraries


def test_a_large_file_is_listed_and_one_tensor_read_for_little_memory(tmp_path):
    """A sparse file of 2 GB: what is listed takes no memory, what is read takes its own size."""
    header = {"large": {"dtype": "F32", "shape": [2**29 - 2**22], "data_offsets": [0, 2**31 - 2**24]}}
    end = 2**31 - 2**24
    for number in range(2000):
        header[f"layer{number}.weight"] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
        end += 4
    header["wanted"] = {"dtype": "BF16", "shape": [2**23], "data_offsets": [end, end + 2**24]}
    text = json.dumps(header).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end + 2**24)
    script = """
import resource, sys
from selfattn_core.porting import open_tensors
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with open_tensors(sys.argv[2]) as opened:
    opened.read("gamma")
before = peak()
with open_tensors(sys.argv[1]) as opened:
    assert len(opened) == 2002
    listed = peak()
    array = opened.read("wanted")
print(listed - before, peak() - listed, array.nbytes)
"""
    safetensors.numpy.save_file({"gamma": np.ones(1, np.float32)}, tmp_path / "small.safetensors")
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "small.safetensors")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout
    listed, read, size = map(int, output.split())
    assert size == 2**25
    assert listed < 2**24
    # A fifth more than the tensor, and the piece of it that is widened at a time.
    assert read < 1.2 * size + 2**23
