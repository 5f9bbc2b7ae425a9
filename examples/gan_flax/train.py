"""The training of `examples.gan_torch.train`, in Flax."""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tqdm import tqdm

from examples.digits.data import Digits
from examples.gan.settings import (
    BATCH,
    BETAS,
    CLASSES,
    DISCRIMINATOR_RATE,
    GENERATOR_RATE,
    LATENT,
    R1_WEIGHT,
)
from examples.gan_flax.networks import Discriminator, Generator

__all__ = ["discriminator_loss", "generator_loss", "train"]


def discriminator_loss(
    discriminator: Discriminator, real: jax.Array, labels: jax.Array, fake: jax.Array
) -> jax.Array:
    """The hinge loss, with the gradient penalty on the real images."""

    def total(network: Discriminator, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = network(images, labels)
        return scores.sum(), scores

    # The network is an argument, so that the vectors of its spectral norm can move within this inner derivative.
    (_, scores), gradient = nnx.value_and_grad(total, argnums=1, has_aux=True)(discriminator, real)
    penalty = R1_WEIGHT / 2 * jnp.square(gradient).sum(axis=(1, 2, 3)).mean()
    return nnx.relu(1 - scores).mean() + nnx.relu(1 + discriminator(fake, labels)).mean() + penalty


def generator_loss(
    generator: Generator, discriminator: Discriminator, latents: jax.Array, labels: jax.Array
) -> jax.Array:
    """Minus the mean score of new images."""
    return -discriminator(generator(latents, labels), labels).mean()


def train(
    generator: Generator,
    discriminator: Discriminator,
    digits: Digits,
    *,
    steps: int,
    seed: int,
    watch: Callable[[int], str],
    every: int,
) -> None:
    """Train both networks, in place.

    Args:
        generator: in training mode.
        discriminator: in training mode.
        digits: the real images.
        steps: how many.
        seed: of the batches and latents.
        watch: called with the step before the first, every `every` steps and after the last; what it returns is shown.
        every: how often.
    """
    real, classes = jnp.asarray(digits.images), jnp.asarray(digits.labels)
    generator_adam = _adam(generator, GENERATOR_RATE)
    discriminator_adam = _adam(discriminator, DISCRIMINATOR_RATE)

    @nnx.jit
    def step_of_both(
        generator: Generator,
        discriminator: Discriminator,
        generator_adam: "nnx.Optimizer[Generator]",
        discriminator_adam: "nnx.Optimizer[Discriminator]",
        key: jax.Array,
    ) -> None:
        keys = jax.random.split(key, 4)
        batch = jax.random.randint(keys[0], (BATCH,), 0, len(real))
        fake = generator(jax.random.normal(keys[1], (BATCH, LATENT)), classes[batch])
        gradient = nnx.grad(discriminator_loss)(discriminator, real[batch], classes[batch], fake)
        discriminator_adam.update(discriminator, gradient)
        latents = jax.random.normal(keys[2], (BATCH, LATENT))
        labels = jax.random.randint(keys[3], (BATCH,), 0, CLASSES)
        generator_adam.update(generator, nnx.grad(generator_loss)(generator, discriminator, latents, labels))

    with tqdm(total=steps, unit="step", disable=not sys.stderr.isatty(), leave=False) as bar:
        for step, key in enumerate(jax.random.split(jax.random.key(seed), steps)):
            if step % every == 0:
                _say(bar, step, watch(step))
            step_of_both(generator, discriminator, generator_adam, discriminator_adam, key)
            bar.update()
        _say(bar, steps, watch(steps))


def _adam(network: nnx.Module, rate: float) -> "nnx.Optimizer[nnx.Module]":
    return nnx.Optimizer(network, optax.adam(rate, *BETAS), wrt=nnx.Param)


def _say(bar: "tqdm[None]", step: int, state: str) -> None:
    bar.write(f"   step {step:5}: {state}", file=sys.stdout)
    sys.stdout.flush()
