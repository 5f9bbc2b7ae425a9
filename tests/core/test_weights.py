"""The canonical file: round trips, every way in which a file can be wrong, and nothing lost while saving."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from selfattn_core import SelfAttentionConfig, init_params, load, save, save_blocks, weights
from selfattn_core.params import parameter_table, refresh_spectral_norm, state_table
from tests.support import assert_same

CONFIG = SelfAttentionConfig(11, 3, 5, out_projection=True, kv_pool=2)


def random_params(config=CONFIG, dtype=np.float32, seed=0):
    generator = np.random.default_rng(seed)
    params = {
        name: generator.standard_normal(row.shape).astype(dtype)
        for name, row in (parameter_table(config) | state_table(config)).items()
    }
    for name in state_table(config):
        params[name] /= np.linalg.norm(params[name])
    return params


def assert_loaded(got, want):
    """Bit for bit, in arrays of their own."""
    assert_same(got, want)
    for array in got.values():
        assert array.flags.c_contiguous
        assert array.flags.owndata
        assert array.flags.writeable


def rewrite(path: Path, change_tensors=None, **metadata) -> Path:
    """The canonical file of CONFIG with something wrong in it."""
    tensors = random_params()
    if change_tensors:
        change_tensors(tensors)
    fields = {"format": "selfattn", "version": "1", "config": json.dumps(CONFIG.to_dict()), "source": ""}
    fields |= metadata
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    safetensors.numpy.save_file(tensors, path, metadata={k: v for k, v in fields.items() if v is not None})
    return path


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_round_trip_is_exact(tmp_path, dtype):
    params = random_params(dtype=dtype)
    save(tmp_path / "layer.safetensors", CONFIG, params, source="a test")
    config, back = load(tmp_path / "layer.safetensors")
    assert config == CONFIG
    assert_loaded(back, params)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(1, 3), st.booleans())
def test_every_config_round_trips(tmp_path_factory, channels, qk, out, bias, pool, norm):
    config = SelfAttentionConfig(
        channels, qk, out_projection=out, use_bias=bias, kv_pool=pool, spectral_norm=norm
    )
    path = tmp_path_factory.mktemp("weights") / "layer.safetensors"
    save(path, config, random_params(config))
    back = load(path)
    assert back[0] == config
    assert_loaded(back[1], random_params(config))


@pytest.mark.parametrize(
    "view",
    [
        np.asfortranarray,
        lambda a: np.ascontiguousarray(a.T).T,
        lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
        lambda a: np.ascontiguousarray(a[::-1])[::-1],
    ],
    ids=["fortran", "transposed", "strided", "negative stride"],
)
def test_non_contiguous_arrays_are_stored_as_they_read(tmp_path, view):
    params = random_params()
    save(tmp_path / "layer.safetensors", CONFIG, {name: view(array) for name, array in params.items()})
    assert_loaded(load(tmp_path / "layer.safetensors")[1], params)


@pytest.mark.parametrize("order", ["<", ">"])
def test_either_byte_order_is_stored_as_it_reads(tmp_path, order):
    params = random_params()
    given = {name: array.astype(array.dtype.newbyteorder(order)) for name, array in params.items()}
    save(tmp_path / "layer.safetensors", CONFIG, given)
    assert_loaded(load(tmp_path / "layer.safetensors")[1], params)


def test_bfloat16_is_widened_exactly(tmp_path):
    import ml_dtypes

    params = random_params(dtype=ml_dtypes.bfloat16)
    wide = {name: array.astype(np.float32) for name, array in params.items()}
    save(tmp_path / "layer.safetensors", CONFIG, params)
    assert_loaded(load(tmp_path / "layer.safetensors")[1], wide)
    path = rewrite(tmp_path / "narrow.safetensors", lambda tensors: tensors.update(params))
    assert_loaded(load(path)[1], wide)


def test_the_file_is_as_documented(tmp_path):
    save(tmp_path / "layer.safetensors", CONFIG, random_params(), source="a test")
    with safetensors.safe_open(tmp_path / "layer.safetensors", framework="numpy") as file:
        metadata = file.metadata()
        assert file.get_slice("query.kernel").get_shape() == [11, 3]
        assert sorted(file.keys()) == sorted(parameter_table(CONFIG))
    assert json.loads(metadata.pop("config")) == CONFIG.to_dict()
    assert metadata == {"format": "selfattn", "version": "1", "source": "a test"}


def test_spectral_norm_stores_raw_kernels_and_state(tmp_path):
    config = dataclasses.replace(CONFIG, spectral_norm=True)
    path = tmp_path / "gan.safetensors"
    blocks = {"d": (config, random_params(config)), "g": (CONFIG, random_params(seed=1))}
    save_blocks(path, blocks)
    for name, (wanted, params) in blocks.items():
        found, back = load(path, block=name)
        assert found == wanted
        assert_loaded(back, params)
    assert {name: back.shape for name, back in load(path, block="d")[1].items() if name[-2:] in (".u", ".v")} == {
        "query.u": (3,), "query.v": (11,), "key.u": (3,), "key.v": (11,),
        "value.u": (5,), "value.v": (11,), "out.u": (11,), "out.v": (5,),
    }  # fmt: skip


def test_a_state_that_is_missing_or_unexpected_is_reported(tmp_path):
    config = dataclasses.replace(CONFIG, spectral_norm=True)
    with pytest.raises(ValueError, match=r"missing: query\.u \(3,\)\n  missing: query\.v \(11,\)"):
        load(rewrite(tmp_path / "without.safetensors", config=json.dumps(config.to_dict())))
    stateful = {name: array for name, array in random_params(config).items() if name.endswith(".u")}
    with pytest.raises(ValueError, match=r"unexpected: out\.u \(11,\)"):
        load(rewrite(tmp_path / "with.safetensors", lambda tensors: tensors.update(stateful)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_averages_of_states_are_loaded_and_said(tmp_path, dtype):
    """The mean of two unit vectors; a unit vector that was rounded to the dtype is nothing to speak of."""
    config = dataclasses.replace(CONFIG, spectral_norm=True)
    params, others = (random_params(config, dtype, seed) for seed in (0, 1))
    for name in ("key.u", "out.v"):
        params[name] = (0.9 * params[name] + 0.1 * others[name]).astype(dtype)
    save(tmp_path / "averaged.safetensors", config, params)
    shown = ", ".join(
        f"{name}: {np.linalg.norm(params[name].astype(float)):.4g}" for name in ("key.u", "out.v")
    )
    with pytest.warns(UserWarning, match=rf"averaged.safetensors: .*[(]{shown}[)].*refresh_spectral_norm"):
        back = load(tmp_path / "averaged.safetensors")[1]
    assert_loaded(back, params)
    fresh = refresh_spectral_norm(config, params)
    save(tmp_path / "fresh.safetensors", config, fresh)
    assert_loaded(load(tmp_path / "fresh.safetensors")[1], fresh)


def test_gamma_of_any_one_element_shape(tmp_path):
    for shape in ((), (1, 1, 1, 1)):
        params = random_params()
        rewrite(tmp_path / "layer.safetensors", lambda t, s=shape: t.update(gamma=t["gamma"].reshape(s)))
        assert_loaded(load(tmp_path / "layer.safetensors")[1], params)
        scalar = params | {"gamma": params["gamma"].reshape(shape)}
        save(tmp_path / "again.safetensors", CONFIG, scalar, overwrite=True)
        assert_loaded(load(tmp_path / "again.safetensors")[1], params)


def test_blocks(tmp_path):
    path = tmp_path / "gan.safetensors"
    other = SelfAttentionConfig(16)
    blocks = {
        "generator.attention": (CONFIG, random_params()),
        "generator": (other, random_params(other, np.float64, 1)),
    }
    save_blocks(path, blocks, source="a test")
    for name, (config, params) in blocks.items():
        back = load(path, block=name)
        assert back[0] == config
        assert_loaded(back[1], params)
    with pytest.raises(
        ValueError, match=r"holds 2 blocks, pass block= one of: generator\.attention, generator"
    ):
        load(path)
    with pytest.raises(ValueError, match="has no block 'discriminator'; it holds the blocks generator"):
        load(path, block="discriminator")
    save_blocks(tmp_path / "one.safetensors", {"g": (CONFIG, random_params())})
    assert load(tmp_path / "one.safetensors")[0] == CONFIG
    save(tmp_path / "plain.safetensors", CONFIG, random_params())
    with pytest.raises(ValueError, match="it holds one unnamed block: pass no block"):
        load(tmp_path / "plain.safetensors", block="g")


@pytest.mark.parametrize("blocks", [{}, {"": (CONFIG, {})}, {"a.": (CONFIG, {})}, {"a": (CONFIG, {})}])
def test_blocks_that_cannot_be_saved(tmp_path, blocks):
    with pytest.raises(ValueError, match="save_blocks: "):
        save_blocks(tmp_path / "gan.safetensors", blocks)
    assert not list(tmp_path.iterdir())


def test_all_problems_of_a_file_are_reported_at_once(tmp_path):
    def spoil(tensors):
        del tensors["key.bias"]
        tensors["extra"] = np.zeros(3, np.float32)
        tensors["query.kernel"] = np.zeros((3, 11), np.float32)
        tensors["value.bias"][2] = np.nan
        tensors["out.bias"] = np.zeros(11, np.int32)

    with pytest.raises(ValueError, match="do not fit") as error:
        load(rewrite(tmp_path / "layer.safetensors", spoil))
    for words in (
        "missing: key.bias (3,)",
        "unexpected: extra (3,)",
        "wrong shape: query.kernel is (3, 11), should be (11, 3)",
        "not finite: value.bias",
        "wrong dtype: out.bias is I32",
    ):
        assert words in str(error.value)


def test_tensors_of_no_block_are_reported(tmp_path):
    path = tmp_path / "gan.safetensors"
    tensors = {f"g.{name}": array for name, array in random_params().items()} | {
        "stray": np.zeros(1, np.float32)
    }
    metadata = {"format": "selfattn", "version": "1", "config": json.dumps({"g": CONFIG.to_dict()})}
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="unexpected: stray belongs to no block"):
        load(path)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"format": None}, "is not a selfattn file: its metadata says format=None"),
        ({"format": "pt"}, "is not a selfattn file: its metadata says format='pt'"),
        ({"version": "2"}, "has version '2'; this selfattn reads version '1': upgrade selfattn"),
        ({"version": None}, "has version None"),
        ({"config": None}, "the config in its metadata cannot be read"),
        ({"config": "{"}, "the config in its metadata cannot be read"),
        ({"config": "[]"}, "the config in its metadata cannot be read"),
        ({"config": "[" * 100_000}, "the config in its metadata cannot be read"),
        ({"config": '{"channels": 11, "heads": 4}'}, "unknown option 'heads'"),
        ({"config": '{"channels": "11"}'}, "channels='11' must be a positive integer"),
    ],
)
def test_metadata_that_is_not_ours(tmp_path, metadata, words):
    with pytest.raises(ValueError, match=r"layer\.safetensors: ") as error:
        load(rewrite(tmp_path / "layer.safetensors", **metadata))
    assert words in str(error.value)


def test_truncated_files_are_refused_at_every_length(tmp_path):
    content = rewrite(tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "layer.safetensors"
    for length in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated or another format"):
            load(path)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 a zip", b"\x89HDF\r\n\x1a\n", b"\xff" * 64, b"not a tensor file at all"]
)
def test_other_formats_are_refused(tmp_path, content):
    (tmp_path / "layer.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="truncated or another format"):
        load(tmp_path / "layer.safetensors")


def test_the_reason_follows_in_a_sentence(tmp_path):
    path = tmp_path / "layer.safetensors"
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(ValueError, match="truncated or another format") as error:
        load(path)
    assert str(error.value) == (
        f"{path}: cannot be read as .safetensors; it is truncated or another format: its header should have "
        f"{2**64 - 1} bytes and the file has 40, so it is truncated or no .safetensors file."
    )


def test_a_folder_and_an_absent_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "absent.safetensors")


def test_an_existing_target_needs_overwrite(tmp_path):
    path = tmp_path / "layer.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="exists already and was left as it is; pass overwrite=True"):
        save(path, CONFIG, random_params())
    assert path.read_bytes() == b"precious"
    save(path, CONFIG, random_params(), overwrite=True)
    assert_loaded(load(path)[1], random_params())
    assert [p.name for p in tmp_path.iterdir()] == ["layer.safetensors"]


def test_another_process_that_was_faster_is_not_overwritten(tmp_path, monkeypatch):
    path = tmp_path / "layer.safetensors"
    write = os.fsync

    def appear(descriptor):
        path.write_bytes(b"faster")
        write(descriptor)

    monkeypatch.setattr(weights.os, "fsync", appear)
    with pytest.raises(FileExistsError, match="left as it is"):
        save(path, CONFIG, random_params())
    assert path.read_bytes() == b"faster"
    assert [p.name for p in tmp_path.iterdir()] == ["layer.safetensors"]


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "real" / "layer.safetensors")
    save(link, CONFIG, random_params())
    save(link, CONFIG, random_params(seed=1), overwrite=True)
    assert link.is_symlink()
    assert_loaded(load(tmp_path / "real" / "layer.safetensors")[1], random_params(seed=1))


def test_parameters_that_do_not_fit_are_not_written(tmp_path):
    params = random_params()
    params["gamma"][0] = np.inf
    with pytest.raises(ValueError, match="not finite: gamma"):
        save(tmp_path / "layer.safetensors", CONFIG, params)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        save(tmp_path / "absent" / "layer.safetensors", CONFIG, random_params())
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        save(tmp_path, CONFIG, random_params(), overwrite=True)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    """A limit on the size of files stands in for a disk that fills up."""
    path = tmp_path / "layer.safetensors"
    big = SelfAttentionConfig(256)
    save(path, CONFIG, random_params())
    script = f"""
import resource, signal
from selfattn_core import SelfAttentionConfig, init_params, save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
config = SelfAttentionConfig({big.channels})
try:
    save({str(path)!r}, config, init_params(config, seed=0), overwrite=True)
except OSError:
    raise SystemExit(7)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 7
    assert_loaded(load(path)[1], random_params())
    assert [p.name for p in tmp_path.iterdir()] == ["layer.safetensors"]


def test_a_process_killed_while_saving_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "layer.safetensors"
    save(path, CONFIG, random_params())
    script = f"""
import os, time
from selfattn_core import SelfAttentionConfig, init_params, save, weights
def hang(descriptor):
    print("writing", flush=True)
    time.sleep(60)
weights.os.fsync = hang
config = SelfAttentionConfig(16)
save({str(path)!r}, config, init_params(config, seed=0), overwrite=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert_loaded(load(path)[1], random_params())


def test_a_file_of_the_first_version_still_loads():
    """Names and layout on disk are frozen; this file was written by version 0.1.0."""
    config, params = load(Path(__file__).parent / "golden" / "version-1.safetensors")
    assert config == SelfAttentionConfig(9, 2, 3, out_projection=True, kv_pool=2)
    want = init_params(config, seed=20)
    want |= {name: array + np.float32(0.25) for name, array in want.items() if array.ndim == 1}
    assert_loaded(params, want)
