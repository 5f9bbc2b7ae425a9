"""SAGAN-style 2-D self-attention for Keras 3, on TensorFlow, JAX and PyTorch."""

import os

from selfattn_core import __version__
from selfattn_core.installed import missing_modules, require

_FRAMEWORKS = ("tensorflow", "jax", "torch")

_chosen = os.environ.get("KERAS_BACKEND")
require("selfattn_keras", ["keras"], f"keras-{_chosen}" if _chosen in _FRAMEWORKS else "keras")

try:
    from selfattn_keras.converting.conversion import convert
    from selfattn_keras.layer import SelfAttention2D
    from selfattn_keras.maps import attention_grid
    from selfattn_keras.weights import from_canonical, load, refresh_spectral_norm, save, to_canonical
    from selfattn_keras.with_map import SelfAttention2DWithMap
except ModuleNotFoundError as error:
    # Keras imports the framework that KERAS_BACKEND or keras.json names. Only an error about that one is translated.
    framework = (error.name or "").partition(".")[0]
    if framework in _FRAMEWORKS:
        _others = [other for other in _FRAMEWORKS if not missing_modules([other])]
        require(
            "selfattn_keras",
            [framework],
            f"keras-{framework}",
            otherwise=f"set KERAS_BACKEND to {' or '.join(_others)}, which Keras can run on here"
            if _others
            else "",
        )
    raise

__all__ = [
    "SelfAttention2D",
    "SelfAttention2DWithMap",
    "__version__",
    "attention_grid",
    "convert",
    "from_canonical",
    "load",
    "refresh_spectral_norm",
    "save",
    "to_canonical",
]
