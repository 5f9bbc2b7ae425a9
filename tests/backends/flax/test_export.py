"""The Flax layers through `jax.export`: one program for every batch, height and width, with its derivatives."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import export

import selfattn_flax
from selfattn_core import spec
from selfattn_flax import linen
from tests.support import CONFIGS, OUTPUT, assert_near, designed, wide

SIZES = [(3, 7, 9), (2, 5, 4), (1, 6, 8)]


@pytest.fixture(params=["flat", "pooled with biases"])
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(params=["nnx", "linen"])
def calls(request, config):
    """Functions of x: y, and (y, A)."""
    params, *_ = designed(config, shape=SIZES[0])
    if request.param == "nnx":
        layer = selfattn_flax.from_canonical(config, params)
        graph, state = nnx.split(layer)

        def with_map(x):
            y, sown = nnx.capture(nnx.merge(graph, state), nnx.Intermediate)(x, sow_weights=True)
            return y, sown["attention_weights"][0]

        return layer, with_map
    module, variables = linen.from_canonical(config, params)

    def sown(x):
        y, sown = module.apply(variables, x, sow_weights=True, mutable=["intermediates"])
        return y, sown["intermediates"]["attention_weights"][0]

    return lambda x: module.apply(variables, x), sown


def exported(function, config, vjp_order=0):
    """Written and read back, with every size but that of the channels left open."""
    sizes = export.symbolic_shape("b, h, w", constraints=["h >= 2", "w >= 2"])
    x = jax.ShapeDtypeStruct((*sizes, config.channels), jnp.float32)
    program = export.export(jax.jit(function))(x).serialize(vjp_order=vjp_order)
    return export.deserialize(program)


def test_output_and_map_at_sizes_that_were_left_open(calls, config):
    program = exported(calls[1], config)
    params, whole, _ = designed(config, shape=SIZES[0])
    for batch, height, width in SIZES:
        x = whole[:batch, :height, :width]
        y, A = program.call(x)
        for got, want in (
            (y, spec.forward(config, wide(params), wide(x))),
            (A, spec.attention_map(config, wide(params), wide(x))),
        ):
            assert_near(got, want, OUTPUT)


def test_gradient_penalty_of_an_exported_layer(calls, config):
    program = exported(calls[0], config, vjp_order=2)
    params, *maps = designed(config, shape=SIZES[0])
    x, w = (each[:2, :5, :4] for each in maps)

    def penalty(x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(w * program.call(x)))(x) ** 2)

    got = jax.jit(jax.grad(penalty))(x)
    want = spec.r1(config, wide(params), wide(x), wide(w))[1]["x"]
    assert_near(got, want, 512)


def test_sizes_that_were_not_promised_are_refused(calls, config):
    program = exported(calls[0], config)
    with pytest.raises(ValueError, match="refining shapes"):
        program.call(jnp.ones((1, 1, 4, config.channels)))


def test_an_export_without_the_map_refuses_to_give_it(calls, config):
    program = exported(calls[0], config)
    with pytest.raises(ValueError, match="sow_weights"):
        program.call(jnp.ones((*SIZES[0], config.channels)), sow_weights=True)
