"""Checkpoints of one flavour of Flax, read by the other: Orbax, pickles and plain trees."""

import pickle

import jax
import numpy as np
import orbax.checkpoint
import pytest
from flax import nnx

import selfattn_flax
from selfattn_core import SelfAttentionConfig
from selfattn_core.conformance.cases.case import Case
from selfattn_core.conformance.cases.inputs import inputs
from selfattn_flax import linen

CONFIG = SelfAttentionConfig(12, 3, 5, out_projection=True, kv_pool=2)
GIVEN = inputs(Case("checkpoints", "params", "", CONFIG), "float32").params


@pytest.fixture
def checkpointer():
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        yield checkpointer


def assert_given(params):
    assert list(params) == list(GIVEN)
    for name, array in GIVEN.items():
        assert params[name].tobytes() == array.tobytes(), name


def blank():
    return selfattn_flax.SelfAttention2D.from_config(CONFIG, rngs=nnx.Rngs(0))


def test_orbax_from_linen_to_nnx(checkpointer, tmp_path):
    _, variables = linen.from_canonical(CONFIG, GIVEN)
    checkpointer.save(tmp_path / "linen", variables)
    checkpointer.wait_until_finished()
    layer = blank()
    nnx.update(
        layer, checkpointer.restore(tmp_path / "linen", jax.tree.map(np.zeros_like, variables))["params"]
    )
    assert_given(selfattn_flax.to_canonical(layer))


def test_orbax_from_nnx_to_linen(checkpointer, tmp_path):
    """NNX's own state has a level "value" below every parameter; a pure dict of it is Linen's tree."""
    layer = selfattn_flax.from_canonical(CONFIG, GIVEN)
    module, variables = linen.from_canonical(CONFIG, {name: 0 * array for name, array in GIVEN.items()})
    checkpointer.save(tmp_path / "state", nnx.state(layer))
    checkpointer.save(tmp_path / "pure", nnx.to_pure_dict(nnx.state(layer)))
    checkpointer.wait_until_finished()
    pure = checkpointer.restore(tmp_path / "pure", variables["params"])
    assert_given(linen.to_canonical(module, {"params": pure}))
    levels = {
        child: {part: {"value": leaf} for part, leaf in parts.items()}
        for child, parts in pure.items()
        if child != "gamma"
    }
    levels["gamma"] = {"value": pure["gamma"]}
    state = checkpointer.restore(tmp_path / "state", levels)
    assert jax.tree.structure(state) == jax.tree.structure(levels)
    assert_given(
        linen.to_canonical(
            module,
            {
                "params": jax.tree.map(
                    lambda leaf: leaf["value"], state, is_leaf=lambda node: set(node) == {"value"}
                )
            },
        )
    )


def test_nnx_layers_are_pickled_and_cloned_with_their_weights():
    layer = selfattn_flax.from_canonical(CONFIG, GIVEN)
    assert_given(selfattn_flax.to_canonical(pickle.loads(pickle.dumps(layer))))  # noqa: S301 - our own bytes
    assert_given(selfattn_flax.to_canonical(nnx.clone(layer)))
