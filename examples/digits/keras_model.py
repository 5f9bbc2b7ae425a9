"""The classifier in Keras 3, on whichever backend KERAS_BACKEND names. As a program, it scores the held-out images."""

from pathlib import Path
from typing import Any

import keras
from numpy.typing import NDArray

import selfattn_keras
from examples.digits import files
from selfattn_keras import SelfAttention2D

Array = NDArray[Any]


def build(attention: SelfAttention2D) -> keras.Model:
    """The classifier around an attention layer. Its other layers have new weights."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu", name="conv1"),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu", name="conv2"),
            attention,
            keras.layers.ReLU(),
            keras.layers.GlobalMaxPooling2D(),
            keras.layers.Dense(10, name="dense"),
        ]
    )


def load(folder: Path) -> keras.Model:
    """The classifier with the weights that were trained in PyTorch."""
    model = build(selfattn_keras.load(folder / files.ATTENTION))
    network = files.load_network(folder)
    for name in ("conv1", "conv2", "dense"):
        model.get_layer(name).set_weights([network[f"{name}.kernel"], network[f"{name}.bias"]])
    return model


def logits(model: keras.Model, images: Array) -> Array:
    """Logits (B, 10) of images (B, 8, 8, 1)."""
    return model.predict(images, verbose=0)


if __name__ == "__main__":
    # The images are channels-last, whatever the user's keras.json contains.
    keras.config.set_image_data_format("channels_last")
    files.answer(lambda folder, images: logits(load(folder), images))
