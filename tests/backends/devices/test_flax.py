"""The Flax layers on eight devices: a sharded batch, and kernels sharded over their output channels."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import selfattn_flax
from selfattn_core import SelfAttentionConfig, spec
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_flax import linen
from tests.support import assert_near, wide

CONFIG = SelfAttentionConfig(12, 4, 6, out_projection=True, kv_pool=2)
GIVEN = inputs(Case("devices", "r1", "", CONFIG, (16, 5, 7)), "float32")
EXACT = wide(GIVEN.params)
X, W = wide(GIVEN.x), wide(GIVEN.dy)
COLLECTIVES = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def test_there_are_eight_devices():
    assert jax.device_count() == 8


@pytest.fixture(params=["Auto", "Explicit"])
def kind(request):
    return AxisType[request.param]


def flavours():
    layer = selfattn_flax.from_canonical(CONFIG, GIVEN.params)
    module, variables = linen.from_canonical(CONFIG, GIVEN.params)
    graph, state = nnx.split(layer)
    return {
        "nnx": (lambda state, x: nnx.merge(graph, state)(x), state),
        "linen": (module.apply, variables),
    }


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_a_sharded_batch_stays_where_it_is(flavour, kind):
    apply, weights = flavours()[flavour]
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        x, w = (jax.device_put(array, NamedSharding(mesh, P("batch"))) for array in (GIVEN.x, GIVEN.dy))
        weights = jax.device_put(weights, NamedSharding(mesh, P()))
        compiled = jax.jit(apply).lower(weights, x).compile()
        y = compiled(weights, x)
        assert y.sharding.is_equivalent_to(x.sharding, x.ndim)
        assert re.findall(COLLECTIVES, compiled.as_text()) == []
        assert_near(y, spec.forward(CONFIG, EXACT, X), 16)

        def penalty(x):
            return jnp.sum(jax.grad(lambda x: jnp.sum(w * apply(weights, x)))(x) ** 2)

        dx = jax.jit(jax.grad(penalty))(x)
        assert_near(dx, spec.r1(CONFIG, EXACT, X, W)[1]["x"], 512)
        gradient = jax.jit(jax.grad(lambda weights: jnp.sum(w * apply(weights, x))))(weights)
        tree = gradient if flavour == "nnx" else gradient["params"]
        kernel = np.asarray(tree["value"]["kernel"][...])[0, 0]
        assert_near(kernel, spec.vjp(CONFIG, EXACT, X, W)["value.kernel"], 128)


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_kernels_that_were_partitioned_by_their_metadata(flavour):
    """Batch over four, output channels over two; in an Auto mesh, in which the compiler places what lies between."""
    mesh = jax.make_mesh((4, 2), ("batch", "model"), axis_types=(AxisType.Auto,) * 2)
    axes = (None, None, None, "model")
    initial = jax.nn.initializers.glorot_uniform()
    options = {"gamma_init": jax.nn.initializers.constant(0.7)}
    with jax.set_mesh(mesh):
        x = jax.device_put(GIVEN.x, NamedSharding(mesh, P("batch")))
        if flavour == "nnx":
            layer = selfattn_flax.SelfAttention2D.from_config(
                CONFIG, kernel_init=nnx.with_partitioning(initial, axes), rngs=nnx.Rngs(0), **options
            )
            kernel = layer.value.kernel[...]
            y = nnx.jit(lambda layer, x: layer(x))(layer, x)
            params = selfattn_flax.to_canonical(layer)
        else:
            module = linen.SelfAttention2D.from_config(
                CONFIG, kernel_init=nn.with_partitioning(initial, axes), **options
            )
            specs = nn.get_partition_spec(jax.eval_shape(module.init, jax.random.key(0), GIVEN.x))
            placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
            variables = jax.jit(module.init, out_shardings=placed)(jax.random.key(0), GIVEN.x)
            kernel = variables["params"]["value"]["kernel"].value
            y = jax.jit(module.apply)(variables, x)
            params = linen.to_canonical(module, variables)
        assert kernel.sharding.spec == P(*axes)
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(1, 1, 12, 3)}
        assert_near(y, spec.forward(CONFIG, wide(params), X), 16)
