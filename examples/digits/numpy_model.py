"""The classifier in numpy, around the definition of the attention layer. Every framework is compared with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

import selfattn_core
from examples.digits import files
from selfattn_core import SelfAttentionConfig, spec

Array = NDArray[Any]


class Classifier:
    """The classifier, which computes in the dtype of its weights.

    Args:
        config: config of the attention layer.
        attention: parameters of the attention layer by canonical name.
        network: the other layers, by the names and shapes of `files.NETWORK`.
    """

    def __init__(
        self, config: SelfAttentionConfig, attention: Mapping[str, Array], network: Mapping[str, Array]
    ) -> None:
        self.config = config
        self.attention = dict(attention)
        self.network = dict(network)

    def __call__(self, images: Array) -> Array:
        """Logits (B, 10) of images (B, 8, 8, 1)."""
        x = _relu(spec.forward(self.config, self.attention, self.features(images)))
        return x.max(axis=(1, 2)) @ self.network["dense.kernel"] + self.network["dense.bias"]

    def features(self, images: Array) -> Array:
        """The input of the attention layer, (B, 8, 8, 32)."""
        x = images.astype(self.network["dense.bias"].dtype)
        return _relu(self._conv("conv2", _relu(self._conv("conv1", x))))

    def attention_map(self, images: Array) -> Array:
        """The attention map, (B, 64, 64)."""
        return spec.attention_map(self.config, self.attention, self.features(images))

    def astype(self, dtype: str) -> "Classifier":
        """The same classifier in another precision."""
        attention, network = (
            {name: array.astype(dtype) for name, array in arrays.items()}
            for arrays in (self.attention, self.network)
        )
        return Classifier(self.config, attention, network)

    def without_attention(self) -> "Classifier":
        """The same classifier with gamma = 0, so that the attention layer returns its input."""
        return Classifier(self.config, self.attention | {"gamma": np.zeros_like(self.gamma)}, self.network)

    @property
    def gamma(self) -> Array:
        """Gamma of the attention layer, (1,)."""
        return self.attention["gamma"]

    def _conv(self, name: str, x: Array) -> Array:
        """A 3×3 convolution with a border of zeros, so that the map keeps its size."""
        kernel = self.network[f"{name}.kernel"]  # (3, 3, C_in, C_out)
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = sliding_window_view(padded, (3, 3), axis=(1, 2))  # (B, H, W, C_in, 3, 3)
        return np.tensordot(windows, kernel, axes=((4, 5, 3), (0, 1, 2))) + self.network[f"{name}.bias"]


def load(folder: Path) -> Classifier:
    """The classifier with the trained weights, in float32, their stored dtype."""
    config, attention = selfattn_core.load(folder / files.ATTENTION)
    return Classifier(config, attention, files.load_network(folder))


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)
