"""SAGAN-style 2-D self-attention for Keras 3, on TensorFlow, JAX and PyTorch."""

import os

from selfattn_core import __version__
from selfattn_core.installed import require

_EXTRAS = {"tensorflow": "keras-tensorflow", "jax": "keras-jax", "torch": "keras-torch"}

require("selfattn_keras", ["keras"], _EXTRAS.get(os.environ.get("KERAS_BACKEND", ""), "keras"))

try:
    from selfattn_keras.layer import SelfAttention2D
    from selfattn_keras.maps import attention_grid
    from selfattn_keras.weights import from_canonical, load, save, to_canonical
except ModuleNotFoundError as error:
    # Keras imports the framework that KERAS_BACKEND or keras.json names; only that one's absence is translated.
    framework = (error.name or "").partition(".")[0]
    if framework in _EXTRAS:
        require("selfattn_keras", [framework], _EXTRAS[framework])
    raise

__all__ = [
    "SelfAttention2D",
    "__version__",
    "attention_grid",
    "from_canonical",
    "load",
    "save",
    "to_canonical",
]
