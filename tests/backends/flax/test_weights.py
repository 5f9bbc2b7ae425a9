"""Weights of the two Flax layers: canonical arrays and files, names on disk, and Flax's own checkpoints."""

from functools import partial

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from flax import nnx, traverse_util

import selfattn_core
import selfattn_flax
from selfattn_core import SelfAttentionConfig, init_params
from selfattn_flax import linen
from tests import support
from tests.support import CONFIGS, FLAT, POOLED, assert_same


class Nnx:
    """The four functions, with a layer as their one value."""

    from_canonical = staticmethod(selfattn_flax.from_canonical)
    to_canonical = staticmethod(selfattn_flax.to_canonical)
    load = staticmethod(selfattn_flax.load)
    save = staticmethod(selfattn_flax.save)

    @staticmethod
    def config(layer):
        return layer.config

    @staticmethod
    def params(layer):
        return nnx.to_pure_dict(nnx.state(layer, nnx.Param))

    @staticmethod
    def apply(layer, x):
        return layer(x)


class Linen:
    """The four functions, with the pair (module, variables) as their one value."""

    from_canonical = staticmethod(linen.from_canonical)
    load = staticmethod(linen.load)

    @staticmethod
    def to_canonical(pair):
        return linen.to_canonical(*pair)

    @staticmethod
    def save(pair, path, **options):
        return linen.save(*pair, path, **options)

    @staticmethod
    def config(pair):
        module, variables = pair
        return module.bind(variables).config

    @staticmethod
    def params(pair):
        return pair[1]["params"]

    @staticmethod
    def apply(pair, x):
        module, variables = pair
        return module.apply(variables, x)


@pytest.fixture(params=[Nnx, Linen], ids=["nnx", "linen"])
def flavour(request):
    return request.param


@pytest.fixture(params=["flat", "flat without biases", "out projection", "pooled"])
def config(request) -> SelfAttentionConfig:
    return CONFIGS[request.param]


def weights(config, dtype="float32"):
    return support.designed(config, dtype)[0]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_canonical_arrays_come_back_bit_for_bit(flavour, config, dtype):
    params = weights(config, dtype)
    assert_same(flavour.to_canonical(flavour.from_canonical(config, params)), params)


def test_float64_arrays_come_back_bit_for_bit(flavour, config):
    params = weights(config, "float64")
    with jax.enable_x64(True):
        layer = flavour.from_canonical(config, params)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(flavour.params(layer))} == {"float64"}
        assert_same(flavour.to_canonical(layer), params)


def test_exported_arrays_are_new_contiguous_and_writable(flavour):
    layer = flavour.from_canonical(FLAT, weights(FLAT))
    first, second = flavour.to_canonical(layer), flavour.to_canonical(layer)
    for name, array in first.items():
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert not np.shares_memory(array, second[name])
        array.fill(9)
    assert_same(flavour.to_canonical(layer), second)


def test_arrays_given_may_be_changed_later(flavour):
    params = weights(FLAT)
    layer = flavour.from_canonical(FLAT, params)
    before = flavour.to_canonical(layer)
    for array in params.values():
        array[...] = 0
    assert_same(flavour.to_canonical(layer), before)


def test_arrays_in_any_memory_order_and_gamma_of_any_shape(flavour):
    params = weights(FLAT)
    strided = {name: np.asfortranarray(np.repeat(array, 2, axis=0))[::2] for name, array in params.items()}
    strided["gamma"] = params["gamma"].reshape(())
    assert_same(flavour.to_canonical(flavour.from_canonical(FLAT, strided)), params)


@pytest.mark.parametrize("param_dtype", [jnp.float16, "float32", np.dtype("float32")])
def test_the_dtype_is_that_of_the_arrays_unless_told(flavour, param_dtype):
    params = weights(FLAT, "float64")
    layer = flavour.from_canonical(FLAT, params, param_dtype=param_dtype)
    want = {name: array.astype(param_dtype) for name, array in params.items()}
    assert_same(flavour.to_canonical(layer), want)


def test_bfloat16_is_widened_to_float32(flavour):
    params = {name: array.astype(jnp.bfloat16) for name, array in weights(FLAT).items()}
    layer = flavour.from_canonical(FLAT, params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(flavour.params(layer))} == {"bfloat16"}
    want = {name: array.astype(np.float32) for name, array in params.items()}
    assert_same(flavour.to_canonical(layer), want)
    narrowed = flavour.from_canonical(FLAT, want, param_dtype=jnp.bfloat16)
    assert_same(flavour.to_canonical(narrowed), want)


def test_options_of_the_layer_are_passed_on(flavour):
    layer = flavour.from_canonical(FLAT, weights(FLAT), block_size=3, dtype=jnp.bfloat16)
    assert (layer if flavour is Nnx else layer[0]).block_size == 3
    assert flavour.apply(layer, jnp.ones((3, 5, 11))).dtype == jnp.bfloat16
    assert flavour.config(layer) == FLAT


def test_parameters_that_do_not_fit_are_all_reported(flavour):
    params = weights(FLAT)
    del params["key.bias"]
    params |= {"kye.bias": np.zeros(3, np.float32), "query.kernel": np.zeros((3, 11), np.float32)}
    params["value.bias"][2] = np.nan
    with pytest.raises(ValueError, match="parameters do not fit SelfAttentionConfig") as error:
        flavour.from_canonical(FLAT, params)
    for line in (
        "missing: key.bias (3,)",
        "unexpected: kye.bias (3,)",
        "wrong shape: query.kernel is (3, 11), should be (11, 3)",
        "not finite: value.bias holds NaN or infinity",
    ):
        assert line in str(error.value)


def test_files_come_back_bit_for_bit(flavour, config, tmp_path):
    params = weights(config)
    path = tmp_path / "layer.safetensors"
    flavour.save(flavour.from_canonical(config, params), path, source="a test")
    read, arrays = selfattn_core.load(path)
    assert read == config
    assert_same(arrays, params)
    layer = flavour.load(path)
    assert flavour.config(layer) == config
    assert_same(flavour.to_canonical(layer), params)
    narrow = flavour.load(path, param_dtype=jnp.float16, dtype=jnp.float32, block_size=4)
    assert flavour.to_canonical(narrow)["gamma"].dtype == np.float16
    assert flavour.apply(narrow, jnp.ones((3, 5, 11), jnp.float16)).dtype == jnp.float32


def test_the_two_exchange_files(config, tmp_path):
    params = weights(config)
    selfattn_flax.save(selfattn_flax.from_canonical(config, params), tmp_path / "a.safetensors")
    linen.save(*linen.load(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    back = selfattn_flax.load(tmp_path / "b.safetensors")
    assert_same(selfattn_flax.to_canonical(back), params)


def test_a_block_of_a_file_of_several(flavour, tmp_path):
    path = tmp_path / "gan.safetensors"
    blocks = {"generator": (FLAT, weights(FLAT)), "discriminator": (POOLED, weights(POOLED))}
    selfattn_core.save_blocks(path, blocks)
    layer = flavour.load(path, block="discriminator")
    assert flavour.config(layer) == POOLED
    assert_same(flavour.to_canonical(layer), blocks["discriminator"][1])
    with pytest.raises(ValueError, match="holds 2 blocks, pass block= one of: generator, discriminator"):
        flavour.load(path)


def test_a_file_is_not_replaced_unless_told(flavour, tmp_path):
    path = tmp_path / "layer.safetensors"
    layer = flavour.from_canonical(FLAT, weights(FLAT))
    flavour.save(layer, path)
    before = path.read_bytes()
    other = flavour.from_canonical(FLAT, init_params(FLAT, 0))
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        flavour.save(other, path)
    assert path.read_bytes() == before
    flavour.save(other, path, overwrite=True)
    assert_same(flavour.to_canonical(flavour.load(path)), init_params(FLAT, 0))


def test_files_that_are_not_right_are_refused(flavour, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        flavour.load(tmp_path / "absent.safetensors")
    path = tmp_path / "layer.safetensors"
    flavour.save(flavour.from_canonical(FLAT, weights(FLAT)), path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="truncated or another format"):
        flavour.load(path)
    layer = flavour.from_canonical(FLAT, weights(FLAT))
    params = flavour.params(layer)
    params["value"]["kernel"] = params["value"]["kernel"].at[0, 0, 3, 2].set(jnp.inf)
    if flavour is Nnx:
        nnx.update(layer, params)
    with pytest.raises(ValueError, match=r"not finite: value\.kernel"):
        flavour.save(layer, tmp_path / "infinite.safetensors")
    assert not (tmp_path / "infinite.safetensors").exists()


def test_a_float64_file_says_what_to_do_where_jax_has_no_float64(flavour, tmp_path):
    path = tmp_path / "layer.safetensors"
    selfattn_core.save(path, FLAT, weights(FLAT, "float64"))
    with pytest.raises(
        ValueError, match=r"float64 parameters are wanted.*pass param_dtype.*JAX_ENABLE_X64=1"
    ):
        flavour.load(path)
    with pytest.raises(ValueError, match="float64 parameters are wanted"):
        flavour.from_canonical(FLAT, weights(FLAT), param_dtype="float64")
    layer = flavour.load(path, param_dtype=jnp.float32)
    assert flavour.to_canonical(layer)["gamma"].dtype == np.float32


def test_names_on_disk():
    """Checkpoints of every release hold these names: changing one breaks them."""
    names = [
        "gamma",
        "key/bias",
        "key/kernel",
        "out/bias",
        "out/kernel",
        "query/bias",
        "query/kernel",
        "value/bias",
        "value/kernel",
    ]
    shapes = [(1,), (3,), (1, 1, 11, 3), (11,), (1, 1, 5, 11), (3,), (1, 1, 11, 3), (5,), (1, 1, 11, 5)]
    config = CONFIGS["out projection"]
    for flavour in (Nnx, Linen):
        tree = flavour.params(flavour.from_canonical(config, weights(config)))
        flat = traverse_util.flatten_dict(tree, sep="/")
        assert sorted(flat) == names
        assert [flat[name].shape for name in names] == shapes


def test_a_loaded_nnx_layer_is_a_layer_like_any_other():
    new = selfattn_flax.SelfAttention2D.from_config(FLAT, rngs=nnx.Rngs(0))
    loaded = selfattn_flax.from_canonical(FLAT, selfattn_flax.to_canonical(new))
    assert nnx.graphdef(loaded) == nnx.graphdef(new)
    leaves = jax.tree.leaves(nnx.state(loaded))
    assert len(leaves) == 7, "no random state, nothing but the parameters"
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)


def test_variables_of_something_else_are_refused():
    module, variables = linen.from_canonical(FLAT, weights(FLAT))
    with pytest.raises(ValueError, match=r"got variables params with the parameters attention.gamma, .*"):
        linen.to_canonical(module, {"params": {"attention": variables["params"]}})
    with pytest.raises(ValueError, match="with the parameters none; expected"):
        linen.to_canonical(module, {"batch_stats": {}})
    with pytest.raises(ValueError, match=r"unexpected: out.kernel \(11, 11\)"):
        linen.to_canonical(
            module, {"params": variables["params"] | {"out": {"kernel": jnp.zeros((1, 1, 11, 11))}}}
        )
    with pytest.raises(ValueError, match=r"wrong shape: query.kernel is \(11, 3\), should be \(11, 2\)"):
        linen.to_canonical(linen.SelfAttention2D(2), variables)
    wrong = variables["params"] | {"key": {"kernel": jnp.zeros((3, 3, 11, 3)), "bias": jnp.zeros(3)}}
    with pytest.raises(ValueError, match=r"wrong shape: key.kernel is \(3, 3, 11, 3\)"):
        linen.to_canonical(module, {"params": wrong})


def test_linen_variables_may_have_other_collections_and_be_frozen():
    module, variables = linen.from_canonical(FLAT, weights(FLAT))
    more = flax.core.freeze(variables | {"batch_stats": {"mean": jnp.zeros(3)}})
    assert_same(linen.to_canonical(module, more), weights(FLAT))


def test_orbax_checkpoints(flavour, config, tmp_path):
    layer = flavour.from_canonical(config, weights(config))
    blank = flavour.from_canonical(config, {n: 0 * a for n, a in weights(config).items()})
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        if flavour is Nnx:
            checkpointer.save(tmp_path / "layer", nnx.state(layer))
            checkpointer.wait_until_finished()
            nnx.update(blank, checkpointer.restore(tmp_path / "layer", nnx.state(blank)))
        else:
            checkpointer.save(tmp_path / "layer", layer[1])
            checkpointer.wait_until_finished()
            blank = blank[0], checkpointer.restore(tmp_path / "layer", blank[1])
    assert_same(flavour.to_canonical(blank), weights(config))


def test_msgpack_checkpoints():
    module, variables = linen.from_canonical(FLAT, weights(FLAT))
    data = flax.serialization.to_bytes(variables)
    back = flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, variables), data)
    assert_same(linen.to_canonical(module, back), weights(FLAT))


def test_weights_that_were_trained_under_jit_are_exported(flavour):
    layer = flavour.from_canonical(FLAT, weights(FLAT))
    x = jnp.ones((3, 5, 11)).at[0].set(2)
    if flavour is Nnx:

        @nnx.jit
        def step(layer, x):
            gradients = nnx.grad(lambda m: m(x).sum())(layer)
            nnx.update(layer, jax.tree.map(lambda p, g: p - g, nnx.state(layer, nnx.Param), gradients))

        step(layer, x)
    else:
        module, variables = layer
        gradients = jax.jit(jax.grad(lambda v: module.apply(v, x).sum()))(variables)
        layer = module, jax.tree.map(lambda p, g: p - g, variables, gradients)
    after = flavour.to_canonical(layer)
    assert all(np.isfinite(array).all() for array in after.values())
    assert not np.array_equal(after["value.kernel"], weights(FLAT)["value.kernel"])
    twin = flavour.from_canonical(FLAT, after)
    assert (flavour.apply(twin, x) == partial(flavour.apply, layer)(x)).all()
