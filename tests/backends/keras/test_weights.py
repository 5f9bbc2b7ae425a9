"""Weights of the Keras layer to and from canonical arrays and files, bit for bit."""

import random

import keras
import numpy as np
import pytest

import selfattn_core
from selfattn_core import parameter_table
from selfattn_keras import SelfAttention2D, from_canonical, load, save, to_canonical
from tests.support import CONFIGS, assert_same, to_numpy

# Whether float64 does not exist here: in JAX, unless the process has asked for it.
NARROW = keras.backend.standardize_dtype(keras.ops.convert_to_tensor(np.zeros(1)).dtype) != "float64"


@pytest.fixture(params=["flat", "pooled", "out projection"])
def config(request):
    return CONFIGS[request.param]


def values(config, dtype="float32", seed=0):
    generator = np.random.default_rng(seed)
    table = parameter_table(config)
    return {name: generator.standard_normal(row.shape).astype(dtype) for name, row in table.items()}


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_arrays_go_through_the_layer_bit_for_bit(config, layout):
    params = values(config)
    layer = from_canonical(config, params, data_format=layout, block_size=9)
    assert layer.built
    assert layer.config == config
    assert (layer.data_format, layer.block_size) == (layout, 9)
    assert_same(to_canonical(layer), params)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_files_keep_their_dtype_unless_told(config, dtype, tmp_path):
    if dtype == "float64" and NARROW:
        pytest.skip("this process has no 64 bits")
    params = values(config, dtype)
    selfattn_core.save(tmp_path / "a.safetensors", config, params)
    layer = load(tmp_path / "a.safetensors")
    assert {variable.dtype for variable in layer.variables} == {dtype}
    save(layer, tmp_path / "b.safetensors", source="a test")
    assert (tmp_path / "b.safetensors").stat().st_size > 0
    got_config, got = selfattn_core.load(tmp_path / "b.safetensors")
    assert got_config == config
    assert_same(got, params)
    told = load(tmp_path / "a.safetensors", dtype="mixed_bfloat16", data_format="channels_first")
    assert told.compute_dtype == "bfloat16"
    assert_same(to_canonical(told), {name: array.astype("float32") for name, array in params.items()})


def test_bfloat16_is_widened(config):
    params = values(config)
    got = to_canonical(from_canonical(config, params, dtype="bfloat16"))
    for name, array in params.items():
        bits = array.view("uint32")
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        assert got[name].tobytes() == rounded.tobytes(), name


@pytest.mark.skipif(not NARROW, reason="this process has 64 bits")
def test_float64_is_refused_where_it_would_be_narrowed(config):
    with pytest.raises(
        ValueError, match=r"float64, but jax computes in float32: pass dtype=\"float32\", or enable"
    ):
        from_canonical(config, values(config, "float64"))
    layer = from_canonical(config, values(config, "float64"), dtype="float32")
    assert_same(to_canonical(layer), {n: a.astype("float32") for n, a in values(config, "float64").items()})


def strided(array):
    return np.asfortranarray(np.repeat(array, 2, axis=0))[::2]


def aligned(array):
    """A copy whose memory JAX would take over."""
    memory = np.empty(array.nbytes + 64, "uint8")
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize("laid_out", [strided, aligned])
def test_arrays_are_new_and_contiguous_whatever_was_given(config, laid_out):
    params = values(config)
    given = {name: laid_out(array) for name, array in params.items()}
    layer = from_canonical(config, given)
    got = to_canonical(layer)
    assert_same(got, params)
    for name, array in got.items():
        assert array.flags.c_contiguous, name
        assert array.flags.owndata, name
        array.fill(1)
        given[name].fill(1)
    assert_same(to_canonical(layer), params)


def test_gamma_of_any_one_element_shape_is_taken(config):
    params = values(config)
    layer = from_canonical(config, params | {"gamma": params["gamma"].reshape(())})
    assert_same(to_canonical(layer), params)


def test_loading_draws_nothing_from_any_random_state(config, tmp_path):
    selfattn_core.save(tmp_path / "a.safetensors", config, values(config))
    keras.utils.set_random_seed(3)
    want = to_numpy(keras.random.normal((4,))), np.random.random(), random.random()  # noqa: NPY002, S311
    keras.utils.set_random_seed(3)
    numpy_state, python_state = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    load(tmp_path / "a.safetensors")
    from_canonical(config, values(config))
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert random.getstate() == python_state
    got = to_numpy(keras.random.normal((4,))), np.random.random(), random.random()  # noqa: NPY002, S311
    np.testing.assert_array_equal(got[0], want[0])
    assert got[1:] == want[1:]


def test_loaded_layers_keep_the_family_initializers(config):
    layer = from_canonical(config, values(config))
    assert isinstance(layer.kernel_initializer, keras.initializers.GlorotUniform)


def test_blocks_and_refusals(config, tmp_path):
    path = tmp_path / "a.safetensors"
    params = {"one": values(config, seed=1), "two": values(config, seed=2)}
    selfattn_core.save_blocks(path, {name: (config, block) for name, block in params.items()})
    assert_same(to_canonical(load(path, block="two")), params["two"])
    with pytest.raises(ValueError, match="holds 2 blocks, pass block= one of: one, two"):
        load(path)
    layer = from_canonical(config, params["one"])
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        save(layer, path)
    save(layer, path, overwrite=True)
    assert_same(to_canonical(load(path)), params["one"])
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.safetensors")
    layer.gamma.assign([np.nan])
    with pytest.raises(ValueError, match="not finite: gamma"):
        save(layer, path, overwrite=True)


def test_every_problem_of_the_arrays_is_reported(config):
    params = values(config)
    del params["key.kernel"]
    params |= {"kye.kernel": np.zeros(3, "float32"), "gamma": np.zeros(2, "float32")}
    with pytest.raises(ValueError, match="do not fit") as raised:
        from_canonical(config, params)
    for words in ("missing: key.kernel", "unexpected: kye.kernel", "gamma is (2,), should be (1,)"):
        assert words in str(raised.value)


def test_layers_that_are_not_built_have_no_weights(tmp_path):
    for action in (lambda: to_canonical(SelfAttention2D()), lambda: save(SelfAttention2D(), tmp_path / "a")):
        with pytest.raises(ValueError, match="config exists once the layer is built"):
            action()
