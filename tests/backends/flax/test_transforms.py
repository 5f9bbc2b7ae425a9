"""The Flax layers under the transforms of JAX and Flax, first and second order, and in training loops."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.test_util import check_grads

import selfattn_flax
from selfattn_core import SelfAttentionConfig, spec
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_flax import linen
from tests.support import assert_near, wide

CONFIG = SelfAttentionConfig(8, 2, 5, out_projection=True, kv_pool=2)


def drawn(shape=(2, 5, 7), dtype="float32", config=CONFIG):
    return inputs(Case("transforms", "forward", "", config, shape), dtype)


@dataclasses.dataclass
class Layer:
    """A layer as a function of its parameters; the tree of the parameters is the same for both flavours."""

    params: Any
    apply: Callable[..., Any]
    attention: Callable[..., Any]


def nnx_layer(given, config=CONFIG):
    graph, state = nnx.split(selfattn_flax.from_canonical(config, given.params))

    def attention(state, x):
        return nnx.capture(nnx.merge(graph, state), nnx.Intermediate)(x, sow_weights=True)

    return Layer(state, lambda state, x: nnx.merge(graph, state)(x), attention)


def linen_layer(given, config=CONFIG):
    module, variables = linen.from_canonical(config, given.params)

    def attention(params, x):
        y, sown = module.apply({"params": params}, x, sow_weights=True, mutable=["intermediates"])
        return y, sown["intermediates"]

    return Layer(variables["params"], lambda params, x: module.apply({"params": params}, x), attention)


@pytest.fixture(params=[nnx_layer, linen_layer], ids=["nnx", "linen"])
def make(request):
    return request.param


def exact(given):
    return wide(given.params), wide(given.x)


@pytest.mark.parametrize(("make", "mode"), [(nnx_layer, "fwd"), (linen_layer, "rev")], ids=["nnx", "linen"])
def test_first_and_second_derivatives(make, mode):
    with jax.enable_x64(True):
        given = drawn((1, 2, 4), "float64")
        layer = make(given)
        function = jax.jit(lambda params, x: jnp.sum(jnp.sin(layer.apply(params, x))))
        check_grads(function, (layer.params, jnp.asarray(given.x)), order=2, modes=(mode,), rtol=1e-5)


def test_gradients_of_each_sample(make):
    given = drawn()
    layer = make(given)

    def loss(params, x, dy):
        return jnp.sum(dy * layer.apply(params, x))

    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(layer.params, given.x, given.dy)
    params, x = exact(given)
    for index in range(2):
        sample = slice(index, index + 1)
        want = spec.vjp(CONFIG, params, x[sample], np.float64(given.dy[sample]))
        for name in ("query", "key", "value", "out"):
            got = np.asarray(each[name]["kernel"][...])[index, 0, 0]
            assert_near(got, want[f"{name}.kernel"], 128)


def test_the_map_under_jit_and_vmap(make):
    given = drawn()
    layer = make(given)
    want = spec.attention_map(CONFIG, *exact(given))
    for attention in (layer.attention, jax.vmap(layer.attention, (None, 0))):
        y, sown = jax.jit(attention)(layer.params, given.x)
        (A,) = sown["attention_weights"]
        assert_near(A, want, 16)
        assert_near(y, spec.forward(CONFIG, *exact(given)), 16)


def test_no_fused_kernel_is_called(make, monkeypatch):
    """Those force a scale, ignore the precision, or cannot be differentiated twice."""

    def fused(*arguments, **keywords):
        raise AssertionError("fused")

    for module in (jax.nn, nn, nn.attention, nnx, nnx.nn.attention):
        monkeypatch.setattr(module, "dot_product_attention", fused)
    given = drawn((1, 4, 6))
    layer = make(given)
    assert jnp.isfinite(layer.apply(layer.params, given.x)).all()
    assert jnp.isfinite(layer.attention(layer.params, given.x)[0]).all()


def test_nnx_says_that_a_map_sown_outside_capture_stays_in_the_layer():
    layer = selfattn_flax.from_canonical(CONFIG, drawn().params)
    with pytest.warns(DeprecationWarning, match="capture"):
        layer(drawn().x, sow_weights=True)
    assert nnx.pop(layer, nnx.Intermediate)["attention_weights"]


def test_linen_captures_the_outputs_of_its_children():
    given = drawn()
    module, variables = linen.from_canonical(CONFIG, given.params)
    _, seen = module.apply(variables, given.x, capture_intermediates=True, mutable=["intermediates"])
    children = {name for name in seen["intermediates"] if name != "__call__"}
    assert children == {"query", "key", "value", "out"}
    (q,) = seen["intermediates"]["query"]["__call__"]
    params, x = exact(given)
    assert_near(q, x @ params["query.kernel"] + params["query.bias"], 16)


def test_the_map_of_each_scanned_layer():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x):
            return linen.SelfAttention2D(2, gamma_init=nn.initializers.ones, name="attention")(
                x, sow_weights=True
            ), None

    scanned = nn.scan(
        nn.remat(Body), variable_axes={"params": 0, "intermediates": 0}, split_rngs={"params": True}, length=3
    )()
    x = jnp.asarray(drawn().x)
    variables = {"params": scanned.init(jax.random.key(0), x)["params"]}
    _, sown = scanned.apply(variables, x, mutable=["intermediates"])
    (A,) = sown["intermediates"]["attention"]["attention_weights"]
    assert A.shape == (3, 2, 35, 35)
    assert_near(A.sum(-1), np.ones((3, 2, 35)), 64)
    assert not np.allclose(A[0], A[1])


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_initialisation_under_jit_and_in_the_abstract(flavour):
    x = jnp.asarray(drawn().x)
    if flavour == "nnx":

        def create():
            return nnx.state(selfattn_flax.SelfAttention2D.from_config(CONFIG, rngs=nnx.Rngs(3)))

        eager, jitted, abstract = create(), nnx.jit(create)(), nnx.eval_shape(create)
    else:
        init = linen.SelfAttention2D.from_config(CONFIG).init
        key = jax.random.key(3)
        eager, jitted, abstract = init(key, x), jax.jit(init)(key, x), jax.eval_shape(init, key, x)
    for leaf, other, described in zip(*map(jax.tree.leaves, (eager, jitted, abstract)), strict=True):
        np.testing.assert_allclose(other, leaf, rtol=1e-6)
        assert (described.shape, described.dtype) == (leaf.shape, leaf.dtype)


def penalised(apply, x, w):
    """A loss and its gradient penalty, as a GAN's critic has them."""
    value, dx = jax.value_and_grad(lambda x: jnp.sum(w * apply(x)))(x)
    return value + 0.5 * jnp.sum(dx**2)


def test_both_flavours_train_alike_with_a_gradient_penalty():
    given = drawn((2, 3, 4))
    x, w = jnp.asarray(given.x), jnp.asarray(given.dy)
    optimizer = optax.sgd(1e-3, momentum=0.9)
    layer = selfattn_flax.from_canonical(CONFIG, given.params)
    module, variables = linen.from_canonical(CONFIG, given.params)
    owner = nnx.Optimizer(layer, optimizer, wrt=nnx.Param)
    state = TrainState.create(apply_fn=module.apply, params=variables["params"], tx=optimizer)

    @nnx.jit
    def nnx_step(layer, owner):
        loss, gradients = nnx.value_and_grad(lambda layer: penalised(layer, x, w))(layer)
        owner.update(layer, gradients)
        return loss

    @jax.jit
    def linen_step(state):
        def loss(params):
            return penalised(partial(state.apply_fn, {"params": params}), x, w)

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    losses = []
    for _ in range(5):
        state, loss = linen_step(state)
        losses.append(float(loss))
        assert_near(nnx_step(layer, owner), loss, 128)
    assert losses[-1] < losses[0]
    trained = linen.to_canonical(module, {"params": state.params})
    for name, array in selfattn_flax.to_canonical(layer).items():
        assert_near(array, trained[name], 128)
        if name != "key.bias":
            assert not np.array_equal(array, given.params[name]), name
