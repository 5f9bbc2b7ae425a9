"""A generator step in NNX with a discriminator in training mode: the wrong way's error, and what the right ways move."""

import jax
import pytest
from flax import nnx
from flax.errors import TraceContextError

from selfattn_flax import SelfAttention2D


@pytest.fixture
def discriminator():
    return SelfAttention2D(16, 3, spectral_norm=True, rngs=nnx.Rngs(0))


def scores(network, images):
    return network(images).sum()


def test_a_network_in_training_mode_cannot_be_closed_over(discriminator):
    with pytest.raises(TraceContextError, match="Cannot mutate BatchStat"):
        nnx.grad(lambda images: scores(discriminator, images))(jax.numpy.ones((2, 3, 4, 16)))


@pytest.mark.parametrize("moves", [False, True])
def test_a_view_in_evaluation_moves_nothing_and_an_argument_moves(discriminator, moves):
    images = jax.random.normal(jax.random.key(1), (2, 3, 4, 16))
    before = discriminator.query.v[...]
    if moves:
        nnx.jit(nnx.grad(scores, argnums=1))(discriminator, images)
    else:
        judge = nnx.view(discriminator, use_running_average=True)
        nnx.jit(nnx.grad(lambda images: scores(judge, images)))(images)
    assert bool((discriminator.query.v[...] != before).any()) == moves
