"""Spectral norm in the two Flax layers: state and mode, in the idioms of Flax, against the specification."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, traverse_util

import selfattn_flax
from selfattn_core import SelfAttentionConfig, parameter_table, spec, spectral_norm
from selfattn_core.params import fold_spectral_norm, projections, state_table
from selfattn_flax import linen
from selfattn_flax.conformance.backend import nnx_backend
from selfattn_flax.conformance.mutants import MovesInEvaluation
from tests.support import NORMALISED, assert_near, designed, wide

# Ulps that a function of the layer may be off: the norms of the kernels add theirs.
OUTPUT = 256


def assert_state(got, want):
    for name in state_table(NORMALISED):
        assert_near(got[name], want[name], 32)


def flat(tree):
    return traverse_util.flatten_dict(tree, sep=".")


def test_nnx_moves_the_state_in_training_mode_only():
    params, x, _ = designed(NORMALISED)
    layer = selfattn_flax.from_canonical(NORMALISED, params)
    moved = spec.power_iteration(NORMALISED, wide(params))
    want = spec.forward(NORMALISED, moved, wide(x))
    assert_near(layer(x), want, OUTPUT)
    assert_state(selfattn_flax.to_canonical(layer), moved)
    kept = selfattn_flax.to_canonical(layer)
    layer.eval()
    assert_near(layer(x), want, OUTPUT)
    assert_near(nnx.view(layer, use_running_average=True)(x), want, OUTPUT)
    _, sown = nnx.capture(layer, nnx.Intermediate)(x, sow_weights=True)
    A = spec.attention_map(NORMALISED, moved, wide(x))
    assert_near(sown["attention_weights"][0], A, OUTPUT)
    assert_near(selfattn_flax.attention_grid(layer, x).reshape(A.shape), A, OUTPUT)
    assert all(np.array_equal(selfattn_flax.to_canonical(layer)[name], kept[name]) for name in kept)
    layer.train()
    nnx.jit(lambda layer, x: layer(x))(layer, x)
    assert_state(selfattn_flax.to_canonical(layer), spec.power_iteration(NORMALISED, moved))
    np.testing.assert_array_equal(layer.query.kernel[...][0, 0], params["query.kernel"])


def test_the_grid_of_nnx_is_that_of_evaluation_and_leaves_state_and_mode():
    params, x, _ = designed(NORMALISED)
    layer = selfattn_flax.from_canonical(NORMALISED, params)
    layer.key.use_running_average = True
    A = spec.attention_map(NORMALISED, wide(params), wide(x))
    assert_near(selfattn_flax.attention_grid(layer, x).reshape(A.shape), A, OUTPUT)
    assert all(np.array_equal(selfattn_flax.to_canonical(layer)[name], params[name]) for name in params)
    assert not layer.query.use_running_average
    assert layer.key.use_running_average


def test_linen_moves_the_state_when_told():
    params, x, _ = designed(NORMALISED)
    module, variables = linen.from_canonical(NORMALISED, params)
    exact = wide(params)
    want = spec.forward(NORMALISED, exact, wide(x))
    assert_near(module.apply(variables, x, use_running_average=True), want, OUTPUT)
    A = spec.attention_map(NORMALISED, exact, wide(x))
    assert_near(linen.attention_grid(module, variables, x).reshape(A.shape), A, OUTPUT)
    y, changed = jax.jit(
        lambda variables, x: module.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    )(variables, x)
    moved = spec.power_iteration(NORMALISED, exact)
    assert_near(y, spec.forward(NORMALISED, moved, wide(x)), OUTPUT)
    assert list(changed) == ["batch_stats"]
    assert_state(linen.to_canonical(module, variables | changed), moved)
    assert all(np.array_equal(linen.to_canonical(module, variables)[name], params[name]) for name in params)


def test_linen_must_be_told_and_must_be_able_to_write():
    params, x, _ = designed(NORMALISED)
    module, variables = linen.from_canonical(NORMALISED, params)
    with pytest.raises(
        ValueError, match='"use_running_average" must be passed to the constructor or at call'
    ):
        module.apply(variables, x)
    with pytest.raises(Exception, match='"batch_stats" is immutable'):
        module.apply(variables, x, use_running_average=False)
    plain = linen.SelfAttention2D()
    plain.apply(plain.init(jax.random.key(0), x), x, use_running_average=True)


def test_the_two_have_the_same_trees():
    params, x, _ = designed(NORMALISED)
    layer = selfattn_flax.from_canonical(NORMALISED, params)
    _, variables = linen.from_canonical(NORMALISED, params)
    trained, state, rest = nnx.state(layer, nnx.Param, nnx.BatchStat, ...)
    assert not nnx.to_pure_dict(rest)
    for mine, theirs in ((trained, variables["params"]), (state, variables["batch_stats"])):
        mine = flat(nnx.to_pure_dict(mine))  # noqa: PLW2901 - the same tree, flat
        assert {name: array.shape for name, array in mine.items()} == {
            name: array.shape for name, array in flat(theirs).items()
        }
    assert set(flat(variables["batch_stats"])) == set(state_table(NORMALISED))
    fresh = linen.SelfAttention2D.from_config(NORMALISED)
    initial = fresh.init(jax.random.key(0), x, use_running_average=False)
    assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, variables)
    in_evaluation = fresh.init(jax.random.key(0), x, use_running_average=True)
    assert jax.tree.all(jax.tree.map(np.array_equal, initial, in_evaluation)), "initialising is no step"
    assert fresh.bind(initial).config == NORMALISED
    nnx.update(layer, initial["params"])
    nnx.update(layer, initial["batch_stats"])
    layer.eval()
    np.testing.assert_array_equal(layer(x), fresh.apply(initial, x, use_running_average=True))


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_a_new_layer_has_been_warmed_up(kind):
    config = SelfAttentionConfig(64, spectral_norm=True)
    if kind == "nnx":
        layer = selfattn_flax.SelfAttention2D.from_config(config, rngs=nnx.Rngs(0))
        params = selfattn_flax.to_canonical(layer)
    else:
        module = linen.SelfAttention2D(spectral_norm=True)
        x = jnp.zeros((1, 2, 2, 64))
        params = linen.to_canonical(module, module.init(jax.random.key(0), x, use_running_average=False))
    for name in projections(config):
        kernel, u, v = (params[f"{name}.{part}"] for part in ("kernel", "u", "v"))
        assert 0.9 < v @ kernel @ u / np.linalg.norm(kernel, 2) < 1.00001
        np.testing.assert_allclose([np.linalg.norm(u), np.linalg.norm(v)], 1, rtol=1e-5)
        # One more iteration hardly moves a state that has been through fifteen from a pair that belongs together.
        assert_near(kernel @ u / np.linalg.norm(kernel @ u), v, 32)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_canonical_arrays_and_files_carry_the_state(tmp_path, kind, dtype):
    params, *_ = designed(NORMALISED, dtype)
    path = tmp_path / "layer.safetensors"
    if kind == "nnx":
        selfattn_flax.save(selfattn_flax.from_canonical(NORMALISED, params), path)
        layer = selfattn_flax.load(path)
        got = selfattn_flax.to_canonical(layer)
        assert layer.config == NORMALISED
    else:
        linen.save(*linen.from_canonical(NORMALISED, params), path)
        module, variables = linen.load(path)
        got = linen.to_canonical(module, variables)
        assert module.bind(variables).config == NORMALISED
    assert list(got) == list(params)
    assert all(got[name].tobytes() == array.tobytes() for name, array in params.items())


def test_linen_variables_without_their_state_are_refused():
    module, variables = linen.from_canonical(NORMALISED, designed(NORMALISED)[0])
    with pytest.raises(ValueError, match=r"missing: query\.u \(3,\)"):
        linen.to_canonical(module, {"params": variables["params"]})


def _nnx_run(run):
    layer = selfattn_flax.from_canonical(run.config, run.start)

    @nnx.jit
    def step(layer, x, w):
        def losses(layer, x, w):
            def scalar(x, layer):
                return jnp.sum(w * layer(x))

            loss, dx = nnx.value_and_grad(scalar)(x, layer)
            return loss + run.penalty * jnp.sum(dx**2)

        gradients = nnx.grad(losses)(layer, x, w)
        params = nnx.state(layer, nnx.Param)
        nnx.update(layer, jax.tree.map(lambda value, by: value - run.rate * by, params, gradients))

    for x, w in run.steps:
        step(layer, jnp.asarray(x), jnp.asarray(w))
    return selfattn_flax.to_canonical(layer)


def _linen_run(run):
    module, variables = linen.from_canonical(run.config, run.start)

    @jax.jit
    def step(variables, x, w):
        def losses(params):
            def scalar(x):
                given = variables | {"params": params}
                y, moved = module.apply(given, x, use_running_average=False, mutable=["batch_stats"])
                return jnp.sum(w * y), moved

            (loss, moved), dx = jax.value_and_grad(scalar, has_aux=True)(x)
            return loss + run.penalty * jnp.sum(dx**2), moved

        gradients, moved = jax.grad(losses, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda value, by: value - run.rate * by, variables["params"], gradients)
        return {"params": params} | moved

    for x, w in run.steps:
        variables = step(variables, jnp.asarray(x), jnp.asarray(w))
    return linen.to_canonical(module, variables)


@pytest.mark.parametrize("follow", [_nnx_run, _linen_run], ids=["nnx", "linen"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training_follows_the_specification(training_run, follow, dtype):
    with jax.enable_x64(dtype == "float64"):
        run = training_run(dtype)
        run.check(follow(run))


def test_no_gradient_reaches_the_state():
    params, x, _ = designed(NORMALISED)
    module, variables = linen.from_canonical(NORMALISED, params)

    def total(variables):
        y, _ = module.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        return jnp.sum(y)

    gradients = jax.grad(total)(variables)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients["batch_stats"]))
    kernels = flat(gradients["params"])
    for name in projections(NORMALISED):
        gradient, kernel = kernels[f"{name}.kernel"][0, 0], params[f"{name}.kernel"]
        assert abs(np.sum(gradient * kernel)) < 100 * np.finfo(np.float32).eps * np.sum(
            np.abs(gradient * kernel)
        )


def test_rematerialisation_moves_the_state_once():
    params, x, _ = designed(NORMALISED)
    exact = spec.power_iteration(NORMALISED, wide(params))
    want = spec.vjp(NORMALISED, exact, wide(x), np.ones_like(x, np.float64))
    module, variables = linen.from_canonical(NORMALISED, params)
    rematerialised = nn.remat(linen.SelfAttention2D).from_config(NORMALISED, use_running_average=False)

    def total(params):
        given = variables | {"params": params}
        y, moved = rematerialised.apply(given, x, mutable=["batch_stats"])
        return jnp.sum(y), moved

    gradients, moved = jax.jit(jax.grad(total, has_aux=True))(variables["params"])
    assert_state(linen.to_canonical(module, variables | moved), exact)
    assert_near(gradients["value"]["kernel"][0, 0], want["value.kernel"], 2048)

    layer = selfattn_flax.from_canonical(NORMALISED, params)
    nnx.grad(nnx.remat(lambda layer, x: jnp.sum(layer(x))))(layer, jnp.asarray(x))
    assert_state(selfattn_flax.to_canonical(layer), exact)


def test_a_child_is_the_projection_that_the_layer_applies():
    params, x, _ = designed(NORMALISED)
    layer = selfattn_flax.from_canonical(NORMALISED, params)
    layer.eval()
    _, folded = fold_spectral_norm(NORMALISED, params)
    assert_near(layer.value(x), x @ folded["value.kernel"] + folded["value.bias"], 64)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_mixed_precision_keeps_the_norm_in_float32(kind):
    params, x, _ = designed(NORMALISED)
    if kind == "nnx":
        layer = selfattn_flax.from_canonical(NORMALISED, params, dtype=jnp.bfloat16)
        y, got = layer(x), selfattn_flax.to_canonical(layer)
    else:
        module, variables = linen.from_canonical(NORMALISED, params, dtype=jnp.bfloat16)
        y, moved = module.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        got = linen.to_canonical(module, variables | moved)
    assert y.dtype == jnp.bfloat16
    assert_state(got, spec.power_iteration(NORMALISED, wide(params)))


def test_the_option_is_checked():
    with pytest.raises(ValueError, match="spectral_norm=1 must be True or False"):
        linen.SelfAttention2D(spectral_norm=1)
    with pytest.raises(ValueError, match="spectral_norm=1 must be True or False"):
        selfattn_flax.SelfAttention2D(16, spectral_norm=1, rngs=nnx.Rngs(0))
    assert set(parameter_table(NORMALISED)).isdisjoint(state_table(NORMALISED))


@pytest.mark.parametrize("call", ["forward", "vjp"])
def test_the_kit_sees_the_state_that_a_call_moves(call):
    """By its own backend, of a layer that moves what an evaluation should leave alone."""
    params, x, _ = designed(NORMALISED)
    for backend, moves in ((MovesInEvaluation(), True), (nnx_backend, False)):
        model = backend.build(NORMALISED, params, "float32", "channels_last")
        getattr(backend, call)(model, *((x,) if call == "forward" else (x, x)))
        assert (backend.params(model)["query.u"] != params["query.u"]).any() == moves


def shares(params):
    return [
        spectral_norm.share(*(params[f"{name}.{part}"] for part in ("kernel", "u", "v")))
        for name in projections(NORMALISED)
    ]


def test_kernels_from_outside_are_refreshed():
    params, *_ = designed(NORMALISED)
    params = {
        name: array[::-1].copy() if name in state_table(NORMALISED) else array
        for name, array in params.items()
    }
    layer = nnx.Sequential(
        nnx.Linear(4, 11, rngs=nnx.Rngs(0)), selfattn_flax.from_canonical(NORMALISED, params)
    )
    assert min(shares(selfattn_flax.to_canonical(layer.layers[1]))) < 0.9
    selfattn_flax.refresh_spectral_norm(layer)
    np.testing.assert_allclose(shares(selfattn_flax.to_canonical(layer.layers[1])), 1, rtol=1e-6)
    module, variables = linen.from_canonical(NORMALISED, params)
    inside = {
        collection: {"inner": tree, "other": {"u": jnp.ones(2)}} for collection, tree in variables.items()
    }
    fresh = linen.refresh_spectral_norm(inside)
    assert (fresh["batch_stats"]["other"]["u"] == 1).all()
    own = {collection: tree["inner"] for collection, tree in fresh.items()}
    np.testing.assert_allclose(shares(linen.to_canonical(module, own)), 1, rtol=1e-6)
