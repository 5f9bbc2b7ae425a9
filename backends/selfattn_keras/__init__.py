"""SAGAN-style 2-D self-attention for Keras 3, on TensorFlow, JAX and PyTorch."""

from selfattn_core.installed import require

require("selfattn_keras", ["keras"], "keras")

try:
    from selfattn_keras.layer import SelfAttention2D
    from selfattn_keras.maps import attention_grid
    from selfattn_keras.weights import from_canonical, load, refresh_spectral_norm, save, to_canonical
except ModuleNotFoundError as error:
    # Keras imports the framework that KERAS_BACKEND or keras.json names; only that one's absence is translated.
    framework = (error.name or "").partition(".")[0]
    extras = {"tensorflow": "keras", "jax": "keras,jax", "torch": "keras,torch"}
    if framework in extras:
        require("selfattn_keras", [framework], extras[framework])
    raise

__all__ = [
    "SelfAttention2D",
    "attention_grid",
    "from_canonical",
    "load",
    "refresh_spectral_norm",
    "save",
    "to_canonical",
]
