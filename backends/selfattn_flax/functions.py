"""The arithmetic that the NNX and Linen layers share."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from selfattn_core import SelfAttentionConfig

__all__ = ["pool", "residual", "rows", "unflatten"]


def rows(maps: jax.Array) -> jax.Array:
    """(…, H, W, D) to (…, N, D), positions in row-major order."""
    *leading, height, width, channels = maps.shape
    return maps.reshape(*leading, height * width, channels)


def pool(maps: jax.Array, side: int) -> jax.Array:
    """Max pooling over side×side windows, rounding down: (…, H, W, D) to (…, H', W', D)."""
    return nnx.max_pool(maps, window_shape=(side, side), strides=(side, side)) if side > 1 else maps


def residual(gamma: jax.Array, attended: jax.Array, x: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    """γ·z + x, computed in at least float32 and rounded once."""
    result = jnp.result_type(gamma, attended, x) if dtype is None else jnp.dtype(dtype)
    arithmetic = jnp.promote_types(result, jnp.float32)
    gamma, attended, x = (array.astype(arithmetic) for array in (gamma, attended, x))
    return (gamma * attended + x).astype(result)


def unflatten(config: SelfAttentionConfig, attention: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A map (…, N, M) as (…, H, W, H', W'), for an input of shape (…, H, W, C)."""
    *leading, height, width, _ = shape
    return attention.reshape(*leading, height, width, *config.key_grid(height, width))
