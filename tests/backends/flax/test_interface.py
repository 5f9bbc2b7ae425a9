"""What a Flax user sees of the layers: constructors, names, printed forms, partitioning metadata."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import spmd

import selfattn_flax
from selfattn_core import SelfAttentionConfig, spec
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_flax import linen
from tests.support import OUTPUT, assert_near, wide

CONFIG = SelfAttentionConfig(12, 3, 6, out_projection=True)
GIVEN = inputs(Case("interface", "forward", "", CONFIG, (2, 5, 7)), "float32")

SHARED = (
    "out_projection=False, use_bias=True, kv_pool=1, spectral_norm=False, block_size=None, dtype=None, param_dtype=float32, precision=None, "
    "kernel_init=variance_scaling, bias_init=zeros, gamma_init=zeros"
)
SIGNATURES = {
    selfattn_flax.SelfAttention2D.__init__: f"self, in_features, qk_channels=None, value_channels=None, *, {SHARED}, rngs",
    linen.SelfAttention2D: f"qk_channels=None, value_channels=None, *, {SHARED}, use_running_average=None, parent=_Sentinel, name=None",
    selfattn_flax.SelfAttention2D.__call__: "self, x, *, sow_weights=False",
    linen.SelfAttention2D.__call__: "self, x, *, sow_weights=False, use_running_average=None",
    selfattn_flax.from_canonical: (
        "config, params, *, block_size=None, dtype=None, param_dtype=None, precision=None"
    ),
    linen.from_canonical: (
        "config, params, *, block_size=None, dtype=None, param_dtype=None, precision=None, name=None"
    ),
    selfattn_flax.load: "path, *, block=None, dialect=None, prefix=None, settings=None, strict=True, block_size=None, dtype=None, param_dtype=None, precision=None",
    linen.load: "path, *, block=None, dialect=None, prefix=None, settings=None, strict=True, block_size=None, dtype=None, param_dtype=None, precision=None, name=None",
    selfattn_flax.save: "layer, path, *, overwrite=False, source=''",
    linen.save: "module, variables, path, *, overwrite=False, source=''",
    selfattn_flax.to_canonical: "layer",
    linen.to_canonical: "module, variables",
}


def described(function):
    """Names, kinds and defaults, without the annotations."""

    def default(value):
        if callable(value) and not isinstance(value, type):
            return value.__qualname__.partition(".")[0]
        return getattr(value, "__name__", None) or (
            repr(value) if value is None or isinstance(value, (int, str)) else type(value).__name__
        )

    words, keywords = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            words.append("*")
            keywords = True
        given = "" if parameter.default is parameter.empty else f"={default(parameter.default)}"
        words.append(parameter.name + given)
    return ", ".join(words)


@pytest.mark.parametrize(
    "function", SIGNATURES, ids=lambda function: f"{function.__module__}.{function.__qualname__}"
)
def test_signatures(function):
    assert described(function) == SIGNATURES[function]


def test_from_config_takes_what_the_constructor_takes_beyond_the_config():
    beyond = "block_size=None, dtype=None, param_dtype=float32, precision=None, kernel_init=variance_scaling, bias_init=zeros, gamma_init=zeros"
    assert described(selfattn_flax.SelfAttention2D.from_config) == f"config, *, {beyond}, rngs"
    assert (
        described(linen.SelfAttention2D.from_config)
        == f"config, *, {beyond}, use_running_average=None, name=None"
    )


PARAMETERS = sum(array.size for array in GIVEN.params.values())


def test_nnx_prints_what_it_is_made_of():
    layer = selfattn_flax.from_canonical(CONFIG, GIVEN.params)
    table = nnx.tabulate(layer, jnp.asarray(GIVEN.x), console_kwargs={"width": 200, "force_terminal": False})
    for words in (
        "query",
        "key",
        "value",
        "out",
        "Projection",
        f"{PARAMETERS} ({4 * PARAMETERS} B)",
        "float32[2,5,7,12]",
    ):
        assert words in table, table
    text = repr(layer)
    for words in ("SelfAttention2D", "query", "gamma", "SelfAttentionConfig(channels=12"):
        assert words in text, text


def test_linen_prints_what_it_is_made_of():
    module = linen.SelfAttention2D(3, 6, out_projection=True)
    table = module.tabulate(
        jax.random.key(0), GIVEN.x, console_kwargs={"width": 200, "force_terminal": False}
    )
    for words in (
        "query",
        "key",
        "value",
        "out",
        "Projection",
        f"{PARAMETERS} ({4 * PARAMETERS} B)",
        "float32[2,5,7,12]",
    ):
        assert words in table, table
    text = repr(module)
    for words in ("qk_channels = 3", "value_channels = 6", "out_projection = True", "kv_pool = 1"):
        assert words in text, text


AXES = (None, None, "in", "model")


def partitioned(flavour):
    """Kernels of Glorot's values with names for their axes, made in a mesh of the one device there is."""
    initial = jax.nn.initializers.glorot_uniform()
    if flavour == "nnx":
        return selfattn_flax.SelfAttention2D.from_config(
            CONFIG, kernel_init=nnx.with_partitioning(initial, AXES), rngs=nnx.Rngs(0)
        )
    module = linen.SelfAttention2D.from_config(CONFIG, kernel_init=nn.with_partitioning(initial, AXES))
    return module, module.init(jax.random.key(0), GIVEN.x)


@pytest.fixture
def mesh():
    kinds = (jax.sharding.AxisType.Auto,) * 2
    with jax.set_mesh(jax.make_mesh((1, 1), ("in", "model"), axis_types=kinds)) as entered:
        yield entered


def test_nnx_keeps_partitioning_metadata(mesh):
    layer = partitioned("nnx")
    specs = nnx.to_pure_dict(spmd.get_partition_spec(nnx.state(layer)))
    for name in ("query", "key", "value", "out"):
        assert specs[name]["kernel"] == jax.sharding.PartitionSpec(*AXES)
        assert specs[name]["bias"] == jax.sharding.PartitionSpec()
    params = selfattn_flax.to_canonical(layer)
    plain = selfattn_flax.SelfAttention2D.from_config(CONFIG, rngs=nnx.Rngs(0))
    for name, array in selfattn_flax.to_canonical(plain).items():
        np.testing.assert_array_equal(params[name], array)
    nnx.update(layer, nnx.state(selfattn_flax.from_canonical(CONFIG, GIVEN.params)))
    assert_right(nnx.jit(lambda layer, x: layer(x))(layer, GIVEN.x))


def test_linen_keeps_partitioning_metadata(mesh):
    module, variables = partitioned("linen")
    specs = nn.get_partition_spec(variables)["params"]
    for name in ("query", "key", "value", "out"):
        assert specs[name]["kernel"] == jax.sharding.PartitionSpec(*AXES)
        assert specs[name]["bias"] == jax.sharding.PartitionSpec()
    ours = linen.from_canonical(CONFIG, GIVEN.params)[1]
    boxed = jax.tree.map(
        lambda box, array: box.replace_boxed(array) if isinstance(box, nn.Partitioned) else array,
        variables["params"],
        ours["params"],
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )
    assert_right(jax.jit(module.apply)({"params": boxed}, GIVEN.x))
    for name, array in linen.to_canonical(module, {"params": boxed}).items():
        np.testing.assert_array_equal(array, GIVEN.params[name])


def assert_right(y):
    want = spec.forward(CONFIG, wide(GIVEN.params), wide(GIVEN.x))
    assert_near(y, want, OUTPUT)
