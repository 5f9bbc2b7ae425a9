"""A SAGAN in Keras, whole: R1, spectral norm, mixed bfloat16, averaged weights, a compiled step, checkpoints that resume.

Run as `python -m examples.sagan_keras`. To train on other images, copy this file and change the networks and the batches.
Exit codes: 0 trained, 1 the training fell short or the networks of `--start` give other images, 2 wrong usage, 3 something
is not installed, 130 interrupted.

Keras runs on TensorFlow here. The penalty is one tape inside another in an ordinary `train_step`, which Keras compiles, and
the trained generator can be served from a SavedModel. On JAX a `stateless_train_step` would have to pass all variables of
both networks by hand. On PyTorch `train_step` is not compiled.
"""

import os
import sys
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from examples.command import run
from examples.gan import files, program
from examples.gan.batches import Batch
from examples.gan.settings import CLASSES, LATENT, SIDE, WIDTHS
from selfattn_core import save_blocks

# Keras chooses its backend at the first import. The other variable silences TensorFlow's messages about the machine.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

try:
    import keras
    import tensorflow as tf
    from keras import layers

    import selfattn_keras
    from examples.gan import loop
    from selfattn_keras import SelfAttention2D
except ModuleNotFoundError as error:
    sys.exit(program.missing(error, "keras"))

Array = NDArray[Any]

STEPS = 1500
GENERATOR_RATE = 1e-3
DISCRIMINATOR_RATE = 2e-3
BETAS = (0.0, 0.99)
EPSILON = 1e-8
"""The epsilon of Adam. Keras adds it before the bias correction, the other frameworks after it."""
WEIGHT_DECAY = 1e-4
R1_WEIGHT = 1.0
"""The penalty is this weight times half the mean squared norm of the gradient of the scores of real images."""
AVERAGE_DECAY = 0.99
"""The share of the old average in the averaged weights after each step."""

_CHECKPOINT = "checkpoint.weights.h5"
_PARTS = ("dense", "conv1", "conv2", "conv3")


class SpectralConv2D(layers.Layer):
    """A 3×3 convolution with a border of zeros, its kernel divided by its spectral norm.

    The state is that of PyTorch and of the attention layers, so a training can continue in another framework.
    `keras.layers.SpectralNormalization` overwrites the kernel instead.

    Args:
        channels: channels of the output.
        stride: stride in both directions.
        name: name of the layer.
    """

    def __init__(self, channels: int, *, stride: int = 1, name: str) -> None:
        super().__init__(name=name)
        self.channels, self.stride = channels, stride

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create kernel, bias, u and v."""
        self._create(3, 3, input_shape[-1], self.channels)

    def _create(self, *shape: int) -> None:
        # Not cast to 16 bits, because the norm is computed in float32.
        self.kernel = self.add_weight(
            shape=shape, initializer="glorot_uniform", name="kernel", autocast=False
        )
        self.bias = self.add_weight(shape=shape[-1:], initializer="zeros", name="bias", autocast=False)
        state = {"initializer": _random_unit, "trainable": False, "autocast": False}
        self.u = self.add_weight(shape=shape[-1:], name="u", **state)
        self.v = self.add_weight(shape=shape[:-1], name="v", **state)

    def normalised_kernel(self, training: bool | None) -> tf.Tensor:
        """The kernel divided by its largest singular value. In training, one power iteration runs first."""
        kernel = tf.convert_to_tensor(self.kernel)
        inputs = list(range(len(kernel.shape) - 1))
        u, v = tf.convert_to_tensor(self.u), tf.convert_to_tensor(self.v)
        if training:
            u = _unit(tf.tensordot(v, tf.stop_gradient(kernel), [inputs, inputs]))
            v = _unit(tf.tensordot(tf.stop_gradient(kernel), u, 1))
            self.u.assign(u)
            self.v.assign(v)
        u, v = tf.stop_gradient(u), tf.stop_gradient(v)
        return tf.cast(kernel / tf.reduce_sum(v * tf.tensordot(kernel, u, 1)), self.compute_dtype)

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """(B, H, W, C_in) to (B, H/stride, W/stride, C_out)."""
        # With a stride, "same" would not pad at the same end as torch.
        border = [[0, 0], [1, 1], [1, 1], [0, 0]]
        kernel = self.normalised_kernel(training)
        return tf.nn.conv2d(inputs, kernel, self.stride, border) + tf.cast(self.bias, self.compute_dtype)


class SpectralDense(SpectralConv2D):
    """A dense layer, its kernel divided by its spectral norm."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create kernel, bias, u and v."""
        self._create(input_shape[-1], self.channels)

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """(B, C_in) to (B, C_out)."""
        return inputs @ self.normalised_kernel(training) + tf.cast(self.bias, self.compute_dtype)


def _unit(vector: tf.Tensor) -> tf.Tensor:
    return vector / tf.maximum(tf.norm(vector), 1e-12)


def _random_unit(shape: tuple[int, ...], dtype: str) -> tf.Tensor:
    return _unit(keras.random.normal(shape, dtype=dtype))


def generator(attention: SelfAttention2D) -> keras.Model:
    """Images (B, 8, 8, 1), float32, of latents (B, LATENT) and labels (B,). Attention acts on an 8×8 map."""
    latents = keras.Input((LATENT,), name="latents")
    labels = keras.Input((), dtype="int64", name="labels")
    conv = {"kernel_size": 3, "padding": "same", "data_format": "channels_last"}
    x = layers.Concatenate()([latents, keras.ops.one_hot(labels, CLASSES)])
    x = layers.Dense(4 * 4 * WIDTHS["first"], activation="relu", name="dense")(x)
    x = layers.Reshape((4, 4, WIDTHS["first"]))(x)
    x = layers.UpSampling2D(2, data_format="channels_last")(x)
    x = layers.Conv2D(WIDTHS["attended"], activation="relu", name="conv1", **conv)(x)
    x = attention(x)
    x = layers.Conv2D(WIDTHS["last"], activation="relu", name="conv2", **conv)(x)
    x = layers.Conv2D(1, name="conv3", **conv)(x)
    return keras.Model([latents, labels], layers.Activation("sigmoid", dtype="float32")(x))


def discriminator(attention: SelfAttention2D) -> keras.Model:
    """Scores (B,), float32, of images (B, 8, 8, 1) and labels (B,), with spectral norm everywhere."""
    images = keras.Input((SIDE, SIDE, 1), name="images")
    labels = keras.Input((), dtype="int64", name="labels")
    x = layers.LeakyReLU(0.2)(SpectralConv2D(32, name="conv1")(images))
    x = layers.LeakyReLU(0.2)(SpectralConv2D(64, stride=2, name="conv2")(attention(x)))
    x = layers.LeakyReLU(0.2)(SpectralConv2D(64, stride=2, name="conv3")(x))
    scores = keras.ops.cast(SpectralDense(1 + CLASSES, name="dense")(keras.ops.sum(x, (1, 2))), "float32")
    # One output scores whether the image is a digit, the others whether it is the given one.
    chosen = keras.ops.sum(scores[:, 1:] * keras.ops.one_hot(labels, CLASSES, dtype="float32"), 1)
    return keras.Model([images, labels], scores[:, 0] + chosen)


def new() -> tuple[keras.Model, keras.Model]:
    """Networks with random weights."""
    pooled = SelfAttention2D(
        value_channels=16,
        out_projection=True,
        use_bias=False,
        kv_pool=2,
        spectral_norm=True,
        data_format="channels_last",
    )
    flat = SelfAttention2D(spectral_norm=True, data_format="channels_last")
    return generator(flat), discriminator(pooled)


def network_of(folder: Path, name: str) -> keras.Model:
    """One of `files.BLOCKS` from the files that `export`, of any framework, wrote."""
    attention = selfattn_keras.load(
        folder / files.ATTENTION, block=name, data_format="channels_last", dtype=keras.config.dtype_policy()
    )
    network = (discriminator if name == "discriminator" else generator)(attention)
    arrays = files.load_networks(folder)
    for part in _PARTS:
        names = [f"{name}.{part}.{value}" for value in ("kernel", "bias", "u", "v")]
        network.get_layer(part).set_weights([arrays[value] for value in names if value in arrays])
    return network


class SAGAN(keras.Model):
    """Both networks, their optimisers and the averaged generator.

    Args:
        generator: the generator to train.
        discriminator: the discriminator to train.
        averaged: the average of an earlier training. By default a new one, which begins with the first step.
    """

    def __init__(
        self, generator: keras.Model, discriminator: keras.Model, averaged: keras.Model | None = None
    ) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        self.averaged = averaged or keras.models.clone_model(generator)
        self._begins_average = averaged is None
        self.generator_adam = _adam(generator, GENERATOR_RATE)
        self.discriminator_adam = _adam(discriminator, DISCRIMINATOR_RATE)
        self.built = True

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """One step of each network on a `Batch`."""
        batch, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        real, labels = batch["real"], batch["labels"]
        fake = self.generator([batch["latents"], labels], training=True)
        with tf.GradientTape() as tape:
            with tf.GradientTape(watch_accessed_variables=False) as inner:
                inner.watch(real)
                scores = self.discriminator([real, labels], training=True)
                total = tf.reduce_sum(scores)
            gradient = inner.gradient(total, real)
            penalty = R1_WEIGHT / 2 * tf.reduce_mean(tf.reduce_sum(gradient**2, axis=(1, 2, 3)))
            hinge = tf.reduce_mean(tf.nn.relu(1 - scores))
            hinge += tf.reduce_mean(tf.nn.relu(1 + self.discriminator([fake, labels], training=True)))
            loss = hinge + penalty
        weights = self.discriminator.trainable_variables
        self.discriminator_adam.apply(tape.gradient(loss, weights), weights)

        with tf.GradientTape() as tape:
            images = self.generator([batch["new_latents"], batch["new_labels"]], training=True)
            # In evaluation mode its spectral norm does not move.
            loss = -tf.reduce_mean(self.discriminator([images, batch["new_labels"]], training=False))
        weights = self.generator.trainable_variables
        first = self._begins_average & (self.generator_adam.iterations == 0)
        self.generator_adam.apply(tape.gradient(loss, weights), weights)

        share = tf.where(first, 1.0, 1 - AVERAGE_DECAY)
        for average, weight in zip(self.averaged.trainable_variables, weights, strict=True):
            average.assign(average + share * (weight - average))
        # u and v of a spectral norm are unit vectors. Their average is shorter than 1, and sigma would be too small.
        # So parameters are averaged, and u and v are copied.
        state = self.generator.non_trainable_variables
        for copy, vector in zip(self.averaged.non_trainable_variables, state, strict=True):
            copy.assign(vector)
        return {"loss/discriminator": hinge, "loss/penalty": penalty, "loss/generator": loss}


def _adam(network: keras.Model, rate: float) -> keras.optimizers.Optimizer:
    adam = keras.optimizers.AdamW(rate, WEIGHT_DECAY, *BETAS, epsilon=EPSILON)
    # Only kernels decay. Decay would pull gamma back to 0, where the layer does nothing.
    adam.exclude_from_weight_decay(var_names=["gamma", "bias"])
    adam.build(network.trainable_variables)
    return adam


class Training:
    """A training with its checkpoints.

    Args:
        generator: the generator to train.
        discriminator: the discriminator to train.
        averaged: the average of an earlier training. By default a new one, which begins with the first step.
    """

    def __init__(
        self, generator: keras.Model, discriminator: keras.Model, averaged: keras.Model | None = None
    ) -> None:
        self._model = SAGAN(generator, discriminator, averaged)
        self._model.compile()
        averaged = self._model.averaged
        self._features = keras.Model(averaged.input, _attention(averaged).input)

    @property
    def step(self) -> int:
        """The number of completed steps."""
        return int(self._model.generator_adam.iterations)

    def update(self, batch: Batch) -> dict[str, float]:
        """Make one step of each network, and return the losses and gains before it."""
        networks = {"generator": self._model.generator, "discriminator": self._model.discriminator}
        gains = {f"gamma/{name}": _gain(network) for name, network in networks.items()}
        losses = self._model.train_on_batch(batch._asdict(), return_dict=True)
        return {name: float(value) for name, value in losses.items()} | gains

    def generate(self, latents: Array, labels: Array) -> Array:
        """Images (B, 8, 8, 1) of the averaged generator."""
        return self._model.averaged([latents, labels], training=False).numpy()

    def attend(self, latents: Array, labels: Array) -> Array:
        """The map (B, 8, 8, 8, 8) of the averaged generator's attention."""
        features = self._features([latents, labels])
        return selfattn_keras.attention_grid(_attention(self._model.averaged), features).numpy()

    def gain(self) -> float:
        """The gamma of that map's layer."""
        return _gain(self._model.averaged)

    def samples(self, latents: Array, labels: Array) -> files.Samples:
        """Images and the discriminator's scores of them, in float32, to check a move to another framework."""
        averaged, discriminator = _in_float32(self._model.averaged, self._model.discriminator)
        images = averaged([latents, labels], training=False).numpy()
        scores = discriminator([images, labels], training=False)
        return files.Samples(latents, labels, images, scores.numpy())

    def export(self, folder: Path) -> None:
        """Write the networks as files that every framework reads; see `examples.gan.files`."""
        networks = {name: getattr(self._model, name) for name in files.BLOCKS}
        attention = {name: _attention(network) for name, network in networks.items()}
        blocks = {
            name: (layer.config, selfattn_keras.to_canonical(layer)) for name, layer in attention.items()
        }
        source = f"examples.sagan_keras, step {self.step}"
        save_blocks(folder / files.ATTENTION, blocks, overwrite=True, source=source)
        files.save_networks(
            folder,
            {
                f"{name}.{part}.{variable.name}": variable.numpy()
                for name, network in networks.items()
                for part in _PARTS
                for variable in network.get_layer(part).variables
            },
        )

    def save(self, folder: Path) -> None:
        """Write everything that the next step depends on."""
        beside = folder / f"partial.{_CHECKPOINT}"
        self._model.save_weights(beside)
        # If the training is interrupted here, the file is the old or the new one, and always complete.
        beside.replace(folder / _CHECKPOINT)

    def load(self, folder: Path) -> None:
        """Continue from the last call of `save`."""
        self._model.load_weights(folder / _CHECKPOINT)


def _in_float32(*networks: keras.Model) -> list[keras.Model]:
    """A generator and a discriminator that compute in float32."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")
    try:
        twins = new()
    finally:
        keras.config.set_dtype_policy(policy)
    for twin, network in zip(twins, networks, strict=True):
        twin.set_weights(network.get_weights())
    return list(twins)


def _attention(network: keras.Model) -> SelfAttention2D:
    (layer,) = (layer for layer in network.layers if isinstance(layer, SelfAttention2D))
    return layer


def _gain(network: keras.Model) -> float:
    return float(_attention(network).gamma.numpy()[0])


def main() -> int:
    """Train and return the exit code."""
    options = program.arguments("keras", (__doc__ or "").partition("\n")[0], steps=STEPS)
    if code := program.refusal(options):
        return code
    keras.utils.set_random_seed(options.seed)
    if options.precision == "bfloat16":
        keras.config.set_dtype_policy("mixed_bfloat16")
    networks = [network_of(options.start, name) for name in files.BLOCKS] if options.start else new()
    return loop.train(Training(*networks), options)


if __name__ == "__main__":
    run(main)
