"""The generator in Keras."""

from pathlib import Path

import keras

import selfattn_keras
from examples.gan import files
from examples.gan.settings import CLASSES, LATENT, WIDTHS
from selfattn_keras import SelfAttention2D

__all__ = ["build", "load"]


def build(attention: SelfAttention2D) -> keras.Model:
    """Images (B, 8, 8, 1) of latents (B, LATENT) and labels (B,); all layers but the attention layer are new."""
    latents = keras.Input((LATENT,), name="latents")
    labels = keras.Input((), dtype="int64", name="labels")
    conv = {"kernel_size": 3, "padding": "same", "data_format": "channels_last"}
    x = keras.layers.Concatenate()([latents, keras.ops.one_hot(labels, CLASSES)])
    x = keras.layers.Dense(4 * 4 * WIDTHS["first"], activation="relu", name="dense")(x)
    x = keras.layers.Reshape((4, 4, WIDTHS["first"]))(x)
    x = keras.layers.UpSampling2D(2, data_format="channels_last")(x)
    x = keras.layers.Conv2D(WIDTHS["attended"], activation="relu", name="conv1", **conv)(x)
    x = attention(x)
    x = keras.layers.Conv2D(WIDTHS["last"], activation="relu", name="conv2", **conv)(x)
    x = keras.layers.Conv2D(1, activation="sigmoid", name="conv3", **conv)(x)
    return keras.Model([latents, labels], x)


def load(folder: Path) -> keras.Model:
    """The generator of a checkpoint, whichever framework wrote it."""
    attention = selfattn_keras.load(folder / files.ATTENTION, block="generator", data_format="channels_last")
    model = build(attention)
    arrays = files.load_networks(folder)
    for name in ("dense", "conv1", "conv2", "conv3"):
        model.get_layer(name).set_weights([arrays[f"generator.{name}.{part}"] for part in ("kernel", "bias")])
    return model
