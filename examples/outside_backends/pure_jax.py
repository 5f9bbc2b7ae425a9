"""A self-attention layer in plain JAX, as a backend of the conformance kit.

    selfattn conform examples.outside_backends.pure_jax:Backend

Nothing from selfattn is imported. The kit passes a config and numpy arrays, and expects numpy arrays.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["Backend", "attention", "layer"]

Params = dict[str, jax.Array]


def _pool(maps: jax.Array, side: int) -> jax.Array:
    window = (1, side, side, 1)
    return lax.reduce_window(maps, -jnp.inf, lax.max, window, window, "VALID")


def attention(params: Params, x: jax.Array, pool: int) -> tuple[jax.Array, jax.Array]:
    """The attended values before gamma and the residual, and the map.

    Args:
        params: kernels (C_in, C_out) and biases by name.
        x: (B, H, W, C).
        pool: side of the pooling window of keys and values.

    Returns:
        (B, H, W, C) and (B, N, M).
    """

    def project(name: str, maps: jax.Array) -> jax.Array:
        return maps @ params[f"{name}.kernel"] + params.get(f"{name}.bias", jnp.zeros((), maps.dtype))

    query, key, value = (project(name, x) for name in ("query", "key", "value"))
    if pool > 1:
        key, value = _pool(key, pool), _pool(value, pool)
    batch, height, width, _ = x.shape
    rows, columns = height * width, key.shape[1] * key.shape[2]
    scores = jnp.einsum("bhwd,bijd->bhwij", query, key).reshape(batch, rows, columns)
    weights = jax.nn.softmax(scores, axis=-1)
    attended = jnp.einsum("bnm,bmd->bnd", weights, value.reshape(batch, columns, value.shape[-1]))
    attended = attended.reshape(batch, height, width, value.shape[-1])
    return (project("out", attended) if "out.kernel" in params else attended), weights


def layer(params: Params, x: jax.Array, pool: int) -> jax.Array:
    """The whole layer: y = gamma · attention(x) + x.

    Args:
        params: parameters of `attention`, and gamma (1,).
        x: (B, H, W, C).
        pool: see `attention`.
    """
    return params["gamma"] * attention(params, x, pool)[0] + x


_layer = jax.jit(layer, static_argnums=2)
_attention = jax.jit(attention, static_argnums=2)


@partial(jax.jit, static_argnums=3)
def _vjp(params: Params, x: jax.Array, dy: jax.Array, pool: int) -> tuple[Params, jax.Array]:
    _, pullback = jax.vjp(lambda params, x: layer(params, x, pool), params, x)
    by_params, by_x = pullback(dy)
    return by_params, by_x


@partial(jax.jit, static_argnums=3)
def _r1(params: Params, x: jax.Array, w: jax.Array, pool: int) -> tuple[jax.Array, tuple[Params, jax.Array]]:
    def penalty(params: Params, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.grad(lambda x: jnp.sum(w * layer(params, x, pool)))(x) ** 2)

    return jax.value_and_grad(penalty, (0, 1))(params, x)


class Backend:
    """The backend that the kit calls. A model is the params and the side of the pooling window."""

    name = "pure JAX"

    def versions(self) -> Mapping[str, str]:
        """Versions for the report."""
        return {"jax": jax.__version__}

    def claims(self) -> frozenset[str]:
        """The abilities implemented below. The kit asks for nothing else."""
        return frozenset({"forward", "map", "vjp", "r1", "params"})

    def layouts(self) -> tuple[str, ...]:
        """The layout of `layer`."""
        return ("channels_last",)

    def build(self, config: Any, params: Mapping[str, np.ndarray], dtype: str, layout: str) -> Any:  # noqa: ARG002
        """The weights on the device."""
        return {name: jnp.asarray(value, dtype) for name, value in params.items()}, config.kv_pool

    def forward(self, model: Any, x: np.ndarray) -> np.ndarray:
        """The output y."""
        params, pool = model
        return np.asarray(_layer(params, jnp.asarray(x), pool))

    def attention_map(self, model: Any, x: np.ndarray) -> np.ndarray:
        """The map A."""
        params, pool = model
        return np.asarray(_attention(params, jnp.asarray(x), pool)[1])

    def vjp(self, model: Any, x: np.ndarray, dy: np.ndarray) -> Mapping[str, np.ndarray]:
        """The first derivatives."""
        params, pool = model
        by_params, by_x = _vjp(params, jnp.asarray(x), jnp.asarray(dy), pool)
        return {name: np.asarray(value) for name, value in {"x": by_x, **by_params}.items()}

    def r1(self, model: Any, x: np.ndarray, w: np.ndarray) -> tuple[float, Mapping[str, np.ndarray]]:
        """The gradient penalty and its derivatives."""
        params, pool = model
        value, (by_params, by_x) = _r1(params, jnp.asarray(x), jnp.asarray(w), pool)
        return float(value), {name: np.asarray(value) for name, value in {"x": by_x, **by_params}.items()}

    def params(self, model: Any) -> Mapping[str, np.ndarray]:
        """The stored weights."""
        return {name: np.asarray(value) for name, value in model[0].items()}
