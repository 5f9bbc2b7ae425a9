"""Training in PyTorch: hinge loss, R1 on real images, one step of each network in turn."""

import sys
from collections.abc import Callable

import torch
from torch.nn.functional import relu
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
from examples.gan_torch.networks import Discriminator, Generator

__all__ = ["discriminator_loss", "generator_loss", "train"]


def discriminator_loss(
    discriminator: Discriminator, real: torch.Tensor, labels: torch.Tensor, fake: torch.Tensor
) -> torch.Tensor:
    """The hinge loss, with the gradient penalty on the real images.

    Args:
        discriminator: in training mode.
        real: (B, 1, 8, 8).
        labels: (B,), of both.
        fake: (B, 1, 8, 8).
    """
    real = real.requires_grad_()
    scores = discriminator(real, labels)
    (gradient,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
    penalty = R1_WEIGHT / 2 * gradient.square().sum(dim=(1, 2, 3)).mean()
    return relu(1 - scores).mean() + relu(1 + discriminator(fake, labels)).mean() + penalty


def generator_loss(
    generator: Generator, discriminator: Discriminator, latents: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Minus the mean score of new images."""
    return -discriminator(generator(latents, labels), labels).mean()


def train(
    generator: Generator,
    discriminator: Discriminator,
    digits: Digits,
    *,
    steps: int,
    watch: Callable[[int], str],
    every: int,
) -> None:
    """Train both networks.

    Args:
        generator: changed in place.
        discriminator: changed in place.
        digits: the real images.
        steps: how many.
        watch: called with the step before the first, every `every` steps and after the last; what it returns is shown.
        every: how often.
    """
    real = torch.from_numpy(digits.images).permute(0, 3, 1, 2)
    classes = torch.from_numpy(digits.labels)
    generator_adam = torch.optim.Adam(generator.parameters(), GENERATOR_RATE, BETAS)
    discriminator_adam = torch.optim.Adam(discriminator.parameters(), DISCRIMINATOR_RATE, BETAS)
    with tqdm(total=steps, unit="step", disable=not sys.stderr.isatty(), leave=False) as bar:
        for step in range(steps):
            if step % every == 0:
                _say(bar, step, watch(step))
            batch = torch.randint(len(real), (BATCH,))
            with torch.no_grad():
                fake = generator(torch.randn(BATCH, LATENT), classes[batch])
            loss = discriminator_loss(discriminator, real[batch], classes[batch], fake)
            discriminator_adam.zero_grad()
            loss.backward()
            discriminator_adam.step()

            loss = generator_loss(
                generator, discriminator, torch.randn(BATCH, LATENT), torch.randint(CLASSES, (BATCH,))
            )
            generator_adam.zero_grad()
            loss.backward()
            generator_adam.step()
            bar.update()
        _say(bar, steps, watch(steps))


def _say(bar: "tqdm[None]", step: int, state: str) -> None:
    bar.write(f"   step {step:5}: {state}", file=sys.stdout)
    sys.stdout.flush()
