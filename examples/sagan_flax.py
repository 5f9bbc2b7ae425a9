"""A SAGAN in Flax NNX, whole: R1, spectral norm, bfloat16, averaged weights, a compiled step, checkpoints that resume.

Run as `python -m examples.sagan_flax`. To train on other images, copy this file and change the networks and the batches.
Exit codes: 0 trained, 1 the training fell short or the networks of `--start` give other images, 2 wrong usage, 3 something
is not installed, 130 interrupted.
"""

import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from examples.command import run
from examples.gan import files, program
from examples.gan.batches import Batch
from examples.gan.settings import CLASSES, LATENT, WIDTHS
from selfattn_core import save_blocks

try:
    import jax
    import jax.numpy as jnp
    import optax
    import orbax.checkpoint
    from flax import nnx, traverse_util

    import selfattn_flax
    from examples.gan import loop
    from selfattn_flax import SelfAttention2D
except ModuleNotFoundError as error:
    sys.exit(program.missing(error, "flax"))

Array = NDArray[Any]

STEPS = 1500
GENERATOR_RATE = 1e-3
DISCRIMINATOR_RATE = 2e-3
BETAS = (0.0, 0.99)
EPSILON = 1e-8
WEIGHT_DECAY = 1e-4
R1_WEIGHT = 1.0
"""The penalty is this weight times half the mean squared norm of the gradient of the scores of real images."""
AVERAGE_DECAY = 0.99
"""The share of the old average in the averaged weights after each step."""

_CHECKPOINTS = "checkpoints"


class SpectralConv(nnx.Module):
    """A 3×3 convolution with a border of zeros, its kernel divided by its spectral norm.

    The state is that of PyTorch and of the attention layers, so a training can continue in another framework.
    `nnx.SpectralNorm` overwrites the kernel instead.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        stride: stride in both directions.
        dtype: dtype of the computation.
        rngs: source of the initial values.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, stride: int = 1, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self._shape(3, 3, channels_in, channels_out, rngs=rngs)
        self.stride, self.dtype = stride, dtype

    def _shape(self, *shape: int, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(nnx.initializers.glorot_uniform()(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(shape[-1:]))
        self.u = nnx.BatchStat(_unit(jax.random.normal(rngs.params(), shape[-1:])))
        self.v = nnx.BatchStat(_unit(jax.random.normal(rngs.params(), shape[:-1])))
        # `train()` and `eval()` of a module set this attribute, as for batch norm.
        self.use_running_average = False

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set the mode. `nnx.view` calls it."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def normalised_kernel(self) -> jax.Array:
        """The kernel divided by its largest singular value. In training mode, one power iteration runs first."""
        kernel = self.kernel[...]
        inputs = tuple(range(kernel.ndim - 1))
        if not self.use_running_average:
            fixed = jax.lax.stop_gradient(kernel)
            self.u[...] = _unit(jnp.tensordot(self.v[...], fixed, (inputs, inputs)))
            self.v[...] = _unit(fixed @ self.u[...])
        return (kernel / jnp.sum(self.v[...] * (kernel @ self.u[...]))).astype(self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C_in) to (B, H/stride, W/stride, C_out)."""
        # With a stride, "SAME" would not pad at the same end as torch.
        convolved = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            self.normalised_kernel(),
            (self.stride, self.stride),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return convolved + self.bias[...].astype(self.dtype)


class SpectralLinear(SpectralConv):
    """A dense layer, its kernel divided by its spectral norm.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        dtype: dtype of the computation.
        rngs: source of the initial values.
    """

    def __init__(self, channels_in: int, channels_out: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self._shape(channels_in, channels_out, rngs=rngs)
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, C_in) to (B, C_out)."""
        return x.astype(self.dtype) @ self.normalised_kernel() + self.bias[...].astype(self.dtype)


def _unit(vector: jax.Array) -> jax.Array:
    return vector / jnp.maximum(jnp.linalg.norm(vector), 1e-12)


class Generator(nnx.Module):
    """Maps a latent and a class to an image, through a 4×4 and an 8×8 map. Attention acts on the 8×8 map.

    Args:
        dtype: dtype of the computation. Parameters are float32.
        rngs: source of the initial values.
    """

    def __init__(self, *, dtype: Any, rngs: nnx.Rngs) -> None:
        first, attended, last = WIDTHS["first"], WIDTHS["attended"], WIDTHS["last"]
        self.dense = nnx.Linear(LATENT + CLASSES, 4 * 4 * first, dtype=dtype, rngs=rngs)
        self.conv1 = nnx.Conv(first, attended, (3, 3), dtype=dtype, rngs=rngs)
        self.attention = SelfAttention2D(attended, spectral_norm=True, dtype=dtype, rngs=rngs)
        self.conv2 = nnx.Conv(attended, last, (3, 3), dtype=dtype, rngs=rngs)
        self.conv3 = nnx.Conv(last, 1, (3, 3), dtype=dtype, rngs=rngs)

    def features(self, latents: jax.Array, labels: jax.Array) -> jax.Array:
        """The input of the attention layer, (B, 8, 8, C)."""
        x = self.dense(jnp.concatenate([latents, jax.nn.one_hot(labels, CLASSES)], axis=1))
        x = nnx.relu(x.reshape(len(x), 4, 4, -1)).repeat(2, axis=1).repeat(2, axis=2)
        return nnx.relu(self.conv1(x))

    def __call__(self, latents: jax.Array, labels: jax.Array) -> jax.Array:
        """Images (B, 8, 8, 1), float32, of latents (B, LATENT) and labels (B,)."""
        x = self.attention(self.features(latents, labels))
        return nnx.sigmoid(self.conv3(nnx.relu(self.conv2(x))).astype(jnp.float32))


class Discriminator(nnx.Module):
    """Maps an image and a class to a score, with spectral norm everywhere and attention in its pooled form.

    Args:
        dtype: dtype of the computation. Parameters are float32.
        rngs: source of the initial values.
    """

    def __init__(self, *, dtype: Any, rngs: nnx.Rngs) -> None:
        self.conv1 = SpectralConv(1, 32, dtype=dtype, rngs=rngs)
        self.attention = SelfAttention2D(
            32,
            value_channels=16,
            out_projection=True,
            use_bias=False,
            kv_pool=2,
            spectral_norm=True,
            dtype=dtype,
            rngs=rngs,
        )
        self.conv2 = SpectralConv(32, 64, stride=2, dtype=dtype, rngs=rngs)
        self.conv3 = SpectralConv(64, 64, stride=2, dtype=dtype, rngs=rngs)
        self.dense = SpectralLinear(64, 1 + CLASSES, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, labels: jax.Array) -> jax.Array:
        """Scores (B,), float32, of images (B, 8, 8, 1) as images of these classes."""
        x = nnx.leaky_relu(self.conv1(images), 0.2)
        x = nnx.leaky_relu(self.conv2(self.attention(x)), 0.2)
        x = nnx.leaky_relu(self.conv3(x), 0.2).sum(axis=(1, 2))
        scores = self.dense(x).astype(jnp.float32)
        # One output scores whether the image is a digit, the others whether it is the given one.
        return scores[:, 0] + jnp.take_along_axis(scores[:, 1:], labels[:, None], axis=1)[:, 0]


def discriminator_loss(
    discriminator: Discriminator, real: jax.Array, labels: jax.Array, fake: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The hinge loss plus the R1 penalty on the real images, and both separately."""

    def total(network: Discriminator, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = network(images, labels)
        return scores.sum(), scores

    # The network is an argument, so that its u and v can move inside this inner derivative.
    (_, scores), gradient = nnx.value_and_grad(total, argnums=1, has_aux=True)(discriminator, real)
    penalty = R1_WEIGHT / 2 * jnp.square(gradient).sum(axis=(1, 2, 3)).mean()
    hinge = nnx.relu(1 - scores).mean() + nnx.relu(1 + discriminator(fake, labels)).mean()
    return hinge + penalty, (hinge, penalty)


def generator_loss(
    generator: Generator, discriminator: Discriminator, latents: jax.Array, labels: jax.Array
) -> jax.Array:
    """Minus the mean score of new images."""
    return -discriminator(generator(latents, labels), labels).mean()


@nnx.jit
def update(state: "State", batch: Batch, share: jax.Array) -> dict[str, jax.Array]:
    """Make one step of each network. `share` is the share of the new weights in the average."""
    fake = state.generator(batch.latents, batch.labels)
    derivative = nnx.value_and_grad(discriminator_loss, has_aux=True)
    (_, (hinge, penalty)), gradient = derivative(state.discriminator, batch.real, batch.labels, fake)
    state.discriminator_adam.update(state.discriminator, gradient)

    # In evaluation mode its spectral norm does not move. It is an argument of the loss: what a function that is differentiated
    # closes over must not be changed in there.
    fixed = nnx.view(state.discriminator, use_running_average=True)
    loss, gradient = nnx.value_and_grad(generator_loss)(
        state.generator, fixed, batch.new_latents, batch.new_labels
    )
    state.generator_adam.update(state.generator, gradient)

    # u and v of a spectral norm are unit vectors. Their average is shorter than 1, and sigma would be too small. So parameters
    # are averaged, and u and v are copied.
    new, old = nnx.state(state.generator, nnx.Param), nnx.state(state.averaged, nnx.Param)
    nnx.update(state.averaged, optax.incremental_update(new, old, share))
    nnx.update(state.averaged, nnx.state(state.generator, nnx.BatchStat))
    return {"loss/discriminator": hinge, "loss/penalty": penalty, "loss/generator": loss}


class State(nnx.Module):
    """Both networks, their optimisers and the averaged generator: everything that the next step depends on."""

    def __init__(self, generator: Generator, discriminator: Discriminator, averaged: Generator) -> None:
        self.generator, self.discriminator, self.averaged = generator, discriminator, averaged
        self.generator_adam = _adam(generator, GENERATOR_RATE)
        self.discriminator_adam = _adam(discriminator, DISCRIMINATOR_RATE)


def _adam(network: nnx.Module, rate: float) -> "nnx.Optimizer[nnx.Module]":
    return nnx.Optimizer(network, _transformation(rate, EPSILON), wrt=nnx.Param)


@cache
def _transformation(rate: float, epsilon: float) -> optax.GradientTransformation:
    # The same object for each training in a process, because `nnx.jit` would compile the step again for another object.
    # Only kernels decay. Decay would pull gamma back to 0, where the layer does nothing.
    kernels = partial(jax.tree.map, lambda parameter: parameter.ndim > 1)
    return optax.adamw(rate, *BETAS, eps=epsilon, weight_decay=WEIGHT_DECAY, mask=kernels)


class Training:
    """A training with its checkpoints.

    Args:
        generator: the generator to train.
        discriminator: the discriminator to train.
        averaged: the average of an earlier training. By default a new one, which begins with the first step.
    """

    def __init__(
        self, generator: Generator, discriminator: Discriminator, averaged: Generator | None = None
    ) -> None:
        self.state = State(generator, discriminator, averaged or nnx.clone(generator))
        self.step, self._begins_average = 0, averaged is None

    def update(self, batch: Batch) -> dict[str, float]:
        """Make one step of each network, and return the losses and gains before it."""
        networks = {"generator": self.state.generator, "discriminator": self.state.discriminator}
        gains = {f"gamma/{name}": float(network.attention.gamma[0]) for name, network in networks.items()}
        first = self.step == 0 and self._begins_average
        losses = update(self.state, batch, jnp.float32(1 if first else 1 - AVERAGE_DECAY))
        self.step += 1
        return {name: float(value) for name, value in losses.items()} | gains

    def generate(self, latents: Array, labels: Array) -> Array:
        """Images (B, 8, 8, 1) of the averaged generator."""
        return jax.device_get(_images(self.state.averaged, latents, labels))

    def attend(self, latents: Array, labels: Array) -> Array:
        """The map (B, 8, 8, 8, 8) of the averaged generator's attention."""
        return jax.device_get(_map(self.state.averaged, latents, labels))

    def gain(self) -> float:
        """The gamma of that map's layer."""
        return float(self.state.averaged.attention.gamma[0])

    def samples(self, latents: Array, labels: Array) -> files.Samples:
        """Images and the discriminator's scores of them, in float32, to check a move to another framework."""
        averaged, discriminator = new(0, dtype=jnp.dtype("float32"))
        nnx.update(averaged, nnx.state(self.state.averaged))
        nnx.update(discriminator, nnx.state(self.state.discriminator))
        images = jax.device_get(_images(averaged, latents, labels))
        return files.Samples(latents, labels, images, jax.device_get(_scores(discriminator, images, labels)))

    def export(self, folder: Path) -> None:
        """Write the networks as files that every framework reads; see `examples.gan.files`."""
        networks = {name: getattr(self.state, name) for name in files.BLOCKS}
        blocks = {
            name: (network.attention.config, selfattn_flax.to_canonical(network.attention))
            for name, network in networks.items()
        }
        source = f"examples.sagan_flax, step {self.step}"
        save_blocks(folder / files.ATTENTION, blocks, overwrite=True, source=source)
        trees = {name: nnx.to_pure_dict(nnx.state(network)) for name, network in networks.items()}
        flat = traverse_util.flatten_dict(trees, sep=".")
        files.save_networks(folder, {name: jax.device_get(flat[name]) for name in files.NETWORKS})

    def save(self, folder: Path) -> None:
        """Write everything that the next step depends on to a folder of this step, and remove the previous folder."""
        with _checkpoints(folder) as manager:
            arrays = nnx.to_pure_dict(nnx.state(self.state))
            manager.save(self.step, args=orbax.checkpoint.args.StandardSave(arrays), force=True)

    def load(self, folder: Path) -> None:
        """Continue from the last call of `save`."""
        with _checkpoints(folder) as manager:
            state = nnx.state(self.state)
            like = nnx.to_pure_dict(state)
            self.step = manager.latest_step()
            arrays = manager.restore(self.step, args=orbax.checkpoint.args.StandardRestore(like))
        nnx.replace_by_pure_dict(state, arrays)
        nnx.update(self.state, state)


def _checkpoints(folder: Path) -> orbax.checkpoint.CheckpointManager:
    options = orbax.checkpoint.CheckpointManagerOptions(max_to_keep=1)
    return orbax.checkpoint.CheckpointManager((folder / _CHECKPOINTS).resolve(), options=options)


@nnx.jit
def _images(generator: Generator, latents: jax.Array, labels: jax.Array) -> jax.Array:
    return nnx.view(generator, use_running_average=True)(latents, labels)


@nnx.jit
def _map(generator: Generator, latents: jax.Array, labels: jax.Array) -> jax.Array:
    return selfattn_flax.attention_grid(generator.attention, generator.features(latents, labels))


@nnx.jit
def _scores(discriminator: Discriminator, images: jax.Array, labels: jax.Array) -> jax.Array:
    return nnx.view(discriminator, use_running_average=True)(images, labels)


def networks_of(folder: Path, *, dtype: Any) -> tuple[Generator, Discriminator, Generator]:
    """Generator, discriminator and averaged generator from the files that `export`, of any framework, wrote."""
    networks = new(0, dtype=dtype)
    networks = *networks, nnx.clone(networks[0])
    arrays = {name: jnp.asarray(array) for name, array in files.load_networks(folder).items()}
    trees = traverse_util.unflatten_dict(arrays, sep=".")
    for name, network in zip(files.BLOCKS, networks, strict=True):
        network.attention = selfattn_flax.load(folder / files.ATTENTION, block=name, dtype=dtype)
        nnx.update(network, trees[name])
    return networks


def new(seed: int, *, dtype: Any) -> tuple[Generator, Discriminator]:
    """Networks with random weights."""
    rngs = nnx.Rngs(seed)
    return Generator(dtype=dtype, rngs=rngs), Discriminator(dtype=dtype, rngs=rngs)


def main() -> int:
    """Train and return the exit code."""
    options = program.arguments("flax", (__doc__ or "").partition("\n")[0], steps=STEPS)
    if code := program.refusal(options):
        return code
    dtype = jnp.dtype(options.precision)
    networks = networks_of(options.start, dtype=dtype) if options.start else new(options.seed, dtype=dtype)
    return loop.train(Training(*networks), options)


if __name__ == "__main__":
    run(main)
